"""Graphs: what matching of gradients finds of molecules, how long a step takes, and which noise stops which attack.

    python benchmarks/graphs.py [weights] [matching] [lanes] [noise] [features] [--graphs N] [--width N] [--steps N]
                                [--restarts N]

Needs $GIA_JAX_DATA_DIR/graphs with MUTAG.zip, PTC_MR.zip, AIDS.zip and ENZYMES.zip of TUDataset. `weights` tries GLG's
priors on graphs that are public, `matching` compares three attacks that search features and edges together with guesses
whose nodes are matched alike, `lanes` times a step of one of them, and `noise` measures the exact attack by spans and
the features by matching under growing noise, that of DP-SGD included. `features` does so for GLG with strong priors.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from flax import nnx
from jaxtyping import Array, PRNGKeyArray
from parts import run_parts

from gia_jax import (
    Attack,
    Batch,
    Observation,
    ThreatModel,
    attacks,
    clients,
    control,
    data,
    defenses,
    gradient_matching,
    metrics,
    modalities,
    models,
    observe,
    run,
)
from gia_jax.attacks.graph_spans import Limits, as_reconstruction
from gia_jax.base import ClientFn, Params
from gia_jax.cli.outcomes import joined
from gia_jax.data.graphs import GraphData
from gia_jax.matching import adaptive
from gia_jax.matching.objectives import euclidean
from gia_jax.matching.optimizers import step_schedule
from gia_jax.modalities import Modality
from gia_jax.modalities.graph_guesses import graph_guesses
from gia_jax.models.functional import ApplyFn
from gia_jax.models.layers import symmetric_uniform
from gia_jax.sweep.study import study

# Node MSE of the attack "Inverting Gradients" in a table whose features, scaling and matching could not be read.
PUBLISHED = {"mutag": 0.9164, "ptc_mr": 0.9154, "aids": 0.8535, "enzymes": 1.1449}
THREAT = ThreatModel(labels=True, inputs=("mask",))
STRUCTURE = ThreatModel(labels=True, inputs=("mask", "adjacency"))
NUM_PUBLIC, MAX_NODES, BIAS = 100, 20, 0.3
WITHOUT_TRUTH = ("mean graph", "random graph")
LANES = (1, 16, 64, 256)
LEVELS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 3.0, 10.0, 30.0, 100.0)
NUM_TUNING, WIDTH = 8, 300
TUNING, REST = slice(NUM_TUNING), slice(NUM_TUNING, None)
WIDE = [("mutag", WIDTH)]
WEIGHTS = tuple(itertools.product((0.0, 1e-5, 1e-4, 1e-3), (0.0, 1e-5, 1e-4, 1e-3), (0.0, 1e-4, 1e-3)))
LIMITS = Limits(completions=2, counts=2, seconds=1.0)  # or noise costs a graph minutes
NUM_NOISY, DELTA = 10, 1e-5
LANES_NOISY, STRONG = 60, 1e-3
MULTIPLIERS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # of DP-SGD
SCORES = {
    "node_mse": ("node MSE", ".4f"),
    "propagated_mse": ("propagated MSE", ".4f"),
    "nodes": ("nodes right", ".2f"),
    "edges": ("edge AUC", ".3f"),
    "edge_ap": ("edge AP", ".3f"),
}


class Case(NamedTuple):
    """Graphs of one set as victims, batches of one; public graphs; and the clients' network."""

    graphs: GraphData
    modality: Modality
    client_fn: ClientFn
    apply_fn: ApplyFn
    params: Params
    truth: Batch
    public: Batch


