"""A setting of the command line: victims and their client, with any defenses, and an attack on them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from gia_jax import clients, data, labels, metrics, models
from gia_jax._compile import RUN_ONCE
from gia_jax.attacks.gias import NUM_LATENT_STEPS
from gia_jax.base import Batch, ClientFn, LossFn, Observation, Params, Statistics, Updates
from gia_jax.cli.names import INVERTIBLE, Generator, Target, make_analytic, make_attack
from gia_jax.defenses.mixing import as_probabilities
from gia_jax.defenses.protected import Part, Protected, encoded, protect
from gia_jax.models.functional import has_batch_norm
from gia_jax.sweep.study import ProgressFn, Study, study, study_analytic
from gia_jax.threat import ThreatModel, control, observe

NUM_OTHERS = 16  # images of a client beside those of its batch, for defenses that mix images
PRIOR_ONLY = "prior only"
MAX_ENTRIES = 2**28  # of the derivative of an update by an image; 1 GiB in float32


class Case(NamedTuple):
    """Victims and what is public about them.

    Attributes:
        images: All images of the data set that were read.
        truth: The victims' batches in the model's space, with a leading axis of victims.
        others: Images that MixUp and InstaHide may mix in, the same for every victim.
        pixels: The victims' images in [0, 1].
        gallery: Public images, none of them a victim's; there may be none.
        module: The model with its initial weights.
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
        """Classes of the data."""
        return len(self.images.class_names)

    @property
    def statistics_fn(self) -> Callable[..., Statistics] | None:
        """Statistics of the features of the model, as a function; None without batch normalisation."""
        return models.batch_norm_inputs(self.module) if has_batch_norm(self.module) else None

    def running_statistics(self, observation: Observation) -> Statistics:
        """The running statistics of the model; those of an untrained one say nothing about any data."""
        like = jnp.zeros((1, *self.truth.inputs.shape[2:]), self.truth.inputs.dtype)
        return models.running_statistics(self.module, observation.params, like)

    def generator(self, path: Path | None, key: PRNGKeyArray, *, num_latent_steps: int | None = None) -> Generator:
        """A generator of such images: trained, from a file of `models.save_decoder`, or untrained (deep image prior).

        Args:
            path: Path of the file; None for an untrained decoder.
            key: Key of the untrained weights.
            num_latent_steps: Latent steps of GIAS; None for the paper's number, or 0 where the generator is untrained.

        Returns:
            The generator, in the model's space.

        Raises:
            ValueError: A file that is none of a decoder, or one of other shapes of images; without a file, images whose
                height or width is no multiple of 4.
        """
        shape = self.pixels.shape[2:]
        decoder = models.Decoder(shape, rngs=nnx.Rngs(key)) if path is None else models.load_decoder(path)
        if decoder.input_shape != shape:
            made, wanted = ("x".join(map(str, s)) for s in (decoder.input_shape, shape))
            raise ValueError(f"generator must make images of {wanted} for {self.images.name}, got {path}, of {made}")
        if num_latent_steps is None:
            num_latent_steps = 0 if path is None else NUM_LATENT_STEPS
        decode, weights = models.functional(decoder)
        mean, std = (jnp.asarray(value, jnp.float32) for value in (self.images.mean, self.images.std))

        def generator_fn(params: Params, z: Array) -> Array:
            return (decode(params, z) - mean) / std

        return Generator(generator_fn, weights, (decoder.latent_size,), num_latent_steps)

    def protect(self, parts: Sequence[Part]) -> Protected:
        """The client with these defenses."""

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
        """`information` (of the first victim) and `covariance` (of the gallery), of pixels in [0, 1], under DP-SGD.

        Defenses of the update that come after the noise only take information away. Empty without DP-SGD or its noise,
        with defenses of another kind, and where the derivative of the update by the image is too large for memory; no
        `covariance` with fewer than two public images.
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


def pixel_information(client_fn: ClientFn, params: Params, batch: Batch, images: data.ImageData) -> Array:
    """`metrics.fisher_information` for noise of scale 1, in units of pixels in [0, 1] instead of the model's."""
    found = jax.jit(lambda p, b: metrics.fisher_information(client_fn, p, b, 1.0, batch_size=256))(params, batch)
    std = jnp.broadcast_to(jnp.asarray(images.std, found.dtype), batch.inputs.shape[1:]).ravel()
    return found / std[:, None] / std


