"""Linear algebra modulo a prime below 2^31, exact."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt32

LIMB = 11


def matmul(left: UInt32[np.ndarray, "a b"], right: UInt32[np.ndarray, "b c"], prime: int) -> UInt32[np.ndarray, "a c"]:
    """The product modulo `prime` < 2^31, for b <= 2048.

    An integer product of two residues overflows once b of them are added. Here `left` is cut in limbs of 11 bits: the
    sums stay below 2^(11 + 31 + 11) = 2^53, exact in float64, and the product runs at the speed of BLAS.
    """
    if left.shape[1] > 2**LIMB:
        raise ValueError(f"left must have at most {2**LIMB} columns, got {left.shape[1]}")
    wide = right.astype(np.float64)
    product = np.zeros((left.shape[0], right.shape[1]), np.int64)
    for shift in (2 * LIMB, LIMB, 0):
        limb = (left >> np.uint32(shift)) & np.uint32(2**LIMB - 1)
        product = ((product << LIMB) + (limb.astype(np.float64) @ wide).astype(np.int64) % prime) % prime
    return product.astype(np.uint32)


def lagrange(known: Sequence[int], wanted: Sequence[int], prime: int) -> UInt32[np.ndarray, "w k"]:
    """The matrix from a polynomial's values at `known` to those at `wanted`; all points differ modulo `prime`."""
    weights = [pow(math.prod(x - y for y in known if y != x), -1, prime) for x in known]
    rows = []
    for point in wanted:
        whole = math.prod(point - x for x in known) % prime
        rows.append([whole * pow(point - x, -1, prime) * weight % prime for x, weight in zip(known, weights)])
    return np.array(rows, np.uint32).reshape(len(wanted), len(known))


def prime_above_multiples(order: int) -> int:
    """The largest prime below 2^31 with roots of unity of this order: one more than a multiple of it."""
    return next(p for p in range((2**31 - 2) // order * order + 1, order, -order) if is_prime(p))


def root_of_unity(order: int, prime: int) -> int:
    """An element whose powers are `order` different ones; `order` divides `prime` - 1."""
    candidates = (pow(x, (prime - 1) // order, prime) for x in range(1, prime))
    return next(g for g in candidates if len({pow(g, k, prime) for k in range(order)}) == order)


def is_prime(number: int) -> bool:
    """The strong test to the bases 2, 3, 5 and 7: no composite below 3,215,031,751 passes it."""
    if number < 11 or number % 2 == 0:
        return number in (2, 3, 5, 7)
    odd = number - 1
    while odd % 2 == 0:
        odd //= 2
    for base in (2, 3, 5, 7):
        power, exponent = pow(base, odd, number), odd
        while exponent != number - 1 and power not in (1, number - 1):
            power, exponent = power * power % number, 2 * exponent
        if power != number - 1 and exponent % 2 == 0:
            return False
    return True
