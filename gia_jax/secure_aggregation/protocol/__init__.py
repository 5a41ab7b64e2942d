"""What every aggregation protocol is, how one round of it is run, and what the server ends up holding.

A protocol makes its clients and its server (`parties`). They add residues, integers modulo a number (`residues`), and
`aggregate` carries their messages (`run`).
"""

from gia_jax.secure_aggregation.protocol.parties import (
    AggregationProtocol,
    Client,
    Server,
    client_round,
    require,
    require_own_keys,
    server_round,
)
from gia_jax.secure_aggregation.protocol.residues import (
    decode,
    divided,
    modular_sum,
    quantized,
    require_residues,
    to_bytes,
    words,
)
from gia_jax.secure_aggregation.protocol.run import SERVER, Message, ServerView, aggregate, aggregate_residues, exchange

__all__ = [
    "SERVER",
    "AggregationProtocol",
    "Client",
    "Message",
    "Server",
    "ServerView",
    "aggregate",
    "aggregate_residues",
    "client_round",
    "decode",
    "divided",
    "exchange",
    "modular_sum",
    "quantized",
    "require",
    "require_own_keys",
    "require_residues",
    "server_round",
    "to_bytes",
    "words",
]
