"""Exact linear algebra modulo a prime below 2^31, with which the sharing schemes compute."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt32

LIMB = 11


def matmul(left: UInt32[np.ndarray, "a b"], right: UInt32[np.ndarray, "b c"], prime: int) -> UInt32[np.ndarray, "a c"]:
    """Multiplies two matrices of residues modulo a prime, exactly.

    An integer product of two residues overflows once b of them are added. Here `left` is cut in limbs of 11 bits. The
    sums stay below 2^(11 + 31 + 11) = 2^53, exact in float64, and the product runs at the speed of BLAS.

    Args:
        left: Left matrix of residues, shape (a, b) with b at most 2,048.
        right: Right matrix of residues, shape (b, c).
        prime: Modulus, below 2^31.

    Returns:
        The product modulo `prime`, shape (a, c).

    Raises:
        ValueError: If `left` has more than 2,048 columns.

    Examples:
        2 * 4 + 3 * 5 is 23, which is 2 modulo 7:

        >>> import numpy as np
        >>> from gia_jax.secure_aggregation.finite_field import matmul
        >>> matmul(np.array([[2, 3]], np.uint32), np.array([[4], [5]], np.uint32), 7).tolist()
        [[2]]
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
    """Returns the matrix from a polynomial's values at some points to its values at others, modulo a prime.

    Args:
        known: Points at which the values are known, k of them for a polynomial of degree below k.
        wanted: Points at which the values are wanted, w of them. All points, of both kinds, differ modulo `prime`.
        prime: Modulus of the field.

    Returns:
        The matrix of residues, shape (w, k).

    Examples:
        A straight line through the values 10 and 20 at 1 and 2 has the value 30 at 3:

        >>> from gia_jax.secure_aggregation.finite_field import lagrange
        >>> matrix = lagrange([1, 2], [3], prime=97)
        >>> matrix.tolist(), int(matrix[0] @ [10, 20]) % 97
        ([[96, 2]], 30)
    """
    weights = [pow(math.prod(x - y for y in known if y != x), -1, prime) for x in known]
    rows = []
    for point in wanted:
        whole = math.prod(point - x for x in known) % prime
        rows.append([whole * pow(point - x, -1, prime) * weight % prime for x, weight in zip(known, weights)])
    return np.array(rows, np.uint32).reshape(len(wanted), len(known))


def prime_above_multiples(order: int) -> int:
    """Returns the largest prime below 2^31 that is one more than a multiple of `order`.

    Modulo such a prime there are roots of unity of this order.

    Args:
        order: Order of the roots of unity, at least 1.

    Returns:
        The prime.

    Examples:
        >>> from gia_jax.secure_aggregation.finite_field import is_prime, prime_above_multiples
        >>> prime = prime_above_multiples(1000)
        >>> is_prime(prime), prime % 1000
        (True, 1)
    """
    return next(p for p in range((2**31 - 2) // order * order + 1, order, -order) if is_prime(p))


def root_of_unity(order: int, prime: int) -> int:
    """Returns an element whose powers are `order` different ones, modulo `prime`.

    Args:
        order: Order of the root, which divides `prime` - 1.
        prime: Modulus of the field.

    Returns:
        The first such element that is found.

    Examples:
        >>> from gia_jax.secure_aggregation.finite_field import root_of_unity
        >>> root = root_of_unity(4, prime=13)
        >>> [pow(root, k, 13) for k in range(5)]
        [1, 8, 12, 5, 1]
    """
    candidates = (pow(x, (prime - 1) // order, prime) for x in range(1, prime))
    return next(g for g in candidates if len({pow(g, k, prime) for k in range(order)}) == order)


def is_prime(number: int) -> bool:
    """Returns whether a number below 3,215,031,751 is prime.

    It is the strong test to the bases 2, 3, 5 and 7, which no composite below that number passes.

    Args:
        number: Number to test, not negative.

    Returns:
        True for a prime.

    Examples:
        >>> from gia_jax.secure_aggregation.finite_field import is_prime
        >>> is_prime(2**31 - 1), is_prime(2**31 - 3)
        (True, False)
    """
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
