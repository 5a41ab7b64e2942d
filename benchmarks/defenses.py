"""Defenses against an attacker that does not know them, and one that does: Inverting Gradients on CIFAR-10.

    python benchmarks/defenses.py [PART ...] [--model NAME] [--epochs N] [--splits NAME ...] [--per-class N] [--steps N]
        [--restarts N] [--rounds N] [--weights W ...] [--controls] [--rescaled] [--likelihood] [--near DB]
        [--defenses NAME ...]

Needs the extras `demo`, `data` and `privacy` and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). Both attackers choose
one weight of total variation for each defense, of the same list, on training images; it is frozen before the victims
are seen.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import attackers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from attackers import (
    DRAWS_A_STEP,
    THREAT,
    Seen,
    counted_steps,
    differs,
    informed,
    network,
    redrawn,
    signed_adam,
    unstacked,
)
from flax import nnx
from parts import run_parts
from training import accuracy, train, train_network, uniform

from gia_jax import (
    Attack,
    Batch,
    Observation,
    clients,
    control,
    data,
    defenses,
    keep_best,
    labels,
    metrics,
    models,
)
from gia_jax._compile import RUN_ONCE
from gia_jax.attacks import inverting_gradients
from gia_jax.base import ClientFn, InitFn, ObjectiveFn, Params
from gia_jax.cli.examples import NUM_OTHERS
from gia_jax.cli.outcomes import joined
from gia_jax.cli.pixels import pixel_covariance, pixel_information
from gia_jax.defenses.protected import CANDIDATES, Part, Protected, live_shares, parse, protect
from gia_jax.matching.adaptive import rescaled, rounding_likelihood
from gia_jax.matching.initializations import normal
from gia_jax.matching.objectives import cosine
from gia_jax.sweep import sweep

CLASSES, DELTA = 10, 1e-5
MIXED = 4  # images in an encoding whose cost is measured
NOISE = ("gaussian", "dpsgd")
# Three strengths of each where it has one; noise in units of an entry of the update, clipping at norms below LeNet's.
DEFENSES = (
    *(f"prune:ratio={ratio}" for ratio in (0.5, 0.9, 0.99)),
    *(f"topk:ratio={ratio}" for ratio in (0.9, 0.99, 0.999)),
    *(f"clip:norm={norm}" for norm in (1, 0.1, 0.01)),
    *(f"gaussian:scale={scale}" for scale in (1e-3, 1e-2, 1e-1)),
    *(f"laplace:scale={scale}" for scale in (1e-3, 1e-2, 1e-1)),
    *(f"dpsgd:noise_multiplier={multiplier},norm=1" for multiplier in (1e-2, 1e-1, 1)),
    "sign",
    *(f"quantize:bits={bits}" for bits in (8, 4, 2)),
    *(f"soteria:ratio={ratio}" for ratio in (0.4, 0.8, 0.95)),
    *(f"precode:size={size}" for size in (64, 256, 1024)),
    *(f"mixup:k={k}" for k in (2, 4, 6)),
    *(f"instahide:k={k}" for k in (1, 2, 4)),
    "prune_mixup",
    "prune_instahide",
)


class Victims(NamedTuple):
    """Images of a fixed list, in [0, 1] and in the model's space, batch 1; and others of the same client."""

    pixels: np.ndarray
    truth: Batch
    others: Batch
    images: data.ImageData
    places: np.ndarray  # of the victims among the images


class Result(NamedTuple):
    """Of every victim: PSNR, SSIM, rank among 10,000 images and the attacker's objective, without its prior."""

    psnr: np.ndarray
    ssim: np.ndarray
    rank: np.ndarray
    objective: np.ndarray


def victims_of(split: str, per_class: int, *, first: int = 0) -> Victims:
    """Images of each class by their ids, from the `first` on; the last images are the clients' others."""
    images = data.load("cifar10", split=split, limit=10_000)
    places = [np.flatnonzero(images.labels == c) for c in range(CLASSES)]
    chosen = np.sort(np.concatenate([place[first : first + per_class] for place in places]))
    # Far from the victims of all lists, so that nothing is tuned on encodings that hold them.
    rest = np.arange(len(images.labels))[-NUM_OTHERS:]

    def batch(index: np.ndarray) -> Batch:
        return Batch(jnp.asarray(images.normalize(images.images[index])), jnp.asarray(images.labels[index]))

    truth = jax.tree.map(lambda leaf: leaf[:, None], batch(chosen))
    return Victims(images.images[chosen][:, None], truth, batch(rest), images, chosen)


