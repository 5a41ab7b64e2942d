"""What every attack promises, whatever its paper. A new attack joins by a row in `CASES`.

Attacks on graphs have no row: the victims here are images, and `graph_spans` is a search on the host, not a program.
What they promise is in the tests of each: tests/attacks/test_attacks_glg.py, test_attacks_graph_spans.py, and so on.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gia_jax
from gia_jax import (
    Attack,
    Batch,
    Observation,
    ThreatModel,
    attacks,
    clients,
    data,
    gradient_matching,
    keep_best,
    matching,
    modalities,
    models,
    observe,
    stack,
)
from gia_jax.cli.names import ATTACKS, INVERTIBLE, SOLVERS, Generator, Target, make_attack
from gia_jax.labels import Dense
from gia_jax.matching.initializations import near_grey
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt

ANALYSES = ("graph_identifiability", "rank_analysis")  # of data that are known
NUM_CLASSES = 4
NUM_STEPS = 3
NUM_RESTARTS = 2
IMAGE = (6, 6, 3)


class Case(NamedTuple):
    """How an attack is built from public facts alone, and on which victims it is tried.

    Attributes:
        build: From what an attacker knows, the attack: iterative, or a function from observation to reconstruction.
        batch_size: Images of a client.
        labels: Whether the threat model grants them.
        x64: Whether the case runs in float64.
        is_random: Whether two keys must give two reconstructions.
        first_layer: "conv", "dense", which compiles sooner, or "attention", of a vision transformer.
        batch_indices: The records of each round, for a client of several.
    """

    build: Callable[[Target], Attack | gia_jax.ReconstructFn]
    batch_size: int = 1
    labels: bool = False
    x64: bool = False
    is_random: bool = True
    first_layer: str = "dense"
    batch_indices: np.ndarray | None = None


def named(name: str, solver: str) -> Callable[[Target], Attack]:
    labels = ATTACKS[name].labels
    return lambda target: make_attack(name, target, labels=labels, solver=solver, num_steps=NUM_STEPS)


def dlg(target: Target) -> Attack:
    return attacks.dlg(target.client_fn, num_classes=target.num_classes)


def idlg(target: Target) -> Attack:
    return attacks.idlg(target.client_fn, target.classifier_fn)


def inverting_gradients(target: Target) -> Attack:
    return attacks.inverting_gradients(target.client_fn, bounds=target.bounds, num_steps=NUM_STEPS)


def magia(target: Target, **more: Any) -> Attack:
    settings = {"num_classes": target.num_classes, "bounds": target.bounds, "subset_size": 1, "subset_weight": 0.1}
    return attacks.magia(target.client_fn, **settings, **more)


def fedleak(target: Target) -> Attack:
    return attacks.fedleak(target.client_fn, bounds=target.bounds, num_steps=NUM_STEPS)


def grad_inversion(target: Target) -> Attack:
    return attacks.grad_inversion(
        target.client_fn,
        target.classifier_fn,
        statistics_fn=lambda params, inputs: [(jnp.mean(inputs, (0, 1, 2)), jnp.var(inputs, (0, 1, 2)))],
        known_statistics_fn=lambda observation: [(jnp.zeros(3), jnp.ones(3))],
        num_seeds=2,
        num_steps=NUM_STEPS,
        num_warm_up_steps=0,
    )


def generator() -> dict[str, Any]:
    """A linear one, and the shape of its latents."""
    size = int(np.prod(IMAGE))
    params = {"kernel": jax.random.normal(jax.random.key(2), (5, size)), "bias": jnp.zeros(size)}

    def generator_fn(params: Any, z: jax.Array) -> jax.Array:
        return (z @ params["kernel"] + params["bias"]).reshape(-1, *IMAGE)

    return {"generator_fn": generator_fn, "generator_params": params, "latent_shape": (5,)}


def latent_search(target: Target) -> Attack:
    return attacks.latent_search(target.client_fn, **generator(), num_steps=NUM_STEPS)


def gias(target: Target) -> Attack:
    return attacks.gias(target.client_fn, **generator(), num_latent_steps=2, num_latents=2, num_steps=NUM_STEPS)


def deep_image_prior(target: Target) -> Attack:
    return attacks.gias(target.client_fn, **generator(), num_latent_steps=0, num_latents=1, num_steps=NUM_STEPS)


def fedavg_leakage(target: Target) -> Attack:
    loss_fn = clients.cross_entropy(_apply)
    one_pass_fn = clients.federated_averaging(loss_fn, learning_rate=0.1, minibatch_size=target.batch_size)
    settings = {"local_epochs": 2, "bounds": target.bounds, "num_steps": NUM_STEPS}
    return attacks.fedavg_leakage(one_pass_fn, **settings)


def unknown_rate(target: Target) -> Attack:
    def client_of_fn(rate: Any) -> gia_jax.ClientFn:
        return clients.federated_averaging(clients.cross_entropy(_apply), learning_rate=rate, local_epochs=2)

    client_fn = clients.with_unknown(client_of_fn, guess=0.1)
    return attacks.inverting_gradients(client_fn, bounds=target.bounds, num_steps=NUM_STEPS)


def sme(target: Target) -> Attack:
    return attacks.sme(target.client_fn, scale=0.1, bounds=target.bounds, num_steps=NUM_STEPS)


def nl_sme(target: Target) -> Attack:
    return attacks.nl_sme(target.client_fn, scale=0.1, bounds=target.bounds, num_steps=NUM_STEPS)


def exact(target: Target) -> Attack:
    return gradient_matching(target.client_fn, init_fn=near_grey(), optimizer=levenberg_marquardt())


def linear_inversion(target: Target) -> gia_jax.ReconstructFn:
    return attacks.linear_inversion(lambda tree: _layers(tree)[0])


def cafe(target: Target) -> gia_jax.ReconstructFn:
    return attacks.cafe(lambda tree: _layers(tree)[:1], target.classifier_fn, split_fn=lambda inputs: [inputs])


def r_gap(target: Target) -> gia_jax.ReconstructFn:
    first = models.FullyConnected("first", 24, bias=True)
    head = models.FullyConnected("head", target.num_classes, bias=True)
    return attacks.r_gap(models.Network((first,), head, models.sigmoid), bounds=target.bounds)


def april(target: Target) -> gia_jax.ReconstructFn:
    layers_fn = attacks.TokenLayers.named(
        position="position", patch="patch", attention="block0.attention", class_token="class_token"
    )
    return attacks.april(target.client_fn, layers_fn=layers_fn)


def april_optimization(target: Target) -> Attack:
    return attacks.april_optimization(target.client_fn, position_fn=lambda update: update["first"]["kernel"])


def cafe_descent(target: Target) -> Attack:
    return attacks.cafe_descent(
        clients.federated_sgd(clients.cross_entropy(_apply)),
        layers_fn=lambda tree: _layers(tree)[:1],
        features_fn=lambda params, inputs: [inputs.reshape(len(inputs), -1)],
        num_classes=target.num_classes,
    )


def continued(target: Target) -> Attack:
    first = keep_best(attacks.idlg(target.client_fn, target.classifier_fn, init_fn=near_grey()))
    second = attacks.idlg(target.client_fn, target.classifier_fn, optimizer=levenberg_marquardt())
    return keep_best(gia_jax.continued(first, second, num_steps=5))


def second_order(target: Target) -> Attack:
    build_fn = functools.partial(gradient_matching, target.client_fn)
    return keep_best(matching.second_order(build_fn, num_starts=2, num_warm_up_steps=3))


CASES = {
    "gradient_matching": Case(
        lambda target: gradient_matching(target.client_fn), batch_size=2, labels=True, first_layer="conv"
    ),
    "dlg": Case(dlg),
    "dlg keep_best": Case(lambda target: keep_best(dlg(target)), batch_size=2, x64=True),
    "dlg lbfgs": Case(named("dlg", "lbfgs"), x64=True),
    "idlg": Case(idlg),
    "idlg adam": Case(named("idlg", "adam"), x64=True),
    "inverting_gradients": Case(inverting_gradients, batch_size=2, labels=True, first_layer="conv"),
    "inverting_gradients fixed_step_lbfgs": Case(
        named("inverting_gradients", "fixed_step_lbfgs"), labels=True, x64=True
    ),
    "magia": Case(magia, batch_size=3),
    "magia adam": Case(lambda target: keep_best(magia(target, optimizer=optax.adam(0.1))), batch_size=2, x64=True),
    "fedleak": Case(lambda target: keep_best(fedleak(target)), batch_size=2, labels=True),
    "grad_inversion": Case(grad_inversion, batch_size=2, first_layer="conv"),
    "grad_inversion keep_best": Case(lambda target: keep_best(grad_inversion(target)), x64=True),
    "latent_search": Case(latent_search, labels=True),
    "gias": Case(gias, batch_size=2, labels=True),
    "gias float64": Case(lambda target: keep_best(gias(target)), batch_size=2, labels=True, x64=True),
    "deep image prior": Case(deep_image_prior, batch_size=2, labels=True),
    "fedavg_leakage": Case(fedavg_leakage, batch_size=2, labels=True),
    "unknown learning rate": Case(lambda target: keep_best(unknown_rate(target)), batch_size=2, labels=True),
    "sme": Case(lambda target: keep_best(sme(target)), batch_size=2, labels=True),
    "nl_sme": Case(nl_sme, labels=True, x64=True),
    "levenberg_marquardt": Case(exact, labels=True, x64=True, first_layer="conv"),
    "continued": Case(continued, x64=True),
    "second_order": Case(second_order, labels=True, x64=True),
    "linear_inversion": Case(linear_inversion, labels=True, is_random=False),
    "linear_inversion float64": Case(linear_inversion, batch_size=2, labels=True, x64=True, is_random=False),
    "cafe": Case(cafe, batch_size=3, is_random=False, batch_indices=np.array([[0, 1], [1, 2], [2, 0]])),
    "r_gap": Case(r_gap, x64=True, is_random=False),
    "april": Case(april, labels=True, x64=True, is_random=False, first_layer="attention"),
    "april_optimization": Case(april_optimization, batch_size=2, labels=True, x64=True),
    "cafe_descent": Case(cafe_descent, batch_size=3, batch_indices=np.array([[0, 1], [1, 2], [2, 0]])),
}

ANALYTIC = ("linear_inversion", "linear_inversion float64", "cafe", "r_gap", "april")  # functions, without a state


class Subject(NamedTuple):
    """An attack as the tests use it. Both functions are traced once, for all victims, or the test fails.

    Attributes:
        one: `(key, observation) -> reconstruction`.
        lanes: The same for victims under `vmap`, the best of `NUM_RESTARTS` for each.
    """

    case: Case
    client_fn: Any
    params: Any
    attack: Attack | gia_jax.ReconstructFn
    one: Callable[..., Any]
    lanes: Callable[..., Any]


@pytest.fixture(params=CASES)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    with jax.enable_x64(CASES[request.param].x64):
        yield _subject(request.param)


@functools.cache
def _subject(name: str) -> Subject:
    case = CASES[name]
    params = _params(case)
    client_fn = _client(case)
    attack = case.build(_target(case, client_fn))
    reconstruct_fn = _reconstruct_fn(attack)
    one = jax.jit(_traced_once(reconstruct_fn))
    in_axes = (0, Observation(params=None, update=0, extra=0))
    best_fn = gia_jax.restarts(reconstruct_fn, NUM_RESTARTS)
    lanes = jax.jit(_traced_once(jax.vmap(best_fn, in_axes)))
    return Subject(case, client_fn, params, attack, one, lanes)


def _traced_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with an error when it is traced again; chex's counter takes all lambdas of a line for one."""
    traces = []

    def once(*args: Any) -> Any:
        traces.append(args)
        assert len(traces) == 1, "traced again"
        return fn(*args)

    return once


