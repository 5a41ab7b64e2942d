"""What a generator is worth to an attacker: GIAS and GIML against Inverting Gradients, which has none.

    python benchmarks/gias.py [tune | table | meta ...] [--data NAME ...] [--victims N] [--batch-size N] [--steps N] ...

Needs the extra `data`, and MNIST and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). All attackers know that the update
was pruned, and have a weight of total variation for each pruned share. The defaults are MNIST's settings; CIFAR-10's
are `--latents 64 --width 16 --rate 1e-3 --weight 1e-3 1e-3 1e-2 --weight-without 0.1 0.1 1`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import generators
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from flax import nnx
from generators import Generator, train_generator
from parts import run_parts

from gia_jax import (
    Attack,
    Batch,
    Observation,
    Reconstruction,
    ThreatModel,
    clients,
    data,
    keep_best,
    metrics,
    models,
    observe,
    run,
)
from gia_jax._compile import RUN_ONCE
from gia_jax.attacks import gias, giml, inverting_gradients
from gia_jax.base import ClientFn, Params
from gia_jax.cli.outcomes import joined
from gia_jax.defenses import prune
from gia_jax.matching.adaptive import supported
from gia_jax.sweep.lanes import SHARED_PARAMS

THREAT = ThreatModel(labels=True)
UNSEEN = "Settings were chosen on training images that the generator had not seen: the weight of total variation "
CHOSEN = {
    "mnist": UNSEEN + "as the best of three without a generator, latents, steps and rates of GIAS among seven.",
    "cifar10": UNSEEN + "for each attacker and pruned share as the best of five without a generator (1 to 1e-4, and 10 "
    "where 1 was best) and of four with one, the rate of GIAS as the better of two (`tune`).",
}
VICTIM_CLASSES, OTHER_CLASSES = range(5, 10), range(5)
Weight: TypeAlias = jax.Array | float


class Setting(NamedTuple):
    """Images, an untrained LeNet's client, and victims as the server sees them, leading axis of victims."""

    images: data.ImageData
    client_fn: ClientFn
    params: Params
    truth: Batch

    def see(self, ratio: float, batches: Batch) -> Observation:
        """What the server sees where clients prune this share of each tensor."""
        defense = prune(ratio)

        def of_one(key: jax.Array, batch: Batch) -> Observation:
            observation = observe(key, THREAT, self.client_fn, self.params, batch)
            update, _ = defense.update(observation.update, defense.init(observation.update))
            return observation._replace(update=update, params=())

        keys = jax.random.split(jax.random.key(7), len(batches.labels))
        # It runs once for each share: compiling it is most of what it costs.
        see = jax.jit(jax.vmap(of_one), compiler_options=RUN_ONCE)
        return see(keys, batches)._replace(params=self.params)


def setting_of(name: str, args: argparse.Namespace, *, split: str = "test", first: int = 0) -> Setting:
    """The first test images, by id, of the second half of the classes; or others."""
    images = data.load(name, split=split, limit=first + 4 * args.victims * args.batch_size)
    module = models.LeNet(images.images.shape[1:], len(images.class_names), rngs=nnx.Rngs(0))
    apply_fn, params = models.functional(module)
    truth = batches_of(images, VICTIM_CLASSES, args.victims, args.batch_size, first=first)
    return Setting(images, clients.federated_sgd(clients.cross_entropy(apply_fn)), params, truth)


def batches_of(images: data.ImageData, classes: Sequence[int], number: int, size: int, *, first: int = 0) -> Batch:
    """The images of some classes, from `first` on, in batches."""
    chosen = first + np.flatnonzero(np.isin(images.labels[first:], classes))[: number * size]
    if len(chosen) < number * size:
        raise ValueError(f"{images.name} must have {number * size} images of {list(classes)}, got {len(chosen)}")
    inputs = images.normalize(images.images[chosen])
    return Batch(
        jnp.asarray(inputs.reshape(number, size, *inputs.shape[1:])),
        jnp.asarray(images.labels[chosen]).reshape(-1, size),
    )


class Outcome(NamedTuple):
    """Of every victim the mean PSNR and SSIM of its images, and the processor's seconds for one victim."""

    psnr: np.ndarray
    ssim: np.ndarray
    seconds: float


