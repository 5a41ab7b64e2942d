"""What each defense costs and what it saves: test accuracy and leakage of the same network at the same strength.

    python benchmarks/utility.py [PART ...] [--network NAME] [--steps N] [--seeds N] [--stages NAME ...] [--victims N]
        [--attack-steps N] [--no-control] [--workers N] [--defenses NAME ...]

The parts are `digits` and `cifar10`. Needs the extras `demo`, `data` and `privacy`, and CIFAR-10 prepared by TFDS
(GIA_JAX_DATA_DIR). A defense is one row of `DEFENSES`, by its name on the command line. On CIFAR-10 Soteria estimates
its scores: those of the GroupNormNet's 2,048 features take 1.7 processor seconds for an example, a day for this
training. Each defense meets an attacker that does not know it and, where that is another attack, one that does.
Defenses are independent, and each worker is a process with one at a time: small networks leave a second core idle.
"""

import argparse
import functools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from attackers import Attacker, attack_of, counted_steps, differs, ranks_among
from flax import nnx
from jaxtyping import PRNGKeyArray
from parts import run_parts
from training import SampleFn, accuracy, poisson, train, uniform

from gia_jax import (
    Batch,
    ClientFn,
    Observation,
    ThreatModel,
    control,
    data,
    metrics,
    models,
    observe,
)
from gia_jax._compile import RUN_ONCE
from gia_jax.base import Params
from gia_jax.cli.outcomes import joined
from gia_jax.cli.pixels import pixel_covariance, pixel_information
from gia_jax.defenses.mixing import as_probabilities
from gia_jax.defenses.protected import CANDIDATES, Part, Protected, live_shares, parse, protect
from gia_jax.matching.objectives import cosine
from gia_jax.metrics import epsilon, fisher_bound, reconstruction_robustness, success_share, van_trees_bound
from gia_jax.report import progress
from gia_jax.sweep.study import study

THREAT = ThreatModel(labels=True)
CLASSES, GALLERY = 10, 10_000  # images that are guessed, and images that a victim is ranked among
WIDTH = 16
BATCH = 64
CAPACITY = 128  # eight standard deviations above the mean of a Poisson sample
LEARNING_RATE = 3e-3
DELTA = 1e-5
BOUND_VICTIMS = 4  # whose Fisher information is averaged
LEAKAGE_SEED = 1_000  # of victims and attacker; the seeds of training are 0, 1, ...
DEFENSES = (
    "none",
    "prune:ratio=0.9",
    "prune:ratio=0.99",
    "topk:ratio=0.99",
    "clip:norm=1",
    "gaussian:scale=1e-3",
    "gaussian:scale=1e-2",
    "laplace:scale=1e-2",
    "sign",
    "ternary",
    "quantize:bits=4",
    "dpsgd:noise_multiplier=0.1,norm=1",
    "dpsgd:noise_multiplier=1,norm=1",
    "soteria:ratio=0.8",
    "precode",
    "mixup:k=4",
    "instahide:k=4",
    "prune_mixup",
    "prune_instahide",
)


class Network(NamedTuple):
    """A network that learns under every defense: none of its layers mixes examples."""

    make: Callable[..., nnx.Module]  # `(input_shape, num_classes, width=, rngs=) -> module`
    title: str


NETWORKS = {
    "groupnorm_net": Network(models.GroupNormNet, "a GroupNormNet"),
    "resnet20": Network(
        functools.partial(models.ResNet, blocks=(3, 3, 3), norm="group"), "a ResNet-20 with group normalisation"
    ),
}
DEFAULT_NETWORK = "groupnorm_net"  # whose tables have no network in their names
STAGES = {
    "untrained": "the network of seed 0 before training",
    "trained": "the network whose accuracy is in the row, seed 0",
}
PRIOR_ONLY = "Prior only: the same attack on random updates of the same norms. "


