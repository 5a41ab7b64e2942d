"""What the tests share."""

import gc
import os
from collections.abc import Iterator

# Thousands of small programs run once each, so compiling them is the cost. Optimise little, and emit each fusion by the
# older of XLA's two emitters, which compiles a program in a third of the time. Set before JAX starts.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",  # the other core has tests of its own
    )
).strip()

import jax
import jaxtyping
import pytest

# Traces and programs are millions of objects that live long: Python need not look through them for garbage so often.
gc.set_threshold(50_000, 20, 50)


LONGEST = ("test_notebooks.py", "test_cli.py", "test_readme.py")  # files that take minutes, with few tests


def pytest_configure(config: pytest.Config) -> None:
    """Let processes take files in the order of the tests, and not those with the most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: at the end one process would wait for the other."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Let Python never look again through what the imports made."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the type checker away, as it is for users: the library's own messages are left."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
