"""How many lanes fit into a stated budget of memory, measured on the program that runs them."""

import jax
from jaxtyping import PyTree

from gia_jax import _check
from gia_jax.base import Attack, Observation
from gia_jax.sweep.lanes import SHARED_PARAMS, finite_victims, over_lanes, victim_keys

MEASURED = 2  # lanes of the program that is measured: what all lanes share counts less, the more there are


def lanes_within(attack: Attack, observations: Observation, *, memory: int, most: int = 16) -> int:
    """Finds the number of lanes that fit into memory, for the argument `lanes` of `study` and `sweep`.

    It compiles one step of the attack for two lanes, which takes as long as compiling the attack, and reads what the
    program needs. What the lanes share, such as the parameters, counts as if each lane had its own share of it, so
    that the number is on the safe side. The data on the host are not counted.

    Args:
        attack: Attack to be run.
        observations: Observations of v victims, stacked by `gia_jax.stack`.
        memory: Budget in bytes, such as `4 * 2**30`, at least 1.
        most: Largest number of lanes that is of use, at least 1. On a processor more than 16 are seldom faster.

    Returns:
        The number of lanes, from 1 to `most`.

    Raises:
        ValueError: If a number is no positive integer, no victim has a finite observation, JAX does not know the memory
            of programs for this device, or not even one lane fits into the budget. Where its parameters, update and
            state alone are too large, that is found before compiling.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Observation, gradient_matching
        >>> from gia_jax.sweep import lanes_within
        >>> def client_fn(params, batch):
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, updates = {"kernel": jnp.ones(2)}, {"kernel": jnp.array([[0.5, -1.0]])}
        >>> extra = {"inputs_like": jnp.zeros((1, 1, 2)), "labels": jnp.array([[0]])}
        >>> lanes_within(gradient_matching(client_fn), Observation(params, updates, extra), memory=2**20)
        16
    """
    _check.integer(memory=memory, most=most)
    _check.outside_of_jit("lanes_within", observations)
    finite_victims(observations)
    key = victim_keys(jax.random.key(0), 1, 1)[0, 0]
    one = jax.tree.map(lambda leaf: leaf[0], observations._replace(params=()))._replace(params=observations.params)
    state = jax.eval_shape(attack.init, key, one)
    least = _bytes((one, state))
    if least > memory:
        raise ValueError(f"memory must be at least {least:,} bytes for the data of one lane, got {memory:,}")

    def needed(lanes: int) -> int:
        def many(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((lanes, *leaf.shape), leaf.dtype), tree)

        seen = many(one._replace(params=()))._replace(params=one.params)
        step = jax.jit(over_lanes(attack.step, (0, 0, SHARED_PARAMS), lanes))
        found = step.lower(many(key), many(state), seen).compile().memory_analysis()
        if found is None:
            raise ValueError(f"the memory of a program is not known on {jax.default_backend()}: give lanes as a number")
        return found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes

    if most > 1 and (lanes := memory * MEASURED // needed(MEASURED)) > 1:
        return min(most, lanes)
    of_one = needed(1)
    if of_one > memory:
        raise ValueError(f"memory must be at least {of_one:,} bytes, which one lane needs, got {memory:,}")
    return 1


def _bytes(tree: PyTree) -> int:
    """Counts the bytes of all arrays, or of what arrays of such shapes have."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