def case_of(name: str, count: int, width: int) -> Case:
    """The first graphs of a set are victims, and the next `NUM_PUBLIC` are public."""
    graphs = data.load_graphs(name, max_nodes=MAX_NODES, limit=count + NUM_PUBLIC)
    features = sum(len(block.names) for block in graphs.blocks)
    module = models.GCN(
        features, len(graphs.class_names), widths=(width,) * 2, bias_init=symmetric_uniform(BIAS), rngs=nnx.Rngs(0)
    )
    apply_fn, params = models.functional(module)
    arrays = {part: jnp.asarray(array) for part, array in graphs.inputs().items()}
    every = Batch({part: array[:, None] for part, array in arrays.items()}, jnp.asarray(graphs.labels)[:, None])
    return Case(
        graphs,
        modalities.graph(graphs.blocks, MAX_NODES, grants=("mask",)),
        clients.federated_sgd(clients.cross_entropy(apply_fn)),
        apply_fn,
        params,
        jax.tree.map(lambda leaf: leaf[:count], every),
        jax.tree.map(lambda leaf: leaf[count:], every),
    )


def see(case: Case, threat: ThreatModel = THREAT) -> Observation:
    """What the server sees of every victim, in one."""

    def of_one(key: PRNGKeyArray, batch: Batch) -> Observation:
        return observe(key, threat, case.client_fn, case.params, batch)._replace(params=())

    keys = jax.random.split(jax.random.key(1), len(case.truth.labels))
    return jax.jit(jax.vmap(of_one))(keys, case.truth)._replace(params=case.params)


def attacks_of(case: Case, num_steps: int) -> dict[str, Attack]:
    """The three attacks, all by Adam with the same schedule, with the labels that are granted."""
    adam = optax.adam(step_schedule(0.1, num_steps))
    matched = case.modality.matching()
    return {
        "L2": gradient_matching(case.client_fn, **matched, objective_fn=euclidean, optimizer=adam),
        "cosine": attacks.inverting_gradients(case.client_fn, **matched, num_steps=num_steps, optimizer=adam),
        "GLG": glg(case, num_steps),
    }


def glg(case: Case, num_steps: int, client_fn: ClientFn | None = None, **settings: Any) -> Attack:
    """Builds GLG for the graphs of a case. It assumes `client_fn`, or with None the client of the case."""
    return attacks.glg(
        case.client_fn if client_fn is None else client_fn,
        blocks=case.graphs.blocks,
        max_nodes=MAX_NODES,
        num_steps=num_steps,
        **{"grants": ("mask",)} | settings,
    )


def matching(args: argparse.Namespace) -> None:
    """Features and edges by joint matching, beside guesses whose nodes are matched alike."""
    with ThreadPoolExecutor(2) as pool:  # compiling is most of the work
        every = dict(zip(PUBLISHED, pool.map(partial(matched, args=args), PUBLISHED)))
    rows, of_victims = [], []
    for name, (scores, losses, ids) in every.items():
        rows += matching_rows(name, scores, losses)
        for i, graph in enumerate(ids):
            own = {f"{what}, {key}": f"{one[key][i]:.5g}" for what, one in scores.items() for key in SCORES}
            of_victims.append({"set": name, "graph": graph} | own)
    none = {name: int(np.isnan(scores["GLG"]["edges"]).sum()) for name, (scores, _, _) in every.items()}
    lacking = ", ".join(f"{number} of {name}" for name, number in none.items() if number)
    record.write(
        "matching",
        "Features and edges of graphs by joint matching of a GCN's gradient, beside guesses without a gradient",
        rows,
        f"The first {args.graphs} graphs of each set with at most {MAX_NODES} nodes, batch 1. Features are one-hot "
        "labels and one-hot degrees of the nodes, not scaled; the network is an untrained GCN of two layers of width "
        f"{args.width}, ReLU, mean, biases from U(-{BIAS}, {BIAS}). Model and attack seeds 0 and 2, {args.restarts} "
        f"restarts of which the lowest loss is kept, {args.steps} steps of Adam at .1, lowered at 3/8, 5/8 and 7/8 of "
        "them (GLG: edges at .01). L2 is DLG's distance, cosine that of Inverting Gradients; GLG is cosine, smoothness "
        "and sparsity, edges in [0, 1]. Nodes are matched to the true ones first, of attacks and guesses alike, which "
        "makes all figures better. Node MSE is that of the features; propagated, of their averages over a node and "
        "its neighbours; nodes right, the share with all features right; edges are scored over pairs of nodes, "
        f"where some are edges and some are not (not so in {lacking or 'none'}). Means, "
        "with the percentile bootstrap interval of 95 % over graphs. GLG has the default weights of its priors, which "
        "were chosen on public graphs (`weights`); L2 and cosine have no priors.\n\n"
        f"Guesses: from the next {NUM_PUBLIC} graphs of the set. The mean graph has their mean features at every node, "
        "and their density for every edge; the random graph draws both; the nearest one is chosen with the truth, so "
        "nobody can guess it. Random update: the attack on noise of the update's norm, layer by layer. The gains are "
        "paired differences, below 0 (MSE) and above 0 (AUC) where the attack is better, to that of the mean and "
        "the random graph that is better on average, and to the nearest graph; 'none' where the interval covers 0.\n\n"
        "Published, setting unread: a row of a table that we have not read but for this cell, with features, scaling "
        "and matching unknown; it is above what zeros have for one-hot labels, and no target.\n\n"
        f"Threat model: {THREAT.describe()}, and which columns are one-hot.",
        victims=of_victims,
    )


