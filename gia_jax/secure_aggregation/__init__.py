"""Secure aggregation: the server learns a sum of updates, and of each client only masked or encrypted bytes.

It needs the extra `secure`, and BFV and CKKS need the extra `he`. All parties run in this process, but each is given
only its own input and bytes. Secrets come from the operating system.

A client answers every round once, in order, and nothing more after an error. A message that was changed on its way ends
the run with `AggregationAborted`, or leaves the sum as it is. The exception is a client's own upload that travels as a
vector or as a homomorphic ciphertext: no party can tell that it was changed, and the sum changes with it.
"""

from gia_jax.secure_aggregation import limits
from gia_jax.secure_aggregation.errors import AggregationAborted, MalformedMessage
from gia_jax.secure_aggregation.fastsecagg import UnluckyDropouts, fastsecagg, fft_sharing
from gia_jax.secure_aggregation.homomorphic import homomorphic
from gia_jax.secure_aggregation.lightsecagg import lightsecagg
from gia_jax.secure_aggregation.observe import Ciphertext, observe
from gia_jax.secure_aggregation.plain import plain_sum
from gia_jax.secure_aggregation.protocol import (
    AggregationProtocol,
    Message,
    ServerView,
    aggregate,
    aggregate_residues,
    quantized,
)
from gia_jax.secure_aggregation.quantization import Quantizer
from gia_jax.secure_aggregation.secagg import secagg
from gia_jax.secure_aggregation.sharing import Sharing, packed_shamir
from gia_jax.secure_aggregation.weighted import WeightedMean, weighted_mean

__all__ = [
    "AggregationAborted",
    "AggregationProtocol",
    "Ciphertext",
    "MalformedMessage",
    "Message",
    "Quantizer",
    "ServerView",
    "Sharing",
    "UnluckyDropouts",
    "WeightedMean",
    "aggregate",
    "aggregate_residues",
    "fastsecagg",
    "fft_sharing",
    "homomorphic",
    "lightsecagg",
    "limits",
    "observe",
    "packed_shamir",
    "plain_sum",
    "quantized",
    "secagg",
    "weighted_mean",
]
