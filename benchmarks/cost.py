"""What it costs to recover ONE recognisable image behind each defense, failures, tuning and decoding included.

    python benchmarks/cost.py [table] [--victims N] [--restarts N] [--steps N] [--epochs N] [--price X]
                              [--defenses NAME ...]

Needs the extra `data` and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). Nothing else should run on the machine. Energy
is read where Linux shows a processor's counters (powercap).
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import attackers
import jax
import jax.numpy as jnp
import numpy as np
import record
from attackers import Attacker, attack_of, counted_steps, ranks_among
from decoding import draw_epochs, encode
from flax import nnx
from parts import run_parts

from gia_jax import Attack, Batch, Observation, data, decoding, metrics, models, observe
from gia_jax.defenses.mixing import Mixing
from gia_jax.defenses.protected import Part, Protected, parse, protect
from gia_jax.matching.objectives import cosine
from gia_jax.report import progress
from gia_jax.sweep import grid, sweep
from gia_jax.sweep.study import study

CLASSES, GALLERY, TUNING, SET = 10, 10_000, 8, 8  # SET: images that mix with each other, or the victims of a group
WEIGHTS = (1e-3, 1e-2, 1e-1)  # of total variation, from which the attacker chooses on images of its own
DEFENSES = (
    "none",
    "prune:ratio=0.9",
    "prune:ratio=0.99",
    "clip:norm=1",
    "gaussian:scale=1e-2",
    "gaussian:scale=1e-1",
    "sign",
    "quantize:bits=4",
    "mixup:k=2",
    "instahide:k=2",
)
COUNTERS = Path("/sys/class/powercap")


class Found(NamedTuple):
    """What the attacker of one defense ends with, and what it took.

    Attributes:
        images: Recovered pixels of every victim.
        once: Seconds of compiling and of tuning.
        seconds: Seconds of the attack on all victims, and of decoding.
        decoding: Seconds of decoding, which are a part of `seconds`.
        weight: Weight of the total variation that the tuning chose.
    """

    images: np.ndarray
    once: float
    seconds: float
    decoding: float
    weight: float


def joules() -> float | None:
    """The processor's energy counters, or None where there are none."""
    files = sorted(COUNTERS.glob("intel-rapl:?/energy_uj"))
    try:
        return sum(int(file.read_text()) for file in files) / 1e6 if files else None
    except OSError:
        return None


def recovered(name: str, args: argparse.Namespace) -> Found:
    """Tunes on the attacker's own images, attacks every victim, and decodes where images were mixed."""
    module = models.LeNet((32, 32, 3), CLASSES, rngs=nnx.Rngs(0))
    images, own = data.load("cifar10", limit=args.victims), data.load("cifar10", split="train", limit=SET)
    part = next((part for part in parse(name) if part.acts_on == "input"), None)
    mixed, hidden = part is not None, part is not None and part.name == "instahide"
    # What is mixed is encoded here, all epochs of a set together, and its client is then an undefended one.
    protected = protect(parse("none" if mixed else name), module, num_classes=CLASSES)
    attacker = Attacker(protected.assumed_fn, protected.adapt_fn(cosine), hidden)
    counted = counted_steps(attacker.objective_fn, args.steps)

    def make(setting: Any) -> Attack:
        return attack_of(attacker, images.bounds(), setting["weight"], args.steps)

    sent, mixings = sets_of(images, part, args.epochs, 0) if part else (batch_of(images), [])
    simulated = sets_of(own, part, 1, 100)[0] if part else batch_of(own)
    simulated = jax.tree.map(lambda leaf: leaf[:TUNING], simulated)

    tuning = sweep(
        make, grid(weight=WEIGHTS), jax.random.key(1), seen_of(protected, simulated, 11), num_steps=counted, lanes=12
    )
    found = tuning.reconstruction.batch.inputs[:, :, 0]
    if mixed:  # encodings are near no image
        error = (found - np.asarray(simulated.inputs)) * np.asarray(own.std)
        badness = np.log(np.mean(np.square(error), (2, 3, 4)))
    else:
        others = data.load("cifar10", split="train", limit=GALLERY).images
        places = np.arange(TUNING)
        badness = np.stack([np.log(ranks_among(others, own.denormalize(one), places)) for one in found])
    weight = WEIGHTS[int(np.argmin(badness.mean(1)))]
    ran = study(
        make({"weight": weight}),
        jax.random.key(2),
        seen_of(protected, sent, 12),
        num_steps=counted,
        num_restarts=args.restarts,
        lanes=16,
        progress_fn=progress(name),
    )
    once = tuning.timing.compile_seconds + tuning.timing.run_seconds + ran.timing.compile_seconds
    inputs, seconds = ran.reconstruction.batch.inputs[:, 0], 0.0
    if mixed:
        inputs, seconds = decode(mixings, inputs, np.asarray(ran.reconstruction.loss), hidden, images)
    return Found(images.denormalize(inputs), once, ran.timing.run_seconds + seconds, seconds, weight)


