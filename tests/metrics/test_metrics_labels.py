"""Label overlap as that of two multisets."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax.metrics import label_overlap


@settings(derandomize=True, max_examples=25, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=6, max_size=6))
def test_overlap_is_that_of_multisets(pairs):
    recovered, truth = zip(*pairs)
    expected = (Counter(recovered) & Counter(truth)).total() / len(truth)
    assert float(label_overlap(jnp.array(recovered), jnp.array(truth))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recovered", "truth", "share"),
    [
        ([0, 1, 2], [2, 0, 1], 1),
        ([0, 0, 0], [0, 1, 2], 1 / 3),  # one of three is right, however often it is said
        ([0, 1, 2], [0, 0, 0], 1 / 3),
        ([5, 5, 1], [5, 5, 5], 2 / 3),
        ([3, 4], [1, 2], 0),
    ],
)
def test_duplicates_count_as_often_as_they_occur(recovered, truth, share):
    assert float(label_overlap(jnp.array(recovered), jnp.array(truth))) == pytest.approx(share)


def test_probabilities_count_by_their_largest():
    soft = jax.nn.one_hot(jnp.array([2, 0, 2]), 3) * 0.4 + 0.2
    assert float(label_overlap(soft, jnp.array([2, 2, 0]))) == 1
    assert float(label_overlap(jnp.array([2, 2, 2]), soft)) == pytest.approx(2 / 3)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="recovered must have 3 labels, got 2"):
        label_overlap(jnp.array([0, 1]), jnp.array([0, 1, 2]))


@pytest.mark.parametrize(
    ("recovered", "truth", "message"),
    [
        ([0.0, 1.0], [0, 1], r"recovered must be class indices .*, got float32 of shape \(2,\)"),
        ([0, 1], [True, False], r"truth must be class indices .*, got bool of shape \(2,\)"),
        ([[0, 1], [1, 0]], [0, 1], r"recovered must be class indices .*, got int32 of shape \(2, 2\)"),
        ([], [], r"recovered must have shape \(b,\) or \(b, c\), nothing of it 0, got \(0,\)"),
        (0, [0], r"recovered must have shape \(b,\) or \(b, c\), nothing of it 0, got \(\)"),
        ([[0.5, 0.5]], [[0.5, 0.25, 0.25]], "recovered must have 3 classes, got 2"),
        ([0, 1], [0, -1], "truth must not be negative, got -1"),
        ([0], [[jnp.nan, 1.0]], "truth must be probabilities, got nan"),
    ],
)
def test_what_is_no_labels_is_named(recovered, truth, message):
    with pytest.raises(ValueError, match=message):
        label_overlap(jnp.array(recovered), jnp.array(truth))


def test_a_label_that_was_not_recovered_is_never_right():
    soft = jnp.array([[jnp.nan, 0.0], [1.0, 0.0]])
    assert float(label_overlap(soft, jnp.array([0, 0]))) == 0.5
    assert float(label_overlap(jnp.array([-1, 0]), jnp.array([0, 0]))) == 0.5
    # A concrete truth is refused; for a traced one the score is NaN.
    overlap = jax.jit(label_overlap)
    assert jnp.isnan(overlap(jnp.array([0, 1]), jnp.array([0, -1])))
    assert jnp.isnan(overlap(jnp.array([0, 0]), soft))
    assert float(overlap(jnp.array([0, 1]), jnp.array([0, 1]))) == 1
