"""What the tests share."""

import os
from collections.abc import Iterator

# Hundreds of small programs run once each, compiling them is the cost: optimise little. Set before JAX starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Drop a module's compiled programs: kept for all modules, they exhaust the memory maps that a process may have."""
    yield
    jax.clear_caches()
