"""Sign rules on random networks: exact where they promise it, and wrong or refused where they do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, Observation, ThreatModel, clients, labels, models, observe

HEAD = labels.dense("head")


@functools.cache
def network(name):
    """`(key, labels, size) -> observation` of random inputs, at random parameters."""
    shape = (12,) if name == "mlp" else (8, 8, 1)
    rngs = nnx.Rngs(0)
    module = models.MLP(shape, hidden=(32,), rngs=rngs) if name == "mlp" else models.LeNet(shape, rngs=rngs)
    apply_fn, start = models.functional(module)
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn), lowering="native")

    @functools.partial(jax.jit, static_argnums=2)
    def observation(key, classes, size):
        params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(key, p.shape), start)
        inputs = jax.random.normal(jax.random.fold_in(key, 1), (size, *shape))
        return observe(key, ThreatModel(), client_fn, params, Batch(inputs, classes))

    return observation


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_idlg_is_exact_for_one_example(name):
    draw, rule = network(name), labels.idlg(HEAD)
    keys, truth = jax.random.split(jax.random.key(0), 50), jnp.arange(50)[:, None] % 10
    found = jax.lax.map(lambda pair: rule(draw(*pair, 1)), (keys, truth))
    np.testing.assert_array_equal(found, truth)


def test_idlg_reads_only_the_true_class_from_any_features_that_are_not_negative():
    # p - onehot is negative for the true class alone, however confident the network and wherever features vanish.
    for seed in range(20):
        generator = np.random.default_rng(seed)
        probabilities = generator.dirichlet(np.full(6, 0.2))
        features = np.maximum(generator.normal(size=5), 0)
        features[0] = 1
        label = int(generator.integers(6))
        kernel = np.outer(features, probabilities - np.eye(6)[label])
        update = {"head": {"kernel": jnp.asarray(kernel, jnp.float32)}}
        observation = Observation(update, update, {"inputs_like": jnp.zeros((1, 5))})
        assert labels.idlg(HEAD)(observation).tolist() == [label]


def test_idlg_fails_for_features_of_negative_sum():
    kernel = np.outer([-1.0, -2.0, 0.5], [0.2 - 1, 0.3, 0.5])  # class 0, and features as of a tanh
    observation = Observation({}, {"head": {"kernel": jnp.asarray(kernel)}}, {"inputs_like": jnp.zeros((1, 3))})
    assert labels.idlg(HEAD)(observation).tolist() != [0]


@pytest.mark.parametrize(("name", "size"), [("mlp", 1), ("mlp", 4), ("lenet", 1)])
def test_column_minimum_finds_distinct_labels(name, size):
    draw, rule = network(name), jax.jit(labels.column_minimum(HEAD))
    for i in range(20):
        wanted = jax.random.permutation(jax.random.key(100 + i), 10)[:size]
        found = rule(draw(jax.random.key(i), wanted, size))
        assert sorted(found.tolist()) == sorted(wanted.tolist())


def test_column_minimum_finds_all_labels_where_each_has_a_feature_of_its_own():
    generator = np.random.default_rng(0)
    wanted = [7, 1, 4]
    predictions = generator.dirichlet(np.ones(9), size=3)
    features = np.eye(3, 6) + 0.0
    kernel = features.T @ (predictions - np.eye(9)[wanted]) / 3
    observation = Observation({}, {"head": {"kernel": jnp.asarray(kernel)}}, {"inputs_like": jnp.zeros((3, 2))})
    assert sorted(labels.column_minimum(HEAD)(observation).tolist()) == sorted(wanted)


def test_column_minimum_must_fail_on_duplicates():
    rule, observation = labels.column_minimum(HEAD), network("mlp")(jax.random.key(0), jnp.array([3, 3, 3, 8]), 4)
    with pytest.raises(ValueError, match="a batch of 4 has 2 classes with a negative entry"):
        rule(observation)
    found = jax.jit(rule)(observation)
    assert len(set(found.tolist())) == 4  # it never gives a label twice: two of these are not there
    assert {3, 8} < set(found.tolist())


def test_refusals_say_what_to_do():
    draw = network("mlp")
    with pytest.raises(ValueError, match="idlg finds one label, got a batch of 2: use bias_counts"):
        labels.idlg(HEAD)(draw(jax.random.key(0), jnp.array([1, 2]), 2))
    with pytest.raises(ValueError, match="column_minimum gives distinct labels: a batch of 11 is more than 10 classes"):
        labels.column_minimum(HEAD)(draw(jax.random.key(0), jnp.arange(11) % 10, 11))
    for rule in (labels.idlg, labels.column_minimum):
        with pytest.raises(ValueError, match="does not grant 'inputs_like'"):
            rule(HEAD)(Observation({}, {"head": {"kernel": jnp.zeros((2, 2))}}, {}))
