"""CAFE on MNIST and CIFAR-10: four workers hold a quarter of every image, the server knows the batches' records.

    python benchmarks/cafe.py exact [--data mnist cifar10]    steps I and II as a linear system, over T, B and the rate
    python benchmarks/cafe.py beside [--steps N]              the paper's descent, DLG, convolutions, fake gradients

Needs the extra `data`, and both sets prepared by TFDS (GIA_JAX_DATA_DIR).
"""

import argparse
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from jaxtyping import Array

from gia_jax import Batch, Observation, ThreatModel, attacks, clients, data, defenses, keep_best, observe, run
from gia_jax.attacks.cafe import (
    BATCH_SIZE,
    NUM_RECORDS,
    NUM_ROUNDS,
    batch_rank,
    feature_matching,
    pseudo_inverse,
    selection_matrix,
)
from gia_jax.base import Params
from gia_jax.cli.federation import NUM_WORKERS, OUTPUTS, THREAT, WIDTH, apply, first_layers, fully_connected, worker
from gia_jax.data import ImageData
from gia_jax.labels import dense
from gia_jax.metrics import image_scores, label_overlap
from gia_jax.metrics.images import as_pixels
from gia_jax.models.layers import max_pool

FAKE_SCALE = 1e-2
ROUNDS, BATCHES, RATES = (0.25, 0.5, 0.9, 1.0, 1.5), (8, 40, 200, NUM_RECORDS), (0.0, 1e-6, 1e-4, 1e-2)
LOSS = clients.cross_entropy(apply)


def parameters(features: int) -> Params:
    """Weights U(-1, 1) / sqrt(inputs of the layer), from seed 0: the draws that the committed figures have."""
    rng = np.random.default_rng(0)

    def layer(d: int, r: int) -> Params:
        limit = d**-0.5
        return {
            "kernel": jnp.asarray(rng.uniform(-limit, limit, (d, r)), jnp.float32),
            "bias": jnp.asarray(rng.uniform(-limit, limit, r), jnp.float32),
        }

    workers = [{"first": layer(features, WIDTH), "last": layer(WIDTH, OUTPUTS)} for _ in range(NUM_WORKERS)]
    return {"workers": workers, "server": layer(NUM_WORKERS * OUTPUTS, 10)}


CAFE = attacks.cafe(first_layers, dense("server"), split_fn=clients.quadrants)


class Victim(NamedTuple):
    """The records of a federation, its model before training, and what single records would have shared."""

    images: ImageData
    records: Batch
    params: Params
    gradients: list[Array]  # V of every worker


@functools.cache
def victim(name: str) -> Victim:
    images = data.load(name, limit=NUM_RECORDS)
    records = Batch(jnp.asarray(images.normalize(images.images)), jnp.asarray(images.labels))
    params = parameters(records.inputs[0].size // 4)
    singles = jax.jit(clients.per_example(LOSS))(params, records)
    return Victim(images, records, params, [layer.bias for layer in first_layers(singles)])


def batches(rounds: int, size: int, records: int = NUM_RECORDS) -> np.ndarray:
    """Independent batches, as the paper's code draws them."""
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(records, size, replace=False) for _ in range(rounds)])


def scores(who: Victim, inputs: Array, labels: Array) -> dict[str, str]:
    """PSNR of every image at its own place (batch indices tell the order), and the share of right labels."""
    pixels = as_pixels(who.images.denormalize(np.nan_to_num(np.asarray(inputs), nan=0, posinf=1e9, neginf=-1e9)))
    psnr = -10 * np.log10(np.mean(np.square(pixels - who.images.images), (1, 2, 3)))
    share = np.mean(np.asarray(labels) == who.images.labels)
    return {"PSNR mean (dB)": f"{psnr.mean():.2f}", "PSNR least": f"{psnr.min():.2f}", "labels": f"{share:.1%}"}


def observed(who: Victim, indices: np.ndarray, **options: Any) -> Observation:
    client_fn = jax.jit(clients.vertical_sgd(LOSS, indices, **options))
    return observe(jax.random.key(0), THREAT, client_fn, who.params, who.records, batch_indices=indices)


def relative(found: list[Array], true: list[Array]) -> str:
    missed = optax.tree.norm(optax.tree.sub(found, true)) / optax.tree.norm(true)
    return f"{float(missed):.1e}"


