"""MAGIA and FedLeak beside Inverting Gradients, with as many steps.

    python benchmarks/presets.py [tune | table] [--victims N] [--batch-sizes N ...] [--steps N] [--lanes N]

An untrained LeNet on CIFAR-10. `tune` tries settings on training images, of which the attacks' defaults are; `table`
takes the defaults, on test images. Needs the extra `data`, and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR).
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from attackers import unstacked
from flax import nnx
from parts import run_parts

from gia_jax import Attack, Batch, Observation, ThreatModel, attacks, clients, data, keep_best, metrics, models, observe
from gia_jax.matching.objectives import euclidean
from gia_jax.report import progress
from gia_jax.sweep import grid, study, sweep

THREAT = ThreatModel(labels=True)
APPLY, PARAMS = models.functional(models.LeNet((32, 32, 3), 10, rngs=nnx.Rngs(0)))
CLIENT = clients.federated_sgd(clients.cross_entropy(APPLY))


class Setting:
    """Batches of images, and what the server sees of them."""

    def __init__(self, split: str, victims: int, size: int) -> None:
        self.images = data.load("cifar10", split=split, limit=victims * size)
        pixels = self.images.normalize(self.images.images).reshape(victims, size, 32, 32, 3)
        self.truth = Batch(jnp.asarray(pixels), jnp.asarray(self.images.labels.reshape(victims, size)))

        def of_one(key: jax.Array, batch: Batch) -> Observation:
            return observe(key, THREAT, CLIENT, PARAMS, batch)

        keys = jax.random.split(jax.random.key(7), victims)
        self.seen = jax.jit(jax.vmap(of_one))(keys, self.truth)._replace(params=PARAMS)

    def scores(self, found: Batch) -> metrics.Scores:
        """The scores of the reconstructions."""
        return metrics.score(found, self.truth, self.images)

    def attackers(self, steps: int) -> dict[str, Callable[..., Attack]]:
        """The attacks as functions of the settings that are no default."""
        bounds = self.images.bounds()
        return {
            "Inverting Gradients": lambda **more: attacks.inverting_gradients(
                CLIENT, bounds=bounds, num_steps=steps, **more
            ),
            "MAGIA": lambda **more: attacks.magia(CLIENT, num_classes=10, bounds=bounds, **more),
            "FedLeak": lambda **more: attacks.fedleak(CLIENT, bounds=bounds, num_steps=steps, **more),
        }


def tune(args: argparse.Namespace) -> None:
    """Settings on training images: one program for each line of `tried`, of all values in it."""
    tried: list[tuple[str, int, dict[str, Any], dict[str, list[float]]]] = [
        ("MAGIA", 1, {}, {"total_variation_weight": [5e-3, 5e-4, 5e-5, 5e-6]}),
        ("MAGIA", 4, {}, {"total_variation_weight": [5e-3, 5e-4, 5e-5, 5e-6]}),
        ("FedLeak", 1, {"matched_share": 0.1}, {"regularized_share": [0.0]}),
        ("FedLeak", 1, {"matched_share": 1.0}, {"regularized_share": [0.0]}),
        ("FedLeak", 1, {"objective_fn": euclidean}, {"total_variation_weight": [1e-2, 1e-3]}),
        ("FedLeak", 1, {"regularized_share": 0.5}, {"radius": [1e-9, 0.03, 0.1, 0.3, 1.0]}),
    ]
    for name, size, fixed, values in tried:
        setting = Setting("train", args.tuning_images // size, size)
        make = setting.attackers(args.steps)[name]
        options = {"num_steps": args.steps, "lanes": args.lanes}
        found = sweep(
            lambda chosen, make=make, fixed=fixed: keep_best(make(**fixed, **chosen)),
            grid(**values),
            jax.random.key(0),
            setting.seen,
            **options,
        )
        for i, batch in enumerate(unstacked(found.reconstruction.batch)):
            scores = setting.scores(batch)
            chosen = {key: float(of_all[i]) for key, of_all in found.settings.items()}
            chosen |= {key: getattr(value, "__name__", value) for key, value in fixed.items()}
            print(f"{name}, batch {size}, {chosen}: {scores.psnr.mean():.2f} dB", flush=True)


def table(args: argparse.Namespace) -> None:
    """PSNR and labels of the attacks as they are by default, with and without what is new in them."""
    variants = {
        "Inverting Gradients": ("Inverting Gradients", {}),
        "MAGIA": ("MAGIA", {}),
        "MAGIA without subsets": ("MAGIA", {"subset_weight": 0.0}),
        "FedLeak": ("FedLeak", {}),
        "FedLeak without regularization": ("FedLeak", {"regularized_share": 0.0}),
    }
    rows, victims = [], []
    for size in args.batch_sizes:
        setting, plain = Setting("test", args.victims, size), None
        for title, (name, more) in variants.items():
            if size == 1 and title == "MAGIA without subsets":
                continue  # it is MAGIA
            attack = keep_best(setting.attackers(args.steps)[name](**more))
            shown = progress(f"batch {size}, {title}")
            options = {"num_steps": args.steps, "lanes": args.lanes, "progress_fn": shown}
            found = study(attack, jax.random.key(0), setting.seen, **options)
            scores = setting.scores(found.reconstruction.batch)
            psnr = scores.psnr.mean(1)
            plain = psnr if plain is None else plain
            rows.append(
                {
                    "batch": size,
                    "attack": title,
                    "labels": "found" if name == "MAGIA" else "known",
                    "PSNR": record.interval(psnr, np.mean, ".2f"),
                    "against Inverting Gradients": "" if plain is psnr else record.gain(psnr - plain),
                    "labels right, %": f"{100 * scores.label_correct.mean():.0f}",
                    "ms a step": f"{found.timing.ms_per_step_per_restart:.2f}",
                }
            )
            victims += [
                {"batch": size, "attack": title, "victim": v, "psnr": f"{p:.3f}", "labels": f"{right:.3f}"}
                for v, (p, right) in enumerate(zip(psnr, scores.label_correct, strict=True))
            ]
    record.write(
        "table",
        f"MAGIA and FedLeak beside Inverting Gradients, {args.victims} clients",
        rows,
        f"An untrained LeNet and CIFAR-10's first test images. {args.steps} steps, 1 restart, the best iterate by the "
        "attack's own loss, float32; the attacks' defaults, which were chosen on training images (`tune`). PSNR after "
        "assignment, mean over the images of a client and then over clients, with 95 % intervals over clients. A grey "
        "image has about 12.4 dB. MAGIA's L-BFGS and labels that it searches for are DLG's; a batch of one has no "
        f"subset. 'ms a step' is of one client of {args.lanes} side by side, on shared cores. Threat model: "
        f"{THREAT.describe()}; MAGIA does not use the labels.",
        victims=victims,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", type=int, default=16, help="clients of the part `table`")
    parser.add_argument("--tuning-images", type=int, default=8, help="images of the part `tune`")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="images of a client")
    parser.add_argument("--steps", type=int, default=600, help="of an attack")
    parser.add_argument("--lanes", type=int, default=8, help="clients attacked side by side")
    run_parts(parser, tune, table)


if __name__ == "__main__":
    main()
