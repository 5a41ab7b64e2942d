"""What a convolution's arrays mean and where its window lies, for every way of computing it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Measured on XLA's CPU backend: below so many columns its matrix product is faster with exchanged operands.
NARROW = 128

Dot = Callable[..., jax.Array]


class Named(NamedTuple):
    """An array and what its axes mean: n batch, c contracted features, o output features, g groups,
    s0.. space, k0.. taps.
    """

    value: jax.Array
    axes: tuple[str, ...]

    def size(self, axis: str) -> int:
        """Returns the size of a named axis."""
        return self.value.shape[self.axes.index(axis)]

    def to(self, axes: Sequence[str]) -> jax.Array:
        """Returns the array with its axes in the given order."""
        order = [self.axes.index(axis) for axis in axes]
        return self.value if order == sorted(order) else jnp.transpose(self.value, order)


class Geometry(NamedTuple):
    """Sizes of input, window (kernel) and output on each spatial axis, and how they lie relative to each other."""

    inputs: tuple[int, ...]
    window: tuple[int, ...]
    outputs: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    window_dilation: tuple[int, ...]
    flipped: tuple[bool, ...]

    @property
    def space(self) -> list[str]:
        """Returns the names of the spatial axes."""
        return [f"s{d}" for d in range(len(self.window))]

    @property
    def taps(self) -> list[str]:
        """Returns the names of the kernel's axes."""
        return [f"k{d}" for d in range(len(self.window))]

    def reads(self, d: int) -> list[int]:
        """Returns where each stored kernel position of axis `d` reads the padded input, from the window's start."""
        stored = range(self.window[d])
        return [(self.window[d] - 1 - j if self.flipped[d] else j) * self.window_dilation[d] for j in stored]


def names_of(spec: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
    """Returns the axis names in the order in which a layout stores the axes."""
    axes = [""] * len(spec)
    for position, name in zip(spec, names, strict=True):
        axes[position] = name
    return tuple(axes)


def unflipped(kernel: Named, geometry: Geometry) -> Named:
    """Returns the kernel with its reversed axes turned round in memory."""
    axes = [kernel.axes.index(f"k{d}") for d, flip in enumerate(geometry.flipped) if flip]
    return Named(lax.rev(kernel.value, axes), kernel.axes) if axes else kernel


def window_at(x: Named, geometry: Geometry, start: Sequence[int]) -> Named:
    """Returns the strided slice that one kernel position at `start` sees."""
    low, high, strides = [0] * x.value.ndim, list(x.value.shape), [1] * x.value.ndim
    for d, axis in enumerate(geometry.space):
        a = x.axes.index(axis)
        low[a], strides[a] = start[d], geometry.strides[d]
        high[a] = start[d] + (geometry.outputs[d] - 1) * geometry.strides[d] + 1
    return Named(lax.slice(x.value, low, high, strides), x.axes)


def pad(x: Named, widths: dict[str, tuple[int, int, int]]) -> Named:
    """Pads named axes by (low, high, interior) numbers of zeros."""
    config = [widths.get(axis, (0, 0, 0)) for axis in x.axes]
    if all(width == (0, 0, 0) for width in config):
        return x
    return Named(lax.pad(x.value, jnp.zeros((), x.value.dtype), config), x.axes)


def stored_at(geometry: Geometry, d: int, remainder: int) -> list[int]:
    """Returns kernel positions that read a real input, not a zero of the dilation, at outputs of that remainder."""
    offset = remainder - geometry.padding[d][0]
    return [j for j, read in enumerate(geometry.reads(d)) if (offset + read) % geometry.input_dilation[d] == 0]


def interleave(phase: Callable[[Sequence[int], Sequence[int]], Named], geometry: Geometry) -> Named:
    """Puts the outputs of every remainder modulo the dilation together."""

    def along(d: int, remainders: list[int], sizes: list[int]) -> Named:
        if d == len(geometry.outputs):
            return phase(remainders, sizes)
        step, total = geometry.input_dilation[d], geometry.outputs[d]
        longest = -(-total // step)
        parts = []
        for r in range(step):
            size = -(-(total - r) // step)
            part = along(d + 1, [*remainders, r], [*sizes, size])
            parts.append(pad(part, {f"s{d}": (0, longest - size, 0)}))
        if step == 1:
            return parts[0]
        axes = parts[0].axes
        a = axes.index(f"s{d}")
        woven = jnp.stack([part.to(axes) for part in parts], a + 1)
        woven = woven.reshape(*woven.shape[:a], longest * step, *woven.shape[a + 2 :])
        return Named(lax.slice_in_dim(woven, 0, total, axis=a), axes)

    return along(0, [], [])


def contract(a: Named, b: Named, over: Sequence[str], dot: Dot) -> Named:
    """Sums over the axes `over`, as a product of two matrices wherever the axes lie so that no copy is needed."""
    over = sorted(over, key=a.axes.index)
    (left, i), (right, j) = _matrix(a, over), _matrix(b, over)
    free_a = [axis for axis in a.axes if axis not in over]
    free_b = [axis for axis in b.axes if axis not in over]
    shape = [a.size(axis) for axis in free_a], [b.size(axis) for axis in free_b]
    if i == 0 and math.prod(shape[1]) < NARROW:
        y = dot(right, left, (((j,), (i,)), ((), ())))
        return Named(y.reshape(*shape[1], *shape[0]), (*free_b, *free_a))
    y = dot(left, right, (((i,), (j,)), ((), ())))
    return Named(y.reshape(*shape[0], *shape[1]), (*free_a, *free_b))


def _matrix(x: Named, over: Sequence[str]) -> tuple[jax.Array, int]:
    """Returns `x` as a matrix, and which of its two axes is contracted."""
    free = [axis for axis in x.axes if axis not in over]
    rows = math.prod(x.size(axis) for axis in over)
    if list(x.axes) == [*over, *free]:
        return x.value.reshape(rows, -1), 0
    return x.to([*free, *over]).reshape(-1, rows), 1


def exchanged(
    x: Named, kernel: Named, geometry: Geometry, convolve: Callable[[Named, Named, Geometry], Named]
) -> Named:
    """Convolves a dilated input under a large window as the kernel's cotangent with its operands exchanged.

    The sum over the undilated input i of x[i] w[d i - o + low] is a window x, dilated by d, that slides over w. Its
    outputs come in reverse.
    """
    kernel = unflipped(kernel, geometry)
    space, taps = geometry.space, geometry.taps
    roles = {"n": "o", "o": "n", "c": "c", "g": "g"} | dict(zip(space + taps, taps + space, strict=True))
    padding = []
    for d, (low, _) in enumerate(geometry.padding):
        span = (geometry.inputs[d] - 1) * geometry.input_dilation[d] + 1
        before = geometry.outputs[d] - 1 - low
        padding.append((before, geometry.outputs[d] - 1 + span - geometry.window[d] - before))
    turned = geometry._replace(
        inputs=geometry.window,
        window=geometry.inputs,
        padding=tuple(padding),
        input_dilation=geometry.window_dilation,
        window_dilation=geometry.input_dilation,
        flipped=(False,) * len(padding),
    )
    lhs = Named(kernel.value, tuple(roles[axis] for axis in kernel.axes))
    rhs = Named(x.value, tuple(roles[axis] for axis in x.axes))
    y = convolve(lhs, rhs, turned)
    axes = tuple({"n": "o", "o": "n"}.get(axis, axis) for axis in y.axes)
    return Named(lax.rev(y.value, [axes.index(axis) for axis in space]), axes)
