"""Victims of the command line that are simulated: their data, their model and their client."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from gia_jax import clients, data, labels, metrics, models
from gia_jax.attacks.gias import NUM_LATENT_STEPS
from gia_jax.base import Batch, ClientFn, LossFn, Observation, Params, Statistics
from gia_jax.cli.names import Generator, Target
from gia_jax.defenses.protected import Part, Protected, protect
from gia_jax.models.functional import has_batch_norm

NUM_OTHERS = 16  # images of a client beside those of its batch, for defenses that mix images
MAX_ENTRIES = 2**28  # of the derivative of an update by an image; 1 GiB in float32


class Case(NamedTuple):
    """Victims and what is public about them.

    Attributes:
        images: All images of the data set that were read.
        truth: Batches of the victims in the model's space, with a leading axis of victims.
        others: Images that MixUp and InstaHide may mix in, the same for every victim.
        pixels: Images of the victims in [0, 1], shape (v, b, h, w, c).
        gallery: Public images, shape (n, h, w, c), none of them a victim's. There may be none.
        module: Model with its initial weights.
        local_steps: Number of SGD steps of the client on its whole batch.
        learning_rate: Learning rate of the local steps.
    """

    images: data.ImageData
    truth: Batch
    others: Batch
    pixels: np.ndarray
    gallery: np.ndarray
    module: nnx.Module
    local_steps: int
    learning_rate: float

    @property
    def num_classes(self) -> int:
        """Number of classes of the data."""
        return len(self.images.class_names)

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
        return generator_of(self.images, self.pixels.shape[2:], path, key, num_latent_steps=num_latent_steps)

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
        low, high = (bound.astype(self.truth.inputs.dtype) for bound in self.images.bounds())
        target = Target(
            assumed.assumed_fn,
            labels.dense("head"),
            self.num_classes,
            self.truth.labels.shape[1],
            (low, high),
            apply_fn=assumed.apply_fn,
            statistics_fn=None if statistics == "none" else self.statistics_fn,
            known_statistics_fn=self.running_statistics if statistics == "running" else None,
            generator=generator,
        )
        return target._replace(adapt_fn=assumed.adapt_fn) if adaptive else target

    def protect(self, parts: Sequence[Part]) -> Protected:
        """Makes the client with these defenses.

        Args:
            parts: Defenses from `parse`, in their order.

        Returns:
            The client, with parameters in the precision of the data.

        Raises:
            ValueError: If the defenses cannot be in one client, or mix more images than a client has.
        """

        def averaging(loss_fn: LossFn) -> Any:
            return clients.federated_averaging(loss_fn, learning_rate=self.learning_rate, local_epochs=self.local_steps)

        images = self.truth.labels.shape[1] + len(self.others.labels)
        for part in parts:
            if part.acts_on == "input" and part.settings["k"] > images:
                raise ValueError(f"defense {part} must mix at most the {images} images that a client has")
        make_client = clients.federated_sgd if self.local_steps == 1 else averaging
        protected = protect(parts, self.module, num_classes=self.num_classes, make_client=make_client)
        dtype = self.truth.inputs.dtype
        return protected._replace(params=jax.tree.map(lambda leaf: leaf.astype(dtype), protected.params))

    def bounds_of(self, parts: Sequence[Part]) -> dict[str, Array]:
        """Computes what bounds every estimator of pixels in [0, 1] under the noise of DP-SGD.

        Defenses of the update that come after the noise only take information away.

        Args:
            parts: Defenses of the client.

        Returns:
            The Fisher "information" of the first victim's update and the "covariance" of the gallery, which is left out
            for fewer than two public images. There is nothing without DP-SGD or its noise, with defenses of another
            kind, and where the derivative of the update by the image is too large for memory.
        """
        private = [part for part in parts if part.name == "dpsgd" and part.settings["noise_multiplier"] > 0]
        others = any(part.name != "dpsgd" and part.acts_on != "update" for part in parts)
        if not private or others:
            return {}
        protected, number = self.protect(private), self.pixels[0, 0].size
        if number * sum(leaf.size for leaf in jax.tree.leaves(protected.params)) > MAX_ENTRIES:
            return {}
        first = jax.tree.map(lambda leaf: leaf[0, :1], self.truth)
        information = pixel_information(protected.assumed_fn, protected.params, first, self.images)
        scale = private[0].settings["noise_multiplier"] * private[0].settings["norm"]
        bounds = {"information": information / scale**2}
        if len(self.gallery) > 1:
            bounds["covariance"] = pixel_covariance(self.gallery)
        return bounds


def generator_of(
    images: data.ImageData,
    shape: tuple[int, ...],
    path: Path | None,
    key: PRNGKeyArray,
    *,
    num_latent_steps: int | None = None,
) -> Generator:
    """Makes a generator of images: trained, from a file of `models.save_decoder`, or untrained (deep image prior).

    Args:
        images: Images of the kind, whose mean and deviation lead from pixels to the model's space.
        shape: Shape (h, w, c) of an image.
        path: Path of the file. None makes an untrained decoder.
        key: Random key of the untrained weights.
        num_latent_steps: Number of latent steps of GIAS. None takes the paper's, or 0 where the generator is untrained.

    Returns:
        The generator, in the model's space.

    Raises:
        ValueError: If the file is none of a decoder, or of one for images of another shape. Without a file, if the
            height or width of an image is no multiple of 4.
    """
    if len(shape) != 3:
        raise ValueError(f"generator must make images of shape (h, w, c), got {shape}")
    height, width, channels = shape
    decoder = (
        models.Decoder((height, width, channels), rngs=nnx.Rngs(key)) if path is None else models.load_decoder(path)
    )
    if decoder.input_shape != shape:
        made, wanted = ("x".join(map(str, s)) for s in (decoder.input_shape, shape))
        raise ValueError(f"generator must make images of {wanted} for {images.name}, got {path}, of {made}")
    if num_latent_steps is None:
        num_latent_steps = 0 if path is None else NUM_LATENT_STEPS
    decode, weights = models.functional(decoder)
    mean, std = (jnp.asarray(value, jnp.float32) for value in (images.mean, images.std))

    def generator_fn(params: Params, z: Array) -> Array:
        return (decode(params, z) - mean) / std

    return Generator(generator_fn, weights, (decoder.latent_size,), num_latent_steps)


def pixel_information(client_fn: ClientFn, params: Params, batch: Batch, images: data.ImageData) -> Array:
    """Computes the Fisher information of an update with noise of scale 1.

    Args:
        client_fn: Client `(params, batch) -> update`.
        params: Parameters that the server sent.
        batch: One example, inputs of shape (1, h, w, c).
        images: Images of the kind, whose deviation leads from the model's units to those of pixels in [0, 1].

    Returns:
        The information in units of pixels, shape (d, d) for d pixels.
    """
    found = jax.jit(lambda p, b: metrics.fisher_information(client_fn, p, b, 1.0, batch_size=256))(params, batch)
    std = jnp.broadcast_to(jnp.asarray(images.std, found.dtype), batch.inputs.shape[1:]).ravel()
    return found / std[:, None] / std


def pixel_covariance(images: np.ndarray) -> Array:
    """Computes the covariance of images, for `metrics.van_trees_bound`.

    Args:
        images: Two images or more in [0, 1], shape (n, h, w, c).

    Returns:
        The covariance, shape (d, d) for d pixels.
    """
    return jnp.asarray(np.cov(images.reshape(len(images), -1), rowvar=False))


def load_case(
    model: str,
    name: str,
    *,
    victims: int,
    batch_size: int = 1,
    seed: int = 0,
    local_steps: int = 1,
    learning_rate: float = 1e-2,
) -> Case:
    """Makes victims in the order of the data's ids, each with its own images, and an untrained model.

    Args:
        model: Key of `models.MODELS`.
        name: Name of the data: "photos", "digits", or a data set of TFDS.
        victims: Number of clients, at least 1.
        batch_size: Number of images of each client, at least 1.
        seed: Seed of the model's weights.
        local_steps: Number of SGD steps of each client on its whole batch, at least 1.
        learning_rate: Learning rate of the local steps, above 0.

    Returns:
        The case, in float64 where that is enabled.

    Raises:
        ValueError: If the data set has fewer images.
    """
    count, small = victims * batch_size, name in ("photos", "digits")
    images = data.load(name) if small else data.load(name, limit=count + NUM_OTHERS)
    if len(images.images) < count:
        raise ValueError(f"--victims times --batch-size must be at most {len(images.images)} for {name}, got {count}")
    if name == "photos":
        kept = ~np.isin(images.labels, images.labels[:count])
    else:
        kept = np.arange(len(images.images)) >= count
    gallery = images.images[kept] if small else data.load(name, split="train", limit=2_000).images
    normalized = jnp.asarray(images.normalize(images.images.astype(jnp.result_type(float))))
    every = Batch(normalized, jnp.asarray(images.labels))
    truth = jax.tree.map(lambda leaf: leaf[:count].reshape(victims, batch_size, *leaf.shape[1:]), every)
    others = jax.tree.map(lambda leaf: leaf[count : count + NUM_OTHERS], every)
    pixels = images.images[:count].reshape(victims, batch_size, *images.images.shape[1:])
    module = _built(model, images.images.shape[1:], len(images.class_names), seed)
    return Case(images, truth, others, pixels, gallery, module, local_steps, learning_rate)


def _built(model: str, shape: tuple[int, ...], num_classes: int, seed: int) -> nnx.Module:
    """Builds the model by one program, in place of one for each operation of the initialisation."""

    @nnx.jit
    def build() -> nnx.Module:
        return models.MODELS[model](shape, num_classes, rngs=nnx.Rngs(seed))

    return build()