class Setting(NamedTuple):
    """Defended clients by name, "none" among them, and at what stage of their training the networks are."""

    protected: dict[str, Protected]
    stage: str


def setting_of(args: argparse.Namespace) -> Setting:
    make = models.LeNet if args.model == "lenet" else partial(models.GroupNormNet, width=args.width)
    module = make((32, 32, 3), CLASSES, rngs=nnx.Rngs(0))
    every = {name: protect(parse(name), module, num_classes=CLASSES) for name in ("none", *args.defenses)}
    if not args.epochs:
        return Setting(every, "untrained")
    _, params, train_accuracy, test_accuracy = train_network(make, "cifar10", 0, args.epochs)
    stage = f"{args.epochs} epochs, accuracy {train_accuracy:.1%} training, {test_accuracy:.1%} test"
    for name, protected in every.items():
        if network(name) == "none":
            every[name] = protected._replace(params=params)
        else:
            every[name], test_accuracy = trained(protected, args.epochs)
            stage += f", {test_accuracy:.1%} with {name}"
    return Setting(every, stage)


def trained(protected: Protected, epochs: int) -> tuple[Protected, float]:
    """The network learned under its defense, as many steps as without one, and its test accuracy."""
    examples, test = data.load("cifar10", split="train"), data.load("cifar10")
    size = 128
    steps = epochs * (len(examples.labels) // size)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    batch = Batch(jnp.asarray(examples.normalize(examples.images)), jnp.asarray(examples.labels))
    learn = jax.jit(partial(train, protected.client_fn, optimizer, uniform(size), num_steps=steps))
    params = learn(protected.params, jax.random.key(0), batch)
    inputs = jnp.asarray(test.normalize(test.images))
    return protected._replace(params=params), accuracy(protected.apply_fn, params, inputs, test.labels)


def see(setting: Setting, name: str, rounds: int, *groups: Victims) -> list[Seen]:
    """What the server sees of groups of victims, each a multiple of the number of classes, under one defense."""
    protected = setting.protected[name]
    of_one = partial(attackers.see, protected, num_classes=CLASSES, rounds=rounds)
    # It runs a few times: compiling it is most of what it costs.
    few = jax.jit(jax.vmap(of_one, (0, 0, None)), compiler_options=RUN_ONCE)
    seen = []
    for victims in groups:
        lanes = (jax.random.split(jax.random.key(7), len(victims.pixels)), victims.truth)
        found = [
            few(*jax.tree.map(lambda leaf, i=i: leaf[i : i + CLASSES], lanes), victims.others)
            for i in range(0, len(victims.pixels), CLASSES)
        ]
        together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
        seen.append(together._replace(observation=together.observation._replace(params=protected.params)))
    return seen


def attack(
    client_fn: ClientFn,
    objective_fn: ObjectiveFn,
    groups: Sequence[Observation],
    victims: Victims,
    weights: Sequence[float],
    args: argparse.Namespace,
    draw_fn: InitFn | None = None,
) -> list[list[Result]]:
    """The attack on groups of observations, each of the list of victims: results by group and weight.

    The weights are those of total variation, in one sweep. An objective other than the blind attacker's takes over
    after half of the steps; from the start where the attack starts near the truth, and walks in small steps. With
    `draw_fn` there is no walk: it keeps the best of as many draws as cost what the steps do.
    """
    low, high = victims.images.bounds()
    together, steps = joined(groups), args.steps
    options: dict[str, Any] = {}
    if draw_fn is not None:
        options, steps = {"init_fn": draw_fn, "optimizer": redrawn(draw_fn)}, round(DRAWS_A_STEP * args.steps)
    elif args.near is not None:
        noise = 10 ** (-args.near / 20) * jax.random.normal(jax.random.key(11), victims.truth.inputs.shape)
        start = victims.truth.inputs + noise / jnp.asarray(victims.images.std, jnp.float32)
        together = together._replace(extra=together.extra | {"start": jnp.concatenate([start] * len(groups))})
        options = {
            "init_fn": lambda key, observation: observation.extra["start"],
            "optimizer": signed_adam(steps, 0.01),
        }

    def make(setting: dict[str, jax.Array]) -> Attack:
        def stage(objective_fn: ObjectiveFn, num_steps: int) -> Attack:
            return inverting_gradients(
                client_fn,
                bounds=(low.astype(np.float32), high.astype(np.float32)),
                num_steps=num_steps,
                total_variation_weight=setting["weight"],
                objective_fn=objective_fn,
                **options,
            )

        return keep_best(stage(objective_fn, steps)) if options else informed(stage, objective_fn, steps)

    found = sweep(
        make,
        {"weight": np.asarray(weights, np.float32)},
        jax.random.key(0),
        together,
        num_steps=steps if options else counted_steps(objective_fn, steps),
        num_restarts=args.restarts,
        lanes=args.lanes,
    )
    timing, lanes = found.timing, len(weights) * len(groups) * len(victims.pixels) * args.restarts
    print(f"  {lanes} lanes, compile {timing.compile_seconds:.0f} s, run {timing.run_seconds:.0f} s", flush=True)

    def match(batch: Batch, update: Params) -> jax.Array:
        return objective_fn(client_fn(together.params, batch), update)

    objective_of_each = jax.jit(lambda *pairs: jax.lax.map(lambda one: match(*one), pairs, batch_size=args.lanes))
    gallery = jnp.asarray(victims.images.images)
    rank_of_each = jax.jit(
        lambda *pairs: jax.lax.map(lambda one: metrics.retrieval_rank(one[0], gallery, one[1]), pairs)
    )
    truth = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(groups)), victims.truth)
    places = jnp.tile(victims.places, len(groups))
    results: list[list[Result]] = [[] for _ in groups]
    for batch in unstacked(found.reconstruction.batch):
        scores = metrics.score(batch, truth, victims.images)
        ranks, objective = rank_of_each(scores.images[:, 0], places), objective_of_each(batch, together.update)
        fields = (scores.psnr[:, 0], scores.ssim[:, 0], np.asarray(ranks), np.asarray(objective))
        for own, *parts in zip(results, *(np.split(field, len(groups)) for field in fields), strict=True):
            own.append(Result(*parts))
    return results


