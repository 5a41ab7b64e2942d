"""FastSecAgg: every client shares its whole update, with a multi-secret sharing that is a two-dimensional DFT.

Kadhe et al., FastSecAgg: Scalable Secure Aggregation for Privacy-Preserving Federated Learning, 2020, section 4.

It is made for the few hundred clients of a simulation: each of the two short DFTs is a product with its matrix.
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
    """The error of a sum whose missing shares lie in a pattern that `fft_sharing` cannot decode.

    As many clients answered as the sum has unknowns, so that another pattern of as many could have been decoded.

    Examples:
        The shares of clients 0 and 1 give the secret, those of clients 0 and 3 do not:

        >>> import os
        >>> import numpy as np
        >>> from gia_jax import secure_aggregation as sa
        >>> sharing = sa.fft_sharing((2, 3), zeros=(1, 1), secrets=(1, 1))
        >>> shares = sharing.share(os.urandom, np.array([[42]], np.uint32))
        >>> sharing.recover({0: shares[0], 1: shares[1]}).tolist()
        [[42]]
        >>> try:
        ...     sharing.recover({0: shares[0], 3: shares[3]})
        ... except sa.UnluckyDropouts as error:
        ...     print(error)
        2 of 6 clients answered, but not in a pattern that decodes
    """


def fastsecagg(sharing: Sharing, *, clip: float, bits: int = 22) -> AggregationProtocol:
    """Builds the protocol FastSecAgg, which gives the sum over the clients that shared their update, modulo a prime.

    Threat model: an honest-but-curious server and up to `sharing.privacy` clients that collude with it learn the sum
    over the other contributors, and nothing else, on encrypted channels: the server holds no masked update, only boxes.
    A client answers every round once, but a server that withholds boxes from some clients and not from others is not
    noticed before it has their answers, and may learn more than a sum. From that only `secagg` with `consistency`
    protects.

    A changed message ends the run or leaves the sum right, but for a chance of one in `sharing.prime`: the shared
    update has one entry more, which verifies the sum. Clients that share garbage are not noticed, and a client that
    answers with a wrong share on purpose can evade the check.

    Args:
        sharing: Sharing scheme, with a share for each client: `fft_sharing(...)`, or `packed_shamir(...)`, which
            decodes from any clients of sufficient number.
        clip: Largest magnitude of an entry, positive and finite. Larger entries are clipped.
        bits: Number of bits of an entry, the sign included, from 2 to 31.

    Returns:
        The protocol, for `sharing.num_shares` clients. For an update of p entries a client sends about
        (N - 1) (p + 1) / num_secrets entries.

    Raises:
        ValueError: If `Quantizer` refuses the arguments.

    Examples:
        A client that drops out after it has shared its update is still in the sum:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.fastsecagg(sa.packed_shamir(3, num_secrets=1, privacy=1), clip=1.0)
        >>> updates = jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
        >>> view = sa.aggregate(jax.random.key(0), protocol, updates, dropouts={2: 2})
        >>> view.contributors, [round(float(entry), 2) for entry in view.aggregate]
        ((0, 1, 2), [0.9, 1.2])
    """
    quantizer = Quantizer(clip, bits, sharing.num_shares, sharing.prime)
    minimum = sharing.privacy + 1  # more contributors than there may be colluders

    def make_clients(residues: np.ndarray, randoms: Sequence[RandomBytes]) -> list[FastSecAggClient]:
        return [FastSecAggClient(i, *own, sharing, minimum) for i, own in enumerate(zip(residues, randoms))]

    def make_server(length: int, random: RandomBytes) -> FastSecAggServer:
        del random
        return FastSecAggServer(length, sharing, minimum)

    return AggregationProtocol("fastsecagg", quantizer, sharing.privacy, make_clients, make_server)


def fft_sharing(grid: tuple[int, int], *, zeros: tuple[int, int], secrets: tuple[int, int]) -> Sharing:
    """Builds the sharing of FastShare and FastRecon, in which the shares are a DFT of the secrets.

    The coefficients are the secrets, random values and zeros. Of the n0 x n1 coefficients the last d0 rows and d1
    columns are zero. So every column of the shares is a Reed-Solomon codeword that corrects d0 erasures, and every row
    one that corrects d1. FastRecon corrects rows and columns in turn. That succeeds for every pattern of less than
    (d0 + 1) (d1 + 1) missing shares, and for most random patterns of many more. The secrets sit in the first a rows and
    b columns, cyclically next to the zeros. In another place they would be less private.

    Args:
        grid: Size (n0, n1) of the grid of shares, two coprime numbers, each at most 2,048, up to which products are
            exact. There is a share for each of N = n0 n1 clients.
        zeros: Numbers (d0, d1) of rows and columns of zeros, at least 0 and below n0 and n1.
        secrets: Numbers (a, b) of rows and columns of secrets, from 1 to n0 - d0 and n1 - d1.

    Returns:
        The scheme, modulo the largest prime below 2^31 that has roots of unity of order N. Its privacy is
        (n0 - d0 - a + 1) (n1 - d1 - b + 1) - 1. Its `recover` raises UnluckyDropouts where the shares suffice in number
        but the decoding stops.

    Raises:
        ValueError: If an argument is out of range, or no integer.

    Examples:
        Any three of twelve shares may be missing:

        >>> import os
        >>> import numpy as np
        >>> from gia_jax import secure_aggregation as sa
        >>> sharing = sa.fft_sharing((3, 4), zeros=(1, 1), secrets=(1, 2))
        >>> sharing.num_shares, sharing.num_secrets, sharing.privacy
        (12, 2, 3)
        >>> shares = sharing.share(os.urandom, np.array([[7], [8]], np.uint32))
        >>> sharing.recover({client: shares[client] for client in range(3, 12)}).tolist()
        [[7], [8]]
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
    """Returns the powers of points modulo `prime`: a row for each point, a column for each exponent."""
    return np.array([[pow(point, exponent, prime) for exponent in exponents] for point in points], np.uint32)


