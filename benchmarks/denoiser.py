"""What an attacker gains who knows the noise of a client, where a denoiser stands for what images look like.

    python benchmarks/denoiser.py [train | table] [--model NAME] [--epochs N] [--per-class N] [--steps N]
                                  [--noise NAME ...] [--training-steps N] [--width N] [--depth N] [--keep FOLDER]

`train` writes results/denoiser/cifar10.safetensors, an FFDNet, in a quarter of an hour; `table` attacks with it.
Both need the extras `data` and `interop`, and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). The denoiser learns from
training images after the first 10,000, among which are the images that attackers tune their weights on. A table that
was stopped goes on from what it kept in FOLDER.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import attackers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import resnet20
from attackers import Attacker, attack_of, counted_steps, ranks_among, unstacked
from flax import nnx
from parts import run_parts
from tqdm import tqdm
from training import train_network

from gia_jax import Attack, Batch, Observation, data, interop, metrics, models
from gia_jax.base import Params
from gia_jax.defenses.protected import Protected, parse, protect
from gia_jax.matching import priors
from gia_jax.matching.objectives import cosine
from gia_jax.report import progress
from gia_jax.sweep import grid, sweep

CLASSES, GALLERY, BATCH = 10, 10_000, 32
HELD_OUT = 10_000  # of the training images, which the denoiser never sees
LARGEST = 0.3  # standard deviation of the noise in training, of pixels in [0, 1]
RATE = 2e-3
NOISE = ("gaussian:scale=1e-2", "gaussian:scale=1e-1", "dpsgd:noise_multiplier=0.1,norm=1")
NETWORKS = {"lenet": models.LeNet, "groupnorm_net": functools.partial(models.GroupNormNet, width=8)}
# What an attacker chooses from on images of its own: weights of the total variation; or weights of the denoiser prior
# and levels of the noise that the denoiser removes.
VARIATION = grid(smoothness=[1e-3, 1e-2, 1e-1, 1.0], denoiser=[0.0], level=[0.1])
DENOISER = grid(smoothness=[0.0], denoiser=[1e-1, 1.0, 1e1], level=[0.05, 0.1, 0.2])


def network(weights: Path | None = None, *, width: int = 48, depth: int = 6) -> models.FFDNet:
    """The denoiser, with the weights of a file that `train` wrote, or untrained."""
    module = models.FFDNet(width=width, depth=depth, rngs=nnx.Rngs(0))
    if weights is not None:
        resnet20.restore(module, interop.load_tensors(weights))
    return module


def weights_file() -> Path:
    """The file of the denoiser."""
    return record.folder() / "cifar10.safetensors"


def train(args: argparse.Namespace) -> None:
    """Trains the denoiser on the mean squared error, and writes its weights and what it removes."""
    pixels = data.load("cifar10", split="train").images[HELD_OUT:].astype(np.float32)
    module, rng = network(width=args.width, depth=args.depth), np.random.default_rng(0)
    schedule = optax.cosine_decay_schedule(RATE, args.training_steps)
    optimizer = nnx.Optimizer(module, optax.adam(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(module: nnx.Module, optimizer: nnx.Optimizer, key: jax.Array, clean: jax.Array) -> None:
        key_level, key_noise = jax.random.split(key)
        level = jax.random.uniform(key_level, (len(clean),), maxval=LARGEST)
        noisy = clean + level[:, None, None, None] * jax.random.normal(key_noise, clean.shape)
        optimizer.update(module, nnx.grad(lambda module: jnp.mean(jnp.square(module(noisy, level) - clean)))(module))

    began = time.perf_counter()
    for i in tqdm(range(args.training_steps), mininterval=10):
        clean = pixels[rng.integers(len(pixels), size=BATCH)]
        clean = np.where(rng.random((BATCH, 1, 1, 1)) < 0.5, clean[:, :, ::-1], clean)
        step(module, optimizer, jax.random.fold_in(jax.random.key(0), i), jnp.asarray(clean))
    seconds = time.perf_counter() - began
    interop.save_tensors(weights_file(), nnx.to_pure_dict(nnx.state(module)))
    test, rows = jnp.asarray(data.load("cifar10", limit=1_000).images), []
    for level in (0.05, 0.1, 0.2):
        noisy = test + level * jax.random.normal(jax.random.key(1), test.shape)
        found = {"noise": f"{level:g}"}
        for name, shown in (("noisy", noisy), ("denoised", module(noisy, level))):
            error = np.mean(np.square(np.asarray(shown - test)), (1, 2, 3))
            found[f"PSNR {name}"] = record.interval(-10 * np.log10(error), np.mean, ".2f")
        rows.append(found)
    record.write(
        "cifar10",
        "A denoiser of CIFAR-10, on 1,000 test images",
        rows,
        f"FFDNet of width {args.width} and depth {args.depth}, {args.training_steps:,} steps of Adam at {RATE:g}, "
        f"falling to 0, on batches of {BATCH} of 40,000 training images, mirrored by a coin; noise of a standard "
        f"deviation from U(0, {LARGEST:g}) of pixels in [0, 1]; seed 0. {seconds / 60:.0f} minutes, beside other work.",
    )


class Victims(NamedTuple):
    """Images that are attacked, each alone in its batch, with a leading axis; and their places among their split's."""

    truth: Batch
    places: np.ndarray
    images: data.ImageData

    @classmethod
    def of(cls, split: str, per_class: int) -> "Victims":
        """The first images of each class."""
        images = data.load("cifar10", split=split, limit=GALLERY)
        firsts = [np.flatnonzero(images.labels == c)[:per_class] for c in range(CLASSES)]
        places = np.sort(np.concatenate(firsts))
        chosen = Batch(jnp.asarray(images.normalize(images.images[places])), jnp.asarray(images.labels[places]))
        return cls(jax.tree.map(lambda leaf: leaf[:, None], chosen), places, images)

    def seen(self, protected: Protected) -> Observation:
        """What the server sees of each."""
        keys = jax.random.split(jax.random.key(7), len(self.places))
        of_one = functools.partial(attackers.see, protected, num_classes=CLASSES)
        found = jax.jit(jax.vmap(lambda key, batch: of_one(key, batch, batch)))(keys, self.truth)
        return found.observation._replace(params=protected.params)


