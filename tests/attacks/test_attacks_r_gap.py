"""R-GAP is exact where the ranks say so, and only there."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from gia_jax import Batch, Observation, ThreatModel, clients, models, observe
from gia_jax.attacks.constraints import System, convolution_operator, identity_operator, normal_matrix, solve
from gia_jax.attacks.r_gap import (
    TURNING_POINT,
    Twins,
    loss_inversion,
    r_gap,
    r_gap_twins,
)
from gia_jax.attacks.rank_analysis import counted_ranks, rank_analysis
from gia_jax.models import Convolution, FullyConnected, Network, Residual

SHAPE = (6, 6, 3)
BOX = (-1.0, 1.0)

pytestmark = pytest.mark.usefixtures("x64")


def _convolutions(bias: bool = False) -> tuple[Convolution, ...]:
    return Convolution("conv0", 12, 3, 2, 1, bias), Convolution("conv1", 16, 3, 1, 1, bias)


def _block(features: int, stride: int, *, projects: bool, bias: bool = False) -> Residual:
    first = Convolution("first", features, 3, stride, 1, bias)
    shortcut = Convolution("shortcut", features, 1, stride, 0, bias) if projects else None
    return Residual(first, Convolution("second", features, 3, 1, 1, bias), shortcut)


EXACT = {
    "one output": Network(_convolutions(), FullyConnected("head", 1)),
    "five outputs": Network(_convolutions(), FullyConnected("head", 5)),
    "biases, sigmoid": Network(_convolutions(True), FullyConnected("head", 1, True), models.sigmoid),
    "dense, two outputs": Network(
        (FullyConnected("dense0", 9), FullyConnected("dense1", 7)), FullyConnected("head", 2)
    ),
    "identity block": Network(
        (Convolution("conv0", 12, 3, 2, 1), _block(12, 1, projects=False)), FullyConnected("head", 1)
    ),
    "projection block, biases": Network(
        (Convolution("conv0", 12, 3, 1, 1, True), _block(16, 2, projects=True, bias=True)),
        FullyConnected("head", 3, True),
    ),
}
DEFICIENT = {
    "conv1": Network((Convolution("conv0", 8, 3, 1, 1), Convolution("conv1", 3, 3, 2, 1)), FullyConnected("head", 1)),
    "second": Network((Convolution("conv0", 3, 3, 1, 1), _block(3, 1, projects=False)), FullyConnected("head", 1)),
}


NETWORKS = EXACT | DEFICIENT


@functools.cache
def _params(name: str) -> Any:
    params = jax.jit(lambda key: NETWORKS[name].init(key, SHAPE))(jax.random.key(0))
    # The logits of an untrained network are small: the margins would all be near 0.
    params["head"]["kernel"] *= 30
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


@functools.cache
def _observe_fn(name: str) -> Callable[..., Observation]:
    """`(params, x, label) -> observation`."""
    network = NETWORKS[name]
    loss = clients.binary_cross_entropy if network.head.features == 1 else clients.cross_entropy
    client_fn = clients.federated_sgd(loss(network.apply))

    def observed(params: Any, x: jax.Array, label: jax.Array) -> Observation:
        return observe(jax.random.key(0), ThreatModel(), client_fn, params, Batch(x[None], label[None]))

    return jax.jit(observed)


def _observe(name: str, label: int = 0) -> Observation:
    return _observe_fn(name)(_params(name), _victim(), jnp.asarray(label))


@functools.cache
def _twins_fn(name: str) -> Callable[[Observation], Twins]:
    return jax.jit(r_gap_twins(NETWORKS[name], bounds=BOX))


def _twins(name: str, label: int = 0) -> Twins:
    return _twins_fn(name)(_observe(name, label))


def _victim() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), SHAPE, jnp.float64, *BOX)


def _psnr(x: jax.Array, truth: jax.Array) -> float:
    """Of a box of width 2."""
    return float(-10 * jnp.log10(jnp.mean(jnp.square((x - truth) / 2))))


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("name", EXACT)
def test_one_of_the_twins_is_the_input(name: str, label: int) -> None:
    network, x, twins = EXACT[name], _victim(), _twins(name, label)
    assert max(_psnr(twin, x) for twin in twins.inputs) > 200
    assert twins.label == label
    assert twins.residual < 1e-10
    logits = network.apply(_params(name), x[None])[0]
    if len(logits) == 1:
        margin = (2 * label - 1) * logits[0]
    else:
        margin = logits[label] - jax.nn.logsumexp(jnp.delete(logits, label))
    assert jnp.min(jnp.abs(twins.margins - margin)) < 1e-9
    # Only a bias-free head of one or two outputs leaves the scale open, and only for a right prediction.
    has_twin = not network.head.bias and len(logits) <= 2 and margin > 0
    assert bool(twins.margins[1] > twins.margins[0]) == has_twin


@pytest.mark.parametrize("name", ["one output", "identity block", "dense, two outputs"])
def test_twins_have_the_same_gradient(name: str) -> None:
    twins = next(twins for twins in (_twins(name, 0), _twins(name, 1)) if twins.margins[0] > 0)
    assert not np.allclose(*twins.inputs, rtol=0.1)
    first, second = (_observe_fn(name)(_params(name), twin, twins.label).update for twin in twins.inputs)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * jnp.max(jnp.abs(a)))


@pytest.mark.parametrize("name", DEFICIENT)
def test_ranks_name_the_bottleneck_and_the_attack_fails_there(name: str) -> None:
    ranks = rank_analysis(NETWORKS[name], _params(name), SHAPE, key=jax.random.key(7))
    assert next(layer.name for layer in ranks if layer.rank < layer.unknowns) == name
    assert _psnr(_twins(name).inputs[0], _victim()) < 20
    with pytest.raises(ValueError, match=f"layer '{name}' cannot be inverted: .* are missing"):
        r_gap(NETWORKS[name], bounds=BOX)(jax.random.key(0), _observe(name))


def test_constraints_enough_in_number_that_depend_on_each_other_are_refused_by_their_rank() -> None:
    layers = (Convolution("conv0", 6, 4, 2, 2), Convolution("conv1", 4, 3, 2, 1), Convolution("conv2", 16, 3, 1, 1))
    network, shape = Network(layers, FullyConnected("head", 1)), (8, 8, 3)
    params = jax.jit(lambda key: network.init(key, shape))(jax.random.key(0))
    ranks = rank_analysis(network, params, shape, key=jax.random.key(7))
    counted = {name: rank for name, _, rank in counted_ranks(network, shape)}
    short = [layer for layer in ranks if layer.rank < layer.unknowns]
    assert [counted[layer.name] for layer in short] == [layer.unknowns for layer in short] != []
    observation = Observation(params, params, {"inputs_like": jnp.zeros((1, *shape))})
    name, unknowns, rank = short[0]
    message = f"layer '{name}' cannot be inverted: {unknowns} unknowns, {rank} independent .*, {unknowns - rank} are"
    with pytest.raises(ValueError, match=message):
        r_gap(network, bounds=BOX, ranks=ranks)(jax.random.key(0), observation)


@pytest.mark.parametrize("name", ["biases, sigmoid", "identity block", "projection block, biases"])
def test_ranks_are_full_where_the_attack_is_exact(name: str) -> None:
    ranks = rank_analysis(NETWORKS[name], _params(name), SHAPE, key=jax.random.key(7))
    assert all(layer.rank == layer.unknowns for layer in ranks)
    assert counted_ranks(NETWORKS[name], SHAPE) == ranks


def _stacked(layer: Convolution, kernel: jax.Array, k: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The constraints [W; K] as Jacobians of the forward pass and of the kernel's gradient."""

    def output(x: jax.Array, kernel: jax.Array) -> jax.Array:
        tree = {layer.name: {"kernel": kernel}}
        return models.network.apply_layer(layer, models.sigmoid, tree, x[None])[0]

    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda kernel: jnp.vdot(output(x, kernel), k))(kernel)

    zero, size = jnp.zeros(shape), int(np.prod(shape))
    rows = (jax.jacobian(lambda x: output(x, kernel))(zero), jax.jacobian(gradient)(zero))
    return jnp.concatenate([part.reshape(-1, size) for part in rows])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Convolution("c", 4, 3, 2, 1), (7, 6, 2)),
        (Convolution("c", 3, 3, 1, 1), (5, 5, 4)),
        (Convolution("c", 5, 4, 2, 2), (6, 6, 3)),
    ],
    ids=str,
)
def test_normal_matrix_and_bound_are_those_of_the_stacked_constraints(
    layer: Convolution, shape: tuple[int, ...]
) -> None:
    keys = jax.random.split(jax.random.key(3), 2)
    network = Network((layer,), FullyConnected("head", 1))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), network.init(keys[0], shape))
    k = jax.random.normal(keys[1], models.network.output_shape(layer, shape))
    rows = np.asarray(jax.jit(lambda kernel, k: _stacked(layer, kernel, k, shape))(params["c"]["kernel"], k))
    operator = convolution_operator(layer, params, shape)
    flat = k.reshape(-1, layer.features)
    matrix, (weight,) = normal_matrix(
        System(((shape[0] * shape[1], shape[2]),), [([operator], jnp.zeros_like(flat))], [(operator, flat)])
    )
    scaled = rows * np.where(np.arange(len(rows)) < k.size, 1, weight)[:, None]
    np.testing.assert_allclose(matrix, scaled.T @ scaled, atol=1e-12)
    counted = next(bound for bound in counted_ranks(network, shape) if bound.name == "c")
    assert np.linalg.matrix_rank(rows) == counted.rank