def blind(
    setting: Setting, seen: dict[str, Seen], weights: dict[str, Sequence[float]], victims: Victims, args: Any
) -> dict[str, list[Result]]:
    """For each defense and weight; the attacker takes every client for an undefended one.

    One sweep serves all the defenses that share parameters and weights.
    """
    shared: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for name, own in weights.items():
        shared.setdefault((network(name), tuple(own)), []).append(name)
    found: dict[str, list[Result]] = {}
    for (own, listed), names in shared.items():
        print(f"blind, {len(names)} defenses:", flush=True)
        groups = [seen[name].observation for name in names]
        plain = setting.protected[own]
        found |= zip(names, attack(plain.assumed_fn, cosine, groups, victims, listed, args), strict=True)
    return found


def likelihood_of(name: str, args: argparse.Namespace) -> ObjectiveFn | None:
    """Of a defense that only rounds, with the option --likelihood."""
    parts = parse(name)
    if not args.likelihood or len(parts) != 1 or parts[0].name not in ("ternary", "quantize"):
        return None
    return rounding_likelihood(int(parts[0].settings.get("bits", 2)))


def objective_of(protected: Protected, name: str, args: argparse.Namespace) -> ObjectiveFn:
    """Of the attacker that knows the defense."""
    objective_fn = likelihood_of(name, args) or protected.adapt_fn(cosine)
    return rescaled(objective_fn) if args.rescaled else objective_fn


def adaptive(
    protected: Protected, name: str, seen: Seen, victims: Victims, weights: Sequence[float], args: Any
) -> list[Result]:
    """For each weight; the attacker knows the defense."""
    print(f"adaptive, {name}:", flush=True)
    objective_fn = objective_of(protected, name, args)
    return attack(protected.assumed_fn, objective_fn, [seen.observation], victims, weights, args)[0]


class Bounds(NamedTuple):
    """PSNR in dB of the least mean squared error of any attacker, in expectation over a Gaussian prior, and of that of
    an unbiased one. (A mean of PSNRs may be larger.)
    """

    van_trees: float
    fisher: float


