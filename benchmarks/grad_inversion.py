"""GradInversion on CIFAR-10: what each of its terms adds, and what each kind of feature statistics is worth.

    python benchmarks/grad_inversion.py [tune | tables] [--batches N] [--seeds N] [--steps N] [--batch-size N]
                                        [--network NAME] [--width N] [--epochs N] [--training-images N] [--weights FILE]

`tune` tries weights of the terms on training images that the network has not seen, `tables` takes those of WEIGHTS.
Needs the extra `data` and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). The network is trained first, or read from
FILE; a FILE that does not exist is written.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
from flax import nnx
from jaxtyping import Array
from parts import run_parts
from training import accuracy, train_batch_norm

from gia_jax import (
    Batch,
    Observation,
    Reconstruction,
    ThreatModel,
    clients,
    data,
    keep_best,
    labels,
    metrics,
    models,
    observe,
    run,
)
from gia_jax.attacks import grad_inversion
from gia_jax.base import Params, Statistics
from gia_jax.matching import group
from gia_jax.models.layers import batch_norm

PROXY_IMAGES = 256  # of the training set, the attacker's own
# Chosen on two batches of training images that the convolutional network had not seen, among twelve settings: the
# authors' (1e-3, 1e-4, 1e-6, 0.1) recover nothing of it.
WEIGHTS = {"match_weight": 1.0, "total_variation_weight": 1.0, "norm_weight": 1e-6, "statistics_weight": 1.0}
NETWORKS = {"convnet": "Four convolutions", "resnet": "ResNet of one block a stage"}


class Condition(NamedTuple):
    """One line of a table: which statistics the attacker knows, and which terms it uses."""

    statistics: str
    fidelity: bool = True
    consistency_weight: float = 0.01
    registered: bool = True
    changed: tuple[tuple[str, float], ...] = ()

    def weights(self) -> dict[str, float]:
        """The weights of the terms; those of the priors are 0 without fidelity."""
        kept = {name: value if self.fidelity or name == "match_weight" else 0.0 for name, value in WEIGHTS.items()}
        return kept | {"consistency_weight": self.consistency_weight} | dict(self.changed)


ABLATION = {
    "gradient": Condition("none", fidelity=False, consistency_weight=0.0),
    "+ fidelity": Condition("exact", consistency_weight=0.0),
    "+ group, mean": Condition("exact", registered=False),
    "+ group, registered mean": Condition("exact"),
}
STATISTICS = {
    "exact": ABLATION["+ group, registered mean"],
    "running": Condition("running"),
    "proxy": Condition("proxy"),
}


class BatchNormNet(models.GroupNormNet):
    """Its four convolutions with batch normalisation, where every image has few features and many gradients."""

    def __init__(self, *, width: int, rngs: nnx.Rngs) -> None:
        super().__init__(width=width, rngs=rngs)
        for i, features in enumerate((width, width, 2 * width, 2 * width)):
            setattr(self, f"norm{i}", batch_norm(features, rngs=rngs))


def network(args: argparse.Namespace) -> nnx.Module:
    """A network with batch normalisation, trained."""
    if args.network == "resnet":
        module: nnx.Module = models.ResNet(blocks=(1, 1, 1), width=args.width, rngs=nnx.Rngs(0))
    else:
        module = BatchNormNet(width=args.width, rngs=nnx.Rngs(0))
    state = nnx.state(module)
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(state))
    if args.weights and args.weights.exists():
        with np.load(args.weights) as file:
            loaded = [jnp.asarray(file[f"leaf{i}"]) for i in range(len(leaves))]
        nnx.replace_by_pure_dict(state, jax.tree.unflatten(structure, loaded))
        nnx.update(module, state)
        return module
    images = data.load("cifar10", split="train", limit=args.training_images)
    examples = Batch(jnp.asarray(images.normalize(images.images)), jnp.asarray(images.labels))
    train_batch_norm(module, examples, jax.random.key(0), epochs=args.epochs)
    if args.weights:
        trained = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module)))
        np.savez(args.weights, **{f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(trained)})
    return module


def distinct_batches(classes: np.ndarray, number: int, size: int) -> np.ndarray:
    """Places of the first images that fill `number` disjoint batches of `size` different classes, shape (number, size).

    Each image goes to the first batch that is not full and has none of its class.
    """
    batches: list[list[int]] = [[] for _ in range(number)]
    for place, label in enumerate(classes):
        open_to = (b for b in batches if len(b) < size and label not in classes[b])
        next(open_to, []).append(place)
        if all(len(b) == size for b in batches):
            return np.asarray(batches)
    raise ValueError(f"number={number} batches of {size} different classes do not fit into {len(classes)} images")


class Setting(NamedTuple):
    """A trained network and clients that hold batches of images, with a leading axis of victims."""

    module: nnx.Module
    images: data.ImageData
    truth: Batch
    proxy: Array


def setting_of(module: nnx.Module, number: int, size: int, *, first: int = 0, split: str = "test") -> Setting:
    images = data.load("cifar10", split=split, limit=first + 40 * number * size)
    chosen = first + distinct_batches(images.labels[first:], number, size)
    truth = Batch(jnp.asarray(images.normalize(images.images[chosen])), jnp.asarray(images.labels[chosen]))
    # Behind the images that the network, or a choice of weights, has seen.
    own = data.load("cifar10", split="train", limit=50_000)
    return Setting(module, images, truth, jnp.asarray(own.normalize(own.images[-PROXY_IMAGES:])))


def statistics_of(setting: Setting, params: Params) -> dict[str, Callable[[Array], Statistics]]:
    """By kind, the statistics that an attacker knows of a client with these inputs."""
    statistics_fn = models.batch_norm_inputs(setting.module)
    return {
        "none": lambda inputs: jax.tree.map(jnp.zeros_like, statistics_fn(params, inputs)),
        "exact": lambda inputs: statistics_fn(params, inputs),
        "running": lambda inputs: models.running_statistics(setting.module, params, inputs),
        "proxy": lambda inputs: statistics_fn(params, setting.proxy),
    }


class Result(NamedTuple):
    """The reconstruction of every victim by one condition, and the milliseconds of a step."""

    found: Reconstruction
    step_milliseconds: float


def attack_all(
    setting: Setting, conditions: dict[str, Condition], seeds: int, steps: int
) -> tuple[dict[str, tuple[dict[str, Any], np.ndarray]], float]:
    """The `row` of every condition, run on one victim after the other, and the seconds to compile their one program.

    The keys of a victim are the same for every condition.
    """
    apply_fn, params = models.functional(setting.module)
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    kinds, number = statistics_of(setting, params), len(setting.truth.labels)
    keys = jax.random.split(jax.random.key(2), number)

    def observed(condition: Condition, victim: int) -> Observation:
        batch = jax.tree.map(lambda leaf: leaf[victim], setting.truth)
        known = kinds[condition.statistics](batch.inputs)
        return observe(jax.random.key(1), ThreatModel(statistics=True), client_fn, params, batch, statistics=known)

    @jax.jit
    def solve(key: Array, observation: Observation, weights: dict[str, Array], registered: Array) -> Reconstruction:
        def consensus_fn(inputs: Array) -> Array:
            return jnp.where(registered, group.registered_mean()(inputs), group.mean(inputs))

        attack = grad_inversion(
            client_fn,
            labels.dense("head"),
            statistics_fn=models.batch_norm_inputs(setting.module),
            num_seeds=seeds,
            consensus_fn=consensus_fn,
            num_steps=steps,
            bounds=setting.images.bounds(),
            **weights,
        )
        return run(keep_best(attack), key, observation, num_steps=steps)[0]

    def arguments(condition: Condition, victim: int) -> tuple[Any, ...]:
        return keys[victim], observed(condition, victim), condition.weights(), condition.registered

    began = time.perf_counter()
    program = solve.lower(*arguments(next(iter(conditions.values())), 0)).compile()
    compile_seconds = time.perf_counter() - began
    results = {}
    for name, condition in conditions.items():
        inputs = [jax.block_until_ready(arguments(condition, victim)) for victim in range(number)]
        began = time.perf_counter()
        found = [jax.block_until_ready(program(*each)) for each in inputs]
        milliseconds = 1e3 * (time.perf_counter() - began) / (steps * number)
        result = Result(jax.tree.map(lambda *leaves: jnp.stack(leaves), *found), milliseconds)
        results[name] = row(result, setting, seeds)
        print(f"{name}: {results[name][0]}", flush=True)
    return results, compile_seconds


def row(result: Result, setting: Setting, seeds: int) -> tuple[dict[str, Any], np.ndarray]:
    """The figures of a condition, and the mean PSNR of every victim."""
    scores = metrics.score(result.found.batch, setting.truth, setting.images)
    per_victim = scores.psnr.mean(1)
    figures = {
        "PSNR (dB)": f"{per_victim.mean():.2f}",
        "SSIM": f"{scores.ssim.mean():.3f}",
        "labels right": f"{scores.label_correct.mean():.3f}",
        "ms a step": f"{result.step_milliseconds:.1f}",
        "ms a step and seed": f"{result.step_milliseconds / seeds:.1f}",
    }
    return figures, per_victim


def tune(args: argparse.Namespace) -> None:
    """One weight after the other changed tenfold, on training images behind those that the network was trained on."""
    setting = setting_of(network(args), args.batches, args.batch_size, first=args.training_images, split="train")
    conditions = {"WEIGHTS": ABLATION["+ fidelity"]}
    for name, value in WEIGHTS.items():
        for factor in (0.1, 10.0):
            conditions[f"{name} {factor * value:g}"] = Condition(
                "exact", consistency_weight=0.0, changed=((name, factor * value),)
            )
    for weight in (1e-3, 1e-2, 1e-1):
        conditions[f"consistency_weight {weight:g}"] = Condition("exact", consistency_weight=weight)
    attack_all(setting, conditions, args.seeds, args.steps)


def tables(args: argparse.Namespace) -> None:
    """What each term adds, and what each kind of statistics is worth."""
    module = network(args)
    setting = setting_of(module, args.batches, args.batch_size)
    test = data.load("cifar10", limit=1_000)
    share = accuracy(*models.functional(module), jnp.asarray(test.normalize(test.images)), test.labels)

    conditions = ABLATION | {name: STATISTICS[name] for name in ("running", "proxy")}
    results, compile_seconds = attack_all(setting, conditions, args.seeds, args.steps)
    results["exact"] = results["+ group, registered mean"]

    def table(conditions: dict[str, Condition], against: Callable[[int], int], heading: str) -> list[dict[str, Any]]:
        names = list(conditions)
        rows = []
        for i, name in enumerate(names):
            figures, per_victim = results[name]
            gain = "-" if i == 0 else record.gain(per_victim - results[names[against(i)]][1])
            rows.append({heading: name, "statistics": conditions[name].statistics, **figures, "gain (dB)": gain})
        return rows

    grey = metrics.score(setting.truth._replace(inputs=0 * setting.truth.inputs), setting.truth, setting.images)
    size = f"batches of {args.batch_size}, {args.batches} clients, {args.seeds} seeds, {args.steps} steps"

    compared = (
        "The gain is over {}, with the interval of 95 % of a paired bootstrap over clients; 'none' where it covers 0. "
    )
    notes = (
        f"{NETWORKS[args.network]}, width {args.width}, batch normalisation in evaluation mode, trained for "
        f"{args.epochs} epochs on the first {args.training_images} training images (accuracy {share:.1%} on 1,000 test "
        "images). Victims are the first test images that fill disjoint batches of different classes. PSNR is the mean "
        "over the images of a client, then over clients; the image of the lowest loss of all seeds is scored. "
        f"A grey image reaches {grey.psnr.mean():.2f} dB. Weights: {WEIGHTS}, consistency 0.01, Adam at 0.1 with 50 "
        "steps of warm-up and a cosine decay, noise 0.2 of the rate, pixels in their box. All lines are one program, "
        f"compiled in {compile_seconds:.0f} s, so a term of weight 0 costs what it costs elsewhere. "
        f"Threat model: {ThreatModel().describe()}, and the statistics of the line."
    )
    record.write(
        f"ablation_{args.batch_size}",
        f"GradInversion on CIFAR-10, term by term: {size}",
        table(ABLATION, lambda i: i - 1, "terms"),
        compared.format("the line above") + notes,
    )
    record.write(
        f"statistics_{args.batch_size}",
        f"GradInversion on CIFAR-10, by kind of statistics: {size}",
        table(STATISTICS, lambda i: 0, "attacker's statistics"),
        compared.format("the first line") + notes + f" Proxy: {PROXY_IMAGES} training images that nobody trained on.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8, help="clients")
    parser.add_argument("--seeds", type=int, default=4, help="seeds that run together")
    parser.add_argument("--steps", type=int, default=2_000, help="of each attack")
    parser.add_argument("--batch-size", type=int, default=4, help="images of a client, of different classes")
    parser.add_argument("--network", choices=list(NETWORKS), default="convnet")
    parser.add_argument("--width", type=int, default=16, help="of the network")
    parser.add_argument("--epochs", type=int, default=3, help="of its training")
    parser.add_argument("--training-images", type=int, default=10_000)
    parser.add_argument("--weights", type=Path, help="file of the trained network")
    run_parts(parser, tune, tables)


if __name__ == "__main__":
    main()
