"""The solvers that the command line knows by name: how the steps of an attack are done."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from gia_jax.base import Attack, InitFn
from gia_jax.matching.initializations import near_grey
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.matching.run import continued, keep_best

BuildFn = Callable[..., Attack]  # `(optimizer, init_fn=None) -> attack`

# L-BFGS with fixed steps gets stuck from some starts, and Levenberg-Marquardt then does too. That shows in the first
# steps: after `SCREENING` steps the best start goes on alone.
WARM_UP_STARTS, SCREENING = 8, 300
WARM_UP = 1_500
LEVENBERG_MARQUARDT_STEPS = 20


def warm_up(build_fn: Callable[[optax.GradientTransformation, InitFn], Attack]) -> Attack:
    """Builds the attack before Levenberg-Marquardt: fixed steps of L-BFGS from the best of several near-grey starts.

    Args:
        build_fn: Function `(optimizer, init_fn) -> attack` that builds a gradient-matching attack.

    Returns:
        The attack, with the starts as its warm-up.
    """
    one = build_fn(fixed_step_lbfgs(), near_grey())
    return keep_best(continued(keep_best(one), one, num_steps=SCREENING, num_starts=WARM_UP_STARTS))


class Solver(NamedTuple):
    """What the command line says of a solver, and how it solves.

    Attributes:
        summary: One line on the solver.
        solve: Function that builds the attack, given a function `(optimizer, init_fn=None) -> attack`.
    """

    summary: str
    solve: Callable[[BuildFn], Attack]


SOLVERS = {
    "paper": Solver("what the attack's paper uses", lambda build: build(None)),
    "adam": Solver("Adam, 0.1 a step", lambda build: build(optax.adam(0.1))),
    "fixed_step_lbfgs": Solver("L-BFGS with fixed steps of 1, as in DLG", lambda build: build(fixed_step_lbfgs())),
    "lbfgs": Solver("L-BFGS with a zoom line search (optax)", lambda build: build(optax.lbfgs(memory_size=100))),
    "levenberg_marquardt": Solver(
        "1,500 fixed steps of L-BFGS from the best of 8 near-grey starts, then Levenberg-Marquardt (float64)",
        lambda build: continued(warm_up(build), build(levenberg_marquardt()), num_steps=WARM_UP),
    ),
}
BY_GRADIENT = ("paper", "adam", "fixed_step_lbfgs")  # they take the gradient as it is given, and evaluate no loss
FIRST_ORDER = tuple(name for name in SOLVERS if name != "levenberg_marquardt")
