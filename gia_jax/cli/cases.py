"""Victims of the command line that are simulated: their data, their model and their client."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from gia_jax import clients, labels, models
from gia_jax.base import Batch, LossFn, Observation, Statistics
from gia_jax.cli.examples import NUM_OTHERS, Examples, Kind, kind_of, load_examples
from gia_jax.cli.names import Generator, Target
from gia_jax.cli.pixels import generator_of, pixel_covariance, pixel_information
from gia_jax.defenses.protected import Part, Protected, protect
from gia_jax.modalities import Modality
from gia_jax.models.functional import has_batch_norm

MAX_ENTRIES = 2**28  # of the derivative of an update by an image; 1 GiB in float32


class Case(NamedTuple):
    """Victims and what is public about them.

    Attributes:
        data: Data that the victims are from.
        truth: Batches of the victims in the model's space, with a leading axis of victims.
        others: Examples that MixUp and InstaHide may mix in, the same for every victim.
        module: Model with its initial weights.
        local_steps: Number of SGD steps of the client on its whole batch.
        learning_rate: Learning rate of the local steps.
    """

    data: Examples
    truth: Batch
    others: Batch
    module: nnx.Module
    local_steps: int
    learning_rate: float

    @property
    def modality(self) -> Modality:
        """What an example is."""
        return self.data.modality

    @property
    def num_classes(self) -> int:
        """Number of classes of the data."""
        return self.data.num_classes

    @property
    def statistics_fn(self) -> Callable[..., Statistics] | None:
        """Function that returns the statistics of the model's features. It is None without batch normalisation."""
        return models.batch_norm_inputs(self.module) if has_batch_norm(self.module) else None

    def running_statistics(self, observation: Observation) -> Statistics:
        """Returns the running statistics of the model. Those of an untrained one say nothing about any data."""
        like = jnp.zeros((1, *self.truth.inputs.shape[2:]), self.truth.inputs.dtype)
        return models.running_statistics(self.module, observation.params, like)

    def generator(self, path: Path | None, key: PRNGKeyArray, *, num_latent_steps: int | None = None) -> Generator:
        """Makes a generator of such images, as `generator_of` does."""
        assert self.data.images is not None
        shape = self.truth.inputs.shape[2:]
        return generator_of(self.data.images, shape, path, key, num_latent_steps=num_latent_steps)

    def target(
        self, assumed: Protected, *, adaptive: bool, statistics: str = "none", generator: Generator | None = None
    ) -> Target:
        """Returns what an attacker knows of the victims.

        Args:
            assumed: Client that the attacker assumes.
            adaptive: Whether it compares updates as one that knows the defenses of `assumed`.
            statistics: Statistics of the features that GradInversion matches: "none", the model's "running" ones, or
                the "exact" ones that were granted.
            generator: Generator of GIAS.
        """
        target = Target(
            assumed.assumed_fn,
            labels.dense("head"),
            self.num_classes,
            self.truth.labels.shape[1],
            self.modality,
            bounds=self.data.bounds,
            blocks=self.data.blocks,
            # Label rules draw inputs that are one array for the model. Of one graph they need none.
            apply_fn=None if self.data.blocks else assumed.apply_fn,
            statistics_fn=None if statistics == "none" else self.statistics_fn,
            known_statistics_fn=self.running_statistics if statistics == "running" else None,
            generator=generator,
            gradient_fn=clients.federated_sgd(clients.cross_entropy(assumed.apply_fn)),
            scale=self.local_steps * self.learning_rate,
        )
        return target._replace(adapt_fn=assumed.adapt_fn) if adaptive else target

    def protect(self, parts: Sequence[Part]) -> Protected:
        """Makes the client with these defenses.

        Args:
            parts: Defenses from `parse`, in their order.

        Returns:
            The client, with parameters in the precision of the data.

        Raises:
            ValueError: If the defenses cannot be in one client, or mix more examples than a client has.
        """

        def averaging(loss_fn: LossFn) -> Any:
            return clients.federated_averaging(loss_fn, learning_rate=self.learning_rate, local_epochs=self.local_steps)

        examples = self.truth.labels.shape[1] + len(self.others.labels)
        for part in parts:
            if part.acts_on == "input" and part.settings["k"] > examples:
                raise ValueError(f"defense {part} must mix at most the {examples} examples that a client has")
        make_client = clients.federated_sgd if self.local_steps == 1 else averaging
        protected = protect(parts, self.module, num_classes=self.num_classes, make_client=make_client)
        dtype = jax.tree.leaves(self.truth.inputs)[0].dtype
        return protected._replace(params=jax.tree.map(lambda leaf: leaf.astype(dtype), protected.params))

    def bounds_of(self, parts: Sequence[Part]) -> dict[str, Array]:
        """Computes what bounds every estimator of pixels in [0, 1] under the noise of DP-SGD.

        Defenses of the update that come after the noise only take information away.

        Args:
            parts: Defenses of the client.

        Returns:
            The Fisher "information" of the first victim's update and the "covariance" of the gallery, which is left out
            for fewer than two public images. There is nothing without DP-SGD or its noise, with defenses of another
            kind, for data that are no images, and where the derivative of the update by the image is too large for
            memory.
        """
        images = self.data.images
        private = [part for part in parts if part.name == "dpsgd" and part.settings["noise_multiplier"] > 0]
        others = any(part.name != "dpsgd" and part.acts_on != "update" for part in parts)
        if not private or others or images is None:
            return {}
        protected, number = self.protect(private), self.truth.inputs[0, 0].size
        if number * sum(leaf.size for leaf in jax.tree.leaves(protected.params)) > MAX_ENTRIES:
            return {}
        first = jax.tree.map(lambda leaf: leaf[0, :1], self.truth)
        information = pixel_information(protected.assumed_fn, protected.params, first, images)
        scale = private[0].settings["noise_multiplier"] * private[0].settings["norm"]
        bounds = {"information": information / scale**2}
        if len(self.data.public.inputs) > 1:
            bounds["covariance"] = pixel_covariance(images.denormalize(np.asarray(self.data.public.inputs)))
        return bounds


