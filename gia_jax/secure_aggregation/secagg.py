"""SecAgg: the clients add pairwise masks, which cancel in the sum.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, figure 4; with
`neighbours`, Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead, CCS 2020, algorithm 2.

Departures: a commitment to every self-mask seed and a comparison with the advertised mask key, so that wrong shares end
the run instead of giving a wrong sum. The server names survivors and dropped clients in two lists, and a client refuses
where they overlap. Boxes are bound to all public keys of their two ends, and a client opens those for it before it
masks: where the server told two clients different keys, they stop instead of adding masks that do not cancel.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from gia_jax import _check
from gia_jax.secure_aggregation import shamir
from gia_jax.secure_aggregation.errors import AggregationAborted, MalformedMessage
from gia_jax.secure_aggregation.primitives import Mailbox, RandomBytes, agree, keystream
from gia_jax.secure_aggregation.protocol import (
    AggregationProtocol,
    Client,
    Server,
    client_round,
    require,
    require_own_keys,
    server_round,
    to_bytes,
    words,
)
from gia_jax.secure_aggregation.quantization import Quantizer
from gia_jax.secure_aggregation.wire import ByClient, Bytes, Wire


def secagg(
    num_clients: int,
    *,
    threshold: int,
    clip: float,
    bits: int = 22,
    neighbours: int | None = None,
    consistency: bool = False,
    model_hashes: Sequence[bytes] | None = None,
) -> AggregationProtocol:
    """Builds the protocol SecAgg, which gives the sum over the clients that sent a masked input, modulo 2^32.

    At least `threshold` clients must answer each round, so up to num_clients - threshold may drop out.

    Threat model: an honest-but-curious server and up to threshold - 1 clients that collude with it learn the sum over
    the other contributors, and nothing else. With threshold colluders they learn everything, and a sum over one honest
    client is that client's update. With `consistency` this holds also for a server that lies about who dropped out,
    where 2 threshold > num_clients + colluders and the clients' identity keys come from a source it cannot forge. A
    client answers every round once, so that no server gets two masked inputs, whose difference is masks, or two sets of
    shares. From a server that sends different models (`limits.inconsistent_models`) only `model_hashes` protect.

    A masked input that was changed on its way, or that a client made of garbage, changes the sum unnoticed. Any other
    changed message ends the run or leaves the sum right.

    Args:
        num_clients: Number N of clients, at least 1.
        threshold: Number t of clients that must answer, from 2 (1 for a single client) to N. With `neighbours` they
            are counted among a client and its neighbours.
        clip: Largest magnitude of an entry, positive and finite. Larger entries are clipped.
        bits: Number of bits of an entry, the sign included, from 2 to 31.
        neighbours: Number of other clients with which a client masks and shares. None stands for every other client. An
            even number k < N stands for k others, on a circle in random order (SecAgg+). Every client then needs
            `threshold` answers from among its own k + 1. Colluders and dropouts that cut the circle in two give the
            server two sums: fewer than k of them together never do, and more hardly ever, because the order is random.
            The server draws it, and must be honest.
        consistency: Whether signed keys and the consistency round are added.
        model_hashes: Hash of the model that each client received, such as `limits.model_hash` of it. Masks are then
            derived from it: between clients with different models they do not cancel, and the sum is noise. (This is a
            proposal of this library, without a paper.) By default masks depend on no model.

    Returns:
        The protocol.

    Raises:
        ValueError: If `Quantizer` refuses the arguments, `threshold` or `neighbours` is out of range or no integer,
            `consistency` is used with neighbours, or there is not one hash, of bytes, for each client.

    Examples:
        A client drops out before it sends its masked input, and the sum is that of the others:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.secagg(3, threshold=2, clip=1.0)
        >>> updates = jnp.array([[0.1, 0.2], [0.3, 0.4], [0.9, 0.9]])
        >>> view = sa.aggregate(jax.random.key(0), protocol, updates, dropouts={2: 2})
        >>> view.contributors, [round(float(entry), 2) for entry in view.aggregate]
        ((0, 1), [0.4, 0.6])
    """
    quantizer = Quantizer(clip, bits, num_clients)
    if neighbours is not None:
        _check.integer(neighbours=neighbours)
    if neighbours is not None and not (neighbours < num_clients and neighbours % 2 == 0):
        raise ValueError(f"neighbours must be even, positive and below {num_clients}, got {neighbours}")
    if neighbours is not None and consistency:
        raise ValueError(f"consistency=True needs neighbours=None, got {neighbours}: all must sign the same survivors")
    if model_hashes is not None and len(model_hashes) != num_clients:
        raise ValueError(f"model_hashes must be {num_clients}, got {len(model_hashes)}")
    for one in () if model_hashes is None else model_hashes:
        if not isinstance(one, bytes):
            raise ValueError(f"model_hashes must be bytes, got {one!r}")
    holders = num_clients if neighbours is None else neighbours + 1
    _check.integer(threshold=threshold)
    if not min(2, num_clients) <= threshold <= holders:
        raise ValueError(f"threshold must be from {min(2, num_clients)} to {holders}, got {threshold}")

    def models() -> list[bytes]:
        return [b""] * num_clients if model_hashes is None else list(model_hashes)

    def make_clients(residues: np.ndarray, randoms: Sequence[RandomBytes]) -> list[SecAggClient]:
        signers = _signers(randoms) if consistency else [None] * num_clients
        parts = zip(residues, randoms, models(), signers)
        return [SecAggClient(i, *own, threshold=threshold) for i, own in enumerate(parts)]

    def make_server(length: int, random: RandomBytes) -> SecAggServer:
        return SecAggServer(length, random, threshold, neighbours, consistency, models())

    collusion = threshold - 1 if neighbours is None else min(threshold, neighbours) - 1
    return AggregationProtocol("secagg", quantizer, collusion, make_clients, make_server)


@dataclass(frozen=True)
class Keys(Wire):
    """The message of a client in round 0, with its public keys.

    Attributes:
        channel: Public key of its channels.
        mask: Public key from which pairwise masks are derived.
        signature: Signature of both by its identity key, empty without the consistency round.
    """

    channel: bytes
    mask: bytes
    signature: bytes


@dataclass(frozen=True)
class Shares(Wire):
    """The message of a client in round 1.

    Attributes:
        boxes: A box for every peer, with the shares for it.
        commitment: Hash of the self-mask seed.
    """

    boxes: Bytes
    commitment: bytes


@dataclass(frozen=True)
class UnmaskRequest(Wire):
    """The message of the server that asks a client for shares.

    Attributes:
        survivors: Clients that are in the sum, among the client's peers.
        dropped: Clients that dropped out, among the client's peers.
        signatures: Signatures of the survivors by client, empty without the consistency round.
    """

    survivors: tuple[int, ...]
    dropped: tuple[int, ...]
    signatures: Bytes


@dataclass(frozen=True)
class UnmaskAnswer(Wire):
    """The message of a client in the last round.

    Attributes:
        seeds: Shares of the survivors' self-mask seeds, by client.
        keys: Shares of the dropped clients' mask keys, by client.
    """

    seeds: Bytes
    keys: Bytes


@dataclass(frozen=True)
class Signer:
    """One client's identity key, and everybody's public one, from a source that the server cannot forge.

    Attributes:
        client: Number of the client.
        identity: Private identity key of the client.
        directory: Public identity key of everybody, by client.
    """

    client: int
    identity: Ed25519PrivateKey
    directory: dict[int, bytes]

    def sign(self, content: bytes) -> bytes:
        """Signs `content`, which must say what it is, as this client."""
        return self.identity.sign(f"{self.client} ".encode() + content)

    def verify(self, client: int, content: bytes, signature: bytes) -> None:
        """Raises MalformedMessage where `client` did not sign `content`."""
        if client not in self.directory:
            raise MalformedMessage(f"the signature of client {client} is of nobody")
        try:
            public = Ed25519PublicKey.from_public_bytes(self.directory[client])
            public.verify(signature, f"{client} ".encode() + content)
        except InvalidSignature:
            raise MalformedMessage(f"the signature of client {client} is wrong") from None


def _signers(randoms: Sequence[RandomBytes]) -> list[Signer]:
    """Draws an identity key for each client, and makes the directory of the public ones."""
    identities = [Ed25519PrivateKey.from_private_bytes(random(32)) for random in randoms]
    publics = [identity.public_key().public_bytes_raw() for identity in identities]
    return [Signer(i, identity, dict(enumerate(publics))) for i, identity in enumerate(identities)]


class SecAggClient(Client):
    """One client of SecAgg.

    Args:
        client: Number of the client.
        vector: Residues that the client puts into the sum, shape (p,).
        random: Source of randomness of the client.
        model: Hash of the model that the client received, or nothing.
        signer: Identity of the client for the consistency round. None leaves that round out.
        threshold: Number t of clients that must answer.
    """

    def __init__(
        self,
        client: int,
        vector: np.ndarray,
        random: RandomBytes,
        model: bytes = b"",
        signer: Signer | None = None,
        *,
        threshold: int,
    ) -> None:
        middle = () if signer is None else (self.check_consistency,)
        super().__init__(client, self.advertise_keys, self.share_keys, self.mask_input, *middle, self.unmask)
        self._vector, self._random, self._threshold = vector, random, threshold
        self._purpose = b"mask" + model
        self._signer = signer
        self._mailbox = Mailbox(client, random)
        self._mask_key = X25519PrivateKey.from_private_bytes(random(32))
        self._seed = random(32)

    @client_round
    def advertise_keys(self, message: bytes) -> bytes:
        """Round 0: sends the public keys of the client."""
        del message
        channel, mask = self._mailbox.public, self._mask_key.public_key().public_bytes_raw()
        signature = b"" if self._signer is None else self._signer.sign(_keys(channel, mask))
        self._own_keys = Keys(channel, mask, signature).to_bytes()
        return self._own_keys

    @client_round
    def share_keys(self, message: bytes) -> bytes:
        """Round 1: shares the mask key and the self-mask seed among the peers."""
        received = ByClient.from_bytes(message).contents
        keys = {client: Keys.from_bytes(data) for client, data in received.items()}
        if len(keys) < self._threshold:
            raise AggregationAborted(f"client {self._client} got {len(keys)} keys, threshold {self._threshold}")
        publics = (public for own in keys.values() for public in (own.channel, own.mask))
        require_own_keys(self._client, self._own_keys, received, publics)
        for client, theirs in keys.items():
            if self._signer is not None:
                self._signer.verify(client, _keys(theirs.channel, theirs.mask), theirs.signature)
            if client != self._client:
                both = b"".join(received[end] for end in sorted((client, self._client)))
                self._mailbox.connect(client, theirs.channel, both)
        self._peers = {client: theirs.mask for client, theirs in keys.items() if client != self._client}
        seeds = shamir.share(self._random, self._seed, self._threshold, keys)
        mask_keys = shamir.share(self._random, self._mask_key.private_bytes_raw(), self._threshold, keys)
        self._own_share = seeds[self._client]
        boxes = {peer: self._mailbox.seal(peer, seeds[peer] + mask_keys[peer]) for peer in self._peers}
        return Shares(boxes, hashlib.sha256(self._seed).digest()).to_bytes()

    @client_round
    def mask_input(self, message: bytes) -> bytes:
        """Round 2: sends the vector under a mask of its own, and one for every peer.

        Of two peers one side adds their mask, the other subtracts it.
        """
        boxes = ByClient.from_bytes(message).contents
        if len(boxes) + 1 < self._threshold:
            raise AggregationAborted(f"client {self._client} got {len(boxes)} boxes, threshold {self._threshold}")
        # Opened before anything is masked: a box that opens shows that its sender was told the same keys.
        self._held = {peer: self._mailbox.open(peer, box) for peer, box in boxes.items()}
        if wrong := [peer for peer, held in self._held.items() if len(held) != 2 * shamir.SHARE]:
            raise MalformedMessage(f"the box from client {wrong[0]} to client {self._client} holds no two shares")
        masked = self._vector + keystream(self._seed, self._vector.size)
        for peer in self._held:
            mask = keystream(agree(self._mask_key, self._peers[peer], self._purpose), self._vector.size)
            masked = masked + mask if self._client < peer else masked - mask
        return to_bytes(masked)

    @client_round
    def check_consistency(self, message: bytes) -> bytes:
        """Round 3, where there is one: signs who is in the sum."""
        assert self._signer is not None
        self._signed = self._checked(message).survivors
        return self._signer.sign(_survivors(self._signed))

    @client_round
    def unmask(self, message: bytes) -> bytes:
        """Last round: gives of every peer either the share of its seed or that of its mask key, never of both."""
        request = self._checked(message)
        if self._signer is not None:
            self._check_signatures(request)
        seeds = {peer: self._held[peer][: shamir.SHARE] for peer in sorted(request.survivors) if peer != self._client}
        keys = {peer: self._held[peer][shamir.SHARE :] for peer in sorted(request.dropped)}
        return UnmaskAnswer({**seeds, self._client: self._own_share}, keys).to_bytes()

    def _checked(self, message: bytes) -> UnmaskRequest:
        """Reads the server's request; refuses one with unknown or contradictory clients or too few survivors."""
        request = UnmaskRequest.from_bytes(message)
        survivors, dropped = set(request.survivors), set(request.dropped)
        if both := survivors & dropped:
            raise MalformedMessage(f"client {min(both)} is named as a survivor and as dropped")
        if unknown := (survivors | dropped) - set(self._held) - {self._client}:
            raise MalformedMessage(f"client {min(unknown)} shared no keys with client {self._client}")
        if self._client not in survivors or len(survivors) < self._threshold:
            raise AggregationAborted(f"survivors must be {self._threshold} clients and the asked, got {len(survivors)}")
        return request

    def _check_signatures(self, request: UnmaskRequest) -> None:
        """Refuses a request whose survivors the client did not sign, or that too few survivors signed."""
        assert self._signer is not None
        if request.survivors != self._signed or len(request.signatures) < self._threshold:
            raise AggregationAborted(f"client {self._client} signed other survivors, or too few signed")
        for client, signature in request.signatures.items():
            if client not in request.survivors:
                raise MalformedMessage(f"client {client} signed and is no survivor")
            self._signer.verify(client, _survivors(request.survivors), signature)


