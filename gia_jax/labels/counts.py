"""Label rules that count classes from the gradient of the last bias, grad b_c = mean_j (p_jc - 1[y_j = c]).

Here p_jc is the probability that the model predicts for class c of example j, y_j the label of the example, B the size
of the batch, C the number of classes, and n_c how often class c occurs among the labels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import LabelFn, Observation, Params, Scalar
from gia_jax.labels.classifier import (
    ClassifierFn,
    attackers_key,
    batch_size,
    bias_gradient,
    check_dummies,
    dummy_inputs,
    greedy_labels,
    labels_from_counts,
    of_mean_loss,
)
from gia_jax.matching.initializations import as_granted
from gia_jax.models.functional import ApplyFn
from gia_jax.precision import cast_like, widened, widened_tree


def bias_counts(
    classifier_fn: ClassifierFn,
    *,
    apply_fn: ApplyFn | None = None,
    num_dummies: int = 128,
    public_inputs: Float[Array, "n *d"] | None = None,
    key: PRNGKeyArray | None = None,
) -> LabelFn:
    """Builds the rule that counts classes in closed form, n_c = B (p_c - grad b_c), rounded to integers of sum B.

    The mean prediction p is the only unknown. It is 1 / C in a network that has learned nothing, or what the network
    predicts for random inputs, or for public ones of the client's kind. The rule is exact where the guess of p is off
    by less than 1 / (2 B). An error of p_c in a trained network counts B times. The rule works for any batch size and
    for duplicates.

    Args:
        classifier_fn: Function that picks the last layer, which must have a bias, such as `dense("head")`.
        apply_fn: Function `(params, inputs) -> logits` that estimates p on standard normal inputs. None takes p = 1 /
            C.
        num_dummies: Number of random inputs for that estimate, at least 1.
        public_inputs: Inputs of shape (n, *d) for that estimate in place of random ones, for an attacker that has some
            of the client's kind. They are auxiliary data, to be named with the threat model. None draws random ones.
        key: Key of the attacker's own randomness, for the random inputs. None derives a key from the bits of the
            observed update.

    Returns:
        The rule, a function `(observation) -> labels`. It raises ValueError where there is no bias, or where its
        gradient is not that of a mean loss. Inside of a trace the gradient is known too late to raise, and the labels
        are -1.

    Raises:
        ValueError: If `num_dummies` is no positive integer, or `public_inputs` are empty or given without `apply_fn`.

    Examples:
        A network of zeros predicts 1 / C, so that even duplicates are counted exactly:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"] + params["head"]["bias"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> params = {"head": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> batch = Batch(jnp.ones((4, 2)), jnp.array([2, 0, 2, 2]))
        >>> observation = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> sorted(labels.bias_counts(labels.dense("head"))(observation).tolist())
        [0, 2, 2, 2]
    """
    _check.integer(num_dummies=num_dummies)
    if public_inputs is not None and apply_fn is None:
        raise ValueError("apply_fn must be given with public_inputs, got None")
    mean_fn = None if apply_fn is None else _mean_prediction(apply_fn, num_dummies, public_inputs, key)

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        gradient, size = bias_gradient("bias_counts", classifier_fn, observation), batch_size(observation)
        gradient = of_mean_loss("bias_counts", classifier_fn, observation, gradient)
        mean = 1 / gradient.shape[0] if mean_fn is None else mean_fn(observation.params, observation)
        return labels_from_counts(size * (mean - gradient), size)

    return label_fn


def interpolated_counts(
    classifier_fn: ClassifierFn,
    *,
    apply_fn: ApplyFn,
    learning_rate: Scalar,
    num_steps: int,
    num_dummies: int = 128,
    public_inputs: Float[Array, "n *d"] | None = None,
    key: PRNGKeyArray | None = None,
) -> LabelFn:
    """Builds the rule that counts classes from an update of many local steps
    (Dimitrov et al., Data Leakage in Federated Averaging, TMLR 2022, on label counts).

    Each of the S local gradients has the counts of its minibatch, at parameters that the server did not see. Over whole
    epochs they add up to those of the client, n_c = B (mean over the steps of p_c - grad b_c). The mean prediction p is
    measured at the parameters before and after the local steps, theta_S = theta_0 - S * learning_rate * update, and
    interpolated linearly between them for the steps s = 0..S-1.

    It is more than `bias_counts`, which takes p before the steps for all of them, where the training moves the
    predictions. Predictions for the client's own examples move further than those for dummy inputs, so public inputs
    serve better than random ones.

    Departure: the paper estimates the mean feature beside p and counts from the sums over the kernel's rows. Here the
    gradient of the bias has the counts without it.

    Args:
        classifier_fn: Function that picks the last layer, which must have a bias, such as `dense("head")`.
        apply_fn: Function `(params, inputs) -> logits` that estimates p.
        learning_rate: Learning rate of the local steps, above 0 and finite.
        num_steps: Number S of all local steps, at least 1.
        num_dummies: Number of standard normal inputs for the estimate, at least 1.
        public_inputs: Inputs of shape (n, *d) for the estimate in place of random ones, for an attacker that has some
            of the client's kind. They are auxiliary data, to be named with the threat model. None draws random ones.
        key: Key of the attacker's own randomness, for the random inputs. None derives a key from the bits of the
            observed update.

    Returns:
        The rule, a function `(observation) -> labels`, for the update that `clients.federated_averaging` returns
        without a `divisor`. It raises ValueError as `bias_counts` does.

    Raises:
        ValueError: If a count is no positive integer, `learning_rate` is not positive and finite, or `public_inputs`
            are empty.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"] + params["head"]["bias"]
        >>> steps = {"learning_rate": 0.5, "local_epochs": 8}
        >>> client_fn = jax.jit(clients.federated_averaging(clients.cross_entropy(apply_fn), **steps))
        >>> params = {"head": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> batch = Batch(jnp.ones((4, 2)), jnp.array([2, 0, 2, 2]))
        >>> observation = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> setting = {"apply_fn": apply_fn, "learning_rate": 0.5, "num_steps": 8, "public_inputs": jnp.ones((1, 2))}
        >>> rule = labels.interpolated_counts(labels.dense("head"), **setting)
        >>> sorted(rule(observation).tolist())
        [0, 2, 2, 2]
    """
    _check.integer(num_steps=num_steps)
    _check.scalar(learning_rate=learning_rate)
    _check.positive(learning_rate=learning_rate)
    _check.finite("learning_rate", learning_rate)
    mean_fn = _mean_prediction(apply_fn, num_dummies, public_inputs, key)
    weight = (num_steps - 1) / (2 * num_steps)  # the mean of s / S over the steps s = 0..S-1

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        gradient, size = bias_gradient("interpolated_counts", classifier_fn, observation), batch_size(observation)
        gradient = of_mean_loss("interpolated_counts", classifier_fn, observation, gradient)
        change = jax.tree.map(lambda u: num_steps * learning_rate * u, widened_tree(observation.update))
        after = jax.tree.map(lambda p, c: p - c, widened_tree(observation.params), change)
        first = mean_fn(observation.params, observation)
        last = mean_fn(cast_like(after, observation.params), observation)
        return labels_from_counts(size * ((1 - weight) * first + weight * last - gradient), size)

    return label_fn


def _mean_prediction(
    apply_fn: ApplyFn, num_dummies: int, public_inputs: Float[Array, "n *d"] | None, key: PRNGKeyArray | None
) -> Callable[[Params, Observation], Float[Array, " c"]]:
    """Builds the function `(params, observation) -> mean prediction` of a model for random or public inputs."""
    _check.integer(num_dummies=num_dummies)
    if public_inputs is not None:
        _check.integer(num_public_inputs=len(public_inputs))

    def mean_fn(params: Params, observation: Observation) -> Float[Array, " c"]:
        if public_inputs is None:
            check_dummies(observation, num_dummies)
            inputs = dummy_inputs(attackers_key(key, observation), observation, num_dummies)
        else:
            inputs = as_granted(public_inputs, observation)
        return jnp.mean(jax.nn.softmax(widened(apply_fn(params, inputs))), 0)

    return mean_fn


def greedy_bias(classifier_fn: ClassifierFn) -> LabelFn:
    """Builds the greedy rule of the PyTorch library `breaching` ("bias-corrected"), a baseline.

    Every class with a negative bias gradient gets one label. The rest go to the most negative class, after taking off,
    for each label given, the sum of the negative gradients over B. The rule is right for distinct labels of few of the
    classes in an untrained network. On duplicates it loses to `bias_counts`.

    Args:
        classifier_fn: Function that picks the last layer, which must have a bias, such as `dense("head")`.

    Returns:
        The rule, a function `(observation) -> labels`. It raises ValueError where there is no bias.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"] + params["head"]["bias"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> params = {"head": {"kernel": jnp.zeros((2, 5)), "bias": jnp.zeros(5)}}
        >>> batch = Batch(jnp.ones((2, 2)), jnp.array([3, 1]))
        >>> observation = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> sorted(labels.greedy_bias(labels.dense("head"))(observation).tolist())
        [1, 3]
    """

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        gradient, size = bias_gradient("greedy_bias", classifier_fn, observation), batch_size(observation)
        impact = jnp.sum(jnp.minimum(gradient, 0)) / size
        return greedy_labels(gradient, impact, jnp.zeros(()), size)

    return label_fn
