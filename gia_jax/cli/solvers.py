"""The solvers that the command line knows by name: how the steps of an attack are done."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from gia_jax.base import Attack
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.matching.second_order import NUM_STARTS, NUM_WARM_UP_STEPS, second_order

BuildFn = Callable[..., Attack]  # `(optimizer, init_fn=None) -> attack`


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
        f"Levenberg-Marquardt (float64) from the best of {NUM_STARTS} near-grey starts, after {NUM_WARM_UP_STEPS} "
        "bounded steps of L-BFGS",
        second_order,
    ),
}
BY_GRADIENT = ("paper", "adam", "fixed_step_lbfgs")  # they take the gradient as it is given, and evaluate no loss
FIRST_ORDER = tuple(name for name in SOLVERS if name != "levenberg_marquardt")
