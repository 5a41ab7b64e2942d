"""Each attack solves what it must be able to solve, and does not solve what nobody can."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gia_jax
from gia_jax import (
    Attack,
    Batch,
    Observation,
    Reconstruction,
    ThreatModel,
    attacks,
    clients,
    control,
    keep_best,
    metrics,
    modalities,
    observe,
    stack,
)
from gia_jax import labels as label_rules
from gia_jax.cli.names import (
    ATTACKS,
    INVERTIBLE,
    SOLVERS,
    Generator,
    Target,
    label_rule,
    make_analytic,
    make_attack,
)
from gia_jax.matching.initializations import near_grey

NUM_CLASSES = 10
VICTIMS = (5, 11, 17)  # places in the digits
SOLVED, UNSOLVED = 30, 15  # dB

pytest.importorskip("sklearn")


def _apply(params: Any, inputs: jax.Array) -> jax.Array:
    """Dense layers with sigmoids between them."""
    hidden = inputs.reshape(len(inputs), -1)
    for name, layer in sorted(params.items()):
        hidden = hidden if name == min(params) else jax.nn.sigmoid(hidden)
        hidden = hidden @ layer["kernel"] + layer["bias"]
    return hidden


def _params(*widths: int, limit: float = 0.5) -> dict[str, dict[str, jax.Array]]:
    def layer(i: int) -> dict[str, jax.Array]:
        key_kernel, key_bias = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        return {
            "kernel": jax.random.uniform(key_kernel, widths[i : i + 2], minval=-limit, maxval=limit),
            "bias": jax.random.uniform(key_bias, widths[i + 1 : i + 2], minval=-limit, maxval=limit),
        }

    return {f"dense{i}": layer(i) for i in range(len(widths) - 1)}


CLIENT = clients.federated_sgd(clients.cross_entropy(_apply))
DIGITS = gia_jax.data.load("digits", limit=32)
HEAD = label_rules.dense("dense1")


def _truth() -> Batch:
    """One digit a victim, in the model's space."""
    places = np.asarray(VICTIMS)[:, None]
    inputs = DIGITS.normalize(DIGITS.images[places].astype(jnp.result_type(float)))
    return Batch(jnp.asarray(inputs), jnp.asarray(DIGITS.labels[places]))


def _observations(threat: ThreatModel, params: Any) -> Observation:
    def of_one(batch: Batch) -> Observation:
        return observe(jax.random.key(3), threat, CLIENT, params, batch, num_classes=NUM_CLASSES)

    return jax.vmap(of_one)(_truth())._replace(params=params)


def _best_of(num_restarts: int, attack: Attack, num_steps: int) -> Callable[..., Reconstruction]:
    def one(key: jax.Array, observation: Observation) -> Reconstruction:
        return gia_jax.run(attack, key, observation, num_steps=num_steps)[0]

    in_axes = (None, Observation(params=None, update=0, extra=0))
    fast = {"xla_backend_optimization_level": 3}  # these run for longer than they compile
    return jax.jit(jax.vmap(gia_jax.restarts(one, num_restarts), in_axes), compiler_options=fast)


def _psnr(found: Reconstruction) -> np.ndarray:
    return metrics.score(found.batch, _truth(), DIGITS).psnr[:, 0]


ITERATIVE = {
    # From near grey L-BFGS sticks less often than from the papers' normal pixels.
    "dlg": (lambda: attacks.dlg(CLIENT, num_classes=NUM_CLASSES, init_fn=near_grey()), ThreatModel()),
    "idlg": (lambda: attacks.idlg(CLIENT, HEAD, init_fn=near_grey()), ThreatModel()),
    "inverting_gradients": (
        lambda: attacks.inverting_gradients(CLIENT, bounds=DIGITS.bounds(), num_steps=150, total_variation_weight=1e-4),
        ThreatModel(labels=True),
    ),
}


@pytest.mark.parametrize("name", ITERATIVE)
def test_the_true_gradient_gives_the_image_away_and_noise_does_not(name: str) -> None:
    build, threat = ITERATIVE[name]
    solve = _best_of(12, keep_best(build()), 150)
    observations = _observations(threat, _params(64, 32, NUM_CLASSES))
    for key in jax.random.split(jax.random.key(7)):
        key_attack, key_noise = jax.random.split(key)
        found = solve(key_attack, observations)
        assert _psnr(found).min() > SOLVED
        assert found.is_finite.all()
        believed = found.batch.labels
        if name == "dlg":
            assert believed.max(-1).min() > 0.99  # the joint optimisation has made up its mind
            believed = jnp.argmax(believed, -1)
        np.testing.assert_array_equal(believed, _truth().labels)
        noise = control(key_noise, observations)
        assert _psnr(solve(key_attack, noise)).max() < UNSOLVED


