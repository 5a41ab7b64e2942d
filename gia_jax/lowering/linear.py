"""Linear maps that carry their transpose, for derivative rules that choose how both are computed."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir


def moving(primals: Sequence[Any], tangents: Sequence[Any]) -> list[int]:
    """Returns the places of the arguments along which a derivative is taken, in a rule with symbolic zeros."""
    return [
        i
        for i, tangent in enumerate(tangents)
        if type(tangent) is not SymbolicZero and jnp.issubdtype(jnp.result_type(primals[i]), jnp.inexact)
    ]


def call(closed: jex_core.ClosedJaxpr, *values: Any) -> list[Any]:
    """Runs a closed jaxpr on its inputs and returns its flat outputs."""
    return jex_core.jaxpr_as_fun(closed)(*values)


def captured(fn: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., list[jax.Array]], list[jax.Array], Any]:
    """Makes a function of everything that `fn` reads: what it closes over, traced or not, becomes an operand.

    Args:
        fn: Function of arrays that may close over other arrays.
        *arguments: Arguments of `fn`.

    Returns:
        The function from its operands to its flat outputs, the operands with `arguments` first, and the shapes of the
        outputs in their tree.
    """
    traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*arguments)

    def of_operands(*values: jax.Array) -> list[jax.Array]:
        consts, own = list(values[len(arguments) :]), values[: len(arguments)]
        return call(jex_core.ClosedJaxpr(traced.jaxpr, consts), *own)

    return of_operands, [*arguments, *map(jnp.asarray, traced.consts)], shapes


def opened(jaxpr: jex_core.Jaxpr) -> jex_core.ClosedJaxpr:
    """Makes the constants of a jaxpr, which are the residuals of a linear map, its first inputs."""
    return jex_core.ClosedJaxpr(jaxpr.replace(invars=[*jaxpr.constvars, *jaxpr.invars], constvars=[]), ())


def like(values: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of values."""
    return [jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)) for v in values]


def transpose(
    closed: jex_core.ClosedJaxpr, residuals: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> jex_core.ClosedJaxpr:
    """Traces the transpose of a map `(residuals, inputs) -> outputs` that is linear in the inputs."""

    def transposed(*values: Any) -> list[Any]:
        kept, cotangents = values[: len(residuals)], list(values[len(residuals) :])
        return list(jax.linear_transpose(lambda *v: call(closed, *kept, *v), *like(inputs))(cotangents))

    return jax.make_jaxpr(transposed)(*like(residuals), *like(outputs))


# A linear map (residuals, inputs) -> outputs that keeps its transpose. Transposing the fast form of one, operation by
# operation, would give a slow form of the other, so both are kept. `jax.custom_derivatives.linear_call` is the same
# idea without a batching rule.
linear_p = jex_core.Primitive("gia_jax_linear")
linear_p.multiple_results = True


def linear(
    residuals: Sequence[Any],
    inputs: Sequence[Any],
    *,
    forward: jex_core.ClosedJaxpr,
    backward: jex_core.ClosedJaxpr,
    prepare: Callable[[jex_core.ClosedJaxpr], jex_core.ClosedJaxpr],
) -> list[Any]:
    """Applies a linear map that remembers its transpose.

    Args:
        residuals: Values on which the map depends, but in which it need not be linear.
        inputs: Values in which the map is linear.
        forward: The map, `(residuals, inputs) -> outputs`.
        backward: The transpose of the map, `(residuals, outputs) -> inputs`.
        prepare: Function that rewrites each of the two for how it is to be computed.

    Returns:
        The flat outputs of the map.
    """
    programs = {"forward": prepare(forward), "backward": prepare(backward)}
    return list(linear_p.bind(*residuals, *inputs, **programs, num_residuals=len(residuals)))


def _linear(*values: Any, forward: jex_core.ClosedJaxpr, backward: jex_core.ClosedJaxpr, num_residuals: int) -> list:
    """Evaluates the map itself."""
    del backward, num_residuals
    return call(forward, *values)


def _linear_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    """Pushes tangents through the map, by the map itself where only its inputs move."""
    n = params["num_residuals"]
    out = linear_p.bind(*primals, **params)
    moves = [ad.instantiate_zeros(t) for t in tangents]
    if all(type(t) is ad.Zero for t in tangents[:n]):
        return out, linear_p.bind(*primals[:n], *moves[n:], **params)
    return jax.jvp(lambda *v: call(params["forward"], *v), list(primals), moves)  # third derivatives: no special rule


def _linear_transpose(cotangents: Sequence[Any], *values: Any, **params: Any) -> list[Any]:
    """Transposes the map by exchanging it with its stored transpose."""
    n = params["num_residuals"]
    swapped = {"forward": params["backward"], "backward": params["forward"], "num_residuals": n}
    out = linear_p.bind(*values[:n], *(ad.instantiate_zeros(c) for c in cotangents), **swapped)
    return [None] * n + list(out)


def _linear_batch(values: Sequence[Any], axes: Sequence[int | None], **params: Any) -> tuple[list[Any], list[int]]:
    """Batches the map and its transpose over lanes, which are the leading axis of every input."""
    n = params["num_residuals"]
    size = next(v.shape[a] for v, a in zip(values, axes, strict=True) if a is not None)
    values = [v if a is None else jnp.moveaxis(v, a, 0) for v, a in zip(values, axes, strict=True)]
    residuals, inputs = values[:n], values[n:]
    inputs = [v if a is not None else jnp.broadcast_to(v, (size, *v.shape)) for v, a in zip(inputs, axes[n:])]
    mapped = [None if a is None else 0 for a in axes[:n]]

    def batched(closed: jex_core.ClosedJaxpr) -> jex_core.ClosedJaxpr:
        lanes = [jax.ShapeDtypeStruct((size, *v.shape), v.dtype) for v in closed.in_avals[n:]]
        fn = jax.vmap(lambda *v: call(closed, *v), in_axes=(*mapped, *itertools.repeat(0, len(lanes))), axis_size=size)
        return jax.make_jaxpr(fn)(*like(residuals), *lanes)

    params = {"forward": batched(params["forward"]), "backward": batched(params["backward"]), "num_residuals": n}
    out = linear_p.bind(*residuals, *inputs, **params)
    return out, [0] * len(out)


linear_p.def_impl(_linear)
linear_p.def_abstract_eval(lambda *_, forward, backward, num_residuals: forward.out_avals)
ad.primitive_jvps[linear_p] = _linear_jvp
ad.primitive_transposes[linear_p] = _linear_transpose
batching.primitive_batchers[linear_p] = _linear_batch
mlir.register_lowering(linear_p, mlir.lower_fun(_linear, multiple_results=True))