def attack(
    make: Callable[[Params, Weight], Attack],
    extra: Params,
    setting: Setting,
    observations: Observation,
    weights: Sequence[float],
    steps: int,
    lanes: int,
) -> Outcome:
    """`make(extra, weight)` on every victim, `lanes` at a time; the last are filled with the first victims again.

    The weights are repeated, each for equally many victims.
    """

    def one(extra: Params, weight: Weight, key: jax.Array, observation: Observation) -> Reconstruction:
        return run(keep_best(make(extra, weight)), key, observation, num_steps=steps)[0]

    number = len(jax.tree.leaves(observations.update)[0])
    keys = jax.random.split(jax.random.key(0), number)
    weight = np.repeat(np.float32(weights), number // len(weights))

    def part(first: int) -> tuple[Params, np.ndarray, jax.Array, Observation]:
        index = np.arange(first, first + lanes) % number
        update, granted = jax.tree.map(lambda leaf: leaf[index], (observations.update, observations.extra))
        return extra, weight[index], keys[index], Observation(observations.params, update, granted)

    solve = jax.jit(jax.vmap(one, (None, 0, 0, SHARED_PARAMS))).lower(*part(0)).compile()
    began, found = time.process_time(), []
    for first in range(0, number, lanes):
        found.append(jax.tree.map(np.asarray, solve(*part(first))))
    seconds = (time.process_time() - began) / (len(found) * lanes)
    batches = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:number], *[f.batch for f in found])
    times = number // len(setting.truth.labels)
    truth = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * times), setting.truth)
    scores = metrics.score(batches, truth, setting.images)
    return Outcome(scores.psnr.mean(1), scores.ssim.mean(1), seconds)


def attackers(
    setting: Setting, generator: Generator, args: argparse.Namespace
) -> tuple[Callable[[int], Callable[[Params, Weight], Attack]], Callable[[Params, Weight], Attack]]:
    """Inverting Gradients of a number of steps, and GIAS from a generator's parameters; both by a prior's weight."""
    low, high = (bound.astype(np.float32) for bound in setting.images.bounds())

    def without(steps: int) -> Callable[[Params, Weight], Attack]:
        return lambda _, weight: inverting_gradients(
            setting.client_fn,
            bounds=(low, high),
            num_steps=steps,
            total_variation_weight=weight,
            objective_fn=supported(),
        )

    def with_generator(params: Params, weight: Weight) -> Attack:
        return gias(
            setting.client_fn,
            generator_fn=generator.generator_fn,
            generator_params=params,
            latent_shape=generator.latent_shape,
            num_latent_steps=args.latent_steps,
            num_latents=args.starts,
            num_steps=args.steps,
            latent_learning_rate=args.latent_rate,
            learning_rate=args.rate,
            total_variation_weight=weight,
            latent_weight=args.latent_weight,
        )

    return without, with_generator


def weights_of(args: argparse.Namespace) -> tuple[Sequence[float], Sequence[float]]:
    """Of total variation for each pruned share, with a generator and without."""
    for name, weights in (("--weight", args.weight), ("--weight-without", args.weight_without)):
        if weights is not None and len(weights) not in (1, len(args.ratios)):
            raise ValueError(f"{name} must be one weight or one for each of {args.ratios}, got {weights}")
    each = len(args.ratios)
    return tuple(w * each if len(w) == 1 else w for w in (args.weight, args.weight_without or args.weight))


def listed(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)


def tune(args: argparse.Namespace) -> None:
    """Weights of total variation with and without a generator, and its rates, on training images behind its own."""
    gradients = args.starts * args.latent_steps + args.steps
    for name in args.data:
        setting = setting_of(name, args, split="train", first=args.images)
        train = data.load(name, split="train", limit=args.images)
        generator = train_generator(train, steps=args.generator_steps, width=args.width, latents=args.latents)
        seen = joined([setting.see(ratio, setting.truth) for ratio in args.ratios] * len(args.weights))
        weights = np.repeat(args.weights, len(args.ratios))

        def show(which: str, outcome: Outcome, name: str = name) -> None:
            psnr = outcome.psnr.reshape(len(args.weights), len(args.ratios), -1).mean(-1)
            for weight, row in zip(args.weights, psnr):
                print(f"{name}, {which}, weight {weight:g}:", dict(zip(args.ratios, row.round(2).tolist())), flush=True)

        for rate in args.rates:
            _, with_generator = attackers(setting, generator, argparse.Namespace(**vars(args) | {"rate": rate}))
            outcome = attack(with_generator, generator.params, setting, seen, weights, args.steps, args.lanes)
            show(f"rate {rate:g}", outcome)
        without, _ = attackers(setting, generator, args)
        show("no generator", attack(without(gradients), (), setting, seen, weights, gradients, args.lanes))