def bounds_of(setting: Setting, victims: Victims, rounds: int) -> dict[str, Bounds]:
    """For each defense by noise."""
    noisy = {name: part for name in setting.protected for part in parse(name) if part.name in NOISE and scale(part) > 0}
    if not noisy:
        return {}
    few = jax.tree.map(lambda leaf: leaf[:8, 0], victims.truth)
    plain, images = setting.protected["none"], data.load("cifar10", split="train", limit=10_000)
    covariance = pixel_covariance(images.images)

    @functools.cache
    def information(norm: float | None) -> jax.Array:
        """With noise of scale 1 on the gradient, clipped to a norm."""
        client_fn = plain.assumed_fn
        if norm is not None:
            loss_fn = clients.cross_entropy(plain.apply_fn)
            client_fn = defenses.dp_sgd(loss_fn, jax.random.key(0), norm=norm, noise_multiplier=0.0)
        return pixel_information(client_fn, plain.params, few, images)

    def bound(part: Part) -> Bounds:
        found = rounds * information(part.settings.get("norm")) / scale(part) ** 2
        errors = metrics.van_trees_bound(found, covariance), metrics.fisher_bound(found)
        return Bounds(*(float(-10 * jnp.log10(error)) for error in errors))

    return {name: bound(part) for name, part in noisy.items()}


def scale(part: Part) -> float:
    """Standard deviation of a defense's Gaussian noise."""
    norm = part.settings.get("norm")
    return part.settings["scale"] if norm is None else part.settings["noise_multiplier"] * norm


def figures(name: str, result: Result) -> dict[str, str]:
    return {
        f"{name} PSNR": f"{result.psnr.mean():.2f}",
        f"{name} SSIM": f"{result.ssim.mean():.2f}",
        f"{name} >= 20 dB": f"{np.mean(result.psnr >= 20):.0%}",
        f"{name} rank": f"{np.median(result.rank):.0f}",
    }


class Found(NamedTuple):
    """What the attacks found on the victims of one split, by the defense's name; and others that see no defended
    update: attacks on noise, random searches, and the PSNR of guesses.
    """

    victims: Victims
    seen: dict[str, Seen]
    blind: dict[str, Result]
    adaptive: dict[str, Result]
    controls: dict[str, Result]
    others: dict[str, Result]
    guesses: dict[str, np.ndarray]

    def knowing(self, name: str) -> Result:
        """Of the attacker that knows the defense, where that is another attack."""
        return self.adaptive.get(name, self.blind[name])


def table(args: argparse.Namespace) -> None:
    """Blind, adaptive and prior-only attackers for every defense."""
    if args.rounds > 1 and any(part.acts_on == "input" for name in args.defenses for part in parse(name)):
        raise ValueError(f"rounds must be 1 with encodings, whose batch is another in every round, got {args.rounds}")
    setting = setting_of(args)
    tuning = victims_of("train", 1)
    groups = {split: victims_of(split, args.per_class, first=int(split == "train")) for split in args.splits}
    names = list(setting.protected)
    adapting = [name for name in names if differs(name) or likelihood_of(name, args)]

    def best(results: Sequence[Result]) -> float:
        return args.weights[int(np.argmax([result.psnr.mean() for result in results]))]

    print("what the server sees:", flush=True)
    seen_tuning: dict[str, Seen] = {}
    founds = {split: Found(victims, {}, {}, {}, {}, {}, guesses_of(victims)) for split, victims in groups.items()}
    # What cannot be computed is refused here, and not after the attacks.
    bounds = {split: bounds_of(setting, victims, args.rounds) for split, victims in groups.items()}
    for name in names:
        seen_tuning[name], *every = see(setting, name, args.rounds, tuning, *groups.values())
        for found, seen in zip(founds.values(), every):
            found.seen[name] = seen
    weights = dict.fromkeys(names, args.weights)
    tuned_blind = {name: best(results) for name, results in blind(setting, seen_tuning, weights, tuning, args).items()}
    tuned_adaptive = {}
    for name in adapting:
        protected = setting.protected[name]
        tuned_adaptive[name] = best(adaptive(protected, name, seen_tuning[name], tuning, args.weights, args))
        for found in founds.values():
            of = partial(adaptive, protected, name, victims=found.victims, weights=[tuned_adaptive[name]], args=args)
            found.adaptive[name] = of(found.seen[name])[0]
            if args.controls and network(name) == "none":
                found.controls[name] = of(found.seen["none"])[0]
    plain = setting.protected["none"]

    def guess(seen: Seen, victims: Victims, weights: Sequence[float]) -> list[Result]:
        """The same attack on random updates."""
        noise = control(jax.random.key(5), seen.observation)
        print("prior only:", flush=True)
        return attack(plain.assumed_fn, cosine, [noise], victims, weights, args)[0]

    tuned_prior = best(guess(seen_tuning["none"], tuning, args.weights))
    for found in founds.values():
        frozen = {name: [weight] for name, weight in tuned_blind.items()}
        every = blind(setting, found.seen, frozen, found.victims, args)
        found.blind.update((name, results[0]) for name, results in every.items())
        found.others["prior only"] = guess(found.seen["none"], found.victims, [tuned_prior])[0]
        public = jnp.asarray(found.victims.images.normalize(public_images(found.victims).images))
        draws: dict[str, InitFn] = {
            "random search, noise": normal(),
            "random search, public images": lambda key, _, public=public: jax.random.choice(key, public, (1,)),
        }
        for search, draw_fn in draws.items():
            print(f"{search}:", flush=True)
            shared = [found.seen["none"].observation]
            ((drawn,),) = attack(plain.assumed_fn, cosine, shared, found.victims, frozen["none"], args, draw_fn)
            found.others[search] = drawn
    write_table(args, setting, founds, bounds, tuned_blind, tuned_adaptive, tuned_prior)


