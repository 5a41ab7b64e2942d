"""Label rules that count classes from the gradient of the last bias, grad b_c = mean_j (p_jc - 1[y_j = c])."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gia_jax import _check
from gia_jax.base import LabelFn, Observation, Params
from gia_jax.labels.classifier import ClassifierFn, batch_size, bias_gradient, greedy_labels, labels_from_counts


def bias_counts(classifier_fn: ClassifierFn, *, apply_fn=None, num_dummies: int = 128) -> LabelFn:
    """Class counts in closed form, n_c = B (p_c - grad b_c), rounded to integers that sum to B.

    The mean prediction p is the only unknown. It is 1 / C in a network that has learned nothing, or what the network
    predicts for random inputs. Exact where the guess of p is off by less than 1 / (2 B); an error of p_c in a
    trained network counts B times. Works for any batch size and for duplicates.

    Args:
        classifier_fn: Picks the last layer; it must have a bias.
        apply_fn: `(params, inputs) -> logits`, to estimate p on standard normal inputs; None takes p = 1 / C.
        num_dummies: Random inputs for that estimate, >= 1.

    Returns:
        The rule; it raises ValueError where there is no bias.
    """
    _check.positive(num_dummies=num_dummies)

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        gradient, size = bias_gradient("bias_counts", classifier_fn, observation), batch_size(observation)
        mean = 1 / gradient.shape[0] if apply_fn is None else _mean_prediction(apply_fn, observation, num_dummies)
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


def _mean_prediction(apply_fn, observation: Observation, num_dummies: int) -> Float[Array, " c"]:
    like = observation.extra["inputs_like"]
    dummies = jax.random.normal(jax.random.key(0), (num_dummies, *like.shape[1:]), like.dtype)
    params: Params = observation.params
    return jnp.mean(jax.nn.softmax(apply_fn(params, dummies)), 0)
