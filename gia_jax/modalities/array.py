"""Arrays of which nothing more is known: no neighbourhood and no categories. Every entry is an unknown."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from gia_jax import _check
from gia_jax.base import Batch, InitFn
from gia_jax.matching.initializations import normal
from gia_jax.matching.solver import box
from gia_jax.modalities.base import Modality, Scored, Shown, filled, reordered


def array(
    shape: Sequence[int],
    *,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]] | None = None,
    init_fn: InitFn | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Modality:
    """Builds the modality of arrays: signals, measurements, embeddings, and whatever has no modality of its own.

    Args:
        shape: Shape of one example, of sizes of at least 1.
        bounds: Lowest and highest value that an entry can have, as two numbers or two arrays that broadcast to the
            inputs. None is for entries without bounds.
        init_fn: Function `(key, observation) -> inputs` of the first entries. None draws normal ones.
        dtype: Floating-point type of the model's inputs.

    Returns:
        The modality. Its scores are "snr", the signal-to-noise ratio 10 log10(sum of squares of the truth / sum of
        squared errors) in dB, and "mse", the mean squared error. An entry of a reconstruction that is NaN counts as 0.
        Its guesses are 0 everywhere, whose ratio is 0 dB, and, where there are public examples, their mean and the
        nearest of them. There is no `draw_fn`.

    Raises:
        ValueError: If a size is no positive integer, the bounds are no pair, are in the wrong order or do not fit the
            shape, or `dtype` is no floating-point type. `score_fn` and `guess_fn` raise it for examples of another
            shape, for none, and for a truth or public examples that are not finite.

    Examples:
        >>> import numpy as np
        >>> from gia_jax import Batch, modalities
        >>> modality = modalities.array((2,))
        >>> truth, found = (Batch(np.array(rows), ()) for rows in ([[3.0, 4.0], [1.0, 0.0]], [[1.0, 0.1], [3.0, 4.5]]))
        >>> scored = modality.score_fn(found, truth)
        >>> scored.scores["snr"].round(1).tolist(), scored.batch.inputs.tolist()
        ([20.0, 20.0], [[3.0, 4.5], [1.0, 0.1]])
    """
    shape = _check.sizes("shape", shape)
    _check.floating(dtype)
    _check.functions(init_fn=init_fn)
    if bounds is not None:
        _check.limits("bounds", bounds)
        for bound in bounds:
            if not _broadcasts(jnp.shape(bound), shape):
                raise ValueError(f"bounds must broadcast to the shape {shape}, got the shape {jnp.shape(bound)}")

    def read(name: str, batch: Batch) -> Float[np.ndarray, "*b d"]:
        inputs = np.asarray(batch.inputs)
        if inputs.ndim not in (len(shape) + 1, len(shape) + 2) or inputs.shape[inputs.ndim - len(shape) :] != shape:
            raise ValueError(f"{name}.inputs must be arrays of shape {shape}, got {inputs.shape}")
        if name != "found":
            _check.finite(f"{name}.inputs", inputs)
        if name != "public":
            filled(name, inputs.shape)
        wide = np.nan_to_num(inputs.astype(np.promote_types(inputs.dtype, np.float32)), nan=0.0)
        return wide.reshape(*inputs.shape[: inputs.ndim - len(shape)], math.prod(shape))

    def score_fn(found: Batch, truth: Batch) -> Scored:
        entries, true = read("found", found), read("truth", truth)
        if entries.shape != true.shape:
            raise ValueError(f"found.inputs must have the shape of truth.inputs, got {np.shape(found.inputs)}")
        flat, flat_true = (values.reshape(-1, *values.shape[-2:]) for values in (entries, true))
        assignment = np.stack([_assigned(*pair) for pair in zip(flat, flat_true, strict=True)])
        ordered = np.take_along_axis(flat, assignment[..., None], 1).reshape(true.shape)
        error = np.mean((ordered - true) ** 2, -1)
        whole = np.asarray(found.inputs).reshape(-1, flat.shape[1], *shape)
        inputs = reordered(Batch(whole, ()), assignment).inputs.reshape(np.shape(truth.inputs))
        return Scored({"snr": _ratio(true, ordered), "mse": error}, Batch(inputs, ()))

    def guess_fn(truth: Batch, public: Batch) -> dict[str, np.ndarray]:
        true, known = read("truth", truth), read("public", public)
        guesses = {"zero": _ratio(true, np.zeros_like(true))}
        if len(known):
            known = known.reshape(-1, known.shape[-1])
            guesses["data mean"] = _ratio(true, known.mean(0, dtype=np.float64))
            flat = true.reshape(-1, true.shape[-1])
            nearest = np.stack([known[np.argmin(((known - one) ** 2).sum(-1))] for one in flat])
            guesses["nearest example"] = _ratio(true, nearest.reshape(true.shape))
        return guesses

    return Modality(
        init_fn=normal() if init_fn is None else init_fn,
        decode_fn=Batch,
        project_fn=None if bounds is None else box(*bounds),
        prior_fn=None,
        like=jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        score_fn=score_fn,
        shown={"snr": Shown("SNR", ".1f", " dB"), "mse": Shown("MSE", ".2g")},
        guess_fn=guess_fn,
    )


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tells whether an array of one shape can stand for one of another shape with a leading axis."""
    try:
        return np.broadcast_shapes(shape, (2, *wanted))[1:] == wanted
    except ValueError:
        return False


def _assigned(found: Float[np.ndarray, "b d"], true: Float[np.ndarray, "b d"]) -> np.ndarray:
    """Returns for each true example the reconstruction that is assigned to it."""
    largest = float(np.finfo(np.float64).max) / max(found.size, 1)
    with np.errstate(over="ignore"):
        costs = np.stack([((found - one) ** 2).sum(-1, dtype=np.float64) for one in true])
    return scipy.optimize.linear_sum_assignment(np.minimum(costs, largest))[1]


def _ratio(true: Float[np.ndarray, "*b d"], found: Float[np.ndarray, "*#b d"]) -> Float[np.ndarray, "*b"]:
    """Returns the signal-to-noise ratio in dB."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        signal, noise = ((values**2).sum(-1, dtype=np.float64) for values in (true, found - true))
        return np.where(noise == 0, np.inf, 10 * (np.log10(signal) - np.log10(noise)))
