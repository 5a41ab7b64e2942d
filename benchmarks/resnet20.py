"""A ResNet-20 trained on CIFAR-10, whose weights other tables attack.

    python benchmarks/resnet20.py [train] [--epochs N] [--small-epochs N] [--images N] [--seed N] [--to NAME]

Needs the extras `data` and `interop`, and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). It writes
results/resnet20/NAME.safetensors, and the state after every epoch beside it, from which a run that was stopped goes on.
Half an hour to an hour on two cores.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray
from parts import run_parts
from tqdm import tqdm
from training import accuracy

from gia_jax import Batch, data, interop, models
from gia_jax.interop.tensors import named

BATCH = 128
PEAK, WARM_UP = 0.4, 0.2  # of the learning rate, and the share of the steps that it takes to get there
DECAY = 3e-4  # of the weights, not of the normalisation
PAD = 4  # pixels on every side, before a crop
SMALL = 24  # pixels of a crop in the first epochs


def network(weights: Path | None = None, *, seed: int = 0) -> nnx.Module:
    """The network, with the weights and running statistics of a file that `train` wrote, or untrained."""
    module = models.MODELS["resnet20"](rngs=nnx.Rngs(seed))
    if weights is not None:
        restore(module, interop.load_tensors(weights))
    return module


def weights_file(name: str) -> Path:
    """The file of a network that `train` wrote under this name."""
    return record.RESULTS / "resnet20" / f"{name}.safetensors"


def restore(node: Any, arrays: dict[str, np.ndarray]) -> None:
    """Puts arrays by their names into a module or the state of an optimizer, which must have just these."""
    state = nnx.state(node)
    tree = nnx.to_pure_dict(state)
    names = list(named(tree))
    if set(names) != set(arrays):
        raise ValueError(f"arrays must have the names of the module, got others: {sorted(set(names) ^ set(arrays))}")
    leaves = [jnp.asarray(arrays[name]) for name in names]
    nnx.replace_by_pure_dict(state, jax.tree.unflatten(jax.tree.structure(tree), leaves))
    nnx.update(node, state)


@functools.partial(jax.jit, static_argnames="size")
def augmented(key: PRNGKeyArray, inputs: Float[Array, "b h w c"], *, size: int) -> Float[Array, "b s s c"]:
    """Crops of padded images, mirrored by a coin."""
    key_place, key_mirror = jax.random.split(key)
    padded = jnp.pad(inputs, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    places = jax.random.randint(key_place, (len(inputs), 2), 0, padded.shape[1] - size + 1)
    crop = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (size, size, image.shape[-1])))
    mirrored = jax.random.bernoulli(key_mirror, shape=(len(inputs), 1, 1, 1))
    crops = crop(padded, places)
    return jnp.where(mirrored, crops[:, :, ::-1], crops)


def optimizer_of(module: nnx.Module, steps: int) -> nnx.Optimizer:
    """Stochastic gradient descent with Nesterov's momentum; its rate rises and falls on straight lines."""
    rise = int(WARM_UP * steps)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, PEAK, rise), optax.linear_schedule(PEAK, 0.0, steps - rise)], [rise]
    )
    decay = optax.add_decayed_weights(DECAY, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))
    return nnx.Optimizer(module, optax.chain(decay, optax.sgd(schedule, 0.9, nesterov=True)), wrt=nnx.Param)


@nnx.jit
def step(module: nnx.Module, optimizer: nnx.Optimizer, batch: Batch) -> Array:
    """One step of training; the loss before it."""

    def loss_fn(module: nnx.Module) -> Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(module(batch.inputs), batch.labels))

    loss, gradient = nnx.value_and_grad(loss_fn)(module)
    optimizer.update(module, gradient)
    return loss


def train(args: argparse.Namespace) -> None:
    """Trains the network, and writes its weights and a row for every epoch."""
    images = data.load("cifar10", split="train", limit=args.images)
    inputs, labels = images.normalize(images.images), images.labels
    steps = len(labels) // BATCH
    module = network(seed=args.seed)
    optimizer = optimizer_of(module, args.epochs * steps)
    state_file, rows = record.folder() / f"{args.to}_state.npz", []
    if state_file.exists():
        saved = interop.load_tensors(state_file)
        rows = [{"epoch": str(i + 1), "training loss": f"{loss:.4f}"} for i, loss in enumerate(saved.pop("losses"))]
        for prefix, node in (("module.", module), ("optimizer.", optimizer)):
            restore(node, {name.removeprefix(prefix): leaf for name, leaf in saved.items() if name.startswith(prefix)})
        print(f"goes on after epoch {len(rows)}", flush=True)
    began = time.perf_counter()
    for epoch in range(len(rows), args.epochs):
        module.train()
        key = jax.random.fold_in(jax.random.key(args.seed), epoch)
        order = np.random.default_rng((args.seed, epoch)).permutation(len(labels))
        size, losses = (SMALL if epoch < args.small_epochs else inputs.shape[1]), []
        for i in tqdm(range(steps), desc=f"epoch {epoch + 1} of {args.epochs}", mininterval=10):
            index = order[i * BATCH : (i + 1) * BATCH]
            crops = augmented(jax.random.fold_in(key, i), inputs[index], size=size)
            losses.append(step(module, optimizer, Batch(crops, jnp.asarray(labels[index]))))
        rows.append({"epoch": str(epoch + 1), "training loss": f"{np.mean(losses):.4f}"})
        nodes = {"module": module, "optimizer": optimizer}
        state = {name: nnx.to_pure_dict(nnx.state(node)) for name, node in nodes.items()}
        interop.save_tensors(state_file, {**state, "losses": np.array([float(row["training loss"]) for row in rows])})
    seconds = time.perf_counter() - began
    interop.save_tensors(weights_file(args.to), nnx.to_pure_dict(nnx.state(module)))
    shares = {split: shares_of(module, split) for split in ("train", "test")}
    state_file.unlink()
    record.write(
        args.to,
        f"ResNet-20 trained on CIFAR-10 for {args.epochs} epochs: {shares['test']:.2%} of the test images right",
        rows,
        f"{shares['train']:.2%} of the training images right. Stochastic gradient descent, Nesterov's momentum 0.9, "
        f"batches of {BATCH}, learning rate on straight lines to {PEAK:g} within {WARM_UP:.0%} of the steps and back "
        f"to 0, weight decay {DECAY:g}; images are mirrored and cropped, in the first {args.small_epochs} epochs to "
        f"{SMALL} pixels; seed {args.seed}. {seconds / 60:.0f} minutes in the last start, beside other work.",
    )


def shares_of(module: nnx.Module, split: str) -> float:
    """The share of the images of a split that the network classifies right."""
    images = data.load("cifar10", split=split)
    return accuracy(*models.functional(module), images.normalize(images.images), images.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--small-epochs", type=int, default=6, help="of them, with crops of fewer pixels")
    parser.add_argument("--images", type=int, default=50_000, help="of the training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", default="converged", help="name of the files")
    run_parts(parser, train)


if __name__ == "__main__":
    main()
