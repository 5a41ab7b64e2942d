"""The small generators of benchmarks/gias.py: decoders of variational autoencoders, trained on demand.

    python benchmarks/generators.py [--images N] [--generator-steps N] [--width N] [--latents N] [--data NAME ...]
        [--save FOLDER]

Needs the extra `data`, and MNIST and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). It trains on the first images of the
training set by id and reports how well the decoder's best images fit test images: nobody's victim is seen in training.
`python -m gia_jax attack --attack gias --generator FILE` attacks with one that was saved.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from flax import nnx

from gia_jax import data, models
from gia_jax.attacks.gias import GeneratorFn
from gia_jax.base import Params

NOISE = 0.1  # the standard deviation of a pixel that the decoder does not explain
BATCH = 64


class Generator(NamedTuple):
    """A generator of inputs in the space of a model, its weights before and after training, and the trained module."""

    generator_fn: GeneratorFn
    latent_shape: tuple[int]
    untrained: Params
    params: Params
    decoder: models.Decoder


def train_generator(
    images: data.ImageData, *, classes: Sequence[int] | None = None, steps: int, width: int, latents: int, seed: int = 0
) -> Generator:
    """A decoder of images of some classes, None for all, by Adam at 3e-3, falling, on the evidence lower bound."""
    pixels = jnp.asarray(images.images if classes is None else images.images[np.isin(images.labels, classes)])
    vae = models.VariationalAutoencoder(pixels.shape[1:], latents, width=width, rngs=nnx.Rngs(seed))
    decode, untrained = models.functional(vae.decoder)
    graph, params, rest = nnx.split(vae, nnx.Param, ...)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, max(steps, 1)))

    def loss_fn(params: Params, key: jax.Array, batch: jax.Array) -> jax.Array:
        decoded, divergence = nnx.merge(graph, params, rest)(key, batch)
        return jnp.mean(jnp.sum(jnp.square(decoded - batch), (1, 2, 3)) / (2 * NOISE**2) + divergence)

    @jax.jit
    def step(carry: tuple, key: jax.Array) -> tuple:
        params, state = carry
        key_batch, key_code = jax.random.split(key)
        batch = pixels[jax.random.randint(key_batch, (BATCH,), 0, len(pixels))]
        updates, state = optimizer.update(jax.grad(loss_fn)(params, key_code, batch), state)
        return optax.apply_updates(params, updates), state

    carry = (params, optimizer.init(params))
    for key in jax.random.split(jax.random.key(seed), steps):
        carry = step(carry, key)
    decoder = nnx.merge(graph, carry[0], rest).decoder

    def generator_fn(params: Params, z: jax.Array) -> jax.Array:
        return images.normalize(decode(params, z))

    return Generator(generator_fn, (latents,), untrained, models.functional(decoder)[1], decoder)


def best_fit(generator: Generator, params: Params, images: data.ImageData) -> float:
    """Mean PSNR in dB of test images against the closest ones of the generator, by 300 steps of Adam on latents."""
    inputs, optimizer = jnp.asarray(images.normalize(images.images)), optax.adam(0.1)

    def step(carry: tuple, _: None) -> tuple:
        z, state = carry
        grad = jax.grad(lambda z: jnp.sum(jnp.square(generator.generator_fn(params, z) - inputs)))(z)
        updates, state = optimizer.update(grad, state)
        return (optax.apply_updates(z, updates), state), None

    z = jnp.zeros((len(inputs), *generator.latent_shape))
    (z, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=300))((z, optimizer.init(z)))
    made = images.denormalize(np.asarray(generator.generator_fn(params, z)))
    return float(np.mean(-10 * np.log10(np.mean((made - images.images) ** 2, (1, 2, 3)))))


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of training."""
    parser.add_argument("--images", type=int, default=20_000, help="of the training set")
    parser.add_argument("--generator-steps", type=int, default=2_000)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--latents", type=int, default=10, help="entries of a latent")
    parser.add_argument("--data", nargs="+", default=["mnist", "cifar10"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--save", type=Path, help="folder for the decoders, such as mnist_0_to_4.npz")
    args = parser.parse_args()
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.data:
        train, test = data.load(name, split="train", limit=args.images), data.load(name, limit=1_000)
        for half, classes in (("all", range(10)), ("0 to 4", range(5))):
            began = time.process_time()
            generator = train_generator(
                train, classes=classes, steps=args.generator_steps, width=args.width, latents=args.latents
            )
            spent = time.process_time() - began
            if args.save is not None:
                models.save_decoder(args.save / f"{name}_{half.replace(' ', '_')}.npz", generator.decoder)
            fits = {
                f"dB, classes {label}": f"{best_fit(generator, generator.params, _some(test, group)):.1f}"
                for label, group in (("0 to 4", range(5)), ("5 to 9", range(5, 10)))
            }
            size = sum(leaf.size for leaf in jax.tree.leaves(generator.params))
            rows.append({"data": name, "trained on": half, "parameters": f"{size:,}", "CPU s": f"{spent:.0f}"} | fits)
    record.write(
        "table",
        "Decoders of variational autoencoders: how near they come to test images by their latent alone",
        rows,
        f"Trained {args.generator_steps} steps of {BATCH} on the first {args.images} training images, seed 0. PSNR of "
        "the best fit by Adam on the latent, means over the first 100 test images of the classes named.",
    )


def _some(images: data.ImageData, classes: Sequence[int]) -> data.ImageData:
    chosen = np.flatnonzero(np.isin(images.labels, classes))[:100]
    return images._replace(images=images.images[chosen], labels=images.labels[chosen])


if __name__ == "__main__":
    main()
