"""MixUp and InstaHide undone: from encodings of several epochs, exact, noisy or inverted, back to CIFAR-10 images.

    python benchmarks/decoding.py [PART ...] [--seeds N] [--steps N] [--sizes N ...] [--public N]

Needs the extra `data` and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). Victims are the first test images by id; public
images are training images.
"""

import argparse
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
from flax import nnx
from parts import run_parts

from gia_jax import Batch, ThreatModel, clients, data, decoding, defenses, labels, models, observe
from gia_jax.attacks import idlg
from gia_jax.defenses.mixing import Mixing, draw_coefficients
from gia_jax.sweep.study import study
from gia_jax.threat import granted_labels

HIGH = 0.65
CLASSES = 10
SIZES = [10, 20, 50]  # images of the private set in the part `mapping`


class Images(NamedTuple):
    """Images in the model's space, and what belongs to that space."""

    inputs: jax.Array
    labels: jax.Array
    std: np.ndarray
    bounds: tuple[Any, Any]


@functools.cache
def images_of(number: int, split: str = "test", dtype: str = "float32") -> Images:
    found = data.load("cifar10", split=split, limit=number)
    low, high = found.bounds()
    inputs = jnp.asarray(found.normalize(found.images.astype(dtype)))
    return Images(inputs, jnp.asarray(found.labels), np.asarray(found.std), (low, high))


def draw_epochs(seed: int, epochs: int, size: int, k: int) -> Mixing:
    keys = jax.random.split(jax.random.key(seed), epochs)
    return jax.vmap(lambda key: defenses.draw_mixing(key, size, k=k, high=HIGH))(keys)


def encode(mixing: Mixing, inputs: jax.Array, *, hide: bool = False) -> jax.Array:
    clear = jax.vmap(lambda one: defenses.mix(one, inputs))(mixing)
    return clear * jax.random.rademacher(jax.random.key(99), clear.shape, clear.dtype) if hide else clear


def pixel_mse(found: jax.Array, truth: jax.Array, std: np.ndarray) -> np.ndarray:
    """One an image, of pixels in [0, 1], unclipped."""
    return np.mean(np.square((np.asarray(found) - np.asarray(truth)) * std), (-3, -2, -1)).ravel()


def decibels(mse: Any) -> float:
    return float(-10 * np.log10(np.mean(mse)))


def mixup(args: argparse.Namespace) -> None:
    with jax.enable_x64(True):
        size, k, images = 50, 4, images_of(50, dtype="float64")
        rows = []
        for epochs in (1, 2, 5, 20):
            for seed in range(args.seeds):
                mixing = draw_epochs(seed, epochs, size, k)
                matrix = decoding.mixing_matrix(mixing, size)
                exact = encode(mixing, images.inputs)
                noise = 0.01 / images.std * jax.random.normal(jax.random.key(7), exact.shape)
                noise_mse = pixel_mse(noise, 0 * noise, images.std).mean()
                gain = float(decoding.noise_gain(matrix))
                row = {"T": epochs, "seed": seed, "rank": int(np.linalg.matrix_rank(np.asarray(matrix)))}
                row["error gain (dB)"] = f"{10 * np.log10(gain):.1f}"
                for name, encodings in (("exact", exact), ("noisy", exact + noise)):
                    found = decoding.decode_mixup(mixing, encodings, size)
                    row[f"{name}: PSNR"] = f"{decibels(pixel_mse(found, images.inputs, images.std)):.2f}"
                row["noisy: predicted"] = f"{float(decoding.predicted_psnr(noise_mse, matrix)):.2f}"
                rows.append(row)
    record.write(
        "mixup",
        "MixUp decoded by least squares, N=50, k=4, mixing known, float64",
        rows,
        "PSNR in dB of the mean squared error over all images, pixels in [0, 1], not clipped. Noise is white, 0.01 of "
        "the range (40 dB on the encodings). N is a closed set: the images mix only with each other.",
    )


def aligned(found: jax.Array, truth: jax.Array) -> jax.Array:
    """An oracle: every pixel with the sign that the truth has."""
    return found * jnp.where(jnp.sum(found * truth, 0) < 0, -1, 1)


