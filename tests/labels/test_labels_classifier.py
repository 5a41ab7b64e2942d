"""The last layer by its path, and labels from counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import Observation, labels
from gia_jax.labels.classifier import attackers_key, greedy_labels, labels_from_counts

KERNEL, BIAS = jnp.ones((4, 3)), jnp.zeros(3)


@pytest.mark.parametrize(
    ("path", "tree"),
    [
        (("head",), {"head": {"kernel": KERNEL, "bias": BIAS}}),
        (("params", "Dense_0"), {"params": {"Dense_0": {"kernel": KERNEL, "bias": BIAS}}}),
        (("linear", 1), {"linear": [None, {"w": KERNEL, "b": BIAS}]}),
        ((), {"w": KERNEL, "b": BIAS}),
    ],
)
def test_dense_finds_the_layer(path, tree):
    layer = labels.dense(*path)(tree)
    assert layer.kernel is KERNEL
    assert layer.bias is BIAS


def test_dense_transposes_the_weight_of_pytorch():
    layer = labels.dense("fc")({"fc": {"weight": KERNEL.T, "bias": BIAS}})
    np.testing.assert_array_equal(layer.kernel, KERNEL)
    assert layer.bias is BIAS


def test_dense_without_a_bias():
    assert labels.dense("head")({"head": {"kernel": KERNEL}}).bias is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("tail",), r"path \('tail',\) does not exist: 'tail' not found"),
        (("head", "inner"), r"'inner' not found"),
        (("list", 3), "3 not found"),
        (("conv",), r"must hold 'kernel', 'w' or 'weight', got \['scale'\]"),
    ],
)
def test_dense_refuses_paths_that_lead_nowhere(path, message):
    tree = {"head": {"kernel": KERNEL}, "list": [KERNEL], "conv": {"scale": BIAS}}
    with pytest.raises(ValueError, match=message):
        labels.dense(*path)(tree)


RULES = {
    "llg_plus": lambda classifier_fn: labels.llg_plus(lambda params, batch: params, classifier_fn),
    "bias_counts": labels.bias_counts,
    "column_minimum": labels.column_minimum,
    "greedy_bias": labels.greedy_bias,
    "idlg": labels.idlg,
    "ilrg": labels.ilrg,
    "llg": labels.llg,
}


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_every_rule_refuses_labels_that_are_mixed(make):
    """A client behind MixUp has no class to find: the attacker that was told so takes the probabilities."""
    update = {"head": {"kernel": KERNEL, "bias": BIAS}}
    known = {"inputs_like": jnp.zeros((1, 4)), "labels": jnp.array([[0.4, 0.6, 0.0]])}
    with pytest.raises(
        ValueError, match=r"label rules find one class an example, got labels float32 of shape \(1, 3\)"
    ):
        make(labels.dense("head"))(Observation(update, update, known))


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("targets", "got"),
    [
        (jnp.zeros(1), r"labels float32 of shape \(1,\)"),
        (jnp.zeros((1, 5), jnp.int32), r"labels int32 of shape \(1, 5\)"),
        ({"age": jnp.zeros(1)}, "labels in a dict"),
    ],
    ids=["regression", "tokens", "heads"],
)
def test_every_rule_refuses_targets_that_are_no_classes(make, targets, got):
    update = {"head": {"kernel": KERNEL, "bias": BIAS}}
    known = {"inputs_like": jnp.zeros((1, 4)), "labels": targets}
    with pytest.raises(ValueError, match=f"label rules find one class an example, got {got}"):
        make(labels.dense("head"))(Observation(update, update, known))


@pytest.mark.parametrize("name", ["bias_counts", "ilrg", "llg_plus"])
def test_the_gradient_of_a_sum_is_refused(name):
    truth = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    mean = np.full(4, 0.25) - np.bincount(truth) / 10
    rule = RULES[name](labels.dense("head"))

    def seen(scale, noise=0.0):
        update = {"head": {"kernel": jnp.ones((2, 4)), "bias": jnp.asarray(scale * mean + noise, jnp.float32)}}
        return Observation(update, update, {"inputs_like": jnp.zeros((10, 2))})

    message = (
        f"{name} needs the gradient of a mean loss: the negative entries of the last bias add up to -2, below -1; "
    )
    with pytest.raises(ValueError, match=f"{message}divide the update by the batch size"):
        rule(seen(10))
    traced = jax.jit(rule)
    assert traced(seen(10)).tolist() == [-1] * 10
    for fine in (seen(1), seen(10, noise=0.1)):  # noise does not add up to 0
        assert traced(fine).min() >= 0
        np.testing.assert_array_equal(traced(fine), rule(fine))


def test_what_is_not_finite_has_no_labels():
    assert labels_from_counts(jnp.array([jnp.nan, 2.0]), 2).tolist() == [-1, -1]
    assert greedy_labels(jnp.array([jnp.nan, -1.0]), jnp.array(-1.0), jnp.zeros(()), 2).tolist() == [-1, -1]
    update = {"head": {"kernel": KERNEL.at[0, 1].set(jnp.nan), "bias": BIAS}}
    observation = Observation(update, update, {"inputs_like": jnp.zeros((1, 4))})
    assert labels.idlg(labels.dense("head"))(observation).tolist() == [-1]
    assert jax.jit(labels.column_minimum(labels.dense("head")))(observation).tolist() == [-1]


def drawn_inputs(make, observation):
    """The dummies that a rule shows to the model."""
    shown = []

    def apply_fn(params, inputs):
        shown.append(inputs)
        return inputs @ params["head"]["kernel"]

    make(apply_fn)(observation)
    return shown[0]


def test_dummies_come_from_the_update_or_the_attackers_key():
    def seen(seed):
        update = {"head": {"kernel": KERNEL, "bias": 0.01 * jax.random.normal(jax.random.key(seed), (3,))}}
        return Observation(update, update, {"inputs_like": jnp.zeros((2, 4))})

    def shown(seed, key=None):
        return drawn_inputs(
            lambda apply_fn: labels.bias_counts(labels.dense("head"), apply_fn=apply_fn, num_dummies=8, key=key),
            seen(seed),
        )

    np.testing.assert_array_equal(shown(0), shown(0))
    assert not np.array_equal(shown(0), shown(1))
    np.testing.assert_array_equal(shown(0, jax.random.key(5)), shown(1, jax.random.key(5)))
    # A client that draws from a key that everyone uses does not draw what the attacker draws.
    assert not np.any(np.isin(shown(0), jax.random.normal(jax.random.key(0), (8, 4))))
    keys = [attackers_key(None, seen(seed)) for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_dummies_of_integers_and_beyond_memory_are_refused():
    update = {"head": {"kernel": KERNEL, "bias": BIAS}}
    tokens = Observation(update, update, {"inputs_like": jnp.zeros((2, 4), jnp.int32)})
    floats = Observation(update, update, {"inputs_like": jnp.zeros((2, 4))})
    for make in (
        lambda count: labels.bias_counts(labels.dense("head"), apply_fn=lambda p, x: x, num_dummies=count),
        lambda count: labels.llg_plus(lambda params, batch: params, labels.dense("head"), num_dummies=count),
    ):
        with pytest.raises(
            ValueError, match=r"observation\.extra\['inputs_like'\] must be floating point to be searche"
        ):
            make(8)(tokens)
        with pytest.raises(ValueError, match=r"num_dummies must fit into memory: it needs .* GiB, got 10000000000"):
            make(10**10)(floats)


counts = st.lists(st.floats(-5, 12, width=32), min_size=1, max_size=6)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(counts=counts, size=st.integers(1, 9))
def test_rounding_gives_the_nearest_counts_of_that_sum(counts, size):
    found = np.bincount(labels_from_counts(jnp.array(counts), size), minlength=len(counts))
    assert found.sum() == size
    assert found.min() >= 0
    # No label moved from one class to another brings the counts nearer.
    target = np.asarray(counts, np.float64)
    distance = np.sum((found - target) ** 2)
    for give in np.flatnonzero(found):
        for take in range(len(counts)):
            moved = found.copy()
            moved[give] -= 1
            moved[take] += 1
            assert np.sum((moved - target) ** 2) >= distance - 1e-4


@settings(derandomize=True, max_examples=25, deadline=None)
@given(data=st.data(), whole=st.lists(st.integers(0, 7), min_size=2, max_size=6).filter(any))
def test_rounding_forgives_errors_below_one_half(data, whole):
    error = data.draw(st.lists(st.floats(-0.49, 0.49), min_size=len(whole), max_size=len(whole)))
    noisy = jnp.asarray(np.add(whole, error), jnp.float32)
    found = labels_from_counts(noisy, sum(whole))
    np.testing.assert_array_equal(np.bincount(found, minlength=len(whole)), whole)


def test_rounding_does_not_forgive_errors_above_one_half():
    found = labels_from_counts(jnp.array([2.0 + 0.6, 1.0 - 0.6]), 3)
    assert list(np.bincount(found)) == [3]


def python_greedy(values, impact, offset, size):
    values, found = list(values), []
    for c in np.argsort(values, kind="stable"):
        if values[c] < 0 and len(found) < size:
            found.append(int(c))
    for c in found:
        values[c] -= impact
    while len(found) < size:
        c = int(np.argmin(np.subtract(values, offset)))
        values[c] -= impact
        found.append(c)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 4, 11])
def test_greedy_labels_are_the_two_stages(seed, size):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=5).astype(np.float32)
    offset = generator.normal(size=5).astype(np.float32) / 4
    impact = np.float32(np.minimum(values, 0).sum() / size)
    found = jax.jit(greedy_labels, static_argnums=3)(
        jnp.asarray(values), jnp.asarray(impact), jnp.asarray(offset), size
    )
    assert sorted(map(int, found)) == sorted(python_greedy(values, impact, offset, size))


@pytest.mark.parametrize(
    ("name", "truth", "is_free"),
    [
        ("idlg", [3], True),
        ("column_minimum", [2, 3, 6, 7], True),
        ("greedy_bias", [3, 3, 3, 7], True),
        ("llg", [3, 3, 3, 7], True),
        ("bias_counts", [3, 3, 3, 7], False),
        ("ilrg", [3, 3, 3, 7], False),
    ],
)
def test_which_rules_do_not_depend_on_the_scale(name, truth, is_free):
    size, kernel = len(truth), 0.02 * jax.random.normal(jax.random.key(2), (16, 10))
    features = jax.random.uniform(jax.random.key(3), (size, 16), minval=0.9)
    error = (jax.nn.softmax(features @ kernel) - jax.nn.one_hot(jnp.asarray(truth), 10)) / size
    update = {"head": {"kernel": features.T @ error, "bias": error.sum(0)}}
    params, like = {"head": {"kernel": kernel, "bias": jnp.zeros(10)}}, {"inputs_like": jnp.zeros((size, 16))}
    rule = getattr(labels, name)(labels.dense("head"))

    def found(scale):
        return sorted(rule(Observation(params, jax.tree.map(lambda leaf: scale * leaf, update), like)).tolist())

    assert found(1.0) == truth
    assert (found(0.01) == truth) == is_free
