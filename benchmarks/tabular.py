"""Defenses beyond images: rows of numbers and categories, of the census data Adult or of the words of a sentence.

    python benchmarks/tabular.py [PART ...] [--data NAME ...] [--epochs N ...] [--per-class N] [--steps N]
        [--restarts N] [--name NAME] [--defenses NAME ...]

Needs the files that benchmarks/tables.py names. Both attackers choose one learning rate for each defense, of the same
list, on training rows.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import attackers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from attackers import DRAWS_A_STEP, THREAT, Seen, counted_steps, differs, informed, network, redrawn, unstacked
from flax import nnx
from jaxtyping import Array, PRNGKeyArray
from parts import run_parts
from tables import TABLES, TOLERANCE, Rows, Table
from training import accuracy, train, uniform

from gia_jax import Attack, Batch, Observation, control, gradient_matching
from gia_jax.base import ClientFn, InitFn, ObjectiveFn, Params
from gia_jax.defenses.protected import Protected, parse, protect
from gia_jax.matching.initializations import normal
from gia_jax.matching.objectives import cosine
from gia_jax.sweep import sweep

NUM_TUNING, NUM_OTHERS, GALLERY = 5, 15, 10_000  # rows of each class that are tuned on; others; rows ranked
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


class Victims(NamedTuple):
    """Rows of a split, as batches of 1 and by their fields, others of the same client, and the first rows of the split,
    victims among them.
    """

    truth: Batch
    rows: Rows
    others: Batch
    gallery: np.ndarray
    places: np.ndarray


def batch_of(data: Table, rows: Rows) -> Batch:
    """As a network takes them."""
    return Batch(data.encode(jnp.asarray(rows.fields)), jnp.asarray(rows.labels))


def victims_of(data: Table, rows: Rows, per_class: int, *, first: int = 0) -> Victims:
    """Rows of each class in the order of the file, from the `first` on; the last rows are the clients' others."""
    classes = [np.flatnonzero(rows.labels == c)[first:][:per_class] for c in range(data.num_classes)]
    if min(map(len, classes)) < per_class or max(map(max, classes)) >= len(rows.labels) - NUM_OTHERS:
        raise ValueError(f"per_class must leave rows of each class beside {NUM_OTHERS} others, got {per_class}")
    chosen = np.sort(np.concatenate(classes))
    # Far from the victims of all lists, so that nothing is tuned on encodings that hold them.
    others = Rows(*(field[-NUM_OTHERS:] for field in rows))
    own = Rows(*(field[chosen] for field in rows))
    truth = jax.tree.map(lambda leaf: leaf[:, None], batch_of(data, own))
    return Victims(truth, own, batch_of(data, others), rows.fields[:GALLERY], chosen)


def see(data: Table, protected: Protected, victims: Victims) -> Seen:
    """What the server sees of every victim."""
    of_one = partial(attackers.see, protected, num_classes=data.num_classes)
    keys = jax.random.split(jax.random.key(7), len(victims.places))
    seen = jax.jit(jax.vmap(of_one, (0, 0, None)))(keys, victims.truth, victims.others)
    return seen._replace(observation=seen.observation._replace(params=protected.params))


class Clients(NamedTuple):
    """Defended clients by name, "none" among them, and at what stage of their training the networks are."""

    protected: dict[str, Protected]
    stage: str