def instahide(args: argparse.Namespace) -> None:
    rows = []
    for size, k, epochs in ((20, 4, 5), (50, 4, 5), (50, 4, 10), (50, 4, 20), (50, 2, 20)):
        images, mixing = images_of(size), draw_epochs(0, epochs, size, k)
        encodings = encode(mixing, images.inputs, hide=True)
        began = time.perf_counter()
        result = decoding.decode_instahide(jax.random.key(1), mixing, encodings, size, bounds=images.bounds)
        seconds = time.perf_counter() - began
        # The same solutions with no synchronisation: the sign of every pixel is a coin.
        coins = jax.random.rademacher(jax.random.key(3), images.inputs.shape[1:], jnp.float32)
        scores = {
            "no synchronisation": result.images * coins,
            "PSNR": result.images,
            "ORACLE signs": aligned(result.images, images.inputs),
        }
        psnr = {name: -10 * np.log10(pixel_mse(x, images.inputs, images.std)) for name, x in scores.items()}
        wrong = jnp.sum(result.images * images.inputs, 0) < 0
        rows.append(
            {"N": size, "k": k, "T": epochs, "pixels solved": f"{float(result.solved.mean()):.2%}"}
            | {name: f"{value.mean():.1f}" for name, value in psnr.items()}
            | {"worst image": f"{psnr['PSNR'].min():.1f}", "signs wrong": f"{float(wrong.mean()):.2%}"}
            | {"seconds": f"{seconds:.0f}"}
        )
    record.write(
        "instahide",
        "InstaHide decoded from exact encodings with a known mapping, intra-dataset, float32",
        rows,
        "Mean over images of the PSNR in dB, pixels in [0, 1], not clipped. Solved: relative residual of |E| = |M X| "
        "at most 1e-3, at most 20 restarts of 100 reflections. Signs come from the decoder alone (spanning tree over "
        "neighbours, last sign from the pixel box); 'ORACLE signs' takes them from the truth and is no attack.",
    )


def plain(_: argparse.Namespace) -> None:
    """The ablation: alternating projections against reflections."""
    size, k = 50, 4
    images, rows = images_of(size), []
    columns = images.inputs.reshape(size, -1)[:, ::12]
    for epochs in (5, 10, 20):
        matrix = decoding.mixing_matrix(draw_epochs(0, epochs, size, k), size)
        q, _r = jnp.linalg.qr(matrix)
        sizes = jnp.abs(matrix @ columns)

        @jax.jit
        def alternate(key: jax.Array, matrix: jax.Array = matrix, q: jax.Array = q, sizes: jax.Array = sizes):
            z = matrix @ jax.random.normal(key, columns.shape)
            step = lambda z, _: (q @ (q.T @ jnp.where(z < 0, -sizes, sizes)), None)  # noqa: E731
            z, _ = jax.lax.scan(step, z, length=110)
            return jnp.linalg.norm(jnp.abs(z) - sizes, axis=0) / jnp.linalg.norm(sizes, axis=0)

        least = jnp.min(jnp.stack([alternate(key) for key in jax.random.split(jax.random.key(0), 20)]), 0)
        _, residuals = decoding.retrieve(jax.random.key(0), matrix, sizes)
        _, single = decoding.retrieve(jax.random.key(0), matrix, sizes, num_restarts=1)
        names = ("alternating projections, 20 restarts", "reflections, 1 restart", "reflections, 20 restarts")
        shares = (float(jnp.mean(r <= 1e-3)) for r in (least, single, residuals))
        rows.append({"T": epochs} | {name: f"{share:.1%}" for name, share in zip(names, shares)})
    record.write(
        "retrieval",
        "Pixels solved up to sign by algorithm, N=50, k=4, every twelfth pixel and channel",
        rows,
        "110 steps a restart in all columns.",
    )


