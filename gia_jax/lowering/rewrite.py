"""Rewrites the convolutions of a traced function, and leaves everything else in it as it is.

XLA's CPU convolution is slow inside a `while` loop (jax issue 12868). Under `jax.vmap` a convolution whose kernels
differ between lanes becomes a grouped convolution, which is slow everywhere. A matrix product is neither. The rewrite
works on a jaxpr, so that an unmodified model of any library gets it. It is meant for programs that are *already
differentiated* (a gradient, a Hessian-vector product), hence it never touches a derivative rule of the model.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from gia_jax.lowering.convolution import convolution

Lowering = Literal["auto", "native", "matmul"]
CHECKPOINTS = ("checkpoint", "remat2")  # the name of `jax.checkpoint`'s equation depends on the version of JAX


def lowers_to_matmul(lowering: Lowering) -> bool:
    """Tells whether `lowering` means matrix products on the default backend.

    Args:
        lowering: "matmul", "native" or "auto", which means matrix products on a CPU only.

    Returns:
        True for matrix products, False for XLA's own convolutions.

    Raises:
        ValueError: If `lowering` is unknown.
    """
    if lowering not in ("auto", "native", "matmul"):
        raise ValueError(f"lowering must be 'auto', 'native' or 'matmul', got {lowering!r}")
    return lowering == "matmul" or (lowering == "auto" and jax.default_backend() == "cpu")


def lower(closed: jex_core.ClosedJaxpr) -> jex_core.ClosedJaxpr:
    """Rewrites every convolution of a jaxpr that `convolution` knows as slices and matrix products.

    Args:
        closed: Traced function.

    Returns:
        The same function, rewritten. It is `closed` itself where there is no convolution.
    """
    if not _has_convolution(closed.jaxpr):
        return closed
    arguments = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in closed.jaxpr.invars
    ]
    return jax.make_jaxpr(lambda *values: _interpret(closed.jaxpr, closed.consts, values))(*arguments)


def _subjaxprs(eqn: jex_core.JaxprEqn) -> list[jex_core.Jaxpr]:
    """Returns the jaxprs that the parameters of an equation hold, such as the body of a loop."""
    found: list[jex_core.Jaxpr] = []
    parameters = list(eqn.params.values())
    for parameter in parameters:  # which grow by what is inside them
        if isinstance(parameter, jex_core.ClosedJaxpr):
            found.append(parameter.jaxpr)
        elif isinstance(parameter, jex_core.Jaxpr):
            found.append(parameter)
        elif isinstance(parameter, (tuple, list)):
            parameters.extend(parameter)
    return found


@functools.lru_cache(maxsize=4096)
def _has_convolution(jaxpr: jex_core.Jaxpr) -> bool:
    """Tells whether a jaxpr, or one inside it, has a convolution."""
    return any(
        eqn.primitive.name == "conv_general_dilated" or any(map(_has_convolution, _subjaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _lower_parameter(parameter: Any) -> Any:
    """Rewrites the jaxprs that a parameter of an equation holds."""
    if isinstance(parameter, jex_core.ClosedJaxpr):
        return lower(parameter)
    if isinstance(parameter, jex_core.Jaxpr):
        lowered = lower(jex_core.ClosedJaxpr(parameter, ()))
        return parameter if lowered.consts else lowered.jaxpr
    if isinstance(parameter, (tuple, list)):
        return type(parameter)(_lower_parameter(item) for item in parameter)
    return parameter


def _evaluate(eqn: jex_core.JaxprEqn, values: dict[jex_core.Var, Any]) -> list[Any]:
    """Evaluates one equation as it stands, whatever callables its parameters hold."""
    inputs = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex_core.Literal)))
    info = jex_core.DebugInfo("lower", eqn.primitive.name, None, None)
    one = jex_core.Jaxpr((), inputs, eqn.outvars, [eqn], eqn.effects, info)
    return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(one, ()))(*[values[v] for v in inputs])


def _interpret(jaxpr: jex_core.Jaxpr, consts: Any, arguments: Any) -> list[Any]:
    """Evaluates a jaxpr equation by equation, with its convolutions replaced."""
    values: dict[jex_core.Var, Any] = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, arguments))
    reversed_kernels: dict[Any, tuple[Any, tuple[int, ...]]] = {}

    def read(atom: jex_core.Var | jex_core.Literal) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        name = eqn.primitive.name
        if name == "conv_general_dilated":
            lhs, rhs = operands
            # A reversed kernel is read in reverse where it lies, so that the weights are not copied.
            kernel, flipped = reversed_kernels.get(eqn.invars[1], (rhs, ()))
            outputs = [convolution(jnp.asarray(lhs), jnp.asarray(kernel), flipped=flipped, **eqn.params)]
        elif name == "jit":
            outputs = _interpret(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts, operands)
        elif name in CHECKPOINTS and not eqn.params["prevent_cse"]:
            outputs = _interpret(eqn.params["jaxpr"], (), operands)
        elif not (inside := _subjaxprs(eqn)):
            outputs = eqn.primitive.bind(*operands, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        else:
            if any(map(_has_convolution, inside)):
                eqn = eqn.replace(params={key: _lower_parameter(value) for key, value in eqn.params.items()})
            outputs = _evaluate(eqn, values)
        if name == "rev" and jnp.ndim(operands[0]) > 2:
            reversed_kernels[eqn.outvars[0]] = (operands[0], eqn.params["dimensions"])
        values.update(zip(eqn.outvars, outputs))
    return [read(v) for v in jaxpr.outvars]
