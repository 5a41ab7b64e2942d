"""R-GAP: CNN6 on CIFAR-10, twins, and ranks against recovery.

    python benchmarks/r_gap.py {cnn6,twins,ranks} [--images N] [--seed N] [--minutes N]

Needs the extra `data`, and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR).
"""

import argparse
import itertools
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record

from gia_jax import Batch, Observation, ThreatModel, clients, data, observe
from gia_jax.attacks.r_gap import Twins, r_gap_twins
from gia_jax.attacks.rank_analysis import LayerRank, counted_ranks, rank_analysis
from gia_jax.models import Convolution, FullyConnected, Network, Residual, cnn6

THREAT = ThreatModel()
RECOVERED = 60  # dB


def victims(count: int) -> tuple[data.ImageData, np.ndarray]:
    """The first test images by id, in the model's space, float64."""
    images = data.load("cifar10", limit=count)
    return images, images.normalize(images.images.astype(np.float64))


def observed(network: Network, params: Any, x: jax.Array, label: Any) -> Observation:
    client_fn = clients.federated_sgd(clients.binary_cross_entropy(network.apply))
    return observe(jax.random.key(0), THREAT, client_fn, params, Batch(x[None], jnp.asarray(label)[None]))


def initial(network: Network, seed: int, shape: tuple[int, ...] = (32, 32, 3)) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), network.init(jax.random.key(seed), shape))


def psnr(found: Any, truth: Any, images: data.ImageData) -> float:
    """Of pixels in [0, 1], not clipped."""
    error = (np.asarray(found) - np.asarray(truth)) * np.asarray(images.std)
    return float(-10 * np.log10(np.mean(np.square(error))))


def attack_fn(network: Network, images: data.ImageData) -> Callable[[Any, Any, Any], Twins]:
    """From parameters, an image and its label to what the attack makes of the gradient."""
    twins_fn = r_gap_twins(network, bounds=images.bounds())
    return jax.jit(lambda params, x, label: twins_fn(observed(network, params, x, label)))


def rounded(observation: Observation) -> Observation:
    """As sent in float32."""
    update = jax.tree.map(lambda leaf: leaf.astype(jnp.float32).astype(jnp.float64), observation.update)
    return observation._replace(update=update)


def summary(values: Sequence[float]) -> str:
    return f"{np.median(values):.1f} ({np.min(values):.1f} - {np.max(values):.1f})" if len(values) else "-"


def run_cnn6(count: int, seed: int, minutes: float) -> None:
    images, inputs = victims(count)
    network = cnn6()
    params = initial(network, seed)
    attack = jax.jit(r_gap_twins(network, bounds=images.bounds()))
    observe_fn = jax.jit(lambda params, x, label: observed(network, params, x, label))
    attack(observe_fn(params, inputs[0], 0))  # compiled outside the timing
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for i, x in enumerate(inputs):
        if time.perf_counter() - begin > 60 * minutes:
            break
        label = int(images.labels[i] >= 5)
        exact = observe_fn(params, x, label)
        for precision, observation in (("float64", exact), ("float32", rounded(exact))):
            start = time.perf_counter()
            twins = jax.block_until_ready(attack(observation))
            seconds = time.perf_counter() - start
            margin = float((2 * label - 1) * network.apply(params, x[None])[0, 0])
            row = {"image": images.ids[i], "gradient": precision, "margin": f"{margin:.5f}"}
            row |= {"psnr_db": f"{psnr(twins.inputs[twins.chosen], x, images):.1f}"}
            row |= {"label_right": bool(twins.label == label), "ambiguous": bool(twins.is_ambiguous)}
            rows.append(row | {"seconds": f"{seconds:.2f}"})
        print(i, rows[-2]["psnr_db"], rows[-1]["psnr_db"], rows[-1]["seconds"], flush=True)
    done = len(rows) // 2
    record.write("cnn6_images", f"R-GAP on CNN6, {done} images of CIFAR-10, one by one", rows)
    table = []
    for precision in ("float64", "float32"):
        mine = [row for row in rows if row["gradient"] == precision]
        scores = [float(row["psnr_db"]) for row in mine]
        table.append(
            {
                "gradient": precision,
                "images": len(mine),
                "PSNR dB, median (min - max)": summary(scores),
                "label right": f"{np.mean([row['label_right'] for row in mine]):.2f}",
                "ambiguous": sum(row["ambiguous"] for row in mine),
                "seconds, median (min - max)": summary([float(row["seconds"]) for row in mine]),
            }
        )
    margins = [float(row["margin"]) for row in rows]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    record.write(
        "cnn6",
        f"R-GAP on CNN6 with one output, CIFAR-10, the first {done} test images by id",
        table,
        f"Label 1 for classes 5 to 9; it is not told to the attack. Default initialisation, seed {seed}; the client "
        "computes in float64, 'float32' is its gradient rounded before it is sent. "
        f"Margins y z from {min(margins):.4f} to {max(margins):.4f}. PSNR of the chosen twin, not clipped. "
        f"Peak memory of the whole process {peak:.2f} GiB. Threat model: {THREAT.describe()}, range of pixels.",
    )


BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.1, 1.2, 1.25, 1.31, 1.4, 1.5, 1.6, 2.0, 3.0, 5.0)


def run_twins(count: int, seed: int) -> None:
    """The head is scaled so that an image has a margin drawn from its bin."""
    images, inputs = victims(count)
    network = Network((FullyConnected("dense0", 64), FullyConnected("dense1", 64)), FullyConnected("head", 1))
    params = initial(network, seed)
    rng = np.random.default_rng(seed)

    attack = attack_fn(network, images)
    logit_fn = jax.jit(lambda x: network.apply(params, x[None])[0, 0])

    rows, outside = [], []
    for low, high in itertools.pairwise(BINS):
        right, ambiguous, scores, best = [], [], [], []
        for x, margin in zip(inputs, rng.uniform(low, high, count), strict=True):
            logit = logit_fn(x)
            head = {"kernel": params["head"]["kernel"] * margin / abs(logit)}
            twins = attack(params | {"head": head}, x, int(logit > 0))
            right.append(int(np.argmin(np.abs(twins.margins - margin))) == twins.chosen)
            ambiguous.append(bool(twins.is_ambiguous))
            scores.append(psnr(twins.inputs[twins.chosen], x, images))
            best.append(max(psnr(twin, x, images) for twin in twins.inputs))
        rows.append(
            {
                "margin": f"{low:g} to {high:g}",
                "images": count,
                "box rule right": f"{np.mean(right):.3f}",
                "marked ambiguous": f"{np.mean(ambiguous):.3f}",
                "PSNR dB of the chosen, median (min - max)": summary(scores),
                "of the better twin": summary(best),
            }
        )
        outside += right if high <= 1 or low >= 1.6 else []
        print(rows[-1], flush=True)
    record.write(
        "twins",
        "Which of R-GAP's twins is the image: the box rule against the margin",
        rows,
        "Dense network 3072-64-64-1 without biases (a convolutional one differs only in how each layer is inverted). "
        "The head is scaled so that the image has a margin mu = y z drawn uniformly from the bin; all are predicted "
        f"right. For margins in (0, 1) or above 1.6 the rule is right for {np.mean(outside):.4f} of {len(outside)} "
        "attacks. The turning point is 1.2785. 'Ambiguous': both twins stay in the box; above the turning point the "
        f"smaller twin nearly always does. CIFAR-10, the first {count} test images; seed {seed}.",
    )


def small(*features: int) -> Network:
    """Five convolutions for 16x16 images: 9x9 pixels after the first, 5x5 after the fourth."""
    geometry = ((4, 2, 2), (3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1))
    convolutions = (Convolution(f"conv{i}", features[i], *geometry[i]) for i in range(5))
    return Network(tuple(convolutions), FullyConnected("head", 1))


def near_threshold(channels: int, features: int, stride: int) -> Network:
    """A second convolution whose constraints, by count, are within 2 % of its 81 * channels unknowns."""
    first, last = Convolution("conv0", channels, 4, 2, 2), Convolution("conv2", 16, 3, 1, 1)
    return Network((first, Convolution("conv1", features, 3, stride, 1), last), FullyConnected("head", 1))


def residual(features: int, middle: int, stride: int, *, projects: bool) -> Network:
    """A convolution and one residual block."""
    first, second = Convolution("first", middle, 3, stride, 1), Convolution("second", features, 3, 1, 1)
    shortcut = Convolution("shortcut", features, 1, stride) if projects else None
    stem = Convolution("conv0", features if not projects else 12, 4, 2, 2)
    return Network((stem, Residual(first, second, shortcut)), FullyConnected("head", 1))


