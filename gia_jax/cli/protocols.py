"""The aggregation protocols that the command line knows by name."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from gia_jax import _check

if TYPE_CHECKING:
    from gia_jax.secure_aggregation import AggregationProtocol

TARGETS = ("client:0", "aggregate")  # the two things that the command line attacks: one client's upload, and the sum


class Protocol(NamedTuple):
    """What the command line says of a protocol, and how it is made, with room for a quarter of the clients to drop out.

    Attributes:
        summary: One line on the protocol.
        make: Function that makes the protocol from the package `secure_aggregation`, the number of clients, and the
            options of the quantizer.
    """

    summary: str
    make: Callable[..., Any]


AGGREGATIONS = {
    "plain": Protocol("every update in the clear: the control", lambda sa, n, **options: sa.plain_sum(n, **options)),
    "secagg": Protocol(
        "pairwise masks that cancel, Bonawitz et al. 2017",
        lambda sa, n, **options: sa.secagg(n, threshold=2 * n // 3 + 1, **options),
    ),
    "lightsecagg": Protocol(
        "Lagrange-coded masks, So et al. 2022",
        lambda sa, n, **options: sa.lightsecagg(n, privacy=n // 4, survivors=n // 2 + 1, **options),
    ),
    "fastsecagg": Protocol(
        "multi-secret sharing by FFT, Kadhe et al. 2020",
        lambda sa, n, **options: sa.fastsecagg(
            sa.fft_sharing((1, n), zeros=(0, n // 4), secrets=(1, max(n // 4, 1))), **options
        ),
    ),
    "bfv": Protocol("homomorphic encryption, exact", lambda sa, n, **options: sa.homomorphic(n, "bfv", **options)),
    "ckks": Protocol(
        "homomorphic encryption, approximate", lambda sa, n, **options: sa.homomorphic(n, "ckks", **options)
    ),
}


def make_protocol(name: str, num_clients: int, *, clip: float, bits: int = 22) -> "AggregationProtocol":
    """Makes a protocol by its name.

    Args:
        name: Key of `AGGREGATIONS`.
        num_clients: Number of clients, at least 1. SecAgg needs answers of more than two thirds of them, LightSecAgg of
            more than half, where up to a quarter may collude. FastSecAgg bears that a quarter drops out and nearly half
            collude.
        clip: Largest magnitude of an entry, above 0 and finite.
        bits: Number of bits of an entry.

    Returns:
        The protocol.

    Raises:
        ValueError: If the name is unknown, or an argument is one that the protocol refuses.
        ImportError: If the extra `secure` is not installed, or for BFV and CKKS the extra `he`.
    """
    if name not in AGGREGATIONS:
        raise ValueError(f"name must be one of {', '.join(AGGREGATIONS)}, got {name!r}")
    _check.integer(num_clients=num_clients)
    from gia_jax import secure_aggregation

    return AGGREGATIONS[name].make(secure_aggregation, num_clients, clip=clip, bits=bits)
