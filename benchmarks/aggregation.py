"""What secure aggregation costs a client and the server, in seconds and bytes, and how far that is from its primitives.

    python benchmarks/aggregation.py [--clients N ...] [--size lenet|resnet18] [--protocols NAME ...] [--slices K]
                                     [--name FILE]

Needs the extra `secure`, and the extra `he` for BFV and CKKS. The messages of all clients are in memory at once: for
ResNet-18 that is up to tens of gigabytes. With `--slices` one slice of the update is run.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import cryptography
import numpy as np
import record
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation.primitives import keystream

SIZES = {"lenet": 61_706, "resnet18": 11_173_962}  # LeNet-5, and ResNet-18 for 10 classes
# Of FastSecAgg by number of clients: the grid, its lines of zeros, and the corner of secrets.
GRIDS = {
    10: ((2, 5), (0, 2), (1, 2)),
    50: ((2, 25), (0, 6), (1, 10)),
    100: ((4, 25), (1, 4), (2, 10)),
}
DROPPED = 0.1  # of the clients, before they send their update


class Case(NamedTuple):
    """A protocol, and what a client cannot do without.

    Attributes:
        protocol: With its parameters for this number of clients.
        exchanges: X25519 exchanges.
        stream: ChaCha20 keystream, as a multiple of the update's length: masks, or shares sealed and opened.
    """

    protocol: sa.AggregationProtocol
    exchanges: int
    stream: float


PROTOCOLS = ("plain_sum", "secagg", "secagg+", "lightsecagg", "fastsecagg")
HOMOMORPHIC = ("bfv", "ckks", "paillier")


def make_case(name: str, n: int) -> Case:
    """Half of the clients may collude and 30 % drop out, but of FastSecAgg's and SecAgg+'s neighbours fewer."""
    if name == "plain_sum":
        return Case(sa.plain_sum(n, clip=1.0), 0, 0)
    if name == "secagg":
        return Case(sa.secagg(n, threshold=n // 2 + 1, clip=1.0), 2 * (n - 1), n)
    if name == "secagg+":
        return Case(sa.secagg(n, threshold=4, neighbours=8, clip=1.0), 2 * 8, 9)
    if name in HOMOMORPHIC:
        return Case(sa.homomorphic(n, name, clip=1.0), 0, 0)
    shares = 2 * (n - 1)  # as many are sealed as are opened
    if name == "lightsecagg":
        privacy, survivors = n // 2, 7 * n // 10
        protocol = sa.lightsecagg(n, privacy=privacy, survivors=survivors, clip=1.0)
        return Case(protocol, n - 1, shares / (survivors - privacy))
    grid, zeros, secrets = GRIDS[n]
    transform = sa.fft_sharing(grid, zeros=zeros, secrets=secrets)
    return Case(sa.fastsecagg(transform, clip=1.0), n - 1, shares / transform.num_secrets)


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """The median processor time of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def primitives() -> tuple[float, float]:
    """Processor seconds of an X25519 exchange, and of a byte of ChaCha20 keystream."""
    one, other = X25519PrivateKey.generate(), X25519PrivateKey.generate().public_key()
    exchange = seconds_of(lambda: [one.exchange(other) for _ in range(200)], 5) / 200
    words = SIZES["lenet"]
    return exchange, seconds_of(lambda: [keystream(bytes(32), words) for _ in range(100)], 5) / (400 * words)