def test_solve_leaves_out_what_is_not_determined() -> None:
    """Two images whose sum alone is known: near the solution of least norm, which halves it."""
    total = jax.random.normal(jax.random.key(0), (4, 2))
    both = [identity_operator((2, 2, 2), unknown) for unknown in (0, 1)]
    found, residual = solve(System(((4, 2), (4, 2)), [(both, total)], []))
    np.testing.assert_allclose(found, [total / 2, total / 2], atol=0.05)
    assert residual < 1e-9


def test_loss_inversion_is_the_two_branches_of_lambert() -> None:
    """From mu = value (1 + e^mu) follows mu = value - W(-value e^value)."""
    values = np.asarray([-700.0, -3.0, -1e-9, 1e-9, 0.1, 0.25, 0.278])
    roots = np.asarray(jax.vmap(loss_inversion)(jnp.asarray(values)))
    for value, (small, large) in zip(values, roots, strict=True):
        branches = [value - scipy.special.lambertw(-value * np.exp(value), branch).real for branch in (0, -1)]
        np.testing.assert_allclose([small, large], branches if value > 0 else branches[:1] * 2, rtol=1e-10)
    np.testing.assert_allclose(loss_inversion(jnp.asarray(0.3)), TURNING_POINT)
    np.testing.assert_allclose(TURNING_POINT, 1 + scipy.special.lambertw(np.exp(-1)).real, rtol=1e-15)


