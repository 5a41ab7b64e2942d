"""Why a trained ResNet-20 keeps its images: loss curves, and the loss between what was found and the truth.

    python benchmarks/landscape.py [table] [--stages STAGE ...] [--victims N] [--steps N] [--near DB] [--keep FOLDER]

Needs the extras `data` and `interop`, and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). The trained networks are those
of `benchmarks/resnet20.py`. A run that was stopped goes on from what it kept in FOLDER. Columns with "(truth)" in their
names are diagnoses, which no attacker can make.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
import resnet20
from attackers import THREAT, ranks_among, signed_adam, unstacked
from parts import run_parts

from gia_jax import Attack, Batch, Observation, clients, control, data, keep_best, metrics, models, observe
from gia_jax.attacks import inverting_gradients
from gia_jax.base import ClientFn, Params
from gia_jax.matching import priors
from gia_jax.matching.objectives import cosine
from gia_jax.report import progress
from gia_jax.sweep import grid, study, sweep

CLASSES, GALLERY, LANES = 10, 10_000, 16
TUNING, DIAGNOSED = 4, 16  # images that weights are chosen on; victims whose attack is run again for a diagnosis
STAGES = {"untrained": None, "one epoch": "one_epoch", "converged": "converged"}
WEIGHTS = grid(smoothness=[1e-3, 1e-2, 1e-1, 1.0])
SHARES = np.linspace(0.0, 1.25, 26)  # of the way from what was found to the truth
DISTANCES = (40.0, 35.0, 30.0, 25.0, 20.0, 15.0, 12.0)  # PSNR in dB of the truth with noise


class Victims(NamedTuple):
    """Images, each alone in its batch, with a leading axis; and what the server sees of them."""

    truth: Batch
    seen: Observation
    images: data.ImageData

    @classmethod
    def of(cls, split: str, number: int, client_fn: ClientFn, params: Params) -> "Victims":
        """The first images of a split."""
        images = data.load("cifar10", split=split, limit=GALLERY)
        inputs = jnp.asarray(images.normalize(images.images[:number]))[:, None]
        truth = Batch(inputs, jnp.asarray(images.labels[:number])[:, None])

        def see(batch: Batch) -> Observation:
            return observe(jax.random.key(0), THREAT, client_fn, params, batch, num_classes=CLASSES)._replace(params=())

        return cls(truth, jax.jit(jax.vmap(see))(truth)._replace(params=params), images)

    def first(self, number: int) -> "Victims":
        """The first of them."""
        truth, seen = jax.tree.map(lambda leaf: leaf[:number], (self.truth, self.seen._replace(params=())))
        return self._replace(truth=truth, seen=seen._replace(params=self.seen.params))

    def noisy(self, key: jax.Array, psnr: float) -> jax.Array:
        """The true images with noise, at this PSNR in dB."""
        noise = 10 ** (-psnr / 20) * jax.random.normal(key, self.truth.inputs.shape)
        return self.truth.inputs + noise / jnp.asarray(self.images.std, jnp.float32)


class Landscape(NamedTuple):
    """What was found on a network, and the distance of updates around it; a row a victim."""

    weight: float
    psnr: np.ndarray
    ranks: np.ndarray
    curve: np.ndarray  # loss at every step
    loss: np.ndarray  # of what was found
    loss_at_truth: np.ndarray
    line: np.ndarray  # distance of updates on the line from what was found to the truth
    around: np.ndarray  # and of the truth with noise
    near: np.ndarray  # of the first victims: PSNR of where the attack ends that starts from the truth with noise
    near_match: np.ndarray  # its distance of updates
    control: np.ndarray  # PSNR of the same attack on random updates
    seconds: float


def landscape(stage: str, args: argparse.Namespace) -> Landscape:
    """Attacks the victims on one network."""
    name = STAGES[stage]
    apply_fn, params = models.functional(resnet20.network(None if name is None else resnet20.weights_file(name)))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    victims = Victims.of("test", args.victims, client_fn, params)
    tuning = Victims.of("train", TUNING, client_fn, params)

    def attack_of(setting: Any, rate: float = 0.1, **start: Any) -> Attack:
        attack = inverting_gradients(
            client_fn,
            bounds=victims.images.bounds(),
            total_variation_weight=setting["smoothness"],
            optimizer=signed_adam(args.steps, rate),
            **start,
        )
        return keep_best(attack)

    def options(what: str) -> dict[str, Any]:
        shown = progress(f"{stage}, {what}")
        return {"num_steps": args.steps, "lanes": LANES, "progress_fn": shown, "checkpoint": args.keep}

    def psnr(found: Batch, of: Victims) -> np.ndarray:
        return metrics.score(found, of.truth, of.images).psnr[:, 0]

    tried = sweep(attack_of, WEIGHTS, jax.random.key(2), tuning.seen, **options("tuning"))
    best = int(np.argmax([psnr(found, tuning).mean() for found in unstacked(tried.reconstruction.batch)]))
    weight = float(WEIGHTS["smoothness"][best])
    attack = attack_of({"smoothness": weight})
    found = study(attack, jax.random.key(1), victims.seen, **options("attack"))
    some = victims.first(DIAGNOSED)
    unrelated = control(jax.random.key(3), some.seen._replace(params=()))._replace(params=params)
    random = study(attack, jax.random.key(1), unrelated, **options("random updates"))
    start = {"start": some.noisy(jax.random.key(11), args.near)}
    started = some.seen._replace(extra=some.seen.extra | start)
    # In steps so small that it does not leave the place where it starts at once.
    closer = attack_of({"smoothness": weight}, 0.01, init_fn=lambda key, observation: observation.extra["start"])
    near = study(closer, jax.random.key(1), started, **options("near the truth")).reconstruction
    scores = metrics.score(found.reconstruction.batch, victims.truth, victims.images)
    distance_of = distances(client_fn, victims)
    reached = jnp.asarray(found.reconstruction.batch.inputs)
    variation, nothing = priors.total_variation(), Observation((), ())
    return Landscape(
        weight=weight,
        psnr=scores.psnr[:, 0],
        ranks=ranks_among(victims.images.images, scores.images[:, 0], np.arange(args.victims)),
        curve=found.losses[:, 0],
        loss=found.reconstruction.loss,
        # The client's update is that of the truth, at which the attack's loss is its prior alone.
        loss_at_truth=weight * np.asarray(jax.vmap(lambda batch: variation(batch, nothing))(victims.truth)),
        line=np.stack([distance_of(reached + s * (victims.truth.inputs - reached)) for s in SHARES], 1),
        around=np.stack([distance_of(victims.noisy(jax.random.key(12), noise)) for noise in DISTANCES], 1),
        near=psnr(near.batch, some),
        near_match=distances(client_fn, some)(jnp.asarray(near.batch.inputs)),
        control=psnr(random.reconstruction.batch, some),
        seconds=found.timing.run_seconds / args.victims,
    )


def distances(client_fn: ClientFn, victims: Victims) -> Callable[[jax.Array], np.ndarray]:
    """The function from images, one a victim, to the cosine distances of their updates to the victims'."""

    @jax.jit
    def distance_of(inputs: jax.Array, seen: Observation) -> jax.Array:
        def one(pair: tuple[Batch, Params]) -> jax.Array:
            return cosine(client_fn(seen.params, pair[0]), pair[1])

        return jax.lax.map(one, (victims.truth._replace(inputs=inputs), seen.update), batch_size=LANES)

    return lambda inputs: np.asarray(distance_of(inputs, victims.seen))