def public_images(victims: Victims) -> data.ImageData:
    """The first training images by their ids but the victims."""
    images = data.load("cifar10", split="train", limit=10_000)
    if images.name != victims.images.name:
        return images
    kept = np.setdiff1d(np.arange(len(images.labels)), victims.places)
    return images._replace(images=images.images[kept], labels=images.labels[kept])


def guesses_of(victims: Victims) -> dict[str, np.ndarray]:
    """PSNR of guesses without a gradient, by name, shape (v,) each."""
    public = public_images(victims)
    labels = {"labels": np.asarray(victims.truth.labels), "gallery_labels": public.labels}
    return {name: psnr[:, 0] for name, psnr in metrics.baselines(victims.pixels, public.images, **labels).items()}


def classified(protected: Protected, victims: Victims) -> np.ndarray:
    """Whether the network names a victim's class, shape (v,)."""
    logits = protected.apply_fn(protected.params, victims.truth.inputs[:, 0])
    return np.asarray(jnp.argmax(logits, -1) == victims.truth.labels[:, 0])


def promised(name: str, rounds: int) -> dict[str, str]:
    """Of DP-SGD, after one round and after all of them, without sampling."""
    private = [part.settings["noise_multiplier"] for part in parse(name) if part.name == "dpsgd"]
    if not private:
        return {"epsilon": "-", "gamma": "-"}
    if private[0] == 0:
        return {"epsilon": "inf", "gamma": "1"}
    numbers = sorted({1, rounds})
    epsilon = partial(metrics.epsilon, private[0], delta=DELTA, relation="replace_one")
    gamma = partial(metrics.reconstruction_robustness, private[0], prior=1 / CANDIDATES)
    return {
        "epsilon": ", ".join(f"{epsilon(num_rounds=number):.4g}" for number in numbers),
        "gamma": ", ".join(f"{gamma(num_rounds=number):.3g}" for number in numbers),
    }


