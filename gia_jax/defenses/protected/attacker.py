"""What an attacker does who knows the defenses of a client, but not its random key."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from gia_jax.base import ObjectiveFn
from gia_jax.defenses.protected.parts import NOISE, UNBIASED, ZEROING, Part
from gia_jax.matching import adaptive
from gia_jax.matching.objectives import euclidean, l1, selected


class Reading(NamedTuple):
    """What an attacker does who knows the defenses of the update.

    Attributes:
        simulated: Defenses that it applies to its own update.
        adapt_fn: Function that changes its objective.
    """

    simulated: Sequence[Part]
    adapt_fn: Callable[[ObjectiveFn], ObjectiveFn]


def reading_of(parts: Sequence[Part]) -> Reading | None:
    """Returns what an attacker does who knows the defenses, or None if they are not modelled, as `protect` explains.

    Args:
        parts: Defenses of the client, without those whose settings make them none.

    Returns:
        What the attacker simulates and compares by.
    """
    drawn_first = [part for part in parts if part.name == "dpsgd" and part.settings["noise_multiplier"] > 0]
    chain = drawn_first + [part for part in parts if part.acts_on == "update"]
    names = {part.name for part in chain}
    if "sign" in names:
        if names.intersection(NOISE):
            return None
        makes_zeros = any(part.name in ZEROING for part in parts)
        hinge = adaptive.sign_hinge(zero_weight=0.0 if makes_zeros else 1.0)
        return Reading((), lambda _: hinge)
    first = next((i for i, part in enumerate(chain) if part.name in UNBIASED), len(chain))
    drawn = {part.name for part in chain[first:]}
    if not drawn:
        # The support is read from the update: a pruning of its own would hide entries that are to grow.
        if names.intersection(("prune", "topk")):
            return Reading((), lambda objective_fn: adaptive.rescaled(adaptive.pruned(objective_fn)))
        return Reading((), adaptive.rescaled if "clip" in names else _unchanged)
    if not drawn.issubset(UNBIASED):
        return None
    if drawn == {"laplace"}:
        return Reading(chain[:first], lambda _: adaptive.relative(l1))
    if drawn.intersection(("gaussian", "laplace")):
        return Reading(chain[:first], lambda _: adaptive.relative(euclidean))
    return Reading(chain[:first], _unchanged)


def _unchanged(objective_fn: ObjectiveFn) -> ObjectiveFn:
    return objective_fn


def adapted(parts: Sequence[Part], reading: Reading | None, head: str, objective_fn: ObjectiveFn) -> ObjectiveFn:
    """Changes an objective to that of an attacker who knows the defenses.

    Args:
        parts: Defenses of the client, without those whose settings make them none.
        reading: What the attacker makes of the defenses of the update. None if they are not modelled.
        head: Name of the last layer, a key of the parameters.
        objective_fn: Objective of an attacker who does not know the defenses.

    Returns:
        The objective.
    """
    names = {part.name for part in parts}
    changed = objective_fn if reading is None else reading.adapt_fn(objective_fn)
    if "soteria" in names:
        if any(part.name in UNBIASED and part.acts_on == "update" for part in parts):
            changed = selected(changed, lambda path: f"['{head}']" not in path)
        elif names.intersection(("prune", "topk")):
            changed = adaptive.supported(changed, among=lambda path: f"['{head}']" in path)
        else:
            changed = adaptive.supported(changed)
    if "precode" in names:
        changed = selected(changed, lambda path: "features" in path)
    return changed