def _inverse_dft(points: Sequence[int], size: int, prime: int) -> UInt32[np.ndarray, "size n"]:
    """Returns the matrix from values at all points to the first `size` coefficients.

    It holds the powers of the inverse points, divided by the number of points.
    """
    powers = _powers(points, range(0, -size, -1), prime).T
    return (powers.astype(np.uint64) * pow(len(points), -1, prime) % prime).astype(np.uint32)


def _transform(
    array: UInt32[np.ndarray, "i j m"], matrices: Sequence[np.ndarray], prime: int
) -> UInt32[np.ndarray, "x y m"]:
    """Applies a matrix to each of the first two axes, modulo `prime`."""
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
    """Fills in, in place, every incomplete line with at least `size` known values; returns whether there was one."""
    found = False
    for line in np.flatnonzero((known.sum(0) >= size) & ~known.all(0)):
        have, missing = np.flatnonzero(known[:, line])[:size], np.flatnonzero(~known[:, line])
        matrix = lagrange([points[i] for i in have], [points[i] for i in missing], prime)
        values[missing, line] = matmul(matrix, values[have, line], prime)
        known[missing, line] = found = True
    return found


class FastSecAggClient(ShareClient):
    """One client of FastSecAgg, which shares its vector itself.

    Args:
        client: Number of the client.
        vector: Residues that the client puts into the sum, shape (p,).
        random: Source of randomness of the client.
        sharing: Sharing scheme of the protocol.
        minimum: Least number of clients in a sum that the client takes part in.
    """

    def __init__(self, client: int, vector: np.ndarray, random: RandomBytes, sharing: Sharing, minimum: int) -> None:
        super().__init__(client, vector, random, sharing, minimum, self.sum_shares)

    @client_round
    def sum_shares(self, message: bytes) -> bytes:
        """Round 2: answers with the sum of the shares of all clients whose boxes came."""
        self.receive(message)
        return self.sum_of(self.senders)


class FastSecAggServer(ShareServer):
    """The server of FastSecAgg, which forwards keys and boxes, and recovers the sum.

    Args:
        length: Length p of the vectors.
        sharing: Sharing scheme of the protocol.
        minimum: Least number of clients that must answer.
    """

    def __init__(self, length: int, sharing: Sharing, minimum: int) -> None:
        super().__init__(length, sharing, minimum)
        self.rounds = (self.send_keys, self.send_boxes, self.recover_sum)

    @server_round
    def send_boxes(self, answers: Bytes) -> Bytes:
        """Round 1: sends each client the boxes for it. Whoever sent boxes is in the sum."""
        self.uploads, self.contributors = answers, tuple(answers)
        return super().send_boxes(answers)

    @server_round
    def recover_sum(self, answers: Bytes) -> Bytes:
        """Round 2: recovers the sum of the vectors from the clients' sums of shares."""
        self.total = self.recover(answers)
        return {}