class Defense(NamedTuple):
    """A client with its defense, on the network of one seed, what the defense is made of, and the client that an
    attacker assumes who sees the network and knows no defense.
    """

    protected: Protected
    parts: tuple[Part, ...]
    plain_fn: ClientFn

    @property
    def private(self) -> Part | None:
        """DP-SGD, where it is one of the parts: the client has an epsilon, and training takes Poisson samples."""
        return next((part for part in self.parts if part.name == "dpsgd"), None)

    @property
    def prunes_features(self) -> bool:
        """Whether Soteria is one of the parts."""
        return any(part.name == "soteria" for part in self.parts)

    @property
    def encodes(self) -> bool:
        """Whether its images are mixed with others."""
        return any(part.acts_on == "input" for part in self.parts)

    @property
    def attackers(self) -> dict[str, Attacker]:
        """One that knows no defense and, where that is another attack, one that knows this one."""
        found = {"blind": Attacker(self.plain_fn, cosine)}
        # Here, unlike in the tables of defenses, knowing InstaHide changes the box and the prior.
        magnitudes = any(part.name == "instahide" for part in self.parts)
        if magnitudes or any(differs(part.name) for part in self.parts):
            found["adaptive"] = Attacker(self.protected.assumed_fn, self.protected.adapt_fn(cosine), magnitudes)
        return found


class Task(NamedTuple):
    """A data set and the network that learns it.

    Attributes:
        train: Training examples.
        test: Test images.
        victims: Test images that are attacked.
        places: Of the victims among the test images.
        gallery: Training images that an attacker may guess.
        gallery_labels: Their classes.
        smoothness: The attack's weight of total variation.
    """

    train: Batch
    test: data.ImageData
    victims: Batch
    places: np.ndarray
    gallery: np.ndarray
    gallery_labels: np.ndarray
    smoothness: float

    def defense(self, name: str, network: str, seed: int) -> Defense:
        """On the network of this seed."""
        shape = self.test.images.shape[1:]
        module = NETWORKS[network].make(shape, CLASSES, width=WIDTH, rngs=nnx.Rngs(seed))
        parts = parse(name)
        # A defense of the model is in the parameters, which every attacker sees.
        changes = [part for part in parts if part.acts_on == "model"]
        options = {"num_classes": CLASSES, "key": jax.random.key(seed)}
        return Defense(protect(parts, module, **options), parts, protect(changes, module, **options).assumed_fn)


