"""Parties driven by hand, and what every protocol must give."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gia_jax import Batch, clients, models
from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation.protocol import SERVER


def modular(residues, modulus):
    """The sum over clients in Python integers: arithmetic that cannot overflow."""
    return np.array([sum(map(int, column)) % modulus for column in residues.T], np.uint32)


def random_residues(rng, protocol, length):
    """Any residues: uniform over the whole group, not only those that a quantizer makes."""
    return rng.integers(0, protocol.quantizer.modulus, (protocol.quantizer.num_clients, length), dtype=np.uint32)


@functools.cache
def lenet_gradients():
    """Of ten clients with one image each: 15,826 parameters."""
    apply_fn, params = models.functional(models.LeNet(rngs=nnx.Rngs(0)))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    batches = Batch(jax.random.uniform(jax.random.key(0), (10, 1, 32, 32, 3)), jnp.arange(10)[:, None])
    return jax.jit(jax.vmap(client_fn, in_axes=(None, 0)))(params, batches)


def fft(num_clients, **options):
    grids = {6: ((2, 3), (0, 1), (1, 1)), 12: ((3, 4), (1, 1), (1, 1)), 10: ((2, 5), (0, 2), (1, 2))}
    grid, zeros, secrets = grids[num_clients]
    return sa.fastsecagg(sa.fft_sharing(grid, zeros=zeros, secrets=secrets), clip=1.0, **options)


def protocols(num_clients, **options):
    """One of every kind; all but the grid of the DFT for any number of clients from 3."""
    n = num_clients
    survivors = n // 2 + 1
    made = {
        "plain_sum": sa.plain_sum(n, clip=1.0, **options),
        "secagg": sa.secagg(n, threshold=survivors, clip=1.0, **options),
        "secagg consistency": sa.secagg(n, threshold=survivors, clip=1.0, consistency=True, **options),
        "secagg neighbours": sa.secagg(n, threshold=2, neighbours=2, clip=1.0, **options),
        "lightsecagg": sa.lightsecagg(n, privacy=survivors - 1, survivors=survivors, clip=1.0, **options),
        "packed_shamir": sa.fastsecagg(sa.packed_shamir(n, num_secrets=survivors - 1, privacy=1), clip=1.0, **options),
    }
    return made | ({"fft": fft(n, **options)} if n in (6, 10, 12) else {})


def parties(protocol, residues):
    count, length = residues.shape
    clients = protocol.make_clients(residues, [os.urandom] * count)
    return clients, protocol.make_server(length, os.urandom)


def drive(clients, server, dropouts=None, until=None, alter=None):
    """Carries messages; `alter(round, sender, receiver, payload)` may change what arrives; returns those pending."""
    dropouts = {} if dropouts is None else dropouts
    alter = (lambda number, sender, receiver, payload: payload) if alter is None else alter
    messages = dict.fromkeys(range(len(clients)), b"")
    for number, server_round in enumerate(server.rounds[:until]):
        answers = {
            client: alter(number, client, SERVER, clients[client].rounds[number](message))
            for client, message in messages.items()
            if dropouts.get(client, 99) > number
        }
        messages = {client: alter(number, SERVER, client, message) for client, message in server_round(answers).items()}
    return messages


def runs_to(protocol, residues, dropouts, contributors):
    """The server's view, after a run that gives the exact sum over `contributors`."""
    view = sa.aggregate_residues(protocol, residues, dropouts=dropouts)
    assert set(view.contributors) == set(contributors)
    np.testing.assert_array_equal(view.total, modular(residues[sorted(contributors)], protocol.quantizer.modulus))
    return view
