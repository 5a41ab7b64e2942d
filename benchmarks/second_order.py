"""Where Levenberg-Marquardt is exact, and why it is not elsewhere: activations, training, batches, float32.

    python benchmarks/second_order.py [PART ...] [--victims N] [--activations NAME ...] [--batches N ...] [--side N]

Parts: `lenet` (the LeNet of DLG on CIFAR-10 images, from float32 gradients), `exported` (the same from gradients that
PyTorch computes of its own weights, which needs torch), `table` (LeNets on smaller images, row by
row), `memory` (steps of conjugate gradients on a trained ResNet-20). They need the extra `data`, and CIFAR-10 prepared
by TFDS (GIA_JAX_DATA_DIR); `memory` needs `interop` as well. Everything is chosen by the attack's own loss. Columns
with "(truth)" in their names are diagnoses, which no attacker can make. Seconds are those of the processor.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import resnet20
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from parts import run_parts
from training import accuracy, train, uniform

from gia_jax import (
    Batch,
    Observation,
    ThreatModel,
    clients,
    data,
    gradient_matching,
    interop,
    keep_best,
    matching,
    metrics,
    models,
    observe,
    observed,
    run,
)
from gia_jax.base import ClientFn, Params
from gia_jax.matching.second_order import NUM_STARTS, NUM_STEPS, NUM_WARM_UP_STEPS

THREAT = ThreatModel(labels=True)
EXACT = 100  # dB
ACTIVATIONS = {name: getattr(jax.nn, name) for name in ("sigmoid", "tanh", "gelu", "softplus", "relu")}
CLASSES = 10
TRAINING_STEPS = 300


class Found(NamedTuple):
    """What the attack found of one victim.

    Attributes:
        psnr: PSNR of each image, in dB.
        loss: The attacker's own loss at the end, as a share of the squared norm of the update.
        loss_at_truth: The same at the true images.
        steps: Number of steps of Levenberg-Marquardt until the search ended.
        seconds: Processor seconds without compiling.
    """

    psnr: np.ndarray
    loss: float
    loss_at_truth: float
    steps: int
    seconds: float


class Solver:
    """The attack on one network and size of batch, compiled once for all weights, victims and observations."""

    def __init__(self, client_fn: ClientFn) -> None:
        self.client_fn = client_fn
        self.attack = keep_best(matching.second_order(functools.partial(gradient_matching, client_fn)))
        self.compiled: Any = None
        self.compile_seconds = 0.0

    def __call__(self, key: Array, seen: Observation, batch: Batch, images: data.ImageData) -> Found:
        """Attacks one victim; its true batch is for the scores and the diagnosis."""
        if self.compiled is None:
            began = time.process_time()
            attack_fn = jax.jit(lambda key, seen: run(self.attack, key, seen, num_steps=NUM_STEPS))
            self.compiled = attack_fn.lower(key, seen).compile()
            self.compile_seconds = time.process_time() - began
        began = time.process_time()
        found, info = jax.block_until_ready(self.compiled(key, seen))
        seconds = time.process_time() - began
        truth = jax.tree.map(lambda leaf: leaf[None], wide(batch))
        psnr = metrics.score(jax.tree.map(lambda leaf: leaf[None], found.batch), truth, images).psnr[0]
        size = float(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(seen.update)))
        residual = self.residual(seen, wide(batch))
        moved = np.diff(np.asarray(info.loss)) != 0
        steps = int(moved.size if moved[-1] else np.max(np.flatnonzero(moved), initial=-1) + 1)
        return Found(psnr, float(found.loss) / size, float(jnp.sum(residual**2)) / size, steps, seconds)

    def residual(self, seen: Observation, batch: Batch) -> Array:
        """How far the update of a batch is from the one that is seen, as a vector."""
        return ravel_pytree(self.client_fn(seen.params, batch))[0] - ravel_pytree(seen.update)[0]

    def diagnose(self, seen: Observation, batch: Batch) -> tuple[float, float]:
        """The condition of the Jacobian at the truth, and the PSNR that the rounding of the update would leave there.

        Returns:
            The least singular value over the largest, at most 1e-8 where it is less; and the PSNR in dB in the model's
            own units, for pixels of a standard deviation of 1, of the least-squares solution around the truth.
        """
        batch = wide(batch)

        def residual_fn(x: Array) -> Array:
            return self.residual(seen, batch._replace(inputs=x.reshape(batch.inputs.shape)))

        x = batch.inputs.ravel()
        residual, push = jax.linearize(residual_fn, x)
        rows = jax.jit(lambda: jax.lax.map(push, jnp.eye(x.size), batch_size=16))()
        normal = np.asarray(rows @ rows.T)
        values = np.linalg.eigvalsh(normal)
        condition = np.sqrt(max(values[0], 1e-16 * values[-1]) / values[-1])
        error = np.linalg.lstsq(normal, np.asarray(rows @ residual), rcond=1e-15)[0]
        return float(condition), float(np.sqrt(np.mean(error**2)))


def wide(tree: Any) -> Any:
    """Floating-point arrays in float64."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        jax.tree.map(jnp.asarray, tree),
    )


