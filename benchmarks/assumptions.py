"""Which assumptions carry an attack: what the attacker knows is taken away, one thing at a time.

    python benchmarks/assumptions.py [tune | tune_batches | statistics | batches | figure]
                                     [--stages STAGE ...] [--victims N] [--steps N] [--keep FOLDER]

`statistics` attacks a ResNet-20 whose clients normalise by the statistics of their own batch, `batches` a network with
group normalisation, `figure` draws what their tables say. `tune` and `tune_batches` compare weights for them on test
images that are no victims. A run that was stopped goes on from what it kept in FOLDER.
Needs the extras `data` and `interop`, and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). The trained
ResNet-20s are those of `benchmarks/resnet20.py`.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
import resnet20
from attackers import of_each, ranks_among, signed_adam, unstacked
from flax import nnx
from grad_inversion import WEIGHTS
from parts import run_parts
from training import train_network

from gia_jax import (
    Attack,
    Batch,
    Observation,
    Reconstruction,
    ThreatModel,
    attacks,
    box,
    clients,
    control,
    data,
    gradient_matching,
    keep_best,
    labels,
    metrics,
    models,
    observe,
)
from gia_jax.base import ClientFn, LabelFn, Params, PriorFn
from gia_jax.matching import priors
from gia_jax.matching.objectives import cosine
from gia_jax.models.functional import ApplyFn
from gia_jax.report import progress
from gia_jax.sweep import grid, sweep
from gia_jax.threat import granted_labels

CLASSES, GALLERY = 10, 10_000
STAGES = {"untrained": 0, "one epoch": 1, "converged": 12}  # and how long the network with group normalisation learns
KINDS = ("exact", "inferred", "running", "proxy")  # statistics by where they come from
PROXY_IMAGES = 256  # of the training set, the attacker's own
MOMENTUM = 0.9  # of the running statistics
FIRST_TUNING = 9_000  # place of the first test image of `tune`
# Of least rank by `tune`: weights of the total variation and of the distance of statistics.
SMOOTHNESS = {"untrained": 1e-2, "one epoch": 1e-2, "converged": 1.0}
STATISTICS = {"untrained": 1e-2, "one epoch": 1e-2, "converged": 1e-2}
RATE, MINIBATCH, EPOCHS, LOCAL = 0.1, 2, 2, 4  # of the clients with local steps in `batches`, and their images
# Of least rank by `tune_batches`: weights of the total variation for each size of a batch.
SMOOTHNESS_OF_BATCH = {
    "untrained": {1: 1e-2, 4: 1e-2, 16: 1e-2},
    "one epoch": {1: 1e-1, 4: 1e-2, 16: 1e-2},
    "converged": {1: 1e-1, 4: 1e-1, 16: 1e-1},
}
PRIVATE = "honest-but-curious server; knows parameters, update, batch size, and what the row does not take away"


class Case(NamedTuple):
    """Victims with a leading axis, what the server sees of them, and the network.

    Attributes:
        truth: Inputs and labels of the victims.
        places: Place of every image among the test images, shape (v, b).
        images: The test images.
        seen: What the server sees.
    """

    truth: Batch
    places: np.ndarray
    images: data.ImageData
    seen: Observation

    def attack(self, client_fn: ClientFn, prior_fn: PriorFn, steps: int, label_fn: LabelFn = granted_labels) -> Attack:
        """Inverting Gradients with any prior."""
        return keep_best(
            gradient_matching(
                client_fn,
                objective_fn=cosine,
                prior_fn=prior_fn,
                label_fn=label_fn,
                project_fn=box(*self.images.bounds()),
                optimizer=signed_adam(steps),
            )
        )


class Row(NamedTuple):
    """Figures of one rung on every victim: PSNR and the share of images at 20 dB, ranks, and labels right."""

    psnr: np.ndarray
    share: np.ndarray
    rank: np.ndarray
    labels: np.ndarray
    seconds: float


class Rung(NamedTuple):
    """A row of a ladder, and the one that it is compared with."""

    stage: str
    attack: str
    knowledge: str
    row: Row
    base: Row | None


def smooth(weight: Any, *others: tuple[Any, PriorFn]) -> PriorFn:
    """Total variation, and other priors with their weights."""
    return priors.combine((weight, priors.total_variation()), *others)


def case_of(number: int, size: int, first: int, see: Callable[[jax.Array, Batch], Observation], params: Params) -> Case:
    """Victims that hold consecutive test images, and what `see(key, batch)` shows of each."""
    images = data.load("cifar10")
    places = first + np.arange(number * size).reshape(number, size)
    truth = Batch(jnp.asarray(images.normalize(images.images[places])), jnp.asarray(images.labels[places]))
    keys = jax.random.split(jax.random.key(7), number)
    return Case(truth, places, images, jax.jit(jax.vmap(see))(keys, truth)._replace(params=params))


def rows_of(case: Case, found: Reconstruction, seconds: float) -> list[Row]:
    """The figures of every setting, from a reconstruction with leading axes of settings and victims."""
    rows = []
    for batch in unstacked(found.batch):
        scores = metrics.score(batch, case.truth, case.images)
        flat = scores.images.reshape(-1, *scores.images.shape[2:])
        ranks = ranks_among(case.images.images[:GALLERY], flat, case.places.ravel()).reshape(case.places.shape).mean(1)
        share = np.mean(scores.psnr >= 20, 1)
        rows.append(Row(scores.psnr.mean(1), share, ranks, scores.label_correct, seconds / len(found.loss)))
    return rows


def solve(case: Case, make: Callable[[Any], Attack], settings: dict[str, np.ndarray], args: argparse.Namespace) -> list:
    """One sweep, and the row of every setting."""
    lanes = max(1, 16 // case.places.shape[1])
    ran = sweep(
        make,
        settings,
        jax.random.key(1),
        case.seen,
        num_steps=args.steps,
        lanes=lanes,
        progress_fn=progress("sweep"),
        checkpoint=args.keep,
    )
    return rows_of(case, ran.reconstruction, ran.timing.run_seconds)


def residual(stage: str) -> nnx.Module:
    """The ResNet-20 of a stage of its training."""
    return resnet20.network(None if stage == "untrained" else resnet20.weights_file(stage.replace(" ", "_")))


class Normalised(NamedTuple):
    """A ResNet-20 in training mode, its clients, and what the server may know of their statistics."""

    module: nnx.Module
    client_fn: ClientFn
    params: Params

    @classmethod
    def of(cls, stage: str) -> "Normalised":
        """At a stage of its training."""
        module = residual(stage)
        apply_fn, params = models.functional(module, batch_norm="training")
        return cls(module, clients.federated_sgd(clients.cross_entropy(apply_fn)), params)

    def statistics_fn(self, params: Params, inputs: jax.Array) -> Any:
        """The statistics of a batch in every layer."""
        return models.batch_norm_inputs(self.module, batch_norm="training")(params, inputs)

    def case(self, number: int, size: int, *, first: int = 0) -> Case:
        """Its victims; extra["statistics"] has a leading axis of KINDS."""
        own = data.load("cifar10", split="train")
        proxy = self.statistics_fn(self.params, jnp.asarray(own.normalize(own.images[-PROXY_IMAGES:])))

        def see(key: jax.Array, batch: Batch) -> Observation:
            exact = self.statistics_fn(self.params, batch.inputs)
            before = models.running_statistics(self.module, self.params, batch.inputs)
            after = jax.tree.map(lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new, before, exact)
            inferred = models.inferred_statistics(before, after, momentum=MOMENTUM)
            threat = ThreatModel(labels=True, statistics=True)
            seen = observe(key, threat, self.client_fn, self.params, batch, statistics=exact)
            kinds = jax.tree.map(lambda *leaves: jnp.stack(leaves), exact, inferred, before, proxy)
            return seen._replace(params=(), extra={**seen.extra, "statistics": kinds})

        return case_of(number, size, first, see, self.params)

    def prior(self, kind: Any) -> PriorFn:
        """The distance from the statistics of a kind."""
        return priors.batch_norm_statistics(self.statistics_fn, lambda seen: kind_of(seen, kind))

    def evaluation(self, seen: Observation) -> ClientFn:
        """The client of an attacker who takes the running statistics for those that the client used."""
        statistics = kind_of(seen, KINDS.index("running"))
        apply_fn, _ = models.functional(self.module, batch_norm="exact", statistics=statistics)
        return clients.federated_sgd(clients.cross_entropy(apply_fn))


def kind_of(seen: Observation, kind: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[kind], seen.extra["statistics"])


def tune(args: argparse.Namespace) -> None:
    """Weights for the first attack of `statistics`, on four test images that are no victims."""
    for stage in args.stages:
        tune_at(stage, args)


def tune_at(stage: str, args: argparse.Namespace) -> None:
    """The weights of one stage."""
    settings, net = grid(smoothness=[1e-2, 1e-1, 1.0], statistics=[1e-3, 1e-2]), Normalised.of(stage)
    case = net.case(4, 1, first=FIRST_TUNING)

    def make(setting: Any) -> Attack:
        prior_fn = smooth(setting["smoothness"], (setting["statistics"], net.prior(0)))
        return case.attack(net.client_fn, prior_fn, args.steps)

    for i, row in enumerate(solve(case, make, settings, args)):
        setting = {name: float(values[i]) for name, values in settings.items()}
        rank = geometric_mean(row.rank)
        print(f"{stage}, {setting}: rank {rank:.0f} (geometric mean), {row.psnr.mean():.2f} dB", flush=True)


def statistics(args: argparse.Namespace) -> None:
    """What the attacker knows of the batch's statistics and labels, and how far the network is trained."""
    table = Table("statistics")
    table.fill(statistics_at, args)
    table.write(
        f"ResNet-20 in training mode, {args.victims} CIFAR-10 test images, batch 1",
        args,
        f"Inverting Gradients: total variation {SMOOTHNESS}, distance of statistics {STATISTICS}, chosen with exact "
        f"statistics among 6 pairs by the rank of 4 test images that are no victims (`tune`). GradInversion: 2 seeds, "
        f"weights {WEIGHTS}, those of another network. Exact: of the client's batch; inferred: from the running "
        f"statistics before and after its step, momentum {MOMENTUM:g}, float32; running: before; proxy: of "
        f"{PROXY_IMAGES} training images. All attackers simulate a client in training mode, but the one that takes "
        "running statistics for the batch's, and has no distance of statistics. Labels are known, or inferred (all "
        "right), unless they are searched for.",
    )