def matched(
    name: str, args: argparse.Namespace
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], list[str]]:
    """Scores of attacks and guesses on one set, the attacks' losses, and the names of the graphs."""
    case = case_of(name, args.graphs, args.width)
    seen = see(case)
    noises = control(jax.random.key(3), seen)
    found, losses = {}, {}
    for what, attack in attacks_of(case, args.steps).items():
        # Beside the clients' updates go noises of their norms, in the same program.
        parts = {what: seen} | ({f"{what}, random update": noises} if what == "cosine" else {})
        out = study(
            attack,
            jax.random.key(2),
            joined(list(parts.values())),
            num_steps=args.steps,
            num_restarts=args.restarts,
            lanes=args.graphs * args.restarts,
        )
        print(name, what, out.timing, flush=True)
        for place, part in enumerate(parts):
            own = slice(place * args.graphs, (place + 1) * args.graphs)
            found[part] = jax.tree.map(lambda leaf: leaf[own], out.reconstruction.batch)  # noqa: B023
            losses[part] = np.asarray(out.reconstruction.loss[own])
    batches = found | graph_guesses(case.truth, case.public)
    scores = {what: scores_of(case, batch, case.truth) for what, batch in batches.items()}
    return scores, losses, list(case.graphs.ids[: args.graphs])


def matching_rows(
    name: str, scores: dict[str, dict[str, np.ndarray]], losses: dict[str, np.ndarray]
) -> list[dict[str, str]]:
    """The rows of one set: attacks, guesses, and what was published."""
    least = min(WITHOUT_TRUTH, key=lambda bar: np.nanmean(scores[bar]["node_mse"]))
    most = max(WITHOUT_TRUTH, key=lambda bar: np.nanmean(scores[bar]["edges"]))
    rows = []
    for what, one in scores.items():
        row = {"set": name, "what": what} | {
            heading: record.interval(one[key][~np.isnan(one[key])], np.mean, form)
            for key, (heading, form) in SCORES.items()
        }
        whole = {"colors": "same colours", "exact": "exact"}
        row |= {heading: f"{np.sum(one[key] == 1):.0f}" for key, heading in whole.items()}
        for key, heading, form, best in (("node_mse", "MSE", "+.4f", least), ("edges", "AUC", "+.3f", most)):
            for bar, guess in (("best guess", best), ("nearest graph", "nearest graph")):
                values = one[key] - scores[guess][key]
                row[f"{heading} - {bar}"] = difference(values[~np.isnan(values)], form) if what in losses else "-"
        rows.append(row | {"loss": f"{np.mean(losses[what]):.1e}" if what in losses else "-"})
    published = {"what": "published, setting unread", "node MSE": f"{PUBLISHED[name]:.4f}"}
    return [*rows, dict.fromkeys(rows[0], "-") | {"set": name} | published]


def difference(values: np.ndarray, form: str) -> str:
    """A mean of paired differences with its interval, called none where that covers 0."""
    text = record.interval(values, np.mean, form)
    low, high = (float(end) for end in text[text.index("[") + 1 : -1].split(","))
    return text + (": none" if low <= 0 <= high else "")


