"""How many graphs a gradient of a GCN gives away exactly: spans and counting, on MUTAG, PTC_MR, AIDS and ENZYMES.

    python benchmarks/graph_spans.py [exact|batches] [--data NAME ...] [--settings NAME ...] [--graphs N]
        [--first N] [--draws N] [--trees N] [--table NAME] [--forecast NAME]

* exact: the graphs that are found, for each set and each setting of the network. With `--forecast` another table
  compares the forecasts of `graph_identifiability` with the results.
* batches: the stars and trees that the spans of a mean gradient of several graphs keep.

The first 40 graphs of MUTAG, PTC_MR and AIDS in the order that is drawn are those that the attack was written on; by
default others are attacked.

Needs the extra `demo`, and the zip files of the sets in $GIA_JAX_DATA_DIR/graphs.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # times of one core
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import scipy.optimize
from flax import nnx
from training import train, uniform

from gia_jax import Batch, ThreatModel, attacks, clients, data, models, observe
from gia_jax.attacks.graph_spans import FoundGraph, GraphSpans, Limits
from gia_jax.attacks.graph_spans.candidates import all_trees, known_rows, num_trees, possible_types
from gia_jax.attacks.graph_spans.found import nothing
from gia_jax.attacks.graph_spans.network import layers
from gia_jax.attacks.graph_spans.pooled import Pooled
from gia_jax.attacks.graph_spans.stages import Known, equations, kept_stars
from gia_jax.metrics import isomorphism, same_colors
from gia_jax.models.layers import symmetric_uniform

jax.config.update("jax_enable_x64", True)

MAX_NODES = 30
THREAT = ThreatModel()
LEVELS = ("types", "stars", "trees")


class Setting(NamedTuple):
    """A network, its features, and what happens to the update."""

    features: tuple[data.graphs.Kind, ...] = ("label", "degree")
    width: int = 300
    bias: float = 0.3
    use_bias: bool = True
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    readout: Any = "mean"
    activate_last: bool = True
    dtype: Any = jnp.float64
    noise: float | None = None  # relative to the root mean square of the update
    num_nodes: bool = False
    min_cycle: int = 3
    connected: bool = False
    max_graphs: int = 16
    max_trees: int = 3000
    shift: float = 0.0  # of the biases
    trained: bool = False


SETTINGS = {
    "plain": Setting(),
    "label only": Setting(features=("label",)),
    "label only, all ties": Setting(features=("label",), max_graphs=200),
    "float32": Setting(dtype=jnp.float32),
    "no biases": Setting(use_bias=False),
    "biases 0": Setting(bias=0.0),
    "sum": Setting(readout="sum"),
    "tanh": Setting(activation=jnp.tanh),
    "n known": Setting(num_nodes=True),
    "molecules": Setting(connected=True, min_cycle=5),
    "GRAIN": Setting(readout="nodewise", activate_last=False, use_bias=False),
    "width 128": Setting(width=128),
    "width 64": Setting(width=64),
    "width 32": Setting(width=32),
    "width 16": Setting(width=16),
    "trained": Setting(trained=True),
    "label only, biases 0": Setting(features=("label",), bias=0.0),
    "dead": Setting(shift=-0.25),
    "linear last layer": Setting(activate_last=False),
    "noise 1e-6": Setting(noise=1e-6),
    "noise 1e-5": Setting(noise=1e-5),
    "noise 1e-4": Setting(noise=1e-4),
    "noise 1e-3": Setting(noise=1e-3),
}

Labelled = tuple[np.ndarray, np.ndarray]


class Victims(NamedTuple):
    """Graphs with a network that is attacked."""

    graphs: data.GraphData
    chosen: np.ndarray
    params: Any
    client_fn: Any
    blocks: list[int]
    degree_block: int | None
    max_degree: int
    accuracy: float | None

    def graph(self, i: int) -> Labelled:
        """Adjacency and kinds of the nodes, as the metrics take them."""
        size = int(self.graphs.mask[i].sum())
        return self.graphs.adjacency[i, :size, :size] > 0, self.graphs.nodes[i, :size, : self.blocks[0]].argmax(1)

    def found(self, graph: FoundGraph) -> Labelled:
        """The same of a graph that was found."""
        return graph.adjacency > 0, graph.nodes[:, : self.blocks[0]].argmax(1)


def victims(name: str, setting: Setting, chosen: slice, draw: int) -> Victims:
    """Draws graphs and a network, and trains the network on the set if `setting.trained`."""
    graphs = data.load_graphs(name, features=setting.features, max_nodes=MAX_NODES)
    module = models.GCN(
        graphs.nodes.shape[-1],
        len(graphs.class_names),
        widths=(setting.width, setting.width),
        activation=setting.activation,
        activate_last=setting.activate_last,
        use_bias=setting.use_bias,
        readout=setting.readout,
        bias_init=lambda *args: symmetric_uniform(setting.bias)(*args) + setting.shift,
        rngs=nnx.Rngs(draw),
    )
    apply_fn, params = models.functional(module)
    accuracy = None
    if setting.trained:
        params, accuracy = trained(apply_fn, params, graphs, draw)
    kinds = [block.kind for block in graphs.blocks]
    return Victims(
        graphs,
        np.random.default_rng(0).permutation(len(graphs.labels))[chosen],
        jax.tree.map(lambda leaf: leaf.astype(setting.dtype), params),
        jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn))),
        [len(block.names) for block in graphs.blocks],
        kinds.index("degree") if "degree" in kinds else None,
        int(graphs.adjacency.sum(2).max()),
        accuracy,
    )


def trained(apply_fn: Any, params: Any, graphs: data.GraphData, draw: int) -> tuple[Any, float]:
    """Trains a network on all graphs of a set in 50 epochs by Adam, and returns its accuracy on them."""
    examples = Batch(jax.tree.map(jnp.asarray, graphs.inputs()), jnp.asarray(graphs.labels))
    make_client = lambda key: clients.federated_sgd(clients.cross_entropy(apply_fn))  # noqa: E731
    num_steps, key = 50 * len(graphs.labels) // 64, jax.random.key(draw)
    run = jax.jit(partial(train, make_client, optax.adam(1e-2), uniform(64), num_steps=num_steps))
    params = run(params, key, examples)
    return params, float(jnp.mean(jnp.argmax(jax.jit(apply_fn)(params, examples.inputs), -1) == examples.labels))


def _limits(setting: Setting) -> Limits:
    return Limits(graphs=setting.max_graphs, counts=max(4, setting.max_graphs // 4), trees=setting.max_trees)


def attacked(those: Victims, setting: Setting, i: int) -> tuple[GraphSpans, float]:
    """Attacks a graph, and measures the time of one core in seconds."""
    inputs = {name: jnp.asarray(array, setting.dtype) for name, array in those.graphs.inputs([i]).items()}
    batch = Batch(inputs, jnp.asarray(those.graphs.labels[[i]]))
    seen = observe(jax.random.key(0), THREAT, those.client_fn, those.params, batch)
    noise = None
    if setting.noise is not None:
        leaves = jax.tree.leaves(seen.update)
        total = sum(float(jnp.sum(jnp.square(leaf))) for leaf in leaves)
        noise = setting.noise * np.sqrt(total / sum(leaf.size for leaf in leaves))
        rng = np.random.default_rng(i)
        seen = seen._replace(update=jax.tree.map(lambda leaf: leaf + noise * rng.normal(size=leaf.shape), seen.update))
    if setting.num_nodes:
        seen = seen._replace(extra={**seen.extra, "inputs": {"mask": inputs["mask"]}})
    attack = attacks.graph_spans(
        those.client_fn,
        blocks=those.blocks,
        degree_block=those.degree_block,
        max_degree=those.max_degree,
        activation=setting.activation,
        activate_last=setting.activate_last,
        readout=setting.readout,
        connected=setting.connected,
        min_cycle=setting.min_cycle,
        noise=noise,
        limits=_limits(setting),
    )
    start = time.process_time()
    found = attack(seen)
    return found, time.process_time() - start


def measured(those: Victims, setting: Setting, i: int) -> dict[str, Any]:
    """Attacks a graph, and compares what was found with it."""
    found, seconds = attacked(those, setting, i)
    truth, answers = those.graph(i), [those.found(graph) for graph in found.graphs]
    places = [k for k, answer in enumerate(answers) if isomorphism(answer, truth) is not None]
    any_same, size = any(same_colors(answer, truth, hops=2) for answer in answers), len(truth[0])
    forecast = attacks.graph_identifiability(
        those.params,
        np.asarray(those.graphs.nodes[i, :size], float),
        np.asarray(those.graphs.adjacency[i, :size, :size], float),
        int(those.graphs.labels[i]),
        blocks=those.blocks,
        degree_block=those.degree_block,
        max_degree=those.max_degree,
        max_nodes=None if setting.num_nodes else MAX_NODES,
        activation=setting.activation,
        activate_last=setting.activate_last,
        readout=setting.readout,
        limits=_limits(setting),
    )
    return {
        "graph": those.graphs.ids[i],
        "nodes": size,
        "same trees": any_same,
        "in the list": bool(places),
        "first": places[:1] == [0],
        "answers": len(answers),
        "seconds": seconds,
        "forecast": forecast.is_recoverable,
        "why not": why_not(forecast, found) if not any_same else "",
        "stopped": found.stopped,
    }


def why_not(forecast: attacks.GraphIdentifiability, found: GraphSpans) -> str:
    """Names the condition that explains why a graph's trees were not found."""
    if forecast.is_recoverable:
        return f"not foreseen ({found.stopped.split(':')[0]})"
    if forecast.num_counts:
        return "other numbers of trees explain it"
    if "limits.stars" in forecast.reason:
        return "too many stars"
    if not forecast.num_kept:
        return "stars lost" if forecast.gradient_rank else "gradient 0"
    return "too many trees" if "limits.trees" in forecast.reason else "numbers of trees open"


