"""The whole attack: types, stars, trees, counts and graphs, one after the other."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gia_jax import _check
from gia_jax.attacks.graph_spans.candidates import Block, Types, known_rows, possible_types
from gia_jax.attacks.graph_spans.found import GraphSpans, Limits, nothing
from gia_jax.attacks.graph_spans.network import Activation, layers
from gia_jax.attacks.graph_spans.pooled import pooled
from gia_jax.attacks.graph_spans.stages import Known, counted, drawn
from gia_jax.base import ClientFn, Observation

Readout = Literal["mean", "sum", "nodewise"]

DEFAULT_LIMITS = Limits()


def graph_spans(
    client_fn: ClientFn,
    *,
    blocks: Sequence[Block],
    degree_block: int | None = None,
    max_degree: int | None = None,
    max_nodes: int | None = None,
    activation: Activation = jax.nn.relu,
    activate_last: bool = True,
    readout: Readout = "mean",
    connected: bool = False,
    min_cycle: int = 3,
    noise: float | None = None,
    miss: float = 1e-3,
    tolerance: float | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Callable[[Observation], GraphSpans]:
    """Builds the attack that finds a graph from the gradient of a GCN of two layers, exactly, by spans and counting.

    The package `gia_jax.attacks.graph_spans` explains how it works, and `gia_jax.attacks.graph_identifiability` says
    beforehand whether it can. All graphs that are found have the observed gradient, to rounding.

    Threat model: an honest-but-curious server that knows the parameters and the update of one graph, and which features
    a node may have. The label, the number of nodes, the structure and the features of the graph are not known. Where
    the threat model grants the graph's "mask" (`ThreatModel(inputs=("mask",))`), its number of nodes is known too.

    Args:
        client_fn: Client that was attacked, compiled: it computes the gradients of the graphs that are found.
        blocks: What the features of a node are made of, in order: for each block the rows that it may hold, shape
            (k, w), or a number k for k rows that are one-hot.
        degree_block: Index of the block whose row j says that a node has j neighbours, or None where no block does.
        max_degree: Largest number of neighbours that a node may have, at least 1. None takes it from the degree block.
        max_nodes: Largest number of nodes that a graph may have, at least 1. None takes it from the shape of the
            inputs, where this is granted.
        activation: Activation of the network.
        activate_last: Whether it is applied after the second layer as well. It must be where the nodes are pooled
            before the head, or the gradient of the second layer has rank one.
        readout: How the network gets from nodes to logits, as `models.GCN` has it: "mean", "sum" or "nodewise".
        connected: Whether the graph is known to be connected.
        min_cycle: Length below which the graph is known to have no cycles, at least 3.
        noise: Standard deviation of Gaussian noise that is known to be on every entry of the update. None is for
            rounding errors alone.
        miss: Probability with which a type or a star of the graph is lost to the noise, in (0, 1).
        tolerance: Relative mismatch of the gradient with which a graph is accepted. None takes it from the noise.
        limits: How much work is done.

    Returns:
        A function `(observation) -> found`, which runs on the host and needs no random key. It raises ValueError if
        float64 is not enabled, the parameters are not those of such a network for such features, or the batch is of
        more than one graph.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        A triangle of two carbon atoms and an oxygen atom comes back, up to the order of its nodes:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, models, observe
        >>> biases = jax.nn.initializers.normal(0.1)
        >>> gcn = models.GCN(2, 3, widths=(20, 20), bias_init=biases, rngs=nnx.Rngs(0))
        >>> apply_fn, params = models.functional(gcn)
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> with jax.enable_x64(True):
        ...     params = jax.tree.map(lambda leaf: leaf.astype(float), params)
        ...     nodes = jnp.eye(2)[jnp.array([[0, 0, 1]])]
        ...     inputs = {"nodes": nodes, "adjacency": 1 - jnp.eye(3)[None], "mask": jnp.ones((1, 3))}
        ...     seen = observe(jax.random.key(0), ThreatModel(), client_fn, params, Batch(inputs, jnp.array([2])))
        ...     found = attacks.graph_spans(client_fn, blocks=[2], max_degree=2)(seen)
        >>> found.label, found.graphs[0].nodes.argmax(1).tolist(), found.graphs[0].adjacency.tolist()
        (2, [1, 0, 0], [[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    """
    rows, largest = known_rows(blocks, degree_block, max_degree)
    _check_knowledge(max_nodes, readout, min_cycle, noise, miss, tolerance)
    _check_limits(limits)

    def find(observation: Observation) -> GraphSpans:
        if jnp.result_type(float) != jnp.float64:
            raise ValueError(f"graph_spans needs float64: set jax_enable_x64, got {jnp.result_type(float)}")
        known = Known(
            params=layers("params", observation.params, nodewise=readout == "nodewise"),
            update=layers("update", observation.update, nodewise=readout == "nodewise"),
            activation=activation,
            activate_last=activate_last,
            sizes=_sizes(observation, max_nodes),
            is_sum=readout == "sum",
            connected=connected,
            min_cycle=min_cycle,
            noise=noise,
            miss=miss,
            spacing=_spacing(observation.update),
            tolerance=tolerance,
        )
        gradient = known.update.first.kernel
        every = possible_types(gradient, rows, degree_block, range(largest + 1), noise=noise, miss=miss)
        found = _counts(known, every, limits)
        return drawn(client_fn, observation, known, found, limits) if found.counts else found

    return find


def _counts(known: Known, every: Types, limits: Limits) -> GraphSpans:
    """Finds counts: with the types in the span first, and then, as it may be too small, with all that are possible."""
    choices = known.choices(every)
    best = nothing(None, choices[0], "the update is not that of one graph")
    answers = pooled(known.update.head, known.params.head)
    for found in counted(known, answers, choices, limits) if answers else ():
        if found.counts:
            return found
        if found.mismatch < best.mismatch or math.isinf(best.mismatch):
            best = found
    return best


def _sizes(observation: Observation, max_nodes: int | None) -> list[int]:
    """Returns the numbers of nodes that the graph may have."""
    like = observation.extra.get("inputs_like")
    if like is not None:
        nodes = like.get("nodes") if isinstance(like, dict) else None
        if nodes is None or nodes.ndim != 3 or nodes.shape[0] != 1:
            got = type(like).__name__ if nodes is None else f"nodes of shape {nodes.shape}"
            raise ValueError(f"graph_spans needs a batch of one graph, with nodes (1, n, f), got {got}")
        max_nodes = nodes.shape[1] if max_nodes is None else max_nodes
    known = observation.extra.get("inputs", {}).get("mask")
    if known is not None:
        _check.finite("observation.extra['inputs']['mask']", known)
        size = int(np.sum(np.asarray(known)))
        if size < 1:
            raise ValueError(f"observation.extra['inputs']['mask'] must have at least one node, got {size}")
        return [size]
    if max_nodes is None:
        raise ValueError("max_nodes must be given where the shape of the inputs is not granted, got None")
    return list(range(1, max_nodes + 1))


def _spacing(update: Any) -> float:
    return float(max(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(update)))


def _check_knowledge(
    max_nodes: int | None, readout: str, min_cycle: int, noise: float | None, miss: float, tolerance: float | None
) -> None:
    if max_nodes is not None:
        _check.integer(max_nodes=max_nodes)
    if readout not in ("mean", "sum", "nodewise"):
        raise ValueError(f"readout must be 'mean', 'sum' or 'nodewise', got {readout!r}")
    _check.integer(3, min_cycle=min_cycle)
    _check.not_negative(noise=noise)
    if not 0 < miss < 1:
        raise ValueError(f"miss must be in (0, 1), got {miss}")
    _check.positive(tolerance=tolerance)


def _check_limits(limits: Limits) -> None:
    for name in ("stars", "trees", "counts", "branches", "graphs"):
        _check.integer(**{f"limits.{name}": getattr(limits, name)})
    for name in ("completions", "ties"):
        _check.integer(0, **{f"limits.{name}": getattr(limits, name)})
    _check.positive(**{"limits.seconds": limits.seconds})