class Solver(NamedTuple):
    """The attack with any priors, on any victims."""

    denoiser: models.FFDNet
    steps: int
    keep: Path | None

    def found(
        self, attacker: Attacker, settings: Any, victims: Victims, seen: Observation, name: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """PSNR and rank of every victim, for each setting."""
        images = victims.images

        def make(setting: Any) -> Attack:
            def denoise(x: jax.Array) -> jax.Array:
                mean, std = jnp.asarray(images.mean, x.dtype), jnp.asarray(images.std, x.dtype)
                return (self.denoiser(x * std + mean, setting["level"]) - mean) / std

            prior = (setting["denoiser"], priors.denoised(denoise))
            return attack_of(attacker, images.bounds(), setting["smoothness"], self.steps, prior)

        counted = counted_steps(attacker.objective_fn, self.steps)
        options: dict[str, Any] = {"num_steps": counted, "lanes": 20, "progress_fn": progress(name)}
        ran = sweep(make, settings, jax.random.key(1), seen, checkpoint=self.keep, **options)
        print(f"{name}: compile {ran.timing.compile_seconds:.0f} s, run {ran.timing.run_seconds:.0f} s", flush=True)
        results = []
        for found in unstacked(ran.reconstruction.batch):
            scores = metrics.score(found, victims.truth, images)
            results.append((scores.psnr[:, 0], ranks_among(images.images, scores.images[:, 0], victims.places)))
        return results


def chosen(settings: Any, results: Sequence[tuple[np.ndarray, np.ndarray]]) -> Any:
    """The setting of the best mean PSNR, as a sweep of one."""
    best = int(np.argmax([psnr.mean() for psnr, _ in results]))
    return jax.tree.map(lambda leaf: leaf[best : best + 1], settings)


def table(args: argparse.Namespace) -> None:
    """Attackers that do not know of the noise, and that do, with a total variation and with the denoiser."""
    module, stage = NETWORKS[args.model]((32, 32, 3), CLASSES, rngs=nnx.Rngs(0)), "untrained"
    own: Params | None = None
    if args.epochs:
        _, own, train_share, test_share = train_network(NETWORKS[args.model], "cifar10", 0, args.epochs)
        stage = f"{args.epochs} epochs, {train_share:.1%} of the training and {test_share:.1%} of the test images right"

    def client(name: str) -> Protected:
        protected = protect(parse(name), module, num_classes=CLASSES)
        return protected if own is None else protected._replace(params=own)

    victims, tuning, plain = Victims.of("test", args.per_class), Victims.of("train", 1), client("none")
    solver = Solver(network(weights_file(), width=args.width, depth=args.depth), args.steps, args.keep)
    both = {"total variation": VARIATION, "denoiser": DENOISER}

    def tuned(attacker: Attacker, protected: Protected, prior: str, name: str) -> Any:
        results = solver.found(attacker, both[prior], tuning, tuning.seen(protected), f"tuning, {name}, {prior}")
        return chosen(both[prior], results)

    blind = Attacker(plain.assumed_fn, cosine)
    assumed = {prior: tuned(blind, plain, prior, "none") for prior in both}
    rows, of_victims, differences = [], [], {}
    for noise in ("none", *args.noise):
        protected, base = client(noise), {}
        seen, likelihood = victims.seen(protected), protected.adapt_fn(cosine)
        for prior in both:
            found = {"does not know the noise": (blind, assumed[prior])}
            if noise != "none":
                found["knows it, and tunes"] = (blind, tuned(blind, protected, prior, noise))
                if likelihood is not cosine:
                    knowing = Attacker(protected.assumed_fn, likelihood)
                    found["knows it, and takes its likelihood"] = (knowing, tuned(knowing, protected, prior, noise))
            for name, (attacker, setting) in found.items():
                psnr, rank = solver.found(attacker, setting, victims, seen, f"{noise}, {name}, {prior}")[0]
                base.setdefault(prior, psnr)
                key = noise, prior, name
                weight = setting["smoothness" if prior == "total variation" else "denoiser"][0]
                rows.append(
                    {
                        "client": noise,
                        "prior": prior,
                        "attacker": name,
                        "weight": f"{weight:g}" + (f", level {setting['level'][0]:g}" if prior == "denoiser" else ""),
                        "PSNR": record.interval(psnr, np.mean, ".2f"),
                        "median rank": f"{np.median(rank):.0f}",
                        "in the first 100": record.interval(100 * (rank <= 100), np.mean, ".0f"),
                    }
                )
                if psnr is not base[prior]:
                    differences[*key, "against not knowing"] = psnr - base[prior]
                if prior == "denoiser":
                    first = base["total variation"]
                    differences[*key, "against not knowing, total variation"] = psnr - first
                of_victims += [
                    {"client": noise, "prior": prior, "attacker": name, "victim": v, "psnr": f"{p:.3f}", "rank": r}
                    for v, (p, r) in enumerate(zip(psnr, rank, strict=True))
                ]
    gains = record.gains(differences)
    for row in rows:
        for column in ("against not knowing", "against not knowing, total variation"):
            row[column] = gains.get((row["client"], row["prior"], row["attacker"], column), "-")
    grey = np.mean(np.square(victims.images.images[victims.places] - 0.5), (1, 2, 3))
    record.write(
        f"{args.model}_{args.epochs}_epochs" if args.epochs else f"{args.model}_untrained",
        f"A denoiser as a prior against noise: {args.model}, {stage}",
        rows,
        f"{len(victims.places)} CIFAR-10 test images, {args.per_class} of each class, each alone in its batch; grey "
        f"has {-10 * np.log10(grey).mean():.2f} dB. Inverting Gradients, {args.steps} steps, 1 start, seed 1, the "
        "iterate of the attacker's lowest loss; a likelihood takes over after half of the steps on the cosine. Weights "
        f"of the total variation among {VARIATION['smoothness'].tolist()}, of the denoiser among 1e-1, 1 and 10 with "
        "levels of noise of .05, .1 and .2, by the mean PSNR of 10 training images that the denoiser has not seen: who "
        "does not know the noise tunes on undefended updates, who knows it on noisy ones. PSNR in dB, shares in per "
        f"cent, intervals of 95 % over victims; rank among {GALLERY:,} test images. Differences of PSNR are paired, "
        f"p-values corrected by Holm over the {len(differences)} of this table.\n\nThreat model: "
        f"{attackers.THREAT.describe()}; the attacker of the denoiser has 40,000 images of the same kind.",
        victims=of_victims,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(NETWORKS), default="lenet")
    parser.add_argument("--epochs", type=int, default=60, help="of training of the network attacked")
    parser.add_argument("--per-class", type=int, default=4, help="victims of each class")
    parser.add_argument("--steps", type=int, default=600, help="of an attack")
    parser.add_argument("--noise", nargs="+", default=list(NOISE), help="defenses by noise")
    parser.add_argument("--training-steps", type=int, default=3_000, help="of the denoiser")
    parser.add_argument("--width", type=int, default=48, help="of the denoiser")
    parser.add_argument("--depth", type=int, default=6, help="of the denoiser")
    parser.add_argument("--keep", type=Path, help="folder for the state of a table")
    run_parts(parser, train, table)


if __name__ == "__main__":
    main()
