"""The gradient of a client's loss, with a derivative rule made for gradient matching.

For g(theta, x) = d loss / d theta and any objective D, the gradient of D(g(theta, x)) needs the product of a cotangent
v with the mixed second derivative of the loss. Differentiating the gradient in reverse again is slow. By the symmetry
of second derivatives the product is a *forward* derivative of a gradient, d/dt [d loss / d (theta, x)] at theta + t v
(Pearlmutter, Fast exact multiplication by the Hessian, 1994). `parameter_gradient` carries that rule and its transpose,
so that reverse mode, forward mode, `vmap`, `scan` and `remat` all compose with it, and both run at matrix-product
speed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from gia_jax import _check
from gia_jax.lowering import Lowering, lower, lowers_to_matmul
from gia_jax.lowering.linear import call, captured, linear, moving, opened, transpose

# Cheaper to do again than to keep: a reversed kernel kept for the second derivative is a copy of the weights.
RECOMPUTED = {"rev", "transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "pad", "slice"}


def parameter_gradient(loss_fn: Callable[..., jax.Array], *, lowering: Lowering = "auto") -> Callable[..., Any]:
    """Returns `jax.grad(loss_fn)` with a forward-over-reverse derivative rule and fast convolutions.

    Args:
        loss_fn: Function `(params, *data) -> loss`, a scalar. It may close over traced values, which are differentiated
            through as well.
        lowering: How convolutions are computed: "matmul" as matrix products, "native" as they are, "auto" chooses the
            first on CPU and the second elsewhere.

    Returns:
        A function `(params, *data) -> gradient` with respect to `params`, a tree like `params`.

    Raises:
        ValueError: If `lowering` is unknown. The returned function raises it if the loss is not a scalar, a leaf of
            `params` is not floating point, or the loss refuses the data, where these are concrete.

    Examples:
        The gradient of sum x w^2 is 2 x w, and its derivative with respect to the data x is 2 w:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import clients
        >>> gradient_fn = clients.parameter_gradient(lambda w, x: jnp.sum(x * w**2))
        >>> w, x = jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0])
        >>> gradient_fn(w, x).tolist()
        [6.0, 4.0]
        >>> jax.grad(lambda x: gradient_fn(w, x).sum())(x).tolist()
        [2.0, 4.0]
    """
    prepare = lower if lowers_to_matmul(lowering) else (lambda closed: closed)

    def gradient_fn(params: Any, *data: Any) -> Any:
        check_data(loss_fn, params, *data)
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

        losses, operands, _ = captured(flat_loss, *arguments)
        return jax.tree.unflatten(tree, _gradient(lambda *values: losses(*values)[0], operands, count, prepare))

    return gradient_fn


def check_data(loss_fn: Callable[..., jax.Array], params: Any, *data: Any) -> None:
    """Lets a loss refuse concrete data, such as labels that are no classes.

    The loss is traced, but not run. Where its gradient is derived the data are traced as well, and the loss can answer
    only with NaN.

    Args:
        loss_fn: Function `(params, *data) -> loss`.
        params: Parameters of the model.
        *data: Data of the loss, such as a batch. Traced data are not checked.

    Raises:
        ValueError: If the loss refuses the data.
    """
    if jax.tree.leaves(data) and _check.is_concrete(data):
        data = jax.tree.map(jnp.asarray, data)
        jax.eval_shape(lambda params: loss_fn(params, *data), params)


def _gradient(loss: Callable[..., jax.Array], operands: Sequence[Any], count: int, prepare: Callable) -> list[Any]:
    """Returns the gradient of `loss` with respect to its first `count` operands."""
    wrt = tuple(range(count))

    @jax.custom_jvp
    def gradient(*values: jax.Array) -> list[jax.Array]:
        return call(prepare(jax.make_jaxpr(lambda *v: list(jax.grad(loss, wrt)(*v)))(*values)), *values)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        moved = moving(primals, tangents)
        wanted = (*wrt, *(i for i in moved if i >= count))
        pushed: dict[str, jex_core.Jaxpr] = {}

        def value_and_residuals(*values: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            def gradients(params: list[jax.Array]) -> tuple[jax.Array, ...]:
                return jax.grad(loss, wanted)(*params, *values[count:])

            kept = jax.checkpoint(gradients, prevent_cse=False, policy=lambda p, *_, **__: p.name not in RECOMPUTED)
            out, push = jax.linearize(kept, list(values[:count]))
            picked = [wanted.index(i) for i in moved]
            traced = jax.make_jaxpr(lambda v: [push(v)[i] for i in picked])(list(values[:count]))
            pushed["jaxpr"] = traced.jaxpr
            return list(out[:count]), list(traced.consts)

        both = prepare(jax.make_jaxpr(value_and_residuals)(*primals))
        outputs = call(both, *primals)
        value, residuals = outputs[:count], outputs[count:]
        back = opened(pushed["jaxpr"])
        forward = transpose(back, residuals, primals[:count], [primals[i] for i in moved])
        moves = [tangents[i] for i in moved]
        return value, linear(residuals, moves, forward=forward, backward=back, prepare=prepare)

    gradient.defjvp(rule, symbolic_zeros=True)
    return gradient(*operands)