def weights(args: argparse.Namespace) -> None:
    """Scores the edges and nodes that GLG finds of public graphs, by the weights of its priors."""
    every = {(name, width): tuned(name, width, args) for name, width in [(n, args.width) for n in PUBLISHED] + WIDE}
    guesses = WITHOUT_TRUTH
    found = {  # a value for each row and each graph of all settings
        key: np.concatenate([np.stack([one[key] for one in scores]) for scores in every.values()], 1)
        for key in ("node_mse", "edges", "edge_f1")
    }
    highest = np.argmax(found["edge_f1"][len(guesses) :].mean(1)) + len(guesses)
    rows = []
    for i, what in enumerate([*guesses, *WEIGHTS]):
        names = ("smoothness", "sparsity", "binarity")
        row = dict(zip(names, [what, "-", "-"] if isinstance(what, str) else [f"{weight:g}" for weight in what]))
        row["node MSE"] = record.interval(found["node_mse"][i], np.mean, ".4f")
        row["edge AUC"] = record.interval(found["edges"][i], np.nanmean, ".3f")
        row["edge F1"] = record.interval(found["edge_f1"][i], np.mean, ".3f")
        apart = found["edge_f1"][i] - found["edge_f1"][highest]
        row["F1 - highest"] = "-" if i < len(guesses) or i == highest else difference(apart, "+.3f")
        for (name, width), scores in every.items():
            own = scores[i]
            row[f"{name}, {width}"] = f"{own['node_mse'].mean():.3f}, {np.nanmean(own['edges']):.2f}"
        rows.append(row)
    record.write(
        "weights",
        "Weights of GLG's priors on public graphs: edges against nodes",
        rows,
        f"The first {NUM_TUNING} of the {NUM_PUBLIC} public graphs of each set, none of which is a victim in "
        "`matching` or `noise`: an attacker has them, and computes their gradients itself. Of MUTAG at two widths of "
        f"the network, in all {found['edges'].shape[1]} cases; means with the percentile bootstrap interval of 95 % "
        "over them; in the last columns node MSE and edge AUC of one set and width. "
        f"1 start, {args.steps} steps, network of seed 0, attack of seed 6; guesses from the other public graphs. "
        "F1 is that of the edges above .5. F1 - highest is the paired difference to the highest F1, 'none' where the "
        "interval covers 0. The rule for the defaults: of the weights with both of GLG's priors and no binarity whose "
        "F1 is not told from the highest, those of the lowest node MSE.\n\n"
        f"Threat model: {THREAT.describe()}, and which columns are one-hot.",
    )


def tuned(name: str, width: int, args: argparse.Namespace) -> list[dict[str, np.ndarray]]:
    """Scores two guesses and GLG with all weights on the first public graphs of a set; the guesses use the others."""
    case = case_of(name, args.graphs, width)
    truth, rest = (jax.tree.map(lambda leaf: leaf[part], case.public) for part in (TUNING, REST))  # noqa: B023
    seen = see(case._replace(truth=truth))

    def solve(weights: Array, keys: PRNGKeyArray) -> Batch:
        smoothness, sparsity, binarity = weights
        priors = {"smoothness_weight": smoothness, "sparsity_weight": sparsity, "binarity_weight": binarity}
        attack = glg(case, args.steps, **priors)

        def of_one(key: PRNGKeyArray, observation: Observation) -> Batch:
            return run(attack, key, observation._replace(params=case.params))[0].batch

        return jax.vmap(of_one)(keys, seen._replace(params=()))

    keys = jax.random.split(jax.random.key(6), NUM_TUNING)
    found = jax.jit(lambda weights: jax.lax.map(lambda three: solve(three, keys), weights))(jnp.asarray(WEIGHTS))
    guesses = graph_guesses(truth, rest)
    every = [guesses[bar] for bar in WITHOUT_TRUTH]
    every += [jax.tree.map(lambda leaf: leaf[i], found) for i in range(len(WEIGHTS))]  # noqa: B023
    print(name, width, f"{time.process_time():.0f} s of the processor", flush=True)
    return [scores_of(case, batch, truth) for batch in every]