def batch_of(images: data.ImageData) -> Batch:
    return Batch(jnp.asarray(images.normalize(images.images)), jnp.asarray(images.labels))


def sets_of(images: data.ImageData, part: Part, epochs: int, seed: int) -> tuple[Batch, list[Mixing]]:
    """All encodings of sets of images that mix with each other, with their soft labels, and how they were mixed."""
    encodings, mixings, every = [], [], batch_of(images)
    for group in range(len(images.labels) // SET):
        mixing = draw_epochs(seed + group, epochs, SET, int(part.settings["k"]))
        own = jax.tree.map(lambda leaf, g=group: leaf[g * SET : (g + 1) * SET], every)
        inputs = encode(mixing, own.inputs, hide=part.name == "instahide")
        soft = decoding.mixing_matrix(mixing, SET) @ jax.nn.one_hot(own.labels, CLASSES)
        encodings.append(Batch(inputs.reshape(-1, *inputs.shape[2:]), soft.reshape(-1, CLASSES)))
        mixings.append(mixing)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *encodings), mixings


def seen_of(protected: Protected, batch: Batch, seed: int) -> Observation:
    """What the server sees of each example, alone in its batch."""

    def one(key: jax.Array, example: Batch) -> Observation:
        key_client, key_threat = jax.random.split(key)
        client_fn = protected.client_fn(key_client)
        seen = observe(key_threat, attackers.THREAT, client_fn, protected.params, example, num_classes=CLASSES)
        return seen._replace(params=())

    keys = jax.random.split(jax.random.key(seed), len(batch.labels))
    return jax.jit(jax.vmap(one))(keys, jax.tree.map(lambda leaf: leaf[:, None], batch))._replace(
        params=protected.params
    )


def decode(
    mixings: list[Mixing], inputs: np.ndarray, losses: np.ndarray, hidden: bool, images: data.ImageData
) -> tuple[np.ndarray, float]:
    """The images of every set from its inverted encodings, trusted by the attacker's own loss; and the seconds."""
    began, found = time.perf_counter(), []
    low, high = images.bounds()
    for group, mixing in enumerate(mixings):
        epochs, size = mixing.sources.shape[:2]
        own = slice(group * epochs * size, (group + 1) * epochs * size)
        encodings = jnp.nan_to_num(jnp.asarray(inputs[own])).reshape(epochs, size, *inputs.shape[1:])
        loss = jnp.nan_to_num(jnp.asarray(losses[own]), nan=1e3, posinf=1e3).reshape(epochs, size)
        weights = 1 / (loss + jnp.median(loss))
        if hidden:
            options: dict[str, Any] = {"bounds": (low, high), "num_restarts": 10, "weights": weights}
            found.append(decoding.decode_instahide(jax.random.key(1), mixing, encodings, size, **options).images)
        else:
            root = jnp.sqrt(weights)[..., None]
            weighted = mixing._replace(coefficients=root * mixing.coefficients)
            found.append(decoding.decode_mixup(weighted, root[..., None, None] * encodings, size))
    decoded = np.clip(np.concatenate([np.asarray(one) for one in found]), low, high)
    return decoded, time.perf_counter() - began


