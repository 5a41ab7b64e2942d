"""Clients with any number of defenses, by the names of these, and what an attacker does who knows the defenses.

`parse` reads the names and settings (`parts`), and `protect` builds the client of them, which is a `Protected`
(`client`). What its attacker assumes is in `attacker`, and what its noise promises in `guarantees`.
"""

from gia_jax.defenses.protected.client import Protected, encoded, protect
from gia_jax.defenses.protected.guarantees import CANDIDATES, live_shares, promises
from gia_jax.defenses.protected.parts import COMBINATIONS, DEFENSES, NAMES, Named, Part, check_together, parse

__all__ = [
    "CANDIDATES",
    "COMBINATIONS",
    "DEFENSES",
    "NAMES",
    "Named",
    "Part",
    "Protected",
    "check_together",
    "encoded",
    "live_shares",
    "parse",
    "promises",
    "protect",
]
