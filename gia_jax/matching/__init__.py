"""The parts of an iterative attack: objectives, priors, initialisations, optimisers, and what runs them."""

from gia_jax.matching import adaptive, graph_priors, group, initializations, objectives, optimizers, priors
from gia_jax.matching.coarse_to_fine import coarse_to_fine
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt
from gia_jax.matching.path import keep_path, path_steps
from gia_jax.matching.run import advance, best_of, choose, continued, keep_best, restarts, run
from gia_jax.matching.second_order import second_order
from gia_jax.matching.solver import box, gradient_matching

__all__ = [
    "adaptive",
    "advance",
    "best_of",
    "box",
    "choose",
    "coarse_to_fine",
    "continued",
    "gradient_matching",
    "graph_priors",
    "group",
    "initializations",
    "keep_best",
    "keep_path",
    "levenberg_marquardt",
    "objectives",
    "optimizers",
    "path_steps",
    "priors",
    "restarts",
    "run",
    "second_order",
]