def lanes(args: argparse.Namespace) -> None:
    """Time of a step of the attack by cosine, side by side on several graphs and restarts."""
    case = case_of("mutag", 16, args.width)
    seen, steps, rows = see(case), 50, []
    attack = attacks_of(case, steps)["cosine"]
    for number in LANES:
        place = jnp.arange(number) % 16
        own = jax.tree.map(lambda leaf: leaf[place], seen._replace(params=()))  # noqa: B023

        def solve(keys: PRNGKeyArray, params: Params, observations: Observation) -> Array:
            def of_one(key: PRNGKeyArray, observation: Observation) -> Array:
                return run(attack, key, observation._replace(params=params), num_steps=steps)[0].loss

            return jax.vmap(of_one)(keys, observations)

        keys = jax.random.split(jax.random.key(0), number)
        began = time.perf_counter()
        program = jax.jit(solve).lower(keys, seen.params, own).compile()
        compile_seconds, clocks = time.perf_counter() - began, []
        for _ in range(5):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(keys, seen.params, own))
            clocks.append((time.perf_counter() - wall, time.process_time() - cpu))
        wall, cpu = (1e3 * np.asarray(side) / steps / number for side in zip(*clocks))
        rows.append(
            {
                "lanes": f"{number}",
                "ms a step and graph, wall": f"{np.min(wall):.3f} (median {np.median(wall):.3f})",
                "ms a step and graph, processor": f"{np.min(cpu):.3f} (median {np.median(cpu):.3f})",
                "compile, s": f"{compile_seconds:.1f}",
            }
        )
    record.write(
        "lanes",
        "Time of a step of joint matching of graphs, by how many run side by side",
        rows,
        f"Cosine and Adam on the first 16 graphs of MUTAG of at most {MAX_NODES} nodes, in turn, each with a start of "
        f"its own, under one `vmap`; GCN of two layers of width {args.width}, float32; {steps} steps, the least and "
        "the median of 5 runs after the compilation, with seeds 0. Processor: seconds of all cores together, which "
        f"other work on the machine does not lengthen as it does wall time. Threat model: {THREAT.describe()}.",
    )


class Noisy(NamedTuple):
    """Noisy updates of all victims.

    Attributes:
        name: What was done.
        updates: The updates.
        scales: Standard deviations of the noise, one for each victim.
        level: Their mean in units of the root mean square of an entry of the same update without noise.
    """

    name: str
    updates: Params
    scales: np.ndarray
    level: float


def noisy(case: Case) -> tuple[list[Noisy], list[Noisy], float]:
    """Updates under Gaussian noise of each level and under DP-SGD, in the current precision, and DP-SGD's norm, the
    largest of the public graphs' gradients.
    """

    def plain(batch: Batch) -> Params:
        return case.client_fn(wide(case.params), wide(batch))

    norm = float(jax.jit(jax.vmap(lambda batch: optax.tree.norm(plain(batch))))(case.public).max())

    def gaussian(key: PRNGKeyArray, batch: Batch, scale: Array) -> Params:
        noise, update = defenses.gaussian_noise(key, scale), plain(batch)
        return noise.update(update, noise.init(update))[0]

    def private(key: PRNGKeyArray, batch: Batch, multiplier: Array) -> Params:
        loss_fn = clients.cross_entropy(case.apply_fn)
        client_fn = defenses.dp_sgd(loss_fn, key, norm=norm, noise_multiplier=multiplier)
        return client_fn(wide(case.params), wide(batch))

    clean = jax.jit(jax.vmap(plain))(case.truth)
    size = sum(leaf[0].size for leaf in jax.tree.leaves(clean))
    entry = np.asarray(jax.vmap(optax.tree.norm)(clean)) / np.sqrt(size)  # root mean squares
    of_gaussian, of_private = (jax.jit(jax.vmap(client)) for client in (gaussian, private))

    def of(name: str, scales: np.ndarray, updates: Params) -> Noisy:
        return Noisy(name, updates, scales, float(np.mean(scales / entry)))

    def keys(seed: int) -> PRNGKeyArray:
        return jax.random.split(jax.random.key(seed), NUM_NOISY)

    first = [
        of(f"Gaussian, {level:g}" if level else "none", level * entry, of_gaussian(keys(4), case.truth, level * entry))
        for level in LEVELS
    ]
    second = []
    for multiplier in MULTIPLIERS:
        every = np.full(NUM_NOISY, multiplier)
        epsilon = metrics.epsilon(multiplier, num_rounds=1, delta=DELTA, relation="replace_one")
        name = f"DP-SGD, multiplier {multiplier:g}: epsilon {epsilon:,.{1 if epsilon < 100 else 0}f}"
        second.append(of(name, norm * every, of_private(keys(5), case.truth, jnp.asarray(every))))
    return first, second, norm


