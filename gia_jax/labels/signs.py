"""Label rules that read the signs of the last layer's gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gia_jax import _check
from gia_jax.base import LabelFn, Observation
from gia_jax.labels.classifier import ClassifierFn, batch_size, last_gradient, or_none


def idlg(classifier_fn: ClassifierFn) -> LabelFn:
    """Builds the rule of iDLG (Zhao et al., 2020, equation 5), for a batch of one example.

    It returns the class whose row of the last layer's gradient has the smallest sum. It is exact for one example with a
    hard label and features h >= 0 that are not all zero (ReLU, sigmoid). The gradient of the logits is p_c, the
    predicted probability, for a wrong class c, and p_c - 1 < 0 for the true class only.

    Args:
        classifier_fn: Function that picks the last layer, such as `dense("head")`. It needs no bias.

    Returns:
        The rule, a function `(observation) -> labels` with labels of shape (1,). It raises ValueError for a batch of
        more than one.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> batch = Batch(jnp.ones((1, 2)), jnp.array([2]))
        >>> params = {"head": {"kernel": jnp.eye(2, 4)}}
        >>> observation = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> labels.idlg(labels.dense("head"))(observation).tolist()
        [2]
    """

    def label_fn(observation: Observation) -> Int[Array, " 1"]:
        if batch_size(observation) != 1:
            raise ValueError(f"idlg finds one label, got a batch of {batch_size(observation)}: use bias_counts")
        sums = jnp.sum(last_gradient(classifier_fn, observation.update).kernel, 0)
        return or_none(jnp.argmin(sums)[None], sums)

    return label_fn


def column_minimum(classifier_fn: ClassifierFn) -> LabelFn:
    """Builds the rule of GradInversion (Yin et al., CVPR 2021, equation 6), for distinct labels.

    For a batch of B examples it returns the B classes with the most negative entries in the last layer's gradient. It
    is right where all labels are distinct, features are >= 0 and each label has a feature of its own. It never gives a
    label twice. With features >= 0 only a class of the batch has a negative entry. Fewer of them than examples
    therefore prove that labels repeat, or that predictions are too far from 1 / C, with C the number of classes, for
    this rule.

    Args:
        classifier_fn: Function that picks the last layer, such as `dense("head")`. It needs no bias.

    Returns:
        The rule, a function `(observation) -> labels`. It raises ValueError for more examples than classes, and outside
        of a trace for fewer classes with a negative entry than examples.

    Examples:
        Each of the two examples has a feature of its own:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> batch = Batch(jnp.eye(2), jnp.array([3, 1]))
        >>> params = {"head": {"kernel": jnp.zeros((2, 5))}}
        >>> observation = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> sorted(labels.column_minimum(labels.dense("head"))(observation).tolist())
        [1, 3]
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