def statistics_at(stage: str, args: argparse.Namespace) -> list[Rung]:
    """The rows of one stage."""
    net, smoothness, weight = Normalised.of(stage), SMOOTHNESS[stage], STATISTICS[stage]
    case = net.case(args.victims, 1)

    def matching(setting: Any) -> Attack:
        prior_fn = smooth(smoothness, (setting["weight"], net.prior(setting["kind"])))
        return case.attack(net.client_fn, prior_fn, args.steps)

    settings = {"kind": np.array([0, 1, 2, 3, 0]), "weight": np.array([*[weight] * 4, 0.0])}
    names = [*(f"statistics {kind}" for kind in KINDS), "statistics unknown"]
    found = solve(case, matching, settings, args)
    base = found[0]
    rungs = [Rung(stage, "Inverting Gradients", *each, base) for each in zip(names, found, strict=True)]

    one = {"weight": np.array([weight])}

    def wrong_mode(_: Any) -> Attack:
        return of_each(lambda seen: case.attack(net.evaluation(seen), smooth(smoothness), args.steps))

    def no_labels(setting: Any) -> Attack:
        return keep_best(
            attacks.dlg(
                net.client_fn,
                num_classes=CLASSES,
                objective_fn=cosine,
                prior_fn=smooth(smoothness, (setting["weight"], net.prior(0))),
                project_fn=box(*case.images.bounds()),
                optimizer=signed_adam(args.steps),
            )
        )

    (wrong,), (unlabelled,) = (solve(case, make, one, args) for make in (wrong_mode, no_labels))
    few = jax.tree.map(lambda leaf: leaf[:8], case.seen._replace(params=()))
    noise = case._replace(seen=control(jax.random.key(2), few)._replace(params=net.params))
    noise = noise._replace(truth=jax.tree.map(lambda leaf: leaf[:8], case.truth), places=case.places[:8])
    (prior_only,) = solve(noise, lambda setting: matching({**setting, "kind": 0}), one, args)
    rungs += [
        Rung(stage, "Inverting Gradients", "running statistics taken for the batch's", wrong, base),
        Rung(stage, "Inverting Gradients", "labels searched for", unlabelled, base),
        Rung(stage, "the same on random updates (8)", "statistics exact", prior_only, None),
    ]

    def group(setting: Any) -> Attack:
        weights = WEIGHTS | {"statistics_weight": setting["weight"] * WEIGHTS["statistics_weight"]}
        return keep_best(
            attacks.grad_inversion(
                net.client_fn,
                labels.dense("head"),
                statistics_fn=net.statistics_fn,
                known_statistics_fn=lambda seen: kind_of(seen, setting["kind"]),
                num_seeds=2,
                num_steps=args.steps,
                num_warm_up_steps=args.steps // 10,
                bounds=case.images.bounds(),
                **weights,
            )
        )

    settings = {"kind": np.array([0, 0]), "weight": np.array([1.0, 0.0])}
    names = ["statistics exact", "statistics unknown"]
    found = solve(case, group, settings, args)
    attack = "GradInversion, labels inferred"
    return rungs + [Rung(stage, attack, *each, found[0]) for each in zip(names, found, strict=True)]


