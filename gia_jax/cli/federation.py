"""The federation of the command line in which workers hold different parts of the same images, and CAFE on it."""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import gia_jax
from gia_jax import _check, attacks, clients, data, modalities, report
from gia_jax.attacks.cafe import BATCH_SIZE, NUM_RECORDS, NUM_ROUNDS, batch_condition, check_identifiable
from gia_jax.base import Batch, Params, Reconstruction
from gia_jax.cli import console, options, tables
from gia_jax.cli.outcomes import Outcome, explained, with_scores
from gia_jax.labels import Dense, dense
from gia_jax.models.layers import fan_in_uniform
from gia_jax.sweep.study import study_analytic
from gia_jax.threat import ThreatModel, observe, stack

NUM_WORKERS, WIDTH, OUTPUTS = 4, 32, 10
THREAT = ThreatModel(batch_indices=True)
OPTIONS = ("data", "records", "rounds", "batch_size")


def parameters(key: PRNGKeyArray, slice_size: int, num_classes: int) -> Params:
    """Draws the parameters of four workers and of a server, in PyTorch's default initialisation.

    Args:
        key: Random key of the draw.
        slice_size: Number of pixels of a slice. A worker has two dense layers, from a slice to ten numbers.
        num_classes: Number of classes. The server has one dense layer, from the numbers of all workers to the logits.

    Returns:
        The parameters, with a list of those of the "workers" and those of the "server".
    """

    def layer(key: PRNGKeyArray, inputs: int, features: int) -> Params:
        key_kernel, key_bias = jax.random.split(key)
        kernel = fan_in_uniform(key_kernel, (inputs, features))
        bias = jax.random.uniform(key_bias, (features,), minval=-(inputs**-0.5), maxval=inputs**-0.5)
        return {"kernel": kernel, "bias": bias}

    def worker(key: PRNGKeyArray) -> Params:
        first, last = jax.random.split(key)
        return {"first": layer(first, slice_size, WIDTH), "last": layer(last, WIDTH, OUTPUTS)}

    *workers, server = jax.random.split(key, NUM_WORKERS + 1)
    return {"workers": [worker(own) for own in workers], "server": layer(server, NUM_WORKERS * OUTPUTS, num_classes)}


def fully_connected(layer: Params, inputs: Float[Array, "b d"]) -> Float[Array, "b f"]:
    """Applies a dense layer of `parameters`, such as the server's."""
    return inputs @ layer["kernel"] + layer["bias"]


def worker(params: Params, part: Array) -> Float[Array, "b f"]:
    """Applies the two layers of a worker, which turn slices of images into the numbers that the server gets."""
    hidden = jax.nn.relu(fully_connected(params["first"], part.reshape(len(part), -1)))
    return fully_connected(params["last"], hidden)


def first_layers(tree: Params) -> list[Dense]:
    """Returns the first layer of every worker, in the parameters or an update."""
    return [Dense(own["first"]["kernel"], own["first"]["bias"]) for own in tree["workers"]]


apply = clients.vertical_model(clients.quadrants, worker, fully_connected)


