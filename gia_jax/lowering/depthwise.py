"""A depthwise convolution, in which every feature has a kernel of its own, as sums of products entry by entry.

A matrix product for each feature would have one column, and nothing to reuse. Where the kernel is small, its entries
multiply shifted inputs, all in one pass over memory. Where it is large and the outputs are few, as in the cotangent of
the kernel, each output is a sum over space of two arrays' product.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from gia_jax.lowering.geometry import (
    Dot,
    Geometry,
    Named,
    contract,
    exchanged,
    interleave,
    pad,
    stored_at,
    unflipped,
    window_at,
)


def forward(x: Named, kernel: Named, geometry: Geometry) -> Named:
    """Sums shifted inputs, each multiplied by an entry of the kernel of its feature, for each phase of a dilation.

    Args:
        x: Inputs with axes n, g and space.
        kernel: Kernel with axes g and taps.
        geometry: Sizes of both, with an undilated input or strides of 1.

    Returns:
        The convolution with the axes of `x`, in single precision at least.
    """
    x, kernel = _wide(x), _wide(kernel)

    def phase(remainders: Sequence[int], sizes: Sequence[int]) -> Named:
        stored = [stored_at(geometry, d, remainders[d]) for d in range(len(sizes))]
        if not all(stored) or not all(sizes):
            shape = dict(zip(geometry.space, sizes, strict=True))
            return Named(jnp.zeros([shape.get(axis, x.size(axis)) for axis in x.axes], x.value.dtype), x.axes)
        widths, starts = {}, []
        for d, (size, positions) in enumerate(zip(sizes, stored, strict=True)):
            reads, low = geometry.reads(d), geometry.padding[d][0]
            places = [(reads[j] + remainders[d] - low) // geometry.input_dilation[d] for j in positions]
            first, last = min(places), max(places) + (size - 1) * geometry.strides[d]
            widths[f"s{d}"] = (-first, last + 1 - geometry.inputs[d], 0)
            starts.append([place - first for place in places])
        padded, plain = _padded(x, widths), geometry._replace(outputs=tuple(sizes))
        products = []
        for start, tap in zip(itertools.product(*starts), itertools.product(*stored), strict=True):
            shifted = window_at(padded, plain, start)
            products.append(shifted.value * _along(_entry(kernel, geometry, tap), shifted))
        return Named(functools.reduce(jnp.add, products), x.axes)

    return interleave(phase, geometry)


def kernel_gradient(x: Named, kernel: Named, geometry: Geometry, dot: Dot) -> Named:
    """Sums the product of input and window over batch and space, once for every output.

    Args:
        x: Inputs with axes g, c (the batch of the kernel's cotangent) and space.
        kernel: Window with axes g, c and taps.
        geometry: Sizes of both, with an undilated input, or strides of 1 and an undilated window.
        dot: Matrix product.

    Returns:
        The convolution with axes of space and g, in single precision at least.
    """
    if any(d > 1 for d in geometry.input_dilation):
        return exchanged(x, kernel, geometry, functools.partial(kernel_gradient, dot=dot))
    x, kernel = _wide(x), _wide(unflipped(kernel, geometry))
    padded = pad(x, {f"s{d}": (low, high, 0) for d, (low, high) in enumerate(geometry.padding)})
    window = Named(kernel.value, tuple(axis.replace("k", "s") for axis in kernel.axes))
    over = [axis for axis in x.axes if axis != "g"]
    # A matrix product with ones is the fastest sum over rows.
    ones = Named(jnp.ones([window.size(axis) for axis in over], x.value.dtype), tuple(over))
    space = [x.axes.index(axis) for axis in geometry.space]
    sizes, steps = list(padded.value.shape), [1] * x.value.ndim
    for a, n, step in zip(space, geometry.window, geometry.window_dilation, strict=True):
        sizes[a], steps[a] = (n - 1) * step + 1, step

    def output(place: jax.Array) -> jax.Array:
        first = [jnp.zeros((), place.dtype)] * x.value.ndim
        for a, n, stride in zip(reversed(space), reversed(geometry.outputs), reversed(geometry.strides), strict=True):
            place, first[a] = place // n, place % n * stride
        seen = lax.slice(lax.dynamic_slice(padded.value, first, sizes), [0] * x.value.ndim, sizes, steps)
        return contract(Named(seen * _along(window, x), x.axes), ones, over, dot).value.ravel()

    # A loop computes both arrays once: written out, XLA would fuse what computes them into every product.
    sums = lax.map(output, jnp.arange(math.prod(geometry.outputs)))
    return Named(sums.reshape(*geometry.outputs, -1), (*geometry.space, "g"))


def _wide(x: Named) -> Named:
    """Returns an array of single precision at least, in which a matrix product would sum."""
    return Named(x.value.astype(jnp.promote_types(x.value.dtype, jnp.float32)), x.axes)


def _padded(x: Named, widths: dict[str, tuple[int, int, int]]) -> Named:
    """Returns the padded input, computed once. In the loop of a sum, what computes it would run for every product, and
    padding would be a branch.
    """
    return Named(lax.optimization_barrier(pad(x, widths).value), x.axes)


def _entry(kernel: Named, geometry: Geometry, tap: Sequence[int]) -> Named:
    """Returns the entry of every feature's kernel at a position."""
    value, axes = kernel.value, list(kernel.axes)
    for axis, position in zip(geometry.taps, tap, strict=True):
        value = lax.index_in_dim(value, position, axes.index(axis), keepdims=False)
        axes.remove(axis)
    return Named(value, tuple(axes))


def _along(factor: Named, x: Named) -> jax.Array:
    """Returns a factor in the order of the axes of `x`, with sizes of 1 where it has no such axis."""
    shared = [axis for axis in x.axes if axis in factor.axes]
    shape = [factor.size(axis) if axis in factor.axes else 1 for axis in x.axes]
    return factor.to(shared).reshape(shape)