# Chosen by their counts, before any was run: name, network, height and width of the image.
ARCHITECTURES = (
    ("CNN6", cnn6(), 32),
    ("CNN6-d", cnn6(features=(12, 20, 36, 36, 64, 128)), 32),
    ("small", small(12, 16, 16, 16, 16), 16),
    ("small, 4 filters in conv0", small(4, 16, 16, 16, 16), 16),
    ("small, 3 filters in conv1", small(12, 3, 16, 16, 16), 16),
    ("small, 3 filters in conv2", small(12, 16, 3, 16, 16), 16),
    ("small, 4 filters in conv3", small(12, 16, 16, 4, 16), 16),
    ("small, 2 filters in conv4", small(12, 16, 16, 16, 2), 16),
    (
        "threshold -1.6 % in conv0",
        Network((Convolution("conv0", 8, 3, 2, 1), Convolution("conv1", 16, 3, 1, 1)), FullyConnected("head", 1)),
        15,
    ),
    ("threshold +0.9 % in conv1", near_threshold(14, 8, 2), 16),
    ("threshold +1.4 % in conv1", near_threshold(16, 6, 1), 16),
    ("threshold -0.6 % in conv1", near_threshold(16, 8, 2), 16),
    ("threshold -1.8 % in conv1", near_threshold(18, 8, 2), 16),
    ("dense", Network((FullyConnected("dense0", 32), FullyConnected("dense1", 8)), FullyConnected("head", 1)), 16),
    ("identity block", residual(12, 12, 1, projects=False), 16),
    ("identity block, 8 filters", residual(8, 8, 1, projects=False), 16),
    ("projection block", residual(16, 16, 2, projects=True), 16),
    ("projection block, 2 filters", residual(2, 16, 2, projects=True), 16),
)


def rank_row(name: str, network: Network, size: int, count: int, seed: int) -> dict[str, Any]:
    """What the analysis predicts for central crops of `size` pixels, and what the attack finds."""
    images, inputs = victims(count)
    margin = (32 - size) // 2
    crops = inputs[:, margin : margin + size, margin : margin + size]
    shape = crops.shape[1:]
    params = initial(network, seed, shape)
    start = time.perf_counter()
    ranks = rank_analysis(network, params, shape, key=jax.random.key(seed))
    seconds = time.perf_counter() - start
    attack = attack_fn(network, images)
    found = [attack(params, x, int(label >= 5)) for x, label in zip(crops, images.labels, strict=True)]
    scores = [psnr(twins.inputs[twins.chosen], x, images) for twins, x in zip(found, crops, strict=True)]
    is_short = any(layer.rank < layer.unknowns for layer in ranks)
    return {
        "architecture": name,
        "counted": bottleneck(counted_ranks(network, shape)),
        "rank": bottleneck(ranks),
        "PSNR dB, median (min - max)": summary(scores),
        "agrees": max(scores) < RECOVERED if is_short else min(scores) >= RECOVERED,
        "seconds of the analysis": f"{seconds:.1f}",
    }


def bottleneck(ranks: Sequence[LayerRank]) -> str:
    """The first layer from the output that has too few constraints."""
    short = [f"{layer.name}: {layer.rank} of {layer.unknowns}" for layer in ranks if layer.rank < layer.unknowns]
    return short[0] if short else "passes"


def run_ranks(count: int, seed: int) -> None:
    rows = []
    for name, network, size in ARCHITECTURES:
        rows.append(rank_row(name, network, size, count, seed))
        print(rows[-1], flush=True)
    write_ranks(rows, count, seed)


def write_ranks(rows: Sequence[dict[str, Any]], count: int, seed: int) -> None:
    record.write(
        "ranks",
        "Rank analysis before the attack against what R-GAP recovers",
        rows,
        f"{sum(row['agrees'] for row in rows)} of {len(rows)} agree: recovered means {RECOVERED} dB or more, for all "
        f"of {count} images of CIFAR-10 (central crops) where the analysis passes and for none where it does not. The "
        "column names the bottleneck, the first layer from the output that has too few independent constraints. "
        f"Bias-free networks with one output, default initialisation, seed {seed}; float64.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cnn6", "twins", "ranks"))
    parser.add_argument("--images", type=int, help="default: 100, 500 and 3")
    parser.add_argument("--seed", type=int, default=0, help="of the networks")
    parser.add_argument("--minutes", type=float, default=60, help="cnn6 takes no further image after these")
    args = parser.parse_args()
    if args.what == "cnn6":
        run_cnn6(args.images or 100, args.seed, args.minutes)
    elif args.what == "twins":
        run_twins(args.images or 500, args.seed)
    else:
        run_ranks(args.images or 3, args.seed)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