def wide(tree: Any) -> Any:
    """Floating-point leaves in the widest type that is enabled."""

    def cast(leaf: Array) -> Array:
        return leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def by_spans(case: Case, client_fn: ClientFn, updates: Params, scales: np.ndarray) -> list[dict[str, float]]:
    """What the attack by spans, which knows the noise, finds of every victim; in float64."""
    sizes, kinds = ([len(block.names) for block in case.graphs.blocks], [block.kind for block in case.graphs.blocks])
    results = []
    for i, scale in enumerate(scales):
        batch = jax.tree.map(lambda leaf: leaf[i], case.truth)  # noqa: B023
        update = jax.tree.map(lambda leaf: leaf[i], updates)  # noqa: B023
        threat = ThreatModel(inputs=("mask",))
        seen = observe(jax.random.key(0), threat, lambda *_: update, wide(case.params), wide(batch))  # noqa: B023
        find = attacks.graph_spans(
            client_fn,
            blocks=sizes,
            degree_block=kinds.index("degree"),
            noise=float(scale) if scale else None,
            limits=LIMITS,
        )
        began = time.process_time()
        found = find(seen)
        seconds = time.process_time() - began
        truth = {name: np.asarray(array)[0] for name, array in batch.inputs.items()}
        exact, colors = False, False
        for which in range(len(found.graphs)):
            inputs = as_reconstruction(found, num_nodes=MAX_NODES, which=which).batch.inputs
            one = {name: np.asarray(array)[0] for name, array in inputs.items()}
            scores = metrics.graph_scores(one, truth, case.graphs.blocks)
            exact, colors = exact or scores.is_exact, colors or scores.same_colors
        answered = bool(found.graphs)
        print(i, scale, answered, exact, found.stopped, f"{seconds:.1f} s", flush=True)
        results.append({"answered": answered, "exact": exact, "colors": colors, "seconds": seconds})
    return results


