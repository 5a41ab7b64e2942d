"""Diagnosis of one update: what it gives away, what was done to it, and which attacks can work on it, or why not.

It sees what an attacker sees, never the truth. Every test uses something that holds for each gradient of a softmax
cross-entropy, or compares the update with those of the assumed client on random inputs:

* the gradients of the last layer add up to 0 over the classes, which noise and most rounding break;
* a class outside of the batch has a last bias gradient >= 0, and a mean loss has negative ones of at least -1 in all;
* the gradient of a dense layer has no larger rank than the batch has examples, for each local step;
* a kernel in front of normalisation by its own outputs' statistics is orthogonal to its gradient, channel by channel.

It is a driver: it compiles what it computes at the guesses, and all else is NumPy on the host.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.attacks.april import LayersFn
from gia_jax.base import ClientFn, Observation
from gia_jax.labels import ClassifierFn
from gia_jax.metrics.diagnosis.arrays import l2_norm, named_leaves
from gia_jax.metrics.diagnosis.guesses import count_classes, guessed_updates, rank_facts
from gia_jax.metrics.diagnosis.last_layer import head_facts, label_facts
from gia_jax.metrics.diagnosis.layers import (
    constraint_ranks,
    find_kinks,
    first_layer_facts,
    normalization_facts,
    tokens_problem,
)
from gia_jax.metrics.diagnosis.report import (
    VERDICTS,
    Diagnosis,
    FirstLayer,
    Reading,
    Tensor,
    Treatment,
    Verdict,
    add_notes,
)
from gia_jax.metrics.diagnosis.treatments import treatment_facts
from gia_jax.metrics.diagnosis.verdicts import JUDGED, Setting, judge_attacks
from gia_jax.models.functional import ApplyFn
from gia_jax.models.network import Network

__all__ = [
    "JUDGED",
    "VERDICTS",
    "Diagnosis",
    "FirstLayer",
    "Reading",
    "Tensor",
    "Treatment",
    "Verdict",
    "diagnose",
]


def diagnose(
    observation: Observation,
    client_fn: ClientFn,
    *,
    key: PRNGKeyArray,
    classifier_fn: ClassifierFn | None = None,
    apply_fn: ApplyFn | None = None,
    first_layer_fn: ClassifierFn | None = None,
    network: Network | None = None,
    token_layers_fn: LayersFn | None = None,
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
        token_layers_fn: Picks the layers of a vision transformer that APRIL reads, such as one of
            `attacks.TokenLayers.named`.
        module: Module of the network; it only tells whether the network has batch normalisation.
        num_classes: Number of classes; by default that of the last layer, or of the outputs of `apply_fn`.
        rank_budget: Largest number of entries of the derivative, unknowns times parameters, for which its rank is
            computed, at least 0. It costs a pass through the client for each unknown.

    Returns:
        The diagnosis. An update that cannot be read, with a NaN or of another structure than the parameters, is said to
        be one in `problems`.

    Raises:
        ValueError: If the observation is traced, its inputs are a tree, a number is out of range, or a path of a layer
            does not exist.

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
    if "inputs_like" in observation.extra:
        _check.one_array("observation.extra['inputs_like']", observation.extra["inputs_like"])
    facts = _basic_facts(observation)
    setting = Setting("statistics" in observation.extra, jnp.result_type(float) == jnp.float64, None, None)
    if facts.problems:
        return facts._replace(attacks=judge_attacks(facts, setting))
    if apply_fn is not None and facts.batch_shape is not None:
        facts = facts._replace(kinks=find_kinks(apply_fn, observation))
    if num_classes is None:
        num_classes = count_classes(observation, classifier_fn, apply_fn)
    key_guess, key_labels, key_rank, key_network = jax.random.split(key, 4)
    if facts.batch_shape is not None:
        problem = tokens_problem(client_fn, observation, token_layers_fn, jax.random.fold_in(key_network, 1))
        setting = setting._replace(tokens_problem=problem)
    guesses, note = guessed_updates(client_fn, observation, num_classes, key_guess)
    facts = add_notes(facts, [note, *_missing(classifier_fn, apply_fn)])
    facts = treatment_facts(facts, observation, guesses, classifier_fn)
    facts = head_facts(facts, observation, guesses, classifier_fn, first_layer_fn)
    facts = normalization_facts(facts, observation, guesses, module)
    facts = label_facts(facts, observation, classifier_fn, apply_fn, key_labels)
    facts = first_layer_facts(facts, observation, first_layer_fn)
    if guesses:
        facts = rank_facts(facts, observation, client_fn, num_classes, key_rank, rank_budget)
    if network is not None and facts.batch_shape is not None:
        ranks, problem = constraint_ranks(network, observation.params, facts.batch_shape[1:], key_network)
        facts, setting = facts._replace(layer_ranks=ranks), setting._replace(network_problem=problem)
    return facts._replace(attacks=judge_attacks(facts, setting))


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
    leaves = named_leaves(observation.update)
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
        norm=l2_norm(leaves.values()),
        tensors=tensors,
    )


def _tensor(name: str, leaf: np.ndarray) -> Tensor:
    """Counts zeros, magnitudes and signs of one tensor."""
    shown = leaf[leaf != 0]
    one_sided = shown.size > 1 and bool(np.all(shown > 0) or np.all(shown < 0))
    return Tensor(name, leaf.size, leaf.size - shown.size, np.unique(np.abs(shown)).size, one_sided)


def _missing(classifier_fn: ClassifierFn | None, apply_fn: ApplyFn | None) -> list[str | None]:
    """Returns what cannot be looked at for want of an argument."""
    return [
        "labels, the scale and the sign of the loss: classifier_fn is not given" if classifier_fn is None else None,
        "whether the network is smooth: apply_fn is not given" if apply_fn is None else None,
    ]