def table(args: argparse.Namespace) -> None:
    """GIAS with three generators against no generator, at equal gradients and at equal time."""
    gradients, (weights, unaided) = args.starts * args.latent_steps + args.steps, weights_of(args)
    for name in args.data:
        rows, setting = [], setting_of(name, args)
        train = data.load(name, split="train", limit=args.images)

        def made(classes: Sequence[int], train: data.ImageData = train) -> Generator:
            steps = args.generator_steps
            return train_generator(train, classes=classes, steps=steps, width=args.width, latents=args.latents)

        every, shifted = made(range(10)), made(OTHER_CLASSES)
        seen = joined([setting.see(ratio, setting.truth) for ratio in args.ratios])
        without, with_generator = attackers(setting, every, args)

        equal_gradients = attack(without(gradients), (), setting, seen, unaided, gradients, args.lanes)
        known = {"all classes": every.params, "other classes": shifted.params, "untrained": every.untrained}
        known = {which: params for which, params in known.items() if which in args.generators}
        found = {
            which: attack(with_generator, params, setting, seen, weights, args.steps, args.lanes)
            for which, params in known.items()
        }
        slower = np.mean([outcome.seconds for outcome in found.values()]) / equal_gradients.seconds
        longer = max(1, round(float(slower) * gradients))
        equal_time = attack(without(longer), (), setting, seen, unaided, longer, args.lanes)
        for i, ratio in enumerate(args.ratios):
            own = slice(i * args.victims, (i + 1) * args.victims)
            for which, outcome in found.items():
                rows.append(
                    {
                        "data": name,
                        "pruned": ratio,
                        "generator": which,
                        "GIAS PSNR": f"{outcome.psnr[own].mean():.2f}",
                        "GIAS SSIM": f"{outcome.ssim[own].mean():.2f}",
                        "no generator PSNR": f"{equal_gradients.psnr[own].mean():.2f}",
                        "no generator SSIM": f"{equal_gradients.ssim[own].mean():.2f}",
                        "gain, dB, equal gradients": record.gain(outcome.psnr[own] - equal_gradients.psnr[own]),
                        "gain, dB, equal time": record.gain(outcome.psnr[own] - equal_time.psnr[own]),
                        "gradients, equal time": longer,
                        "ms a gradient, GIAS": f"{1e3 * outcome.seconds / gradients:.1f}",
                        "ms a gradient, none": f"{1e3 * equal_gradients.seconds / gradients:.1f}",
                    }
                )
                print(rows[-1], flush=True)
        record.write(
            name,
            f"GIAS against the same attack without a generator: {name}, untrained LeNet",
            rows,
            f"{args.victims} victims of {args.batch_size} images each, the first test images of classes 5 to 9; model, "
            f"generator and attack seed 0. Generators, where they have a row: decoders of {args.latents} latents and "
            f"width {args.width}, trained {args.generator_steps} steps on those of the first {args.images} training "
            "images that are of all classes or of classes 0 to 4 (the shifted case), or not at all (a deep image prior "
            f"with a latent search). GIAS: latent searches {args.starts}, of {args.latent_steps} steps at "
            f"{args.latent_rate:g} with weight {args.latent_weight:g} on the latents' norm, then {args.steps} steps of "
            f"parameters at {args.rate:g}, {gradients} gradients in all. None: Inverting Gradients of as many "
            "gradients, or of as many as take the same processor time (column 'gradients, equal time', from the mean "
            "over the generators). Milliseconds are the processor's, of one victim of "
            f"{args.lanes} under one vmap. All compare the observed entries alone, weigh total variation "
            f"{listed(weights)} with a generator and {listed(unaided)} without, by pruned share, and have no setting "
            "chosen on the victims. Differences of victims' mean "
            f"PSNR with a paired bootstrap interval of 95 %, called none where it covers 0. {CHOSEN[name]}"
            f"\n\nThreat model: {THREAT.describe()}; and that the update was pruned.",
        )


