"""What the gradient of the last layer says of the loss, of the local steps and of the labels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from gia_jax.base import LabelFn, Observation, Updates
from gia_jax.labels import ClassifierFn, bias_counts, column_minimum, idlg, ilrg, llg
from gia_jax.labels.classifier import MARGIN
from gia_jax.metrics.diagnosis.arrays import Layer, on_host, rounding_unit
from gia_jax.metrics.diagnosis.report import Diagnosis, Reading
from gia_jax.models.functional import ApplyFn
from gia_jax.precision import is_floating


def head_facts(
    facts: Diagnosis,
    observation: Observation,
    guesses: list[Updates],
    classifier_fn: ClassifierFn | None,
    first_layer_fn: ClassifierFn | None,
) -> Diagnosis:
    """Adds the scale and the sign of the loss, and how many gradients the update is made of."""
    bias = None if classifier_fn is None else on_host(classifier_fn(observation.update)).bias
    if bias is not None and bias.any():
        facts = _loss_facts(facts, bias, rounding_unit(observation.update))
    size = None if facts.batch_shape is None else facts.batch_shape[0]
    blurred = [found.name for found in facts.treatments if found.name not in ("clip", "noise", "half_precision")]
    if size is None or blurred or facts.noise_ratio > 0.1:
        return facts
    noise = facts.treatment("noise")
    rounding = rounding_unit(observation.update, facts.treatments)
    counts = []
    for layer_fn in (classifier_fn, first_layer_fn):
        if layer_fn is None:
            continue
        kernel = on_host(layer_fn(observation.update)).kernel
        limit = max([size, *(_rank(on_host(layer_fn(guess)).kernel, rounding, 0.0) for guess in guesses)])
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


def label_facts(
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
    head = on_host(classifier_fn(update))
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


def _class_values(head: Layer) -> np.ndarray:
    """Returns what is negative for the classes of the batch only: bias gradients, or sums over features >= 0."""
    return head.kernel.sum(0) if head.bias is None else head.bias


def _reading(rule: str, label_fn: LabelFn, observation: Observation, head: Layer) -> Reading:
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
