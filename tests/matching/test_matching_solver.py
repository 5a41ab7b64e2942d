"""The matching attack on a small smooth network: what a step computes, what it refuses, what it recovers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import (
    Batch,
    Observation,
    ThreatModel,
    attacks,
    box,
    clients,
    defenses,
    gradient_matching,
    observe,
    run,
)
from gia_jax.decoding import mixing_matrix, retrieve
from gia_jax.labels import dense
from gia_jax.matching import group, initializations, objectives, optimizers, priors
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt

KEY = jax.random.key(0)
KNOWS_LABELS = ThreatModel(labels=True, label_order=True)


def apply_fn(params, inputs):
    hidden = jnp.tanh(inputs @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def network(features=6, hidden=8, classes=3):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"in": {"kernel": (features, hidden), "bias": (hidden,)}, "out": {"kernel": (hidden, classes)}}
    shapes["out"]["bias"] = (classes,)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(tree, [0.5 * jax.random.normal(key, s) for key, s in zip(keys, leaves)])


PARAMS = network()
LOSS = clients.cross_entropy(apply_fn)
CLIENT = clients.federated_sgd(LOSS)
BATCH = Batch(jax.random.normal(jax.random.key(1), (1, 6)), jnp.array([2]))
START = BATCH.inputs + 0.3 * jax.random.normal(jax.random.key(2), (1, 6))


@functools.cache
def observed(threat=KNOWS_LABELS):
    return observe(jax.random.key(3), threat, CLIENT, PARAMS, BATCH)


def observed_batch(batch):
    return observe(jax.random.key(3), KNOWS_LABELS, CLIENT, PARAMS, batch)


@pytest.fixture(scope="module")
def attack():
    return gradient_matching(CLIENT, init_fn=initializations.given(START))


def test_a_step_measures_the_objective_with_its_prior_before_it_moves():
    observation = observed()
    attack = gradient_matching(
        CLIENT,
        init_fn=initializations.given(START),
        objective_fn=objectives.cosine,
        prior_fn=priors.norm(),
        optimizer=optax.sgd(0.5),
    )

    def loss_fn(inputs):  # with jax.grad alone, by plain double reverse mode
        gradient = jax.grad(LOSS)(PARAMS, Batch(inputs, BATCH.labels))
        return objectives.cosine(gradient, observation.update) + jnp.mean(inputs**2) / 2

    state = attack.init(jax.random.key(0), observation)
    state, info = jax.jit(attack.step)(jax.random.key(0), state, observation)
    loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(START)
    np.testing.assert_allclose(info.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(info.match, loss - jnp.mean(START**2) / 2, rtol=1e-5)
    np.testing.assert_allclose(info.grad_norm, jnp.linalg.norm(gradient), rtol=1e-4)
    np.testing.assert_allclose(state.candidate.variables, START - 0.5 * gradient, rtol=1e-4, atol=1e-6)


def test_the_truth_has_no_loss_and_the_reconstruction_says_so(attack):
    found = attack.finalize(attack.init(jax.random.key(0), observed()).candidate, observed())
    assert found.loss > 1e-3
    np.testing.assert_array_equal(found.batch.inputs, START)
    true = gradient_matching(CLIENT, init_fn=initializations.given(BATCH.inputs))
    exact = true.finalize(true.init(jax.random.key(0), observed()).candidate, observed())
    np.testing.assert_allclose(exact.loss, 0, atol=1e-10)
    np.testing.assert_array_equal(exact.batch.labels, BATCH.labels)
    assert found.is_finite
    assert exact.is_finite


def test_the_default_attack_recovers_the_inputs():
    # Without a schedule Adam ends near the minimum; the normal start comes from the key.
    attack, observation = gradient_matching(CLIENT), observed()
    found, info = jax.jit(lambda key: run(attack, key, observation, num_steps=600))(jax.random.key(4))
    assert info.loss.shape == (600,)
    assert float(jnp.mean((found.batch.inputs - BATCH.inputs) ** 2)) < 1e-3


def test_an_update_that_no_input_causes_is_not_matched():
    observation = observed()
    noise = jax.tree.map(lambda g: jax.random.normal(jax.random.key(5), g.shape), observation.update)
    attack = gradient_matching(CLIENT, objective_fn=objectives.cosine)
    found, _ = jax.jit(lambda o: run(attack, jax.random.key(4), o, num_steps=200))(observation._replace(update=noise))
    assert found.loss > 0.1


def test_labels_can_be_among_the_unknowns():
    def init_fn(key, observation):
        del observation
        keys = jax.random.split(key)
        return {"inputs": jax.random.normal(keys[0], (1, 6)), "logits": jax.random.normal(keys[1], (1, 3))}

    seen = []

    def decode_fn(variables, labels):
        seen.append(labels)
        return Batch(variables["inputs"], jax.nn.softmax(variables["logits"]))

    attack = gradient_matching(CLIENT, init_fn=init_fn, label_fn=None, decode_fn=decode_fn)
    nothing_granted = observed(ThreatModel(batch_size=False))
    found, _ = jax.jit(lambda key: run(attack, key, nothing_granted, num_steps=800))(jax.random.key(6))
    assert set(seen) == {()}
    assert found.batch.labels.shape == (1, 3)
    assert int(jnp.argmax(found.batch.labels)) == int(BATCH.labels[0])
    assert float(jnp.mean((found.batch.inputs - BATCH.inputs) ** 2)) < 1e-2


def test_the_label_rule_is_asked_once_with_the_observation():
    asked = []

    def label_fn(observation):
        asked.append(observation)
        return jnp.array([1])

    attack = gradient_matching(CLIENT, label_fn=label_fn, init_fn=initializations.given(START))
    found, _ = run(attack, jax.random.key(0), observed(ThreatModel()), num_steps=3)
    assert len(asked) == 1
    np.testing.assert_array_equal(found.batch.labels, [1])


def test_the_optimizer_is_passed_what_solvers_need():
    observation, calls = observed(), []

    def update_fn(updates, state, params, **extra):
        calls.append((updates, params, extra))
        return jax.tree.map(jnp.zeros_like, updates), state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
    attack = gradient_matching(CLIENT, init_fn=initializations.given(START), prior_fn=priors.norm(), optimizer=spy)
    key = jax.random.key(7)
    _, info = attack.step(key, attack.init(key, observation), observation)
    updates, params, extra = calls[0]
    assert jnp.array_equal(jax.random.key_data(extra["key"]), jax.random.key_data(key))
    np.testing.assert_array_equal(params, START)
    np.testing.assert_array_equal(extra["grad"], updates)
    np.testing.assert_allclose(extra["value"], info.loss)
    np.testing.assert_allclose(extra["value_fn"](START), info.loss, rtol=1e-6)
    squares = sum(jnp.sum(r**2) for r in jax.tree.leaves(extra["residual_fn"](START)))
    np.testing.assert_allclose(squares, info.match, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.02, momentum=0.5),
        optax.adamw(0.05),
        optax.lbfgs(),
        optimizers.fixed_step_lbfgs(),
        optax.chain(optimizers.soft_sign(60), optax.adam(optimizers.step_schedule(0.1, 60))),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05), optimizers.langevin_noise(1e-4)),
        optax.chain(optax.scale_by_sign(), optax.adam(optax.cosine_decay_schedule(0.1, 60))),
    ],
    ids=["sgd", "adamw", "lbfgs", "fixed lbfgs", "soft sign", "langevin", "sign"],
)
def test_any_transformation_of_optax_serves(optimizer):
    attack = gradient_matching(CLIENT, init_fn=initializations.given(START), optimizer=optimizer)
    observation = observed()
    found, info = jax.jit(lambda key: run(attack, key, observation, num_steps=60))(jax.random.key(0))
    assert found.is_finite
    assert found.loss < 0.2 * info.loss[0]


def test_restarts_with_langevin_noise_move_apart():
    optimizer = optax.chain(optax.sgd(0.0), optimizers.langevin_noise(0.1))
    attack, observation = (
        gradient_matching(CLIENT, init_fn=initializations.given(START), optimizer=optimizer),
        observed(),
    )
    keys = jax.random.split(jax.random.key(0), 200)
    ends, _ = jax.jit(jax.vmap(lambda key: run(attack, key, observation, num_steps=4)))(keys)
    moved = np.asarray(ends.batch.inputs - START)
    assert len(np.unique(moved.reshape(200, 6), axis=0)) == 200
    # Four steps of independent noise of deviation 0.1 on the pixels.
    assert moved.std() == pytest.approx(0.2, rel=5 / (2 * moved.size) ** 0.5)


def test_projection_holds_after_every_step():
    low, high = np.linspace(-0.3, -0.1, 6), 0.2
    attack = gradient_matching(CLIENT, project_fn=box(jnp.asarray(low, jnp.float32), high), optimizer=optax.sgd(5.0))
    state = attack.init(jax.random.key(0), observed())
    step = jax.jit(attack.step)
    for _ in range(5):
        state, _ = step(jax.random.key(0), state, observed())
        inputs = np.asarray(state.candidate.variables)
        assert np.all(inputs >= low - 1e-7)
        assert np.all(inputs <= high + 1e-7)
    assert np.any(np.isclose(inputs, low)) or np.any(np.isclose(inputs, high))  # the box was needed


def test_box_takes_one_bound_a_channel():
    project_fn = box(jnp.array([0.0, -1.0]), jnp.array([1.0, 0.0]))
    pixels = jnp.full((1, 2, 2, 2), 5.0).at[0, 0].set(-5.0).at[0, 1, 1].set(jnp.array([0.5, -0.5]))
    expected = [[[0, -1], [0, -1]], [[1, 0], [0.5, -0.5]]]
    np.testing.assert_array_equal(project_fn(pixels)[0], expected)


@pytest.mark.parametrize(
    ("low", "high"),
    [(1.0, 0.0), (0.0, 0.0), (jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0])), (float("nan"), 1.0)],
)
def test_box_refuses_empty_intervals(low, high):
    with pytest.raises(ValueError, match="low must be below high="):
        box(low, high)


def test_box_may_be_made_within_a_trace():
    clipped = jax.jit(lambda x: box(jnp.array([-1.0, 0.0]), 1.0)(x))(jnp.array([[-3.0, -3.0], [3.0, 0.5]]))
    np.testing.assert_array_equal(clipped, [[-1, 0], [1, 0.5]])


def test_missing_grants_are_named(attack):
    with pytest.raises(ValueError, match=r"does not grant 'labels'; observation\.extra has \['inputs_like'\]"):
        attack.init(jax.random.key(0), observed(ThreatModel()))
    with pytest.raises(ValueError, match=r"does not grant 'inputs_like'; observation\.extra has \['labels'\]"):
        gradient_matching(CLIENT).init(jax.random.key(0), observed(ThreatModel(batch_size=False, labels=True)))


def reshaped(update):
    return {**update, "out": {**update["out"], "bias": jnp.zeros(4)}}


def without_bias(update):
    return {**update, "out": {"kernel": update["out"]["kernel"]}}


def with_another(update):
    return {**update, "more": jnp.zeros(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reshaped, r"update\['out'\]\['bias'\] has shape \(4,\), expected \(3,\)"),
        (without_bias, r"update\['out'\]\['bias'\] is missing"),
        (with_another, r"update\['more'\] is one too many"),
    ],
)
def test_an_update_that_does_not_fit_the_parameters_is_refused(attack, change, message):
    observation = observed()
    with pytest.raises(ValueError, match="update does not fit params: " + message):
        attack.init(jax.random.key(0), observation._replace(update=change(observation.update)))


def test_non_finite_reconstructions_are_flagged():
    attack = gradient_matching(CLIENT, init_fn=initializations.given(jnp.full((1, 6), jnp.nan)))
    observation = Observation(PARAMS, observed().update, {"labels": BATCH.labels})
    found = attack.finalize(attack.init(jax.random.key(0), observation).candidate, observation)
    assert not found.is_finite


def test_many_victims_under_vmap_are_the_single_ones():
    batches = Batch(jax.random.normal(jax.random.key(8), (3, 1, 6)), jnp.array([[0], [1], [2]]))
    attack = gradient_matching(CLIENT, optimizer=optax.adam(0.05))
    keys = jax.random.split(jax.random.key(9), 3)

    def one(key, batch):
        return run(attack, key, observed_batch(batch), num_steps=20)[0]

    together = jax.jit(jax.vmap(one))(keys, batches)
    single = jax.jit(one)
    for i in range(3):
        alone = single(keys[i], jax.tree.map(lambda leaf, i=i: leaf[i], batches))
        np.testing.assert_allclose(together.batch.inputs[i], alone.batch.inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_integer_inputs_are_refused_with_what_to_do(dtype):
    extra = {"inputs_like": jnp.zeros((1, 6), dtype), "labels": BATCH.labels}
    observation = observed()._replace(extra=extra)
    message = (
        r"observation\.extra\['inputs_like'\] must be floating point to be searched by descent or solved for, got "
        f"{dtype}: scale pixels to floats, or attack the embeddings of tokens"
    )
    draws = [initializations.normal(), initializations.uniform(), initializations.given(START)]
    fns = [lambda fn=fn: fn(jax.random.key(0), observation) for fn in draws]
    fns.append(lambda: gradient_matching(CLIENT, init_fn=lambda *_: START).init(jax.random.key(0), observation))
    layer = dense("in")
    fns.append(lambda: attacks.linear_inversion(layer)(jax.random.key(0), observation))
    for fn in fns:
        with pytest.raises(ValueError, match=message):
            fn()
    with pytest.raises(ValueError, match="inputs must be floating point to be searched by descent, got int32"):
        initializations.given(jnp.zeros((1, 6), jnp.int32))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("part", ["init_fn", "decode_fn", "project_fn", "prior_fn", "label_fn"])
def test_a_part_that_is_no_function_is_named(part):
    with pytest.raises(ValueError, match=f"{part} must be a function, got 3"):
        gradient_matching(CLIENT, **{part: 3})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"decode_fn": lambda z, labels: z}, "decode_fn must return a Batch, got "),
        ({"decode_fn": lambda z, labels: Batch(z[:, :2], labels)}, r"decode_fn\(...\).inputs has shape .*, expected"),
        ({"project_fn": lambda z: z[:, :1]}, r"project_fn\(...\) has shape .*, expected"),
        ({"project_fn": lambda z: None}, "project_fn must return unknowns like those it takes, got None"),
        ({"project_fn": lambda z: z.astype(jnp.float16)}, "project_fn must keep the type float32 of the unknowns"),
        ({"prior_fn": lambda batch, seen: batch.inputs}, "prior_fn must return a scalar, got an array of shape"),
        ({"objective_fn": lambda one, other: jnp.ones(2)}, r"objective_fn must return a scalar, .* shape \(2,\)"),
        ({"init_fn": lambda key, seen: jnp.zeros((2, 6))}, r"decode_fn\(...\).inputs has shape \(2, 6\), expected"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named(parts, message):
    attack, seen = gradient_matching(CLIENT, **parts), observed()
    with pytest.raises(ValueError, match=message):
        attack.step(jax.random.key(0), attack.init(jax.random.key(0), seen), seen)


def test_targets_may_be_any_tree():
    def loss_fn(params, batch):
        outputs = apply_fn(params, batch.inputs)
        return jnp.mean((outputs[:, 0] - batch.labels["age"]) ** 2) - jnp.mean(outputs[:, batch.labels["kind"]])

    client_fn = clients.federated_sgd(loss_fn)
    targets = {"age": jnp.array([0.5]), "kind": jnp.array([2])}
    update = client_fn(PARAMS, Batch(BATCH.inputs, targets))
    observation = Observation(PARAMS, update, {"inputs_like": jnp.zeros((1, 6)), "labels": targets})
    attack = group.together(gradient_matching(client_fn), 2, group.mean)
    found, _ = jax.jit(lambda key, seen: run(attack, key, seen, num_steps=2))(jax.random.key(0), observation)
    assert found.is_finite
    np.testing.assert_array_equal(found.batch.labels["age"], targets["age"])
    plain = gradient_matching(client_fn)
    state = plain.init(jax.random.key(0), observation)
    broken = state.candidate._replace(labels={**targets, "age": jnp.array([jnp.nan])})
    assert not plain.finalize(broken, observation).is_finite


def test_settings_that_are_no_numbers_or_beyond_memory_are_refused():
    nan, inf = float("nan"), float("inf")
    fns = {
        "scale must not be negative, got nan": lambda: initializations.normal(scale=nan),
        "mean must be finite, got nan": lambda: initializations.normal(mean=nan),
        "low must be finite, got nan": lambda: initializations.uniform(low=nan),
        "high must be finite, got inf": lambda: initializations.uniform(high=inf),
        "value must be finite, got nan": lambda: initializations.constant(nan),
        "limit must be finite, got inf": lambda: initializations.truncated_normal(limit=inf),
        "shape must be an integer of at least 1, got 0": lambda: initializations.normal(shape=(1, 0)),
        "shape must fit into memory: it needs": lambda: initializations.normal(shape=(10**7, 10**6)),
        "low must be below high=nan, got 0": lambda: box(0.0, nan),
        "learning_rate must be positive, got nan": lambda: optimizers.step_schedule(nan, 3),
        "learning_rate must be finite, got inf": lambda: optimizers.fixed_step_lbfgs(learning_rate=inf),
        "memory_size must fit into memory: it needs": (
            lambda: optimizers.fixed_step_lbfgs(memory_size=10**10).init(jnp.zeros(3))
        ),
        "num_seeds must fit into memory: it needs": (
            lambda: group.together(gradient_matching(CLIENT), 10**11, group.mean).init(KEY, observed())
        ),
        "weight must be finite, got inf": lambda: priors.combine((inf, priors.norm())),
        "eps must not be negative, got nan": lambda: priors.total_variation(eps=nan),
        "exponent must be finite, got inf": lambda: priors.norm(exponent=inf),
        "equations must be more than 1 for each unknown and finite, got inf": lambda: levenberg_marquardt(
            equations=inf
        ),
        "tolerance must not be negative, got nan": lambda: levenberg_marquardt(tolerance=nan),
        "threshold must not be negative, got nan": lambda: objectives.masked_cosine(PARAMS, PARAMS, threshold=nan),
        "num_classes must be an integer of at least 2, got True": lambda: attacks.dlg(CLIENT, num_classes=True),
        "num_classes must fit into memory": lambda: attacks.dlg(CLIENT, num_classes=10**12).init(KEY, observed()),
        "total_variation_weight must not be negative, got nan": (
            lambda: attacks.inverting_gradients(CLIENT, bounds=(0.0, 1.0), total_variation_weight=nan)
        ),
        "tolerance must be positive, got nan": lambda: attacks.linear_inversion(dense("in"), tolerance=nan),
        "ratio must be in \\[0, 1\\), got nan": lambda: defenses.prune(nan),
        "size must fit into memory: it needs": (
            lambda: defenses.precode(KEY, apply_fn, PARAMS, num_features=3, num_classes=3, size=10**11)
        ),
        "count must fit into memory: it needs": lambda: defenses.fake_gradients(KEY, 0.1, count=10**12),
        "relaxation must be in \\(0, 1\\], got nan": lambda: retrieve(
            KEY, jnp.eye(2), jnp.ones((2, 1)), relaxation=nan
        ),
        "num_images must fit into memory: it needs": (
            lambda: mixing_matrix(defenses.Mixing(jnp.zeros((2, 1), int), jnp.ones((2, 1))), 10**12)
        ),
        "local_epochs must fit into memory: it needs": (
            lambda: clients.federated_averaging(LOSS, learning_rate=0.1, local_epochs=10**12)(PARAMS, BATCH)
        ),
    }
    for message, fn in fns.items():
        with pytest.raises(ValueError, match=message) as raised:
            fn()
        assert "\n" not in str(raised.value)
