"""The classifier's error and the features that enter it, from the gradient of the last layer."""

from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float

from gia_jax.attacks.graph_spans.network import Layer


class Pooled(NamedTuple):
    """What the last layer gives away.

    Attributes:
        label: Class of the example.
        error: Probabilities less the label's one-hot row, shape (c,).
        features: Features that enter the layer, shape (m,).
    """

    label: int
    error: Float[np.ndarray, " c"]
    features: Float[np.ndarray, " m"]


def pooled(gradient: Layer, layer: Layer) -> list[Pooled]:
    """Reads the error r of the classifier and its input u from the gradient u r^T of its kernel.

    With a bias r is the bias' gradient. Without one it is known up to its scale, and the scale is a root of the
    equation that the error is that of the classifier's own probabilities.

    Args:
        gradient: Gradient of the last layer.
        layer: The last layer.

    Returns:
        All solutions, often one. There is none where the gradient is not that of one example.
    """
    if gradient.bias is not None:
        error = gradient.bias
        if np.sum(error < 0) != 1:
            return []
        return [Pooled(int(np.argmin(error)), error, gradient.kernel @ error / (error @ error))]
    left, values, right = np.linalg.svd(gradient.kernel, full_matrices=False)
    return [
        found
        for sign in (1.0, -1.0)
        if np.sum(sign * right[0] < 0) == 1
        for found in _scaled(sign * float(values[0]) * left[:, 0], sign * right[0], layer)
    ]


def _scaled(features: Float[np.ndarray, " m"], error: Float[np.ndarray, " c"], layer: Layer) -> list[Pooled]:
    """Finds the scales t with which the error t r is that of the probabilities of the features u / t."""
    label = int(np.argmin(error))
    logits = features @ layer.kernel

    def difference(scale: float) -> Float[np.ndarray, " c"]:
        return scipy.special.softmax(logits / scale) - np.eye(len(error))[label] - scale * error

    def height(scale: float) -> float:
        return float(difference(scale)[label])

    grid = np.geomspace(1e-6, np.sqrt(2), 2000)  # no error of a classifier is longer
    heights = np.array([height(scale) for scale in grid])
    found = []
    for i in np.flatnonzero(heights[1:] * heights[:-1] < 0):
        scale: Any = scipy.optimize.brentq(height, grid[i], grid[i + 1], xtol=1e-15, rtol=1e-15)
        if np.linalg.norm(difference(scale)) < 1e-5 * scale:
            found.append(Pooled(label, scale * error, features / scale))
    return found
