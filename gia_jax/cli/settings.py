"""What an attack of the command line is run on: victims that are simulated, or one whose update was recorded."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from gia_jax import metrics
from gia_jax.attacks.april import LayersFn
from gia_jax.base import Batch, ClientFn, Observation
from gia_jax.cli.names import Target
from gia_jax.labels import ClassifierFn
from gia_jax.modalities import Modality
from gia_jax.models.functional import ApplyFn


class Victims(NamedTuple):
    """Victims that are attacked together.

    Attributes:
        observations: Observations with a leading axis of victims. What is none, such as a ciphertext, is not attacked.
        target: What the attacker knows of them.
        truth: True batches in the model's space, with a leading axis of victims. None where they are not known.
    """

    observations: Any
    target: Target
    truth: Batch | None


class Known(NamedTuple):
    """What a diagnosis may read, beside an observation: the client that the attacker assumes without any defense.

    Attributes:
        client_fn: Client `(params, batch) -> update`.
        apply_fn: Model `(params, inputs) -> logits`.
        classifier_fn: Function that picks the last layer.
        first_layer_fn: Function that picks a dense layer that sees the example. None where there is none.
        module: Module of the model. None for a model that is a function.
        token_layers_fn: Function that picks what APRIL reads of a vision transformer. None for another model.
    """

    client_fn: ClientFn
    apply_fn: ApplyFn
    classifier_fn: ClassifierFn | None
    first_layer_fn: ClassifierFn | None
    module: nnx.Module | None
    token_layers_fn: LayersFn | None


class Setting(NamedTuple):
    """What is attacked, and what is said of it.

    Attributes:
        defense: Words for the defenses, "none" without any.
        threat: Words of the threat model.
        notes: Further lines for whoever reads the results.
        targets: Victims by the name of what is attacked of them; "" where there is one such thing.
        modality: What an example is.
        guesses: The modality's first score of guesses without a gradient, by name. There are none where the truth is
            not known.
        known: What a diagnosis may read.
        key: Random key of the attacker.
    """

    defense: str
    threat: str
    notes: list[str]
    targets: Mapping[str, Victims]
    modality: Modality
    guesses: dict[str, np.ndarray]
    known: Known
    key: PRNGKeyArray


def diagnosis(setting: Setting) -> list[str]:
    """Says what the update of the first victim tells an attacker that knows of no defense but those of the model."""
    lines = []
    for name, victims in setting.targets.items():
        if not isinstance(victims.observations, Observation):
            continue
        seen = victims.observations
        update, extra = jax.tree.map(lambda leaf: leaf[0], (seen.update, seen.extra))
        found = metrics.diagnose(
            Observation(seen.params, update, extra),
            setting.known.client_fn,
            key=jax.random.key(0),
            classifier_fn=setting.known.classifier_fn,
            apply_fn=setting.known.apply_fn,
            first_layer_fn=setting.known.first_layer_fn,
            module=setting.known.module,
            token_layers_fn=setting.known.token_layers_fn,
            num_classes=victims.target.num_classes,
        )
        lines += [f"the first victim's update{f', {name}' if name else ''}:", *found.lines(), ""]
    return lines
