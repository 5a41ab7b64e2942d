"""FastSecAgg: every client shares its whole update, by a multi-secret sharing that is a two-dimensional DFT.

Kadhe et al., FastSecAgg: Scalable Secure Aggregation for Privacy-Preserving Federated Learning, 2020, section 4.

For the few hundred clients of a simulation, each of the two short DFTs is a product with its matrix.
"""

import math
from collections.abc import Mapping, Sequence
from operator import index

import numpy as np
from jaxtyping import Bool, UInt32

from gia_jax import _check
from gia_jax.secure_aggregation.errors import AggregationAborted
from gia_jax.secure_aggregation.finite_field import LIMB, lagrange, matmul, prime_above_multiples, root_of_unity
from gia_jax.secure_aggregation.primitives import RandomBytes, uniform
from gia_jax.secure_aggregation.protocol import AggregationProtocol, client_round, require, server_round
from gia_jax.secure_aggregation.quantization import Quantizer
from gia_jax.secure_aggregation.sharing import ShareClient, ShareServer, Sharing
from gia_jax.secure_aggregation.wire import Bytes


class UnluckyDropouts(AggregationAborted):
    """As many clients answered as the sum has unknowns, but the pattern of the missing ones cannot be decoded."""


def fastsecagg(sharing: Sharing, *, clip: float, bits: int = 22) -> AggregationProtocol:
    """The sum over the clients that shared their update, modulo a prime.

    Threat model: an honest-but-curious server and up to `sharing.privacy` clients that collude with it learn the sum
    over the other contributors, and nothing else, on encrypted channels: the server holds no masked update, only boxes.
    A client answers every round once, but a server that withholds boxes from some clients and not from others is not
    noticed before it has their answers, and may learn more than a sum: from that only `secagg` with `consistency`
    protects.

    A changed message ends the run or leaves the sum right, but for a chance of one in `sharing.prime`: the shared
    update has one entry more, which verifies the sum. Clients that share garbage are not noticed, and a client that
    answers with a wrong share on purpose can evade the check.

    Args:
        sharing: `fft_sharing(...)`, or `packed_shamir(...)`, which decodes from any clients of sufficient number.
        clip: Largest magnitude of an entry, > 0 and finite; larger ones are clipped.
        bits: Number of bits of an entry, the sign included, from 2 to 31.

    Returns:
        The protocol, for `sharing.num_shares` clients. For an update of p entries a client sends about
        (N - 1) (p + 1) / num_secrets entries.

    Raises:
        ValueError: Arguments that `Quantizer` refuses.
    """
    quantizer = Quantizer(clip, bits, sharing.num_shares, sharing.prime)
    minimum = sharing.privacy + 1  # no sum over colluders and one victim only because all others are left out

    def make_clients(residues: np.ndarray, randoms: Sequence[RandomBytes]) -> list[FastSecAggClient]:
        return [FastSecAggClient(i, *own, sharing, minimum) for i, own in enumerate(zip(residues, randoms))]

    def make_server(length: int, random: RandomBytes) -> FastSecAggServer:
        del random
        return FastSecAggServer(length, sharing, minimum)

    return AggregationProtocol("fastsecagg", quantizer, sharing.privacy, make_clients, make_server)


