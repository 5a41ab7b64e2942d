"""What follows from a diagnosis for each attack: whether it can work on the update, or why not."""

from collections.abc import Callable
from typing import NamedTuple

from gia_jax.metrics.diagnosis.report import VERDICTS, Diagnosis, Verdict

# What an attacker who knows a treatment minimises, by the name of the treatment: functions of `gia_jax.matching`.
OBJECTIVES = {
    "prune": "adaptive.pruned",
    "top_k": "adaptive.pruned",
    "sparse": "adaptive.supported",
    "soteria": "adaptive.supported",
    "sign": "adaptive.sign_hinge",
    "ternary": "adaptive.rounding_likelihood",
    "quantize": "adaptive.rounding_likelihood",
    "rounded": "adaptive.relative",
    "noise": "adaptive.relative(euclidean)",
    "clip": "adaptive.rescaled",
}


class Setting(NamedTuple):
    """What the verdicts use beside the facts: grants, whether computation is in float64, and what keeps R-GAP and APRIL
    from inverting the network.
    """

    has_statistics: bool
    is_wide: bool
    network_problem: str | None
    tokens_problem: str | None


def _worst(*judgements: tuple[str, str]) -> tuple[str, str]:
    """Returns the worst verdict with all the reasons for it, the first one's where all are alike."""
    worst = max((verdict for verdict, _ in judgements), key=VERDICTS.index)
    return worst, "; ".join(reason for verdict, reason in judgements if verdict == worst)


def _matching(facts: Diagnosis, *, by_direction: bool = False) -> list[tuple[str, str]]:
    """Returns what holds for every attack that simulates the client, or for one that compares directions only."""
    found = []
    if facts.is_flipped:
        found.append(("impossible", "the update has the sign of a step: negate it first"))
    if facts.noise_ratio > 30:
        found.append(("impossible", f"the noise has {facts.noise_ratio:.0f} times the norm of the gradient"))
    elif facts.noise_ratio > 1:
        found.append(("unlikely", f"the noise has {facts.noise_ratio:.1f} times the norm of the gradient"))
    found += [("unlikely", f"the update is not the assumed client's: {text}") for text in facts.mismatches]
    if any("the inputs are" in note for note in facts.notes):
        found.append(("impossible", "the inputs are integers: attack their embeddings"))
    for treatment in facts.treatments:
        is_mild = treatment.name == "noise" and facts.noise_ratio < 0.01
        is_unseen = treatment.name == "clip" and by_direction
        if treatment.name in OBJECTIVES and not is_mild and not is_unseen:
            objective = OBJECTIVES[treatment.name]
            found.append(("possible", f"with the objective of an attacker that knows {treatment.name}: {objective}"))
    if facts.rank is not None and facts.num_unknowns is not None and facts.rank < facts.num_unknowns:
        found.append(("possible", f"the update fixes {facts.rank} of {facts.num_unknowns} unknowns, a prior the rest"))
    elif facts.num_unknowns is not None and facts.num_nonzero < facts.num_unknowns:
        found.append(("possible", f"{facts.num_nonzero} equations for {facts.num_unknowns} unknowns, a prior the rest"))
    return found


def _size(facts: Diagnosis) -> int:
    """Returns the number of examples, or 0 where it is not granted."""
    return 0 if facts.batch_shape is None else facts.batch_shape[0]


def _with_labels(facts: Diagnosis) -> tuple[str, str]:
    """Returns what the labels let an attack expect that needs them."""
    if facts.labels_certain:
        return "likely", "the labels are known"
    if facts.labels is not None:
        return "likely" if _size(facts) == 1 else "possible", "labels that fit are read, others may fit as well"
    if not facts.readings:
        return "possible", "the labels were not looked for: that takes classifier_fn"
    return "unlikely", "no rule reads labels that fit"