def test_inverting_gradients_improves_on_its_start() -> None:
    attack = ITERATIVE["inverting_gradients"][0]()._replace(num_steps=None)  # one step of its schedule of 150
    observations = _observations(ThreatModel(labels=True), _params(64, 32, NUM_CLASSES))
    one_step, all_steps = (_best_of(1, attack, n)(jax.random.key(0), observations) for n in (1, 150))
    assert _psnr(one_step).max() < UNSOLVED
    assert (all_steps.loss < one_step.loss / 100).all()
    assert (_psnr(all_steps) > _psnr(one_step) + 20).all()


def test_idlg_with_the_wrong_label_fails_and_its_loss_tells() -> None:
    observations = _observations(ThreatModel(), _params(64, 32, NUM_CLASSES))

    def wrong(observation: Observation) -> jax.Array:
        return (label_rules.idlg(HEAD)(observation) + 1) % NUM_CLASSES

    attack = keep_best(attacks.idlg(CLIENT, HEAD, label_fn=wrong, init_fn=near_grey()))
    found = _best_of(4, attack, 150)(jax.random.key(0), observations)
    assert _psnr(found).max() < UNSOLVED
    assert found.loss.min() > 1e-2


@pytest.mark.usefixtures("x64")
def test_levenberg_marquardt_is_exact_where_the_gradient_is_true() -> None:
    target = TARGET._replace(bounds=DIGITS.bounds())
    attack = make_attack("idlg", target, labels="inferred", solver="levenberg_marquardt", num_steps=20)
    solve = _best_of(1, attack, 12)
    observations = _observations(ThreatModel(), _params(64, 32, NUM_CLASSES))
    assert _psnr(solve(jax.random.key(0), observations)).min() > 150
    noise = control(jax.random.key(1), observations)
    assert _psnr(solve(jax.random.key(0), noise)).max() < UNSOLVED


def _invert(params: Any, batch: Batch) -> Reconstruction:
    observation = observe(jax.random.key(0), ThreatModel(labels=True), CLIENT, params, batch)
    return _linear_inversion(observation)


def _linear_inversion(observation: Observation) -> Reconstruction:
    return jax.jit(attacks.linear_inversion(label_rules.dense("dense0")))(jax.random.key(0), observation)


def _digits(count: int) -> tuple[Batch, np.ndarray]:
    pixels = DIGITS.images[:count].astype(float)
    return Batch(jnp.asarray(DIGITS.normalize(pixels)), jnp.asarray(DIGITS.labels[:count])), pixels


def _batch_psnr(found: Reconstruction, pixels: np.ndarray) -> np.ndarray:
    """Of the true images, each against the closest one found."""
    guesses = np.asarray(found.batch.inputs) * np.asarray(DIGITS.std) + np.asarray(DIGITS.mean)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.min(np.mean((pixels[:, None] - guesses[None]) ** 2, (2, 3, 4)), 1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("widths", [(64, 10), (64, 24, 10), (64, 24, 24, 10)], ids=str)
def test_linear_inversion_is_exact_for_one_image(widths: tuple[int, ...]) -> None:
    batch, pixels = _digits(1)
    found = _invert(_params(*widths), batch)
    assert _batch_psnr(found, pixels).min() > 140
    assert found.is_finite
    assert found.loss < 1e-6


def _relu_apply(params: Any, inputs: jax.Array) -> jax.Array:
    hidden = inputs.reshape(len(inputs), -1) @ params["dense0"]["kernel"] + params["dense0"]["bias"]
    return jax.nn.relu(hidden) @ params["dense1"]["kernel"] + params["dense1"]["bias"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("alone", [True, False])
def test_linear_inversion_of_a_batch_needs_rows_that_one_image_activates(count: int, alone: bool) -> None:
    """Two rows an image that fire for it alone give it away to rounding; rows that all images share give mixtures."""
    batch, pixels = _digits(count)
    flat = batch.inputs.reshape(count, -1)
    own = 2 * flat - flat.sum(0) / count
    height = jnp.sum(own * flat, 1)
    others = jnp.max(jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, own @ flat.T), 1)
    assert (others < height).all()
    params = _params(64, 2 * count, NUM_CLASSES)
    bias = jnp.tile(-(height + others) / 2, 2) if alone else jnp.full(2 * count, 1e3)
    params["dense0"] = {"kernel": jnp.tile(own.T, 2), "bias": bias}
    client_fn = clients.federated_sgd(clients.cross_entropy(_relu_apply))
    observation = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, params, batch)
    found = _linear_inversion(observation)
    psnr = _batch_psnr(found, pixels)
    assert psnr.min() > 140 if alone else psnr.min() < 20