def table(args: argparse.Namespace) -> None:
    """A row for each defense."""
    gallery, rows, victims = data.load("cifar10"), [], []
    for name in args.defenses:
        before = joules()
        found = recovered(name, args)
        after = joules()
        pixels = np.clip(np.nan_to_num(found.images, nan=0.5), 0, 1)
        truth = gallery.images[: args.victims]
        psnr = -10 * np.log10(np.mean(np.square(pixels - truth), (1, 2, 3)))
        rank = ranks_among(gallery.images[:GALLERY], pixels, np.arange(args.victims))
        success = (psnr >= 20) | (rank == 1)
        each = np.full(args.victims, found.seconds / args.victims)
        cost = metrics.expected_cost(each, success, once=found.once)
        energy = "-" if before is None or after is None else f"{(after - before) / max(success.sum(), 1):.0f}"
        low, high = cost.interval
        rows.append(
            {
                "defense": name,
                "PSNR": record.interval(psnr, np.mean, ".1f"),
                "recovered": f"{cost.share:.0%} [{cost.share_interval[0]:.0%}, {cost.share_interval[1]:.0%}]",
                "once, s": f"{found.once:.0f}",
                "a victim, s": f"{each[0]:.2f}",
                "of it decoding": f"{found.decoding / args.victims:.2f}",
                "one image, s": f"{cost.value:.0f} [{low:.0f}, {high:.0f}]",
                "beside none": "-",
                "one image, USD": f"{cost.value * args.price / 3600:.5f}",
                "J an image": energy,
                "weight": f"{found.weight:g}",
            }
        )
        again = found.seconds / args.victims / cost.share if cost.share else np.inf
        base = again if name == "none" else base if rows[0]["defense"] == "none" else np.nan
        rows[-1]["beside none"] = f"{again / base:.1f}"
        victims += [
            {"defense": name, "victim": v, "psnr": f"{p:.3f}", "rank": int(r), "recovered": int(s)}
            for v, (p, r, s) in enumerate(zip(psnr, rank, success, strict=True))
        ]
        print(rows[-1], flush=True)
    record.write(
        "table",
        f"What one recognisable CIFAR-10 image costs, {args.victims} test images",
        rows,
        f"Untrained LeNet, an image alone in its batch; recovered: at least 20 dB, or nearest to the true one of "
        f"{GALLERY:,} test images. Inverting Gradients by one who knows the defense and not its key, {args.steps} "
        f"steps, {args.restarts} starts, of which the attacker's own loss chooses. Once: compiling, and tuning the "
        f"weight of total variation among {len(WEIGHTS)} on what {TUNING} training images or their encodings give "
        "away, by their ranks among training images (encodings: by the error). One image: once, and the seconds a "
        "victim by the share recovered, with the exact 95 % interval of that share; inf where nothing was recovered. "
        "Beside none: seconds a victim by the share, without what is paid "
        f"once, as a multiple of the undefended. MixUp and InstaHide: {SET} images that mix only with each other, "
        f"{args.epochs} epochs of encodings, all inverted, then decoded with the mixing known, which is the strongest "
        f"case. Money: at {args.price:g} USD an hour for this machine, a stated price. J: of all that ran, by the "
        "images recovered; '-' where the machine shows no counter.\n\nThreat model: "
        f"{attackers.THREAT.describe()}; the attacker knows the defense, and of MixUp and InstaHide the mixing.",
        victims=victims,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", type=int, default=32, help=f"a multiple of {SET}")
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600, help="of the attack")
    parser.add_argument("--epochs", type=int, default=8, help="of encodings of MixUp and InstaHide")
    parser.add_argument("--price", type=float, default=0.1, help="of the machine, in USD an hour")
    parser.add_argument("--defenses", nargs="+", default=list(DEFENSES))
    run_parts(parser, table)


if __name__ == "__main__":
    main()