@functools.cache
def _vit() -> tuple[Any, Any]:
    settings = {"patch_size": 2, "width": 12, "heads": 2, "depth": 2, "first_block": "plain"}
    return models.functional(models.ViT(IMAGE, NUM_CLASSES, **settings, rngs=nnx.Rngs(0)))


def _params(case: Case) -> dict[str, Any]:
    if case.first_layer == "attention":
        return jax.tree.map(lambda leaf: leaf.astype(float), _vit()[1])
    key_first, key_head = jax.random.split(jax.random.key(0))
    shape, features = {"conv": ((3, 3, 3, 8), 8 * 3 * 3), "dense": ((6 * 6 * 3, 24), 24)}[case.first_layer]
    return {
        "first": {"kernel": 0.5 * jax.random.normal(key_first, shape), "bias": jnp.full(shape[-1], 0.1)},
        "head": {"kernel": jax.random.normal(key_head, (features, NUM_CLASSES)), "bias": jnp.zeros(NUM_CLASSES)},
    }


def _client(case: Case) -> Any:
    loss_fn = clients.cross_entropy(_apply)
    if case.batch_indices is None:
        return clients.federated_sgd(loss_fn)
    return clients.vertical_sgd(loss_fn, case.batch_indices)


def _layers(tree: Any) -> tuple[Dense, Dense]:
    """The layers of parameters given as dicts or as nested tuples."""
    if isinstance(tree, dict):
        tree = tuple((layer["kernel"], layer["bias"]) for layer in (tree["first"], tree["head"]))
    return Dense(*tree[0]), Dense(*tree[1])