def write_table(
    args: argparse.Namespace,
    setting: Setting,
    founds: dict[str, Found],
    bounds: dict[str, dict[str, Bounds]],
    tuned_blind: dict[str, float],
    tuned_adaptive: dict[str, float],
    tuned_prior: float,
) -> None:
    """The table of defenses, and the PSNR of every victim in a file of its own."""
    names = list(setting.protected)
    differences = {}
    for split, found in founds.items():
        bars = {"prior only": found.others["prior only"].psnr, "class mean": found.guesses["class mean"]}
        for name in names:
            blind = found.blind[name].psnr
            differences |= {(split, name, f"blind - {bar}, dB"): blind - psnr for bar, psnr in bars.items()}
            if name in tuned_adaptive:
                knows = found.adaptive[name].psnr
                differences[split, name, "adaptive - blind, dB"] = knows - blind
                differences |= {(split, name, f"adaptive - {bar}, dB"): knows - psnr for bar, psnr in bars.items()}
    gains = record.gains(differences)
    rows, of_victims, guessed, live = [], [], [], {}
    for split, found in founds.items():
        victims = found.victims
        rightly = {name: classified(setting.protected[name], victims) for name in names}

        def by_class(name: str, chosen: np.ndarray, found: Found = found) -> str:
            if not chosen.any():
                return "0"
            means = f"{found.blind[name].psnr[chosen].mean():.2f}, {found.knowing(name).psnr[chosen].mean():.2f}"
            return f"{chosen.sum()}: {means}"

        for name in names:
            seen, knows = found.seen[name], found.knowing(name)
            objective_fn = objective_of(setting.protected[name], name, args)
            at_truth = jax.vmap(objective_fn)(seen.assumed, seen.observation.update)
            row = {"defense": name, "victims": split} | figures("blind", found.blind[name]) | figures("adaptive", knows)
            row["adaptive - blind, dB"] = gains.get((split, name, "adaptive - blind, dB"), "same attack")
            row["adaptive on no defense"] = f"{found.controls[name].psnr.mean():.2f}" if name in found.controls else "-"
            for bar in ("prior only", "class mean"):
                row[f"blind - {bar}, dB"] = gains[split, name, f"blind - {bar}, dB"]
                row[f"adaptive - {bar}, dB"] = gains.get((split, name, f"adaptive - {bar}, dB"), "same attack")
            if args.epochs:
                row["classified rightly: blind, adaptive"] = by_class(name, rightly[name])
                row["wrongly"] = by_class(name, ~rightly[name])
            rows.append(
                row
                | {
                    "adaptive objective": f"{knows.objective.mean():.3f}",
                    "at the truth": f"{at_truth.mean():.3f}",
                    "TV": f"{tuned_blind[name]:g}" + (f", {tuned_adaptive[name]:g}" if name in tuned_adaptive else ""),
                    "mean error, dB": f"{-10 * np.log10(np.mean(10 ** (-knows.psnr / 10))):.2f}",
                    "van Trees, dB": f"{bounds[split][name].van_trees:.1f}" if name in bounds[split] else "-",
                    "Fisher, unbiased, dB": f"{bounds[split][name].fisher:.1f}" if name in bounds[split] else "-",
                    **promised(name, args.rounds),
                }
            )
            if name.startswith("soteria"):
                protected = setting.protected[name]
                shares = live_shares(parse(name), protected.apply_fn, protected.params, victims.truth.inputs)
                live[f"{name}, {split}"] = shares.mean()
        for name, result in found.others.items():
            rows.append(dict.fromkeys(rows[0], "-") | {"defense": name, "victims": split} | figures("blind", result))
        guessed.append(f"{split}: " + ", ".join(f"{name} {psnr.mean():.2f}" for name, psnr in found.guesses.items()))
        for i, place in enumerate(victims.places):
            one = {"victims": split, "id": victims.images.ids[place], "label": victims.images.labels[place]}
            one["classified rightly"] = rightly["none"][i]
            results = {f"{name}, blind": result for name, result in found.blind.items()}
            results |= {f"{name}, adaptive": result for name, result in found.adaptive.items()} | found.others
            every = {name: result.psnr for name, result in results.items()} | found.guesses
            of_victims.append(one | {name: f"{psnr[i]:.2f}" for name, psnr in every.items()})
    shares = ", ".join(f"{share:.0%} ({name})" for name, share in live.items())
    stage = "untrained" if not args.epochs else f"{args.epochs}_epochs"
    stage += f"_{args.restarts}_restarts" * (args.restarts > 1) + "_rescaled" * args.rescaled
    stage += "_likelihood" * args.likelihood
    stage += f"_{'_'.join(args.splits)}" * (args.splits != ["test"])
    stage += "_near" * (args.near is not None) + f"_{args.rounds}_rounds" * (args.rounds > 1)
    schedule = "; an adaptive attacker with an objective of its own uses the blind one's for the first half"
    if args.near is not None:
        schedule = (
            f" of .01 in place of .1. A control, of what the objectives say beside the truth: every attack, that on "
            f"random updates too, starts from the truth with noise of {args.near:g} dB, a start that no attacker has, "
            "and is to be compared with the attack on random updates, which takes away noise by its prior alone"
        )
    number = len(next(iter(founds.values())).victims.pixels)
    sees = "one round"
    if args.rounds > 1:
        sees = (
            f"the mean of {args.rounds} rounds on the same batch and parameters, which the protocol gives it only "
            "while the model hardly moves, and a malicious server at any time"
        )
    record.write(
        args.name or f"{args.model}_{stage}",
        f"Defenses, {args.model}, {setting.stage}: attackers that do not and that do know the defense",
        rows,
        f"{number} CIFAR-10 images of each split ({', '.join(founds)}), the first {args.per_class} of each class by id "
        "(of the training set, whose first are tuned on, the next), batch 1; model, "
        f"client and attack seed 0, {args.restarts} restart{'s' * (args.restarts > 1)} (the lowest loss is kept), "
        f"{args.steps} steps{schedule}. Both attackers tuned the weight of total variation "
        f"among {', '.join(f'{w:g}' for w in args.weights)} on the first training image of each class. PSNR in dB "
        "(means), rank of the true image among 10,000 images of its split (median; chance 5,000), differences with a "
        "paired bootstrap interval of 95 % ('none' where it covers 0) and the p-value of a test that turns the signs "
        f"of differences at random, corrected by Holm over the {len(differences)} differences of this table. "
        f"{'Adaptive attackers compare updates of one length (option --rescaled). ' if args.rescaled else ''}"
        f"{'Those of rounding take its likelihood (option --likelihood). ' if args.likelihood else ''}"
        "Adaptive on no defense: that row's attacker on undefended updates (option --controls). "
        f"Prior only: the undefended attack on random updates, tuned alike, weight {tuned_prior:g}. Random search: of "
        f"{round(DRAWS_A_STEP * args.steps):,} draws, which cost as many passes through the network as the attack's "
        "steps, the one of the lowest loss on the undefended update. Public images: of all classes, training images "
        "that are no victims of the split. The splits are different images: compare them by what is above a guess. "
        f"Guesses without a gradient: {'; '.join(guessed)} (the nearest are chosen with the truth, those of "
        "the class with the label).\n\n"
        "Of mixed images the true one is that of "
        "the largest expected coefficient, and each is attacked from one encoding; decoding several is another table. "
        f"Of the features that are not 0 Soteria prunes: {shares or 'not in this table'}. "
        "The objective of the attacker that knows, found and at the truth, is without its prior. 'van Trees': no "
        "attacker's mean squared error is less, in expectation over a Gaussian with the data's covariance (8 victims' "
        "Fisher information); it is to be compared with 'mean error', the PSNR of the adaptive attacker's mean squared "
        "error, not with means of PSNRs. 'Fisher': the same for unbiased estimators only, no ceiling for these "
        f"attacks. Epsilon: at delta {DELTA:g}, one example replaced; gamma: the chance, which no attack surpasses, of "
        f"telling the example from {CANDIDATES - 1} equally likely others, {1 / CANDIDATES:g} without the update; both "
        f"after one round{'' if args.rounds == 1 else f' and after {args.rounds}'}.\n\n"
        f"Threat model: {THREAT.describe()}; it sees {sees}; the adaptive attacker knows the defense, its strength "
        "where it makes use of it, not its key.",
        victims=of_victims,
    )


