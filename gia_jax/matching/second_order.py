"""The second-order solver from start to end: first-order starts, and Levenberg-Marquardt from the best of them.

A step of Levenberg-Marquardt costs far more than one of L-BFGS, and is exact only near the solution. So several starts
go ahead by L-BFGS, and it goes on from the one that explains the update best. The steps of L-BFGS are bounded: the
first ones may otherwise lead, from every start, to where the network's sigmoids saturate, and no method comes back.
"""

from collections.abc import Callable

import optax

from gia_jax.base import Attack, InitFn
from gia_jax.matching.initializations import near_grey
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.matching.run import continued, keep_best

NUM_STARTS, NUM_WARM_UP_STEPS = 8, 300
MAX_STEP = 0.05  # root mean square of a step of the warm-up: data that are normalised have about 1
NUM_STEPS = 40  # of Levenberg-Marquardt, at most: it ends by itself


def second_order(
    build_fn: Callable[..., Attack],
    *,
    num_starts: int = NUM_STARTS,
    num_warm_up_steps: int = NUM_WARM_UP_STEPS,
    init_fn: InitFn | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Builds an attack that warms up by L-BFGS from several starts, and goes on by Levenberg-Marquardt from the best.

    The starts run side by side under one `jax.vmap`. The best of them is the one of the lowest loss, which is the
    attacker's own. Use float64 (`jax.enable_x64`): in float32 it ends near 60 dB.

    Args:
        build_fn: Function `(*, optimizer, init_fn) -> attack` that builds a gradient-matching attack, such as
            `functools.partial(gradient_matching, client_fn)`.
        num_starts: Number of independent starts, at least 1.
        num_warm_up_steps: Number of steps of L-BFGS from each start, at least 1. No step has a root mean square above
            0.05 in the units of the unknowns.
        init_fn: Function `(key, observation) -> unknowns` that draws a start. By default it is `near_grey()`. To go on
            from where another attack has ended, start from its result, by `initializations.given`.
        optimizer: Solver that goes on from the best start. By default it is `levenberg_marquardt()`.

    Returns:
        The attack. Its steps are those of the solver: 40 are enough, for they cost next to nothing once its search has
        ended. For another search, from other starts, use restarts.

    Raises:
        ValueError: If a number is no positive integer.

    Examples:
        A network with two layers of sigmoids gives a record of three numbers away exactly:

        >>> import functools, jax, jax.numpy as jnp
        >>> from gia_jax import Batch, clients, gradient_matching, matching, observed, solve
        >>> def apply_fn(params, inputs):
        ...     return jax.nn.sigmoid(jax.nn.sigmoid(inputs @ params["first"]) @ params["second"])
        >>> with jax.enable_x64(True):
        ...     keys = jax.random.split(jax.random.key(0), 2)
        ...     params = {"first": jax.random.normal(keys[0], (3, 8)), "second": jax.random.normal(keys[1], (8, 4))}
        ...     client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        ...     update = client_fn(params, Batch(jnp.array([[0.5, -1.0, 0.25]]), jnp.array([2])))
        ...     seen = observed(params, update, inputs_like=jnp.zeros((1, 3)), labels=jnp.array([2]))
        ...     build_fn = functools.partial(gradient_matching, client_fn)
        ...     attack = matching.second_order(build_fn, num_starts=2, num_warm_up_steps=5)
        ...     found = jax.jit(solve(attack, num_steps=10))(jax.random.key(1), seen)
        >>> [f"{number:.6f}" for number in found.batch.inputs[0].tolist()]
        ['0.500000', '-1.000000', '0.250000']
    """
    init_fn = near_grey() if init_fn is None else init_fn
    bounded = optax.chain(fixed_step_lbfgs(), optax.clip_by_block_rms(MAX_STEP))
    first = keep_best(build_fn(optimizer=bounded, init_fn=init_fn))
    second = build_fn(optimizer=levenberg_marquardt() if optimizer is None else optimizer, init_fn=init_fn)
    return continued(first, second, num_steps=num_warm_up_steps, num_starts=num_starts)
