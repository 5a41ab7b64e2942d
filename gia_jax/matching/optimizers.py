"""Optimisers of the dummy data, beside those of optax: any `optax.GradientTransformation` serves.

The matching step passes each of them `key`, `value`, `grad`, `value_fn` and `residual_fn` as extra arguments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Scalar
from gia_jax.matching.objectives import inverse_root
from gia_jax.precision import cast_like, widened_tree


def step_schedule(learning_rate: Scalar, num_steps: int) -> optax.Schedule:
    """Builds the learning rate of Inverting Gradients, which falls tenfold three times
    (Geiping et al., NeurIPS 2020, code).

    Args:
        learning_rate: First learning rate, positive and finite. It is multiplied by 0.1 after 3/8, 5/8 and 7/8 of the
            steps.
        num_steps: Number of steps of the attack, at least 1.

    Returns:
        The schedule, a function `(step) -> learning rate`.

    Raises:
        ValueError: If `learning_rate` is not positive and finite, or `num_steps` is not a positive integer.

    Examples:
        >>> from gia_jax.matching import optimizers
        >>> schedule = optimizers.step_schedule(0.1, 1000)
        >>> print([f"{float(schedule(step)):.4f}" for step in (0, 400, 700, 900)])
        ['0.1000', '0.0100', '0.0010', '0.0001']
    """
    _check.positive(learning_rate=learning_rate)
    _check.finite("learning_rate", learning_rate)
    _check.integer(num_steps=num_steps)
    drops = {int(num_steps // 2.667): 0.1, int(num_steps // 1.6): 0.1, int(num_steps // 1.142): 0.1}
    return optax.piecewise_constant_schedule(learning_rate, drops)


def soft_sign(num_steps: int) -> optax.GradientTransformation:
    """Builds signs that soften: at step t gradients become tanh(s g) / s with s = 1 - t / num_steps
    (Geiping's `breaching`, 2022).

    `optax.scale_by_sign` is the hard sign.

    Args:
        num_steps: Number of steps of the attack, from 1 to 2^31 - 1. s is never less than 1 / num_steps.

    Returns:
        The transformation, to be followed by one that scales by the learning rate.

    Raises:
        ValueError: If `num_steps` is not an integer in its range.

    Examples:
        A large gradient is cut to 1 in the first of two steps, and to 2 in the second:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import optimizers
        >>> transformation = optimizers.soft_sign(2)
        >>> gradient = jnp.array([-100.0, 100.0])
        >>> state = transformation.init(gradient)
        >>> first, state = transformation.update(gradient, state)
        >>> second, state = transformation.update(gradient, state)
        >>> print(first.round(2).tolist(), second.round(2).tolist())
        [-1.0, 1.0] [-2.0, 2.0]
    """
    _check.integer(1, 2**31 - 1, num_steps=num_steps)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        slope = jnp.maximum(1 - state / num_steps, 1 / num_steps)
        wide = widened_tree(updates)
        soft = jax.tree.map(lambda g: jnp.tanh(g * slope.astype(g.dtype)) / slope.astype(g.dtype), wide)
        return cast_like(soft, updates), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update_fn)


def langevin_noise(scale: float | optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Adds scale * N(0, I) to the update: last in a chain it is noise on the pixels, first it is noise on the gradient.

    The noise comes from the attack's own key of each step, so restarts under `vmap` draw different noise. Two of these
    transformations in one chain draw the same noise.

    Args:
        scale: Standard deviation of the noise, at least 0 and finite, or a schedule `(step) -> scale` of it.

    Returns:
        The transformation. Its update needs the extra argument `key`, which the matching step passes.

    Raises:
        ValueError: If `scale` is a number that is negative or not finite.

    Examples:
        Two keys draw different noise:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import optimizers
        >>> transformation = optimizers.langevin_noise(0.1)
        >>> update = jnp.zeros(3)
        >>> state = transformation.init(update)
        >>> noisy = [transformation.update(update, state, key=jax.random.key(seed))[0] for seed in (0, 1)]
        >>> bool((noisy[0] != noisy[1]).all())
        True
    """
    if not callable(scale):
        _check.not_negative(scale=scale)
        _check.finite("scale", scale)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params
        key: PRNGKeyArray = extra_args["key"]
        current = scale(state) if callable(scale) else scale
        wide = widened_tree(updates)
        noise = optax.tree.random_like(key, wide, jax.random.normal)
        return cast_like(optax.tree.add_scale(wide, current, noise), updates), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update_fn)