def _apply(params: Any, inputs: jax.Array) -> jax.Array:
    if "position" in params:
        return _vit()[0](params, inputs)
    first, head = _layers(params)
    if first.kernel.ndim == 2:
        hidden = inputs.reshape(len(inputs), -1) @ first.kernel
    else:
        hidden = jax.lax.conv_general_dilated(
            inputs, first.kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return jax.nn.sigmoid(hidden + first.bias).reshape(len(inputs), -1) @ head.kernel + head.bias


def _target(case: Case, client_fn: gia_jax.ClientFn) -> Target:
    bounds = (jnp.full(3, -2.0), jnp.full(3, 2.0))
    modality = modalities.image((6, 6, 3))
    return Target(client_fn, lambda tree: _layers(tree)[1], NUM_CLASSES, case.batch_size, modality, bounds=bounds)


def _reconstruct_fn(attack: Attack | gia_jax.ReconstructFn) -> gia_jax.ReconstructFn:
    if isinstance(attack, Attack):
        return lambda key, observation: gia_jax.run(attack, key, observation, num_steps=NUM_STEPS)[0]
    return attack


def _batch(subject: Subject, seed: int) -> Batch:
    key_inputs, key_labels = jax.random.split(jax.random.key(seed))
    inputs = 0.5 * jax.random.normal(key_inputs, (subject.case.batch_size, *IMAGE))
    return Batch(inputs, jax.random.randint(key_labels, inputs.shape[:1], 0, NUM_CLASSES))


def _observe(subject: Subject, batch: Batch, *, client_fn: Any = None, seed: int = 0) -> Observation:
    indices = subject.case.batch_indices
    threat = ThreatModel(labels=subject.case.labels, batch_indices=indices is not None)
    client_fn = client_fn or subject.client_fn
    return observe(jax.random.key(seed), threat, client_fn, subject.params, batch, batch_indices=indices)


VICTIMS: dict[Any, list[Observation]] = {}  # of all cases whose clients are alike


def _victims(subject: Subject) -> list[Observation]:
    """Three of them; the first has the batch of seed 10."""
    case = subject.case
    indices = None if case.batch_indices is None else case.batch_indices.tobytes()
    alike = (case.batch_size, case.labels, case.x64, case.first_layer, indices)
    if alike not in VICTIMS:
        VICTIMS[alike] = [_observe(subject, _batch(subject, 10 + v)) for v in range(3)]
    return VICTIMS[alike]


def _lane(tree: Any, lane: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[lane], tree)


def _keys(count: int = 3) -> jax.Array:
    return jax.random.split(jax.random.key(1), count)


def _assert_close(subject: Subject, actual: Any, desired: Any) -> None:
    """Equal up to the rounding of another order of the same sums; a loss below 1e-6 is rounding itself."""
    tolerance = 1e-9 if subject.case.x64 else 1e-4
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        scale = max(float(np.max(np.abs(want))), 1e-6)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


def test_a_second_victim_does_not_retrace(subject: Subject) -> None:
    first, second, *_ = _victims(subject)
    key = _keys()[0]
    a, b = subject.one(key, first), subject.one(key, second)  # the second trace would raise
    assert a.is_finite
    assert b.is_finite
    assert not np.array_equal(a.batch.inputs, b.batch.inputs)


def test_reconstructions_look_like_the_batch(subject: Subject) -> None:
    batch = _batch(subject, 10)
    found = subject.one(_keys()[0], _victims(subject)[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(found.batch.inputs, batch.inputs)
    assert len(found.batch.labels) == len(batch.labels)
    chex.assert_shape([found.loss, found.is_finite], ())
    assert found.loss.dtype == batch.inputs.dtype
    assert found.is_finite.dtype == bool


def test_vmap_over_victims_and_restarts_equals_a_loop(subject: Subject) -> None:
    victims, keys = _victims(subject), _keys()
    found = subject.lanes(keys, stack(victims))
    for v, observation in enumerate(victims):
        loop = [subject.one(key, observation) for key in jax.random.split(keys[v], NUM_RESTARTS)]
        best = min(loop, key=lambda restart: restart.loss)
        best = best._replace(restart_losses=np.stack([restart.loss for restart in loop]))
        _assert_close(subject, _lane(found, v), best)


def test_the_key_alone_decides(subject: Subject) -> None:
    observation = _victims(subject)[0]
    first, again, other = (subject.one(jax.random.key(k), observation) for k in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert np.array_equal(first.batch.inputs, other.batch.inputs) != subject.case.is_random


def test_a_nan_stays_in_its_lane(subject: Subject) -> None:
    victims, keys = stack(_victims(subject)), _keys()
    broken = victims._replace(update=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), victims.update))
    whole, hurt = subject.lanes(keys, victims), subject.lanes(keys, broken)
    assert hurt.is_finite.tolist() == [True, False, True]
    for lane in (0, 2):
        chex.assert_trees_all_equal(_lane(whole, lane), _lane(hurt, lane))


@pytest.mark.parametrize("subject", [name for name in CASES if name not in ANALYTIC], indirect=True)
def test_state_in_is_state_out(subject: Subject) -> None:
    assert isinstance(subject.attack, Attack)
    key, observation = _keys()[0], _victims(subject)[0]

    def described(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)

    state = jax.eval_shape(subject.attack.init, key, observation)
    stepped, info = jax.eval_shape(subject.attack.step, key, state, observation)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, stepped)
    assert described(state.candidate) == described(stepped.candidate)
    # The line search of optax starts from weakly typed zeros; from there on nothing changes.
    assert described(stepped) == described(jax.eval_shape(subject.attack.step, key, stepped, observation)[0])
    assert {leaf.shape for leaf in info} == {()}
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {observation.params["head"]["bias"].dtype}


@pytest.mark.parametrize("subject", [name for name, case in CASES.items() if not case.x64], indirect=True)
def test_params_may_be_nested_tuples(subject: Subject) -> None:
    def as_tuples(tree: Any) -> Any:
        return tuple((layer.kernel, layer.bias) for layer in _layers(tree))

    observation, key = _victims(subject)[0], _keys()[0]
    tuples = observation._replace(params=as_tuples(observation.params), update=as_tuples(observation.update))
    attack = subject.case.build(_target(subject.case, subject.client_fn))
    found = jax.jit(_reconstruct_fn(attack))(key, tuples)
    _assert_close(subject, found, subject.one(key, observation))


def test_the_truth_is_out_of_reach(subject: Subject) -> None:
    batch, other = _batch(subject, 10), _batch(subject, 99)
    observation, key = _victims(subject)[0], _keys()[0]

    def same_update(params: Any, batch: Batch) -> Any:
        del params, batch
        return observation.update

    # The update and what is granted are kept; all else the client held is replaced. Traced, so that NaN is let in.
    labels = batch.labels if subject.case.labels else other.labels
    lies = [Batch(jnp.full_like(batch.inputs, jnp.nan), labels), Batch(other.inputs, labels)]
    lies.append(Batch(batch.inputs[::-1, ::-1], labels))
    found = subject.one(key, observation)
    observe_fn = jax.jit(lambda lie: _observe(subject, lie, client_fn=same_update))
    blinds = [observe_fn(lie) for lie in lies]
    for blind in blinds:
        chex.assert_trees_all_equal(blind, observation)
        chex.assert_trees_all_equal(subject.one(key, blind), found)
    # Restarts are chosen, and the best of them is, as if the client had held other images.
    keys = _keys(len(lies))
    chex.assert_trees_all_equal(
        subject.lanes(keys, stack(blinds)), subject.lanes(keys, stack([observation] * len(lies)))
    )


@pytest.mark.parametrize("subject", [name for name, case in CASES.items() if case.batch_size == 1], indirect=True)
def test_the_order_of_granted_labels_does_not_matter_for_one_image(subject: Subject) -> None:
    batch = _batch(subject, 10)
    orders = _victims(subject)[0], _observe(subject, batch, seed=1)
    first, second = (subject.one(_keys()[0], observation) for observation in orders)
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("name", [name for name in attacks.__all__ if name.islower() and name not in ANALYSES])
def test_constructors_take_what_the_attacker_assumes_and_nothing_of_the_truth(name: str) -> None:
    first, *rest = inspect.signature(getattr(attacks, name)).parameters.values()
    others = {"linear_inversion": "layer_fn", "cafe": "layers_fn", "giml": "attack_fn"}
    others |= dict.fromkeys(("r_gap", "r_gap_twins"), "network")
    assert first.name == others.get(name, "client_fn")
    positional = {p.name for p in rest if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    assert positional <= {"classifier_fn"}
    for parameter in (first, *rest):
        assert parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        assert not {"truth", "true", "target", "victim", "images", "batch"} & set(parameter.name.split("_"))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in INVERTIBLE])
