"""One convolution as slices and one matrix product, exact to rounding against `lax.conv_general_dilated`.

A convolution contracts a window of its left operand with its kernel. Three kinds of convolution occur in first- and
second-order gradients of a network, and each has its own cheapest form:

* The forward pass has a small kernel and many outputs: stack one slice per kernel position, then form one product.
* The cotangent of the input has a reversed kernel and a left operand dilated by the stride: form one product with the
  kernel as it lies in memory, then add its slices in place, one stride phase at a time.
* The cotangent of the kernel has a large window and few outputs: stack one slice per output (the very slices of the
  forward pass, so XLA shares them), then form one product over batch and space.

Wide three-by-three convolutions of stride one go through Winograd's algorithm instead (`winograd.py`), and depthwise
convolutions are sums of products entry by entry (`depthwise.py`).
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from gia_jax.lowering import depthwise, winograd
from gia_jax.lowering.geometry import (
    Dot,
    Geometry,
    Named,
    contract,
    exchanged,
    interleave,
    names_of,
    pad,
    stored_at,
    unflipped,
    window_at,
)

FLOATS = ("bfloat16", "float16", "float32", "float64")
# Limits measured on XLA's CPU backend. Winograd's algorithm gains from WIDE features and LARGE pixels on. For kernel
# gradients it gains from sums over LARGE_SUM terms on, and below that it only costs compile time.
WIDE = 64
LARGE = 512
LARGE_SUM = 2048
# A depthwise convolution of more products than these would be too long a program.
MOST_TERMS = 64


# `jit` traces each geometry once, because the layers of a network repeat theirs.
@functools.partial(
    jax.jit,
    static_argnames=(
        *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count"),
        *("batch_group_count", "precision", "preferred_element_type", "out_sharding", "flipped"),
    ),
    inline=True,
)
def convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: object = None,
    flipped: Sequence[int] = (),
) -> jax.Array:
    """Computes `lax.conv_general_dilated`, and takes the parameters of its equation in a jaxpr.

    Args:
        lhs: Inputs. `dimension_numbers.lhs_spec` says which axis is which.
        rhs: Kernel, which is read in reverse along its axes `flipped`.
        window_strides: Stride of each spatial axis.
        padding: Numbers of zeros at the low and the high end of each spatial axis. Negative numbers crop.
        lhs_dilation: Number of zeros between inputs, plus one, for each spatial axis.
        rhs_dilation: Number of zeros between kernel positions, plus one, for each spatial axis.
        dimension_numbers: Layouts of `lhs`, `rhs` and the result.
        feature_group_count: Number of groups of a grouped or depthwise convolution.
        batch_group_count: Number of groups of the kernel gradient of such a convolution.
        precision: Precision of the matrix product, as in `lax.dot_general`.
        preferred_element_type: Type in which the matrix product accumulates, as in `lax.dot_general`.
        out_sharding: Sharding of the result. A convolution with one is left to XLA.
        flipped: Axes of `rhs` along which the kernel is reversed.

    Returns:
        The convolution in the layout `dimension_numbers.out_spec`. Integers, mixed precisions, empty arrays and
        explicit shardings are left to `lax.conv_general_dilated`.
    """
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    inputs, window = [lhs.shape[a] for a in lhs_spec[2:]], [rhs.shape[a] for a in rhs_spec[2:]]
    outputs = [
        ((i - 1) * di + 1 + low + high - (k - 1) * dk - 1) // stride + 1
        for i, di, (low, high), k, dk, stride in zip(
            inputs, lhs_dilation, padding, window, rhs_dilation, window_strides, strict=True
        )
    ]
    floats = lhs.dtype == rhs.dtype and lhs.dtype.name in FLOATS
    empty = not (lhs.size and rhs.size) or min(outputs, default=1) < 1
    if not floats or empty or out_sharding is not None:
        return lax.conv_general_dilated_p.bind(
            lhs,
            lax.rev(rhs, tuple(flipped)),
            window_strides=window_strides,
            padding=padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    features_flipped = [a for a in flipped if a not in rhs_spec[2:]]
    rhs = lax.rev(rhs, features_flipped) if features_flipped else rhs
    geometry = Geometry(
        tuple(inputs),
        tuple(window),
        tuple(outputs),
        tuple(window_strides),
        tuple(padding),
        tuple(lhs_dilation),
        tuple(rhs_dilation),
        tuple(a in flipped for a in rhs_spec[2:]),
    )
    x = Named(lhs, names_of(lhs_spec, ["n", "c", *geometry.space]))
    kernel = Named(rhs, names_of(rhs_spec, ["o", "c", *geometry.taps]))
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=preferred_element_type)
    out_axes = names_of(out_spec, ["n", "o", *geometry.space])
    if feature_group_count > 1 or batch_group_count > 1:
        groups, split = (feature_group_count, "c") if feature_group_count > 1 else (batch_group_count, "n")
        alone = x.size(split) == kernel.size("o") == groups
        y = _depthwise(x, kernel, geometry, dot, split) if alone else None
        if y is not None:
            return y.to(out_axes).astype(preferred_element_type or lhs.dtype)
        return _grouped(x, kernel, geometry, dot, groups, split, out_axes)
    return _convolve(x, kernel, geometry, dot).to(out_axes)


def _convolve(x: Named, kernel: Named, geometry: Geometry, dot: Dot) -> Named:
    """Chooses the cheapest form of an ungrouped convolution and computes it."""
    fewer = _winograd(x, kernel, geometry, dot)
    if fewer is not None:
        return fewer
    plain = all(s == 1 for s in geometry.strides)
    dilated = any(d > 1 for d in geometry.input_dilation)
    undilated_window = all(d == 1 for d in geometry.window_dilation)
    if plain and dilated and undilated_window and math.prod(geometry.window) > math.prod(geometry.outputs):
        return exchanged(x, kernel, geometry, functools.partial(_convolve, dot=dot))
    if plain and (dilated or any(geometry.flipped)):
        added = math.prod(geometry.inputs) * kernel.size("o")
        stacked = math.prod(geometry.outputs) * kernel.size("c") / math.prod(geometry.input_dilation)
        if 2 * added <= stacked or kernel.value.size >= x.value.size:
            return _add_in_place(x, kernel, geometry, dot)
        return _by_phase(x, kernel, geometry, dot)
    low_high = zip(geometry.padding, geometry.input_dilation)
    padded = pad(x, dict(zip(geometry.space, [(low, high, d - 1) for (low, high), d in low_high])))
    return _stack_and_contract(padded, kernel, geometry, dot)


def _stack_and_contract(x: Named, kernel: Named, geometry: Geometry, dot: Dot) -> Named:
    """Stacks slices of the padded input, then forms one product with the kernel."""
    dims = range(len(geometry.window))
    if math.prod(geometry.window) == 1:
        taps = [kernel.axes.index(axis) for axis in geometry.taps]
        pointwise = Named(jnp.squeeze(kernel.value, taps), tuple(a for a in kernel.axes if a not in geometry.taps))
        return contract(window_at(x, geometry, [0 for _ in dims]), pointwise, ["c"], dot)
    if math.prod(geometry.window) <= math.prod(geometry.outputs):
        starts = [geometry.reads(d) for d in dims]
        return contract(_stack(x, geometry, starts, geometry.taps), kernel, [*geometry.taps, "c"], dot)
    kernel = unflipped(kernel, geometry)
    # Here the slices are the windows: their axes are named k, and the stacked axes s.
    starts = [[o * stride for o in range(n)] for n, stride in zip(geometry.outputs, geometry.strides)]
    turned = geometry._replace(outputs=geometry.window, strides=geometry.window_dilation)
    stacked = _stack(x, turned, starts, geometry.taps)
    exchange = dict(zip(geometry.space + geometry.taps, geometry.taps + geometry.space))
    patches = Named(stacked.value, tuple(exchange.get(axis, axis) for axis in stacked.axes))
    return contract(patches, kernel, ["c", *geometry.taps], dot)


def _stack(x: Named, geometry: Geometry, starts: Sequence[Sequence[int]], new_axes: Sequence[str]) -> Named:
    """Stacks one slice per combination of `starts`, just behind the spatial axes, one axis at a time."""
    at = max(x.axes.index(axis) for axis in geometry.space) + 1
    value, axes = x.value, x.axes
    for d, positions in enumerate(starts):
        a, stride = axes.index(f"s{d}"), geometry.strides[d]
        length = (geometry.outputs[d] - 1) * stride + 1
        slices = [lax.slice_in_dim(value, start, start + length, stride, a) for start in positions]
        value = jnp.stack(slices, at + d)
        axes = (*axes[: at + d], new_axes[d], *axes[at + d :])
    return Named(value, axes)


def _add_in_place(x: Named, kernel: Named, geometry: Geometry, dot: Dot) -> Named:
    """Forms one product with the kernel as it lies, then adds every kernel position's share where it belongs."""
    shares = contract(x, kernel, ["c"], dot)
    axes = tuple(axis for axis in shares.axes if axis not in geometry.taps)
    tap_axes = [shares.axes.index(axis) for axis in geometry.taps]
    reads = [geometry.reads(d) for d in range(len(geometry.window))]

    def phase(remainders: Sequence[int], sizes: Sequence[int]) -> Named:
        stored = [stored_at(geometry, d, remainders[d]) for d in range(len(sizes))]
        shape = {axis: shares.size(axis) for axis in axes} | dict(zip(geometry.space, sizes))
        total = jnp.zeros([shape[axis] for axis in axes], shares.value.dtype)
        for n, positions in enumerate(itertools.product(*stored)):
            share = shares.value
            for a, j in sorted(zip(tap_axes, positions), reverse=True):
                share = lax.index_in_dim(share, j, a, keepdims=False)
            widths = {}
            for d, j in enumerate(positions):
                shift = (reads[d][j] + remainders[d] - geometry.padding[d][0]) // geometry.input_dilation[d]
                widths[f"s{d}"] = (-shift, sizes[d] - geometry.inputs[d] + shift, 0)
            placed = pad(Named(share, axes), widths).value
            total = placed if n == 0 else total + placed
        return Named(total, axes)

    return interleave(phase, geometry)