def first_of_each_class(labels: np.ndarray, number: int) -> np.ndarray:
    """The first image of every class in turn, then the second, ...: a list that anyone can repeat."""
    ranks = np.asarray([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
    return np.lexsort((labels, ranks))[:number]


def task_of(train_set: data.ImageData, test_set: data.ImageData, victims: int, smoothness: float) -> Task:
    def batch(images: np.ndarray, labels: np.ndarray) -> Batch:
        return Batch(jnp.asarray(test_set.normalize(images)), jnp.asarray(labels))

    index = first_of_each_class(test_set.labels[:1_000], victims)
    attacked = batch(test_set.images[index], test_set.labels[index])
    gallery = (train_set.images[:GALLERY], train_set.labels[:GALLERY])
    return Task(batch(train_set.images, train_set.labels), test_set, attacked, index, *gallery, smoothness)


def trained(seeds: Sequence[Defense], task: Task, num_steps: int, name: str) -> tuple[list[Params], float]:
    """The network of every seed under the defense, and the seconds that took without compiling."""
    began = time.perf_counter()
    defense = seeds[0]
    sample_fn: SampleFn = uniform(BATCH)
    if defense.private:
        sample_fn = poisson(BATCH, CAPACITY, CLASSES)

    def encoded(key: PRNGKeyArray, examples: Batch) -> Batch:
        key_sample, key_encoding = jax.random.split(key)
        return defense.protected.encode_fn(key_encoding, sample_fn(key_sample, examples))

    def one(params: Params, key: PRNGKeyArray, examples: Batch) -> Params:
        optimizer = optax.adam(LEARNING_RATE)
        return train(defense.protected.client_fn, optimizer, encoded, params, key, examples, num_steps)

    starts = [(each.protected.params, jax.random.key(seed)) for seed, each in enumerate(seeds)]
    compiled = jax.jit(one).lower(*starts[0], task.train).compile()
    compiling = time.perf_counter() - began
    began = time.perf_counter()
    found = [jax.block_until_ready(compiled(params, key, task.train)) for params, key in starts]
    seconds = time.perf_counter() - began
    print(f"{name}: training, compile {compiling:.0f} s, {seconds / len(starts) / num_steps:.3f} s a step", flush=True)
    return found, seconds


class Leakage(NamedTuple):
    """What is found of every victim.

    Attributes:
        psnr: PSNR of every victim in dB, by the name of the attacker.
        rank: Rank of every victim among test images, by the reconstruction of the attacker that knows most.
        encoding: PSNR of that attacker's reconstructions against what was encoded of the victims.
        prior_only: PSNR of what that attacker finds where updates are noise. None without this control.
    """

    psnr: dict[str, np.ndarray]
    rank: np.ndarray
    encoding: np.ndarray
    prior_only: np.ndarray | None

    @property
    def informed(self) -> np.ndarray:
        """PSNR of the attacker that knows the defense; where that changes nothing, the blind one is also this one."""
        return self.psnr.get("adaptive", self.psnr["blind"])


def leakage(defense: Defense, task: Task, params: Params, num_steps: int, name: str, *, with_control: bool) -> Leakage:
    """The attacks on every victim, alone in its batch."""
    truth = task.victims
    key_encoding, key_victims, key_noise, key_attack = jax.random.split(jax.random.key(LEAKAGE_SEED), 4)
    # Victims mix with each other; each then shares the update of its own encoding.
    sent = defense.protected.encode_fn(key_encoding, truth)
    # Labels of one shape, so that the blind attack is one program whether or not images are mixed.
    sent = Batch(sent.inputs, as_probabilities(sent, CLASSES))
    sent, truth = jax.tree.map(lambda leaf: leaf[:, None], (sent, truth))

    def shared(key: PRNGKeyArray, params: Params, batch: Batch) -> Observation:
        key_client, key_labels = jax.random.split(key)
        client_fn = defense.protected.client_fn(key_client)
        return observe(key_labels, THREAT, client_fn, params, batch, num_classes=CLASSES)

    keys = jax.random.split(key_victims, len(truth.labels))
    see = jax.jit(jax.vmap(shared, (0, None, 0)), compiler_options=RUN_ONCE)
    seen = see(keys, params, sent)._replace(params=params)

    def found_by(who: str, observations: Observation) -> np.ndarray:
        attacker = defense.attackers[who]
        attack = attack_of(attacker, task.test.bounds(), task.smoothness, num_steps)
        counted = counted_steps(attacker.objective_fn, num_steps)
        called = f"{name}, {who}"
        options: dict[str, Any] = {"num_steps": counted, "lanes": 10, "progress_fn": progress(called)}
        found = study(attack, key_attack, observations, **options)
        lanes, timing = len(found.losses), found.timing
        each = timing.run_seconds / lanes / num_steps
        print(
            f"{called}: {lanes} lanes, compile {timing.compile_seconds:.0f} s, {each:.4f} s a step and lane", flush=True
        )
        return np.asarray(found.reconstruction.batch.inputs)

    def scored(inputs: np.ndarray) -> metrics.Scores:
        return metrics.score(Batch(inputs, truth.labels), truth, task.test)

    *others, last = defense.attackers
    psnr = {who: scored(found_by(who, seen)).psnr[:, 0] for who in others}
    inputs = found_by(last, joined([seen, jax.jit(control)(key_noise, seen)]) if with_control else seen)
    inputs, of_noise = inputs[: len(keys)], inputs[len(keys) :]
    found = scored(inputs)
    psnr[last] = found.psnr[:, 0]
    error = (inputs - np.asarray(sent.inputs)) * np.asarray(task.test.std)
    encoding = -10 * np.log10(np.mean(error**2, (1, 2, 3, 4)))
    rank = ranks_among(task.test.images[:GALLERY], found.images[:, 0], task.places)
    return Leakage(psnr, rank, encoding, scored(of_noise).psnr[:, 0] if with_control else None)


def promised(defense: Defense, task: Task, stages: dict[str, Params], num_steps: int) -> dict[str, str]:
    """What DP-SGD promises: of the whole training, of the update attacked, and of that at each stage of the network."""
    bounds = {f"{bound} {stage}": "-" for stage in stages for bound in ("van Trees", "Fisher, unbiased")}
    row = {"epsilon": "-", "epsilon of one update": "-", "gamma of one update": "-"} | bounds
    if defense.private is None or defense.private.settings["noise_multiplier"] == 0:
        return row
    multiplier, norm = (defense.private.settings[name] for name in ("noise_multiplier", "norm"))
    rate = BATCH / len(task.train.labels)
    row["epsilon"] = f"{epsilon(multiplier, delta=DELTA, num_rounds=num_steps, sampling_rate=rate):.3g}"
    row["epsilon of one update"] = f"{epsilon(multiplier, delta=DELTA, relation='replace_one'):.3g}"
    row["gamma of one update"] = f"{reconstruction_robustness(multiplier, prior=1 / CANDIDATES):.3g}"
    covariance = pixel_covariance(task.gallery)
    few = jax.tree.map(lambda leaf: leaf[:BOUND_VICTIMS], task.victims)
    for stage, params in stages.items():
        information = pixel_information(defense.protected.assumed_fn, params, few, task.test) / (multiplier * norm) ** 2
        least = {"van Trees": van_trees_bound(information, covariance), "Fisher, unbiased": fisher_bound(information)}
        row |= {f"{bound} {stage}": f"{-10 * np.log10(error):.2f}" for bound, error in least.items()}
    return row


def columns(name: str, found: Leakage, encoded: bool) -> dict[str, str]:
    def mean(psnr: np.ndarray) -> str:
        return f"{psnr.mean():.2f} +- {psnr.std(ddof=1) / np.sqrt(len(psnr)):.2f}"

    def share(psnr: np.ndarray) -> str:
        return f"{float(success_share(jnp.asarray(psnr))):.0%}"

    informed, blind = found.informed, found.psnr["blind"]
    row = {f"PSNR {name}": mean(informed), f">= 20 dB {name}": share(informed)}
    row |= {f"PSNR blind {name}": mean(blind), f">= 20 dB blind {name}": share(blind)}
    row[f"rank {name}"] = f"{np.median(found.rank):.0f}"
    if found.prior_only is not None:
        row[f"prior only {name}"] = f"{found.prior_only.mean():.2f}"
    return row | {f"of the encoding {name}": f"{found.encoding.mean():.2f}" if encoded else "-"}


def measured(task_name: str, args: argparse.Namespace, defense_name: str) -> tuple[dict[str, str], dict[str, Leakage]]:
    """One defense: trained, tested, attacked before or after; the row, and the victims' figures at each stage."""
    task = task_named(task_name, args.victims)
    inputs = jnp.asarray(task.test.normalize(task.test.images))
    seeds = [task.defense(defense_name, args.network, seed) for seed in range(args.seeds)]
    defense = seeds[0]
    networks, seconds = trained(seeds, task, args.steps, defense_name)
    apply_fn = defense.protected.apply_fn
    right = 100 * np.asarray([accuracy(apply_fn, params, inputs, task.test.labels) for params in networks])
    deviation = right.std(ddof=1) if len(right) > 1 else np.nan
    row = {"defense": defense_name, "accuracy %": f"{right.mean():.1f} +- {deviation:.1f}", "undefended": "-"}
    both = {"untrained": defense.protected.params, "trained": networks[0]}
    stages, found = {stage: both[stage] for stage in STAGES if stage in args.stages}, {}
    for stage, params in stages.items():
        called = f"{defense_name}, {stage}"
        found[stage] = leakage(defense, task, params, args.attack_steps, called, with_control=args.control)
        row |= columns(stage, found[stage], defense.encodes) | {f"live features pruned {stage}": "-"}
        if defense.prunes_features:
            shares = live_shares(defense.parts, apply_fn, params, task.victims.inputs[:, None])
            row[f"live features pruned {stage}"] = f"{shares.mean():.0%}"
    row |= promised(defense, task, stages, args.steps) | {"training s": f"{seconds:.0f}"}
    print(row, flush=True)
    return row, found


def compile_into(cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)


def table(name: str, defenses: Sequence[str], args: argparse.Namespace) -> None:
    """One row for every defense."""
    began = time.perf_counter()
    # A fork of a process with threads may hang. The same few attacks run on many networks: each is compiled once.
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(args.workers, context, compile_into, (cache,)) as pool,
    ):
        rows, leaked = zip(*pool.map(functools.partial(measured, name, args), defenses))
    plain = next((row["accuracy %"].split()[0] for row in rows if row["defense"] == "none"), "-")
    task = task_named(name, args.victims)
    pixels = task.test.denormalize(np.asarray(task.victims.inputs))
    labels = np.asarray(task.victims.labels)
    guesses = metrics.baselines(pixels, task.gallery, labels=labels, gallery_labels=task.gallery_labels)
    guessed = ", ".join(f"{guess} {psnr.mean():.2f}" for guess, psnr in guesses.items())
    differences, of_victims = {}, []
    for stage in leaked[0]:
        found = {defense: of[stage] for defense, of in zip(defenses, leaked)}
        for defense, of in found.items():
            bars = {} if of.prior_only is None else {"prior only": of.prior_only}
            bars["class mean"] = guesses["class mean"]
            if defense != "none" and "none" in found:
                bars["none"] = found["none"].informed
            if "adaptive" in of.psnr:
                bars["blind"] = of.psnr["blind"]
            differences |= {(defense, f"PSNR - {bar} {stage}"): of.informed - psnr for bar, psnr in bars.items()}
        figures = {f"{own}, {who}": psnr for own, of in found.items() for who, psnr in of.psnr.items()}
        figures |= {f"prior only of {own}": of.prior_only for own, of in found.items() if of.prior_only is not None}
        figures |= guesses
        for i, place in enumerate(task.places):
            one = {"victims": f"test, {stage}", "id": task.test.ids[place], "label": labels[i]}
            of_victims.append(one | {figure: f"{psnr[i]:.2f}" for figure, psnr in figures.items()})
    gains = record.gains(differences)
    compared = list(dict.fromkeys(column for _, column in differences))

    def gain(defense: str, column: str) -> str:
        return gains.get((defense, column), "same attack" if column.startswith("PSNR - blind") else "-")

    rows = [row | {"undefended": plain} | {column: gain(row["defense"], column) for column in compared} for row in rows]
    stages = "; ".join(f"{stage}: {meaning}" for stage, meaning in STAGES.items() if stage in args.stages)
    network = NETWORKS[args.network]
    default = args.network == DEFAULT_NETWORK
    record.write(
        name if default else f"{name}_{args.network}",
        f"Utility and leakage under each defense, {name}{'' if default else f', {args.network}'}",
        rows,
        f"""\
Accuracy: of {len(task.test.labels):,} test images, mean and standard deviation of {args.seeds} seeds (of the network, \
the batches and the defense), after {args.steps} steps of Adam at {LEARNING_RATE:g} on batches of {BATCH} of \
{len(task.train.labels):,} training images, {network.title} of width {WIDTH}; nothing is tuned for a defense, and the \
optimizer rescales whatever the defense scales. MixUp and InstaHide train on encodings and are tested on plain images. \
Training s: of all seeds, without compiling. Live features pruned: of the victims' features that are not 0, the share \
that Soteria prunes.

Leakage: mean PSNR in dB and its standard error over {len(task.victims.labels)} test images, the first of every class \
in turn, each alone in its batch; share of 20 dB or more. {stages[0].upper()}{stages[1:]}. Rank of the victim among \
{len(task.test.images[:GALLERY]):,} test images (median). The defense has the same strength as in training: noise of \
the same scale on the update of a single image as on that of a batch, and for `dpsgd` the noise of a batch of one. \
Top-k has no error feedback. {PRIOR_ONLY if args.control else ""}Guesses without a gradient: {guessed} \
(the nearest training images are chosen with the truth, those of the class with the label). Differences of PSNR in dB, \
from the same victims' undefended figure (none) and the blind attacker's (blind) among them, with a paired bootstrap \
interval of 95 % ('none' where it covers 0) and the p-value of a test that turns their signs at random, corrected by \
Holm over the {len(differences)} of this table.

Attack: Inverting Gradients by one who knows the defense but not its key and, in the columns called blind, by one who \
takes the client for an undefended one of the same network ('same attack': knowing changes nothing, and one attack \
stands for both). Each has {args.attack_steps} steps of signed Adam, 1 start, seed {LEAKAGE_SEED}, and the best \
iterate by its own loss; an objective other than the cosine takes over after half of the steps. Total variation \
{task.smoothness:g}, chosen among three weights on 6 to 8 training images, undefended, on a GroupNormNet of width 8, \
and the same for every defense and both attackers. MixUp and InstaHide: the victims are mixed with each other, the \
labels known are those of the encoding, and PSNR is against the private image itself (of the encoding: against what \
was sent); for InstaHide the box and total variation of the attacker that knows it are those of magnitudes. Decoding \
encodings of several epochs is not in this table: one encoding is the least that such a client gives away.

Epsilon: of all {args.steps} rounds at delta {DELTA:g}, one example added or removed, for \
an adversary that sees every update and not the sample: real Poisson samples at rate {
            BATCH
            / len(
                task.train.labels
            ):.3g}. Of one update: the one attacked, a batch of known size which is not sampled, so one example is \
replaced; no attack tells it from {CANDIDATES - 1} equally likely others with a chance above gamma \
({1 / CANDIDATES:g} without the update). Van Trees: \
the PSNR in dB of the least mean squared error of any attacker on one update, in expectation over a Gaussian with \
the covariance of {len(task.gallery):,} training images ({BOUND_VICTIMS} victims' Fisher information); Fisher: the \
same for unbiased estimators only, no ceiling for these attacks. A mean of PSNRs may be above the PSNR of a mean \
error.

Threat model: {THREAT.describe()}; the attacker knows the defense, and its strength where it makes use of it, and the \
blind one neither. The whole table took {(time.perf_counter() - began) / 60:.0f} minutes with {args.workers} \
workers.""",
        victims=of_victims,
    )


@functools.cache
def task_named(name: str, victims: int) -> Task:
    """Of scikit-learn's digits the last 360 are the test set."""
    if name == "cifar10":
        return task_of(data.load(name, split="train"), data.load(name), victims, 1e-1)
    images = data.load(name)
    train_set, test_set = (
        images._replace(images=images.images[part], labels=images.labels[part], ids=images.ids[part])
        for part in (slice(0, -360), slice(-360, None))
    )
    return task_of(train_set, test_set, victims, 1e-3)


def digits(args: argparse.Namespace) -> None:
    """The digits of scikit-learn."""
    table("digits", args.defenses or DEFENSES, args)


def cifar10(args: argparse.Namespace) -> None:
    """CIFAR-10."""

    def feasible(name: str) -> str:
        if not name.startswith("soteria") or "num_probes" in name:
            return name
        return f"{name}{',' if ':' in name else ':'}num_probes=32"

    table("cifar10", [feasible(name) for name in args.defenses or DEFENSES], args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default=DEFAULT_NETWORK)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="of training")
    parser.add_argument(
        "--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="of the network attacked"
    )
    parser.add_argument("--victims", type=int, default=16, help="test images attacked")
    parser.add_argument("--attack-steps", type=int, default=500, help="of the attack")
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True, help="attack noise too")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--defenses", nargs="+", help="default: all")
    run_parts(parser, digits, cifar10)


if __name__ == "__main__":
    main()