def over_graphs(found: list[dict[str, Any]], share: str, draws: int) -> str:
    """Writes a share with its interval over graphs, each of which was attacked with every network."""
    return record.interval(np.asarray([one[share] for one in found], float).reshape(draws, -1).mean(0), np.mean, ".0%")


def counted(reasons: Iterable[str]) -> str:
    """Writes how often each reason occurs, the most frequent first."""
    return "; ".join(f"{number} {reason}" for reason, number in Counter(reasons).most_common()) or "none"


def exact(args: argparse.Namespace) -> None:
    """Attacks single graphs, and writes the table of what is found."""
    rows, every = [], []
    for key in args.settings:
        for name in args.data:
            setting = SETTINGS[key]._replace(max_trees=args.trees)
            chosen, found, accuracies = slice(args.first, args.first + args.graphs), [], []
            for draw in range(args.draws):
                those = victims(name, setting, chosen, draw)
                found += [{"draw": draw} | measured(those, setting, int(i)) for i in those.chosen]
                accuracies.append(those.accuracy)
            every += [{"setting": key, **one} for one in found]
            seconds = [one["seconds"] for one in found]
            rows.append(
                {
                    "data": those.graphs.name,
                    "setting": key,
                    **{
                        share: over_graphs(found, share, args.draws) for share in ("same trees", "in the list", "first")
                    },
                    "answers, median": f"{np.median([one['answers'] for one in found]):.0f}",
                    "wrong alone": f"{np.mean([one['answers'] > 0 and not one['same trees'] for one in found]):.0%}",
                    "forecast right": f"{np.mean([one['forecast'] == one['same trees'] for one in found]):.0%}",
                    "why not": counted(one["why not"] for one in found if one["why not"]),
                    "accuracy": "untrained" if not setting.trained else f"{np.mean(accuracies):.2f}",
                    "seconds, median": f"{np.median(seconds):.2f}",
                    "seconds, max": f"{max(seconds):.1f}",
                }
            )
            print(rows[-1], flush=True)
    record.write(
        args.table,
        f"Molecules found exactly, {args.graphs} of each set with at most {MAX_NODES} nodes, {args.draws} networks",
        rows,
        f"Graphs {args.first} to {args.first + args.graphs - 1} of a drawn order, of which the first 40 are those that "
        "the attack was written on. Intervals of 95 %, bootstrap over graphs. Share of graphs of which an answer has "
        "the same trees of two hops, which are all that the network tells "
        "apart; of which one is the graph itself, up to the order of its nodes; and of which the first one is. "
        "'wrong alone': there are answers, all with the observed gradient, and none has the graph's trees. Plain: "
        "untrained GCN of two layers of width 300, ReLU, biases from U(-0.3, 0.3), mean of the nodes, one-hot labels "
        "and degrees, float64; at most 16 answers. The attacker knows which labels there are, and the largest degree "
        "of the set. 'molecules': it also knows that the graph is connected, without cycles of 3 or 4. 'noise': "
        "Gaussian, relative to the root mean square of the update, of a size that the attacker knows. 'GRAIN': readout "
        "for every node, no activation after the second layer, no biases. Seconds are of one core, and those of the "
        f"first graph of a set have the compiling in them. At most {args.trees} trees are counted. 'why not': the "
        "conditions, by what `graph_identifiability` says of the graph, where its trees were not found. 'trained': 50 "
        "epochs of Adam (1e-2, batches of 64) on the whole set, the graphs that are attacked with it; 'accuracy' is "
        "that on the same set. 'dead': biases from U(-0.55, 0.05), with which most units are 0 at all nodes. "
        f"Threat model: {THREAT.describe()}.",
        victims=every,
    )
    if args.forecast:
        agreements(args, every)


