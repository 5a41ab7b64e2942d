"""A client answers every round once and in order, so that no server compares two of its answers."""

import re

import numpy as np
import pytest
from exchanges import drive, modular, parties, protocols, random_residues

from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation.wire import ByClient


def every():
    made = protocols(4) | {"fft": sa.fastsecagg(sa.fft_sharing((1, 4), zeros=(0, 1), secrets=(1, 1)), clip=1.0)}
    return made | {"paillier": sa.homomorphic(4, "paillier", clip=1.0, key_bits=1024)}


PROTOCOLS = every()


@pytest.mark.parametrize("kind", PROTOCOLS)
@pytest.mark.parametrize("direct", [True, False])
def test_every_round_is_answered_once(kind, direct):
    clients, server = parties(PROTOCOLS[kind], random_residues(np.random.default_rng(0), PROTOCOLS[kind], 5))
    names = [step.__name__ for step in clients[0].rounds]
    for number, name in enumerate(names):
        clients, server = parties(PROTOCOLS[kind], random_residues(np.random.default_rng(0), PROTOCOLS[kind], 5))
        pending = drive(clients, server, until=number)
        ask = getattr(clients[0], name) if direct else clients[0].rounds[number]
        ask(pending[0])
        due = names[number + 1] if number + 1 < len(names) else "none"
        with pytest.raises(sa.AggregationAborted) as caught:
            ask(pending[0])
        assert str(caught.value) == f"client 0 answers each round once and in order: got {name}, next is {due}"


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_no_round_is_answered_out_of_order_nor_any_after_that(kind):
    for skipped in range(1, len(parties(PROTOCOLS[kind], np.zeros((4, 5), np.uint32))[0][0].rounds)):
        clients, server = parties(PROTOCOLS[kind], np.zeros((4, 5), np.uint32))
        pending = drive(clients, server, until=skipped - 1)
        with pytest.raises(
            sa.AggregationAborted, match=r"client 1 answers each round once and in order: got \w+, next"
        ):
            clients[1].rounds[skipped](pending[1])
        for step in clients[1].rounds:
            with pytest.raises(sa.AggregationAborted, match=re.escape(f"got {step.__name__}, next is none")):
                step(pending[1])


@pytest.mark.parametrize("kind", [kind for kind in PROTOCOLS if kind != "plain_sum"])
def test_a_client_that_refused_a_message_is_finished(kind):
    clients, server = parties(PROTOCOLS[kind], np.zeros((4, 5), np.uint32))
    pending = drive(clients, server, until=1)
    with pytest.raises(sa.MalformedMessage, match="message ends 4 bytes early"):
        clients[2].rounds[1](b"")
    with pytest.raises(sa.AggregationAborted, match="next is none"):
        clients[2].rounds[1](pending[2])


@pytest.mark.parametrize("consistency", [False, True])
def test_the_difference_of_two_masked_inputs_is_not_to_be_had(consistency):
    """A server that sends all boxes, then all but one, would get pairwise masks as differences of the answers."""
    protocol = sa.secagg(4, threshold=2, clip=1.0, consistency=consistency)
    residues = random_residues(np.random.default_rng(0), protocol, 5)
    clients, server = parties(protocol, residues)
    pending = drive(clients, server, until=2)
    boxes = ByClient.from_bytes(pending[0]).contents
    answers = {0: clients[0].mask_input(pending[0])}
    for left_out in boxes:
        fewer = ByClient({peer: box for peer, box in boxes.items() if peer != left_out}).to_bytes()
        with pytest.raises(
            sa.AggregationAborted, match="client 0 answers each round once and in order: got mask_input"
        ):
            clients[0].mask_input(fewer)
    # The others go on without the client that was asked twice.
    answers |= {client: clients[client].mask_input(pending[client]) for client in (1, 2, 3)}
    messages = server.rounds[2]({client: answers[client] for client in (1, 2, 3)})
    for number in range(3, len(server.rounds)):
        answers = {client: clients[client].rounds[number](message) for client, message in messages.items()}
        messages = server.rounds[number](answers)
    np.testing.assert_array_equal(server.total, modular(residues[1:], 2**32))
