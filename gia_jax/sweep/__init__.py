"""Runs attacks on many victims, with many restarts and settings, as one compiled program on one or several devices."""

from gia_jax.sweep.devices import map_sharded
from gia_jax.sweep.grid import Sweep, grid, sweep
from gia_jax.sweep.memory import lanes_within
from gia_jax.sweep.results import open_sweep, stored_sweep
from gia_jax.sweep.scores import best_restart, score_sweep
from gia_jax.sweep.search import Halving, log_uniform, successive_halving
from gia_jax.sweep.study import Sign, Study, Timing, study, study_analytic, study_on_host

__all__ = [
    "Halving",
    "Sign",
    "Study",
    "Sweep",
    "Timing",
    "best_restart",
    "grid",
    "lanes_within",
    "log_uniform",
    "map_sharded",
    "open_sweep",
    "score_sweep",
    "stored_sweep",
    "study",
    "study_analytic",
    "study_on_host",
    "successive_halving",
    "sweep",
]