class Grouped(NamedTuple):
    """A network with group normalisation and its clients: of one step, and of several local ones."""

    apply_fn: ApplyFn
    params: Params

    @classmethod
    def of(cls, stage: str) -> "Grouped":
        """At a stage of its training."""
        if STAGES[stage]:
            apply_fn, params, *_ = train_network(group_norm_net, "cifar10", 0, STAGES[stage])
            return cls(apply_fn, params)
        return cls(*models.functional(group_norm_net((32, 32, 3), CLASSES, rngs=nnx.Rngs(0))))

    def step_fn(self) -> ClientFn:
        """The client of one step."""
        return clients.federated_sgd(clients.cross_entropy(self.apply_fn))

    def averaging(self, rate: Any = RATE, epochs: int = EPOCHS) -> ClientFn:
        """The client of several local steps, whose update is scaled to one gradient by the rate that it announces."""
        return clients.federated_averaging(
            clients.cross_entropy(self.apply_fn),
            learning_rate=rate,
            local_epochs=epochs,
            minibatch_size=MINIBATCH,
            divisor=epochs * LOCAL // MINIBATCH * RATE,
        )

    def case(self, client_fn: ClientFn, number: int, size: int, *, first: int = 0, order: bool = False) -> Case:
        """Its victims, whose labels the server knows, and with `order` in which order the client took them."""

        def see(key: jax.Array, batch: Batch) -> Observation:
            threat = ThreatModel(labels=True, label_order=order)
            return observe(key, threat, client_fn, self.params, batch)._replace(params=())

        return case_of(number, size, first, see, self.params)


