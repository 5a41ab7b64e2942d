"""The stages of a run, which are its warm-ups and the attack's own steps, and the programs that do them."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from gia_jax import _check
from gia_jax._compile import RUN_ONCE
from gia_jax.base import Attack, AttackState, Observation
from gia_jax.sweep.lanes import SHARED_PARAMS, over_lanes

MAX_STEPS_PER_CALL = 4_096


class Stage(NamedTuple):
    """A part of a run: a warm-up of the attack, or the attack's own steps, which come last.

    Attributes:
        start: Function `(key, state, observation) -> state` from the key of the lane and the last state of the stage
            before to the first state of this one. The first stage does not read the state that it is given.
        attack: Attack whose steps these are.
        num_steps: Number of steps.
        steps_key: Function from the key of the lane to the key of these steps.
    """

    start: Callable[[PRNGKeyArray, Any, Observation], AttackState]
    attack: Attack
    num_steps: int
    steps_key: Callable[[PRNGKeyArray], PRNGKeyArray]

    @property
    def most_steps(self) -> int:
        """Largest number of steps that one call of the program does."""
        return max(1, min(self.num_steps, MAX_STEPS_PER_CALL))


def stages_of(attack: Attack, num_steps: int) -> list[Stage]:
    """Divides what `gia_jax.run` does into stages, with the same random keys.

    Args:
        attack: Attack to be run.
        num_steps: Number of its own steps.

    Returns:
        The stages in their order, warm-ups first.
    """

    def stages(attack: Attack, num_steps: int, init_key: Callable, steps_key: Callable) -> list[Stage]:
        warm_up = attack.warm_up
        if warm_up is None:
            return [Stage(lambda key, _, seen: attack.init(init_key(key), seen), attack, num_steps, steps_key)]

        def part(index: int) -> Callable[[PRNGKeyArray], PRNGKeyArray]:
            return lambda key: jax.random.split(init_key(key), 3)[index]

        def start(key: PRNGKeyArray, state: Any, observation: Observation) -> AttackState:
            return warm_up.hand_over(part(2)(key), state, observation)

        before = stages(warm_up.attack, warm_up.num_steps, part(0), part(1))
        return [*before, Stage(start, attack, num_steps, steps_key)]

    return stages(attack, num_steps, lambda key: jax.random.split(key)[0], lambda key: jax.random.split(key)[1])


def programs_of(
    stages: list[Stage], attack: Attack, lanes: int, keys: Any, example: Observation
) -> tuple[list[Any], list[Any], Any]:
    """Lowers the programs of a run, and returns them with the shapes of the states of its stages and of its result.

    There are two programs for each stage, which start it and do its steps, and a last one that ends the run.

    Args:
        stages: Stages of the run.
        attack: Attack, whose reconstruction ends the run.
        lanes: Number of lanes that run side by side.
        keys: Random keys of the lanes, shape (lanes,).
        example: Observations of the lanes.

    Returns:
        The programs in the order in which they are called, the shapes of the states of the stages, and those of the
        reconstructions.
    """
    programs, states, state = [], [], None
    for number, stage in enumerate(stages):
        if number == 0:

            def first_fn(key: PRNGKeyArray, observation: Observation, stage: Stage = stage) -> AttackState:
                return stage.start(key, None, observation)

            start, arguments = over_lanes(first_fn, (0, SHARED_PARAMS), lanes), (keys, example)
        else:
            start, arguments = over_lanes(stage.start, (0, 0, SHARED_PARAMS), lanes), (keys, state, example)
        state = jax.eval_shape(start, *arguments)
        states.append(state)
        step = over_lanes(_steps_fn(stage), (0, 0, SHARED_PARAMS, None, None), lanes)
        count = jnp.asarray(0)
        programs += [jax.jit(start).lower(*arguments), jax.jit(step).lower(keys, state, example, count, count)]
    assert state is not None
    finish = over_lanes(attack.finalize, (0, SHARED_PARAMS), lanes)
    programs.append(jax.jit(finish).lower(state.candidate, example))
    return programs, states, jax.eval_shape(finish, state.candidate, example)


def _steps_fn(stage: Stage) -> Callable[..., tuple[AttackState, Array]]:
    """Returns a function that does up to `stage.most_steps` steps, each as if it were done alone."""

    def steps_fn(
        key: PRNGKeyArray, state: AttackState, observation: Observation, start: Array, count: Array
    ) -> tuple[AttackState, Array]:
        steps_key = stage.steps_key(key)

        def body(carry: tuple[Array, AttackState, Array]) -> tuple[Array, AttackState, Array]:
            t, state, losses = carry
            state, info = stage.attack.step(jax.random.fold_in(steps_key, start + t), state, observation)
            return t + 1, state, losses.at[t].set(info.loss)

        loss = jax.eval_shape(stage.attack.step, steps_key, state, observation)[1].loss
        carry = (jnp.zeros_like(count), state, jnp.zeros(stage.most_steps, loss.dtype))
        _, state, losses = jax.lax.while_loop(lambda carry: carry[0] < count, body, carry)
        return state, losses

    return steps_fn


def compile_programs(programs: list[Any]) -> list[Any]:
    """Compiles the programs side by side, the last one without costly optimisation, for it runs only at the end.

    Args:
        programs: Programs, as `programs_of` returns them.

    Returns:
        The compiled programs in the same order.
    """
    options = [RUN_ONCE if i == len(programs) - 1 else None for i in range(len(programs))]
    pool = ThreadPoolExecutor()
    try:
        return list(pool.map(lambda program, own: program.compile(own), programs, options))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for a compiler


def fingerprint_of(programs: list[Any], keys: Key[Array, " lanes"], observations: Observation, settings: tuple) -> str:
    """Returns a hash of all that a result depends on. The attack and its settings are part of its programs.

    Args:
        programs: Programs, as `programs_of` returns them.
        keys: Random keys of all lanes.
        observations: Observations of all victims.
        settings: Other numbers that the result depends on.

    Returns:
        The hash in hexadecimal.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for program in programs:
        digest.update(program.as_text().encode())
    for leaf in jax.tree.leaves((keys, observations)):
        digest.update(np.asarray(jax.random.key_data(leaf) if _check.is_key(leaf) else leaf).tobytes())
    return digest.hexdigest()