def table(args: argparse.Namespace) -> None:
    """A row for each network, and a picture of all."""
    found = {stage: landscape(stage, args) for stage in args.stages}
    images = data.load("cifar10", limit=args.victims)
    grey = -10 * np.log10(np.mean(np.square(images.images - 0.5), (1, 2, 3)))
    rows, of_victims = [], []
    for stage, one in found.items():
        rows.append(
            {
                "network": stage,
                "total variation": f"{one.weight:g}",
                "PSNR": record.interval(one.psnr, np.mean, ".2f"),
                "over grey": record.gain(one.psnr - grey),
                "over random updates": record.gain(one.psnr[: len(one.control)] - one.control),
                "in the first 100": record.interval(100 * (one.ranks <= 100), np.mean, ".0f"),
                "loss, first step to found": f"{np.median(one.curve[:, 0]):.2f} to {np.median(one.loss):.3f}",
                "distance of updates found": f"{np.median(one.line[:, 0]):.3f}",
                "loss (truth)": f"{np.median(one.loss_at_truth):.3f}",
                "truth has the lower loss (truth)": f"{np.mean(one.loss_at_truth < one.loss):.0%}",
                f"PSNR from {args.near:g} dB (truth)": record.interval(one.near, np.mean, ".2f"),
                "its distance of updates (truth)": f"{np.median(one.near_match):.3f}",
                "s a victim": f"{one.seconds:.1f}",
            }
        )
        of_victims += [
            {"network": stage, "victim": i, "psnr": f"{p:.3f}", "grey": f"{g:.3f}", "rank": r}
            for i, (p, g, r) in enumerate(zip(one.psnr, grey, one.ranks, strict=True))
        ]
    record.write(
        "table",
        f"Inverting Gradients on ResNet-20, and the loss around the truth: {args.victims} CIFAR-10 test images",
        rows,
        f"Each image alone in its batch, label known, batch normalisation by running statistics, which the server has "
        f"with the parameters. {args.steps} steps, 1 start, seed 1, the iterate of the attacker's lowest loss; the "
        f"weight of the total variation is that of {WEIGHTS['smoothness'].tolist()} with the best mean PSNR of "
        f"{TUNING} training images. PSNR in dB with intervals of 95 % over victims, differences paired; grey has "
        f"{grey.mean():.2f} dB; ranks among {GALLERY:,} test images; losses are medians. Columns with (truth) are "
        f"diagnoses, which need the true images: 'from {args.near:g} dB' is the same attack from the truth with noise, "
        f"in steps a tenth as large; it, and random updates, of the first {DIAGNOSED} victims.\n\n"
        f"Threat model: {THREAT.describe()}.",
        victims=of_victims,
    )
    picture(found, args)


