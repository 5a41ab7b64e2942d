"""Pruning keeps exactly the entries that a stable sort keeps."""

import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax.defenses import prune, top_k


def pruned(transformation, update):
    return transformation.update(update, transformation.init(update))[0]


def by_sorting(values, kept):
    """The mask of the `kept` largest magnitudes, the first of equal ones, by NumPy's stable sort."""
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-np.abs(values.ravel()), kind="stable")[:kept]] = True
    return mask.reshape(values.shape)


@settings(max_examples=60, deadline=None)
@given(st.decimals(0, Decimal("0.999"), places=3), st.integers(1, 60), st.booleans(), st.integers(0, 2**20))
def test_each_tensor_keeps_what_sorting_keeps(ratio, size, ties, seed):
    rng = np.random.default_rng(seed)
    values = (rng.integers(-3, 4, size) if ties else rng.normal(size=size)).astype(np.float32)
    shared = np.asarray(pruned(prune(float(ratio)), {"w": jnp.asarray(values)})["w"])
    kept = size - math.floor(ratio * size)
    np.testing.assert_array_equal(shared, np.where(by_sorting(values, kept), values, 0))


@settings(max_examples=30, deadline=None)
@given(st.decimals(0, Decimal("0.99"), places=2), st.booleans(), st.integers(0, 2**20))
def test_the_whole_update_keeps_what_sorting_keeps(ratio, ties, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-2, 3, shape) if ties else rng.normal(size=shape) for shape in ((3, 5), (7,)))
    update = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    shared = pruned(prune(float(ratio), scope="global"), update)
    together = np.concatenate([a.ravel(), b.ravel()]).astype(np.float32)
    expected = np.where(by_sorting(together, 22 - math.floor(ratio * 22)), together, 0)
    np.testing.assert_array_equal(np.concatenate([shared["a"].ravel(), shared["b"]]), expected)


@pytest.mark.parametrize("ties", [False, True])
def test_arrays_of_every_rank(ties):
    rng = np.random.default_rng(0)
    shapes = ((), (2, 3, 4), (0, 3), (7,))
    leaves = [np.asarray(rng.integers(-2, 3, s) if ties else rng.normal(size=s), np.float32) for s in shapes]
    for leaf, shared in zip(leaves, pruned(prune(0.6), [jnp.asarray(leaf) for leaf in leaves]), strict=True):
        kept = leaf.size - math.floor(0.6 * leaf.size)
        np.testing.assert_array_equal(shared, np.where(by_sorting(leaf, kept), leaf, 0))
    everywhere = pruned(prune(0.6, scope="global"), [jnp.asarray(leaf) for leaf in leaves])
    together = np.concatenate([leaf.ravel() for leaf in leaves])
    expected = np.where(by_sorting(together, 32 - math.floor(0.6 * 32)), together, 0)
    np.testing.assert_array_equal(np.concatenate([leaf.ravel() for leaf in everywhere]), expected)


@pytest.mark.parametrize(
    ("ratio", "size", "kept"), [(0.7, 10, 3), (0.9, 10, 1), (0.29, 100, 71), (0.57, 100, 43), (0.0, 5, 5)]
)
def test_the_ratio_is_the_decimal_as_written(ratio, size, kept):
    # In binary 0.29 * 100 < 29 and 0.57 * 100 < 57.
    shared = pruned(prune(ratio), jnp.arange(1.0, size + 1))
    assert np.count_nonzero(shared) == kept


def test_scopes_differ_where_one_layer_is_larger():
    update = {"small": jnp.full(4, 0.1), "large": jnp.full(4, 10.0)}
    assert [np.count_nonzero(leaf) for leaf in jax.tree.leaves(pruned(prune(0.5), update))] == [2, 2]
    everywhere = pruned(prune(0.5, scope="global"), update)
    assert (np.count_nonzero(everywhere["small"]), np.count_nonzero(everywhere["large"])) == (0, 4)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_precisions(dtype):
    with jax.enable_x64(dtype == "float64"):
        values = jnp.asarray(np.random.default_rng(0).normal(size=50), dtype)
        shared = pruned(prune(0.8), values)
        np.testing.assert_array_equal(shared != 0, by_sorting(np.asarray(values, np.float64), 10))


def test_mixed_precisions_in_one_ranking():
    update = {"a": jnp.array([1.0, 4.0], jnp.bfloat16), "b": jnp.array([3.0, 2.0], jnp.float32)}
    shared = pruned(prune(0.5, scope="global"), update)
    assert shared["a"].tolist() == [0, 4]
    assert shared["b"].tolist() == [3, 0]
    assert shared["a"].dtype == jnp.bfloat16


def test_not_finite_entries_are_shared_not_hidden():
    shared = pruned(prune(0.6), jnp.array([5.0, jnp.nan, 1.0, -jnp.inf, 2.0]))
    assert np.isnan(shared[1])
    assert shared[3] == -jnp.inf
    assert np.count_nonzero(shared) == 2


def test_error_feedback_loses_nothing():
    transformation = top_k(0.9)
    updates = jax.random.normal(jax.random.key(0), (8, 20))
    state = transformation.init(updates[0])
    total = jnp.zeros(20)
    for update in updates:
        shared, state = transformation.update(update, state)
        assert np.count_nonzero(shared) == 2
        total += shared
    np.testing.assert_allclose(total + state.residual, updates.sum(0), rtol=1e-5, atol=1e-6)


def test_an_infinity_that_was_shared_is_not_kept():
    transformation = top_k(0.5)
    state = transformation.init(jnp.zeros(4))
    _, state = transformation.update(jnp.array([jnp.inf, 1.0, 2.0, 3.0]), state)
    np.testing.assert_array_equal(state.residual, [0, 1, 2, 0])


def test_without_error_feedback_the_rest_is_lost():
    transformation = top_k(0.9, error_feedback=False)
    update = jnp.arange(1.0, 21.0)
    shared, state = transformation.update(update, transformation.init(update))
    again, _ = transformation.update(update, state)
    np.testing.assert_array_equal(shared, again)
    assert not jax.tree.leaves(state)


def test_the_derivative_is_that_of_what_is_kept():
    values = jnp.array([3.0, -1.0, 2.0, 0.5])
    gradient = jax.grad(lambda v: optax.tree.norm(pruned(prune(0.5), v), squared=True))(values)
    np.testing.assert_array_equal(gradient, [6, 0, 4, 0])


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 2.0, float("nan")])
def test_a_ratio_that_is_no_share_is_named(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got"):
        prune(ratio)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got"):
        top_k(ratio)


def test_an_unknown_scope_lists_the_known_ones():
    with pytest.raises(ValueError, match="scope must be one of tensor, global, got 'layer'"):
        prune(0.5, scope="layer")