def tune_batches(args: argparse.Namespace) -> None:
    """Weights for `batches`, of each size on four clients whose images are no victims."""
    settings = grid(smoothness=[1e-3, 1e-2, 1e-1, 1.0])
    for stage in args.stages:
        net = Grouped.of(stage)
        for size in (1, 4, 16):
            case = net.case(net.step_fn(), 4, size, first=FIRST_TUNING)
            found = solve(
                case,
                lambda s, c=case, n=net: c.attack(n.step_fn(), smooth(s["smoothness"]), args.steps),
                settings,
                args,
            )
            for weight, row in zip(settings["smoothness"], found, strict=True):
                rank, psnr = geometric_mean(row.rank), row.psnr.mean()
                print(f"{stage}, batch {size}, {weight:g}: rank {rank:.0f} (geometric mean), {psnr:.2f} dB", flush=True)


def batches(args: argparse.Namespace) -> None:
    """Labels, sizes of a batch, and what is known of local steps, without batch normalisation."""
    table = Table("batches")
    table.fill(batches_at, args)
    table.write(
        f"GroupNormNet of width 8, {args.victims} clients of CIFAR-10 test images",
        args,
        f"Trained for {STAGES} epochs. Total variation by batch size {SMOOTHNESS_OF_BATCH}, chosen among 4 by the rank "
        "of 4 clients that are no victims, of one step with known labels (`tune_batches`). Inferred labels: counts "
        f"from the bias, with the mean prediction on {PROXY_IMAGES} training images. Local steps: rate {RATE:g}, order "
        "known; a rate that is fitted is searched for with the images. Differences are from batch 1, with labels "
        "inferred from known ones, and of local steps from their own first row.",
    )


