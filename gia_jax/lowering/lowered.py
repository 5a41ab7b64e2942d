"""Fast convolutions for functions that are differentiated once, such as a generator or feature statistics."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from gia_jax.lowering.linear import call, captured, linear, moving, opened, transpose
from gia_jax.lowering.rewrite import Lowering, lower, lowers_to_matmul


def lowered(fn: Callable[..., Any], *, lowering: Lowering = "auto") -> Callable[..., Any]:
    """Makes the value and the first derivatives of a function compute convolutions as matrix products.

    Each of these programs is rewritten after it was derived, so the derivative rules inside `fn` hold. Forward and
    reverse mode, `vmap` and `scan` compose with it. What is *between* convolutions is left as it is. A second
    derivative is correct, but not fast: for the gradient of a loss take `gia_jax.clients.parameter_gradient`.

    Args:
        fn: Function of trees of arrays that returns a tree of floating-point arrays. It may close over traced values.
        lowering: How convolutions are computed: "matmul" as matrix products, "native" as `fn` has them, or "auto",
            which is "matmul" on a CPU and "native" elsewhere.

    Returns:
        The function. It raises ValueError for an output that is not floating point.

    Raises:
        ValueError: If `lowering` is unknown.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax.lowering import lowered
        >>> def fn(images, kernel):
        ...     return jax.lax.conv(images, kernel, (1, 1), "SAME")
        >>> images, kernel = jnp.arange(16.0).reshape(1, 1, 4, 4), jnp.ones((1, 1, 3, 3))
        >>> bool(jnp.allclose(lowered(fn, lowering="matmul")(images, kernel), fn(images, kernel)))
        True
    """
    if not lowers_to_matmul(lowering):
        return fn

    def fast_fn(*arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, arguments))
        flat_fn, operands, shape = captured(lambda *values: fn(*jax.tree.unflatten(tree, values)), *leaves)
        for path, output in jax.tree.leaves_with_path(shape):
            if not jnp.issubdtype(output.dtype, jnp.inexact):
                where = jax.tree_util.keystr(path)
                raise ValueError(f"fn must return floating-point arrays, got {output.dtype} at output{where}")
        outputs, structure = jax.tree.flatten(shape)
        return jax.tree.unflatten(structure, _lowered(flat_fn, operands, len(outputs)))

    return fast_fn


def _lowered(fn: Callable[..., list[jax.Array]], operands: Sequence[Any], count: int) -> list[Any]:
    """Calls `fn` on its operands with convolutions as matrix products, and returns its `count` outputs."""

    @jax.custom_jvp
    def value(*values: jax.Array) -> list[jax.Array]:
        return call(lower(jax.make_jaxpr(fn)(*values)), *values)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        moved = moving(primals, tangents)
        pushed: dict[str, jex_core.Jaxpr] = {}

        def value_and_residuals(*values: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            def along(*inputs: jax.Array) -> list[jax.Array]:
                places = dict(zip(moved, inputs, strict=True))
                return fn(*(places.get(i, value) for i, value in enumerate(values)))

            inputs = [values[i] for i in moved]
            out, push = jax.linearize(along, *inputs)
            traced = jax.make_jaxpr(push)(*inputs)
            pushed["jaxpr"] = traced.jaxpr
            return out, list(traced.consts)

        found = call(lower(jax.make_jaxpr(value_and_residuals)(*primals)), *primals)
        outputs, residuals = found[:count], found[count:]
        forward = opened(pushed["jaxpr"])
        backward = transpose(forward, residuals, [primals[i] for i in moved], outputs)
        moves = [tangents[i] for i in moved]
        return outputs, linear(residuals, moves, forward=forward, backward=backward, prepare=lower)

    value.defjvp(rule, symbolic_zeros=True)
    return value(*operands)