def _by_phase(x: Named, kernel: Named, geometry: Geometry, dot: Dot) -> Named:
    """Computes an undilated convolution for every remainder of the output position, with a part of the kernel each."""

    blank = ("n", *geometry.space, "o")

    def phase(remainders: Sequence[int], sizes: Sequence[int]) -> Named:
        part, widths, starts = kernel, {}, []
        for d, size in enumerate(sizes):
            stored = stored_at(geometry, d, remainders[d])
            if not stored or not size:
                return Named(jnp.zeros([x.size("n"), *sizes, kernel.size("o")], x.value.dtype), blank)
            reads = geometry.reads(d)
            first = [(reads[j] + remainders[d] - geometry.padding[d][0]) // geometry.input_dilation[d] for j in stored]
            low = -min(first)
            widths[f"s{d}"] = (low, max(first) + size - geometry.inputs[d], 0)
            starts.append([f + low for f in first])
            step = stored[1] - stored[0] if len(stored) > 1 else 1
            axis = part.axes.index(f"k{d}")
            part = Named(lax.slice_in_dim(part.value, stored[0], stored[-1] + 1, step, axis), part.axes)
        plain = geometry._replace(outputs=tuple(sizes), strides=(1,) * len(sizes))
        patches = _stack(pad(x, widths), plain, starts, geometry.taps)
        return contract(patches, part, [*geometry.taps, "c"], dot)

    return interleave(phase, geometry)


def _grouped(
    x: Named, kernel: Named, geometry: Geometry, dot: Dot, groups: int, split: str, out_axes: tuple[str, ...]
) -> jax.Array:
    """Convolves every group on its own under `vmap`, a batched matrix product.

    `split` is the axis of `x` that has the groups.
    """
    a, b, c = x.axes.index(split), kernel.axes.index("o"), out_axes.index("o")

    def divided(value: jax.Array, axis: int) -> jax.Array:
        return value.reshape(*value.shape[:axis], groups, -1, *value.shape[axis + 1 :])

    def one(left: jax.Array, right: jax.Array) -> jax.Array:
        return _convolve(Named(left, x.axes), Named(right, kernel.axes), geometry, dot).to(out_axes)

    y = jax.vmap(one, (a, b), c)(divided(x.value, a), divided(kernel.value, b))
    return y.reshape(*y.shape[:c], -1, *y.shape[c + 2 :])


def _depthwise(x: Named, kernel: Named, geometry: Geometry, dot: Dot, split: str) -> Named | None:
    """Computes groups of one feature each; returns None where too many products would be written out."""
    strided = any(s > 1 for s in geometry.strides) or any(d > 1 for d in geometry.window_dilation)
    if strided and any(d > 1 for d in geometry.input_dilation):
        return None
    x = Named(x.value, tuple("g" if axis == split else axis for axis in x.axes))
    kernel = Named(kernel.value, tuple("g" if axis == "o" else axis for axis in kernel.axes))
    if split == "c" and math.prod(geometry.window) <= MOST_TERMS:
        alone = kernel.axes.index("c")
        kernel = Named(jnp.squeeze(kernel.value, alone), tuple(axis for axis in kernel.axes if axis != "c"))
        y = depthwise.forward(x, kernel, geometry)
        return Named(y.value, tuple("o" if axis == "g" else axis for axis in y.axes))
    if split == "n" and math.prod(geometry.outputs) <= MOST_TERMS:
        y = depthwise.kernel_gradient(x, kernel, geometry, dot)
        return Named(y.value[None], ("n", *("o" if axis == "g" else axis for axis in y.axes)))
    return None


def _winograd(x: Named, kernel: Named, geometry: Geometry, dot: Dot) -> Named | None:
    """Computes a wide three-by-three convolution of stride one, or its kernel gradient; returns None for any other."""
    ones = (*geometry.strides, *geometry.input_dilation, *geometry.window_dilation)
    if len(geometry.window) != 2 or any(v != 1 for v in ones):
        return None
    widths = {axis: (low, high, 0) for axis, (low, high) in zip(geometry.space, geometry.padding)}
    wide = min(x.size("c"), kernel.size("o")) >= WIDE and x.size("n") * math.prod(geometry.outputs) >= LARGE
    if geometry.window == (3, 3) and wide and len(set(geometry.flipped)) == 1:
        taps = kernel.to([*geometry.taps, *(axis for axis in kernel.axes if axis in ("c", "o"))])
        contracted = 2 if kernel.axes.index("c") < kernel.axes.index("o") else 3
        padded = pad(x, widths).to(["n", "s0", "s1", "c"])
        taps = taps[::-1, ::-1] if geometry.flipped[0] else taps
        return Named(winograd.forward(padded, taps, contracted, dot), ("n", "s0", "s1", "o"))
    wide = min(x.size("n"), kernel.size("o")) >= WIDE and x.size("c") * math.prod(geometry.window) >= LARGE_SUM
    if geometry.outputs == (3, 3) and wide and not any(geometry.flipped):
        padded = pad(x, widths).to(["c", "s0", "s1", "n"])
        y = winograd.kernel_gradient(padded, kernel.to(["c", "k0", "k1", "o"]), dot)
        return Named(y, ("s0", "s1", "n", "o"))
    return None
