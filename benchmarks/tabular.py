"""Defenses beyond images: rows of the census data set Adult, whose fields are numbers and categories.

    python benchmarks/tabular.py [PART ...] [--epochs N ...] [--per-class N] [--steps N] [--defenses NAME ...]

Needs $GIA_JAX_DATA_DIR/tabular with adult.data.gz and adult.test.gz, the files of the UCI repository (Becker and Kohavi
1996), compressed. Both attackers choose one learning rate for each defense, of the same list, on training rows.
"""

import argparse
import gzip
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from attackers import counted_steps, informed
from flax import nnx
from jaxtyping import Array
from parts import run_parts
from training import accuracy, train, uniform

from gia_jax import Attack, Batch, Observation, ThreatModel, gradient_matching, models, report
from gia_jax.base import ClientFn, ObjectiveFn
from gia_jax.cases import joined
from gia_jax.defenses.mixing import as_probabilities
from gia_jax.matching.objectives import cosine
from gia_jax.protection import Protected, encoded, parse, protect
from gia_jax.study import study
from gia_jax.threat import observe

NUMBERS = (0, 2, 4, 10, 11, 12)  # columns of the file: age, weight, years of education, gains, losses, hours
CATEGORIES = (1, 3, 5, 6, 7, 8, 9, 13)
TOLERANCE = 0.1  # standard deviations within which a number counts as right
THREAT, CLASSES, NUM_OTHERS = ThreatModel(labels=True), 2, 15
RATES = (0.3, 0.1, 0.03)
DEFENSES = (
    "clip:norm=1",
    "prune:ratio=0.9",
    "prune:ratio=0.99",
    "sign",
    "quantize:bits=4",
    "soteria:ratio=0.8",
    "precode",
    "gaussian:scale=0.01",
    "gaussian:scale=0.1",
    "laplace:scale=0.01",
    "dpsgd:noise_multiplier=0.01,norm=1",
    "dpsgd:noise_multiplier=0.1,norm=1",
    "mixup:k=4",
)


class Rows(NamedTuple):
    """Examples as a network takes them: numbers in standard deviations, then one-hot categories; income above 50,000
    dollars is class 1.
    """

    inputs: np.ndarray
    labels: np.ndarray


