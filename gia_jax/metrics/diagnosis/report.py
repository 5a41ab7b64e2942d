"""The nouns of a diagnosis: what it says of an update, and the words of its report."""

from collections.abc import Iterable
from typing import NamedTuple

from gia_jax.attacks.rank_analysis import LayerRank

VERDICTS = ("exact", "likely", "possible", "unlikely", "impossible")


class Tensor(NamedTuple):
    """What is seen of one tensor of the update.

    Attributes:
        name: Its key path, such as "['head']['bias']".
        size: Number of entries.
        num_zeros: Number of entries that are exactly 0.
        num_magnitudes: Number of different magnitudes among the others.
        is_one_sided: Whether there are at least two entries that are not 0, and all of them have one sign.
    """

    name: str
    size: int
    num_zeros: int
    num_magnitudes: int
    is_one_sided: bool


class Treatment(NamedTuple):
    """Something that was done to the update before it was shared.

    Attributes:
        name: "prune" (of each tensor), "top_k" (of all together), "sparse" (zeros by another rule), "soteria", "sign",
            "ternary", "quantize", "rounded", "half_precision", "noise", "weight_decay" or "clip".
        value: The estimate of its parameter: the share of zeros, the number of bits, the step of the rounding, the
            unit of rounding of half precision, the standard deviation of the noise, the factor of the weights, or the
            norm; 0 where it has none.
        reason: How it shows.
    """

    name: str
    value: float
    reason: str


class Reading(NamedTuple):
    """Labels by one rule.

    Attributes:
        rule: Name of the rule in `gia_jax.labels`, or "granted".
        labels: The labels in ascending order, or None where the rule refused.
        is_consistent: Whether these labels could have made the gradient of the last layer.
        reason: Why they could not, or what the rule said.
    """

    rule: str
    labels: tuple[int, ...] | None
    is_consistent: bool
    reason: str


class FirstLayer(NamedTuple):
    """What the first dense layer gives away.

    Attributes:
        sees_example: Whether its input has the size of an example, and it has a bias.
        num_rows: Number of its outputs.
        num_usable: Number of rows with a bias gradient that is not negligible.
        num_agreeing: Number of these whose quotients, kernel by bias gradient, agree with that of another row.
        num_isolated: Number of different inputs on which rows agree, at most the size of the batch.
    """

    sees_example: bool
    num_rows: int
    num_usable: int
    num_agreeing: int
    num_isolated: int


class Verdict(NamedTuple):
    """What to expect of one attack.

    Attributes:
        attack: Name of the attack, such as "inverting_gradients", or "levenberg_marquardt" for idlg with that solver.
        verdict: "exact" (in closed form), "likely", "possible", "unlikely" or "impossible".
        reason: Why.
    """

    attack: str
    verdict: str
    reason: str