@pytest.mark.usefixtures("x64")
def test_linear_inversion_cannot_undo_noise() -> None:
    batch, pixels = _digits(1)
    observation = observe(jax.random.key(0), ThreatModel(labels=True), CLIENT, _params(64, 24, 10), batch)
    noise = control(jax.random.key(1), stack([observation]))
    found = _linear_inversion(observation._replace(update=jax.tree.map(lambda leaf: leaf[0], noise.update)))
    assert _batch_psnr(found, pixels).max() < UNSOLVED
    assert found.loss > 0.1


def _observe(count: int, threat: ThreatModel, params: Any) -> Observation:
    return observe(jax.random.key(0), threat, CLIENT, params, _digits(count)[0])


def test_a_layer_without_bias_or_not_the_first_cannot_be_inverted() -> None:
    observation = _observe(1, ThreatModel(labels=True), _params(64, 24, 10))

    def no_bias(tree: Any) -> label_rules.Dense:
        return label_rules.Dense(tree["dense0"]["kernel"], None)

    with pytest.raises(ValueError, match="needs a bias"):
        attacks.linear_inversion(no_bias)(jax.random.key(0), observation)
    with pytest.raises(ValueError, match=r"\(8, 8, 1\), got 24 inputs"):
        attacks.linear_inversion(HEAD)(jax.random.key(0), observation)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: attacks.dlg(CLIENT, num_classes=1), "num_classes must be an integer of at least 2, got 1"),
        (lambda: attacks.inverting_gradients(CLIENT, bounds=(1.0, -1.0)), "low must be below high=-1.0, got 1.0"),
        (
            lambda: attacks.inverting_gradients(CLIENT, bounds=(-1.0, 1.0), total_variation_weight=-2.0),
            "weight must not be negative, got -2",
        ),
        (
            lambda: attacks.inverting_gradients(CLIENT, bounds=(-1.0, 1.0), num_steps=0),
            "num_steps must be an integer of at least 1, got 0",
        ),
        (lambda: attacks.linear_inversion(HEAD, tolerance=0.0), "tolerance must be positive, got 0.0"),
        (
            lambda: attacks.inverting_gradients(CLIENT),
            "bounds must be given for images, or decode_fn for data of another kind, got neither",
        ),
        (
            lambda: attacks.inverting_gradients(CLIENT, bounds=(-1.0, 1.0), project_fn=lambda z: z),
            "project_fn must be given with a decode_fn, got it without one",
        ),
        (
            lambda: attacks.inverting_gradients(CLIENT, bounds=(-1.0, 1.0), decode_fn=Batch),
            "bounds must not be given with decode_fn, whose data have project_fn and prior_fn",
        ),
        (
            lambda: attacks.inverting_gradients(CLIENT, total_variation_weight=0.1, decode_fn=Batch),
            "total_variation_weight must not be given with decode_fn",
        ),
    ],
)
def test_wrong_arguments_are_named_with_their_value(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


ROWS = {
    "age": [25.0, 39.0, 61.0, 33.0],
    "work": ["private", "public", "none", "public"],
    "hours": [40.0, 10.0, 60.0, 35.0],
    "sex": ["f", "m", "f", "m"],
}


@pytest.mark.parametrize("name", ["dlg", "idlg", "inverting_gradients"])
def test_the_papers_attacks_take_data_of_another_kind(name: str) -> None:
    """A row comes back, its numbers in their bounds, and from a random update there comes none."""
    schema = modalities.fit_schema(ROWS)
    schema = schema._replace(fields=(schema.fields[0]._replace(low=0.0, high=100.0), *schema.fields[1:]))
    modality = modalities.row(schema)
    truth = Batch(schema.encode(jnp.asarray(schema.fields_of(ROWS)[:1])), jnp.asarray([2]))
    params = _params(schema.num_entries, 24, 10)
    seen = observe(jax.random.key(3), ThreatModel(labels=True), CLIENT, params, truth, num_classes=NUM_CLASSES)
    data = modality.matching()
    attack = {
        "dlg": lambda: attacks.dlg(CLIENT, num_classes=NUM_CLASSES, **data),
        "idlg": lambda: attacks.idlg(CLIENT, HEAD, **data),
        "inverting_gradients": lambda: attacks.inverting_gradients(CLIENT, num_steps=150, **data),
    }[name]()
    solve = gia_jax.solve(keep_best(attack), num_steps=150, num_restarts=4)
    noise = control(jax.random.key(4), stack([seen]))
    both = stack([seen, noise._replace(update=jax.tree.map(lambda leaf: leaf[0], noise.update), extra=seen.extra)])
    found = jax.jit(jax.vmap(solve, (None, Observation(None, 0, 0))))(jax.random.key(5), both)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), truth)
    right, of_noise = modality.score_fn(found.batch, twice).scores["fields"][:, 0]
    assert right == 1
    assert of_noise < 1
    age = schema.fields[0]
    assert age.low <= float(found.batch.inputs[1, 0, 0]) * age.std + age.mean <= age.high + 1e-3


