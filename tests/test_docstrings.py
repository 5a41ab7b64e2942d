"""The examples in the docstrings run, and print what they say."""

import doctest
import importlib
import inspect
import pkgutil
from collections import Counter

import pytest

import gia_jax
from gia_jax import attacks, defenses

MODULES = sorted(
    found.name for found in pkgutil.walk_packages(gia_jax.__path__, "gia_jax.") if not found.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_name_at_the_root_is_documented_with_an_example() -> None:
    missing, seen = Counter(), 0
    for name in gia_jax.__all__:
        member = getattr(gia_jax, name)
        if inspect.ismodule(member):
            assert member.__doc__
        elif getattr(member, "__module__", "").startswith("gia_jax"):  # not so the aliases of types
            missing[name], seen = ">>>" not in (member.__doc__ or ""), seen + 1
    assert seen > 20
    assert not +missing


@pytest.mark.parametrize("package", [attacks, defenses])
def test_every_attack_and_every_defense_has_an_example(package: object) -> None:
    missing = Counter()
    for name in package.__all__:
        member = getattr(package, name)
        if callable(member) and member.__module__.startswith(package.__name__) and not isinstance(member, type):
            missing[name] = ">>>" not in (member.__doc__ or "")
    assert len(missing) > 5
    assert not +missing
