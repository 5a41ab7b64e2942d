"""Gradient inversion attacks in JAX: what does a shared gradient give away, and which defense stops it?"""

from gia_jax import attacks, clients, data, decoding, defenses, interop, labels, matching, metrics, modalities, models
from gia_jax.base import (
    Attack,
    AttackInfo,
    AttackState,
    Batch,
    ClientFn,
    InitFn,
    LabelFn,
    LossFn,
    ObjectiveFn,
    Observation,
    Params,
    PriorFn,
    ReconstructFn,
    Reconstruction,
    Updates,
)
from gia_jax.matching.path import keep_path
from gia_jax.matching.run import advance, choose, continued, keep_best, restarts, run, solve
from gia_jax.matching.solver import box, gradient_matching
from gia_jax.sweep.devices import map_sharded
from gia_jax.threat import ThreatModel, control, granted, granted_labels, grants, observe, observed, stack

__version__ = "0.1.0"

__all__ = [
    "Attack",
    "AttackInfo",
    "AttackState",
    "Batch",
    "ClientFn",
    "InitFn",
    "LabelFn",
    "LossFn",
    "ObjectiveFn",
    "Observation",
    "Params",
    "PriorFn",
    "ReconstructFn",
    "Reconstruction",
    "ThreatModel",
    "Updates",
    "advance",
    "attacks",
    "box",
    "choose",
    "clients",
    "continued",
    "control",
    "data",
    "decoding",
    "defenses",
    "gradient_matching",
    "granted",
    "granted_labels",
    "grants",
    "interop",
    "keep_best",
    "keep_path",
    "labels",
    "map_sharded",
    "matching",
    "metrics",
    "modalities",
    "models",
    "observe",
    "observed",
    "restarts",
    "run",
    "solve",
    "stack",
]
