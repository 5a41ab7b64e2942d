"""Diagnosis of one update: what it gives away, what was done to it, and which attacks can work on it, or why not.

It sees what an attacker sees, never the truth. Every test uses something that holds for each gradient of a softmax
cross-entropy, or compares the update with those of the assumed client on random inputs:

* the gradients of the last layer add up to 0 over the classes, which noise and most rounding break;
* a class outside of the batch has a last bias gradient >= 0, and a mean loss has negative ones of at least -1 in all;
* the gradient of a dense layer has no larger rank than the batch has examples, for each local step;
* a kernel in front of normalisation by its own outputs' statistics is orthogonal to its gradient, channel by channel.

It is a driver: it compiles what it computes at the guesses, and all else is NumPy on the host.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core as jex_core
from jaxtyping import Array, Float, Key, PRNGKeyArray

from gia_jax import _check
from gia_jax.attacks.linear import NEGLIGIBLE
from gia_jax.attacks.rank_analysis import LayerRank, counted_ranks, rank_analysis
from gia_jax.base import Batch, ClientFn, LabelFn, Observation, Params, Updates
from gia_jax.labels import ClassifierFn, Dense, bias_counts, column_minimum, idlg, ilrg, llg
from gia_jax.labels.classifier import MARGIN
from gia_jax.matching.adaptive import zeroed_features
from gia_jax.models.functional import ApplyFn, has_batch_norm
from gia_jax.models.network import Network
from gia_jax.precision import is_floating
from gia_jax.sweep.study import RUN_ONCE

NUM_GUESSES = 4
VERDICTS = ("exact", "likely", "possible", "unlikely", "impossible")
LEAST_ENTRIES = 8  # a tensor, or a set of levels, with fewer proves nothing
MAX_BITS = 16
MAX_STEPS = 512  # of one rounding step: float32 cannot tell more of them apart
ROUND = 2e-5  # how near a norm must be to a number of two digits
# Operations with a kink, or with a jump in their first derivative.
KINKED = frozenset(("max", "min", "abs", "sign", "clamp", "floor", "ceil", "round", "sort", "select_n"))
KINKED_OVER_AN_AXIS = frozenset(("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "cummax"))
# Functions without a kink that are computed by way of a maximum or a choice.
SMOOTH = frozenset(
    ("softplus", "logaddexp", "softmax", "log_softmax", "logsumexp", "silu", "swish", "gelu", "log_sigmoid")
)

Leaves = dict[str, np.ndarray]


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
        attack: Its name in `gia_jax.cli.names.ATTACKS`, or "levenberg_marquardt" for idlg with that solver.
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


class _Setting(NamedTuple):
    """What the verdicts use beside the facts: grants, and whether computation is in float64."""

    has_statistics: bool
    is_wide: bool
    network_problem: str | None


class _Layer(NamedTuple):
    """A dense layer, or its gradient, on the host in float64."""

    kernel: np.ndarray
    bias: np.ndarray | None


def diagnose(
    observation: Observation,
    client_fn: ClientFn,
    *,
    key: PRNGKeyArray,
    classifier_fn: ClassifierFn | None = None,
    apply_fn: ApplyFn | None = None,
    first_layer_fn: ClassifierFn | None = None,
    network: Network | None = None,
    module: nnx.Module | None = None,
    num_classes: int | None = None,
    rank_budget: int = 2**24,
) -> Diagnosis:
    """Tells what an update gives away, what was done to it, and which attacks can work on it.

    Threat model: what it reads is the observation and public things, as an attack does. What is not given is not
    looked at, and the report says so.

    Args:
        observation: What the attacker has. Its leaves must be concrete.
        client_fn: Client that the attacker assumes, `(params, batch) -> update`, without the defenses that are to be
            found out. It is called on random inputs of the granted shape.
        key: Random key of the guesses, the attacker's own.
        classifier_fn: Picks the last layer, such as `labels.dense("head")`.
        apply_fn: Forward pass `(params, inputs) -> logits`. Its operations tell whether the network is smooth.
        first_layer_fn: Picks a dense layer that sees the example, such as `labels.dense("dense0")`.
        network: Description of the network, for R-GAP.
        module: Module of the network; it only tells whether the network has batch normalisation.
        num_classes: Number of classes; by default that of the last layer, or of the outputs of `apply_fn`.
        rank_budget: Largest number of entries of the derivative, unknowns times parameters, for which its rank is
            computed, at least 0. It costs a pass through the client for each unknown.

    Returns:
        The diagnosis. An update that cannot be read, with a NaN or of another structure than the parameters, is said to
        be one in `problems`.

    Raises:
        ValueError: If the observation is traced, a number is out of range, or a path of a layer does not exist.

    Examples:
        A linear classifier gives its one example away, and the label with it:

        >>> import jax
        >>> from flax import nnx
        >>> from gia_jax import Batch, ThreatModel, clients, labels, metrics, models, observe
        >>> apply_fn, params = models.functional(models.MLP((4,), 3, hidden=(), rngs=nnx.Rngs(0)))
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> batch = Batch(jax.numpy.ones((1, 4)), jax.numpy.array([2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> head = labels.dense("head")
        >>> found = metrics.diagnose(
        ...     seen, client_fn, key=jax.random.key(1), classifier_fn=head, apply_fn=apply_fn, first_layer_fn=head
        ... )
        >>> found.labels, found.rank, found.attacks[0].attack, found.attacks[0].verdict
        ((2,), 4, 'linear', 'exact')
        >>> print(found.lines()[0])
        equations: 15 of 15 entries are not 0, for 4 unknowns and 1 label
    """
    _check.integer(0, rank_budget=rank_budget)
    if num_classes is not None:
        _check.integer(num_classes=num_classes)
    if not _check.is_concrete(observation):
        raise ValueError("observation must be concrete, got traced arrays: diagnose is called outside of jit")
    facts = _basic_facts(observation)
    setting = _Setting("statistics" in observation.extra, jnp.result_type(float) == jnp.float64, None)
    if facts.problems:
        return facts._replace(attacks=_verdicts(facts, setting))
    if apply_fn is not None and facts.batch_shape is not None:
        facts = facts._replace(kinks=_kinks(apply_fn, observation))
    if num_classes is None:
        num_classes = _num_classes(observation, classifier_fn, apply_fn)
    key_guess, key_labels, key_rank, key_network = jax.random.split(key, 4)
    guesses, note = _guesses(client_fn, observation, num_classes, key_guess)
    facts = _add_notes(facts, [note, *_missing(classifier_fn, apply_fn)])
    facts = _treatment_facts(facts, observation, guesses, classifier_fn)
    facts = _head_facts(facts, observation, guesses, classifier_fn, first_layer_fn)
    facts = _normalization_facts(facts, observation, guesses, module)
    facts = _label_facts(facts, observation, classifier_fn, apply_fn, key_labels)
    facts = _first_layer_facts(facts, observation, first_layer_fn)
    if guesses:
        facts = _rank_facts(facts, observation, client_fn, num_classes, key_rank, rank_budget)
    if network is not None and facts.batch_shape is not None:
        ranks, problem = _layer_ranks(network, observation.params, facts.batch_shape[1:], key_network)
        facts, setting = facts._replace(layer_ranks=ranks), setting._replace(network_problem=problem)
    return facts._replace(attacks=_verdicts(facts, setting))


# What is counted.


def _named(tree: Updates) -> Leaves:
    """Returns the leaves in float64 by their key paths."""
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree.leaves_with_path(tree)}


def _norm(leaves: Iterable[np.ndarray]) -> float:
    """Returns the L2 norm of all leaves together."""
    return math.sqrt(sum(float(np.vdot(leaf, leaf)) for leaf in leaves))


def _basic_facts(observation: Observation) -> Diagnosis:
    """Returns what can be counted, and whether the update can be read."""
    like = observation.extra.get("inputs_like")
    shape = None if like is None else tuple(like.shape)
    try:
        _check.same_structure("update", observation.update, "params", observation.params)
        _check.finite("update", observation.update)
        _check.finite("params", observation.params)
    except ValueError as error:
        return Diagnosis(problems=(str(error),), batch_shape=shape)
    leaves = _named(observation.update)
    tensors = tuple(_tensor(name, leaf) for name, leaf in leaves.items())
    size = sum(found.size for found in tensors)
    nonzero = size - sum(found.num_zeros for found in tensors)
    return Diagnosis(
        problems=() if nonzero else ("the update is zero in every entry",),
        batch_shape=shape,
        num_parameters=size,
        num_nonzero=nonzero,
        num_unknowns=None if shape is None else math.prod(shape),
        num_label_unknowns=0 if shape is None or "labels" in observation.extra else shape[0],
        norm=_norm(leaves.values()),
        tensors=tensors,
    )


def _tensor(name: str, leaf: np.ndarray) -> Tensor:
    """Counts zeros, magnitudes and signs of one tensor."""
    shown = leaf[leaf != 0]
    one_sided = shown.size > 1 and bool(np.all(shown > 0) or np.all(shown < 0))
    return Tensor(name, leaf.size, leaf.size - shown.size, np.unique(np.abs(shown)).size, one_sided)


def _add_notes(facts: Diagnosis, notes: Iterable[str | None]) -> Diagnosis:
    """Returns the facts with the notes that there are."""
    return facts._replace(notes=facts.notes + tuple(note for note in notes if note))


def _missing(classifier_fn: ClassifierFn | None, apply_fn: ApplyFn | None) -> list[str | None]:
    """Returns what cannot be looked at for want of an argument."""
    return [
        "labels, the scale and the sign of the loss: classifier_fn is not given" if classifier_fn is None else None,
        "whether the network is smooth: apply_fn is not given" if apply_fn is None else None,
    ]


# What the assumed client sends at guesses.


def _num_classes(observation: Observation, classifier_fn: ClassifierFn | None, apply_fn: ApplyFn | None) -> int | None:
    """Returns the number of classes of the last layer, or of the outputs; None where neither is known."""
    if classifier_fn is not None:
        return classifier_fn(observation.params).kernel.shape[1]
    like = observation.extra.get("inputs_like")
    if apply_fn is None or like is None:
        return None
    outputs = jax.eval_shape(apply_fn, observation.params, like)
    return outputs.shape[-1] if hasattr(outputs, "shape") else None


def _guesses(
    client_fn: ClientFn, observation: Observation, num_classes: int | None, key: PRNGKeyArray
) -> tuple[list[Updates], str | None]:
    """Returns updates of the assumed client on random inputs, or none and why."""
    like, what = observation.extra.get("inputs_like"), "the assumed client at guesses"
    if like is None:
        return [], f"{what}: the shape of the batch is not granted"
    if not is_floating(like):
        return [], f"{what}: the inputs are {like.dtype}"
    labels = observation.extra.get("labels")
    if labels is None and num_classes is None:
        return [], f"{what}: give num_classes, or classifier_fn"
    keys = jax.random.split(key, NUM_GUESSES)
    try:
        guesses = _simulated(client_fn, num_classes, observation.params, like, labels, keys)
        _check.same_structure("client_fn's update", guesses[0], "params", observation.params)
    except (ValueError, TypeError) as error:
        return [], f"{what}: client_fn says {error}"
    if not all(np.isfinite(leaf).all() for guess in guesses for leaf in _named(guess).values()):
        return [], f"{what}: its updates are not finite"
    return guesses, None


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=RUN_ONCE)
def _simulated(
    client_fn: ClientFn, num_classes: int | None, params: Params, like: Array, labels: Any, keys: Key[Array, " n"]
) -> list[Updates]:
    """Returns the update of one guess for each key."""
    stacked = jax.lax.map(lambda key: client_fn(params, _guess(num_classes, like, labels, key)), keys)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(len(keys))]


def _guess(num_classes: int | None, like: Array, labels: Any, key: PRNGKeyArray) -> Batch:
    """Returns standard normal inputs with the labels granted, or with random ones."""
    key_inputs, key_labels = jax.random.split(key)
    if labels is None and num_classes is not None:
        labels = jax.random.randint(key_labels, like.shape[:1], 0, num_classes)
    return Batch(jax.random.normal(key_inputs, like.shape, like.dtype), labels)


def _rank_facts(
    facts: Diagnosis,
    observation: Observation,
    client_fn: ClientFn,
    num_classes: int | None,
    key: PRNGKeyArray,
    budget: int,
) -> Diagnosis:
    """Adds the rank of the derivative of the shared entries by the inputs, at a guess."""
    size = (facts.num_unknowns or 0) * facts.num_parameters
    if size > budget:
        return _add_notes(facts, [f"the rank of the derivative: {size:,} entries are more than rank_budget={budget:,}"])
    like, labels = observation.extra["inputs_like"], observation.extra.get("labels")
    try:
        derivative = _derivative(client_fn, num_classes, observation.params, like, labels, key)
    except (ValueError, TypeError) as error:
        return _add_notes(facts, [f"the rank of the derivative: client_fn says {error}"])
    shown = np.concatenate([leaf.ravel() != 0 for leaf in _named(observation.update).values()])
    values = np.linalg.svd(np.asarray(derivative, np.float64)[:, shown], compute_uv=False)
    return facts._replace(rank=int(np.sum(values > 30 * float(jnp.finfo(derivative.dtype).eps) * values[0])))


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=RUN_ONCE)
def _derivative(
    client_fn: ClientFn, num_classes: int | None, params: Params, like: Array, labels: Any, key: PRNGKeyArray
) -> Float[Array, "n p"]:
    """Returns the derivative of the update by each of the inputs at a guess."""
    guess = _guess(num_classes, like, labels, key)

    def update_of(inputs: Array) -> Array:
        update = client_fn(params, guess._replace(inputs=inputs.reshape(like.shape)))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(update)])

    _, push = jax.linearize(update_of, guess.inputs.ravel())
    return jax.lax.map(push, jnp.eye(like.size, dtype=like.dtype))


# What was done to the update.


def _treatment_facts(
    facts: Diagnosis, observation: Observation, guesses: list[Updates], classifier_fn: ClassifierFn | None
) -> Diagnosis:
    """Adds the treatments, and how large the noise is."""
    leaves, simulated = _named(observation.update), [_named(guess) for guess in guesses]
    natural = {name: max((float(np.mean(guess[name] == 0)) for guess in simulated), default=0.0) for name in leaves}
    head = None if classifier_fn is None else _host(classifier_fn(observation.update))
    guess_norms = tuple(_norm(guess.values()) for guess in simulated)
    half = _half(leaves, observation.update)
    found = _levels(leaves, natural) or half
    found = [*found, *_sparsity(leaves, natural, head, guesses, classifier_fn, is_rounded=bool(found))]
    equations = 1
    if all(treatment.name == "half_precision" for treatment in found):
        rounding = _rounding(observation.update, half)
        if head is not None and classifier_fn is not None and simulated:
            assumed = [_host(classifier_fn(guess)) for guess in guesses]
            weights = _host(classifier_fn(observation.params))
            found += _imbalance_treatments(head, assumed, weights, rounding)
            equations = len(head.kernel)
        elif simulated:
            found += _filled_zeros(leaves, simulated)
    found += _clipping(facts.norm, guess_norms)
    noise = next((treatment.value for treatment in found if treatment.name == "noise"), 0.0)
    ratio = _noise_ratio(noise, facts.num_parameters, facts.norm, guess_norms, equations)
    return facts._replace(treatments=tuple(found), noise_ratio=ratio, guess_norms=guess_norms)


def _host(layer: Dense) -> _Layer:
    """Returns the layer in float64 on the host."""
    bias = None if layer.bias is None else np.asarray(layer.bias, np.float64)
    return _Layer(np.asarray(layer.kernel, np.float64), bias)


def _rounding(update: Updates, half: Sequence[Treatment]) -> float:
    """Returns the unit of rounding of the coarsest type that the update has, or had before it was widened."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(update) if is_floating(leaf)]
    units = [float(jnp.finfo(leaf.dtype).eps) for leaf in leaves]
    if all(np.array_equal(leaf.astype(np.float32), leaf) for leaf in leaves):
        units.append(float(np.finfo(np.float32).eps))
    return max([*units, *(treatment.value for treatment in half)])


def _levels(leaves: Leaves, natural: dict[str, float]) -> list[Treatment]:
    """Finds updates of few different magnitudes: signs, ternary values, evenly spaced levels."""
    magnitudes = {name: np.unique(np.abs(leaf[leaf != 0])) for name, leaf in leaves.items()}
    shown = {name: np.count_nonzero(leaf) for name, leaf in leaves.items()}
    if max(shown.values()) >= LEAST_ENTRIES and all(found.size <= 1 for found in magnitudes.values()):
        size = sum(leaf.size for leaf in leaves.values())
        zeros = 1 - sum(shown.values()) / size
        usual = sum(natural[name] * leaf.size for name, leaf in leaves.items()) / size
        if zeros - usual > 0.05 and _tensor_ratio(leaves, natural) is None:
            return [Treatment("ternary", 2, f"one magnitude a tensor, and {zeros:.0%} zeros")]
        return [Treatment("sign", 0, "one magnitude a tensor")]
    tests = sum(max(found.size - 1, 0) for found in magnitudes.values())
    if tests < LEAST_ENTRIES:
        return []
    for bits in range(3, MAX_BITS + 1):
        levels = 2 ** (bits - 1) - 1
        if all(_are_whole(found / found[-1] * levels, 0.02) for found in magnitudes.values() if found.size):
            return [Treatment("quantize", bits, f"every entry is one of {2 * levels + 1} evenly spaced levels")]
    every = np.unique(np.concatenate(list(magnitudes.values())))
    gaps = np.diff(every, prepend=0)
    step = float(gaps[gaps > 1e-5 * every[-1]].min())
    if every[-1] / step <= MAX_STEPS and every.size <= sum(shown.values()) / 2 and _are_whole(every / step, 0.1):
        return [Treatment("rounded", step, f"every entry is a multiple of {step:.3g}")]
    return []


def _are_whole(values: np.ndarray, tolerance: float) -> bool:
    """Tells whether all values are integers up to the tolerance."""
    return bool(np.all(np.abs(values - np.round(values)) <= tolerance))


def _half(leaves: Leaves, update: Updates) -> list[Treatment]:
    """Finds an update whose values all are of a type of half precision; its value is the type's unit of rounding."""
    if sum(np.count_nonzero(leaf) for leaf in leaves.values()) < LEAST_ENTRIES:
        return []
    types = {leaf.dtype for leaf in jax.tree.leaves(update)}
    for dtype in (jnp.bfloat16, jnp.float16):  # float16 holds most values of bfloat16 as well
        with np.errstate(over="ignore"):
            fits = all(np.array_equal(leaf.astype(dtype).astype(np.float64), leaf) for leaf in leaves.values())
        if fits:
            name, unit = jnp.dtype(dtype).name, float(jnp.finfo(dtype).eps)
            how = "is" if types == {jnp.dtype(dtype)} else "can be written"
            return [Treatment("half_precision", unit, f"every value {how} in {name}")]
    return []


def _tensor_ratio(leaves: Leaves, natural: dict[str, float]) -> float | None:
    """Returns the ratio whose share of every tensor, rounded down, is its number of zeros; None if there is none.

    A tensor that has more zeros than that may owe them to the client, as at guesses.
    """
    zeros = {name: leaf.size - np.count_nonzero(leaf) for name, leaf in leaves.items()}
    shares = {name: zeros[name] / leaf.size for name, leaf in leaves.items()}
    high = min((zeros[name] + 1) / leaf.size for name, leaf in leaves.items())
    low = max((share for share in shares.values() if share < high), default=0.0)
    others = [name for name, share in shares.items() if share >= high]
    usual = all(natural[name] > 0 and shares[name] <= natural[name] + 0.1 for name in others)
    return _decimal(low, high) if low > 0 and usual else None


def _decimal(low: float, high: float) -> float:
    """Returns the number of fewest decimals in [low, high)."""
    for digits in range(1, 9):
        value = math.ceil(low * 10**digits - 1e-9) / 10**digits
        if value < high:
            return value
    return low


def _sparsity(
    leaves: Leaves,
    natural: dict[str, float],
    head: _Layer | None,
    guesses: list[Updates],
    classifier_fn: ClassifierFn | None,
    *,
    is_rounded: bool,
) -> list[Treatment]:
    """Finds zeros that the assumed client does not have at guesses: pruning of tensors, of all, or of features."""
    zeros = {name: leaf.size - np.count_nonzero(leaf) for name, leaf in leaves.items()}
    size = sum(leaf.size for leaf in leaves.values())
    excess = {name: zeros[name] - natural[name] * leaf.size for name, leaf in leaves.items()}
    share = sum(zeros.values()) / size
    if head is not None and classifier_fn is not None:
        assumed = [np.mean(np.asarray(zeroed_features(classifier_fn(guess).kernel))) for guess in guesses]
        rows = float(np.mean(np.all(head.kernel == 0, 1)))
        elsewhere = sum(excess.values()) - (rows - max(assumed, default=0.0)) * head.kernel.size
        if rows - max(assumed, default=0.0) > 0.05 and elsewhere <= 0.05 * size:
            return [Treatment("soteria", rows, f"{rows:.0%} of the features have no row in the last kernel's gradient")]
    if sum(excess.values()) <= 0.05 * size:
        return []
    ratio = _tensor_ratio(leaves, natural)
    if ratio is not None:
        return [Treatment("prune", ratio, "every tensor has that share of zeros, rounded down")]
    if is_rounded:
        return []  # rounding makes zeros of its own
    least = {name: np.abs(leaf[leaf != 0]) for name, leaf in leaves.items() if np.any(leaf)}
    if not any(_starts_above(values, 0.0) for values in least.values()):
        return [Treatment("sparse", share, f"{share:.1%} of the entries are 0, not the smallest ones")]
    threshold = float(min(values.min() for values in least.values()))
    if any(_starts_above(values, threshold) for values in least.values()):
        return [Treatment("prune", share, f"{share:.1%} zeros, the smallest entries of each tensor")]
    exact = _decimal(share, share + 1 / size)
    return [Treatment("top_k", exact, f"{share:.1%} zeros, no entry of any tensor is below {threshold:.3g}")]


def _starts_above(values: np.ndarray, bound: float) -> bool:
    """Tells whether values start further above the bound than their number lets one expect."""
    spread = float(np.median(values)) - bound
    return values.size > 30 and float(values.min()) - bound > 30 * spread / values.size


def _stacked(layer: _Layer) -> np.ndarray:
    """Returns the kernel with the bias, if there is one, as one more row."""
    return layer.kernel if layer.bias is None else np.vstack([layer.kernel, layer.bias[None]])


def _imbalance(layer: _Layer) -> tuple[float, float]:
    """Returns the deviation of the noise that explains rows that do not add up to 0, and the size of an entry."""
    matrix = _stacked(layer)
    deviation = math.sqrt(np.mean(np.square(matrix.sum(1))) / matrix.shape[1])
    return deviation, math.sqrt(np.mean(np.square(matrix)))


def _imbalance_treatments(head: _Layer, assumed: list[_Layer], weights: _Layer, rounding: float) -> list[Treatment]:
    """Finds noise, or a decay of weights, in rows of the last layer that do not add up to 0 as those at guesses do."""
    usual = max(deviation / size for deviation, size in map(_imbalance, assumed) if size)
    deviation, size = _imbalance(head)
    if usual > 0.01 or deviation <= max(30 * rounding, 10 * usual) * size:
        return []  # the loss is another one, or all is well
    sums, decayed = _stacked(head).sum(1), _stacked(weights).sum(1)
    factor = float(sums @ decayed) / max(float(decayed @ decayed), 1e-30)
    if np.sum(np.square(sums - factor * decayed)) < 0.01 * np.sum(np.square(sums)):
        return [Treatment("weight_decay", factor, "the rows of the last layer add up to multiples of the weights'")]
    return [
        Treatment("noise", deviation, f"the rows of the last layer do not add up to 0: {deviation / size:.2g} of it")
    ]


def _filled_zeros(leaves: Leaves, simulated: list[Leaves]) -> list[Treatment]:
    """Finds noise where zeros are gone that every guess has; a few of them may be live in the client's own update."""
    size = sum(leaf.size for leaf in leaves.values())
    of_guesses = [sum(leaf.size - np.count_nonzero(leaf) for leaf in guess.values()) / size for guess in simulated]
    left = 1 - sum(np.count_nonzero(leaf) for leaf in leaves.values()) / size
    if min(of_guesses) < 0.05 or left > 0.1 * min(of_guesses):
        return []
    zeros = [leaves[name][np.all([guess[name] == 0 for guess in simulated], 0)] for name in leaves]
    values = np.abs(np.concatenate(zeros))
    if values.size < LEAST_ENTRIES:
        return []
    deviation = float(np.quantile(values, 0.25)) / 0.3186  # of a normal distribution
    for _ in range(10):  # what is live is large, and leaves
        deviation = math.sqrt(np.mean(np.square(values[values <= 4 * deviation])))
    return [Treatment("noise", deviation, f"{min(of_guesses):.0%} zeros at every guess, and {left:.0%} here")]


def _clipping(norm: float, guess_norms: tuple[float, ...]) -> list[Treatment]:
    """Finds a norm that is a number of two digits, as clipping leaves it; this is no more than a hint."""
    rounded = float(f"{norm:.1e}")
    if abs(norm - rounded) > ROUND * norm or (guess_norms and max(guess_norms) < norm):
        return []
    return [Treatment("clip", rounded, f"a hint: the norm is {rounded:g}, a round number")]


def _noise_ratio(deviation: float, size: int, norm: float, guess_norms: tuple[float, ...], num_equations: int) -> float:
    """Returns the norm of the noise by that of the rest, which is not larger than what is left, or than at guesses."""
    noise = deviation * math.sqrt(size)
    if noise == 0:
        return 0.0
    # The noise is known up to its chance, and so is what is left.
    rest = math.sqrt(max(norm**2 - noise**2, 0) + 2 * math.sqrt(2 / num_equations) * noise**2)
    return noise / min([rest, *guess_norms])


# What the last layer says of the loss, the local steps and the labels.


def _head_facts(
    facts: Diagnosis,
    observation: Observation,
    guesses: list[Updates],
    classifier_fn: ClassifierFn | None,
    first_layer_fn: ClassifierFn | None,
) -> Diagnosis:
    """Adds the scale and the sign of the loss, and how many gradients the update is made of."""
    if classifier_fn is not None and (bias := _host(classifier_fn(observation.update)).bias) is not None and bias.any():
        facts = _loss_facts(facts, bias, _rounding(observation.update, ()))
    size = None if facts.batch_shape is None else facts.batch_shape[0]
    blurred = [found.name for found in facts.treatments if found.name not in ("clip", "noise", "half_precision")]
    if size is None or blurred or facts.noise_ratio > 0.1:
        return facts
    noise = facts.treatment("noise")
    half = facts.treatment("half_precision")
    rounding = _rounding(observation.update, [half] if half else [])
    counts = []
    for layer_fn in (classifier_fn, first_layer_fn):
        if layer_fn is None:
            continue
        kernel = _host(layer_fn(observation.update)).kernel
        limit = max([size, *(_rank(_host(layer_fn(guess)).kernel, rounding, 0.0) for guess in guesses)])
        # One less for the last layer, whose columns add up to 0.
        if min(kernel.shape[0], kernel.shape[1] - (layer_fn is classifier_fn)) > limit:
            counts.append(math.ceil(_rank(kernel, rounding, noise.value if noise else 0.0) / limit))
    if not counts:
        return facts
    several = max(counts)
    text = f"it has the rank of at least {several} gradients of {size} example{'s'[: size > 1]}"
    return facts._replace(
        num_gradients=max(several, 1), mismatches=facts.mismatches + ((text,) if several > 1 and guesses else ())
    )


def _rank(kernel: np.ndarray, rounding: float, noise: float) -> int:
    """Returns the number of singular values above rounding and noise."""
    values = np.linalg.svd(kernel, compute_uv=False)
    floor = 1.5 * noise * (math.sqrt(kernel.shape[0]) + math.sqrt(kernel.shape[1]))
    return int(np.sum(values > max(floor, 10 * rounding * math.sqrt(max(kernel.shape)) * values[0])))


def _loss_facts(facts: Diagnosis, bias: np.ndarray, rounding: float) -> Diagnosis:
    """Adds what the last bias gradient says of the sign and the scale."""
    total = float(bias.sum() / np.abs(bias).sum())
    negative = float(np.minimum(bias, 0).sum())
    facts = facts._replace(bias_sum=total, bias_negative=negative)
    noise = facts.treatment("noise")
    floor = max(4 * noise.value if noise else 0.0, 10 * rounding * float(np.abs(bias).max()))
    num_negative, num_positive = int(np.sum(bias < -floor)), int(np.sum(bias > floor))
    if facts.batch_shape is None:
        return facts
    size = facts.batch_shape[0]
    flipped = num_negative > size >= num_positive > 0
    if num_negative > size and not flipped:
        text = f"{num_negative} classes have a negative last bias gradient, more than the batch has examples"
        facts = facts._replace(mismatches=(*facts.mismatches, text))
    scale = None
    if abs(total) <= max(1e-4, 4 * rounding) and not facts.treatment("clip"):
        mass, margin = -negative, max(MARGIN, rounding)
        scale = "mean" if mass <= 1 + margin else "sum" if mass <= size + margin else "other"
    return facts._replace(is_flipped=flipped, scale=scale)


def _label_facts(
    facts: Diagnosis,
    observation: Observation,
    classifier_fn: ClassifierFn | None,
    apply_fn: ApplyFn | None,
    key: PRNGKeyArray,
) -> Diagnosis:
    """Adds the labels by every rule, and those to go by."""
    granted = observation.extra.get("labels")
    if granted is not None:
        labels = np.asarray(granted) if hasattr(granted, "ndim") else np.zeros(0)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            return facts._replace(labels_certain=True)
        known = tuple(sorted(int(label) for label in labels))
        return facts._replace(readings=(Reading("granted", known, True, ""),), labels=known, labels_certain=True)
    if classifier_fn is None or facts.batch_shape is None:
        return facts
    size, update = facts.batch_shape[0], observation.update
    factor = (-1 if facts.is_flipped else 1) / (size if facts.scale == "sum" else 1)
    if factor != 1:
        update = jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, leaf.dtype), update)
    head = _host(classifier_fn(update))
    is_drawable = is_floating(observation.extra["inputs_like"])
    counting = bias_counts(classifier_fn, apply_fn=apply_fn if is_drawable else None, key=key)
    rules: dict[str, LabelFn] = {"idlg": idlg(classifier_fn), "bias_counts": counting}
    if size > 1:
        rules = {"bias_counts": counting, "ilrg": ilrg(classifier_fn), "llg": llg(classifier_fn)}
        rules["column_minimum"] = column_minimum(classifier_fn)
    readings = tuple(_reading(name, rule, observation._replace(update=update), head) for name, rule in rules.items())
    consistent = [reading for reading in readings if reading.is_consistent]
    values = _class_values(head)
    noise = facts.treatment("noise")
    floor = 4 * noise.value if noise else 1e-6 * float(np.abs(values).max())
    certain = bool(consistent) and int(np.sum(values < -floor)) == size and (head.bias is not None or size == 1)
    return facts._replace(
        readings=readings, labels=consistent[0].labels if consistent else None, labels_certain=certain
    )


def _class_values(head: _Layer) -> np.ndarray:
    """Returns what is negative for the classes of the batch only: bias gradients, or sums over features >= 0."""
    return head.kernel.sum(0) if head.bias is None else head.bias


def _reading(rule: str, label_fn: LabelFn, observation: Observation, head: _Layer) -> Reading:
    """Applies one rule and checks what it reads."""
    try:
        labels = tuple(sorted(np.asarray(label_fn(observation)).tolist()))
    except ValueError as error:
        return Reading(rule, None, False, str(error))
    values = _class_values(head)
    counts = np.bincount(labels, minlength=len(values))
    missed = np.flatnonzero((values < -1e-4 * np.abs(values).max()) & (counts == 0)).tolist()
    if missed:
        return Reading(rule, labels, False, f"classes {missed} must be in the batch")
    if head.bias is not None and -np.minimum(head.bias, 0).sum() <= 1 + MARGIN:
        predicted = head.bias + counts / len(labels)
        if predicted.min() < -MARGIN:
            return Reading(rule, labels, False, f"class {int(predicted.argmin())} would have a negative probability")
    return Reading(rule, labels, True, "")


# What layers say of the network.


def _normalization_facts(
    facts: Diagnosis, observation: Observation, guesses: list[Updates], module: nnx.Module | None
) -> Diagnosis:
    """Adds which kernels are normalised by the statistics of their own outputs."""
    params = _named(observation.params)
    seen = _orthogonal(_named(observation.update), params)
    of_guesses = [set(_orthogonal(_named(guess), params)) for guess in guesses]
    assumed = set.intersection(*of_guesses) if of_guesses else set()
    blurred = [found.name for found in facts.treatments if found.name not in ("clip", "half_precision")]
    has_layers = module is not None and has_batch_norm(module)
    facts = facts._replace(normalized=tuple(seen))
    if seen:
        text = "it is made with the statistics of the batch, and those of the assumed client are not"
        wrong = (text,) if guesses and not assumed else ()
        return facts._replace(normalization="batch", mismatches=facts.mismatches + wrong)
    if blurred:
        return _add_notes(facts, [f"how batch normalisation works: hidden by {blurred[0]}"] if assumed else [])
    text = "it is not made with the statistics of the batch, and those of the assumed client are"
    normalization = "running" if has_layers or assumed else None if module is None else "none"
    return facts._replace(normalization=normalization, mismatches=facts.mismatches + ((text,) if assumed else ()))


def _orthogonal(update: Leaves, params: Leaves) -> list[str]:
    """Returns the names of the kernels that are orthogonal to their gradients, output by output."""
    found = []
    for name, leaf in update.items():
        if leaf.ndim < 2 or leaf.shape != params[name].shape:
            continue
        gradient, kernel = (array.reshape(-1, array.shape[-1]) for array in (leaf, params[name]))
        lengths = np.linalg.norm(gradient, axis=0) * np.linalg.norm(kernel, axis=0)
        live = lengths > 1e-6 * lengths.max()
        if np.sum(live) < 4 or len(kernel) < 4:
            continue
        cosines = np.abs(np.sum(gradient * kernel, 0)[live]) / lengths[live]
        # Of directions that have nothing to do with each other 1 in 60 is as orthogonal as this.
        if np.quantile(cosines, 0.8) < 0.02 / math.sqrt(len(kernel)):
            found.append(name)
    return found


def _first_layer_facts(facts: Diagnosis, observation: Observation, first_layer_fn: ClassifierFn | None) -> Diagnosis:
    """Adds what the first dense layer gives away."""
    shape = facts.batch_shape
    if shape is None:
        return facts
    if first_layer_fn is None:
        size = math.prod(shape[1:])
        names = [name for name, leaf in _named(observation.params).items() if leaf.ndim == 2 and len(leaf) == size]
        note = f"the first layer: first_layer_fn is not given, and {', '.join(names)} may see the example"
        return _add_notes(facts, [note if names else None])
    layer = _host(first_layer_fn(observation.update))
    rows = layer.kernel.shape[1]
    if layer.bias is None or layer.kernel.shape[0] != math.prod(shape[1:]):
        return facts._replace(first_layer=FirstLayer(False, rows, 0, 0, 0))
    usable = np.abs(layer.bias) > NEGLIGIBLE * np.abs(layer.bias).max()
    quotients = (layer.kernel[:, usable] / layer.bias[usable]).T
    tolerance = max(
        1e-3, 4 * _rounding(observation.update, [t for t in facts.treatments if t.name == "half_precision"])
    )
    agreeing, isolated = _agreement(quotients, tolerance)
    return facts._replace(first_layer=FirstLayer(True, rows, int(usable.sum()), agreeing, min(isolated, shape[0])))


def _agreement(rows: np.ndarray, tolerance: float) -> tuple[int, int]:
    """Returns how many rows agree with another one, and on how many different vectors; of 2,048 rows at most."""
    rows = rows[:2_048]
    squares = np.sum(np.square(rows), 1)
    distances = squares[:, None] + squares[None] - 2 * rows @ rows.T
    agree = (distances <= tolerance**2 * np.minimum(squares[:, None], squares[None])) & (squares > 0)
    left, agreeing, groups = np.ones(len(rows), bool), 0, 0
    while left.any():
        sizes = np.where(left, np.sum(agree & left, 1), 0)
        largest = int(np.argmax(sizes))
        if sizes[largest] < 2:
            break
        agreeing, groups = agreeing + int(sizes[largest]), groups + 1
        left &= ~agree[largest]
    return agreeing, groups


def _layer_ranks(
    network: Network, params: Params, input_shape: tuple[int, ...], key: PRNGKeyArray
) -> tuple[tuple[LayerRank, ...], str | None]:
    """Returns the ranks of R-GAP's constraints, or their bounds without float64, and what is wrong with the network."""
    try:
        if jnp.result_type(float) != jnp.float64:
            return tuple(counted_ranks(network, input_shape)), None
        return rank_analysis(network, params, input_shape, key=key), None
    except ValueError as error:
        return (), str(error)


def _kinks(apply_fn: ApplyFn, observation: Observation) -> tuple[str, ...]:
    """Returns the names of the operations of the forward pass that have a kink."""
    jaxpr = jax.make_jaxpr(apply_fn)(observation.params, observation.extra["inputs_like"]).jaxpr
    return tuple(sorted(_kinked_operations(jaxpr)))


def _kinked_operations(jaxpr: jex_core.Jaxpr) -> set[str]:
    """Returns the names of the operations with a kink, in the functions called inside as well."""
    found: set[str] = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        called = str(equation.params.get("name", "")).strip("_")
        dtype = getattr(equation.outvars[0].aval, "dtype", jnp.dtype(bool)) if equation.outvars else jnp.dtype(bool)
        if name in KINKED | KINKED_OVER_AN_AXIS and jnp.issubdtype(dtype, jnp.floating):
            found.add(name)
        elif called not in SMOOTH:
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    found |= _kinked_operations(getattr(inner, "jaxpr", inner))
    return found


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jex_core.Jaxpr | jex_core.ClosedJaxpr)


