"""Protocols by the names of the command line, with room for a third of the clients to drop out or more."""

from collections.abc import Callable
from functools import partial

from gia_jax.secure_aggregation.fastsecagg import fastsecagg, fft_sharing
from gia_jax.secure_aggregation.homomorphic import homomorphic
from gia_jax.secure_aggregation.lightsecagg import lightsecagg
from gia_jax.secure_aggregation.plain import plain_sum
from gia_jax.secure_aggregation.protocol import AggregationProtocol
from gia_jax.secure_aggregation.secagg import secagg


def make_protocol(name: str, num_clients: int, *, clip: float, bits: int = 22) -> AggregationProtocol:
    """A protocol by its name.

    Args:
        name: "plain", "secagg", "lightsecagg", "fastsecagg", "bfv" or "ckks".
        num_clients: N >= 1. SecAgg needs answers of more than two thirds of them, LightSecAgg of more than half, where
            up to a quarter may collude; FastSecAgg bears that a quarter drops out and nearly half collude.
        clip: Largest magnitude of an entry.
        bits: Bits an entry.

    Returns:
        The protocol.

    Raises:
        ValueError: An unknown name, and what its protocol raises.
        ImportError: BFV or CKKS without the extra `he`.
    """
    quarter = num_clients // 4
    protocols: dict[str, Callable[..., AggregationProtocol]] = {
        "plain": partial(plain_sum, num_clients),
        "secagg": partial(secagg, num_clients, threshold=2 * num_clients // 3 + 1),
        "lightsecagg": partial(lightsecagg, num_clients, privacy=quarter, survivors=num_clients // 2 + 1),
        "fastsecagg": lambda **options: fastsecagg(
            fft_sharing((1, num_clients), zeros=(0, quarter), secrets=(1, max(quarter, 1))), **options
        ),
        "bfv": partial(homomorphic, num_clients, "bfv"),
        "ckks": partial(homomorphic, num_clients, "ckks"),
    }
    if name not in protocols:
        raise ValueError(f"name must be one of {', '.join(protocols)}, got {name!r}")
    return protocols[name](clip=clip, bits=bits)
