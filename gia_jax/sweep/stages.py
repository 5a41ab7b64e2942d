"""The stages of a run, which are its warm-ups and the attack's own steps, and the programs that do them."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax._compile import RUN_ONCE
from gia_jax.base import Attack, AttackState, WarmUp
from gia_jax.sweep.devices import on_devices, placed
from gia_jax.sweep.lanes import OF_LANE, Lanes, over_lanes

MAX_STEPS_PER_CALL = 4_096


def over_settings(make_attack: Callable[[Any], Attack], example: PyTree[Any]) -> Attack:
    """Turns a function from settings to attacks into a single attack that receives a setting with the observation.

    Args:
        make_attack: Function `setting -> attack`, whose attacks differ in numbers alone.
        example: One of the settings.

    Returns:
        The attack. In place of an observation its functions receive a pair of a setting and an observation.
    """
    known = make_attack(example)

    def part(name: str) -> Callable[..., Any]:
        return lambda *args: getattr(make_attack(args[-1][0]), name)(*args[:-1], args[-1][1])

    def warm_up_of(setting: PyTree[Any]) -> WarmUp:
        warm_up = make_attack(setting).warm_up
        assert warm_up is not None
        return warm_up

    def hand_over(key: PRNGKeyArray, state: Any, pair: Any) -> AttackState:
        return warm_up_of(pair[0]).hand_over(key, state, pair[1])

    warm_up = None
    if known.warm_up is not None:
        before = over_settings(lambda setting: warm_up_of(setting).attack, example)
        warm_up = WarmUp(before, known.warm_up.num_steps, hand_over)
    return Attack(part("init"), part("step"), part("finalize"), warm_up, known.num_steps)


class Stage(NamedTuple):
    """A part of a run: a warm-up of the attack, or the attack's own steps, which come last.

    Attributes:
        start: Function `(key, state, observation) -> state` from the key of the lane and the last state of the stage
            before to the first state of this one. The first stage does not read the state that it is given.
        attack: Attack whose steps these are.
        num_steps: Number of steps.
        steps_key: Function from the key of the lane to the key of these steps.
    """

    start: Callable[[PRNGKeyArray, Any, Any], AttackState]
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

        def start(key: PRNGKeyArray, state: Any, observation: Any) -> AttackState:
            return warm_up.hand_over(part(2)(key), state, observation)

        before = stages(warm_up.attack, warm_up.num_steps, part(0), part(1))
        return [*before, Stage(start, attack, num_steps, steps_key)]

    return stages(attack, num_steps, lambda key: jax.random.split(key)[0], lambda key: jax.random.split(key)[1])


def programs_of(
    stages: list[Stage], attack: Attack, lanes: Lanes, mesh: Mesh | None
) -> tuple[list[Any], list[Any], Any]:
    """Lowers the programs of a run, and returns them with the shapes of the states of its stages and of its result.

    There are two programs for each stage, which start it and do its steps, and a last one that ends the run.

    Args:
        stages: Stages of the run.
        attack: Attack, whose reconstruction ends the run.
        lanes: Lanes of the run.
        mesh: Mesh over whose devices the lanes are spread, or None for a single device.

    Returns:
        The programs in the order in which they are called, the shapes of the states of the stages, and those of the
        reconstructions.
    """

    def mapped(fn: Callable[..., Any], *in_axes: Any) -> Any:
        fn_of_all = over_lanes(fn, in_axes, lanes.size, mesh)
        return jax.jit(fn_of_all) if mesh is None else jax.jit(fn_of_all, in_shardings=placed(mesh, in_axes))

    keys, example = on_devices(lanes.batch(0), mesh, (0, OF_LANE))
    count = on_devices(jnp.asarray(0), mesh, None)
    programs, states, state = [], [], None
    for number, stage in enumerate(stages):
        if number == 0:

            def first_fn(key: PRNGKeyArray, observation: Any, stage: Stage = stage) -> AttackState:
                return stage.start(key, None, observation)

            start, arguments = mapped(first_fn, 0, OF_LANE), (keys, example)
        else:
            start, arguments = mapped(stage.start, 0, 0, OF_LANE), (keys, state, example)
        state = jax.eval_shape(start, *arguments)
        states.append(state)
        step = mapped(_steps_fn(stage), 0, 0, OF_LANE, None, None)
        programs += [start.lower(*arguments), step.lower(keys, state, example, count, count)]
    assert state is not None
    finish = mapped(attack.finalize, 0, OF_LANE)
    programs.append(finish.lower(state.candidate, example))
    return programs, states, jax.eval_shape(finish, state.candidate, example)


def _steps_fn(stage: Stage) -> Callable[..., tuple[AttackState, Array]]:
    """Returns a function that does up to `stage.most_steps` steps, each as if it were done alone."""

    def steps_fn(
        key: PRNGKeyArray, state: AttackState, observation: Any, start: Array, count: Array
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


def fingerprint_of(texts: list[str], lanes: Lanes, settings: tuple) -> str:
    """Returns a hash of all that a result depends on. The attack and its settings are part of its programs.

    Args:
        texts: Texts of the programs that `programs_of` returns.
        lanes: Lanes of the run. Which of them this process runs makes no difference.
        settings: Other numbers that the result depends on.

    Returns:
        The hash in hexadecimal.
    """
    digest = hashlib.sha256(repr((settings, lanes.num_settings, lanes.size)).encode())
    for text in texts:
        digest.update(text.encode())
    for leaf in jax.tree.leaves((lanes.keys, lanes.settings, lanes.observations)):
        digest.update(np.asarray(jax.random.key_data(leaf) if _check.is_key(leaf) else leaf).tobytes())
    return digest.hexdigest()