def picture(found: dict[str, Landscape], args: argparse.Namespace) -> None:
    """Draws medians over victims, with quartiles: of losses by step, to the truth, and around it."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(15, 4.4), layout="constrained")
    panels = drawn.subplots(1, 3)
    steps = np.arange(1, args.steps + 1)
    for stage, one in found.items():
        for panel, x, values in (
            (panels[0], steps, one.curve),
            (panels[1], SHARES, one.line),
            (panels[2], np.asarray(DISTANCES), one.around),
        ):
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            panel.plot(x, middle, label=stage)
            panel.fill_between(x, low, high, alpha=0.2)
    panels[0].set(xlabel="step", ylabel="attack's loss", ylim=(0, None), xscale="log")
    panels[1].set(xlabel="way from what was found (0) to the truth (1)", ylabel="distance of updates", ylim=(0, None))
    panels[2].set(xlabel="PSNR in dB of the truth with noise", ylabel="distance of updates", ylim=(0, None))
    panels[0].legend()
    for panel in panels:
        panel.grid(alpha=0.3)
    drawn.savefig(record.folder() / "landscape.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--victims", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--near", type=float, default=20.0, help="PSNR in dB of the truth with noise")
    parser.add_argument("--keep", type=Path, help="folder for the state of a run")
    run_parts(parser, table)


if __name__ == "__main__":
    main()