def test_every_named_attack_has_the_three_functions(name: str, solver: str) -> None:
    target = _target(Case(dlg), lambda params, batch: params)
    if ATTACKS[name].data == "graphs":
        blocks = (data.FeatureBlock("label", ("C", "N")),)
        target = target._replace(modality=modalities.graph(blocks, 3), bounds=None, blocks=blocks)
    if name == "gias":
        target = target._replace(generator=Generator(**generator(), num_latent_steps=0))
    if solver not in (solvers := ATTACKS[name].solvers):
        with pytest.raises(
            ValueError, match=f"solver of the attack {name} must be {', '.join(solvers)}, got '{solver}'"
        ):
            make_attack(name, target, labels="inferred", solver=solver, num_steps=10)
        return
    attack = make_attack(name, target, labels="inferred", solver=solver, num_steps=10)
    parameters = [list(inspect.signature(fn).parameters) for fn in attack[:3]]
    assert parameters == [["key", "observation"], ["key", "state", "observation"], ["candidate", "observation"]]


# Each attack is here once; the cases left out are these with another setting. A dense first layer compiles sooner.
HALF = {name: "bfloat16" for name, case in CASES.items() if not case.x64}
HALF |= {"gradient_matching": "float16", "linear_inversion": "float16", "levenberg_marquardt": "bfloat16"}
HALF = {name: dtype for name, dtype in HALF.items() if name not in ("latent_search", "deep image prior")}


@pytest.mark.parametrize("name", [*HALF, "r_gap"])
def test_half_precision_is_attacked_in_wider_arithmetic(name: str) -> None:
    case, dtype = CASES[name]._replace(first_layer="dense"), HALF.get(name, "bfloat16")
    client_fn, key = _client(case), _keys()[0]
    reconstruct_fn = _reconstruct_fn(case.build(_target(case, client_fn)))
    params = jax.tree.map(lambda leaf: (0.2 * leaf).astype(dtype), _params(case))  # no sigmoid rounds to 0 or 1
    subject = Subject(case, client_fn, params, None, None, None)
    batch = _batch(subject, 10)
    batch = batch._replace(inputs=batch.inputs.astype(dtype))
    observation = _observe(subject, batch)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(observation.update)} == {dtype}
    with jax.enable_x64(name == "r_gap"):
        found = jax.jit(reconstruct_fn)(key, observation)
    assert found.is_finite
    assert found.batch.inputs.dtype == dtype
    assert found.batch.inputs.shape == batch.inputs.shape
    assert found.loss.dtype == jnp.float32
