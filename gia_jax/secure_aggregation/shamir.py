"""Sharing a 32-byte secret: Shamir, How to Share a Secret, CACM 1979, over the prime field of 2^256 + 297.

Any `threshold` shares give the secret, fewer say nothing of it. Client u holds the value at the point u + 1.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

from gia_jax.secure_aggregation.primitives import RandomBytes

PRIME = 2**256 + 297
SHARE = 33


def share(random: RandomBytes, secret: bytes, threshold: int, clients: Iterable[int]) -> dict[int, bytes]:
    """One share of 33 bytes for every client.

    Args:
        random: Source of the polynomial's coefficients.
        secret: 32 bytes.
        threshold: Shares that give the secret.
        clients: Their numbers, from 0.
    """
    coefficients = [int.from_bytes(secret, "little"), *(_below(random, PRIME) for _ in range(threshold - 1))]
    return {client: evaluate(coefficients, client + 1, PRIME).to_bytes(SHARE, "little") for client in clients}


def evaluate(coefficients: Sequence[int], point: int, prime: int) -> int:
    """The polynomial of these coefficients, the constant first, at `point`, modulo `prime`."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % prime
    return value


@functools.lru_cache
def weights_at_zero(points: tuple[int, ...], prime: int) -> list[int]:
    """Lagrange's weights: the value at 0 of the polynomial through values at `points` is their sum with these."""
    weights = []
    for point in points:
        others = [other for other in points if other != point]
        below = math.prod(other - point for other in others)
        weights.append(math.prod(others) * pow(below, -1, prime) % prime)
    return weights


def recombine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the first `threshold` of the shares by client.

    Raises:
        ValueError: Too few shares, or shares that are not of one 32-byte secret. Most wrong shares give a wrong secret
            instead: compare it with a commitment.
    """
    if len(shares) < threshold:
        raise ValueError(f"shares must be at least {threshold}, got {len(shares)}")
    if any(len(own) != SHARE for own in shares.values()):
        raise ValueError(f"shares must be of {SHARE} bytes, got others")
    clients = sorted(shares)[:threshold]
    weights = weights_at_zero(tuple(client + 1 for client in clients), PRIME)
    values = (int.from_bytes(shares[client], "little") for client in clients)
    secret = sum(value * weight for value, weight in zip(values, weights)) % PRIME
    if secret >= 2**256:
        raise ValueError("shares must be of a secret of 32 bytes, got others")
    return secret.to_bytes(32, "little")


def _below(random: RandomBytes, bound: int) -> int:
    """A uniform integer below `bound`, by rejection."""
    bits = bound.bit_length()
    while True:
        value = int.from_bytes(random((bits + 7) // 8), "little") & ((1 << bits) - 1)
        if value < bound:
            return value
