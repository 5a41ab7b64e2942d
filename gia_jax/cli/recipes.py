"""How the attacks of the command line are built from what is public about a victim and what the user chose."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PRNGKeyArray

from gia_jax.attacks.april import TokenLayers, april
from gia_jax.attacks.dlg import dlg
from gia_jax.attacks.fedleak import fedleak
from gia_jax.attacks.gias import GeneratorFn, gias
from gia_jax.attacks.glg import glg
from gia_jax.attacks.grad_inversion import grad_inversion
from gia_jax.attacks.graph_spans import as_reconstruction, graph_spans
from gia_jax.attacks.idlg import idlg
from gia_jax.attacks.inverting_gradients import inverting_gradients
from gia_jax.attacks.linear import linear_inversion
from gia_jax.attacks.magia import magia
from gia_jax.attacks.r_gap import r_gap
from gia_jax.attacks.sme import sme
from gia_jax.base import (
    Attack,
    ClientFn,
    InitFn,
    LabelFn,
    ObjectiveFn,
    Observation,
    Params,
    ReconstructFn,
    Reconstruction,
    Statistics,
)
from gia_jax.data import FeatureBlock
from gia_jax.labels import ClassifierFn, dense
from gia_jax.matching.adaptive import supported
from gia_jax.matching.objectives import cosine, euclidean, layerwise_euclidean
from gia_jax.modalities import Modality
from gia_jax.models.functional import ApplyFn
from gia_jax.models.network import cnn6

FIRST_LAYER = {"linear": "head", "mlp": "dense0"}  # of the models that start fully connected
# What APRIL reads of the vision transformers.
TOKEN_LAYERS = dict.fromkeys(
    ("vit", "vit_april"),
    TokenLayers.named(position="position", patch="patch", attention="block0.attention", class_token="class_token"),
)


class Generator(NamedTuple):
    """A generator of images and how long its latents are searched. The fields are arguments of `gias` of these names.

    Attributes:
        generator_fn: Function `(params, z) -> images` in the space of the model's inputs.
        generator_params: Parameters of the generator.
        latent_shape: Shape of the latents of one image.
        num_latent_steps: Number of steps in which the latents are searched, at least 0.
    """

    generator_fn: GeneratorFn
    generator_params: Params
    latent_shape: tuple[int, ...]
    num_latent_steps: int


class Target(NamedTuple):
    """What an attack must know of the victim to be built. All of it is public.

    Attributes:
        client_fn: Client `(params, batch) -> update` that the attacker assumes.
        classifier_fn: Function that picks the last layer from an update.
        num_classes: Number of classes of the model.
        batch_size: Number of examples of the client.
        modality: What an example is.
        bounds: Darkest and brightest pixel in the model's space. None where the data are no images.
        blocks: What the features of nodes are, where the data are graphs.
        apply_fn: Model `(params, inputs) -> logits`, whose predictions the counting of labels measures. None takes 1 /
            classes for every prediction.
        adapt_fn: Function that makes from the attack's own objective that of an attacker that knows the defense.
        statistics_fn: Function `(params, inputs) -> statistics` of the features. None leaves them out of the attack.
        known_statistics_fn: Function that reads from the observation the statistics to match. None takes those that the
            threat model grants.
        generator: Generator of such images, for GIAS. None for all other attacks.
        gradient_fn: Client of one step on the whole batch, for SME and APRIL. None takes `client_fn`.
        scale: Number that times the update is the change of the parameters, for SME.
    """

    client_fn: ClientFn
    classifier_fn: ClassifierFn
    num_classes: int
    batch_size: int
    modality: Modality
    bounds: tuple | None = None
    blocks: tuple[FeatureBlock, ...] = ()
    apply_fn: ApplyFn | None = None
    adapt_fn: Callable[[ObjectiveFn], ObjectiveFn] = lambda objective_fn: objective_fn
    statistics_fn: Callable[..., Statistics] | None = None
    known_statistics_fn: Callable[[Observation], Statistics] | None = None
    generator: Generator | None = None
    gradient_fn: ClientFn | None = None
    scale: float = 1.0

    def unknowns(self, init_fn: InitFn | None, **of_images: Any) -> dict[str, Any]:
        """Returns what an attack takes of the data: all of a modality, or, for images, what its paper takes.

        Args:
            init_fn: Function that draws the first unknowns. None takes the attack's or the modality's own.
            of_images: Further arguments of the attack that are for images.
        """
        if self.bounds is not None:
            return {"init_fn": init_fn} | of_images
        return self.modality.matching() | ({} if init_fn is None else {"init_fn": init_fn})


class Choices(NamedTuple):
    """What was chosen for an attack.

    Attributes:
        label_fn: Function that finds the labels in the observation. None where the attack finds them in its own way.
        num_steps: Number of steps that the attack's schedules are made for; 0 for an analytic attack.
        optimizer: Optimiser in place of the paper's. None takes the paper's.
        init_fn: Function that draws the first dummy data. None takes the attack's own.
        model: Name of the model, for analytic attacks; "" for all others.
    """

    label_fn: LabelFn | None
    num_steps: int = 0
    optimizer: optax.GradientTransformation | None = None
    init_fn: InitFn | None = None
    model: str = ""


def build_dlg(target: Target, choices: Choices) -> Attack:
    """Builds DLG, which optimises the labels too. With its labels given it is the attack of iDLG."""
    if choices.label_fn is not None:
        return build_idlg(target, choices)
    return dlg(
        target.client_fn,
        num_classes=target.num_classes,
        **target.unknowns(choices.init_fn),
        objective_fn=target.adapt_fn(euclidean),
        optimizer=choices.optimizer,
    )


def build_idlg(target: Target, choices: Choices) -> Attack:
    """Builds iDLG."""
    return idlg(
        target.client_fn,
        target.classifier_fn,
        label_fn=choices.label_fn,
        **target.unknowns(choices.init_fn),
        objective_fn=target.adapt_fn(euclidean),
        optimizer=choices.optimizer,
    )


def build_inverting_gradients(target: Target, choices: Choices) -> Attack:
    """Builds Inverting Gradients."""
    assert choices.label_fn is not None
    return inverting_gradients(
        target.client_fn,
        num_steps=choices.num_steps,
        label_fn=choices.label_fn,
        **target.unknowns(choices.init_fn, bounds=target.bounds),
        objective_fn=target.adapt_fn(cosine),
        optimizer=choices.optimizer,
    )


def build_magia(target: Target, choices: Choices) -> Attack:
    """Builds MAGIA, which optimises the labels too where they are not given."""
    return magia(
        target.client_fn,
        num_classes=target.num_classes,
        label_fn=choices.label_fn,
        **target.unknowns(choices.init_fn, bounds=target.bounds),
        objective_fn=target.adapt_fn(euclidean),
        optimizer=choices.optimizer,
    )


def build_fedleak(target: Target, choices: Choices) -> Attack:
    """Builds FedLeak."""
    assert choices.label_fn is not None
    return fedleak(
        target.client_fn,
        num_steps=choices.num_steps,
        label_fn=choices.label_fn,
        **target.unknowns(choices.init_fn, bounds=target.bounds),
        objective_fn=target.adapt_fn(cosine),
        optimizer=choices.optimizer,
    )


def build_grad_inversion(target: Target, choices: Choices) -> Attack:
    """Builds GradInversion. A tenth of the steps is its warm-up, or fifty of them if that is less."""
    return grad_inversion(
        target.client_fn,
        target.classifier_fn,
        statistics_fn=target.statistics_fn,
        known_statistics_fn=target.known_statistics_fn,
        num_steps=choices.num_steps,
        num_warm_up_steps=min(50, choices.num_steps // 10),
        bounds=target.bounds,
        label_fn=choices.label_fn,
        init_fn=choices.init_fn,
        objective_fn=target.adapt_fn(layerwise_euclidean),
        optimizer=choices.optimizer,
    )


def build_gias(target: Target, choices: Choices) -> Attack:
    """Builds GIAS, or raises ValueError where the target has no generator."""
    if target.generator is None:
        raise ValueError("target must have a generator for the attack gias, got None")
    assert choices.label_fn is not None
    return gias(
        target.client_fn,
        **target.generator._asdict(),
        num_steps=choices.num_steps,
        label_fn=choices.label_fn,
        objective_fn=target.adapt_fn(supported()),
    )


def build_sme(target: Target, choices: Choices) -> Attack:
    """Builds SME, which takes the local steps of the client for one gradient."""
    assert choices.label_fn is not None
    return sme(
        target.client_fn if target.gradient_fn is None else target.gradient_fn,
        scale=target.scale,
        bounds=target.bounds,
        num_steps=choices.num_steps,
        label_fn=choices.label_fn,
        init_fn=choices.init_fn,
        objective_fn=target.adapt_fn(cosine),
    )


def build_glg(target: Target, choices: Choices) -> Attack:
    """Builds GLG on graphs whose number of nodes is granted, or raises ValueError where the data are none."""
    if not target.blocks:
        raise ValueError("target must have blocks of features for the attack glg, got none")
    assert choices.label_fn is not None
    return glg(
        target.client_fn,
        blocks=target.blocks,
        max_nodes=target.modality.like["mask"].shape[0],
        grants=("mask",),
        num_steps=choices.num_steps,
        label_fn=choices.label_fn,
        init_fn=choices.init_fn,
        objective_fn=target.adapt_fn(cosine),
        optimizer=choices.optimizer,
    )


def build_graph_spans(target: Target, choices: Choices) -> ReconstructFn:
    """Builds the search by spans and counting on graphs whose nodes have one-hot labels and degrees."""
    del choices
    sizes, kinds = [len(block.names) for block in target.blocks], [block.kind for block in target.blocks]
    find = graph_spans(jax.jit(target.client_fn), blocks=sizes, degree_block=kinds.index("degree"))
    max_nodes = target.modality.like["mask"].shape[0]

    def reconstruct_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        del key
        return as_reconstruction(find(observation), num_nodes=max_nodes)

    return reconstruct_fn


def build_linear(target: Target, choices: Choices) -> ReconstructFn:
    """Builds the analytic inversion of the layer that sees the example."""
    del target
    assert choices.label_fn is not None
    return linear_inversion(dense(FIRST_LAYER[choices.model]), label_fn=choices.label_fn)


def build_r_gap(target: Target, choices: Choices) -> ReconstructFn:
    """Builds R-GAP on the network that it knows layer by layer."""
    del choices
    assert target.bounds is not None
    return r_gap(cnn6(target.num_classes, bias=True), bounds=target.bounds)


def build_april(target: Target, choices: Choices) -> ReconstructFn:
    """Builds APRIL's closed form on the library's own transformer. Its condition is on the network, and not on what a
    client makes of the network's gradient.
    """
    assert choices.label_fn is not None
    gradient_fn = target.client_fn if target.gradient_fn is None else target.gradient_fn
    return april(gradient_fn, layers_fn=TOKEN_LAYERS[choices.model], label_fn=choices.label_fn)
