"""Sharing a 32-byte secret: Shamir, How to Share a Secret, CACM 1979, over the prime field of 2^256 + 297.

Any `threshold` shares give the secret, and fewer say nothing of it. Client u holds the value at the point u + 1.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

from gia_jax.secure_aggregation.primitives import RandomBytes

PRIME = 2**256 + 297
SHARE = 33


def share(random: RandomBytes, secret: bytes, threshold: int, clients: Iterable[int]) -> dict[int, bytes]:
    """Makes one share of 33 bytes for every client.

    Args:
        random: Source of randomness of the polynomial's coefficients.
        secret: Secret, 32 bytes.
        threshold: Number of shares that give the secret, at least 1.
        clients: Numbers of the clients, from 0.

    Returns:
        The shares by client.

    Examples:
        Any two of three shares give the secret:

        >>> import os
        >>> from gia_jax.secure_aggregation import shamir
        >>> secret = bytes(range(32))
        >>> shares = shamir.share(os.urandom, secret, 2, range(3))
        >>> shamir.recombine({0: shares[0], 2: shares[2]}, 2) == secret
        True
    """
    coefficients = [int.from_bytes(secret, "little"), *(_below(random, PRIME) for _ in range(threshold - 1))]
    return {client: evaluate(coefficients, client + 1, PRIME).to_bytes(SHARE, "little") for client in clients}


def evaluate(coefficients: Sequence[int], point: int, prime: int) -> int:
    """Evaluates a polynomial modulo a prime.

    Args:
        coefficients: Coefficients, the constant first.
        point: Point at which the polynomial is evaluated.
        prime: Modulus of the field.

    Returns:
        The value, below `prime`.

    Examples:
        >>> from gia_jax.secure_aggregation import shamir
        >>> shamir.evaluate([5, 1], 3, prime=7)
        1
    """
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % prime
    return value


@functools.lru_cache
def weights_at_zero(points: tuple[int, ...], prime: int) -> list[int]:
    """Returns Lagrange's weights for the value at 0 of the polynomial through values at some points.

    That value is the sum of the values times these weights, modulo `prime`.

    Args:
        points: Points at which values are known, all different.
        prime: Modulus of the field.

    Returns:
        The weight of each point.

    Examples:
        The line through the values 6 and 7 at the points 1 and 2 has the value 5 at 0:

        >>> from gia_jax.secure_aggregation import shamir
        >>> weights = shamir.weights_at_zero((1, 2), prime=11)
        >>> weights, (6 * weights[0] + 7 * weights[1]) % 11
        ([2, 10], 5)
    """
    weights = []
    for point in points:
        others = [other for other in points if other != point]
        below = math.prod(other - point for other in others)
        weights.append(math.prod(others) * pow(below, -1, prime) % prime)
    return weights


def recombine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Recombines the secret from the first `threshold` of the shares by client.

    Args:
        shares: Shares of 33 bytes, by client.
        threshold: Number of shares that give the secret.

    Returns:
        The secret, 32 bytes.

    Raises:
        ValueError: If there are too few shares, or they are not of one 32-byte secret. Most wrong shares give a wrong
            secret instead: compare it with a commitment.

    Examples:
        >>> import os
        >>> from gia_jax.secure_aggregation import shamir
        >>> shares = shamir.share(os.urandom, b"the secret is 32 bytes long, yes", 2, range(3))
        >>> shamir.recombine(shares, 2)
        b'the secret is 32 bytes long, yes'
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
    """Draws a uniform integer below `bound`, by rejection."""
    bits = bound.bit_length()
    while True:
        value = int.from_bytes(random((bits + 7) // 8), "little") & ((1 << bits) - 1)
        if value < bound:
            return value