def batches_at(stage: str, args: argparse.Namespace) -> list[Rung]:
    """The rows of one stage."""
    net = Grouped.of(stage)
    step_fn = net.step_fn()
    public = data.load("cifar10", split="train", limit=PROXY_IMAGES)
    inputs = jnp.asarray(public.normalize(public.images))
    count = labels.bias_counts(labels.dense("head"), apply_fn=net.apply_fn, public_inputs=inputs)

    def matching(case: Case, client_fn: Any, label_fn: Any = granted_labels) -> Row:
        smoothness = SMOOTHNESS_OF_BATCH[stage][case.places.shape[1]]
        attack = case.attack(client_fn, smooth(smoothness), args.steps, label_fn)
        (row,) = solve(case, lambda setting: attack, {"one": np.zeros(1)}, args)
        return row

    rungs: list[Rung] = []
    for size in (1, 4, 16):
        case = net.case(step_fn, args.victims, size)
        known = matching(case, step_fn)
        rungs.append(Rung(stage, f"batch {size}", "labels known", known, rungs[0].row if rungs else known))
        if size > 1:
            rungs.append(Rung(stage, f"batch {size}", "labels inferred", matching(case, step_fn, count), known))
    local = net.case(net.averaging(), args.victims, LOCAL, order=True)
    known = matching(local, net.averaging())
    found = {
        "learning rate and steps known": known,
        "learning rate taken for twice": matching(local, net.averaging(2 * RATE)),
        "learning rate fitted, from twice": matching(local, clients.with_unknown(net.averaging, guess=2 * RATE)),
        "epochs taken for twice": matching(local, net.averaging(epochs=2 * EPOCHS)),
        "taken for one step": matching(local, step_fn),
    }
    client = f"{EPOCHS} epochs of {LOCAL} in {MINIBATCH}s"
    return rungs + [Rung(stage, client, knowledge, row, known) for knowledge, row in found.items()]