def _judge_linear(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges the analytic inversion of a first layer that is fully connected."""
    layer, size = facts.first_layer, _size(facts)
    if layer is None:
        return "impossible", "no dense first layer is known"
    if not layer.sees_example:
        return "impossible", "the first layer does not see the example, or has no bias"
    if layer.num_usable == 0:
        return "impossible", "no row of the first layer has a bias gradient"
    rows = f"{layer.num_agreeing} of {layer.num_rows} rows agree"
    if layer.num_isolated >= size or (size == 1 and layer.num_usable == layer.num_rows == 1):
        return "exact", f"the first layer sees the example, and {rows}" + (f" on {size} examples" if size > 1 else "")
    if layer.num_isolated:
        return "possible", f"{rows}: {layer.num_isolated} of {size} examples have rows of their own"
    cause = facts.treatment("noise", "prune", "top_k", "sparse", "sign", "ternary", "quantize", "rounded")
    why = f", because of {cause.name}" if cause else ": each mixes examples"
    return "unlikely", f"no two of {layer.num_usable} rows agree{why}"


def _judge_r_gap(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges R-GAP, which solves one layer after the other."""
    if setting.network_problem is not None:
        return "impossible", setting.network_problem
    if not facts.layer_ranks:
        return "impossible", "the network is not described layer by layer"
    if _size(facts) != 1:
        return "impossible", f"it inverts one example, and the batch has {_size(facts)}"
    short = next((found for found in facts.layer_ranks if found.rank < found.unknowns), None)
    if short is not None:
        return "impossible", f"layer {short.name} has constraints of rank {short.rank} on {short.unknowns} values"
    spoiled = [found for found in facts.treatments if found.name != "half_precision"]
    if spoiled or facts.mismatches or facts.is_flipped or facts.scale not in (None, "mean"):
        cause = spoiled[0].name if spoiled else "its sign, scale or several steps"
        return "unlikely", f"its equations hold for the gradient itself, and the update is changed by {cause}"
    if not setting.is_wide:
        return "possible", "it needs float64, and then rank_analysis tells"
    return "exact", "the constraints of every layer have the rank of its unknowns"


def _judge_april(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges APRIL's closed form, whose equations hold whatever the sign and the scale of the gradient."""
    if setting.tokens_problem is not None:
        return "impossible", setting.tokens_problem
    spoiled = [found.name for found in facts.treatments if found.name not in ("half_precision", "clip")]
    if spoiled or facts.mismatches:
        cause = spoiled[0] if spoiled else "several steps or another client"
        return "unlikely", f"its equations hold for the gradient itself, and the update is changed by {cause}"
    if not setting.is_wide:
        return "possible", "it needs float64: of patches that are alike float32 leaves little"
    return "exact", "its equations hold for an image that the attacker drew"


def _judge_euclidean(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges iDLG, which compares gradients by their Euclidean distance."""
    reasons = [*_matching(facts), _with_labels(facts)]
    if facts.kinks:
        reasons.append(("unlikely", f"L-BFGS stops at the network's kinks ({', '.join(facts.kinks)})"))
    if facts.scale in ("sum", "other"):
        reasons.append(("unlikely", "Euclidean distances need the scale of a mean loss: divide the update first"))
    if _size(facts) > 1:
        reasons.append(("possible" if _size(facts) <= 8 else "unlikely", f"a batch of {_size(facts)}"))
    if facts.kinks is None:
        reasons.append(("possible", "if the network is smooth"))
    return _worst(*reasons)


def _judge_dlg(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges DLG and MAGIA, which are iDLG that searches for the labels as well."""
    judged = _judge_euclidean(facts._replace(labels_certain=True), setting)
    verdict = max(judged[0], "possible", key=VERDICTS.index)
    return verdict, judged[1] if verdict == judged[0] else "it searches for the labels as well"


def _judge_levenberg_marquardt(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges iDLG with the solver of Levenberg and Marquardt."""
    reasons = [_judge_euclidean(facts, setting)]
    if facts.kinks:
        return _worst(("unlikely", f"the network is not smooth ({', '.join(facts.kinks)})"), *_matching(facts))
    if _size(facts) > 1:
        reasons.append(("unlikely", f"it is for one example, and the batch has {_size(facts)}"))
    if facts.noise_ratio or any(found.name != "clip" for found in facts.treatments):
        reasons.append(("unlikely", "the update is not exact"))
    if not setting.is_wide:
        reasons.append(("possible", "it needs float64"))
    verdict, reason = _worst(*reasons)
    if verdict == "likely":
        reason = f"a smooth network, one example, {facts.num_nonzero} equations for {facts.num_unknowns} unknowns"
    return verdict, reason


def _judge_inverting_gradients(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges Inverting Gradients, which compares directions."""
    reasons = [*_matching(facts, by_direction=True), _with_labels(facts)]
    if _size(facts) > 1:
        reasons.append(("possible" if _size(facts) <= 8 else "unlikely", f"a batch of {_size(facts)}"))
    verdict, reason = _worst(*reasons)
    if verdict == "likely":
        reason = "directions are compared, so that the scale does not matter, and the labels are read"
    return verdict, reason


def _judge_fedleak(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges FedLeak, which compares a part of the gradient."""
    found = _judge_inverting_gradients(facts, setting)
    return _worst(found, ("possible", "it compares the largest entries of the gradient alone"))


def _judge_grad_inversion(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges GradInversion, which also matches the statistics of batch normalisation."""
    reasons = [*_matching(facts), _with_labels(facts), ("possible", "its seeds and statistics")]
    if facts.normalization in (None, "none") and not setting.has_statistics:
        reasons.append(("unlikely", "no batch normalisation is seen, whose statistics are its prior"))
    elif not setting.has_statistics:
        reasons.append(("possible", "the statistics of the batch are not granted: it takes those of the network"))
    return _worst(*reasons)


def _judge_gias(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges GIAS, which searches the latents of a generator."""
    return _worst(*_matching(facts), _with_labels(facts), ("possible", "it needs a generator of such images"))


def _judge_sme(facts: Diagnosis, setting: Setting) -> tuple[str, str]:
    """Judges SME, which takes the change of several local steps for one gradient, at a model in between."""
    # That the update is of several steps is what it is for, and no mismatch.
    own = facts._replace(mismatches=()) if (facts.num_gradients or 0) > 1 else facts
    reasons = [*_matching(own, by_direction=True), _with_labels(facts)]
    return _worst(*reasons, ("possible", "it is for several local steps, and needs the scale of their change"))


# Attacks with the same verdict are reported in this order.
JUDGES: dict[str, Callable[[Diagnosis, Setting], tuple[str, str]]] = {
    "linear": _judge_linear,
    "r_gap": _judge_r_gap,
    "april": _judge_april,
    "levenberg_marquardt": _judge_levenberg_marquardt,
    "inverting_gradients": _judge_inverting_gradients,
    "idlg": _judge_euclidean,
    "dlg": _judge_dlg,
    "magia": _judge_dlg,
    "fedleak": _judge_fedleak,
    "grad_inversion": _judge_grad_inversion,
    "gias": _judge_gias,
    "sme": _judge_sme,
}
JUDGED = tuple(JUDGES)  # the attacks, and idlg with the solver levenberg_marquardt


def judge_attacks(facts: Diagnosis, setting: Setting) -> tuple[Verdict, ...]:
    """Returns a verdict on every attack, the most promising one first."""
    found = []
    for name, judge in JUDGES.items():
        if facts.problems:
            found.append(Verdict(name, "impossible", facts.problems[0]))
        elif facts.num_unknowns is None:
            found.append(Verdict(name, "impossible", "the shape of the batch is not granted"))
        else:
            found.append(Verdict(name, *judge(facts, setting)))
    return tuple(sorted(found, key=lambda verdict: VERDICTS.index(verdict.verdict)))