def cafe_on_federation(
    images: data.ImageData, key: PRNGKeyArray, *, batch_size: int, rounds: int
) -> tuple[Outcome, Batch, float]:
    """Runs CAFE by exact steps on one federation that holds all the images, a quarter of each at every worker.

    Args:
        images: Images of even height and width.
        key: Random key of the parameters, the batches and the attack.
        batch_size: Number of records of a round, at least 1, which are drawn without replacement.
        rounds: Number of rounds of a model that stays as it is, at least 1.

    Returns:
        The outcome with every record as a victim, at its own place, without scores; the records in the model's space,
        inputs of shape (n, 1, h, w, c); and the condition number of the selection matrix, by which rounding errors of
        the updates may grow.

    Raises:
        ValueError: If batches are larger than the data, images have no quarters, or the batches do not identify them.
    """
    count = len(images.labels)
    if batch_size > count:
        raise ValueError(f"batch_size must be at most {count}, got {batch_size}")
    key_params, key_batches, key_threat, key_attack = jax.random.split(key, 4)
    draw = jax.vmap(lambda key: jax.random.choice(key, count, (batch_size,), replace=False))
    indices = np.asarray(draw(jax.random.split(key_batches, rounds)))
    check_identifiable(indices, count)
    records = Batch(jnp.asarray(images.normalize(images.images)), jnp.asarray(images.labels))
    params = parameters(key_params, records.inputs[0].size // NUM_WORKERS, len(images.class_names))
    client_fn = jax.jit(clients.vertical_sgd(clients.cross_entropy(apply), indices))
    seen = observe(key_threat, THREAT, client_fn, params, records, batch_indices=indices)
    attack = attacks.cafe(first_layers, dense("server"), split_fn=clients.quadrants)
    one = stack([seen])
    found = study_analytic(attack, key_attack, one)
    batch = Batch(*(jnp.asarray(leaf)[0][:, None] for leaf in found.reconstruction.batch))
    truth = jax.tree.map(lambda leaf: leaf[:, None], records)
    r = found.reconstruction
    each = Reconstruction(
        batch, *(jnp.repeat(jnp.asarray(leaf), count, 0) for leaf in (r.loss, r.is_finite, r.restart_losses))
    )
    shares = explained(client_fn, one, found.reconstruction.batch)
    shares = jax.tree.map(lambda leaf: np.repeat(leaf, count), shares)  # one update, of all the records
    return Outcome(found._replace(reconstruction=each), shares), truth, batch_condition(indices, count)


def run(args: argparse.Namespace) -> None:
    """Attacks a federation by CAFE, prints the table and writes the results and a picture.

    Args:
        args: Options of the command line. Those that were not given are None, and get their defaults here.

    Raises:
        ValueError: If an option is out of its range.
        OSError: If the results cannot be written.
    """
    began = time.time()
    options.check_counts(args, OPTIONS[1:])
    defaults = {"data": "mnist", "records": NUM_RECORDS, "rounds": NUM_ROUNDS, "batch_size": BATCH_SIZE}
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.batch_size > args.records:
        raise ValueError(f"--batch-size must be at most --records, {args.records}, got {args.batch_size}")
    _check.fits(args.records * args.rounds, **{"--records": args.records})
    out = console.folder(Path(args.out), [console.RESULTS, console.ARRAYS, "reconstructions.png"])
    images = data.load(args.data, limit=args.records)
    if len(images.labels) < args.records:
        raise ValueError(f"--records must be at most {len(images.labels)} for {args.data}, got {args.records}")
    print(
        f"gia_jax {gia_jax.__version__}: {NUM_WORKERS} workers hold a quarter each of {args.records} images "
        f"of {images.name}; {args.rounds} rounds of {args.batch_size}, model untrained and frozen; {report.hardware()}"
    )
    threat = THREAT.describe()
    print(f"threat model: {threat}\n")
    key = jax.random.key(args.seed)
    found, truth, condition = cafe_on_federation(images, key, batch_size=args.batch_size, rounds=args.rounds)
    print(f"the batches identify every record: rank {args.records}, condition number {condition:.0f}\n")
    small = args.data in ("photos", "digits")
    gallery = images.images[:0] if small else data.load(args.data, split="train", limit=2_000).images
    modality = modalities.image(images.images.shape[1:], mean=images.mean, std=images.std)
    outcome = with_scores({"cafe": found}, truth, modality)["cafe"]
    assert outcome.scored is not None
    guesses = modality.guess_fn(truth, Batch(images.normalize(gallery), ()))
    settings = {"attack": "cafe"} | {name: getattr(args, name) for name in (*OPTIONS, "seed")}
    content = report.results(
        outcome.study,
        outcome.scored.scores,
        label_correct=outcome.label_correct,
        explained=outcome.explained,
        settings=settings,
        threat_model=threat,
        extra=tables.beside(outcome, None, guesses, modality) | {"command": console.command(args)},
    )
    written = console.write(out, content, [outcome], began)
    print(tables.table([tables.row("cafe", False, outcome, None, modality)], guesses, modality) + "\n")
    first = jax.tree.map(lambda leaf: leaf[:8], truth)
    drawn = outcome._replace(scored=outcome.scored.of(slice(8)))
    title = f"cafe on {images.name}"
    drawing = console.picture(out / "reconstructions.png", modality, first, {"cafe": drawn}, title, began)
    console.write_arrays(written, {"": console.seen(modality, first, drawn, drawing)})
