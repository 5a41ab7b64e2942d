"""Label rules that read signs of the last layer's gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gia_jax import _check
from gia_jax.base import LabelFn, Observation
from gia_jax.labels.classifier import ClassifierFn, batch_size, last_gradient, or_none


def idlg(classifier_fn: ClassifierFn) -> LabelFn:
    """The class whose row of the last layer's gradient has the smallest sum (Zhao et al., iDLG, 2020, equation 5).

    Exact for one example with a hard label and features h >= 0 that are not all zero (ReLU, sigmoid): only the true
    class has p_c - 1 < 0.

    Args:
        classifier_fn: Picks the last layer, such as `dense("head")`.

    Returns:
        The rule; it raises ValueError for a batch of more than one.
    """

    def label_fn(observation: Observation) -> Int[Array, " 1"]:
        if batch_size(observation) != 1:
            raise ValueError(f"idlg finds one label, got a batch of {batch_size(observation)}: use bias_counts")
        sums = jnp.sum(last_gradient(classifier_fn, observation.update).kernel, 0)
        return or_none(jnp.argmin(sums)[None], sums)

    return label_fn


def column_minimum(classifier_fn: ClassifierFn) -> LabelFn:
    """The B classes with the most negative entries in the last layer's gradient
    (Yin et al., GradInversion, CVPR 2021, equation 6).

    Right where all labels are distinct, features are >= 0 and each label has a feature of its own; never gives a label
    twice. With features >= 0 only a class of the batch has a negative entry: fewer of them than examples prove that
    labels repeat, or that predictions are too far from 1 / C for this rule.

    Args:
        classifier_fn: Picks the last layer.

    Returns:
        The rule; it raises ValueError for more examples than classes, and outside a trace for fewer classes with a
        negative entry than examples.
    """

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        size, kernel = batch_size(observation), last_gradient(classifier_fn, observation.update).kernel
        if size > kernel.shape[1]:
            classes = kernel.shape[1]
            raise ValueError(f"column_minimum gives distinct labels: a batch of {size} is more than {classes} classes")
        least = jnp.min(kernel, 0)
        if _check.is_concrete(least) and (negative := int(jnp.sum(least < 0))) < size:
            raise ValueError(
                f"column_minimum gives distinct labels: a batch of {size} has {negative} classes with a negative entry "
                "in the gradient, so labels repeat or are not to be read by this rule; use bias_counts"
            )
        return or_none(jax.lax.top_k(-least, size)[1], least)

    return label_fn
