"""Objectives, functions `(simulated, observed) -> distance` of two updates, whose result is a scalar.

A layer is one array (leaf) of the update. Sums run over all entries of all layers, in float32 or wider whatever their
type. The distances are in `distances`, with the residuals for a least-squares solver. What a layer counts is changed by
`weighted` and `selected`, with the weights in `layers`.
"""

from gia_jax.matching.objectives.distances import (
    angular,
    cosine,
    cosine_residuals,
    euclidean,
    euclidean_residuals,
    gaussian_likelihood,
    inverse_root,
    l1,
    laplace_likelihood,
    layerwise_cosine,
    layerwise_euclidean,
    masked_cosine,
    tag,
)
from gia_jax.matching.objectives.layers import exponential_decay, largest, linear_decay, selected, weighted

__all__ = [
    "angular",
    "cosine",
    "cosine_residuals",
    "euclidean",
    "euclidean_residuals",
    "exponential_decay",
    "gaussian_likelihood",
    "inverse_root",
    "l1",
    "laplace_likelihood",
    "largest",
    "layerwise_cosine",
    "layerwise_euclidean",
    "linear_decay",
    "masked_cosine",
    "selected",
    "tag",
    "weighted",
]
