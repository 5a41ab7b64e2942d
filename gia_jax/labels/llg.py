"""The label rules of Wainakh et al., User-Level Label Leakage from Gradients (LLG), PETS 2022."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, LabelFn, Observation
from gia_jax.labels.classifier import (
    ClassifierFn,
    attackers_key,
    batch_size,
    check_dummies,
    dummy_inputs,
    greedy_labels,
    last_gradient,
    of_mean_loss,
)


def llg(classifier_fn: ClassifierFn) -> LabelFn:
    """Builds LLG: labels from the sums G_c of the rows of the last layer's gradient, knowing only the gradient.

    For a batch of B examples and a model of C classes, one example of class c is taken to add
    m = (1 + 1 / C) / B * (sum of the negative G_c) to G_c. Every class of negative G_c gets a label, and then always
    the most negative one (algorithm 1). The rule is right for distinct labels of few of the classes in an untrained
    network with features of at least 0. Duplicates are approximate, and a trained network's predictions bias them.

    Args:
        classifier_fn: Function that picks the last layer, such as `dense("head")`. It needs no bias.

    Returns:
        The rule, a function `(observation) -> labels`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> batch = Batch(jnp.ones((2, 3)), jnp.array([3, 1]))
        >>> params = {"head": {"kernel": jnp.zeros((3, 5))}}
        >>> observation = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> sorted(labels.llg(labels.dense("head"))(observation).tolist())
        [1, 3]
    """

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        sums, size = jnp.sum(last_gradient(classifier_fn, observation.update).kernel, 0), batch_size(observation)
        impact = (1 + 1 / sums.shape[0]) / size * jnp.sum(jnp.minimum(sums, 0))
        return greedy_labels(sums, impact, jnp.zeros(()), size)

    return label_fn


def llg_plus(
    client_fn: ClientFn, classifier_fn: ClassifierFn, *, num_dummies: int = 16, key: PRNGKeyArray | None = None
) -> LabelFn:
    """Builds LLG+, the rule `llg` with the impact of a label and the offsets of the classes measured on random inputs.

    The impact m is the mean over classes of what a dummy batch of one class adds to its own G_c per example. The offset
    s_c is G_c of a dummy batch of all the other classes, taken off before the second stage (section 4.2, white box).

    Args:
        client_fn: Function `(params, batch) -> update`, the client that the attacker simulates.
        classifier_fn: Function that picks the last layer, such as `dense("head")`. It needs no bias.
        num_dummies: Number of standard normal inputs for the impact of each class, at least 1.
        key: Key of the attacker's own randomness, for the random inputs. None derives a key from the bits of the
            observed update.

    Returns:
        The rule, a function `(observation) -> labels`. It raises ValueError where the gradient of the last bias, if
        there is one, is not that of a mean loss. Inside of a trace the gradient is known too late to raise, and the
        labels are -1.

    Raises:
        ValueError: If `num_dummies` is no positive integer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> apply_fn = lambda params, inputs: jax.nn.relu(inputs) @ params["head"]["kernel"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> batch = Batch(jnp.ones((2, 3)), jnp.array([3, 1]))
        >>> params = {"head": {"kernel": jnp.zeros((3, 5))}}
        >>> observation = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> sorted(labels.llg_plus(client_fn, labels.dense("head"), num_dummies=4)(observation).tolist())
        [1, 3]
    """
    _check.integer(num_dummies=num_dummies)

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        size = batch_size(observation)
        check_dummies(observation, num_dummies)
        sums = jnp.sum(last_gradient(classifier_fn, observation.update).kernel, 0)
        sums = of_mean_loss("llg_plus", classifier_fn, observation, sums)
        classes = sums.shape[0]
        own_key = attackers_key(key, observation)

        def row_sums(key: Array, labels: Array) -> Array:
            inputs = dummy_inputs(key, observation, labels.shape[0])
            update = client_fn(observation.params, Batch(inputs, labels))
            return jnp.sum(last_gradient(classifier_fn, update).kernel, 0)

        def of_class(c: Array) -> tuple[Array, Array]:
            key_own, key_others = jax.random.split(jax.random.fold_in(own_key, c))
            own = row_sums(key_own, jnp.full(num_dummies, c))[c]
            others = row_sums(key_others, (c + 1 + jnp.arange(classes - 1)) % classes)[c]
            return own, others

        impacts, offsets = jax.lax.map(of_class, jnp.arange(classes))
        impact = jnp.mean(impacts) * (1 + 1 / classes) / size
        return greedy_labels(sums, impact, offsets, size)

    return label_fn
