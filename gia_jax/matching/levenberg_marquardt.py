"""Gradient matching as nonlinear least squares, solved by the method of Levenberg and Marquardt.

The objective is a sum of squares of residuals r(x) = g(x) - g*, so the Gauss-Newton model of its Hessian is 2 J^T J.
A column of J is one forward derivative of the client's gradient. For a small image the normal equations fit into
memory, and where the network is smooth the method converges quadratically: its reconstructions are exact to rounding
where first-order methods end at 20-45 dB. Kinks (ReLU) stop it. The damping follows Nielsen, Damping parameter in
Marquardt's method, IMM-REP-1999-05, equation 2.4, but may fall tenfold a step, so that convergence stays quadratic. Use
float64. `second_order` finds a start; to go on from the result of any attack, start from it by `initializations.given`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Scalar
from gia_jax.precision import cast_like, wide_dtype, widened_tree

# Number of slow updates in succession that ends the search. One may be slow because a damping was too large, which
# then falls by ten an update.
PATIENCE = 3
PROBES = 16  # random signs by which conjugate gradients estimate the diagonal of the model Hessian


class LevenbergMarquardtState(NamedTuple):
    """The state of `levenberg_marquardt` between two updates.

    Attributes:
        damping: Current damping, relative to the mean of the diagonal of the model Hessian.
        growth: Factor by which the damping grows the next time a step is rejected.
        slow: Number of updates in succession, up to the last one, that lowered the loss by less than `least_fall` and
            could not promise more. The search has ended where it is 3 or more.
    """

    damping: Float[Array, ""]
    growth: Float[Array, ""]
    slow: Int[Array, ""]


def levenberg_marquardt(
    *,
    initial_damping: Scalar = 1e-4,
    max_trials: int = 10,
    tolerance: Scalar = 1e-20,
    least_fall: Scalar = 1e-4,
    equations: float | None = 2.0,
    linear_solver: Literal["cholesky", "cg"] = "cholesky",
    cg_steps: int = 200,
    column_batch: int = 16,
) -> optax.GradientTransformationExtraArgs:
    """Builds a least-squares solver that any matching attack can take as its optimiser.

    One update evaluates the Jacobian once and tries dampings until the loss falls. A prior in the loss enters the
    gradient and the acceptance test, but not the model Hessian.

    The search ends by itself, at a solution, at what the rounding of the observed update leaves of the loss, or in a
    local minimum: from then on x stays and an update costs nothing but the loss and its gradient. Under `vmap` that
    holds as soon as the search has ended in every lane. So the number of steps may be generous.

    Args:
        initial_damping: First damping, relative to the mean of the diagonal of 2 J^T J, positive and finite.
        max_trials: Number of dampings that are tried before x stays and the search ends, at least 1.
        tolerance: Loss, at least 0 and finite, at or below which the search ends.
        least_fall: Share of the loss, at least 0 and finite, by which an update must lower it. The search ends after
            three updates in succession that did not, and that promised no more by the quadratic model. With 0 it ends
            only where no damping lowers the loss.
        equations: Number of equations kept for each unknown, above 1 and finite. The residuals are summed with random
            signs into that many sums (a balanced count sketch, the same in every step). Where residuals vanish at the
            solution, the sums have the same solution and cost a fraction. None keeps all residuals.
        linear_solver: Method that solves the normal equations. "cholesky" forms J of the equations that are kept, and
            factors J^T J: 8 d^2 (equations + 1) bytes in float64 for d unknowns, however large the network is. "cg"
            needs only products with J and its transpose, preconditioned by an estimate of the diagonal of J^T J, for
            unknowns so many that this does not fit into memory. Each solve is then less exact, and steps are more.
        cg_steps: Largest number of conjugate-gradient steps of one solve, at least 1.
        column_batch: Number of columns of J that are computed at once, at least 1.

    Returns:
        The optimiser. Its update needs the extra arguments `value`, `value_fn` and `residual_fn`, which the matching
        step passes.

    Raises:
        ValueError: If a number is outside its range or `linear_solver` is unknown.

    Examples:
        The residuals x_0^2 - 4 and x_0 x_1 - 6 vanish at (2, 3):

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from gia_jax.matching import levenberg_marquardt
        >>> def residual_fn(x):
        ...     return jnp.array([x[0] ** 2 - 4, x[0] * x[1] - 6])
        >>> def value_fn(x):
        ...     return jnp.sum(residual_fn(x) ** 2)
        >>> solver = levenberg_marquardt(equations=None)
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = jax.value_and_grad(value_fn)(x)
        ...     extra = {"value": value, "value_fn": value_fn, "residual_fn": residual_fn}
        ...     updates, state = solver.update(grad, state, x, **extra)
        ...     return optax.apply_updates(x, updates), state
        >>> x = jnp.array([1.0, 1.0])
        >>> state = solver.init(x)
        >>> for _ in range(8):
        ...     x, state = step(x, state)
        >>> print(f"{x[0]:.2f} {x[1]:.2f}")
        2.00 3.00
    """
    _check.positive(initial_damping=initial_damping)
    _check.integer(max_trials=max_trials, cg_steps=cg_steps, column_batch=column_batch)
    _check.finite("initial_damping", initial_damping)
    for name, value in (("tolerance", tolerance), ("least_fall", least_fall)):
        _check.not_negative(**{name: value})
        _check.finite(name, value)
    if equations is not None and not 1 < equations < math.inf:
        raise ValueError(f"equations must be more than 1 for each unknown and finite, got {equations}")
    if linear_solver not in ("cholesky", "cg"):
        raise ValueError(f"linear_solver must be 'cholesky' or 'cg', got {linear_solver!r}")

    def init_fn(params: Any) -> LevenbergMarquardtState:
        dtype = wide_dtype(jnp.result_type(*jax.tree.leaves(params)))
        none = jnp.zeros((), jnp.int32)
        return LevenbergMarquardtState(jnp.asarray(initial_damping, dtype), jnp.asarray(2, dtype), none)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        def once(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            step, new = improve(updates, carry[2], params, extra_args["value_fn"], extra_args["residual_fn"])
            return jnp.ones((), bool), step, new

        # A loop of at most one round in place of a condition, both sides of which `jax.vmap` would compute.
        has_ended = ~(extra_args["value"] > tolerance) | (state.slow >= PATIENCE)
        _, step, state = jax.lax.while_loop(
            lambda carry: ~carry[0], once, (has_ended, optax.tree.zeros_like(params), state)
        )
        return step, state

    def improve(updates: Any, state: Any, params: Any, value_fn: Any, residual_fn: Any) -> tuple[Any, Any]:
        local = _linearized(updates, params, value_fn, residual_fn, equations)
        if linear_solver == "cholesky":
            normal = _by_cholesky(local, column_batch)
        else:
            normal = _by_conjugate_gradients(local, cg_steps)
        step, state = _damped_step(local, normal, state, max_trials, least_fall)
        return cast_like(local.unravel(step), params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Local(NamedTuple):
    """What is known of the loss around the unknowns, all of which are one vector x of length d.

    Attributes:
        x: The unknowns, shape (d,).
        unravel: Function from such a vector to a tree like the unknowns.
        merit_fn: Function `(x) -> loss`, with the objective replaced by that of the sketched residuals: what the steps
            descend on.
        value: The merit at x.
        gradient: Gradient of the merit at x, shape (d,).
        push: Function that multiplies a vector by the Jacobian J of the sketched residuals.
        pull: Function that multiplies a vector by the transpose of J.
    """

    x: Float[Array, " d"]
    unravel: Callable[[Array], Any]
    merit_fn: Callable[[Array], Array]
    value: Float[Array, ""]
    gradient: Float[Array, " d"]
    push: Callable[[Array], Array]
    pull: Callable[[Array], Array]


def _linearized(updates: Any, params: Any, value_fn: Any, residual_fn: Any, equations: float | None) -> _Local:
    """Linearises the residuals around the unknowns `params`, where `updates` is the gradient of the loss."""
    gradient, unravel = ravel_pytree(widened_tree(updates))
    flat, _ = ravel_pytree(widened_tree(params))

    def residuals_fn(x: Array) -> Array:
        return ravel_pytree(widened_tree(residual_fn(unravel(x))))[0]

    residuals, push_all = jax.linearize(residuals_fn, flat)
    sketch_fn = _sketch(residuals.size, None if equations is None else int(equations * flat.size))

    def merit_fn(x: Array) -> Array:
        every = residuals_fn(x)
        return value_fn(unravel(x)) - jnp.sum(jnp.square(every)) + jnp.sum(jnp.square(sketch_fn(every)))

    def push(v: Array) -> Array:
        return sketch_fn(push_all(v))

    def pull(v: Array, through: Callable[[Array], Array] = push) -> Array:
        return jax.linear_transpose(through, flat)(v)[0]

    # The gradient of the merit: of the loss, minus the objective's share, plus that of its sketch.
    value = merit_fn(flat)
    gradient = gradient - 2 * pull(residuals, push_all) + 2 * pull(sketch_fn(residuals))
    return _Local(flat, unravel, merit_fn, value, gradient, push, pull)


class _Normal(NamedTuple):
    """The normal equations (2 J^T J + damping m I) step = -gradient.

    Attributes:
        solve: Function from a damping to the step.
        mean_diagonal: Size m of the curvature, to which dampings are relative.
    """

    solve: Callable[[Array], Array]
    mean_diagonal: Float[Array, ""]


def _by_cholesky(local: _Local, column_batch: int) -> _Normal:
    """Forms 2 J^T J, from `column_batch` columns of J at once, and solves by its Cholesky factors."""
    x = local.x
    rows = jax.lax.map(local.push, jnp.eye(x.size, dtype=x.dtype), batch_size=column_batch)
    hessian = 2 * rows @ rows.T
    mean_diagonal = jnp.mean(jnp.diag(hessian))

    def solve(damping: Array) -> Array:
        damped = hessian + damping * mean_diagonal * jnp.eye(x.size, dtype=x.dtype)
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped), -local.gradient)

    return _Normal(solve, mean_diagonal)


def _by_conjugate_gradients(local: _Local, cg_steps: int) -> _Normal:
    """Solves by up to `cg_steps` products with J and its transpose, preconditioned by the diagonal."""
    diagonal = _estimated_diagonal(local)
    mean_diagonal = jnp.mean(diagonal)

    def solve(damping: Array) -> Array:
        shift = damping * mean_diagonal

        def damped(v: Array) -> Array:
            return 2 * local.pull(local.push(v)) + shift * v

        # An entry of the diagonal that no probe has seen counts as the shift, which may be 0 where J is.
        scale = jnp.maximum(diagonal + shift, jnp.finfo(diagonal.dtype).tiny)
        return jax.scipy.sparse.linalg.cg(damped, -local.gradient, maxiter=cg_steps, tol=1e-10, M=lambda v: v / scale)[
            0
        ]

    return _Normal(solve, mean_diagonal)


def _estimated_diagonal(local: _Local) -> Float[Array, " d"]:
    """Estimates the diagonal of 2 J^T J by products of the transpose of J with random signs: no estimate is negative.

    An entry is the squared length of a column of J, which is the mean of the squared sum of its entries under random
    signs. Of `PROBES` draws it has a relative error of about sqrt(2 / PROBES).
    """
    like = jax.eval_shape(local.push, local.x)

    def add(total: Array, key: PRNGKeyArray) -> tuple[Array, None]:
        return total + jnp.square(local.pull(jax.random.rademacher(key, like.shape, like.dtype))), None

    keys = jax.random.split(jax.random.key(int.from_bytes(b"prob")), PROBES)
    return 2 * jax.lax.scan(add, jnp.zeros_like(local.x), keys)[0] / PROBES


def _damped_step(
    local: _Local, normal: _Normal, state: LevenbergMarquardtState, max_trials: int, least_fall: Scalar
) -> tuple[Float[Array, " d"], LevenbergMarquardtState]:
    """Tries dampings until the merit falls, and returns the step, or zeros where none of `max_trials` did."""

    def trial(carry: _Trial) -> _Trial:
        damping, growth = carry.damping, carry.growth
        step = normal.solve(damping)
        change = local.merit_fn(local.x + step) - local.value
        # What the quadratic model promises: minus half of step^T gradient, plus the damping's share.
        promised = 0.5 * (jnp.vdot(step, local.gradient) - damping * normal.mean_diagonal * jnp.vdot(step, step))
        ratio = change / promised
        accepted = change < 0
        shrunk = damping * jnp.maximum(0.1, 1 - (2 * ratio - 1) ** 3)
        damping = jnp.where(accepted, shrunk, damping * growth)
        growth = jnp.where(accepted, 2, 2 * growth)
        fall = jnp.where(accepted, jnp.maximum(-change, -promised), jnp.zeros_like(change))
        step = jnp.where(accepted, step, jnp.zeros_like(step))
        return _Trial(carry.count + 1, damping, growth, accepted, step, fall)

    none, never = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    start = _Trial(none, state.damping, state.growth, never, jnp.zeros_like(local.x), jnp.zeros_like(local.value))
    last = jax.lax.while_loop(lambda carry: (carry.count < max_trials) & ~carry.accepted, trial, start)
    slow = jnp.where(last.fall < least_fall * local.value, state.slow + 1, none)
    slow = jnp.where(last.accepted, slow, PATIENCE)
    return last.step, LevenbergMarquardtState(last.damping, last.growth, slow)


class _Trial(NamedTuple):
    """What the trials of one update carry on.

    Attributes:
        count: Number of dampings that were tried.
        damping: Damping to try next, or of the next update.
        growth: Factor by which it grows if it is rejected.
        accepted: Whether the merit has fallen.
        step: Step that was accepted, or zeros.
        fall: By how much it lowers the merit, or promised to where that is more.
    """

    count: Int[Array, ""]
    damping: Float[Array, ""]
    growth: Float[Array, ""]
    accepted: Bool[Array, ""]
    step: Float[Array, " d"]
    fall: Float[Array, ""]


def _sketch(entries: int, size: int | None) -> Callable[[Array], Array]:
    """Returns the function that sums a vector's entries with random signs into `size` sums.

    It returns the vector itself where that is no longer than `size`, or where `size` is None.
    """
    if size is None or size >= entries:
        return lambda vector: vector
    terms = -(-entries // size)

    def sketch_fn(vector: Float[Array, " entries"]) -> Float[Array, " size"]:
        # Which entries are summed with which signs is public, and the same in every step. No user draws data from this
        # key by chance.
        key_order, key_sign = jax.random.split(jax.random.key(int.from_bytes(b"sket")))
        signed = jax.random.rademacher(key_sign, (entries,), vector.dtype) * vector
        shuffled = signed[jax.random.permutation(key_order, entries)]
        return jnp.sum(jnp.pad(shuffled, (0, terms * size - entries)).reshape(terms, size), 0)

    return sketch_fn
