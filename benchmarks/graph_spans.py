"""How many graphs a gradient of a GCN gives away exactly: spans and counting, on MUTAG, PTC_MR, AIDS and ENZYMES.

    python benchmarks/graph_spans.py [exact|forecast|batches] [--data NAME ...] [--settings NAME ...] [--graphs N]
        [--first N] [--draws N] [--trees N] [--table NAME]

* exact: the graphs that are found, for each set and each setting of the network.
* forecast: whether what `graph_identifiability` says beforehand comes true.
* batches: what the spans of a mean gradient of several graphs keep.

The first 40 graphs of MUTAG, PTC_MR and AIDS in the order that is drawn are those that the attack was written on; by
default others are attacked.

Needs the extra `demo`, and the zip files of the sets in $GIA_JAX_DATA_DIR/graphs.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # times of one core
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import argparse
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
from flax import nnx
from training import train, uniform

from gia_jax import Batch, ThreatModel, attacks, clients, data, models, observe
from gia_jax.attacks.graph_spans import FoundGraph, GraphSpans, Limits
from gia_jax.metrics import isomorphism, same_colors
from gia_jax.models.layers import symmetric_uniform

jax.config.update("jax_enable_x64", True)

MAX_NODES = 30
THREAT = ThreatModel()
SHARES = ("same trees", "in the list", "first")


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
    """Draws graphs and a network, which is trained on the set where the setting says so."""
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
        f"that on the same set. Threat model: {THREAT.describe()}.",
        victims=every,
    )


def forecast(args: argparse.Namespace) -> None:
    """Compares what is said beforehand with what the attack finds."""
    rows, every = [], []
    for key in args.settings:
        setting, found = SETTINGS[key]._replace(max_trees=args.trees), []
        for name in args.data:
            those = victims(name, setting, slice(args.first, args.first + args.graphs), 0)
            found += [{"setting": key} | measured(those, setting, int(i)) for i in those.chosen]
        every += found
        rows.append(_agreement(key, found))
        print(rows[-1], flush=True)
    rows.append(_agreement("all", every))
    record.write(
        args.table,
        f"What is said beforehand and what is found, {len(every)} graphs with at most {MAX_NODES} nodes",
        rows,
        f"Graphs {args.first} to {args.first + args.graphs - 1} of a drawn order of each of {', '.join(args.data)}, "
        "one network a set. 'yes, found': `graph_identifiability` says that the trees can be recovered, and an answer "
        "of `graph_spans` has them; and so on. It knows the graph, and computes the gradient from its formula; "
        "the attack sees the client's update alone. They share the test of stars, the solver of the equations and the "
        f"limits on work (at most {args.trees} trees), so that their agreement does not test these. Intervals of 95 %, "
        "bootstrap over graphs. 'dead': biases from U(-0.55, 0.05), with which most units are 0 at all nodes. 'linear "
        "last layer': no activation after the second layer. Otherwise the settings are those of the table of "
        f"what is found. Threat model: {THREAT.describe()}.",
        victims=every,
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


def batches(args: argparse.Namespace) -> None:
    """Counts the types, stars and trees that the spans of a mean gradient keep."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["mutag", "ptc_mr", "aids"])
    parser.add_argument("--settings", nargs="+", default=["plain"], choices=list(SETTINGS))
    parser.add_argument("--graphs", type=int, default=40, help="of each set")
    parser.add_argument("--first", type=int, default=40, help="place of the first graph in the order that is drawn")
    parser.add_argument("--draws", type=int, default=3, help="networks with weights of their own, seeds 0, 1, ...")
    parser.add_argument("--trees", type=int, default=3000, help="number of trees that are counted at most")
    parser.add_argument("--table", default="table", help="name of the table")
    parser.add_argument("part", nargs="?", default="exact", choices=["exact", "forecast", "batches"])
    args = parser.parse_args()
    {"exact": exact, "forecast": forecast, "batches": batches}[args.part](args)
