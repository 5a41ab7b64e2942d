"""Arrays without a modality of their own: what is refused, and what a score says."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Batch, modalities


def rows(*values: list[float]) -> Batch:
    return Batch(np.array(values, np.float32), ())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": 3}, "shape must be a sequence of integers of at least 1, got 3"),
        ({"shape": "2"}, "shape must be a sequence of integers of at least 1, got '2'"),
        ({"shape": (2, 0)}, "shape must be an integer of at least 1, got 0"),
        ({"bounds": 1.0}, "bounds must be a pair, of the lowest and the highest value, got 1.0"),
        ({"bounds": (0,)}, r"bounds must be a pair, of the lowest and the highest value, got \(0,\)"),
        ({"bounds": (None, 1)}, r"bounds\[0\] must hold at least one array, got \(None,\)"),
        ({"bounds": ("a", "b")}, r"bounds\[0\] must be an array of numbers, .* got str 'a'"),
        ({"bounds": (1.0, 0.0)}, "low must be below high=0.0, got 1.0"),
        ({"bounds": (np.zeros(3), np.ones(3))}, r"bounds must broadcast to the shape \(2,\), got the shape \(3,\)"),
        ({"dtype": "word"}, "dtype must be a floating-point type, got 'word'"),
        ({"dtype": None}, "dtype must be a floating-point type, got None"),
        ({"init_fn": 3}, "init_fn must be a function, got 3"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modalities.array(**({"shape": (2,)} | arguments))


def test_bounds_are_numbers_or_arrays_for_each_entry() -> None:
    for bounds in ((0.0, 1.0), (np.zeros(2), np.ones(2)), (np.zeros(1), 1.0)):
        project_fn = modalities.array((2,), bounds=bounds).project_fn
        assert project_fn is not None
        assert project_fn(jnp.array([[-1.0, 2.0]])).tolist() == [[0.0, 1.0]]


def test_a_truth_that_is_not_finite_is_refused_and_a_reconstruction_counts_as_zero_there() -> None:
    modality = modalities.array((2,))
    scores = modality.score_fn(rows([np.nan, 2.0]), rows([1.0, 2.0])).scores
    np.testing.assert_allclose(scores["mse"], [0.5])
    with pytest.raises(ValueError, match=r"truth\.inputs must be finite, got nan"):
        modality.score_fn(rows([1.0, 2.0]), rows([np.nan, 2.0]))
    with pytest.raises(ValueError, match=r"public\.inputs must be finite, got inf"):
        modality.guess_fn(rows([1.0, 2.0]), rows([np.inf, 2.0]))
    with pytest.raises(ValueError, match=r"found\.inputs must hold at least one example, got the shape \(0, 2\)"):
        modality.score_fn(Batch(np.zeros((0, 2)), ()), Batch(np.zeros((0, 2)), ()))


def test_half_precision_is_scored_in_float32() -> None:
    for dtype in (np.float16, "bfloat16"):
        found, truth = (Batch(batch.inputs.astype(dtype), ()) for batch in (rows([200.0, 0.0]), rows([400.0, 0.0])))
        np.testing.assert_allclose(modalities.array((2,), dtype=dtype).score_fn(found, truth).scores["mse"], [20_000])