def noise(args: argparse.Namespace) -> None:
    """The noise at which the attack by spans, and the features by matching, end."""
    case = case_of("mutag", NUM_NOISY, WIDTH)
    with jax.enable_x64(True):
        gaussian, private, norm = noisy(case)
        client_fn = jax.jit(case.client_fn)
        spans: list[list[dict[str, float]]] = []
        for one in [*gaussian, *private]:  # from the least noise to the most
            ended = any(not any(found["answered"] for found in results) for results in spans)
            spans.append([] if ended else by_spans(case, client_fn, one.updates, one.scales))
    clipping = defenses.dp_sgd(clients.cross_entropy(case.apply_fn), jax.random.key(0), norm=norm, noise_multiplier=0.0)
    likelihood, known = adaptive.relative(euclidean), STRUCTURE.inputs
    of_known = case._replace(modality=modalities.graph(case.graphs.blocks, MAX_NODES, grants=known))
    by_attack = [
        {
            "GLG": by_matching(case, glg(case, args.steps), levels),
            "GLG that knows the noise": by_matching(
                case, glg(case, args.steps, client_fn, objective_fn=likelihood), levels
            ),
            "structure known": by_matching(of_known, glg(case, args.steps, grants=known), levels, STRUCTURE),
        }
        for levels, client_fn in ((gaussian, case.client_fn), (private, clipping))
    ]
    guesses = {
        what: scores_of(case, batch, case.truth)
        for what, batch in graph_guesses(case.truth, case.public).items()
        if what in WITHOUT_TRUTH
    }
    best = min(guesses, key=lambda what: guesses[what]["node_mse"].mean())
    guess, placed = guesses[best], scores_of(of_known, by_degree(case), case.truth)
    rows = []
    for j, (one, results) in enumerate(zip([*gaussian, *private], spans)):
        part, place = (0, j) if j < len(gaussian) else (1, j - len(gaussian))
        counted: dict[str, Callable[[dict[str, float]], float]] = {
            "spans: exact": lambda found: found["exact"],
            "up to colours": lambda found: found["colors"],
            "wrong answer": lambda found: found["answered"] and not found["colors"],
            "no answer": lambda found: not found["answered"],
        }
        row = {"noise": one.name, "of an entry": f"{one.level:.3g}"} | {
            heading: f"{sum(map(count, results))}" if results else "not run" for heading, count in counted.items()
        }
        row["processor s, median"] = f"{np.median([found['seconds'] for found in results]):.2f}" if results else "-"
        for what, scores in by_attack[part].items():
            own, bar = scores[place], placed if what == "structure known" else guess
            row[f"{what}: node MSE"] = record.interval(own["node_mse"], np.mean, ".4f")
            row[f"{what}: - best guess"] = difference(own["node_mse"] - bar["node_mse"], "+.4f")
        for what in ("GLG", "GLG that knows the noise"):
            own = by_attack[part][what][place]
            row[f"{what}: edge AUC - best guess"] = difference(own["edges"] - guess["edges"], "+.3f")
        rows.append(row)
    record.write(
        "noise",
        "Graphs under noise and DP-SGD: the exact attack by spans, and features by matching",
        rows,
        f"The first {NUM_NOISY} graphs of MUTAG with at most {MAX_NODES} nodes, batch 1; one-hot labels and degrees; "
        f"untrained GCN of two layers of width {WIDTH}, ReLU, mean, biases from U(-{BIAS}, {BIAS}), seed 0. Noise is "
        "Gaussian on every entry, and is given in units of the root mean square of an entry of the same update, of "
        "DP-SGD the mean of them. Spans: of "
        f"{NUM_NOISY} graphs, in float64; the attack knows the noise's standard deviation; exact where one of the "
        "graphs that it returns is the client's, up to colours where one has the same trees of two hops, which is all "
        f"that the network tells; {LIMITS.seconds:g} s for an integer programme, {LIMITS.counts} solutions and "
        f"{LIMITS.completions} completions of a span at most; it is not run above the least noise at which it answers "
        f"for no graph. Matching: GLG in float32, {args.steps} steps, 1 start, seed 2, by cosine; the one that knows "
        "the noise compares by the likelihood, the squared distance divided by the squared length of the update, and "
        "clips as DP-SGD does; structure known: by cosine, with the edges granted. Means with intervals of 95 % over "
        "graphs; differences are paired, "
        f"'none' where the interval covers 0. The better of two guesses, matched alike, is the {best}, with node MSE "
        f"{guess['node_mse'].mean():.4f} and edge AUC {guess['edges'].mean():.3f}. With the structure known nodes stay "
        f"in their places, and the guess is the mean of the public nodes of the same degree, "
        f"{placed['node_mse'].mean():.4f}. "
        f"DP-SGD clips a graph's gradient at {norm:.2f}, the largest norm of {NUM_PUBLIC} public ones; epsilon is that "
        f"of one round, one graph replaced, at delta {DELTA:g}.\n\n"
        f"Threat model: spans, {ThreatModel(inputs=('mask',)).describe()}; matching, {THREAT.describe()}; structure "
        f"known, {STRUCTURE.describe()}.",
    )