class Diagnosis(NamedTuple):
    """What an update gives away. `str` of it is a report, whose lines `lines` returns.

    Attributes:
        problems: What keeps the update from being read at all, such as a NaN; then the rest is empty.
        notes: What could not be looked at, and why.
        batch_shape: Shape (b, *d) of the inputs, or None where it is not granted.
        num_parameters: Number of entries of the update.
        num_nonzero: Number of those that are not 0: equations that an attacker has.
        num_unknowns: Number of entries of the inputs, or None where their shape is not granted.
        num_label_unknowns: Number of labels that are not granted.
        rank: Rank of the derivative of the shared entries by the inputs at a random guess; None if it was not computed.
        norm: L2 norm of the update.
        guess_norms: L2 norms of the updates of the assumed client on random inputs.
        tensors: What is seen of each tensor.
        treatments: What was done to the update.
        noise_ratio: L2 norm of the noise by that of the rest of the update, estimated; 0 where none is seen.
        bias_sum: Sum of the last bias gradient by the sum of its magnitudes: 0 for softmax cross-entropy.
        bias_negative: Sum of its negative entries: at least -1 for a mean loss.
        is_flipped: Whether the update has the sign of a step (new minus old), not of a gradient.
        scale: "mean", "sum" (over the batch), "other" (a factor beyond that), or None where it cannot be told.
        num_gradients: Least number of gradients of the batch, such as local steps, that the update is made of; None
            where it cannot be told.
        normalized: Names of the kernels that are orthogonal to their gradients, channel by channel: they are
            normalised by the statistics of their own outputs.
        normalization: "batch" (statistics), "running" (statistics), "none", or None where it cannot be told.
        mismatches: In what the update differs from those of the assumed client.
        kinks: Names of the operations of the network that have a kink; None where `apply_fn` is not given.
        readings: Labels by every rule that applies.
        labels: The labels granted, or the first ones read that are consistent; None where there are none.
        labels_certain: Whether no other labels could have made this gradient, or they are granted.
        first_layer: What the first dense layer gives away; None where it is not known.
        layer_ranks: The layers as `attacks.rank_analysis` judges them for R-GAP, or the upper bounds of
            `counted_ranks` without float64; empty where no network is described.
        attacks: The attacks, the most promising one first.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    batch_shape: tuple[int, ...] | None = None
    num_parameters: int = 0
    num_nonzero: int = 0
    num_unknowns: int | None = None
    num_label_unknowns: int = 0
    rank: int | None = None
    norm: float = 0.0
    guess_norms: tuple[float, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    treatments: tuple[Treatment, ...] = ()
    noise_ratio: float = 0.0
    bias_sum: float | None = None
    bias_negative: float | None = None
    is_flipped: bool = False
    scale: str | None = None
    num_gradients: int | None = None
    normalized: tuple[str, ...] = ()
    normalization: str | None = None
    mismatches: tuple[str, ...] = ()
    kinks: tuple[str, ...] | None = None
    readings: tuple[Reading, ...] = ()
    labels: tuple[int, ...] | None = None
    labels_certain: bool = False
    first_layer: FirstLayer | None = None
    layer_ranks: tuple[LayerRank, ...] = ()
    attacks: tuple[Verdict, ...] = ()

    def treatment(self, *names: str) -> Treatment | None:
        """Returns the first treatment of one of these names, or None."""
        return next((found for found in self.treatments if found.name in names), None)

    def lines(self) -> list[str]:
        """Writes the report, a fact a line, and the attacks last."""
        facts = [f"problem: {text}" for text in self.problems] if self.problems else _fact_lines(self)
        attacks = [f"{i}. {found.attack}: {found.verdict}, {found.reason}" for i, found in enumerate(self.attacks, 1)]
        return [*facts, *(f"not looked at: {text}" for text in self.notes), "attacks:", *attacks]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def add_notes(facts: Diagnosis, notes: Iterable[str | None]) -> Diagnosis:
    """Returns the facts with the notes that there are."""
    return facts._replace(notes=facts.notes + tuple(note for note in notes if note))


def _fact_lines(facts: Diagnosis) -> list[str]:
    """Writes the facts, a line each."""
    found = [_equation_line(facts)]
    if facts.rank is not None:
        found.append(f"rank: the shared entries fix {facts.rank} of {facts.num_unknowns} unknowns at a random guess")
    if facts.guess_norms:
        low, high = min(facts.guess_norms), max(facts.guess_norms)
        found.append(f"norm: {facts.norm:.4g}, of the assumed client at guesses {low:.4g} to {high:.4g}")
    else:
        found.append(f"norm: {facts.norm:.4g}")
    zeros = [tensor.name for tensor in facts.tensors if tensor.num_zeros == tensor.size]
    partly = [
        f"{tensor.name} {tensor.num_zeros / tensor.size:.1%}"
        for tensor in facts.tensors
        if 0 < tensor.num_zeros < tensor.size
    ]
    one_sided = [tensor.name for tensor in facts.tensors if tensor.is_one_sided]
    found += [f"tensors that are 0: {', '.join(zeros)}"] if zeros else []
    found += [f"shares of zeros: {', '.join(partly)}"] if partly else []
    found += [f"tensors of one sign: {', '.join(one_sided)}"] if one_sided else []
    found += [f"done to it: {t.name}{f' {t.value:.4g}' if t.value else ''}, {t.reason}" for t in facts.treatments]
    if not facts.treatments:
        found.append("done to it: nothing is seen")
    if facts.noise_ratio:
        found.append(f"noise: {facts.noise_ratio:.3g} of the norm of the rest")
    return [*found, *_loss_lines(facts), *_network_lines(facts), *_label_lines(facts)]


def _equation_line(facts: Diagnosis) -> str:
    """Writes how many equations there are for how many unknowns."""
    line = f"equations: {facts.num_nonzero:,} of {facts.num_parameters:,} entries are not 0"
    if facts.num_unknowns is None:
        return f"{line}, for a batch of unknown shape"
    line += f", for {facts.num_unknowns:,} unknowns"
    count = facts.num_label_unknowns
    return line + (f" and {count} label{'s'[: count > 1]}" if count else "")


def _loss_lines(facts: Diagnosis) -> list[str]:
    """Writes what the last layer says of the loss and the steps."""
    found = []
    if facts.bias_sum is not None:
        found.append(
            f"last bias: adds up to {facts.bias_sum:.1g} of its magnitudes, its negative entries to "
            f"{facts.bias_negative:.4g}"
        )
    if facts.is_flipped:
        found.append("sign: that of a step (new minus old), not of a gradient")
    scales = {"mean": "of a mean loss", "sum": "of a sum over the batch", "other": "more than a sum over the batch"}
    found += [f"scale: {scales[facts.scale]}"] if facts.scale else []
    if facts.num_gradients is not None:
        several = facts.num_gradients > 1
        found.append(f"gradients: {f'at least {facts.num_gradients}' if several else 'one is enough'}, by rank")
    return [*found, *(f"against the assumed client: {text}" for text in facts.mismatches)]


def _network_lines(facts: Diagnosis) -> list[str]:
    """Writes what is known of the network."""
    found = []
    if facts.kinks is not None:
        found.append(f"network: {'kinks at ' + ', '.join(facts.kinks) if facts.kinks else 'smooth'}")
    if facts.normalization is not None:
        kernels = f", kernels {', '.join(facts.normalized)}" if facts.normalized else ""
        words = {"none": "none", "batch": "by the statistics of the batch", "running": "not by those of the batch"}
        found.append(f"batch normalisation: {words[facts.normalization]}{kernels}")
    if facts.first_layer is not None:
        layer = facts.first_layer
        found.append(
            f"first layer: {layer.num_usable} of {layer.num_rows} rows have a bias gradient, "
            f"{layer.num_agreeing} agree, on {layer.num_isolated} input{'s'[: layer.num_isolated != 1]}"
        )
    return found


def _label_lines(facts: Diagnosis) -> list[str]:
    """Writes the labels by each rule."""
    found = []
    for reading in facts.readings:
        labels = "none" if reading.labels is None else ", ".join(map(str, reading.labels))
        found.append(f"labels by {reading.rule}: {labels}" + (f" ({reading.reason})" if reading.reason else ""))
    if facts.labels is not None:
        found.append(f"labels to go by: {'certain' if facts.labels_certain else 'consistent, others may be too'}")
    return found