def inverted(args: argparse.Namespace) -> None:
    size, k, epochs = 8, 2, 8
    images, rows = images_of(size), []
    apply_fn, params = models.functional(models.MODELS["lenet"]((32, 32, 3), CLASSES, rngs=nnx.Rngs(0)))
    client_fn, threat = clients.federated_sgd(clients.cross_entropy(apply_fn)), ThreatModel(labels=True)
    attack = idlg(client_fn, labels.dense("head"), label_fn=granted_labels)
    mixing = draw_epochs(0, epochs, size, k)
    matrix = decoding.mixing_matrix(mixing, size)
    soft = matrix @ jax.nn.one_hot(images.labels, CLASSES)
    for name in ("mixup", "instahide"):
        truth = encode(mixing, images.inputs, hide=name == "instahide").reshape(-1, 1, 32, 32, 3)
        victims = Batch(truth, soft[:, None])
        keys = jax.random.split(jax.random.key(4), len(truth))
        one = lambda key, batch: observe(key, threat, client_fn, params, batch, num_classes=CLASSES)  # noqa: E731
        observations = jax.jit(jax.vmap(one))(keys, victims)._replace(params=params)
        outcome = study(attack, jax.random.key(5), observations, num_steps=args.steps, lanes=16)
        found = jnp.clip(jnp.nan_to_num(jnp.asarray(outcome.reconstruction.batch.inputs)), -2.2, 2.2)
        # Trust from what the attacker sees: the loss of its own inversion.
        losses = jnp.asarray(outcome.reconstruction.loss).reshape(epochs, size)
        weights = 1 / (jnp.nan_to_num(losses, nan=1e3, posinf=1e3) + jnp.median(losses))
        encoding_mse = pixel_mse(found, truth, images.std)
        encodings = found.reshape(epochs, size, 32, 32, 3)
        shared = {
            "defense": name,
            "encodings, PSNR of mean": f"{decibels(encoding_mse):.1f}",
            "median": f"{np.median(-10 * np.log10(encoding_mse)):.1f}",
            "worst": f"{decibels(encoding_mse.max()):.1f}",
            "predicted": f"{float(decoding.predicted_psnr(encoding_mse.mean(), matrix)):.1f}",
        }
        for trusted in (False, True):
            if name == "mixup":
                root = jnp.sqrt(weights)[..., None]
                weighted = mixing._replace(coefficients=root * mixing.coefficients) if trusted else mixing
                scaled = root[..., None, None] * encodings if trusted else encodings
                decoded, oracle = decoding.decode_mixup(weighted, scaled, size), None
            else:
                decoded = decoding.decode_instahide(
                    jax.random.key(1),
                    mixing,
                    encodings,
                    size,
                    bounds=images.bounds,
                    num_restarts=10,
                    weights=weights if trusted else None,
                ).images
                oracle = aligned(decoded, images.inputs)
            rows.append(
                shared
                | {"weights": "by attack loss" if trusted else "none"}
                | {"decoded": f"{decibels(pixel_mse(decoded, images.inputs, images.std)):.1f}"}
                | {"ORACLE": "-" if oracle is None else f"{decibels(pixel_mse(oracle, images.inputs, images.std)):.1f}"}
            )
    record.write(
        "inverted",
        f"Encodings inverted from gradients of an untrained LeNet, then decoded: N={size}, k={k}, T={epochs}",
        rows,
        f"iDLG, {args.steps} steps of L-BFGS, one restart, batch of one encoding, soft labels granted, mixing known. "
        "PSNR in dB of the mean squared error, pixels in [0, 1]. 'predicted' is the mean error of the encodings times "
        "the noise gain: it takes errors for equal and uncorrelated, and for InstaHide all signs for found. 'ORACLE' "
        "takes the signs of pixels from the truth and is no attack.",
    )


def encoded_pool(seed: int, number: int, k: int, hold: int = 0) -> jax.Array:
    """Encodings of public images, each of its own: training images after the first `hold`."""
    pool = images_of(10_000, "train").inputs[hold:]
    key_sources, key_coefficients = jax.random.split(jax.random.key(seed))
    keys = jax.random.split(key_sources, number)
    sources = jax.vmap(lambda key: jax.random.choice(key, len(pool), (k,), replace=True))(keys)

    coefficients = draw_coefficients(key_coefficients, number, k=k, low=0.0, high=HIGH)
    return sum(coefficients[:, j, None, None, None] * pool[sources[:, j]] for j in range(k))