def fft_sharing(grid: tuple[int, int], *, zeros: tuple[int, int], secrets: tuple[int, int]) -> Sharing:
    """FastShare and FastRecon: secrets, random values and zeros are the coefficients, their DFT the shares.

    Of the n0 x n1 coefficients the last d0 rows and d1 columns are zero: so every column of the shares is a
    Reed-Solomon codeword that corrects d0 erasures, and every row one that corrects d1. FastRecon corrects rows and
    columns in turn. That succeeds for every pattern of less than (d0 + 1) (d1 + 1) missing shares, and for most
    random patterns of many more. The secrets sit in the first a rows and b columns, cyclically next to the zeros; in
    another place they would be less private.

    Args:
        grid: (n0, n1), coprime, each at most 2,048, up to which products are exact: there is a share for each of
            N = n0 n1 clients.
        zeros: (d0, d1), not negative.
        secrets: (a, b), from 1 to n0 - d0 and n1 - d1.

    Returns:
        The scheme, its privacy (n0 - d0 - a + 1) (n1 - d1 - b + 1) - 1, modulo the largest prime below 2^31 that has
        roots of unity of order N. Its `recover` raises UnluckyDropouts where the shares suffice in number but the
        decoding stops.

    Raises:
        ValueError: An argument out of range, or no integer.
    """
    for name, pair in {"grid": grid, "zeros": zeros, "secrets": secrets}.items():
        for number in pair:
            _check.integer(0, 2**LIMB, **{name: number})
    # Python's integers: those of NumPy may overflow.
    (n0, n1), (d0, d1), (a, b) = (tuple(map(index, pair)) for pair in (grid, zeros, secrets))
    grid, zeros, secrets = (n0, n1), (d0, d1), (a, b)
    if min(grid) < 1 or math.gcd(n0, n1) != 1:
        raise ValueError(f"grid must be two coprime numbers, got {grid}")
    rows, columns = n0 - d0, n1 - d1
    if min(zeros) < 0 or min(rows, columns) < 1:
        raise ValueError(f"zeros must be from (0, 0) to {(n0 - 1, n1 - 1)}, got {zeros}")
    if not (1 <= a <= rows and 1 <= b <= columns):
        raise ValueError(f"secrets must be from (1, 1) to {(rows, columns)}, got {secrets}")
    prime = prime_above_multiples(n0 * n1)
    roots = [root_of_unity(n, prime) for n in grid]
    points = [[pow(root, k, prime) for k in range(n)] for root, n in zip(roots, grid)]
    forward = [_powers(of, range(size), prime) for of, size in zip(points, (rows, columns))]
    backward = [_inverse_dft(of, size, prime) for of, size in zip(points, (a, b))]

    def share(random: RandomBytes, blocks: np.ndarray) -> np.ndarray:
        coefficients = uniform(random, prime, (rows, columns, blocks.shape[1]))
        coefficients[:a, :b] = blocks.reshape(a, b, -1)
        return _transform(coefficients, forward, prime).reshape(n0 * n1, -1)

    def recover(shares: Mapping[int, np.ndarray]) -> np.ndarray:
        require(len(shares), rows * columns, "with their sum of shares")
        values = np.zeros((n0, n1, next(iter(shares.values())).size), np.uint32)
        known = np.zeros(grid, bool)
        for client, held in shares.items():
            values[divmod(client, n1)], known[divmod(client, n1)] = held, True
        # In place, the second time of the transposed views.
        while _correct(values, known, points[0], rows, prime) | _correct(
            values.swapaxes(0, 1), known.T, points[1], columns, prime
        ):
            pass
        if not known.all():
            raise UnluckyDropouts(f"{len(shares)} of {n0 * n1} clients answered, but not in a pattern that decodes")
        return _transform(values, backward, prime).reshape(a * b, -1)

    privacy = (rows - a + 1) * (columns - b + 1) - 1
    return Sharing(prime, n0 * n1, a * b, privacy, share, recover)


def _powers(points: Sequence[int], exponents: range, prime: int) -> UInt32[np.ndarray, "n k"]:
    return np.array([[pow(point, exponent, prime) for exponent in exponents] for point in points], np.uint32)


def _inverse_dft(points: Sequence[int], size: int, prime: int) -> UInt32[np.ndarray, "size n"]:
    """To the first `size` coefficients: the powers of the inverse points, divided by their number."""
    powers = _powers(points, range(0, -size, -1), prime).T
    return (powers.astype(np.uint64) * pow(len(points), -1, prime) % prime).astype(np.uint32)


def _transform(
    array: UInt32[np.ndarray, "i j m"], matrices: Sequence[np.ndarray], prime: int
) -> UInt32[np.ndarray, "x y m"]:
    """Applies a matrix to each of the first two axes."""
    for matrix in matrices:
        product = matmul(matrix, array.reshape(array.shape[0], -1), prime).reshape(-1, *array.shape[1:])
        array = product.swapaxes(0, 1)
    return array


def _correct(
    values: UInt32[np.ndarray, "n lines m"],
    known: Bool[np.ndarray, "n lines"],
    points: list[int],
    size: int,
    prime: int,
) -> bool:
    """Fills in, in place, every incomplete line with at least `size` known values; whether there was one."""
    found = False
    for line in np.flatnonzero((known.sum(0) >= size) & ~known.all(0)):
        have, missing = np.flatnonzero(known[:, line])[:size], np.flatnonzero(~known[:, line])
        matrix = lagrange([points[i] for i in have], [points[i] for i in missing], prime)
        values[missing, line] = matmul(matrix, values[have, line], prime)
        known[missing, line] = found = True
    return found


class FastSecAggClient(ShareClient):
    """One client: its secret is its vector."""

    def __init__(self, client: int, vector: np.ndarray, random: RandomBytes, sharing: Sharing, minimum: int) -> None:
        super().__init__(client, vector, random, sharing, minimum, self.sum_shares)

    @client_round
    def sum_shares(self, message: bytes) -> bytes:
        """Round 2: the sum of the shares of all whose boxes came."""
        self.receive(message)
        return self.sum_of(self.senders)


class FastSecAggServer(ShareServer):
    """The server."""

    def __init__(self, length: int, sharing: Sharing, minimum: int) -> None:
        super().__init__(length, sharing, minimum)
        self.rounds = (self.send_keys, self.send_boxes, self.recover_sum)

    @server_round
    def send_boxes(self, answers: Bytes) -> Bytes:
        """Round 1."""
        self.uploads, self.contributors = answers, tuple(answers)
        return super().send_boxes(answers)

    @server_round
    def recover_sum(self, answers: Bytes) -> Bytes:
        """Round 2."""
        self.total = self.recover(answers)
        return {}