def pixel_covariance(images: np.ndarray) -> Array:
    """The covariance of two images or more in [0, 1], shape (n, h, w, c), for `metrics.van_trees_bound`."""
    return jnp.asarray(np.cov(images.reshape(len(images), -1), rowvar=False))


class Outcome(NamedTuple):
    """What an attack achieved on some of the victims that were attacked together.

    Attributes:
        study: The study, with a reconstruction of each victim.
        scores: Its scores against the truth.
        explained: How much of each victim's update its reconstruction explains, arrays of shape (victims,).
    """

    study: Study
    scores: metrics.Scores
    explained: metrics.Explained


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
    """Victims in the order of the data's ids, each with its own images, and an untrained model.

    Args:
        model: A key of `models.MODELS`.
        name: "photos", "digits", or a data set of TFDS.
        victims: Number of clients.
        batch_size: Number of images of each client.
        seed: Seed of the model's weights.
        local_steps: Number of SGD steps of each client on its whole batch.
        learning_rate: Learning rate of the local steps.

    Returns:
        The case, in float64 where that is enabled.

    Raises:
        ValueError: More images than the data set has.
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
    """One program in place of one for each operation of the initialisation."""

    @nnx.jit
    def build() -> nnx.Module:
        return models.MODELS[model](shape, num_classes, rngs=nnx.Rngs(seed))

    return build()


def see(
    case: Case,
    protected: Mapping[str, Protected],
    key: PRNGKeyArray,
    *,
    known: Sequence[bool],
    statistics: bool = False,
) -> Any:
    """What the server sees of every victim under every defense, with and without its labels.

    Args:
        case: The victims.
        protected: Their clients, by a name; they share one set of parameters.
        key: Key of the clients, each of which draws its own, and of the threat model.
        known: Whether labels are granted, one or both of False and True.
        statistics: Whether the feature statistics of the client's batch are granted.

    Returns:
        By `known`, then by name: observations, leading axis of victims. Labels are probabilities, so that those of
        mixed images are like the others, where more than one defense is to be attacked by one program.
    """
    params, measure = next(iter(protected.values())).params, case.statistics_fn
    if statistics and measure is None:
        raise ValueError("statistics need a model with batch normalisation, got one without")
    soft = len(protected) > 1

    def of_one(key: PRNGKeyArray, batch: Batch) -> Any:
        seen: dict[bool, dict[str, Observation]] = {granted: {} for granted in known}
        for name, one in protected.items():
            key, key_encode, key_client, key_threat = jax.random.split(key, 4)
            encoding = encoded(one.encode_fn, key_encode, batch, case.others)
            if soft:
                encoding = Batch(encoding.inputs, as_probabilities(encoding, case.num_classes))
            # The gradient once, for all that the threat models grant.
            update = one.client_fn(key_client)(params, encoding)
            for granted in known:
                observation = observe(
                    key_threat,
                    ThreatModel(labels=granted, statistics=statistics),
                    lambda *_, u=update: u,
                    params,
                    encoding,
                    num_classes=case.num_classes,
                    statistics=measure(params, encoding.inputs) if statistics and measure is not None else None,
                )
                seen[granted][name] = observation._replace(params=())
        return seen

    victims = len(case.truth.labels)
    seen = jax.jit(jax.vmap(of_one), compiler_options=RUN_ONCE)(jax.random.split(key, victims), case.truth)
    return {granted: {name: o._replace(params=params) for name, o in group.items()} for granted, group in seen.items()}


def attack(
    case: Case,
    observations: Mapping[str, Observation],
    assumed: Protected,
    name: str,
    key: PRNGKeyArray,
    *,
    model: str,
    known_labels: bool,
    adaptive: bool = False,
    statistics: str = "none",
    generator: Generator | None = None,
    solver: str = "paper",
    num_steps: int,
    num_restarts: int = 1,
    lanes: int = 16,
    prior_only: str | None = None,
    progress_fn: ProgressFn | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Outcome]:
    """One attack, as one program, on all observations and on random updates.

    Args:
        case: The victims.
        observations: Observations by name, as `see` makes them.
        assumed: The client the attacker assumes; for one that does not know the defenses, a client with those of the
            model alone, which the parameters that the server sent tell it.
        name: Name of the attack.
        key: The attacker's key.
        model: Name of the model, for analytic attacks.
        known_labels: Whether the labels were granted.
        adaptive: Whether it compares updates as one that knows the defenses of `assumed`.
        statistics: Statistics of the features that GradInversion matches: "none", the model's "running" ones, or the
            "exact" ones that were granted.
        generator: Generator of GIAS, from `Case.generator`.
        solver: Name of the solver, as for `make_attack`.
        num_steps: Number of steps of every restart, at least 1.
        num_restarts: Number of restarts of every victim, at least 1; the one of the lowest finite loss is kept.
        lanes: Number of restarts under one `vmap`, at least 1.
        prior_only: The observations that random updates imitate, by name; None for no random updates.
        progress_fn: Called with signs of life, as by `study`.
        checkpoint: Folder for the state of the run, as for `study`; None keeps nothing.

    Returns:
        Outcomes by the names of the observations, and of the random updates by "prior only".
    """
    key_attack, key_random = jax.random.split(key)
    groups = dict(observations)
    if prior_only is not None:
        groups[PRIOR_ONLY] = jax.jit(control)(key_random, observations[prior_only])
    together = joined(list(groups.values()))
    low, high = (bound.astype(case.truth.inputs.dtype) for bound in case.images.bounds())
    target = Target(
        assumed.assumed_fn,
        labels.dense("head"),
        case.num_classes,
        case.truth.labels.shape[1],
        (low, high),
        apply_fn=assumed.apply_fn,
        statistics_fn=None if statistics == "none" else case.statistics_fn,
        known_statistics_fn=case.running_statistics if statistics == "running" else None,
        generator=generator,
    )
    target = target._replace(adapt_fn=assumed.adapt_fn) if adaptive else target
    rule = "known" if known_labels else "inferred"
    if name in INVERTIBLE:
        found = study_analytic(
            make_analytic(name, target, model=model, labels=rule), key_attack, together, progress_fn=progress_fn
        )
    else:
        found = study(
            make_attack(name, target, labels=rule, solver=solver, num_steps=num_steps),
            key_attack,
            together,
            num_steps=num_steps,
            num_restarts=num_restarts,
            lanes=lanes,
            progress_fn=progress_fn,
            checkpoint=checkpoint,
        )
    truth = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(groups)), case.truth)
    scores = metrics.score(found.reconstruction.batch, truth, case.images)
    shares = explained(assumed.assumed_fn, together, found.reconstruction.batch, lanes=lanes)
    victims, outcomes = len(case.truth.labels), {}
    for i, group in enumerate(groups):
        part = slice(i * victims, (i + 1) * victims)
        reconstruction = jax.tree.map(lambda leaf, part=part: leaf[part], found.reconstruction)
        own = found._replace(reconstruction=reconstruction, losses=found.losses[part])
        own_scores, own_shares = (jax.tree.map(lambda leaf, part=part: leaf[part], tree) for tree in (scores, shares))
        outcomes[group] = Outcome(own, own_scores, own_shares)
    return outcomes


def explained(client_fn: ClientFn, observations: Observation, batch: Batch, *, lanes: int = 16) -> metrics.Explained:
    """Measures for every victim how much of its update its reconstruction explains.

    Args:
        client_fn: Client that the attacker assumes.
        observations: Observations with a leading axis of victims.
        batch: Reconstructions with the same leading axis.
        lanes: Number of victims under one `vmap`, at least 1.

    Returns:
        What `metrics.explained` says, arrays of shape (victims,).
    """

    def of_one(victim: tuple[Updates, Batch]) -> metrics.Explained:
        update, found = victim
        return metrics.explained(client_fn, Observation(observations.params, update, {}), found)

    of_all = jax.jit(lambda victims: jax.lax.map(of_one, victims, batch_size=lanes), compiler_options=RUN_ONCE)
    return jax.tree.map(np.asarray, of_all((observations.update, jax.tree.map(jnp.asarray, batch))))


def joined(observations: Sequence[Observation]) -> Observation:
    """The victims of several observations of the same parameters, as one observation."""
    updates_and_extras = [(observation.update, observation.extra) for observation in observations]
    return Observation(
        observations[0].params, *jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *updates_and_extras)
    )
