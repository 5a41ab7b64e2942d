"""The two-layer graph convolutional network as the attack sees it: NumPy arrays in float64, and batched activations."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gia_jax.attacks.subspace import Subspace, column_space, equalized, outside, statistic

Activation = Callable[[Array], Array]


class Layer(NamedTuple):
    """A dense layer, or its gradient, in float64."""

    kernel: Float[np.ndarray, "d m"]
    bias: Float[np.ndarray, " m"] | None


class Layers(NamedTuple):
    """The layers of a network, or their gradients; those of a readout for every node lie before the head."""

    first: Layer
    second: Layer
    readout: tuple[Layer, ...]
    head: Layer


def layers(name: str, tree: Any, *, nodewise: bool) -> Layers:
    """Takes the layers out of a tree of parameters, or raises ValueError if it is of another network.

    Args:
        name: Name of the tree, for the error message.
        tree: Nested dict of "layer0", "layer1" and "head", each with a kernel and perhaps a bias.
        nodewise: Whether there are layers "readout0", "readout1", ... as well.

    Returns:
        The layers.
    """
    names = sorted(tree) if isinstance(tree, Mapping) else [type(tree).__name__]
    middle = [key for key in names if key.startswith("readout")]
    expected = sorted(["layer0", "layer1", "head", *(middle if nodewise else ())])
    if names != expected:
        raise ValueError(f"{name} must be those of a GCN of two layers, {expected}, got {names}")
    found = {}
    for key in names:
        parts = tree[key]
        held = sorted(parts) if isinstance(parts, Mapping) else type(parts).__name__
        if held not in (["bias", "kernel"], ["kernel"]) or np.ndim(parts["kernel"]) != 2:
            raise ValueError(f"{name}[{key!r}] must hold the kernel, and perhaps the bias, of a GCN, got {held}")
        arrays = {part: np.asarray(leaf, np.float64) for part, leaf in parts.items()}
        found[key] = Layer(arrays["kernel"], arrays.get("bias"))
    readout = tuple(found[key] for key in sorted(middle, key=lambda key: int(key.removeprefix("readout"))))
    return Layers(found["layer0"], found["layer1"], readout, found["head"])


def forward(inputs: Float[np.ndarray, "n d"], layer: Layer) -> Float[np.ndarray, "n m"]:
    """Applies a layer without its activation to rows that are averaged over the neighbourhood already."""
    outputs = inputs @ layer.kernel
    return outputs if layer.bias is None else outputs + layer.bias


@functools.lru_cache(maxsize=32)
def _compiled(activation: Activation) -> Callable[[Array], Array]:
    return jax.jit(activation)


def activate(activation: Activation, z: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Applies an activation to every entry; rows are padded so that few programs are compiled."""
    return np.asarray(_compiled(activation)(jnp.asarray(_padded(z))))[: len(z)]


@functools.lru_cache(maxsize=32)
def _compiled_tail(activation: Activation, activate_last: bool) -> Callable[..., tuple[Array, Array]]:
    def run(readout: tuple[Layer, ...], nodes: Array, z: Array, direction: Array) -> tuple[Array, Array]:
        def pooled(z: Array) -> Array:
            hidden = activation(z) if activate_last else z
            hidden = jnp.concatenate([nodes, hidden], 1) if readout else hidden
            for layer in readout:
                hidden = hidden @ layer.kernel
                hidden = activation(hidden if layer.bias is None else hidden + layer.bias)
            return hidden

        values, pull_back = jax.vjp(pooled, z)
        return values, pull_back(jnp.broadcast_to(direction, values.shape))[0]

    return jax.jit(run)


def tail(
    activation: Activation,
    activate_last: bool,
    params: Layers,
    nodes: Float[np.ndarray, "n f"],
    z: Float[np.ndarray, "n d"],
    error: Float[np.ndarray, " c"],
) -> tuple[Float[np.ndarray, "n m"], Float[np.ndarray, "n d"]]:
    """Computes what nodes add to the features that enter the head, and the cotangents before the second activation.

    Args:
        activation: Activation of the network.
        activate_last: Whether it is applied after the second layer.
        params: Layers of the network.
        nodes: Features of the nodes, which a readout for every node takes as well.
        z: Outputs of the second layer before its activation.
        error: Derivative of the loss by the logits.

    Returns:
        The features and the cotangents.
    """
    direction = jnp.asarray(params.head.kernel @ error)
    run = _compiled_tail(activation, activate_last)
    values, cotangents = run(params.readout, jnp.asarray(_padded(nodes)), jnp.asarray(_padded(z)), direction)
    return np.asarray(values)[: len(z)], np.asarray(cotangents)[: len(z)]


_space = jax.jit(column_space, static_argnames="miss")
_equalized = jax.jit(equalized)
_statistic = jax.jit(statistic)
_outside = jax.jit(outside)


def span(gradient: Float[np.ndarray, "d m"], *, spacing: float, noise: float | None, miss: float) -> Subspace:
    """Computes the column space of a gradient that carries known noise or, where `noise` is None, that of rounding."""
    matrix = jnp.asarray(gradient)
    level: Any = noise
    if noise is None:
        matrix, level = _equalized(matrix, spacing=spacing)
    return trimmed(_space(matrix, noise=level, miss=miss))


def trimmed(space: Subspace) -> Subspace:
    """Drops most of the columns of zeros of a subspace: a multiple of 16 columns is left."""
    width = min(space.basis.shape[1], max(16, -(-int(space.rank) // 16) * 16))
    return space._replace(basis=space.basis[:, :width], values=space.values[:width])


def members(space: Subspace, vectors: Float[np.ndarray, "n d"], *, miss: float) -> Bool[np.ndarray, " n"]:
    """Tells which rows lie in a subspace, as `subspace.contains` does; the quantile is computed once, on the host."""
    freedom = vectors.shape[1] - int(space.rank)
    if freedom == 0:
        return np.ones(len(vectors), bool)
    values = np.asarray(_statistic(space, jnp.asarray(_padded(vectors))))[: len(vectors)]
    from scipy import stats  # takes a third of a second to import

    return values <= stats.chi2.isf(miss, freedom)


def parts_outside(
    space: Subspace, vectors: Float[np.ndarray, "n d"]
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"]]:
    """Computes the parts of rows of length 1 outside of a subspace, and the lengths that errors have there."""
    padded = jnp.asarray(_padded(vectors))
    parts, values = np.asarray(_outside(space, padded)), np.asarray(_statistic(space, padded))
    freedom = max(vectors.shape[1] - int(space.rank), 1)
    errors = np.linalg.norm(parts, axis=1) / np.sqrt(np.maximum(values / freedom, 1e-300))
    return parts[: len(vectors)], errors[: len(vectors)]


def _padded(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "padded d"]:
    """Appends rows of zeros up to 64, 512 or a multiple of 4096, so that few programs are compiled."""
    size = next((size for size in (64, 512) if len(rows) <= size), -(-len(rows) // 4096) * 4096)
    return np.concatenate([rows, np.zeros((size - len(rows), rows.shape[1]))])