def features(args: argparse.Namespace) -> None:
    """Scores the features that GLG with strong priors finds under growing noise. Such priors leave hardly any edge."""
    case = case_of("mutag", NUM_NOISY, WIDTH)
    with jax.enable_x64(True):
        gaussian, private, norm = noisy(case)
    levels = [one for one in [*gaussian, *private] if not one.level or one.level >= 0.5]
    found = by_matching(case, glg(case, args.steps, smoothness_weight=STRONG, sparsity_weight=STRONG), levels)
    guesses = graph_guesses(case.truth, case.public)
    every = {what: scores_of(case, guesses[what], case.truth) for what in WITHOUT_TRUTH}
    best = min(every, key=lambda what: every[what]["node_mse"].mean())
    rows = [
        {
            "noise": one.name,
            "of an entry": f"{one.level:.3g}",
            "node MSE": record.interval(own["node_mse"], np.mean, ".4f"),
            "node MSE - best guess": difference(own["node_mse"] - every[best]["node_mse"], "+.4f"),
            "node MSE - without noise": difference(own["node_mse"] - found[0]["node_mse"], "+.4f") if i else "-",
            "nodes right": record.interval(own["nodes"], np.mean, ".2f"),
        }
        for i, (one, own) in enumerate(zip(levels, found))
    ]
    record.write(
        "features",
        "Features of graphs under noise and DP-SGD, by GLG with strong priors",
        rows,
        f"As in the table `noise` (the same {NUM_NOISY} graphs of MUTAG, network of width {WIDTH}, noise, epsilon and "
        f"norm {norm:.2f}), but smoothness and sparsity of GLG weigh {STRONG:g} each, at which features are better and "
        f"there is hardly an edge. GLG does not know of the noise; {args.steps} steps, 1 start, seed 2. Means with "
        f"intervals of 95 % over graphs; differences are paired, 'none' where the interval covers 0. The better of two "
        f"guesses, matched alike, is the {best}, with node MSE {every[best]['node_mse'].mean():.4f} and "
        f"{every[best]['nodes'].mean():.2f} of nodes right.\n\nThreat model: {THREAT.describe()}.",
    )


def by_matching(
    case: Case, attack: Attack, levels: Sequence[Noisy], threat: ThreatModel = THREAT
) -> list[dict[str, np.ndarray]]:
    """Scores an attack on the victims' updates at each level of noise."""
    seen = see(case, threat)
    together = joined([seen._replace(update=narrow(one.updates)) for one in levels])
    found = study(attack, jax.random.key(2), together, lanes=LANES_NOISY)
    print(found.timing, flush=True)
    parts = [slice(i * NUM_NOISY, (i + 1) * NUM_NOISY) for i in range(len(levels))]
    batches = [jax.tree.map(lambda leaf: leaf[part], found.reconstruction.batch) for part in parts]  # noqa: B023
    return [scores_of(case, batch, case.truth) for batch in batches]


def scores_of(case: Case, batch: Batch, truth: Batch) -> dict[str, np.ndarray]:
    """Scores of batches of one graph."""
    return {key: values[:, 0] for key, values in case.modality.score_fn(batch, truth).scores.items()}


def by_degree(case: Case) -> Batch:
    """Guesses the features of the victims' nodes: the mean of the public nodes of the same degree, or else of all."""
    public, inputs = case.public.inputs, case.truth.inputs
    there = np.asarray(public["mask"]) > 0
    rows, degrees = np.asarray(public["nodes"])[there], np.asarray(public["adjacency"]).sum(-1)[there].astype(int)
    own = np.asarray(inputs["adjacency"]).sum(-1).astype(int)
    means = {degree: rows[degrees == degree].mean(0) for degree in np.unique(degrees)}
    nodes = np.stack([means.get(degree, rows.mean(0)) for degree in own.ravel()]).reshape(*own.shape, -1)
    return Batch(inputs | {"nodes": nodes * np.asarray(inputs["mask"])[..., None]}, case.truth.labels)


def narrow(tree: Params) -> Params:
    """Floating-point leaves in float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float32), tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=24, help="victims of each set")
    parser.add_argument("--width", type=int, default=64, help="of the network's layers, in `matching` and `lanes`")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--restarts", type=int, default=4)
    run_parts(parser, weights, matching, lanes, noise, features)


if __name__ == "__main__":
    main()
