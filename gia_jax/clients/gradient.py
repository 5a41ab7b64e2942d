"""The gradient of a client's loss, with a derivative rule made for gradient matching.

For g(theta, x) = d loss / d theta and any objective D, the gradient of D(g(theta, x)) needs the product of a cotangent
v with the mixed second derivative of the loss. Differentiating the gradient in reverse again is slow; by the symmetry
of second derivatives the product is a *forward* derivative of a gradient, d/dt [d loss / d (theta, x)] at theta + t v
(Pearlmutter, Fast exact multiplication by the Hessian, 1994). `parameter_gradient` carries that rule and its transpose,
so reverse mode, forward mode, `vmap`, `scan` and `remat` all compose with it, and both run at matrix-product speed.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

from gia_jax.lowering import Lowering, lower, lowers_to_matmul

# Cheaper to do again than to keep: a reversed kernel kept for the second derivative is a copy of the weights.
RECOMPUTED = {"rev", "transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "pad", "slice"}


def parameter_gradient(loss_fn: Callable[..., jax.Array], *, lowering: Lowering = "auto") -> Callable[..., Any]:
    """`jax.grad(loss_fn)` with a forward-over-reverse derivative rule and fast convolutions.

    Args:
        loss_fn: `(params, *data) -> ` scalar. It may close over traced values: they are differentiated through as well.
        lowering: "matmul" computes convolutions as matrix products, "native" leaves them alone, "auto" chooses the
            first on CPU and the second elsewhere.

    Returns:
        `(params, *data) -> ` gradient with respect to `params`, a tree like `params`.

    Raises:
        ValueError: If the loss is not a scalar, or a leaf of `params` is not floating point.
    """
    prepare = lower if lowers_to_matmul(lowering) else (lambda closed: closed)

    def gradient_fn(params: Any, *data: Any) -> Any:
        leaves, tree = jax.tree.flatten(params)
        for path, leaf in jax.tree.leaves_with_path(params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                name = jax.tree_util.keystr(path)
                raise ValueError(f"params must be floating point, got {jnp.result_type(leaf)} at params{name}")
        flat, data_tree = jax.tree.flatten(data)
        arguments = [jnp.asarray(leaf) for leaf in leaves + flat]
        count = len(leaves)

        def flat_loss(*values: jax.Array) -> jax.Array:
            loss = loss_fn(jax.tree.unflatten(tree, values[:count]), *jax.tree.unflatten(data_tree, values[count:]))
            if jnp.shape(loss) != ():
                raise ValueError(f"loss_fn must return a scalar, got shape {jnp.shape(loss)}")
            return loss

        # What the loss closes over, traced or not, becomes an operand like any other.
        traced = jax.make_jaxpr(flat_loss)(*arguments)
        operands = [*arguments, *traced.consts]

        def loss(*values: jax.Array) -> jax.Array:
            closed = jex_core.ClosedJaxpr(traced.jaxpr, list(values[len(arguments) :]))
            return jex_core.jaxpr_as_fun(closed)(*values[: len(arguments)])[0]

        return jax.tree.unflatten(tree, _gradient(loss, operands, count, prepare))

    return gradient_fn


def _gradient(loss: Callable[..., jax.Array], operands: Sequence[Any], count: int, prepare: Callable) -> list[Any]:
    """Gradient of `loss` with respect to its first `count` operands."""
    wrt = tuple(range(count))

    @jax.custom_jvp
    def gradient(*values: jax.Array) -> list[jax.Array]:
        return _call(prepare(jax.make_jaxpr(lambda *v: list(jax.grad(loss, wrt)(*v)))(*values)), *values)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not SymbolicZero]
        moving = [i for i in moving if jnp.issubdtype(jnp.result_type(primals[i]), jnp.inexact)]
        wanted = (*wrt, *(i for i in moving if i >= count))
        linear: dict[str, jex_core.Jaxpr] = {}

        def value_and_residuals(*values: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            def gradients(params: list[jax.Array]) -> tuple[jax.Array, ...]:
                return jax.grad(loss, wanted)(*params, *values[count:])

            kept = jax.checkpoint(gradients, prevent_cse=False, policy=lambda p, *_, **__: p.name not in RECOMPUTED)
            out, push = jax.linearize(kept, list(values[:count]))
            picked = [wanted.index(i) for i in moving]
            traced = jax.make_jaxpr(lambda v: [push(v)[i] for i in picked])(list(values[:count]))
            linear["jaxpr"] = traced.jaxpr
            return list(out[:count]), list(traced.consts)

        both = prepare(jax.make_jaxpr(value_and_residuals)(*primals))
        outputs = _call(both, *primals)
        value, residuals = outputs[:count], outputs[count:]
        back = linear["jaxpr"]
        back = jex_core.ClosedJaxpr(back.replace(invars=[*back.constvars, *back.invars], constvars=[]), ())
        forward = _transpose(back, residuals, primals[:count], [primals[i] for i in moving])
        tangent = linear_p.bind(
            *residuals,
            *(tangents[i] for i in moving),
            forward=prepare(forward),
            backward=prepare(back),
            num_residuals=len(residuals),
        )
        return value, list(tangent)

    gradient.defjvp(rule, symbolic_zeros=True)
    return gradient(*operands)


def _call(closed: jex_core.ClosedJaxpr, *values: Any) -> list[Any]:
    return jex_core.jaxpr_as_fun(closed)(*values)


def _like(values: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)) for v in values]


def _transpose(
    closed: jex_core.ClosedJaxpr, residuals: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> jex_core.ClosedJaxpr:
    """The transpose of `(residuals, inputs) -> outputs`, which is linear in the inputs."""

    def transposed(*values: Any) -> list[Any]:
        kept, cotangents = values[: len(residuals)], list(values[len(residuals) :])
        return list(jax.linear_transpose(lambda *v: _call(closed, *kept, *v), *_like(inputs))(cotangents))

    return jax.make_jaxpr(transposed)(*_like(residuals), *_like(outputs))


# A linear map with its transpose at hand: (residuals, inputs) -> outputs. Transposing the fast form of one operation by
# operation would give a slow form of the other, so both are kept. `jax.custom_derivatives.linear_call` is the same idea
# without a batching rule.
linear_p = jex_core.Primitive("gia_jax_linear")
linear_p.multiple_results = True


def _linear(*values: Any, forward: jex_core.ClosedJaxpr, backward: jex_core.ClosedJaxpr, num_residuals: int) -> list:
    del backward, num_residuals
    return _call(forward, *values)


def _linear_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    n = params["num_residuals"]
    out = linear_p.bind(*primals, **params)
    moves = [ad.instantiate_zeros(t) for t in tangents]
    if all(type(t) is ad.Zero for t in tangents[:n]):
        return out, linear_p.bind(*primals[:n], *moves[n:], **params)
    return jax.jvp(lambda *v: _call(params["forward"], *v), list(primals), moves)  # third derivatives: no special rule


def _linear_transpose(cotangents: Sequence[Any], *values: Any, **params: Any) -> list[Any]:
    n = params["num_residuals"]
    swapped = {"forward": params["backward"], "backward": params["forward"], "num_residuals": n}
    out = linear_p.bind(*values[:n], *(ad.instantiate_zeros(c) for c in cotangents), **swapped)
    return [None] * n + list(out)


def _linear_batch(values: Sequence[Any], axes: Sequence[int | None], **params: Any) -> tuple[list[Any], list[int]]:
    n = params["num_residuals"]
    size = next(v.shape[a] for v, a in zip(values, axes, strict=True) if a is not None)
    values = [v if a is None else jnp.moveaxis(v, a, 0) for v, a in zip(values, axes, strict=True)]
    residuals, inputs = values[:n], values[n:]
    inputs = [v if a is not None else jnp.broadcast_to(v, (size, *v.shape)) for v, a in zip(inputs, axes[n:])]
    mapped = [None if a is None else 0 for a in axes[:n]]

    def batched(closed: jex_core.ClosedJaxpr) -> jex_core.ClosedJaxpr:
        lanes = [jax.ShapeDtypeStruct((size, *v.shape), v.dtype) for v in closed.in_avals[n:]]
        fn = jax.vmap(lambda *v: _call(closed, *v), in_axes=(*mapped, *itertools.repeat(0, len(lanes))), axis_size=size)
        return jax.make_jaxpr(fn)(*_like(residuals), *lanes)

    params = {"forward": batched(params["forward"]), "backward": batched(params["backward"]), "num_residuals": n}
    out = linear_p.bind(*residuals, *inputs, **params)
    return out, [0] * len(out)


linear_p.def_impl(_linear)
linear_p.def_abstract_eval(lambda *_, forward, backward, num_residuals: forward.out_avals)
ad.primitive_jvps[linear_p] = _linear_jvp
ad.primitive_transposes[linear_p] = _linear_transpose
batching.primitive_batchers[linear_p] = _linear_batch
mlir.register_lowering(linear_p, mlir.lower_fun(_linear, multiple_results=True))