def gradient_regularization(share: Scalar, *, radius: Scalar) -> optax.GradientTransformationExtraArgs:
    """Adds the norm of the loss's own gradient to the loss, by a second gradient a little further uphill:

        g <- (1 - beta) grad L(x) + beta grad L(x + r grad L(x) / |grad L(x)|)

    It is the gradient of L + beta r |grad L|, without third derivatives: exactly for a quadratic L, and otherwise up to
    terms that vanish with the radius (Zhao, Zhang, Hu, Penalizing Gradient Norm for Efficiently Improving
    Generalization, ICML 2022, equation 8). A step costs two gradients.

    Args:
        share: Share beta of the second gradient, in [0, 1].
        radius: Distance r to where it is taken, in units of the unknowns, above 0 and finite.

    Returns:
        The transformation, to be followed by an optimiser. Its update needs the unknowns and the extra argument
        `value_fn`, which the matching step passes.

    Raises:
        ValueError: If `share` is not in [0, 1], or `radius` is not positive and finite.

    Examples:
        The gradient of x^2 / 2 + 0.5 |x| at 3 is 3.5:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import optimizers
        >>> transformation = optimizers.gradient_regularization(0.5, radius=1.0)
        >>> x, value_fn = jnp.array(3.0), lambda x: x**2 / 2
        >>> update, _ = transformation.update(x, transformation.init(x), x, value_fn=value_fn)
        >>> print(f"{update:.2f}")
        3.50
    """
    _check.share(share=share)
    _check.scalar(radius=radius)
    _check.positive(radius=radius)
    _check.finite("radius", radius)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        wide = widened_tree(updates)
        scale = radius * inverse_root(jnp.asarray(optax.tree.norm(wide, squared=True)))
        ahead = cast_like(optax.tree.add_scale(widened_tree(params), scale, wide), params)
        further = widened_tree(jax.grad(extra_args["value_fn"])(ahead))
        mixed = jax.tree.map(lambda near, far: near + share * (far - near), wide, further)
        return cast_like(mixed, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


class FixedStepLBFGSState(NamedTuple):
    """The state of `fixed_step_lbfgs`: ring buffers of past differences, with their inner products.

    Attributes:
        count: Number of updates done.
        pairs: Number of pairs of differences kept so far, those that were overwritten included.
        params: Last iterate, as one flat vector.
        grad: Gradient at the last iterate.
        s: Differences of successive iterates, one a row.
        y: Differences of successive gradients, one a row.
        s_dot_y: Inner products of the rows of s with the rows of y.
        y_dot_y: Inner products of the rows of y with each other.
        scale: Factor of the identity from which the inverse Hessian is built.
    """

    count: Int[Array, ""]
    pairs: Int[Array, ""]
    params: Float[Array, " n"]
    grad: Float[Array, " n"]
    s: Float[Array, "m n"]
    y: Float[Array, "m n"]
    s_dot_y: Float[Array, "m m"]
    y_dot_y: Float[Array, "m m"]
    scale: Float[Array, ""]


def fixed_step_lbfgs(*, learning_rate: Scalar = 1.0, memory_size: int = 100) -> optax.GradientTransformation:
    """Builds L-BFGS without a line search, as `torch.optim.LBFGS` does it and DLG uses it.

    A pair of differences (s of iterates, y of gradients) is kept only where its curvature s.y is above 1e-10. The first
    step is the gradient g times the learning rate and min(1, 1 / ||g||_1). One update is one inner iteration of torch,
    whose `.step` does up to 20 and then stops early. `optax.lbfgs` is the alternative with a line search, which keeps
    every pair.

    The product of the inverse Hessian with the gradient is computed in its compact form (Byrd, Nocedal, Schnabel,
    Representations of quasi-Newton matrices, Mathematical Programming 1994, equation 2.13): four matrix products and
    two triangular solves, where the usual recursion is a chain of 2 m inner products.

    Args:
        learning_rate: Length of a step in units of the quasi-Newton step, positive and finite.
        memory_size: Number m of pairs that are kept, at least 1.

    Returns:
        The optimiser. It works on one flat vector, whatever the tree, in float32 or wider. Its `init` raises ValueError
        where `memory_size` pairs do not fit into memory.

    Raises:
        ValueError: If `learning_rate` is not positive and finite, or `memory_size` is not a positive integer.

    Examples:
        After one step the curvature of (x - 3)^2 is known, and the second step ends in the minimum:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from gia_jax.matching import optimizers
        >>> optimizer = optimizers.fixed_step_lbfgs(memory_size=2)
        >>> x = jnp.array([0.0])
        >>> state = optimizer.init(x)
        >>> update_fn = jax.jit(optimizer.update)
        >>> for _ in range(2):
        ...     updates, state = update_fn(2 * (x - 3), state, x)
        ...     x = optax.apply_updates(x, updates)
        ...     print(f"{x[0]:.2f}")
        1.00
        3.00
    """
    _check.positive(learning_rate=learning_rate)
    _check.finite("learning_rate", learning_rate)
    _check.integer(memory_size=memory_size)

    def init_fn(params: Any) -> FixedStepLBFGSState:
        flat, _ = ravel_pytree(widened_tree(params))
        _check.fits(2 * memory_size * (memory_size + flat.size), memory_size=memory_size)
        none, zero, one = jnp.zeros((), jnp.int32), jnp.zeros_like(flat), jnp.ones((), flat.dtype)
        rows = jnp.zeros((memory_size, flat.size), flat.dtype)
        products = jnp.zeros((memory_size, memory_size), flat.dtype)
        return FixedStepLBFGSState(none, none, zero, zero, rows, rows, products, products, one)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        (grad, unravel), (flat, _) = ravel_pytree(widened_tree(updates)), ravel_pytree(widened_tree(params))
        step, change = flat - state.params, grad - state.grad
        curvature = jnp.vdot(step, change)
        keep = (state.count > 0) & (curvature > 1e-10)
        slot = state.pairs % memory_size

        def put(buffer: Array, row: Array) -> Array:
            return buffer.at[slot].set(jnp.where(keep, row, buffer[slot]))

        s, y = put(state.s, step), put(state.y, change)
        s_with = s @ jnp.stack([grad, change], 1)
        y_with = y @ jnp.stack([grad, change, step], 1)
        s_dot_y = put(put(state.s_dot_y, y_with[:, 2]).T, s_with[:, 1]).T
        y_dot_y = put(put(state.y_dot_y, y_with[:, 1]).T, y_with[:, 1]).T
        pairs = state.pairs + keep
        scale = jnp.where(keep, curvature / jnp.vdot(change, change), state.scale)

        # The oldest pair comes first. Slots that are still empty come before it and are made to do nothing.
        order = (pairs + jnp.arange(memory_size)) % memory_size
        live = jnp.arange(memory_size) >= memory_size - pairs
        upper = jnp.where(live, jnp.triu(s_dot_y[order][:, order]), 0)
        upper = upper + jnp.diag(jnp.where(live, 0, 1).astype(grad.dtype))
        s_grad, y_grad = s_with[order, 0], y_with[order, 0]
        u = jax.scipy.linalg.solve_triangular(upper, s_grad)
        v = jnp.where(live, jnp.diag(upper), 0) * u + scale * (y_dot_y[order][:, order] @ u - y_grad)
        w = jax.scipy.linalg.solve_triangular(upper, v, trans=1)
        back = jnp.argsort(order)
        direction = scale * (grad - u[back] @ y) + w[back] @ s

        first = jnp.minimum(1, 1 / jnp.sum(jnp.abs(grad)))
        length = learning_rate * jnp.where(state.count == 0, first, 1)
        new_state = FixedStepLBFGSState(state.count + 1, pairs, flat, grad, s, y, s_dot_y, y_dot_y, scale)
        return cast_like(unravel(-length * direction), updates), new_state

    return optax.GradientTransformation(init_fn, update_fn)