# What an identity key signs begins with what it is, so that a signature of keys is never one of survivors.
def _keys(channel: bytes, mask: bytes) -> bytes:
    """Returns what an identity key signs to vouch for two public keys."""
    return b"keys " + channel + mask


def _survivors(clients: tuple[int, ...]) -> bytes:
    """Returns what an identity key signs to vouch for who is in the sum."""
    return b"survivors " + ",".join(map(str, clients)).encode()


class SecAggServer(Server):
    """The server of SecAgg, which takes the masks off the sum.

    `_peers` says among whom each client masks and shares, itself included. `_models` holds the hash of the model that
    each client was sent.

    Args:
        length: Length p of the vectors.
        random: Source of randomness, which orders the circle of neighbours.
        threshold: Number t of clients that must answer.
        neighbours: Number of other clients with which a client masks and shares, or None for every other client.
        consistency: Whether there is a consistency round.
        models: Hash of the model that each client received, or nothing.
    """

    def __init__(
        self,
        length: int,
        random: RandomBytes,
        threshold: int,
        neighbours: int | None,
        consistency: bool,
        models: Sequence[bytes],
    ) -> None:
        super().__init__(len(models))
        self._length, self._random, self._threshold, self._neighbours = length, random, threshold, neighbours
        self._models = tuple(models)
        middle = (self.forward_signatures,) if consistency else ()
        self.rounds = (self.send_keys, self.send_boxes, self.send_survivors, *middle, self.recover_sum)

    @server_round
    def send_keys(self, answers: Bytes) -> Bytes:
        """Round 0: sends each client the public keys of its peers."""
        self._keys = {client: Keys.from_bytes(data) for client, data in answers.items()}
        self._peers = graph(self._random, sorted(answers), self._neighbours)
        self._check(set(answers), set(answers), "with keys")
        return {
            client: ByClient({peer: answers[peer] for peer in peers}).to_bytes()
            for client, peers in self._peers.items()
        }

    @server_round
    def send_boxes(self, answers: Bytes) -> Bytes:
        """Round 1: sends each client the boxes for it."""
        self._shares = {client: Shares.from_bytes(data) for client, data in answers.items()}
        for client, shares in self._shares.items():
            if set(shares.boxes) != self._peers[client] - {client}:
                raise MalformedMessage(f"client {client} sent boxes for others than its peers")
        self._check(set(answers), set(answers), "with shares")

        def boxes_for(client: int) -> ByClient:
            senders = [peer for peer in self._peers[client] if peer in self._shares and peer != client]
            return ByClient({sender: self._shares[sender].boxes[client] for sender in senders})

        return {client: boxes_for(client).to_bytes() for client in answers}

    @server_round
    def send_survivors(self, answers: Bytes) -> Bytes:
        """Round 2: tells each client who of its peers is in the sum, and who dropped out."""
        self._masked = {client: words(data, self._length) for client, data in answers.items()}
        self.uploads, self.contributors = self._masked, tuple(answers)
        self._check(set(answers), set(answers), "with a masked input")
        return {client: self._request(client, {}).to_bytes() for client in answers}

    @server_round
    def forward_signatures(self, answers: Bytes) -> Bytes:
        """Round 3, where there is one: sends each client the signatures of the survivors."""
        self._check(set(answers), set(answers), "with a signature")
        return {client: self._request(client, answers).to_bytes() for client in answers}

    @server_round
    def recover_sum(self, answers: Bytes) -> Bytes:
        """Last round: takes the self masks of the survivors off, and the masks of those that dropped out."""
        self._check(set(self._shares), set(answers), "unmasking")
        unmasked = {client: UnmaskAnswer.from_bytes(data) for client, data in answers.items()}
        seed_shares = {holder: answer.seeds for holder, answer in unmasked.items()}
        key_shares = {holder: answer.keys for holder, answer in unmasked.items()}
        # All secrets first: where one is wrong there is no part of a sum.
        seeds = {client: self._seed_of(client, seed_shares) for client in self._masked}
        mask_keys = {client: self._mask_key_of(client, key_shares) for client in set(self._shares) - set(self._masked)}
        total = np.zeros(self._length, np.uint32)
        for client, masked in self._masked.items():
            total += masked - keystream(seeds[client], self._length)
        for client, mask_key in mask_keys.items():
            for peer in self._peers[client] & set(self._masked):
                mask = keystream(agree(mask_key, self._keys[peer].mask, b"mask" + self._models[peer]), self._length)
                total = total - mask if peer < client else total + mask
        self.total = total
        return {}

    def _seed_of(self, client: int, shares: dict[int, Bytes]) -> bytes:
        """Recombines the self-mask seed of a client; raises AggregationAborted where it breaks the commitment."""
        seed = self._recombine(client, shares)
        if hashlib.sha256(seed).digest() != self._shares[client].commitment:
            raise AggregationAborted(f"the shares of client {client}'s seed do not fit its commitment")
        return seed

    def _mask_key_of(self, client: int, shares: dict[int, Bytes]) -> X25519PrivateKey:
        """Recombines the mask key of a client; raises AggregationAborted where its public key is another."""
        mask_key = X25519PrivateKey.from_private_bytes(self._recombine(client, shares))
        if mask_key.public_key().public_bytes_raw() != self._keys[client].mask:
            raise AggregationAborted(f"the shares of client {client}'s mask key do not fit its public key")
        return mask_key

    def _check(self, whose: set[int], answered: set[int], step: str) -> None:
        """Checks that every client of `whose` has `threshold` answers from among its peers and itself."""
        require(len(answered), self._threshold, step)
        for client in whose:
            require(len(self._peers[client] & answered), self._threshold, f"{step} among the peers of client {client}")

    def _request(self, client: int, signatures: Bytes) -> UnmaskRequest:
        """Makes the request to one client: who of its peers survived, who dropped out, and who signed."""
        shared = self._peers[client] & set(self._shares)
        survivors = sorted(shared & set(self._masked))
        return UnmaskRequest(tuple(survivors), tuple(sorted(shared - set(self._masked))), signatures)

    def _recombine(self, client: int, shares: dict[int, Bytes]) -> bytes:
        """Recombines a secret of one client from the shares of its peers; raises AggregationAborted where it fails."""
        try:
            return shamir.recombine(
                {holder: held[client] for holder, held in shares.items() if client in held}, self._threshold
            )
        except ValueError as error:
            raise AggregationAborted(f"client {client}: {error}") from None


def graph(random: RandomBytes, clients: Sequence[int], neighbours: int | None) -> dict[int, set[int]]:
    """Finds out who masks and shares with whom, each client among its own peers.

    Args:
        random: Source of randomness, which orders the circle.
        clients: Numbers of the clients that advertised keys.
        neighbours: Number of neighbours, an even number: half of them are on each side of the circle. None stands for
            everybody.

    Returns:
        The set of peers of each client, itself included.

    Examples:
        >>> import os
        >>> from gia_jax.secure_aggregation.secagg import graph
        >>> [len(peers) for peers in graph(os.urandom, range(6), neighbours=2).values()]
        [3, 3, 3, 3, 3, 3]
    """
    if neighbours is None or neighbours >= len(clients):
        return {client: set(clients) for client in clients}
    # A random order: sorted by 16 random bytes each.
    order = sorted(clients, key={client: random(16) for client in clients}.__getitem__)
    near = range(-(neighbours // 2), neighbours // 2 + 1)
    return {client: {order[(i + j) % len(order)] for j in near} for i, client in enumerate(order)}