def meta(args: argparse.Namespace) -> None:
    """GIML: a generator from gradients alone, against no generator and against the untrained one."""
    gradients, (weights, unaided) = args.starts * args.latent_steps + args.steps, weights_of(args)
    for name in args.data:
        rows, setting = [], setting_of(name, args)
        train = data.load(name, split="train", limit=args.images)
        generator = train_generator(train, steps=0, width=args.width, latents=args.latents)
        without, with_generator = attackers(setting, generator, args)
        learned = learn(setting, generator, partial(with_generator, weight=weights[0]), train, args)
        seen = joined([setting.see(ratio, setting.truth) for ratio in args.ratios])
        none = attack(without(gradients), (), setting, seen, unaided, gradients, args.lanes)
        found = {
            which: attack(with_generator, params, setting, seen, weights, args.steps, args.lanes)
            for which, params in (("learned", learned), ("untrained", generator.untrained))
        }
        for i, ratio in enumerate(args.ratios):
            own = slice(i * args.victims, (i + 1) * args.victims)
            psnr = {which: outcome.psnr[own] for which, outcome in found.items()}
            rows.append(
                {
                    "data": name,
                    "pruned": ratio,
                    "GIML PSNR": f"{psnr['learned'].mean():.2f}",
                    "untrained PSNR": f"{psnr['untrained'].mean():.2f}",
                    "no generator PSNR": f"{none.psnr[own].mean():.2f}",
                    "gain over no generator, dB": record.gain(psnr["learned"] - none.psnr[own]),
                    "gain over untrained, dB": record.gain(psnr["learned"] - psnr["untrained"]),
                }
            )
            print(rows[-1], flush=True)
        record.write(
            f"giml_{name}",
            f"GIML: a generator learned from undefended gradients alone: {name}, untrained LeNet",
            rows,
            f"The untrained generator of the table `{name}` learned from {args.tasks} clients of {args.batch_size} "
            f"training images of all classes by Adam at {args.meta_rate:g}, with total variation {weights[0]:g}; their "
            f"updates were not pruned. Then {args.victims} victims as there, {gradients} gradients for every attacker, "
            f"total variation {listed(weights)} with a generator and {listed(unaided)} without, by pruned share. "
            "Differences of victims' mean PSNR with a paired bootstrap interval of 95 %, called none where it covers "
            f"0. {CHOSEN[name]}\n\nThreat model: {THREAT.describe()}; and that the update was pruned.",
        )


def learn(
    setting: Setting,
    generator: Generator,
    attack_fn: Callable[[Params], Attack],
    train: data.ImageData,
    args: argparse.Namespace,
) -> Params:
    """The generator's parameters after a stream of clients with training images."""
    learner = giml(attack_fn, num_steps=args.steps, optimizer=optax.adam(args.meta_rate))
    stream = setting.see(0.0, batches_of(train, range(10), args.tasks, args.batch_size))

    def step(state: Any, part: Any) -> tuple[Any, jax.Array]:
        key, update, extra = part
        state, info = learner.step(key, state, Observation(stream.params, update, extra))
        return state, info.loss

    keys = jax.random.split(jax.random.key(1), args.tasks)
    scan = jax.jit(lambda state, parts: jax.lax.scan(step, state, parts))
    state, losses = scan(learner.init(generator.untrained), (keys, stream.update, stream.extra))
    tenth = max(1, args.tasks // 10)
    print(
        f"  loss of the first tasks {losses[:tenth].mean():.4f}, of the last {losses[-tenth:].mean():.4f}", flush=True
    )
    return state.generator_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generators.arguments(parser)
    parser.add_argument("--victims", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.9, 0.99], help="pruned shares")
    parser.add_argument("--generators", nargs="+", default=["all classes", "other classes", "untrained"])
    parser.add_argument("--starts", type=int, default=1, help="latent searches")
    parser.add_argument("--latent-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=500, help="of the parameter search")
    parser.add_argument("--latent-rate", type=float, default=0.1)
    parser.add_argument("--latent-weight", type=float, default=1e-4)
    parser.add_argument("--rate", type=float, default=1e-2, help="of the generator's parameters")
    tried = [1.0, 1e-1, 1e-2, 1e-3, 1e-4]
    parser.add_argument("--weights", type=float, nargs="+", default=tried, help="of total variation that `tune` tries")
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-2, 1e-3], help="that `tune` tries")
    parser.add_argument("--weight", type=float, nargs="+", default=[1e-3], help="of total variation, by pruned share")
    parser.add_argument("--weight-without", type=float, nargs="+", help="without a generator; default: as with one")
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=200, help="clients that GIML learns from")
    parser.add_argument("--meta-rate", type=float, default=1e-2)
    run_parts(parser, tune, table, meta)


if __name__ == "__main__":
    main()