@pytest.mark.parametrize(("margin", "truth", "is_ambiguous"), [(0.5, 0, False), (3.0, 1, True)])
def test_the_box_chooses_the_twin(margin: float, truth: int, is_ambiguous: bool) -> None:
    """Of a margin below the turning point the larger twin leaves the box; above it the smaller one cannot."""
    name = "one output"
    params, x = _params(name), _victim()
    logit = NETWORKS[name].apply(params, x[None])[0, 0]
    scaled = params | {"head": {"kernel": params["head"]["kernel"] * margin / abs(logit)}}
    twins = _twins_fn(name)(_observe_fn(name)(scaled, x, jnp.asarray(int(logit > 0))))
    np.testing.assert_allclose(twins.margins[truth], margin, rtol=1e-9)
    assert twins.chosen == truth
    assert twins.is_ambiguous == is_ambiguous
    assert _psnr(twins.inputs[truth], x) > 200


def test_noise_has_no_consistent_input_and_zeros_are_a_failure_by_value() -> None:
    observation = _observe("one output", label=1)
    attack = jax.jit(r_gap(NETWORKS["one output"], bounds=BOX))
    found = attack(jax.random.key(0), observation)
    assert _psnr(found.batch.inputs[0], _victim()) > 200
    assert found.is_finite
    noise = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), observation.update)
    lost = attack(jax.random.key(0), observation._replace(update=noise))
    assert lost.loss > 0.1 > found.loss
    assert _psnr(lost.batch.inputs[0], _victim()) < 15
    zeros = jax.tree.map(jnp.zeros_like, observation.update)
    assert not attack(jax.random.key(0), observation._replace(update=zeros)).is_finite