# What follows for the attacks.


def _verdicts(facts: Diagnosis, setting: _Setting) -> tuple[Verdict, ...]:
    """Returns the attacks in the order of what is to be expected of them."""
    judges: dict[str, Callable[[Diagnosis, _Setting], tuple[str, str]]] = {
        "linear": _judge_linear,
        "r_gap": _judge_r_gap,
        "levenberg_marquardt": _judge_levenberg_marquardt,
        "inverting_gradients": _judge_inverting_gradients,
        "idlg": _judge_euclidean,
        "dlg": _judge_dlg,
        "grad_inversion": _judge_grad_inversion,
        "gias": _judge_gias,
    }
    found = []
    from gia_jax.cli.names import ATTACKS

    for name in [*judges, *(other for other in ATTACKS if other not in judges)]:
        if facts.problems:
            found.append(Verdict(name, "impossible", facts.problems[0]))
        elif facts.num_unknowns is None:
            found.append(Verdict(name, "impossible", "the shape of the batch is not granted"))
        else:
            judge = judges.get(name, lambda *_: ("possible", "it is not looked at here"))
            found.append(Verdict(name, *judge(facts, setting)))
    return tuple(sorted(found, key=lambda verdict: VERDICTS.index(verdict.verdict)))


def _worst(*judgements: tuple[str, str]) -> tuple[str, str]:
    """Returns the worst verdict with all the reasons for it, the first one's where all are alike."""
    worst = max((verdict for verdict, _ in judgements), key=VERDICTS.index)
    return worst, "; ".join(reason for verdict, reason in judgements if verdict == worst)


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
    return 0 if facts.batch_shape is None else facts.batch_shape[0]


