"""What is computed from numbers in half precision equals what is computed from the same numbers in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import Batch, Observation, ThreatModel, clients, decoding, defenses, gradient_matching, labels, observe
from gia_jax.attacks.cafe import recordwise
from gia_jax.defenses.mixing import Mixing
from gia_jax.matching import adaptive, group, initializations, objectives, optimizers, priors
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt
from gia_jax.precision import cast_like, wide_dtype, widened_tree

HALVES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
KEY = jax.random.key(0)


def drawn(seed, shapes, dtype):
    generator = np.random.default_rng(seed)
    return {name: jnp.asarray(generator.normal(size=shape), dtype) for name, shape in shapes.items()}


update = functools.partial(drawn, shapes={"a": (40, 30), "b": (30,), "c": (7, 3)})


def assert_same(half, single):
    """Asserts that two trees hold the same numbers, whatever their types."""
    for got, wanted in zip(jax.tree.leaves(half), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=1e-6, atol=1e-7)


def test_trees_are_widened_and_cast_back(x64):
    tree = {"half": jnp.ones(2, jnp.bfloat16), "whole": jnp.arange(2), "double": jnp.ones(2, jnp.float64), "key": KEY}
    wide = widened_tree(tree)
    assert (wide["half"].dtype, wide["whole"].dtype, wide["double"].dtype) == (
        "float32",
        tree["whole"].dtype,
        "float64",
    )
    assert wide["key"] is KEY
    assert wide_dtype(jnp.float16) == jnp.float32
    assert cast_like({"half": wide["half"]}, {"half": tree["half"]})["half"].dtype == jnp.bfloat16


OBJECTIVES = {
    "euclidean": objectives.euclidean,
    "layerwise_euclidean": objectives.layerwise_euclidean,
    "l1": objectives.l1,
    "cosine": objectives.cosine,
    "layerwise_cosine": objectives.layerwise_cosine,
    "angular": objectives.angular,
    "masked_cosine": objectives.masked_cosine,
    "tag": objectives.tag(),
    "gaussian_likelihood": objectives.gaussian_likelihood(0.3),
    "laplace_likelihood": objectives.laplace_likelihood(0.3),
    "linear_decay": objectives.weighted(objectives.euclidean, objectives.linear_decay()),
    "exponential_decay": objectives.weighted(objectives.cosine, objectives.exponential_decay()),
    "largest": objectives.weighted(objectives.cosine, objectives.largest(2)),
    "selected": objectives.selected(objectives.cosine, lambda path: "a" in path),
    "pruned": adaptive.pruned(),
    "supported": adaptive.supported(),
    "sign_hinge": adaptive.sign_hinge(),
    "rounding_likelihood": adaptive.rounding_likelihood(4),
    "relative": adaptive.relative(objectives.euclidean),
    "rescaled": adaptive.rescaled(objectives.euclidean),
    "recordwise": recordwise,
}


@HALVES
def test_objectives_compare_in_single_precision(dtype):
    simulated, observed = update(0, dtype=dtype), update(1, dtype=dtype)
    observed["a"] = jnp.where(observed["a"] > 1, observed["a"], 0)  # some objectives read where an update is zero

    @jax.jit
    def values(s, o):
        return {name: (fn(s, o), fn(s, s)) for name, fn in OBJECTIVES.items()}

    half, single = values(simulated, observed), values(*widened_tree((simulated, observed)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"float32"}
    assert_same(half, single)
    assert all(half[name][0] != 0 for name in OBJECTIVES)
    np.testing.assert_allclose(half["cosine"][1], 0, atol=1e-5)
    gradient = jax.grad(objectives.euclidean)(simulated, observed)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {dtype}


@HALVES
def test_what_is_read_of_an_update_is_read_in_single_precision(dtype):
    simulated, observed = update(0, dtype=dtype), update(1, dtype=dtype)
    for read in (
        adaptive.estimated_norm,
        adaptive.estimated_sparsity,
        objectives.linear_decay(),
        objectives.largest(1),
    ):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(read(observed))} == {"float32"}
        assert_same(read(observed), read(widened_tree(observed)))
    for residual_fn in (objectives.euclidean_residuals, objectives.cosine_residuals):
        residuals = residual_fn(simulated, observed)
        assert_same(residuals, residual_fn(*widened_tree((simulated, observed))))
    np.testing.assert_allclose(
        optax.tree.norm(residuals, squared=True), objectives.cosine(simulated, observed), rtol=1e-5
    )


@HALVES
def test_priors(dtype):
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4, 3)), dtype)

    def statistics_fn(params, inputs):
        assert inputs.dtype == dtype  # what the model computes with
        return [(jnp.mean(inputs, (0, 1, 2)), jnp.var(inputs, (0, 1, 2)))]

    known = {"statistics": [(jnp.zeros(3, dtype), jnp.ones(3, dtype))], "consensus": jnp.ones_like(inputs)}
    observation = Observation({}, {}, {"inputs_like": jnp.zeros_like(inputs), **known})
    fns = {
        "total_variation": priors.total_variation(),
        "isotropic": priors.total_variation(inner_exponent=2.0, outer_exponent=0.5),
        "norm": priors.norm(),
        "orthogonality": priors.orthogonality,
        "statistics": priors.batch_norm_statistics(statistics_fn),
        "consistency": group.consistency,
        "combine": priors.combine((0.1, priors.norm()), (1e-6, priors.total_variation())),
    }
    for fn in fns.values():
        half, single = (fn(Batch(x, jnp.zeros(3)), observation) for x in (inputs, inputs.astype(jnp.float32)))
        assert half.dtype == jnp.float32
        assert_same(half, single)


@HALVES
def test_registration(dtype):
    fixed = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 2)), dtype)
    moving = jnp.roll(fixed, (2, 1), (0, 1))
    np.testing.assert_array_equal(group.register(moving, fixed), fixed)
    mean = group.mean(jnp.stack([fixed[None], moving[None], jnp.full_like(fixed, jnp.nan)[None]]))
    assert mean.dtype == dtype
    assert_same(mean, ((fixed.astype(jnp.float32) + moving.astype(jnp.float32)) / 2)[None].astype(dtype))


@HALVES
def test_unknowns_are_wide_and_the_client_and_the_reconstruction_are_not(dtype):
    params = {"w": jnp.ones((3, 2), dtype)}
    seen = []

    def client_fn(params, batch):
        seen.append(batch.inputs.dtype)
        return jax.grad(lambda p: jnp.mean(jnp.square(batch.inputs @ p["w"] - batch.labels)))(params)

    batch = Batch(jnp.ones((1, 3), dtype), jnp.ones((1, 2), dtype))
    extra = {"inputs_like": jnp.zeros_like(batch.inputs), "labels": batch.labels}
    observation = Observation(params, client_fn(params, batch), extra)
    attack = gradient_matching(client_fn, optimizer=optax.sgd(1e-4))
    state = attack.init(KEY, observation)
    before = state.candidate.variables
    state, info = attack.step(KEY, state, observation)
    assert before.dtype == state.candidate.variables.dtype == info.loss.dtype == jnp.float32
    assert jnp.all(before != state.candidate.variables)  # a step that half precision would lose
    found = attack.finalize(state.candidate, observation)
    assert found.batch.inputs.dtype == dtype
    assert found.loss.dtype == jnp.float32
    assert found.is_finite
    assert set(seen) == {jnp.dtype(dtype)}
    draws = (initializations.normal(), initializations.uniform(), initializations.constant(0.3))
    draws = (*draws, initializations.truncated_normal(), initializations.given(batch.inputs))
    assert {fn(KEY, observation).dtype for fn in draws} == {jnp.dtype("float32")}


OPTIMIZERS = {
    "fixed_step_lbfgs": lambda: optimizers.fixed_step_lbfgs(memory_size=3),
    "soft_sign": lambda: optimizers.soft_sign(10),
    "langevin_noise": lambda: optimizers.langevin_noise(0.1),
    "cholesky": lambda: levenberg_marquardt(equations=None),
    "cg": lambda: levenberg_marquardt(equations=None, linear_solver="cg"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    optimizer = optax.with_extra_args_support(OPTIMIZERS[name]())
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(9, 6)), jnp.float32)

    def residual_fn(x):
        return matrix @ x["x"].astype(jnp.float32) - 1

    def value_fn(x):
        return jnp.sum(jnp.square(residual_fn(x)))

    @jax.jit
    def stepped(x):
        state = optimizer.init(x)
        for _ in range(2):
            value, grad = jax.value_and_grad(value_fn)(x)
            extra = {"key": KEY, "value": value, "value_fn": value_fn, "residual_fn": residual_fn}
            updates, state = optimizer.update(grad, state, x, **extra)
        return updates

    start = {"x": jnp.asarray(np.random.default_rng(1).normal(size=6), jnp.bfloat16)}
    half, single = stepped(start), stepped(widened_tree(start))
    assert half["x"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half["x"], np.float32), single["x"], rtol=0.03, atol=0.03)


HEAD = labels.dense("head")


def affine(params, inputs):
    return inputs @ params["head"]["kernel"] + params["head"]["bias"]


RULES = {
    "bias_counts": labels.bias_counts(HEAD),
    "dummies": labels.bias_counts(HEAD, apply_fn=affine, num_dummies=8, key=KEY),
    "greedy_bias": labels.greedy_bias(HEAD),
    "ilrg": labels.ilrg(HEAD),
    "llg": labels.llg(HEAD),
    "llg_plus": labels.llg_plus(clients.federated_sgd(clients.cross_entropy(affine)), HEAD, num_dummies=4, key=KEY),
    "column_minimum": labels.column_minimum(HEAD),
}


@HALVES
def test_label_rules(dtype):
    inputs = 1 + 0.1 * jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), dtype))
    params = {"head": {"kernel": 0.05 * jnp.ones((5, 6), dtype), "bias": jnp.zeros(6, dtype)}}
    truth = jnp.array([0, 2, 3, 5])
    client_fn = clients.federated_sgd(clients.cross_entropy(affine))
    observation = observe(KEY, ThreatModel(), client_fn, params, Batch(inputs, truth))
    assert observation.update["head"]["bias"].dtype == dtype
    found = jax.jit(lambda observation: {name: rule(observation) for name, rule in RULES.items()})(observation)
    assert {name: sorted(rule.tolist()) for name, rule in found.items()} == {name: [0, 2, 3, 5] for name in RULES}
    one = observation._replace(extra={"inputs_like": jnp.zeros((1, 5), dtype)})
    kernel = jnp.zeros((300, 3), dtype).at[:, 1].set(-1e-2)
    update = {"head": {"kernel": kernel, "bias": jnp.zeros(3, dtype)}}
    assert labels.idlg(HEAD)(one._replace(update=update)).tolist() == [1]


def test_counts_beyond_the_whole_numbers_of_half_precision():
    counts = jnp.array([600, 424], jnp.bfloat16)
    assert np.bincount(labels.classifier.labels_from_counts(counts, 1024)).tolist() == [600, 424]


TRANSFORMATIONS = {
    "clip": lambda: defenses.clip(1.0),
    "prune": lambda: defenses.prune(0.7, scope="global"),
    "sign": lambda: defenses.sign(),
    "gaussian_noise": lambda: defenses.gaussian_noise(KEY, 0.1),
    "laplace_noise": lambda: defenses.laplace_noise(KEY, 0.1),
    "quantize": lambda: defenses.quantize(KEY, 4),
    "fake_gradients": lambda: defenses.fake_gradients(KEY, 0.5, count=2),
}


@HALVES
def test_defenses_of_the_update(dtype):
    given = update(0, dtype=dtype)

    @jax.jit
    def shared(given):
        made = {name: make() for name, make in TRANSFORMATIONS.items()}
        return {name: tx.update(given, tx.init(given))[0] for name, tx in made.items()}

    half, single = shared(given), shared(widened_tree(given))
    assert_same(half, jax.tree.map(lambda leaf: leaf.astype(dtype), single))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {dtype}


def test_fake_gradients_hold_nothing_of_the_magnitudes():
    given = {"w": jnp.array([3e4, -2e4, 1e4, 5.0])}
    tx = defenses.fake_gradients(KEY, 1e-3, count=1)
    one, other = (tx.update(g, tx.init(g))[0]["w"] for g in (given, {"w": jnp.array([3.0, -2.0, 1.0, 0.5])}))
    np.testing.assert_array_equal(one, other)


def test_error_feedback_keeps_what_half_precision_would_round_away():
    tx = defenses.top_k(0.5)
    given = {"w": jnp.array([1.0, 2.0**-10], jnp.bfloat16)}
    state = tx.init(given)
    state = state._replace(residual={"w": jnp.array([0.0, 0.5])})
    for _ in range(4):
        shared, state = tx.update(given, state)
        assert shared["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.residual["w"], [0.0, 0.5 + 4 * 2.0**-10], rtol=1e-6)


def test_the_clients_that_add_up():
    def loss_fn(params, batch):
        return jnp.mean(batch.inputs @ params["w"])

    params = {"w": jnp.ones(2, jnp.bfloat16)}
    batch = Batch(jnp.full((513, 2), 1e-2, jnp.bfloat16).at[0].set(3.0), jnp.zeros(513, jnp.int32))
    mean = np.mean(np.asarray(batch.inputs, np.float32), 0)
    apart = defenses.dp_sgd(loss_fn, KEY, norm=10.0, noise_multiplier=0.0)
    averaging = clients.federated_averaging(loss_fn, learning_rate=1e-4, local_epochs=2)
    few = jax.tree.map(lambda leaf: leaf[:8], batch)
    for client_fn, given, wanted in (
        (apart, batch, mean),
        (averaging, few, np.mean(few.inputs.astype(jnp.float32), 0)),
    ):
        shared = client_fn(params, given)["w"]
        assert shared.dtype == jnp.bfloat16
        np.testing.assert_allclose(shared.astype(jnp.float32), wanted, rtol=0.01)


def test_rounds_of_vertical_learning_add_up():
    def loss_fn(params, batch):
        return jnp.mean(batch.inputs @ jnp.square(params["w"]))

    indices = np.zeros((300, 1), np.int32)
    client_fn = clients.vertical_sgd(loss_fn, indices, learning_rate=1e-3)
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    shared = client_fn(params, Batch(jnp.ones((1, 2), jnp.bfloat16), jnp.zeros(1, jnp.int32)))["w"]
    assert shared.dtype == jnp.bfloat16
    np.testing.assert_allclose(shared[-1].astype(jnp.float32), 2 * (1 - 2e-3) ** 299, rtol=0.03)


@HALVES
def test_defenses_of_the_batch_and_the_model(dtype):
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), dtype)
    mixing = Mixing(jnp.array([[0, 1, 2], [1, 2, 0]]), jnp.array([[0.4, 0.35, 0.25], [0.6, 0.3, 0.1]]))
    assert_same(defenses.mix(mixing, inputs), defenses.mix(mixing, inputs.astype(jnp.float32)).astype(dtype))
    params = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), dtype)}

    def features_fn(params, inputs):
        return jnp.tanh(inputs @ params["w"])

    model = defenses.precode(KEY, features_fn, params, num_features=6, num_classes=3, size=5)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {dtype}
    batch = Batch(inputs, jnp.array([0, 1, 2]))
    loss = jax.jit(model.loss_fn(KEY))(model.params, batch)
    single = jax.jit(model.loss_fn(KEY))(*widened_tree((model.params, batch)))
    np.testing.assert_allclose(np.asarray(loss, np.float32), single, rtol=0.02)

    def apply_fn(params, inputs):
        return jnp.tanh(inputs @ params["w"]) @ params["head"]["kernel"]

    params = {**params, "head": {"kernel": jnp.ones((6, 3), dtype)}}
    for probes in (0, 16):
        kept = defenses.kept_features(apply_fn, labels.dense("head"), params, inputs, ratio=0.5, num_probes=probes)
        assert kept.sum() == 3


@HALVES
def test_decoding(dtype):
    generator = np.random.default_rng(0)
    coefficients = generator.dirichlet([3.0] * 2, (6, 3))
    sources = np.stack([np.array([[0, 1], [1, 2], [2, 0]])] * 6)
    mixing = Mixing(jnp.asarray(sources), jnp.asarray(coefficients, dtype))
    clear = jnp.asarray(generator.normal(size=(3, 4)), jnp.float32)
    encodings = defenses.mix(Mixing(mixing.sources.reshape(-1, 2), mixing.coefficients.reshape(-1, 2)), clear)
    encodings = encodings.astype(dtype).reshape(6, 3, 4)
    images = decoding.decode_mixup(mixing, encodings, 3)
    assert images.dtype == dtype
    np.testing.assert_allclose(images.astype(jnp.float32), clear, atol=0.05)
    found = decoding.decode_instahide(KEY, mixing, encodings, 3, tolerance=0.05, num_restarts=3, num_steps=30)
    assert found.images.dtype == dtype
    assert found.residuals.dtype == jnp.float32
    assert jnp.all(found.solved)
    rows = encodings.reshape(18, 4)
    alike = decoding.similarity(rows, rows)
    assert_same(alike, decoding.similarity(*widened_tree((rows, rows))))
    matrix = decoding.mixing_matrix(mixing, 3)
    assert decoding.noise_gain(matrix.astype(dtype)).dtype == jnp.float32
    recovered = decoding.recover_mixing(KEY, alike.astype(dtype), 3, k=2, num_restarts=1, num_steps=5)
    assert recovered.coefficients.dtype == jnp.float32
    refined = decoding.refine_mixing(KEY, recovered, rows, 3, num_rounds=1)
    np.testing.assert_allclose(refined.coefficients.sum(1), 1, rtol=1e-5)
