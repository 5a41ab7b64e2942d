"""APRIL's closed form on vision transformers: small images, a photograph, and the precision of the client.

    python benchmarks/april.py [cifar10] [photo] [--images N] [--seed N]

`cifar10` needs the extra `data`, and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR); `photo` needs the extra `demo`.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from flax import nnx
from parts import run_parts

from gia_jax import Batch, Observation, ThreatModel, attacks, clients, data, labels, models, observe
from gia_jax.base import Params
from gia_jax.models.functional import ApplyFn

THREAT = ThreatModel()
TYPES = ("float64", "float32", "bfloat16")
LAYERS = attacks.TokenLayers.named(
    position="position", patch="patch", attention="block0.attention", class_token="class_token"
)


def network(shape: tuple[int, ...], classes: int, seed: int, dtype: str, **settings: Any) -> tuple[ApplyFn, Params]:
    """An untrained network whose first block is plain unless the settings say otherwise."""
    settings = {"first_block": "plain"} | settings
    apply_fn, params = models.functional(models.ViT(shape, classes, **settings, rngs=nnx.Rngs(seed)))
    return apply_fn, jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def attacked(images: data.ImageData, seed: int, dtype: str, **settings: Any) -> dict[str, str]:
    """What the attack finds of every image, each the update of a client that computes in a type."""
    shape, classes = images.images.shape[1:], len(images.class_names)
    apply_fn, params = network(shape, classes, seed, dtype, **settings)
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    inputs = jnp.asarray(images.normalize(images.images.astype(np.float64))).astype(dtype)
    seen = [
        observe(jax.random.key(i), THREAT, client_fn, params, Batch(inputs[i : i + 1], jnp.asarray([label])))
        for i, label in enumerate(images.labels)
    ]
    attack = attacks.april(client_fn, layers_fn=LAYERS, label_fn=labels.bias_counts(labels.dense("head")))
    began = time.perf_counter()
    compiled = jax.jit(attack).lower(jax.random.key(seed), seen[0]).compile()
    compile_seconds, seconds, found = time.perf_counter() - began, [], []
    for i, one in enumerate(seen):
        began = time.perf_counter()
        found.append(jax.block_until_ready(compiled(jax.random.key(seed + 1 + i), one)))
        seconds.append(time.perf_counter() - began)
    psnr = [decibels(one.batch.inputs, inputs[i : i + 1], images) for i, one in enumerate(found)]
    right = np.mean([int(one.batch.labels[0]) == label for one, label in zip(found, images.labels, strict=True)])
    losses = [float(one.loss) for one in found]
    return {
        "client": dtype,
        "images": str(len(seen)),
        "dB": f"{np.mean(psnr):.1f}",
        "worst dB": f"{np.min(psnr):.1f}",
        "loss": f"{np.median(losses):.1e}",
        "condition of A": f"{np.median([condition(one) for one in seen]):.1e}",
        "labels right": f"{right:.0%}",
        "compile s": f"{compile_seconds:.0f}",
        "s an image": f"{np.median(seconds):.2f}",
    }


def condition(seen: Observation) -> float:
    """The condition number of the rows of A that belong to patches."""
    values = np.linalg.svd(np.asarray(seen.update["position"][1:], np.float64), compute_uv=False)
    return float(values[0] / values[-1])


def decibels(found: Any, truth: Any, images: data.ImageData) -> float:
    """PSNR of pixels in [0, 1], not clipped."""
    error = (np.asarray(found, np.float64) - np.asarray(truth, np.float64)) * np.asarray(images.std)
    return float(-10 * np.log10(np.mean(np.square(error))))


def refused(images: data.ImageData, seed: int, **settings: Any) -> str:
    """What the attack says of the network as it was published."""
    shape = images.images.shape[1:]
    apply_fn, params = network(shape, len(images.class_names), seed, "float64", first_block="residual", **settings)
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    seen = Observation(params, params, {"inputs_like": jnp.zeros((1, *shape))})
    try:
        attacks.april(client_fn, layers_fn=LAYERS)(jax.random.key(seed), seen)
    except ValueError as error:
        return str(error)
    raise AssertionError("the network was not refused")


def cifar10(args: argparse.Namespace) -> None:
    """The first test images, in patches of 4x4 pixels, for each precision of the client."""
    images = data.load("cifar10", limit=args.images)
    rows = [attacked(images, args.seed, dtype) for dtype in TYPES]
    record.write(
        "cifar10",
        "APRIL's closed form on the first test images of CIFAR-10, 64 patches of 4x4 pixels",
        rows,
        f"`vit_april`: width 192, depth 4, 3 heads, untrained, seed {args.seed}. The client computes in the type "
        "named; the attack solves in float64. PSNR is of pixels in [0, 1], not clipped, and its mean over images. "
        "The loss (median) is the attacker's own measure: the relative residual, or the rounding of the update times "
        "the condition number, at most 1. Labels are counted from the bias. "
        f"The network as it was published is refused: '{refused(images, args.seed)}.' "
        f"Threat model: {THREAT.describe()}.",
    )


def photo(args: argparse.Namespace) -> None:
    """One photograph of 224x224 pixels on a network of the width of ViT-B/16, with two blocks."""
    images = data.photos(size=224)
    one = images._replace(images=images.images[:1], labels=images.labels[:1], ids=images.ids[:1])
    settings = {"patch_size": 16, "width": 768, "heads": 12, "depth": 2}
    rows = [attacked(one, args.seed, dtype, **settings) for dtype in ("float64", "float32")]
    record.write(
        "photo",
        "APRIL's closed form on a photograph of 224x224 pixels, 196 patches of 16x16 pixels",
        rows,
        f"Image {one.ids[0]!r} of `data.photos(size=224)`; width 768, 12 heads, as ViT-B/16, but two blocks, the first "
        f"one plain; untrained, seed {args.seed}. A patch has 768 pixels, as many as the width. The columns are those "
        f"of [cifar10](cifar10.md). Threat model: {THREAT.describe()}.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="of CIFAR-10")
    parser.add_argument("--seed", type=int, default=0, help="of the network and the attacker")
    jax.config.update("jax_enable_x64", True)
    run_parts(parser, cifar10, photo)


if __name__ == "__main__":
    main()
