"""The number of lanes that fit into a budget."""

import jax
import jax.numpy as jnp
import pytest

from gia_jax import Observation, gradient_matching
from gia_jax.sweep import lanes_within

PIXELS = 2**10


def client_fn(params, batch):
    """A client with an intermediate of a thousand times the size of its image."""
    wide = jnp.tanh(batch.inputs[0][:, None] * params["kernel"])
    return {"kernel": wide.mean(0)}


def seen() -> Observation:
    params = {"kernel": jnp.linspace(0.0, 1.0, PIXELS)}
    extra = {"inputs_like": jnp.zeros((3, 1, PIXELS)), "labels": jnp.zeros((3, 1), jnp.int32)}
    return Observation(params, {"kernel": jnp.ones((3, PIXELS))}, extra)


def test_a_larger_budget_has_more_lanes_up_to_the_most() -> None:
    attack = gradient_matching(client_fn)
    found = [lanes_within(attack, seen(), memory=2**power, most=64) for power in (24, 26, 30)]
    assert 1 <= found[0] < found[1] <= found[2] == 64
    # A lane has at least its intermediate of 4 MiB.
    assert found[1] <= 2**26 / (4 * PIXELS**2)


def test_a_budget_that_no_lane_fits_into_is_refused_before_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(jax, "jit", refuse)
    with pytest.raises(ValueError, match=r"memory must be at least [\d,]+ bytes for the data of one lane, got 1,000"):
        lanes_within(gradient_matching(client_fn), seen(), memory=1_000)


def test_a_budget_below_what_the_program_needs_is_refused_with_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"memory must be at least [\d,]+ bytes, which one lane needs, got 100,000"):
        lanes_within(gradient_matching(client_fn), seen(), memory=100_000)
    with pytest.raises(ValueError, match="memory must be an integer of at least 1, got 0"):
        lanes_within(gradient_matching(client_fn), seen(), memory=0)