def _with_labels(facts: Diagnosis) -> tuple[str, str]:
    """Returns what the labels let an attack expect that needs them."""
    if facts.labels_certain:
        return "likely", "the labels are known"
    if facts.labels is not None:
        return "likely" if _size(facts) == 1 else "possible", "labels that fit are read, others may fit as well"
    return "unlikely", "no rule reads labels that fit"


def _judge_linear(facts: Diagnosis, setting: _Setting) -> tuple[str, str]:
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


def _judge_r_gap(facts: Diagnosis, setting: _Setting) -> tuple[str, str]:
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


def _judge_euclidean(facts: Diagnosis, setting: _Setting) -> tuple[str, str]:
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


def _judge_dlg(facts: Diagnosis, setting: _Setting) -> tuple[str, str]:
    judged = _judge_euclidean(facts._replace(labels_certain=True), setting)
    verdict = max(judged[0], "possible", key=VERDICTS.index)
    return verdict, judged[1] if verdict == judged[0] else "it searches for the labels as well"


def _judge_levenberg_marquardt(facts: Diagnosis, setting: _Setting) -> tuple[str, str]:
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


def _judge_inverting_gradients(facts: Diagnosis, setting: _Setting) -> tuple[str, str]:
    reasons = [*_matching(facts, by_direction=True), _with_labels(facts)]
    if _size(facts) > 1:
        reasons.append(("possible" if _size(facts) <= 8 else "unlikely", f"a batch of {_size(facts)}"))
    verdict, reason = _worst(*reasons)
    if verdict == "likely":
        reason = "directions are compared, so that the scale does not matter, and the labels are read"
    return verdict, reason


def _judge_grad_inversion(facts: Diagnosis, setting: _Setting) -> tuple[str, str]:
    reasons = [*_matching(facts), _with_labels(facts), ("possible", "its seeds and statistics")]
    if facts.normalization in (None, "none") and not setting.has_statistics:
        reasons.append(("unlikely", "no batch normalisation is seen, whose statistics are its prior"))
    elif not setting.has_statistics:
        reasons.append(("possible", "the statistics of the batch are not granted: it takes those of the network"))
    return _worst(*reasons)


def _judge_gias(facts: Diagnosis, setting: _Setting) -> tuple[str, str]:
    return _worst(*_matching(facts), _with_labels(facts), ("possible", "it needs a generator of such images"))


# The report.


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