def run(protocol: sa.AggregationProtocol, length: int) -> dict[str, float]:
    """Processor seconds of the mean client that stays, of the server and of all parties, and bytes of such a client."""
    n = protocol.quantizer.num_clients
    residues = np.random.default_rng(0).integers(0, protocol.quantizer.modulus, (n, length), np.uint32)
    dropped = range(int(DROPPED * n))
    spent = dict.fromkeys(range(-1, n), 0.0)
    sizes = dict.fromkeys(range(n), 0)

    def timed(party, call, *arguments):
        begin = time.process_time()
        answer = call(*arguments)
        spent[party] += time.process_time() - begin
        return answer

    begin = time.process_time()
    clients = protocol.make_clients(residues, [os.urandom] * n)
    making = (time.process_time() - begin) / n
    server = protocol.make_server(length, os.urandom)
    messages = dict.fromkeys(range(n), b"")
    for number, step in enumerate(server.rounds):
        # With FastSecAgg the update is what is sent in round 1.
        left = [c for c in messages if not (c in dropped and number >= min(2, len(server.rounds) - 2))]
        answers = {c: timed(c, clients[c].rounds[number], messages[c]) for c in left}
        messages = timed(-1, step, answers)
        for client, data in [*answers.items(), *messages.items()]:
            sizes[client] += len(data)
    total = residues[list(server.contributors)].sum(0, dtype=np.uint64) % protocol.quantizer.modulus
    assert np.array_equal(server.total, total)
    stayed = range(len(dropped), n)
    client = making + statistics.mean(spent[c] for c in stayed)
    return {
        "client": client,
        "server": spent[-1],
        "all": n * making + sum(spent.values()),
        "bytes": statistics.mean(sizes[c] for c in stayed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50, 100], choices=[*GRIDS])
    parser.add_argument("--size", default="lenet", choices=[*SIZES])
    parser.add_argument("--protocols", nargs="+", default=PROTOCOLS, choices=PROTOCOLS + HOMOMORPHIC)
    parser.add_argument("--slices", type=int, default=1, help="of the update, of which one is run")
    parser.add_argument("--name", help="of the table's files; default: the size")
    options = parser.parse_args()
    rows, length = [], SIZES[options.size]
    slices = options.slices
    for n in options.clients:
        for name in options.protocols:
            exchange, byte = primitives()
            case = make_case(name, n)
            cost = {of: slices * value for of, value in run(case.protocol, -(-length // slices)).items()}
            needed = case.exchanges * exchange + 4 * length * case.stream * byte
            rows.append(
                {
                    "protocol": name,
                    "clients": n,
                    "client s": f"{cost['client']:.3f}",
                    "server s": f"{cost['server']:.3f}",
                    "all parties s": f"{cost['all']:.2f}",
                    "client MB": f"{cost['bytes'] / 1e6:.2f}",
                    "over the update": f"{cost['bytes'] / (4 * length):.2f}",
                    "exchange us": f"{1e6 * exchange:.0f}",
                    "ChaCha20 ns a byte": f"{1e9 * byte:.2f}",
                    "client over one mask": f"{cost['client'] / (4 * length * byte):.1f}",
                    "client over its primitives": f"{cost['client'] / needed:.1f}" if needed else "-",
                }
            )
            print(rows[-1], flush=True)
    sliced = f"""
The update was cut into {slices} slices, each to be summed by a run of its own; one was run, and seconds and bytes are
{slices} times its. What a run needs once, such as keys, is thus counted {slices} times, but in the ratio's primitives.
"""
    notes = f"""
One run a row, every party in one process and one thread, one after the other; {DROPPED:.0%} of the clients drop out
just before they send their update. Seconds are processor time, which other work on the machine disturbs less than the
clock; of a client, the mean over those that stayed. Bytes are sent and received. The two primitives were timed just
before each row, in the same state of the machine. "Over one mask" divides a client's seconds by the time of as many
ChaCha20 bytes as its update has, "over its primitives" by that of the X25519 exchanges and ChaCha20 bytes that its
protocol cannot do without: masks, or shares sealed and opened. On a busy machine a byte of ChaCha20 takes up to four
times as long from one row to the next, and the ratios move with it.
""" + (sliced if slices > 1 else "")
    title = f"Secure aggregation: costs at the size of {options.size}, {length:,} parameters"
    record.write(options.name or options.size, title, rows, notes, cryptography=cryptography.__version__)


if __name__ == "__main__":
    main()