def test_what_the_threat_model_does_not_grant_is_named() -> None:
    params = _params(64, 24, 10)
    blind = _observe(1, ThreatModel(batch_size=False), params)
    with pytest.raises(ValueError, match="does not grant 'inputs_like'"):
        attacks.dlg(CLIENT, num_classes=10).init(jax.random.key(0), blind)
    with pytest.raises(ValueError, match="does not grant 'labels'"):
        ITERATIVE["inverting_gradients"][0]().init(jax.random.key(0), _observe(1, ThreatModel(), params))
    with pytest.raises(ValueError, match="a batch of 2"):
        attacks.idlg(CLIENT, HEAD).init(jax.random.key(0), _observe(2, ThreatModel(), params))


TARGET = Target(CLIENT, HEAD, NUM_CLASSES, 1, modalities.image((8, 8, 1)), bounds=(-1.0, 1.0))


@pytest.mark.parametrize("name", ["linear", "nonesuch"])
def test_unknown_attacks_list_the_known_ones(name: str) -> None:
    known = "dlg, idlg, inverting_gradients, magia, fedleak, grad_inversion, gias, sme, glg"
    with pytest.raises(ValueError, match=f"name must be one of {known}, got '{name}'"):
        make_attack(name, TARGET, labels="known", solver="paper", num_steps=1)


def test_unknown_solvers_and_labels_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"solver must be one of {', '.join(SOLVERS)}, got 'magic'"):
        make_attack("dlg", TARGET, labels="known", solver="magic", num_steps=1)
    with pytest.raises(ValueError, match="labels must be known or inferred, got 'guessed'"):
        label_rule("guessed", TARGET)
    with pytest.raises(ValueError, match="labels must be known or inferred, got 'guessed'"):
        make_attack("dlg", TARGET, labels="guessed", solver="paper", num_steps=1)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in (*INVERTIBLE, "glg")])  # which needs graphs
@pytest.mark.parametrize("labels", ["known", "inferred"])
def test_named_attacks_find_known_and_inferred_labels(name: str, labels: str) -> None:
    target = TARGET
    if name == "gias":
        with pytest.raises(ValueError, match="target must have a generator for the attack gias, got None"):
            make_attack(name, target, labels=labels, solver="paper", num_steps=1)
        like = jnp.zeros((8, 8, 1))
        target = target._replace(generator=Generator(lambda params, z: z + params, like, like.shape, 0))
    attack = make_attack(name, target, labels=labels, solver="paper", num_steps=1)
    observation = _observe(1, ThreatModel(labels=labels == "known"), _params(64, 24, 10))
    assert observation.params["dense1"]["bias"].shape == (10,)
    found = attack.init(jax.random.key(0), observation).candidate.best.labels
    if name in ("dlg", "magia") and labels == "inferred":
        assert found == ()  # they are among the unknowns
    else:  # GradInversion has them once for each seed
        np.testing.assert_array_equal(np.atleast_2d(found)[0], _digits(1)[0].labels)


def test_inferred_labels_of_a_batch_are_counted() -> None:
    observation = _observe(4, ThreatModel(), _params(64, 24, 10, limit=0.01))
    rule = label_rule("inferred", TARGET._replace(batch_size=4))
    assert sorted(rule(observation).tolist()) == sorted(_digits(4)[0].labels.tolist())


def test_the_named_linear_attack_reads_its_layer() -> None:
    observation = _observe(1, ThreatModel(), _params(64, 24, 10))
    found = make_analytic("linear", TARGET, model="mlp", labels="inferred")(jax.random.key(0), observation)
    batch, pixels = _digits(1)
    assert _batch_psnr(found, pixels).min() > 60  # float32
    np.testing.assert_array_equal(found.batch.labels, batch.labels)