class Adult(NamedTuple):
    """Training and test rows, and of how many entries each category is."""

    train: Rows
    test: Rows
    sizes: tuple[int, ...]

    def decode(self, free: Array) -> Array:
        """From free entries to rows: each category has probabilities."""
        numbers, *categories = self.fields(free)
        return jnp.concatenate([numbers, *(jax.nn.softmax(part) for part in categories)], -1)

    def fields(self, rows: Any) -> list[Any]:
        """The numbers, and the entries of each category."""
        ends = np.cumsum([len(NUMBERS), *self.sizes])
        return [rows[..., start:end] for start, end in zip([0, *ends], ends)]

    def right(self, rows: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """The share of fields that are right, shape (n,)."""
        (numbers, *found), (true_numbers, *true) = self.fields(rows), self.fields(truth)
        hits = [np.abs(numbers - true_numbers) <= TOLERANCE]
        hits += [(np.argmax(a, -1) == np.argmax(b, -1))[:, None] for a, b in zip(found, true)]
        return np.mean(np.concatenate(hits, -1), -1)


def adult() -> Adult:
    folder = Path(os.environ["GIA_JAX_DATA_DIR"]) / "tabular"

    def lines(name: str) -> np.ndarray:
        with gzip.open(folder / name, "rt") as file:
            split = (line.strip().rstrip(".").split(", ") for line in file)
            return np.asarray([fields for fields in split if len(fields) == 15])

    parts = {name: lines(f"adult.{name}.gz") for name in ("data", "test")}
    numbers = {name: part[:, NUMBERS].astype(np.float32) for name, part in parts.items()}
    mean, std = numbers["data"].mean(0), numbers["data"].std(0)
    values = [np.unique(parts["data"][:, column]) for column in CATEGORIES]

    def rows(name: str) -> Rows:
        one_hot = [parts[name][:, [column]] == known for column, known in zip(CATEGORIES, values)]
        inputs = np.concatenate([(numbers[name] - mean) / std, *one_hot], 1).astype(np.float32)
        return Rows(inputs, (parts[name][:, 14] == ">50K").astype(np.int32))

    return Adult(rows("data"), rows("test"), tuple(map(len, values)))


class Victims(NamedTuple):
    """Rows of a split, batch 1, and others of the same client."""

    truth: Batch
    others: Batch
    places: np.ndarray


def victims_of(rows: Rows, per_class: int, *, first: int = 0) -> Victims:
    """Rows of each class in the order of the file, from the `first` on; the next ones are the clients' others."""
    chosen = np.sort(np.concatenate([np.flatnonzero(rows.labels == c)[first:][:per_class] for c in range(CLASSES)]))
    rest = np.setdiff1d(np.arange(len(rows.labels)), chosen)[:NUM_OTHERS]
    every = Batch(jnp.asarray(rows.inputs), jnp.asarray(rows.labels))
    truth, others = (jax.tree.map(lambda leaf, index=index: leaf[index], every) for index in (chosen, rest))
    return Victims(jax.tree.map(lambda leaf: leaf[:, None], truth), others, chosen)


def see(protected: Protected, victims: Victims) -> Observation:
    """What the server sees of every victim."""

    def of_one(key: Array, batch: Batch) -> Observation:
        key_encode, key_client, key_threat = jax.random.split(key, 3)
        encoding = encoded(protected.encode_fn, key_encode, batch, victims.others)
        encoding = Batch(encoding.inputs, as_probabilities(encoding, CLASSES))
        client_fn = protected.client_fn(key_client)
        seen = observe(key_threat, THREAT, client_fn, protected.params, encoding, num_classes=CLASSES)
        return seen._replace(params=())

    keys = jax.random.split(jax.random.key(7), len(victims.places))
    return jax.jit(jax.vmap(of_one))(keys, victims.truth)._replace(params=protected.params)


def attack(
    data: Adult,
    client_fn: ClientFn,
    objective_fn: ObjectiveFn,
    seen: Observation,
    rates: Sequence[float],
    num_steps: int,
) -> list[np.ndarray]:
    """For each rate the rows that the attack finds, shape (v, d)."""
    number = len(seen.extra["labels"])
    together = joined([seen] * len(rates))
    # The rate is a lane's own, so that one program serves them all.
    together = together._replace(extra=together.extra | {"rate": jnp.repeat(jnp.asarray(rates, jnp.float32), number)})

    def of(observation: Observation) -> Attack:
        def stage(objective_fn: ObjectiveFn, num_steps: int) -> Attack:
            return gradient_matching(
                client_fn,
                objective_fn=objective_fn,
                decode_fn=lambda free, labels: Batch(data.decode(free), labels),
                optimizer=optax.adam(optax.cosine_decay_schedule(observation.extra["rate"], num_steps)),
            )

        return informed(stage, objective_fn, num_steps)

    matching = Attack(
        init=lambda key, observation: of(observation).init(key, observation),
        step=lambda key, state, observation: of(observation).step(key, state, observation),
        finalize=lambda candidate, observation: of(observation).finalize(candidate, observation),
    )
    found = study(matching, jax.random.key(0), together, num_steps=counted_steps(objective_fn, num_steps), lanes=10)
    return np.split(np.asarray(found.reconstruction.batch.inputs[:, 0]), len(rates))


def table(args: argparse.Namespace) -> None:
    """Blind, adaptive and prior-only attackers for every defense, at every stage of training."""
    data = adult()
    for epochs in args.epochs:
        table_of(data, epochs, args)


def table_of(data: Adult, epochs: int, args: argparse.Namespace) -> None:
    module = models.MLP((data.train.inputs.shape[1],), CLASSES, hidden=(100, 100), rngs=nnx.Rngs(0))
    clients = {name: protect(parse(name), module, num_classes=CLASSES) for name in ("none", *args.defenses)}
    examples = Batch(jnp.asarray(data.train.inputs), jnp.asarray(data.train.labels))
    stage, steps = "untrained", epochs * (len(data.train.labels) // 128)
    trained: dict[Any, Any] = {}
    for name, protected in clients.items():
        # Defenses of the model learn under themselves; the others attack the undefended network.
        shape = jax.tree.structure(protected.params)
        if epochs and shape not in trained:
            optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
            learn = jax.jit(partial(train, protected.client_fn, optimizer, uniform(128), num_steps=steps))
            trained[shape] = learn(protected.params, jax.random.key(0), examples)
        clients[name] = protected._replace(params=trained.get(shape, protected.params))
    plain = clients["none"]
    if epochs:
        scores = [
            accuracy(plain.apply_fn, plain.params, jnp.asarray(rows.inputs), rows.labels)
            for rows in (data.train, data.test)
        ]
        stage = f"{epochs} epoch{'s' * (epochs > 1)}, accuracy {scores[0]:.1%} training, {scores[1]:.1%} test"

    tuning = victims_of(data.train, 5)
    groups = {"test": victims_of(data.test, args.per_class), "train": victims_of(data.train, args.per_class, first=5)}
    truths = {split: np.asarray(victims.truth.inputs[:, 0]) for split, victims in groups.items()}
    tuning_truth = np.asarray(tuning.truth.inputs[:, 0])

    def both(client_fn: ClientFn, objective_fn: ObjectiveFn, seen: Sequence[Observation]) -> tuple[float, Any]:
        """The rate that is best on the first observations, the tuning ones, and what is found in the others with it."""
        run = partial(attack, data, client_fn, objective_fn, num_steps=args.steps)
        rate = RATES[int(np.argmax([data.right(rows, tuning_truth).mean() for rows in run(seen[0], RATES)]))]
        (rows,) = run(joined(seen[1:]), (rate,))
        return rate, dict(zip(groups, np.split(rows, len(groups))))

    blind, adaptive, rates = {}, {}, {}
    for name, protected in clients.items():
        print(name, flush=True)
        seen = [see(protected, victims) for victims in (tuning, *groups.values())]
        unaware = protected if name == "precode" else plain
        objective_fn = protected.adapt_fn(cosine)
        rate, blind[name] = both(unaware.assumed_fn, cosine, seen)
        rates[name] = f"{rate:g}"
        if objective_fn is not cosine or "dpsgd" in name:
            rate, adaptive[name] = both(protected.assumed_fn, objective_fn, seen)
            rates[name] += f", {rate:g}"
        if name == "none":
            noise = [report.random_updates(jax.random.key(5), one) for one in seen]
            _, prior = both(plain.assumed_fn, cosine, noise)

    def right(split: str, rows: np.ndarray) -> np.ndarray:
        return data.right(rows, truths[split])

    differences = {}
    for split in groups:
        guess = right(split, prior[split])
        for name in clients:
            unaware = right(split, blind[name][split])
            differences[split, name, "blind - prior only"] = 100 * (unaware - guess)
            if name in adaptive:
                knows = right(split, adaptive[name][split])
                differences[split, name, "adaptive - blind"] = 100 * (knows - unaware)
                differences[split, name, "adaptive - prior only"] = 100 * (knows - guess)
    gains = record.gains(differences)
    rows, of_victims, guessed = [], [], []
    for split, victims in groups.items():
        gallery = getattr(data, split).inputs[: max(10_000, victims.places.max() + 1)]
        labels = np.asarray(victims.truth.labels[:, 0])

        def rank(found: np.ndarray, gallery: np.ndarray = gallery, victims: Victims = victims) -> str:
            distances = np.square(gallery[None] - found[:, None]).sum(-1)
            own = distances[np.arange(len(found)), victims.places]
            return f"{np.median(1 + (distances < own[:, None]).sum(1)):.0f}"

        for name, protected in clients.items():
            knows = adaptive.get(name, blind[name])[split]
            logits = protected.apply_fn(protected.params, victims.truth.inputs[:, 0])
            correct = np.asarray(jnp.argmax(logits, -1)) == labels
            row = {"defense": name, "victims": split}
            for who, found in (("blind", blind[name][split]), ("adaptive", knows)):
                fields = right(split, found)
                row |= {f"{who}, fields %": f"{100 * fields.mean():.1f}", f"{who} rank": rank(found)}
                row[f"{who}, all right"] = f"{np.mean(fields == 1):.0%}"
                if epochs:
                    means = (
                        f"{100 * fields[c].mean():.1f} ({c.sum()})" if c.any() else "0" for c in (correct, ~correct)
                    )
                    row[f"{who}, classified rightly / wrongly"] = " / ".join(means)
            for column in ("adaptive - blind", "blind - prior only", "adaptive - prior only"):
                row[column] = gains.get((split, name, column), "same attack")
            rows.append(row | {"rate": rates[name]})
        last = dict.fromkeys(rows[0], "-") | {"defense": "prior only", "victims": split}
        last["blind, fields %"] = f"{100 * right(split, prior[split]).mean():.1f}"
        rows.append(last | {"blind rank": rank(prior[split])})

        public = np.setdiff1d(np.arange(10_000), groups["train"].places)
        known, known_labels = data.train.inputs[public], data.train.labels[public]

        def commonest(rows: np.ndarray) -> np.ndarray:
            numbers, *categories = data.fields(rows)
            # A median is within the tolerance more often than a mean.
            return np.concatenate([np.median(numbers, 0), *(part.mean(0) for part in categories)])

        truth = truths[split]
        by_class = np.stack([commonest(known[known_labels == c]) for c in range(CLASSES)])
        nearest = np.stack([known[np.argmin(np.square(known - one).sum(1))] for one in truth])
        guesses = {"commonest values": np.broadcast_to(commonest(known), truth.shape), "of the class": by_class[labels]}
        guesses["nearest row, chosen with the truth"] = nearest
        guessed += [f"{name}, {split} {100 * right(split, found).mean():.1f}" for name, found in guesses.items()]
        for i, place in enumerate(victims.places):
            found = {f"{name}, blind": found for name, found in blind.items()}
            found |= {f"{name}, adaptive": one for name, one in adaptive.items()} | {"prior only": prior}
            shares = {name: f"{100 * right(split, one[split])[i]:.1f}" for name, one in found.items()}
            of_victims.append({"victims": split, "row": place, "label": labels[i]} | shares)
    record.write(
        f"tabular_adult_{epochs}_epochs" if epochs else "tabular_adult_untrained",
        f"Defenses on Adult, {stage}: attackers that do not and that do know the defense",
        rows,
        f"{2 * args.per_class} rows of each split, {args.per_class} of each class in the order of the file, batch 1; "
        "MLP of two hidden layers of 100, ReLU; model, client and attack seed 0, 1 restart, "
        f"{args.steps} steps of Adam; "
        "an adaptive attacker with an objective of its own uses the blind one's for the first half. Both know the "
        "schema: categories are searched as probabilities. Both tuned the learning rate among "
        f"{', '.join(f'{rate:g}' for rate in RATES)} on 10 other training rows. Fields %: the share of the 14 fields "
        f"that are right, a number within {TOLERANCE} standard deviations; rank of the true row among the first 10,000 "
        "of its split by squared distance (median; chance 5,000). Differences in percentage points with a paired "
        "bootstrap interval of 95 % ('none' where it covers 0) and the p-value of a test that turns the signs of "
        f"differences at random, corrected by Holm over the {len(differences)} differences of this table. Guesses "
        f"without a gradient, fields %, from 10,000 training rows: {', '.join(guessed)}. Of mixed rows the true one is "
        "that of the largest expected coefficient.\n\n"
        f"Threat model: {THREAT.describe()}; it sees one round; the adaptive attacker knows the defense, its strength "
        "where it makes use of it, not its key.",
        victims=of_victims,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 1, 20], help="of training before the attack")
    parser.add_argument("--per-class", type=int, default=35, help="victims of each class")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--defenses", nargs="+", default=list(DEFENSES))
    with tempfile.TemporaryDirectory() as folder:
        # The victims' program is that of the tuning rows, and of every defense that shares it.
        jax.config.update("jax_compilation_cache_dir", folder)
        run_parts(parser, table)


if __name__ == "__main__":
    main()
