"""CAFE: which batches identify the records, and what is then recovered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import Batch, ThreatModel, attacks, clients, observe, run
from gia_jax.attacks.cafe import batch_rank, feature_matching, joined
from gia_jax.labels import Dense, dense

RECORDS, SHAPE, WIDTH, CLASSES = 12, (4, 6, 1), 5, 4
THREAT = ThreatModel(batch_indices=True)


def fully_connected(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def worker(params, part):
    return fully_connected(params["last"], jax.nn.tanh(fully_connected(params["first"], part.reshape(len(part), -1))))


LOSS = clients.cross_entropy(clients.vertical_model(clients.quadrants, worker, fully_connected))


def first_layers(tree):
    return [Dense(w["first"]["kernel"], w["first"]["bias"]) for w in tree["workers"]]


CAFE = attacks.cafe(first_layers, dense("server"), split_fn=clients.quadrants)


def parameters(seed=0):
    rng = np.random.default_rng(seed)

    def layer(d, r):
        return {"kernel": jnp.asarray(rng.normal(size=(d, r)) / d**0.5), "bias": jnp.asarray(rng.normal(size=r))}

    return {"workers": [{"first": layer(6, WIDTH), "last": layer(WIDTH, 3)} for _ in range(4)], "server": layer(12, 4)}


def records(seed=0):
    rng = np.random.default_rng(seed)
    return Batch(jnp.asarray(rng.normal(size=(RECORDS, *SHAPE))), jnp.asarray(rng.integers(0, CLASSES, RECORDS)))


def random_batches(rounds, size=3, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(RECORDS, size, replace=False) for _ in range(rounds)])


def observed(indices, **options):
    client_fn = jax.jit(clients.vertical_sgd(LOSS, indices, **options))
    return observe(jax.random.key(0), THREAT, client_fn, parameters(), records(), batch_indices=indices)


def error(found):
    truth = records().inputs
    return float(jnp.linalg.norm(found.batch.inputs - truth) / jnp.linalg.norm(truth))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 3, 9])
def test_identified_records_and_their_labels_are_exact(size):
    indices = random_batches(18, size) if size > 1 else np.arange(RECORDS)[:, None]
    found = CAFE(jax.random.key(0), observed(indices))
    assert error(found) < 1e-9
    assert found.loss < 1e-9
    assert found.is_finite
    np.testing.assert_array_equal(found.batch.labels, records().labels)


@pytest.mark.usefixtures("x64")
def test_a_model_that_moves_spoils_the_reconstruction_and_the_loss_shows_it():
    errors, losses = zip(
        *[
            (error(found), found.loss)
            for found in (
                CAFE(jax.random.key(0), observed(random_batches(18), learning_rate=r)) for r in (0.0, 1e-4, 1.0)
            )
        ]
    )
    assert errors[0] < 1e-9 < errors[1] < 0.1 < errors[2]
    assert losses[0] < 1e-9 < losses[1] < losses[2]


@pytest.mark.usefixtures("x64")
def test_inside_a_trace_unidentified_records_are_no_exception_but_not_finite():
    attack = jax.jit(CAFE)
    few, enough = observed(random_batches(RECORDS - 1)), observed(random_batches(RECORDS + 6))
    found = attack(jax.random.key(0), few)
    assert not found.is_finite
    assert not error(found) < 1e-2  # NaN where a record was never used
    assert attack(jax.random.key(0), enough).is_finite


def slices(params, inputs):
    del params
    return [part.reshape(len(part), -1) for part in clients.quadrants(inputs)]


@pytest.mark.usefixtures("x64")
def test_the_third_step_inverts_known_features_inside_the_box():
    def worker_features(params, inputs):
        return [jax.nn.tanh(part @ params["map"]) for part in slices(None, inputs)]

    params = {"map": jnp.asarray(np.random.default_rng(0).normal(size=(6, 12)) / 3)}
    truth = records()
    features = worker_features(params, truth.inputs)
    like = Batch(jnp.zeros_like(truth.inputs), truth.labels)

    def inverted(bound):
        invert_fn = feature_matching(worker_features, bounds=(-bound, bound), num_steps=600)
        return invert_fn(jax.random.key(0), params, features, like, ())

    np.testing.assert_allclose(inverted(4.0), truth.inputs, atol=5e-3)
    assert np.abs(inverted(0.5)).max() == 0.5


@pytest.mark.usefixtures("x64")
def test_the_third_step_completes_the_attack():
    attack = attacks.cafe(
        first_layers,
        dense("server"),
        split_fn=clients.quadrants,
        invert_fn=feature_matching(slices, bounds=(-5.0, 5.0), num_steps=400),
    )
    assert error(attack(jax.random.key(0), observed(random_batches(18)))) < 1e-3


@pytest.mark.usefixtures("x64")
def test_gradients_of_layers_before_the_dense_one_tell_what_its_input_does_not():
    rng = np.random.default_rng(3)

    def narrow(params, part):
        return jnp.tanh(part.reshape(len(part), -1) @ params["map"])

    def features_fn(params, inputs):
        return [narrow(own, part) for own, part in zip(params["workers"], clients.quadrants(inputs), strict=True)]

    def own_worker(params, part):
        return fully_connected(params["last"], jax.nn.tanh(fully_connected(params["first"], narrow(params, part))))

    loss_fn = clients.cross_entropy(clients.vertical_model(clients.quadrants, own_worker, fully_connected))
    params, truth, indices = parameters(), records(), random_batches(18)
    for own in params["workers"]:  # three numbers of six
        own["map"] = jnp.asarray(rng.normal(size=(6, 3)) / 3)
        own["first"]["kernel"] = own["first"]["kernel"][:3]
    client_fn = jax.jit(clients.vertical_sgd(loss_fn, indices))
    observation = observe(jax.random.key(0), THREAT, client_fn, params, truth, batch_indices=indices)

    def found(**options):
        invert_fn = feature_matching(features_fn, bounds=(-5.0, 5.0), num_steps=600, **options)
        attack = attacks.cafe(first_layers, dense("server"), split_fn=clients.quadrants, invert_fn=invert_fn)
        return jax.jit(attack)(jax.random.key(0), observation)

    assert error(found()) > 0.3
    assert error(found(client_fn=clients.per_example(loss_fn))) < 1e-2


@pytest.mark.usefixtures("x64")
def test_a_record_without_a_gradient_at_a_worker_spoils_no_other():
    params = parameters()
    params["server"]["kernel"] = params["server"]["kernel"].at[:3].set(0)  # the first worker gets no gradient
    indices = random_batches(18)
    client_fn = jax.jit(clients.vertical_sgd(LOSS, indices))
    observation = observe(jax.random.key(0), THREAT, client_fn, params, records(), batch_indices=indices)
    found, truth = CAFE(jax.random.key(0), observation), records().inputs
    np.testing.assert_array_equal(found.batch.inputs[:, :2, :3], 0)
    np.testing.assert_allclose(found.batch.inputs[:, 2:], truth[:, 2:], atol=1e-9)
    assert found.is_finite


def test_the_descent_of_the_paper_approaches_what_the_exact_steps_find():
    """Where every round is one record, the loop finds each; where all rounds are all records, it finds mixtures."""
    attack = attacks.cafe_descent(
        clients.federated_sgd(LOSS), layers_fn=first_layers, features_fn=slices, num_classes=CLASSES
    )

    def solve(indices, num_steps):
        observation = observed(indices)
        fast = jax.jit(
            lambda: run(attack, jax.random.key(1), observation, num_steps=num_steps)[0],
            compiler_options={"xla_backend_optimization_level": 3},
        )
        return fast()

    found = solve(np.arange(RECORDS)[:, None], 6000)
    assert error(found) < 0.3
    assert found.is_finite
    np.testing.assert_array_equal(found.batch.labels.argmax(1), records().labels)
    assert error(solve(np.tile(np.arange(RECORDS), (12, 1)), 1000)) > 0.7


EPOCHS = 4 * [np.arange(RECORDS).reshape(4, 3)]


@pytest.mark.parametrize(
    ("indices", "rank"),
    [
        (random_batches(RECORDS - 1, seed=3), RECORDS - 1),  # one equation a round
        (np.concatenate(EPOCHS), 4),  # a fixed partition
        (np.tile(np.arange(RECORDS), (20, 1)), 1),  # the batch is everything
    ],
)
def test_batches_that_cannot_identify_the_records_are_refused_by_their_rank(indices, rank):
    assert batch_rank(indices, RECORDS) == rank
    message = f"batch_indices cannot identify the records: the {len(indices)} batches must have rank 12, got {rank}"
    with pytest.raises(ValueError, match=message):
        CAFE(jax.random.key(0), observed(indices))


@settings(max_examples=30, deadline=None)
@given(epochs=st.integers(1, 6), size=st.sampled_from([2, 3, 4, 6]), seed=st.integers(0, 10**6))
def test_every_epoch_after_the_first_adds_one_less_than_its_batches(epochs, size, seed):
    rng = np.random.default_rng(seed)
    shuffled = np.concatenate([rng.permutation(RECORDS).reshape(-1, size) for _ in range(epochs)])
    assert batch_rank(shuffled, RECORDS) <= min(RECORDS, 1 + epochs * (RECORDS // size - 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: feature_matching(slices, bounds=(-1.0, 1.0), num_steps=0),
            "num_steps must be an integer of at least 1, got 0",
        ),
        (lambda: feature_matching(slices, bounds=(1.0, -1.0)), r"low must be below high=-1\.0, got 1\.0"),
        (
            lambda: feature_matching(slices, bounds=(-1.0, 1.0), total_variation_weight=-1.0),
            r"total_variation_weight must not be negative, got -1\.0",
        ),
        (
            lambda: attacks.cafe_descent(LOSS, layers_fn=first_layers, features_fn=slices, num_classes=1),
            "num_classes must be an integer of at least 2, got 1",
        ),
        (
            lambda: attacks.cafe_descent(
                LOSS, layers_fn=first_layers, features_fn=slices, num_classes=2, learning_rate=0.0
            ),
            r"learning_rate must be positive, got 0\.0",
        ),
    ],
)
def test_wrong_arguments_are_named_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_shapes_and_grants_are_named():
    observation = observed(random_batches(18))
    key = jax.random.key(0)

    def attack(**changes):
        CAFE(key, observation._replace(**changes))

    extra = observation.extra
    with pytest.raises(ValueError, match="does not grant 'batch_indices'"):
        attack(extra={"inputs_like": extra["inputs_like"]})
    with pytest.raises(ValueError, match="batch_indices must be at least 0 and below 12, got 12"):
        attack(extra={**extra, "batch_indices": extra["batch_indices"].at[0, 0].set(12)})
    with pytest.raises(
        ValueError, match=r"must have shapes \(17, d, r\) and \(17, r\), got \(18, 6, 5\) and \(18, 5\)"
    ):
        attack(extra={**extra, "batch_indices": extra["batch_indices"][:17]})
    with pytest.raises(ValueError, match=r"must have shapes \(18, d, r\).*, got \(6, 5\) and \(5,\)"):
        attack(update=jax.tree.map(lambda leaf: leaf[0], observation.update))
    no_bias = attacks.cafe(lambda t: [Dense(first_layers(t)[0].kernel, None)], dense("server"), split_fn=list)
    with pytest.raises(ValueError, match="cafe needs a bias in the layers, got none"):
        no_bias(key, observation)
    with pytest.raises(ValueError, match="split_fn must give one slice a worker, got 1 for 4 layers"):
        attacks.cafe(first_layers, dense("server"), split_fn=lambda x: [x])(key, observation)
    with pytest.raises(ValueError, match=r"the layer must see the slice \(4, 6, 1\), got 6 inputs"):
        attacks.cafe(lambda t: first_layers(t)[:1], dense("server"), split_fn=lambda x: [x])(key, observation)


def test_workers_may_hold_slices_of_different_widths():
    inputs = jnp.arange(6.0).reshape(2, 3)
    features = [inputs[:, 1:], inputs[:, :1]]
    np.testing.assert_array_equal(joined(features, lambda x: [x[:, 1:], x[:, :1]], inputs), inputs)