def clients_of(data: Table, epochs: int, names: Sequence[str]) -> Clients:
    """Defenses of the model learn under themselves; all others have the network that learned without one."""
    module = data.make(nnx.Rngs(0))
    every = {name: protect(parse(name), module, num_classes=data.num_classes) for name in ("none", *names)}
    if not epochs:
        return Clients(every, "untrained")
    steps = epochs * (len(data.train.labels) // 128)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    examples = Batch(*map(jnp.asarray, data.train))
    stage, learned = f"{epochs} epoch{'s' * (epochs > 1)}", {}

    def sample(key: PRNGKeyArray, rows: Batch) -> Batch:
        chosen = uniform(128)(key, rows)
        return chosen._replace(inputs=data.encode(chosen.inputs))

    for name, protected in every.items():
        if network(name) not in learned:
            learn = jax.jit(partial(train, protected.client_fn, optimizer, sample, num_steps=steps))
            learned[name] = learn(protected.params, jax.random.key(0), examples)
            by_fields = partial(
                lambda params, rows, apply_fn: apply_fn(params, data.encode(rows)), apply_fn=protected.apply_fn
            )
            seen, unseen = (
                accuracy(by_fields, learned[name], jnp.asarray(rows.fields), rows.labels)
                for rows in (data.train, data.test)
            )
            stage += f", accuracy {seen:.1%} training, {unseen:.1%} test" + f" with {name}" * (name != "none")
        every[name] = protected._replace(params=learned[network(name)])
    return Clients(every, stage)


class Result(NamedTuple):
    """Of every victim: the share of its fields that are right, its rank among the rows of its split and the attacker's
    objective.
    """

    right: np.ndarray
    rank: np.ndarray
    objective: np.ndarray


class Attacker(NamedTuple):
    """One that assumes a client and compares updates; with `draw_fn` it only draws rows, as many as cost the same."""

    data: Table
    client_fn: ClientFn
    objective_fn: ObjectiveFn
    num_steps: int
    num_restarts: int = 1
    draw_fn: InitFn | None = None

    def __call__(self, seen: Observation, victims: Victims, rates: Sequence[float]) -> list[Result]:
        """For each learning rate, in one sweep."""
        steps = self.num_steps if self.draw_fn is None else round(DRAWS_A_STEP * self.num_steps)

        def make(setting: dict[str, Array]) -> Attack:
            def stage(objective_fn: ObjectiveFn, num_steps: int) -> Attack:
                descent = optax.adam(optax.cosine_decay_schedule(setting["rate"], num_steps))
                modality = self.data.modality
                return gradient_matching(
                    self.client_fn,
                    **modality._replace(init_fn=self.draw_fn or modality.init_fn).matching(),
                    objective_fn=objective_fn,
                    optimizer=descent if self.draw_fn is None else redrawn(self.draw_fn),
                )

            return informed(stage, self.objective_fn, steps)

        found = sweep(
            make,
            {"rate": np.asarray(rates, np.float32)},
            jax.random.key(0),
            seen,
            num_steps=counted_steps(self.objective_fn, steps),
            num_restarts=self.num_restarts,
            lanes=40,
        ).reconstruction.batch

        def match(batch: Batch, update: Params) -> Array:
            return self.objective_fn(self.client_fn(seen.params, batch), update)

        objective_of_each = jax.jit(jax.vmap(match))
        return [self.result(batch, objective_of_each(batch, seen.update), victims) for batch in unstacked(found)]

    def result(self, found: Batch, objective: Array, victims: Victims) -> Result:
        """Scores of what was found of every victim."""
        right = self.data.modality.score_fn(found, victims.truth).scores["fields"][:, 0]
        rows = np.asarray(found.inputs[:, 0])
        distances = self.data.schema.distances(rows, victims.gallery)
        rank = 1 + np.sum(distances < distances[np.arange(len(rows)), victims.places][:, None], 1)
        rank = np.where(np.all(np.isfinite(rows), 1), rank, len(victims.gallery))
        return Result(right, rank, np.asarray(objective))


def best(results: Sequence[Result]) -> float:
    """The learning rate of the best of results on the tuning rows."""
    return RATES[int(np.argmax([result.right.mean() for result in results]))]


def drawn(data: Table, rows: Array, key: PRNGKeyArray, seen: Observation) -> Array:
    """One of the rows, as free entries."""
    del seen
    return data.schema.unknowns_of(jax.random.choice(key, rows, (1,)))


def table(args: argparse.Namespace) -> None:
    """Blind, adaptive and prior-only attackers for every defense, at every stage of training."""
    if args.name and len(args.data) * len(args.epochs) > 1:
        raise ValueError(f"name must be of one table, got {args.name} for {args.data} after {args.epochs} epochs")
    for name in args.data:
        data = TABLES[name]()
        for epochs in args.epochs:
            table_of(data, epochs, args)


def table_of(data: Table, epochs: int, args: argparse.Namespace) -> None:
    """At one stage."""
    clients, stage = clients_of(data, epochs, args.defenses)
    tuning = victims_of(data, data.train, NUM_TUNING)
    trained = victims_of(data, data.train, args.per_class, first=NUM_TUNING)
    groups = {"test": victims_of(data, data.test, args.per_class), "train": trained}
    private = [*trained.places, *range(len(data.train.labels) - NUM_OTHERS, len(data.train.labels))]
    public = np.setdiff1d(np.arange(len(trained.gallery)), private)
    known = Rows(*(field[public] for field in data.train))
    found: dict[tuple[str, str, str], Result] = {}  # by split, defense or guess, and attacker
    rates: dict[str, str] = {}
    read: dict[tuple[str, str], np.ndarray] = {}
    at_truth, undefended = {}, []

    def attack(
        attacker: Attacker, name: str, who: str, seen: Sequence[Observation], rate: float | None = None
    ) -> float:
        """With the rate that is best on the first observations, the tuning ones, or the one given."""
        rate = best(attacker(seen[0], tuning, RATES)) if rate is None else rate
        for (split, victims), observation in zip(groups.items(), seen[1:]):
            (found[split, name, who],) = attacker(observation, victims, (rate,))
        return rate

    for name, protected in clients.items():
        print(name, flush=True)
        every = [see(data, protected, victims) for victims in (tuning, *groups.values())]
        seen = [one.observation for one in every]
        unaware = clients[network(name)]
        objective_fn = protected.adapt_fn(cosine)
        blind = Attacker(data, unaware.assumed_fn, cosine, args.steps, args.restarts)
        rate = attack(blind, name, "blind", seen)
        rates[name] = f"{rate:g}"
        if name == "none":
            undefended = seen
        if differs(name):
            knowing = Attacker(data, protected.assumed_fn, objective_fn, args.steps, args.restarts)
            rate_knowing = attack(knowing, name, "adaptive", seen)
            rates[name] += f", {rate_knowing:g}"
            if network(name) == "none":
                attack(knowing, name, "adaptive on no defense", undefended, rate_knowing)
        for split, one in zip(groups, every[1:]):
            if data.read is not None:
                read[split, name] = data.read(one.observation.update, groups[split].rows.fields)
            at_truth[split, name] = jax.vmap(objective_fn)(one.assumed, one.observation.update).mean()
        if name == "none":
            noise = [control(jax.random.key(5), one) for one in seen]
            attack(blind, "prior only", "blind", noise)
            fields = jnp.asarray(known.fields)
            draws: dict[str, InitFn] = {
                "random search, noise": normal(),
                "random search, public rows": partial(drawn, data, fields),
            }
            for search, draw_fn in draws.items():
                attack(blind._replace(draw_fn=draw_fn), search, "blind", seen, rate)
    write(data, epochs, stage, clients, groups, known, found, rates, read, at_truth, args)


def write(
    data: Table,
    epochs: int,
    stage: str,
    clients: dict[str, Protected],
    groups: dict[str, Victims],
    known: Rows,
    found: dict[tuple[str, str, str], Result],
    rates: dict[str, str],
    read: dict[tuple[str, str], np.ndarray],
    at_truth: dict[tuple[str, str], Array],
    args: argparse.Namespace,
) -> None:
    """The table, and the fields of every victim in a file of its own."""

    def knowing(split: str, name: str) -> Result:
        return found.get((split, name, "adaptive"), found[split, name, "blind"])

    differences, guesses = {}, {}
    for split in groups:
        truth = groups[split].rows
        guesses[split] = {name: data.right(rows, truth.fields) for name, rows in data.guesses(truth, known).items()}
        bars = {"prior only": found[split, "prior only", "blind"].right, "class": guesses[split]["of the class"]}
        for name in clients:
            blind, knows = found[split, name, "blind"].right, knowing(split, name).right
            differences |= {(split, name, f"blind - {bar}"): 100 * (blind - right) for bar, right in bars.items()}
            if (split, name, "adaptive") in found:
                differences[split, name, "adaptive - blind"] = 100 * (knows - blind)
                differences |= {
                    (split, name, f"adaptive - {bar}"): 100 * (knows - right) for bar, right in bars.items()
                }
    gains = record.gains(differences)
    rows, of_victims, guessed = [], [], []
    for split, victims in groups.items():
        labels = victims.rows.labels

        def figures(who: str, result: Result, rightly: np.ndarray | None) -> dict[str, str]:
            row = {
                f"{who}, fields %": f"{100 * result.right.mean():.1f}",
                f"{who}, all right": f"{np.mean(result.right == 1):.0%}",
                f"{who}, rank": f"{np.median(result.rank):.0f}",
            }
            if epochs and rightly is not None:
                parts = [result.right[chosen] for chosen in (rightly, ~rightly)]
                shown = [f"{len(part)}: {100 * part.mean():.1f}" if len(part) else "0" for part in parts]
                row[f"{who}, classified rightly; wrongly"] = "; ".join(shown)
            return row

        for name, protected in clients.items():
            logits = protected.apply_fn(protected.params, victims.truth.inputs[:, 0])
            rightly, knows = np.asarray(jnp.argmax(logits, -1)) == labels, knowing(split, name)
            row = {"defense": name, "victims": split}
            row |= figures("blind", found[split, name, "blind"], rightly) | figures("adaptive", knows, rightly)
            row["adaptive - blind"] = gains.get((split, name, "adaptive - blind"), "same attack")
            for bar in ("prior only", "class"):
                row[f"blind - {bar}"] = gains[split, name, f"blind - {bar}"]
                row[f"adaptive - {bar}"] = gains.get((split, name, f"adaptive - {bar}"), "same attack")
            row["adaptive objective"] = f"{knows.objective.mean():.3f}"
            control = found.get((split, name, "adaptive on no defense"))
            row["adaptive on no defense"] = "-" if control is None else f"{100 * control.right.mean():.1f}"
            if read:
                row["read off, %"] = f"{100 * read[split, name].mean():.1f}"
            rows.append(row | {"at the truth": f"{at_truth[split, name]:.3f}", "rate": rates[name]})
        for name in [name for own, name, _ in found if own == split and name not in clients]:
            row = dict.fromkeys(rows[0], "-") | {"defense": name, "victims": split}
            rows.append(row | figures("blind", found[split, name, "blind"], None))
        guessed += [f"{name}, {split} {100 * right.mean():.1f}" for name, right in guesses[split].items()]
        for i, place in enumerate(victims.places):
            own = {f"{name}, {who}": f"{100 * r.right[i]:.1f}" for (s, name, who), r in found.items() if s == split}
            own |= {name: f"{100 * right[i]:.1f}" for name, right in guesses[split].items()}
            own |= {f"{name}, read off": f"{100 * share[i]:.1f}" for (s, name), share in read.items() if s == split}
            of_victims.append({"victims": split, "row": place, "label": labels[i]} | own)
    numbers = f", a number within {TOLERANCE} standard deviations" * bool(data.schema.places("number"))
    chance = ", ".join(f"{len(victims.gallery) // 2:,} {split}" for split, victims in groups.items())
    read_off = ""
    if read:
        commonest = np.argsort(-np.bincount(known.fields[known.fields > 0].astype(int)))[: data.test.fields.shape[1]]
        named = [np.isin(np.unique(own[own > 0]), commonest).mean() for own in groups["test"].rows.fields]
        read_off = (
            "Read off: of a sentence's distinct words without blanks, in whatever order, the share among the longest "
            "rows of the embedding's update, as many as places; nothing is searched. (The commonest public words, as "
            f"many, are {100 * np.mean(named):.1f} % of the test sentences'. A ratio of pruning counts the rows of "
            "other words, which are zero anyway.) "
        )
    majority = max(np.mean(data.test.labels == c) for c in range(data.num_classes))
    restarts = f"{args.restarts} restart{'s, of which the lowest loss is kept' if args.restarts > 1 else ''}"
    record.write(
        args.name or f"{data.name}_{f'{epochs}_epochs' if epochs else 'untrained'}",
        f"Defenses on {data.title}, {stage}: attackers that do not and that do know the defense",
        rows,
        f"{len(groups['test'].places)} rows of each split, {args.per_class} of each class in the order of the file, "
        f"batch 1; {data.what} ({len(data.train.labels):,} training rows; the commonest class is {majority:.0%} of the "
        f"test rows); model, client and attack seed 0, {restarts}, {args.steps} steps of Adam; an adaptive "
        "attacker with an objective of its own uses the blind one's for the first half. All know the schema: "
        "categories are searched as probabilities. Both tuned the learning rate among "
        f"{', '.join(f'{rate:g}' for rate in RATES)} on {data.num_classes * NUM_TUNING} other training rows. Fields %: "
        f"the share of the {data.test.fields.shape[1]} fields that are right{numbers}; rank of the true row among the "
        f"first {GALLERY:,} of its split, or all, by squared distance (median; chance {chance}). {read_off}"
        "Differences in percentage points with a paired bootstrap interval of 95 % ('none' where it covers 0) and the "
        "p-value of a test that turns the signs of differences at random, corrected by Holm over the "
        f"{len(differences)} differences of this table. "
        "Prior only: the undefended attack on random updates, tuned alike. Random search: "
        f"of {round(DRAWS_A_STEP * args.steps):,} draws, which cost as many passes through the network as the attack's "
        f"steps{' (in each restart)' * (args.restarts > 1)}, the one of the lowest loss on the undefended update. "
        f"Public rows: the first {GALLERY:,} training rows, or all, but victims and the clients' others. Guesses from "
        f"them without a gradient, fields %: {'; '.join(guessed)}; 'class' in a column is the "
        "one of the class. Adaptive on no defense: that row's attacker on undefended updates. Of mixed rows the true "
        "one is that of the largest expected coefficient.\n\n"
        f"Threat model: {THREAT.describe()}; it sees one round; the adaptive attacker knows the defense, its strength "
        "where it makes use of it, not its key.",
        victims=of_victims,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(TABLES), nargs="+", default=list(TABLES))
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 1, 20], help="of training before the attack")
    parser.add_argument("--per-class", type=int, default=35, help="victims of each class")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--name", help="of the table's files; default: by data and stage")
    parser.add_argument("--defenses", nargs="+", default=list(DEFENSES))
    with tempfile.TemporaryDirectory() as folder:
        # The victims' program is that of the tuning rows, and of every defense that shares it.
        jax.config.update("jax_compilation_cache_dir", folder)
        run_parts(parser, table)


if __name__ == "__main__":
    main()