def seen_of(client_fn: ClientFn, params: Params, batch: Batch, dtype: Any) -> Observation:
    """What the server sees of a client that computes in `dtype`, in float64."""
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
    own = batch._replace(inputs=batch.inputs.astype(dtype))
    return wide(observe(jax.random.key(0), THREAT, jax.jit(client_fn), cast(params), own, num_classes=CLASSES))


def small(images: data.ImageData, side: int) -> data.ImageData:
    """Images of `side` pixels, each the mean of a square."""
    pixels = images.images
    factor = pixels.shape[1] // side
    means = pixels.reshape(len(pixels), side, factor, side, factor, -1).mean((2, 4), dtype=np.float64)
    return images._replace(images=means.astype(np.float32))


def trained(apply_fn: Callable[..., Array], params: Params, images: data.ImageData) -> Params:
    """A network after its first steps of training, by Adam."""
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    examples = Batch(jnp.asarray(images.normalize(images.images)), jnp.asarray(images.labels))
    train_fn = jax.jit(
        lambda params: train(
            lambda key: client_fn, optax.adam(3e-3), uniform(64), params, jax.random.key(0), examples, TRAINING_STEPS
        )
    )
    return train_fn(params)


def victims_of(images: data.ImageData, number: int, size: int) -> list[Batch]:
    """The first images, in float32, `size` a victim."""
    inputs = images.normalize(images.images[: number * size]).astype(np.float32)
    labels = images.labels[: number * size]
    return [
        Batch(jnp.asarray(inputs[i : i + size]), jnp.asarray(labels[i : i + size]))
        for i in range(0, number * size, size)
    ]


def lenet(args: argparse.Namespace) -> None:
    """The LeNet of DLG with weights and biases from U(-.5, .5), one network and image for each seed."""

    def see(seed: int, client_fn: ClientFn, params: Params, batch: Batch) -> Observation:
        del params
        _, own = models.functional(models.LeNet((32, 32, 3), CLASSES, rngs=nnx.Rngs(seed)))
        return seen_of(client_fn, own, batch, jnp.float32)

    of_seeds("lenet", see, "a gradient in float32", args)


def exported(args: argparse.Namespace) -> None:
    """The same network in PyTorch, which draws its weights and computes the gradient."""
    import torch
    from torch_networks import lenet as torch_lenet

    def see(seed: int, client_fn: ClientFn, params: Params, batch: Batch) -> Observation:
        del client_fn
        torch.manual_seed(seed)
        module = torch_lenet(32)
        inputs, labels = torch.tensor(np.asarray(batch.inputs).transpose(0, 3, 1, 2)), np.asarray(batch.labels)
        loss = torch.nn.functional.cross_entropy(module(inputs), torch.tensor(labels).long())
        weights = dict(module.named_parameters())
        gradients = torch.autograd.grad(loss, list(weights.values()))
        update = {name: gradient.numpy() for name, gradient in zip(weights, gradients, strict=True)}
        own = interop.from_torch({name: value.detach().numpy() for name, value in weights.items()}, params)
        shared = interop.from_torch(update, params)
        return wide(observed(own, shared, inputs_like=batch.inputs, labels=batch.labels, num_classes=CLASSES))

    of_seeds("exported", see, f"a gradient that PyTorch {torch.__version__} computed in float32", args)


