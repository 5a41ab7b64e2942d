"""Clients: what a participant of federated learning computes from the server's parameters and its own data."""

from gia_jax.clients.averaging import federated_averaging
from gia_jax.clients.gradient import parameter_gradient
from gia_jax.clients.nodes import node_cross_entropy
from gia_jax.clients.sgd import binary_cross_entropy, cross_entropy, federated_sgd, per_example, squared_error
from gia_jax.clients.unknown import UnknownClient, with_unknown
from gia_jax.clients.vertical import quadrants, vertical_model, vertical_sgd

__all__ = [
    "UnknownClient",
    "binary_cross_entropy",
    "cross_entropy",
    "federated_averaging",
    "federated_sgd",
    "node_cross_entropy",
    "parameter_gradient",
    "per_example",
    "quadrants",
    "squared_error",
    "vertical_model",
    "vertical_sgd",
    "with_unknown",
]