def exact_row(name: str, share: float, size: int, rate: float) -> dict[str, Any]:
    who, indices = victim(name), batches(round(share * NUM_RECORDS), size)
    observation = observed(who, indices, learning_rate=rate)
    found = jax.jit(CAFE)(jax.random.key(0), observation)  # in a trace nothing is refused: what would it have given?
    inverse, _ = jax.jit(pseudo_inverse)(selection_matrix(jnp.asarray(indices), NUM_RECORDS))
    gradients = [size * inverse @ layer.bias for layer in first_layers(observation.update)]
    rank = batch_rank(indices, NUM_RECORDS)
    row = {
        "data": name,
        "T / N": share,
        "B": size,
        "learning rate": f"{rate:g}",
        "rank": rank,
        "identified": "yes" if rank == NUM_RECORDS else "refused",
        "V relative error": relative(gradients, who.gradients),
        "H relative error": relative([found.batch.inputs], [who.records.inputs]),
        **scores(who, found.batch.inputs, found.batch.labels),
        "loss": f"{float(found.loss):.1e}",
    }
    print(row, flush=True)
    return row


def exact(args: argparse.Namespace) -> None:
    settings = [(share, BATCH_SIZE, 0.0) for share in ROUNDS]
    settings += [(1.5, size, 0.0) for size in BATCHES if size != BATCH_SIZE]
    settings += [(1.5, BATCH_SIZE, rate) for rate in RATES[1:]]
    rows = [exact_row(name, *setting) for name in args.data for setting in settings]
    record.write(
        "exact",
        f"CAFE with exact steps: {NUM_RECORDS} records, 4 workers, float32",
        rows,
        f"The first {NUM_RECORDS} test images, a quarter of every image at each worker; a worker is a fully connected "
        f"layer of {WIDTH} ReLU and one of 10 outputs, the server one of 10 logits; untrained, one draw of batches. "
        "H is then the image itself (step III is closed), and its error is taken over all records. Errors are "
        "relative, in Frobenius norm. 'refused': the batches' rank is below the number of records and the attack "
        "raises ValueError; the figures of such rows are what the least-norm solution would give. Every image is "
        "scored at its own place. 'learning rate': of SGD between rounds; the attack takes the model as frozen. "
        f"Threat model: {THREAT.describe()}.",
    )


def slices(params: Params, inputs: Array) -> list[Array]:
    del params
    return [part.reshape(len(part), -1) for part in clients.quadrants(inputs)]


def convolve(kernel: Array, inputs: Array) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", dimension_numbers=layout)


def convolutional_features(params: Params, part: Array) -> Array:
    """Two 5x5 convolutions with ReLU, each followed by a maximum over squares of two."""
    for kernel in (params["conv1"], params["conv2"]):
        part = max_pool(jax.nn.relu(convolve(kernel, part)), 2)
    return part.reshape(len(part), -1)


def convolutional_parameters(count: int) -> Params:
    """The network of `parameters` with 8 and 32 filters before each worker's first fully connected layer."""
    rng = np.random.default_rng(1)
    params = parameters(count)

    def kernel(d: int, r: int) -> Array:
        return jnp.asarray(rng.normal(size=(5, 5, d, r)) * (2 / (25 * d)) ** 0.5, jnp.float32)

    filters = [{"conv1": kernel(1, 8), "conv2": kernel(8, 32)} for _ in range(4)]
    workers = [part | own for part, own in zip(params["workers"], filters, strict=True)]
    return {**params, "workers": workers}