def agreements(args: argparse.Namespace, every: list[dict[str, Any]]) -> None:
    """Compares the forecasts with the results of the attack, and writes the table."""
    rows = [_agreement(key, [one for one in every if one["setting"] == key]) for key in args.settings]
    record.write(
        args.forecast,
        f"What is said beforehand and what is found, {len(every)} attacks on graphs with at most {MAX_NODES} nodes",
        [*rows, _agreement("all", every)],
        f"Graphs {args.first} to {args.first + args.graphs - 1} of a drawn order of each of {', '.join(args.data)}. "
        "'yes, found': `graph_identifiability` says that the trees can be recovered, and an answer of `graph_spans` "
        "has them; and so on. The former knows the graph, and computes the gradient from its formula; the latter sees "
        "the client's update alone. They share the test of stars, the solver of the equations and the limits on work, "
        "so that their agreement does not test these. Intervals of 95 %, bootstrap over attacks. 'why not': as in the "
        f"table of what is found, which has the settings. Threat model: {THREAT.describe()}.",
    )


def _agreement(key: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    cells = Counter((one["forecast"], one["same trees"]) for one in found)
    names = {"yes, found": (True, True), "yes, not found": (True, False)}
    names |= {"no, found": (False, True), "no, not found": (False, False)}
    right = np.array([one["forecast"] == one["same trees"] for one in found], float)
    return {
        "setting": key,
        **{name: cells[cell] for name, cell in names.items()},
        "right": record.interval(right, np.mean, ".1%"),
        "why not": counted(one["why not"] for one in found if one["why not"]),
    }


def names(features: np.ndarray, adjacency: np.ndarray) -> list[set]:
    """Names the types, the stars and the trees of a graph's nodes, so that they can be compared between graphs."""
    near = [np.flatnonzero(row).tolist() for row in adjacency]
    signs: list[Any] = [(tuple(row), len(js)) for row, js in zip(features.tolist(), near, strict=True)]
    found = [set(signs)]
    for _ in range(2):
        signs = [(own, tuple(sorted(signs[j] for j in js))) for own, js in zip(signs, near, strict=True)]
        found.append(set(signs))
    return found


def kept(those: Victims, setting: Setting, indices: np.ndarray) -> dict[str, Any]:
    """Counts the types, stars and trees that the spans of a mean gradient keep, and those of them that are true."""
    inputs = {name: jnp.asarray(array, setting.dtype) for name, array in those.graphs.inputs(indices).items()}
    seen = observe(
        jax.random.key(0),
        THREAT,
        those.client_fn,
        those.params,
        Batch(inputs, jnp.asarray(those.graphs.labels[indices])),
    )
    parts = [layers(name, tree, nodewise=False) for name, tree in (("params", seen.params), ("update", seen.update))]
    spacing = float(jnp.finfo(setting.dtype).eps)
    known = Known(*parts, setting.activation, setting.activate_last, [], False, False, 3, None, 1e-3, spacing, None)
    rows, largest = known_rows(those.blocks, those.degree_block, those.max_degree)
    gradient, degrees = known.update.first.kernel, range(largest + 1)
    types = known.choices(possible_types(gradient, rows, those.degree_block, degrees, noise=None, miss=1e-3))[0]
    stars = next(kept_stars(known, types, known.space(), Limits(completions=0)))
    kinds = [(tuple(row), degree) for row, degree in zip(types.features.tolist(), types.degrees.tolist(), strict=True)]
    around = [tuple(sorted(kinds[t] for t in np.repeat(np.arange(len(kinds)), row))) for row in stars.neighbours]
    found = set(kinds), {(kinds[t], near) for t, near in zip(stars.centres, around, strict=True)}
    sizes = those.graphs.mask[indices].sum(1).astype(int)
    every = [
        names(np.asarray(those.graphs.nodes[i, :n], float), those.graphs.adjacency[i, :n, :n])
        for i, n in zip(indices, sizes, strict=True)
    ]
    true = [set().union(*(one[level] for one in every)) for level in range(3)]
    # A tree is a candidate where all its stars are kept.
    num_kept = [len(true[0] & found[0]), len(true[1] & found[1])]
    num_kept.append(sum(star in found[1] and found[1].issuperset(near) for star, near in true[2]))
    num_found = [len(found[0]), len(found[1]), num_trees(stars)]
    out: dict[str, Any] = {"graphs": " ".join(those.graphs.ids[i] for i in indices), "true stars": len(true[1])}
    for level, own, right, total in zip(LEVELS, true, num_kept, num_found, strict=True):
        out |= {f"{level} kept": right / len(own), f"{level} true": right / total if total else np.nan}
    told = {"trees told": False, "graphs told": False}
    if 0 < num_found[2] <= setting.max_trees:
        found_trees = nothing(None, types, "")._replace(stars=stars, trees=all_trees(stars))
        weights = weights_of(known, found_trees)
        told = compared(weights, true_counts(found_trees, those, indices), those.graphs.labels[indices])
    return out | {"candidates": num_found[2]} | told


def weights_of(known: Known, found: GraphSpans) -> np.ndarray | None:
    """Solves for the weights of trees in the mean gradient of some graphs of two classes.

    The error of a classifier of two classes is a multiple s of (1, -1), whatever the graph is. So a tree t has one
    weight, the sum of s c_t / (b n) over the b graphs with n nodes, c_t of them with the tree. The gradient is linear
    in it.
    """
    error = np.array([1.0, -1.0])
    features = known.update.head.kernel @ error / 2
    linear, _ = equations(known, Pooled(0, error, features), found, known.space())
    matrix = np.concatenate([linear.matrix, linear.handshakes])
    lengths = np.linalg.norm(matrix, axis=0)
    goal = np.concatenate([linear.target, np.zeros(len(linear.handshakes))])
    left, values, right = np.linalg.svd(matrix / lengths, full_matrices=False)
    rank = int(np.sum(values > 1e-10 * values[0]))
    goal = left[:, :rank].T @ goal / values[:rank]
    if rank == len(lengths):
        return right.T @ goal / lengths
    rows = right[:rank] * lengths
    scale = np.abs(goal).max()
    # Of the weights that explain the update, take those of the least L1 norm, because few trees occur.
    answer = scipy.optimize.linprog(
        np.ones(2 * len(lengths)), A_eq=np.concatenate([rows, -rows], 1), b_eq=goal / scale, bounds=(0, None)
    )
    return None if answer.x is None else (answer.x[: len(lengths)] - answer.x[len(lengths) :]) * scale


def true_counts(found: GraphSpans, those: Victims, indices: np.ndarray) -> np.ndarray | None:
    """Counts the trees of every graph, shape (b, r). Returns None if one of the trees is no candidate."""
    rows = []
    types = _rows(np.c_[found.types.features, found.types.degrees])
    stars = _rows(np.c_[found.stars.centres, found.stars.neighbours])
    trees = _rows(np.c_[found.trees.stars, found.trees.neighbours])
    for i in indices:
        size = int(those.graphs.mask[i].sum())
        adjacency = those.graphs.adjacency[i, :size, :size].astype(int)
        place = _place(types, np.c_[those.graphs.nodes[i, :size], adjacency.sum(1)])
        for inner, table in ((types, stars), (stars, trees)):
            if min(place) < 0:
                return None
            place = _place(table, np.c_[place, adjacency @ np.eye(len(inner), dtype=int)[place]])
        if min(place) < 0:
            return None
        rows.append(np.bincount(place, minlength=len(trees)))
    return np.array(rows)


def _rows(table: np.ndarray) -> dict[tuple, int]:
    return {tuple(row): i for i, row in enumerate(table.tolist())}


def _place(table: dict[tuple, int], rows: np.ndarray) -> list[int]:
    return [table.get(tuple(row), -1) for row in rows.tolist()]


def compared(weights: np.ndarray | None, counts: np.ndarray | None, labels: np.ndarray) -> dict[str, bool]:
    """Tells whether the weights identify the trees that occur, and whether they split correctly into the graphs."""
    none = {"trees told": False, "graphs told": False}
    if weights is None or counts is None:
        return none
    is_there = np.abs(weights) > 1e-6 * np.abs(weights).max()
    if not np.array_equal(is_there, counts.any(0)):
        return none
    answer = split(weights[is_there], len(labels)) if len(labels) < 3 else None
    # An error below 0 for the first class is that of a graph of this class.
    right = sorted((int(label), row) for label, row in zip(labels, counts[:, is_there].tolist(), strict=True))
    return {"trees told": True, "graphs told": right == sorted((int(s > 0), row) for s, row in answer or ())}


def split(weights: np.ndarray, number: int) -> list[tuple[float, list[int]]] | None:
    """Writes weights as sums of whole multiples of one or two scales, with the smallest numbers that do so.

    A tree that only one of the graphs has, a few times, gives the scale of this graph.
    """
    tolerance, scales = 1e-6 * np.abs(weights).max(), [w / k for w in weights for k in range(1, 5)]
    steps = np.arange(MAX_NODES + 1)
    best, least = None, np.inf
    for a, b in itertools.combinations(scales, 2) if number == 2 else ((s, 0.0) for s in scales):
        first = steps if number == 2 else steps[:1]
        sums = steps[:, None] * a + first * b
        gaps = np.abs(weights[:, None, None] - sums).reshape(len(weights), -1)
        nearest = gaps.argmin(1)
        if gaps[np.arange(len(weights)), nearest].max() > tolerance:
            continue
        i, j = np.unravel_index(nearest, sums.shape)
        if (total := int(i.sum() + j.sum())) < least:
            least = total
            best = [(a, i.tolist()), (b, j.tolist())][:number]
    return best


def batches(args: argparse.Namespace) -> None:
    """Counts the types, stars and trees that the spans of a mean gradient keep."""
    rows, every = [], []
    for key in args.settings:
        for name in args.data:
            setting = SETTINGS[key]._replace(max_trees=args.trees)
            for size in (1, 2, 4):
                those = victims(name, setting, slice(args.first, args.first + size * args.graphs), 0)
                found = [kept(those, setting, chosen) for chosen in those.chosen.reshape(-1, size)]
                every += [{"setting": key, "size": size} | one for one in found]
                shares = [f"{level} {what}" for level in LEVELS for what in ("kept", "true")]
                rows.append(
                    {
                        "data": those.graphs.name,
                        "setting": key,
                        "graphs": size,
                        "stars, median": f"{np.median([one['true stars'] for one in found]):.0f}",
                        **{share: _mean_share(found, share) for share in shares},
                        "candidates, median": f"{np.median([one['candidates'] for one in found]):.0f}",
                        "trees told": _mean_share(found, "trees told"),
                        "graphs told": _mean_share(found, "graphs told") if size < 3 else "not tried",
                    }
                )
                print(rows[-1], flush=True)
    record.write(
        args.table,
        f"What a mean gradient of several graphs gives away, {args.graphs} batches of 1, 2 and 4 graphs of each set",
        rows,
        f"Graphs from {args.first} on of a drawn order, with at most {MAX_NODES} nodes, one network a set. "
        "'kept': share of the types, stars and trees of two hops in the graphs of a batch that the spans of the "
        "gradient keep (no completion); 'true': share of what is kept that is in a graph of the batch. A tree is kept "
        f"with all its stars. 'trees told': the weights of the kept trees, at most {args.trees}, of the least sum of "
        "absolute values that explain the gradient are not 0 for the trees in the batch alone. 'graphs told': from the "
        "weights, of sums of whole multiples of a scale for each graph, come the label of every graph and its numbers "
        "of trees, all of them right. The attack itself, `graph_spans`, takes one graph, and does not do so. "
        f"Intervals of 95 %, bootstrap over batches. The rest is as for single graphs. {THREAT.describe()}.",
        victims=every,
    )


def _mean_share(found: list[dict[str, Any]], share: str) -> str:
    values = np.array([one[share] for one in found], float)
    return record.interval(values[~np.isnan(values)], np.mean, ".0%")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["mutag", "ptc_mr", "aids"])
    parser.add_argument("--settings", nargs="+", default=["plain"], choices=list(SETTINGS))
    parser.add_argument("--graphs", type=int, default=40, help="of each set")
    parser.add_argument("--first", type=int, default=40, help="place of the first graph in the order that is drawn")
    parser.add_argument("--draws", type=int, default=3, help="networks with weights of their own, seeds 0, 1, ...")
    parser.add_argument("--trees", type=int, default=3000, help="number of trees that are counted at most")
    parser.add_argument("--table", default="table", help="name of the table")
    parser.add_argument("--forecast", help="name of a table of whether what is said beforehand comes true")
    parser.add_argument("part", nargs="?", default="exact", choices=["exact", "batches"])
    args = parser.parse_args()
    {"exact": exact, "batches": batches}[args.part](args)