def of_seeds(name: str, see: Callable[..., Observation], what: str, args: argparse.Namespace) -> None:
    """Attacks one network and image for each seed: `see(seed, client_fn, params_like, batch)` is what a server sees."""
    images, rows = data.load("cifar10", limit=args.victims), []
    apply_fn, like = models.functional(models.LeNet((32, 32, 3), CLASSES, rngs=nnx.Rngs(0)))
    solver = Solver(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    for seed, batch in enumerate(victims_of(images, args.victims, 1)):
        seen = see(seed, solver.client_fn, like, batch)
        found = solver(jax.random.fold_in(jax.random.key(0), seed), seen, batch, images)
        rows.append(
            {
                "seed": str(seed),
                "PSNR": f"{found.psnr[0]:.1f}",
                ">= 100 dB": "yes" if found.psnr[0] >= EXACT else "no",
                "own loss": f"{found.loss:.0e}",
                "loss (truth)": f"{found.loss_at_truth:.0e}",
                "steps": str(found.steps),
                "s": f"{found.seconds:.0f}",
                "s with compiling": f"{found.seconds + solver.compile_seconds:.0f}",
            }
        )
        print(rows[-1], flush=True)
    record.write(
        name,
        f"The sigmoid LeNet of DLG, from {what}: one network and CIFAR-10 test image for each seed",
        rows,
        f"Losses are shares of the update's squared norm. {SETTING}",
    )


SETTING = (
    f"{NUM_WARM_UP_STEPS} bounded steps of L-BFGS from {NUM_STARTS} near-grey starts, then at most {NUM_STEPS} steps "
    "of Levenberg-Marquardt from the start of the lowest loss, in float64. Seconds are those of the processor, on "
    f"shared cores. Columns with (truth) use the true images: no attacker has them. Threat model: {THREAT.describe()}."
)


def table(args: argparse.Namespace) -> None:
    """Every activation, size of batch, training and observation."""
    images = small(data.load("cifar10", limit=args.victims * max(args.batches)), args.side)
    public = small(data.load("cifar10", split="train", limit=10_000), args.side)
    rows, shares = [], []
    for name in args.activations:
        make = functools.partial(models.LeNet, (args.side, args.side, 3), CLASSES, activation=ACTIVATIONS[name])
        apply_fn, _ = models.functional(make(rngs=nnx.Rngs(0)))
        solvers = {size: Solver(clients.federated_sgd(clients.cross_entropy(apply_fn))) for size in args.batches}
        fresh = [models.functional(make(rngs=nnx.Rngs(seed)))[1] for seed in range(args.victims)]
        later = [trained(apply_fn, fresh[0], public)] * args.victims
        examples = public.normalize(public.images[:1_000])
        shares.append(f"{name} {accuracy(apply_fn, later[0], examples, public.labels[:1_000]):.0%}")
        for size, weights in itertools.product(args.batches, ("U(-.5, .5)", "trained")):
            networks = later if weights == "trained" else fresh
            victims, solver = victims_of(images, args.victims, size), solvers[size]
            diagnosis = None
            for dtype in (jnp.float32, jnp.float64):
                founds = []
                for i, (params, batch) in enumerate(zip(networks, victims, strict=True)):
                    seen = seen_of(solver.client_fn, params, batch, dtype)
                    founds.append(solver(jax.random.fold_in(jax.random.key(0), i), seen, batch, images))
                    if diagnosis is None:
                        diagnosis = solver.diagnose(seen, batch)
                rows.append(
                    {"activation": name, "weights": weights, "batch": str(size), "update": jnp.dtype(dtype).name}
                    | row_of(founds, diagnosis)
                )
                print(rows[-1], flush=True)
    record.write(
        args.to,
        f"Where Levenberg-Marquardt is exact: LeNets on CIFAR-10 test images of {args.side} pixels",
        rows,
        "n victims, each untrained network of another seed; trained: one network after "
        f"{TRAINING_STEPS} steps of Adam on batches of 64 (right of 1,000 training images: {', '.join(shares)}). "
        "'exact': images at 100 dB or more. Losses are medians, as shares of the update's squared norm. 'condition': "
        "least over largest singular value of the Jacobian at the truth of the first victim, at most 1e-8 where it is "
        "less. 'rounding leaves': what the rounding to float32 moves the solution around the truth, of the first "
        f"victim, in dB. {SETTING}",
    )


def row_of(founds: list[Found], diagnosis: tuple[float, float] | None) -> dict[str, str]:
    """The columns of one row of the table."""
    assert diagnosis is not None
    psnr = np.concatenate([found.psnr for found in founds])
    losses, at_truth = (np.median([getattr(found, name) for found in founds]) for name in ("loss", "loss_at_truth"))
    return {
        "n": str(len(founds)),
        "exact": f"{np.sum(psnr >= EXACT)} of {len(psnr)}",
        "PSNR": f"{np.median(psnr):.0f} ({psnr.min():.0f} to {psnr.max():.0f})",
        "own loss": f"{losses:.0e}",
        "loss (truth)": f"{at_truth:.0e}",
        "condition (truth)": f"{diagnosis[0]:.0e}",
        "rounding leaves (truth)": f"{-20 * np.log10(diagnosis[1]):.0f}",
        "why not (truth)": "; ".join(dict.fromkeys(why(found) for found in founds if found.psnr.min() < EXACT)) or "-",
        "steps": f"{np.median([found.steps for found in founds]):.0f}",
        "s": f"{np.mean([found.seconds for found in founds]):.0f}",
    }


def why(found: Found) -> str:
    """Why a victim was not found exactly."""
    if found.loss <= 10 * max(found.loss_at_truth, 1e-20):
        return "another solution" if found.loss_at_truth < 1e-20 else "rounding"
    return "not at the end" if found.steps >= NUM_STEPS - 1 else "local minimum"


def memory(args: argparse.Namespace) -> None:
    """Steps of conjugate gradients on a trained ResNet-20, whose Jacobian is never formed."""
    rows, images = [], data.load("cifar10", limit=args.images)
    apply_fn, params = models.functional(resnet20.network(resnet20.weights_file("converged")))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    (batch,) = victims_of(images, 1, args.images)
    seen = seen_of(client_fn, params, batch, jnp.float64)
    unknowns, entries = batch.inputs.size, sum(leaf.size for leaf in jax.tree.leaves(params))
    solver = matching.levenberg_marquardt(linear_solver="cg", cg_steps=20, equations=None)
    attack = gradient_matching(client_fn, init_fn=matching.initializations.near_grey(), optimizer=solver)
    began = time.process_time()
    attack_fn = jax.jit(lambda key, seen: run(attack, key, seen, num_steps=args.steps))
    compiled = attack_fn.lower(jax.random.key(0), seen).compile()
    compile_seconds, began = time.process_time() - began, time.process_time()
    found, info = jax.block_until_ready(compiled(jax.random.key(0), seen))
    losses: Any = [*np.asarray(info.loss), float(found.loss)]
    rows.append(
        {
            "images": str(args.images),
            "unknowns": f"{unknowns:,}",
            "parameters": f"{entries:,}",
            "Jacobian, GB": f"{8 * unknowns * entries / 1e9:.1f}",
            "temporaries, GB": f"{compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f}",
            "own loss by step": " ".join(f"{loss:.2e}" for loss in losses),
            "compile s": f"{compile_seconds:.0f}",
            "s a step": f"{(time.process_time() - began) / args.steps:.0f}",
        }
    )
    record.write(
        "memory",
        "Levenberg-Marquardt by conjugate gradients on a trained ResNet-20 (ReLU, batch normalisation in evaluation)",
        rows,
        "float64, all residuals, at most 20 products with J and its transpose for each damping that is tried. Threat "
        f"model: {THREAT.describe()}.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", type=int, default=3, help="networks and batches of a row; images of `lenet`")
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="images of a victim")
    parser.add_argument("--side", type=int, default=16, help="pixels of the images of `table`, a divisor of 32")
    parser.add_argument("--images", type=int, default=1, help="of the part `memory`")
    parser.add_argument("--steps", type=int, default=3, help="of the part `memory`")
    parser.add_argument("--to", default="table", help="name of the files of `table`")
    jax.config.update("jax_enable_x64", True)
    run_parts(parser, lenet, exported, table, memory)


if __name__ == "__main__":
    main()