def group_norm_net(input_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """The network of `batches`."""
    return models.GroupNormNet(input_shape, num_classes, width=8, rngs=rngs)


def figure(args: argparse.Namespace) -> None:
    """Draws PSNR and rank of every rung with their intervals, a line of panels a table and a colour a stage."""
    from matplotlib.figure import Figure

    del args
    names = [name for name in ("statistics", "batches") if (record.folder() / f"{name}_victims.csv").exists()]
    picture = Figure(figsize=(13, 7 * len(names)), layout="constrained")
    for panels, name in zip(picture.subplots(len(names), 2, squeeze=False), names, strict=True):
        rows = record.read(f"assumptions/{name}_victims")
        rungs = list(dict.fromkeys(f"{row['attack']}: {row['knowledge']}" for row in rows))
        for panel, score, mean, label in (
            (panels[0], "psnr", np.mean, "PSNR in dB, mean"),
            (panels[1], "rank", geometric_mean, f"rank among {GALLERY:,}, geometric mean"),
        ):
            found: dict[tuple[str, str], list[float]] = {}
            for row in rows:
                key = row["network"], f"{row['attack']}: {row['knowledge']}"
                found.setdefault(key, []).append(float(row[score]))
            for i, stage in enumerate(STAGES):
                own = {rung: np.asarray(found[stage, rung]) for rung in rungs if (stage, rung) in found}
                if own:
                    means = np.asarray([mean(values) for values in own.values()])
                    ends = np.asarray([metrics.bootstrap_interval(values, mean) for values in own.values()]).T
                    height = 0.2 * (1 - i) - np.asarray([rungs.index(rung) for rung in own])
                    panel.errorbar(means, height, xerr=np.abs(ends - means), fmt="o", label=stage, capsize=3)
            panel.set_yticks(-np.arange(len(rungs)), rungs if score == "psnr" else [""] * len(rungs))
            if score == "rank":
                panel.set(xscale="log", xlim=(10, GALLERY))
                panel.axvline(GALLERY / np.e, color="grey", linestyle="dashed", label="chance")  # of uniform ranks
            panel.set_xlabel(f"{label} and 95 % interval")
            panel.grid(axis="x", alpha=0.3)
        panels[1].legend()
    picture.savefig(record.folder() / "ladder.png", dpi=110)


def geometric_mean(values: np.ndarray) -> float:
    """The mean of ranks, which differ by factors."""
    return float(np.exp(np.log(values).mean()))


class Table:
    """Rows of a ladder, and their differences from the attacker that knows everything."""

    def __init__(self, name: str) -> None:
        self.name, self.rows, self.victims = name, [], []
        self.differences: dict[tuple[str, ...], np.ndarray] = {}

    def fill(self, of_stage: Callable[[str, argparse.Namespace], list[Rung]], args: argparse.Namespace) -> None:
        """Adds the rungs of every stage, each in a process of its own: small networks leave a second core idle."""
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            for rungs in pool.map(of_stage, args.stages, [args] * len(args.stages)):
                self.add(rungs)

    def add(self, rungs: list[Rung]) -> None:
        """Adds the rungs of one stage."""
        for stage, attack, knowledge, row, base in rungs:
            key = (stage, attack, knowledge)
            names = dict(zip(("network", "attack", "knowledge"), key, strict=True))
            figures = {
                "PSNR": record.interval(row.psnr, np.mean, ".2f"),
                "images at 20 dB": f"{np.mean(row.share):.0%}",
                "median rank": f"{np.median(row.rank):.0f}",
                "in the first 100": record.interval(100 * (row.rank <= 100), np.mean, ".0f"),
                "labels right": f"{np.mean(row.labels):.0%}",
                "s a victim": f"{row.seconds / len(row.psnr):.1f}",
            }
            self.rows.append(names | figures)
            if base is not None and row is not base:
                self.differences[*key, "PSNR against the first row"] = row.psnr - base.psnr
                self.differences[*key, "log2 of the rank against it"] = np.log2(row.rank) - np.log2(base.rank)
            self.victims += [
                names | {"victim": v, "psnr": f"{psnr:.3f}", "rank": f"{rank:.0f}"}
                for v, (psnr, rank) in enumerate(zip(row.psnr, row.rank, strict=True))
            ]

    def write(self, title: str, args: argparse.Namespace, notes: str) -> None:
        """Writes the table."""
        gains = record.gains(self.differences)
        columns = list(dict.fromkeys(key[-1] for key in self.differences))

        def compared(row: dict[str, str]) -> dict[str, str]:
            key = tuple(row[name] for name in ("network", "attack", "knowledge"))
            return row | {column: gains.get((*key, column), "-") for column in columns}

        rows = [compared(row) for row in self.rows]
        record.write(
            self.name,
            title,
            rows,
            f"{notes}\n\n{args.steps} steps, 1 start, seed 1, the iterate of the attacker's lowest loss. PSNR is the "
            "mean of a victim's images and then over victims, with an interval of 95 %; differences are paired, with "
            f"p-values corrected by Holm over the {len(self.differences)} of this table. Rank among {GALLERY:,} test "
            f"images, 5,000 by chance; the share in the first 100 in per cent.\n\nThreat model: {PRIVATE}.",
            victims=self.victims,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--victims", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200, help="of an attack")
    parser.add_argument("--keep", type=Path, help="folder for the state of a run")
    run_parts(parser, tune, tune_batches, statistics, batches, figure)


if __name__ == "__main__":
    main()
