"""Label rules that count classes from the gradient of the last bias, grad b_c = mean_j (p_jc - 1[y_j = c])."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import LabelFn, Observation
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
from gia_jax.precision import widened


def bias_counts(
    classifier_fn: ClassifierFn,
    *,
    apply_fn=None,
    num_dummies: int = 128,
    public_inputs: Float[Array, "n *d"] | None = None,
    key: PRNGKeyArray | None = None,
) -> LabelFn:
    """Class counts in closed form, n_c = B (p_c - grad b_c), rounded to integers that sum to B.

    The mean prediction p is the only unknown. It is 1 / C in a network that has learned nothing, or what the network
    predicts for random inputs, or for public ones of the client's kind. Exact where the guess of p is off by less than
    1 / (2 B); an error of p_c in a trained network counts B times. Works for any batch size and for duplicates.

    Args:
        classifier_fn: Picks the last layer; it must have a bias.
        apply_fn: `(params, inputs) -> logits`, to estimate p on standard normal inputs; None takes p = 1 / C.
        num_dummies: Number of random inputs for that estimate, at least 1.
        public_inputs: Inputs (n, *d) for that estimate in place of random ones, for an attacker that has some of the
            client's kind: auxiliary data, to be named with the threat model.
        key: The attacker's own randomness, for the random inputs; None derives a key from the bits of the observed
            update.

    Returns:
        The rule; it raises ValueError where there is no bias, or where its gradient is not that of a mean loss. Inside
        of a trace the gradient is known too late to raise, and the labels are -1.

    Raises:
        ValueError: `num_dummies` is no positive integer, or `public_inputs` are empty or given without `apply_fn`.
    """
    _check.integer(num_dummies=num_dummies)
    if public_inputs is not None:
        if apply_fn is None:
            raise ValueError("apply_fn must be given with public_inputs, got None")
        _check.integer(num_public_inputs=len(public_inputs))

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        gradient, size = bias_gradient("bias_counts", classifier_fn, observation), batch_size(observation)
        gradient = of_mean_loss("bias_counts", classifier_fn, observation, gradient)
        if apply_fn is None:
            mean = 1 / gradient.shape[0]
        else:
            if public_inputs is None:
                check_dummies(observation, num_dummies)
                inputs = dummy_inputs(attackers_key(key, observation), observation, num_dummies)
            else:
                inputs = as_granted(public_inputs, observation)
            mean = jnp.mean(jax.nn.softmax(widened(apply_fn(observation.params, inputs))), 0)
        return labels_from_counts(size * (mean - gradient), size)

    return label_fn


def greedy_bias(classifier_fn: ClassifierFn) -> LabelFn:
    """The greedy rule of the PyTorch library `breaching` ("bias-corrected"), a baseline.

    Every class with a negative bias gradient once; then the most negative one after taking off, for each label given,
    the sum of the negative gradients over B. Right for distinct labels of few of the classes in an untrained network;
    on duplicates it loses to `bias_counts`.

    Args:
        classifier_fn: Picks the last layer; it must have a bias.

    Returns:
        The rule; it raises ValueError where there is no bias.
    """

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        gradient, size = bias_gradient("greedy_bias", classifier_fn, observation), batch_size(observation)
        impact = jnp.sum(jnp.minimum(gradient, 0)) / size
        return greedy_labels(gradient, impact, jnp.zeros(()), size)

    return label_fn