def convolutional(records: int, steps: int, *, gradients: bool) -> dict[str, str]:
    """Step III by descent, from features behind convolutions and maxima, with or without the records' gradients."""

    def features_fn(params: Params, inputs: Array) -> list[Array]:
        parts = zip(params["workers"], clients.quadrants(inputs), strict=True)
        return [convolutional_features(own, part) for own, part in parts]

    full = victim("mnist")
    images = full.images._replace(images=full.images.images[:records], labels=full.images.labels[:records])
    who = Victim(images, jax.tree.map(lambda leaf: leaf[:records], full.records), convolutional_parameters(32 * 9), [])
    loss_fn = clients.cross_entropy(
        clients.vertical_model(
            clients.quadrants,
            lambda params, part: worker(params, convolutional_features(params, part)),
            fully_connected,
        )
    )
    indices = batches(records * 3 // 2, BATCH_SIZE, records)
    client_fn = jax.jit(clients.vertical_sgd(loss_fn, indices))
    observation = observe(jax.random.key(0), THREAT, client_fn, who.params, who.records, batch_indices=indices)
    invert_fn = feature_matching(
        features_fn,
        bounds=images.bounds(),
        client_fn=clients.per_example(loss_fn) if gradients else None,
        num_steps=steps,
        total_variation_weight=1e-4,
    )
    attack = attacks.cafe(first_layers, dense("server"), split_fn=clients.quadrants, invert_fn=invert_fn)
    found = jax.jit(attack)(jax.random.key(0), observation)
    return scores(who, found.batch.inputs, found.batch.labels)


def descent(who: Victim, observation: Observation, steps: int) -> dict[str, str]:
    client_fn = clients.federated_sgd(LOSS)
    attack = attacks.cafe_descent(client_fn, layers_fn=first_layers, features_fn=slices, num_classes=10)
    found = jax.jit(lambda o: run(attack, jax.random.key(0), o, num_steps=steps)[0])(observation)
    return scores(who, found.batch.inputs, found.batch.labels.argmax(-1))


def dlg(who: Victim, size: int, steps: int) -> dict[str, str]:
    """One round alone; the order of its images is unknown, so they are assigned."""
    client_fn = clients.federated_sgd(LOSS)
    chosen = batches(1, size)[0]
    batch = jax.tree.map(lambda leaf: leaf[chosen], who.records)
    observation = observe(jax.random.key(0), ThreatModel(), client_fn, who.params, batch)
    attack = keep_best(attacks.dlg(client_fn, num_classes=10))
    found = jax.jit(lambda o: run(attack, jax.random.key(0), o, num_steps=steps)[0])(observation)
    pixels = as_pixels(who.images.denormalize(np.asarray(found.batch.inputs)))
    psnr = np.asarray(image_scores(pixels, who.images.images[chosen]).psnr)
    share = float(label_overlap(found.batch.labels.argmax(-1), batch.labels))
    return {"PSNR mean (dB)": f"{psnr.mean():.2f}", "PSNR least": f"{psnr.min():.2f}", "labels": f"{share:.1%}"}


def beside(args: argparse.Namespace) -> None:
    who, indices = victim("mnist"), batches(NUM_ROUNDS, BATCH_SIZE)

    def against_fake_gradients() -> dict[str, str]:
        defense = defenses.fake_gradients(jax.random.key(0), FAKE_SCALE, count=1)
        found = jax.jit(CAFE)(jax.random.key(0), observed(who, indices, transformation=defense))
        return scores(who, found.batch.inputs, found.batch.labels)

    cases = {
        f"CAFE, the paper's descent, {args.steps} steps": (
            NUM_RECORDS,
            lambda: descent(who, observed(who, indices), args.steps),
        ),
        f"DLG, one round, {args.dlg_steps} steps": (BATCH_SIZE, lambda: dlg(who, BATCH_SIZE, args.dlg_steps)),
        "DLG, one round of one image": (1, lambda: dlg(who, 1, args.dlg_steps)),
        "CAFE, exact steps, against fake gradients": (NUM_RECORDS, against_fake_gradients),
    }
    for gradients in (False, True):
        matched = "features and gradients" if gradients else "features alone"
        cases[f"CAFE, exact steps, step III of {args.inversion_steps} steps behind convolutions, {matched}"] = (
            args.records,
            functools.partial(convolutional, args.records, args.inversion_steps, gradients=gradients),
        )
    grey = who.images.normalize(np.full_like(who.images.images, 0.5))
    cases["a grey image and the first label"] = NUM_RECORDS, lambda: scores(who, grey, np.zeros(NUM_RECORDS))
    cases = {name: case for name, case in cases.items() if args.cases in name}
    rows = []
    for name, (count, solve) in cases.items():
        rows.append({"attack": name, "images": count, **solve()})
        print(rows[-1], flush=True)
    record.write(
        "beside" + ("_" + args.cases.replace(" ", "_") if args.cases else ""),
        f"CAFE beside others: MNIST, batches of {BATCH_SIZE}, rounds 1.5 times the records, frozen model",
        rows,
        f"Data and model as in the table `exact`. DLG sees the first round alone, and its images are assigned. Fake: "
        f"`fake_gradients(key, {FAKE_SCALE}, count=1)`. Behind convolutions: a worker has 5x5 convolutions of 8 and 32 "
        "filters, each with ReLU and a maximum over squares of two, before its first fully connected layer; total "
        f"variation weighs 1e-4. Threat model of CAFE: {THREAT.describe()}; of DLG: {ThreatModel().describe()}.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("exact")
    command.add_argument("--data", nargs="+", choices=("mnist", "cifar10"), default=("mnist", "cifar10"))
    command.set_defaults(run=exact)
    command = commands.add_parser("beside")
    command.add_argument("--steps", type=int, default=20_000, help="of the paper's descent")
    command.add_argument("--dlg-steps", type=int, default=300, help="of DLG")
    command.add_argument("--inversion-steps", type=int, default=1_000, help="of step III")
    command.add_argument("--cases", default="", help="only those whose name has this in it, to a file of its own")
    command.add_argument("--records", type=int, default=80, help="of the federation with convolutions")
    command.set_defaults(run=beside)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