def test_cnn6_is_the_module_and_cnn6_d_lacks_constraints_in_its_second_layer() -> None:
    apply_fn, params = models.functional(models.CNN6(rngs=nnx.Rngs(0)))
    network, inputs = models.cnn6(10, bias=True), jax.random.normal(jax.random.key(0), (2, 32, 32, 3), jnp.float32)
    np.testing.assert_allclose(network.apply(params, inputs), apply_fn(params, inputs), rtol=1e-4, atol=1e-6)
    shape = (32, 32, 3)
    assert all(layer.rank == layer.unknowns for layer in counted_ranks(models.cnn6(), shape))
    narrow = counted_ranks(models.cnn6(features=(12, 20, 36, 36, 64, 128)), shape)
    assert [layer for layer in narrow if layer.rank < layer.unknowns] == [("conv1", 3468, 3380)]


HEAD = FullyConnected("head", 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: r_gap(Network(_convolutions(True), HEAD), bounds=BOX), "layer 'conv0' has a bias: the head 'head'"),
        (lambda: r_gap(Network(_convolutions(), HEAD, models.sigmoid), bounds=BOX), "activation is not homogeneous"),
        (lambda: r_gap(Network((), HEAD), bounds=BOX), "no hidden layer: the head 'head' needs a bias"),
        (
            lambda: r_gap(EXACT["dense, two outputs"], bounds=BOX, tolerance=-0.5),
            "tolerance must not be negative, got -0.5",
        ),
        (lambda: models.leaky_relu(0.0), "slope must be positive, got 0"),
        (
            lambda: counted_ranks(Network((FullyConnected("d", 4), Convolution("c", 2, 3)), HEAD), SHAPE),
            r"layer 'c' needs an input of shape \(h, w, c\), got \(4,\)",
        ),
        (lambda: counted_ranks(Network((Convolution("c", 2, 9),), HEAD), SHAPE), "layer 'c' leaves nothing"),
        (
            lambda: counted_ranks(Network((_block(4, 1, projects=False),), HEAD), SHAPE),
            r"layer 'first\+second' adds shapes \(6, 6, 4\) and \(6, 6, 3\)",
        ),
        (
            lambda: rank_analysis(EXACT["dense, two outputs"], {}, SHAPE, key=jax.random.key(0), tolerance=0.0),
            r"tolerance must be in \[1e-7, 1\), got 0.0",
        ),
    ],
)
def test_wrong_arguments_are_named(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_observations_are_named() -> None:
    attack, observation = r_gap(NETWORKS["dense, two outputs"], bounds=BOX), _observe("dense, two outputs")
    two = observation._replace(extra={"inputs_like": jnp.zeros((2, *SHAPE))})
    with pytest.raises(ValueError, match="batch of one example, got 2"):
        attack(jax.random.key(0), two)
    other = observation._replace(extra={"inputs_like": jnp.zeros((1, 5, 5, 3))})
    with pytest.raises(ValueError, match=r"\['dense0'\]\['kernel'\] has shape \(108, 9\), expected \(75, 9\)"):
        attack(jax.random.key(0), other)
    with jax.enable_x64(False), pytest.raises(ValueError, match="needs float64: set jax_enable_x64, got float32"):
        attack(jax.random.key(0), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), observation))
