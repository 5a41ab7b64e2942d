"""Updates and layers as NumPy arrays on the host, in float64."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gia_jax.base import Updates
from gia_jax.labels import Dense
from gia_jax.metrics.diagnosis.report import Treatment
from gia_jax.precision import is_floating

Leaves = dict[str, np.ndarray]


class Layer(NamedTuple):
    """A dense layer, or its gradient, on the host in float64."""

    kernel: np.ndarray
    bias: np.ndarray | None


def named_leaves(tree: Updates) -> Leaves:
    """Returns the leaves in float64 by their key paths."""
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree.leaves_with_path(tree)}


def l2_norm(leaves: Iterable[np.ndarray]) -> float:
    """Returns the L2 norm of all leaves together."""
    return math.sqrt(sum(float(np.vdot(leaf, leaf)) for leaf in leaves))


def on_host(layer: Dense) -> Layer:
    """Returns the layer in float64 on the host."""
    bias = None if layer.bias is None else np.asarray(layer.bias, np.float64)
    return Layer(np.asarray(layer.kernel, np.float64), bias)


def rounding_unit(update: Updates, treatments: Iterable[Treatment] = ()) -> float:
    """Returns the unit of rounding of the coarsest type that the update has, or had before it was widened."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(update) if is_floating(leaf)]
    units = [float(jnp.finfo(leaf.dtype).eps) for leaf in leaves]
    if all(np.array_equal(leaf.astype(np.float32), leaf) for leaf in leaves):
        units.append(float(np.finfo(np.float32).eps))
    return max([*units, *(found.value for found in treatments if found.name == "half_precision")])