def mapping(args: argparse.Namespace) -> None:
    rows = []
    for k in (2, 4):
        public = encoded_pool(11, args.public, k, hold=100)
        small = [(10, epochs, seed) for epochs in (10, 40) for seed in range(3)]
        listed = (*small, (20, 20, 0), *((20, 40, seed) for seed in range(3)), (50, 20, 0))
        for size, epochs, seed in [case for case in listed if case[0] in args.sizes]:
            mixing, rehearsal = draw_epochs(seed, epochs, size, k), draw_epochs(seed + 100, epochs, size, k)
            encodings = encode(mixing, images_of(size).inputs, hide=True).reshape(-1, 32, 32, 3)
            own = encode(rehearsal, images_of(10_000, "train").inputs[:size], hide=True).reshape(-1, 32, 32, 3)
            values = np.asarray(decoding.similarity(jnp.concatenate([encodings, own]), public))
            count = len(encodings)
            threshold = decoding.calibrated_threshold(
                jnp.asarray(values[count:, count:]), decoding.same_source(decoding.mixing_matrix(rehearsal, size))
            )
            values = jnp.asarray(values[:count, :count])
            matrix = decoding.mixing_matrix(mixing, size)
            truth = decoding.same_source(matrix)
            overlap = jnp.square(matrix) @ jnp.square(matrix).T
            clusters = decoding.recover_mixing(jax.random.key(2), values, size, k=k, num_steps=500)
            by_cluster = decoding.same_source(decoding.mixing_matrix(clusters, size))
            found = values >= threshold
            precision, recall = decoding.precision_recall(found, truth)
            _, strong = decoding.precision_recall(found, overlap >= 0.2**4)
            _, strongest = decoding.precision_recall(found, overlap >= 0.4**4)
            cluster_precision, cluster_recall = decoding.precision_recall(by_cluster, truth)
            refined = decoding.refine_mixing(jax.random.key(3), clusters, encodings, size)
            refined_precision, refined_recall = decoding.precision_recall(
                decoding.same_source(decoding.mixing_matrix(refined, size)), truth
            )
            rows.append(
                {"N": size, "k": k, "T": epochs, "mixing": seed}
                | {"pairs that share": f"{float(np.mean(np.asarray(truth)[np.triu_indices(count, 1)])):.3f}"}
                | {"precision": f"{float(precision):.3f}", "recall": f"{float(recall):.3f}"}
                | {"recall, overlap >= 0.2^4": f"{float(strong):.3f}"}
                | {"recall, overlap >= 0.4^4": f"{float(strongest):.3f}"}
                | {"clusters: precision": f"{float(cluster_precision):.3f}"}
                | {"clusters: recall": f"{float(cluster_recall):.3f}"}
                | {"refined: precision": f"{float(refined_precision):.3f}"}
                | {"refined: recall": f"{float(refined_recall):.3f}"}
            )
            print(rows[-1], flush=True)
    record.write(
        "mapping" + (f"_{'_'.join(map(str, args.sizes))}" if set(args.sizes) != set(SIZES) else ""),
        "Pairs of InstaHide encodings that share an image, from encodings alone",
        rows,
        f"Similarity of squares whitened by {args.public:,} encodings of public training images; the threshold makes "
        "precision equal recall on encodings of other public images with the same N, k, T. Overlap of a pair is the "
        "sum over images of the product of squared coefficients: a pair may share an image with coefficients near 0. "
        "Clusters: symmetric non-negative factorisation, N and k known; refined: `refine_mixing` started from these, "
        "which keeps the round of least residual. Mixing 0 was looked at during development, 1 and 2 were not. "
        "Predicting every pair would have a precision of 'pairs that share'.",
    )


def cross_dataset(args: argparse.Namespace) -> None:
    """Two of four images are public and unknown: report only."""
    size, epochs, k = 50, 20, 4
    images, rows = images_of(size), []
    public = images_of(10_000, "train").inputs
    keys = jax.random.split(jax.random.key(0), epochs)
    whole = jax.vmap(lambda key: defenses.draw_mixing(key, size, k=k, high=HIGH))(keys)
    own = Mixing(whole.sources[..., :2], whole.coefficients[..., :2])
    others = jax.random.randint(jax.random.key(1), (epochs, size, 2), 0, len(public))
    noise = jnp.einsum("tnk,tnk...->tn...", whole.coefficients[..., 2:], public[others])
    for strength in (0.0, 0.1, 1.0):
        clear = jax.vmap(lambda one: defenses.mix(one, images.inputs))(own) + strength * noise
        result = decoding.decode_instahide(jax.random.key(2), own, jnp.abs(clear), size, bounds=images.bounds)
        psnr = [
            -10 * np.log10(pixel_mse(x, images.inputs, images.std))
            for x in (result.images, aligned(result.images, images.inputs), 0 * images.inputs)
        ]
        rows.append(
            {"public images times": strength, "pixels solved": f"{float(result.solved.mean()):.1%}"}
            | {
                "PSNR": f"{psnr[0].mean():.1f}",
                "ORACLE signs": f"{psnr[1].mean():.1f}",
                "grey": f"{psnr[2].mean():.1f}",
            }
        )
    record.write(
        "cross_dataset",
        "Cross-dataset InstaHide, N=50, T=20: two private and two public images an encoding, private mapping known",
        rows,
        "Public images are noise to the decoder; the factor scales them, 0 being the control and 1 "
        "the defense. Mean over images of the PSNR in dB; grey is the mean pixel. Report only: no claim of recovery.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="mixings of the part `mixup`")
    parser.add_argument("--steps", type=int, default=300, help="of the inversion")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=SIZES, help="N of the part `mapping`")
    parser.add_argument("--public", type=int, default=4_000, help="public encodings of the part `mapping`")
    run_parts(parser, mixup, plain, instahide, inverted, mapping, cross_dataset)


if __name__ == "__main__":
    main()