def cost(args: argparse.Namespace) -> None:
    """What a defense costs the client: ResNet-18, one step on 1 and on 128 images."""
    module = models.MODELS["resnet18"]((32, 32, 3), CLASSES, rngs=nnx.Rngs(0))
    apply_fn, params = models.functional(module)
    loss_fn = clients.cross_entropy(apply_fn)
    update = jax.tree.map(lambda leaf: 1e-3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    key, size = jax.random.key(0), sum(leaf.size for leaf in jax.tree.leaves(params))
    transformations = {
        "prune, each tensor": defenses.prune(0.9),
        "prune, global": defenses.prune(0.9, scope="global"),
        "top_k": defenses.top_k(0.9),
        "clip": defenses.clip(1.0),
        "gaussian": defenses.gaussian_noise(key, 1e-2),
        "laplace": defenses.laplace_noise(key, 1e-2),
        "sign": defenses.sign(),
        "ternary": defenses.ternary(key),
        "quantize, 4 bits": defenses.quantize(key, 4),
    }
    batches = {n: Batch(jax.random.normal(key, (n, 32, 32, 3)), jnp.zeros(n, jnp.int32)) for n in (1, 128)}
    quick: dict[str, Callable[[], Any]] = {
        name: partial(jax.jit(lambda u, t=transformation: t.update(u, t.init(u))[0]), update)
        for name, transformation in transformations.items()
    }
    encodings = {"mixup": defenses.mixup, "instahide": defenses.instahide}
    for name, make in encodings.items():
        quick[name] = partial(jax.jit(make(CLASSES, k=MIXED)), key, batches[128])
    spent = in_turns(quick, 7)

    def masks(num_probes: int) -> Any:
        options = {"ratio": 0.8, "num_probes": num_probes}
        return jax.jit(lambda p, x: defenses.kept_features(apply_fn, labels.dense("head"), p, x, **options))

    bottleneck = protect(parse("precode"), module, num_classes=CLASSES)
    widened = jax.jit(bottleneck.client_fn(key))
    plain = jax.jit(clients.federated_sgd(loss_fn))
    private = jax.jit(defenses.dp_sgd(loss_fn, key, norm=1.0, noise_multiplier=1.0, microbatch_size=1))
    whole: dict[str, dict[int, float]] = {}
    for batch_size, batch in batches.items():
        calls: dict[str, Callable[[], Any]] = {
            "none": partial(plain, params, batch),
            "dp_sgd, whole step": partial(private, params, batch),
            "precode, whole step": partial(widened, bottleneck.params, batch),
        }
        found = in_turns(calls, 7 if batch_size == 1 else 3)
        for name, num_probes in (("soteria", 0), ("soteria, 32 directions", 32)):
            scores = partial(masks(num_probes).lower(params, batch.inputs).compile(), params, batch.inputs)
            found[name] = milliseconds(scores, 3 if batch_size == 1 else 1, warm=batch_size == 1)
        for name, ms in found.items():
            whole.setdefault(name, {})[batch_size] = ms
    whole |= {name: {128: spent.pop(name)} for name in encodings}
    steps = whole.pop("none")
    rows = [
        {
            "defense": name,
            "ms": f"{ms:.0f}",
            "of the step, batch 1": f"{ms / steps[1]:.2f}",
            "of the step, batch 128": f"{ms / steps[128]:.3f}",
            "of Gaussian noise": f"{ms / spent['gaussian']:.2f}",
        }
        for name, ms in spent.items()
    ]
    for name, by_size in whole.items():
        row = {"defense": name, "ms": " / ".join(f"{by_size[n]:.0f}" if n in by_size else "-" for n in steps)}
        for n in steps:
            row[f"of the step, batch {n}"] = f"{by_size[n] / steps[n]:.2f}" if n in by_size else "-"
        rows.append(row | {"of Gaussian noise": "-"})
    record.write(
        "cost",
        f"What a defense costs a client: ResNet-18, {size:,} parameters",
        rows,
        "Medians of 3 or 7 calls (of one for Soteria at batch 128), milliseconds beside the undefended step (batch 1: "
        f"{steps[1]:.0f} ms, batch 128: {steps[128]:.0f} ms), one process. What changes an update or encodes a batch "
        "takes turns with the others, whole clients with the undefended one. In the last rows batch 1 / 128. DP-SGD "
        "and PRECODE are the whole client, DP-SGD one example at a time; MixUp and "
        f"InstaHide, k = {MIXED}, the encoding, which one image has none of; Soteria its scores, which take the "
        "derivative of each of 512 features for every example, or of all of them along 32 random directions.",
    )


def milliseconds(fn: Callable[[], Any], repeats: int, *, warm: bool = True) -> float:
    if warm:
        jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of calls that take turns, so that a machine that is busy for a while is so for all of them."""
    for fn in calls.values():
        jax.block_until_ready(fn())
    times = [{name: milliseconds(fn, 1, warm=False) for name, fn in calls.items()} for _ in range(rounds)]
    return {name: float(np.median([each[name] for each in times])) for name in calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["lenet", "groupnorm_net"], default="lenet")
    parser.add_argument("--width", type=int, default=8, help="of groupnorm_net")
    parser.add_argument("--epochs", type=int, default=0, help="of training before the attack")
    parser.add_argument("--splits", nargs="+", choices=["test", "train"], default=["test"], help="that victims are of")
    parser.add_argument("--per-class", type=int, default=7, help="victims of each class")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="on one batch, whose mean the server sees")
    parser.add_argument("--lanes", type=int, default=10)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.3, 0.1, 0.03], help="of total variation")
    parser.add_argument("--controls", action="store_true", help="each adaptive attacker on undefended updates too")
    parser.add_argument("--rescaled", action="store_true", help="adaptive attackers compare updates of one length")
    parser.add_argument("--likelihood", action="store_true", help="of rounding, in place of its expectation")
    parser.add_argument("--near", type=float, help="PSNR in dB of the truth with noise that attacks start from")
    parser.add_argument("--name", help="of the table's files; default: by model and stage")
    parser.add_argument("--defenses", nargs="+", default=list(DEFENSES))
    with tempfile.TemporaryDirectory() as folder:
        # The victims' program is that of the tuning images.
        jax.config.update("jax_compilation_cache_dir", folder)
        run_parts(parser, table, cost)


if __name__ == "__main__":
    main()