def load_case(
    model: str,
    name: str,
    *,
    victims: int,
    batch_size: int = 1,
    seed: int = 0,
    local_steps: int = 1,
    learning_rate: float = 1e-2,
    image_size: int | None = None,
) -> Case:
    """Makes victims in the order of the data's ids, each with its own examples, and an untrained model.

    Args:
        model: Key of the models that take such data.
        name: Name of the data, for `load_examples`.
        victims: Number of clients, at least 1.
        batch_size: Number of examples of each client, at least 1.
        seed: Seed of the model's weights.
        local_steps: Number of SGD steps of each client on its whole batch, at least 1.
        learning_rate: Learning rate of the local steps, above 0.
        image_size: Height and width of photographs in pixels. None is their default, or for other data.

    Returns:
        The case, in float64 where that is enabled.

    Raises:
        ValueError: If the data set has fewer examples.
    """
    count = victims * batch_size
    examples = load_examples(name, count, image_size=image_size)
    truth = jax.tree.map(lambda leaf: leaf[:count].reshape(victims, batch_size, *leaf.shape[1:]), examples.batch)
    others = jax.tree.map(lambda leaf: leaf[count : count + NUM_OTHERS], examples.batch)
    module = _built(model, examples, kind_of(name), seed)
    return Case(examples, truth, others, module, local_steps, learning_rate)


def _built(model: str, examples: Examples, kind: Kind, seed: int) -> nnx.Module:
    """Builds the model by one program, in place of one for each operation of the initialisation."""

    @nnx.jit
    def build() -> nnx.Module:
        return kind.build(kind.models[model], examples, nnx.Rngs(seed))

    return build()
