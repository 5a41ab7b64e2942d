"""Computes convolutions such that second-order gradients run fast inside `lax.scan` and under `jax.vmap`."""

from gia_jax.lowering.lowered import lowered
from gia_jax.lowering.rewrite import Lowering, lower, lowers_to_matmul

__all__ = ["Lowering", "lower", "lowered", "lowers_to_matmul"]
