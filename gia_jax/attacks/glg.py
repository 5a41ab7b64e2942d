"""Matching of graphs by cosine: Sinha, Du, Liu, Markopolou, Shen, Gradient Inversion Attack on Graph Neural Networks
(Graph Leakage from Gradients, GLG), 2024.
"""

from collections.abc import Hashable, Sequence

import optax

from gia_jax import _check, modalities
from gia_jax.base import Attack, ClientFn, InitFn, LabelFn, ObjectiveFn, Scalar
from gia_jax.data.graphs import FeatureBlock
from gia_jax.matching.objectives import cosine, cosine_residuals
from gia_jax.matching.optimizers import step_schedule
from gia_jax.matching.solver import gradient_matching
from gia_jax.threat import granted_labels

NUM_STEPS = 1_500


def glg(
    client_fn: ClientFn,
    *,
    blocks: Sequence[FeatureBlock],
    max_nodes: int,
    grants: Sequence[str] = (),
    num_steps: int = NUM_STEPS,
    smoothness_weight: Scalar = 1e-4,
    sparsity_weight: Scalar = 1e-5,
    binarity_weight: Scalar = 0.0,
    label_fn: LabelFn = granted_labels,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = cosine,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Builds the GLG attack, which finds graphs with the direction of the observed gradient, few edges, and neighbours
    that are alike:

        X*, A* = argmin over A in [0, 1] of  1 - cos(d loss(X, A, y) / d theta, update)
                                             + alpha tr(X^T L X) / n + beta sum over i < j of A_ij / n

    Here L is the Laplacian of A. After every step A is projected onto [0, 1], and stays symmetric and without loops.
    The paper rounds it at the end, at random; here it stays as it is, and `metrics.graph_scores` reads what is above
    0.5 as edges. The optimiser is Adam at a rate of 0.1 for the nodes and 0.01 for the edges, ten times lower after
    each of 3/8, 5/8 and 7/8 of the steps.

    Threat model: an honest-but-curious server that knows the parameters, the update and the shape of the batch, and
    which features are categories. The numbers of nodes, the structure and the features are grants beyond it. For labels
    pass a rule of `gia_jax.labels`, such as `labels.bias_counts`, which is exact for one graph.

    Departures: the weights, rates and the number of steps are this library's, and so is that categories are the softmax
    of their unknowns. Scores of this attack are therefore not to be compared with the paper's.

    The default weights were chosen on 8 public graphs of each of four sets of molecules and proteins. An attacker can
    compute the gradients of these graphs, and none of them is a victim in `benchmarks/graphs.py matching`. Among the
    weights whose F1 score of edges does not differ significantly from the highest one, the defaults have the lowest
    node MSE. Larger weights trade edges for nodes: at 1e-3 and 1e-3 the node MSE on MUTAG is half as large, and hardly
    any edges are left. At the defaults the AUC of the edges is .05 above that of a random graph on these graphs, and
    the F1 score is not above it, because other graphs have nearly the same gradient. If the features are known, larger
    weights improve the edges. Compare with the guesses of `modalities.graph`.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes.
        blocks: What the columns of the nodes' features are, which the attacker knows.
        max_nodes: Number of nodes that graphs are padded to, at least 1.
        grants: Parts of the graphs that the attack takes from the observation, "mask", "adjacency" or "nodes".
        num_steps: Number of steps that the learning rate's schedule is made for, at least 1. `run` takes it from
            the attack. It has no meaning with an `optimizer` of one's own.
        smoothness_weight: Weight alpha, at least 0 and finite.
        sparsity_weight: Weight beta, at least 0 and finite.
        binarity_weight: Weight of `graph_priors.binarity`, a prior beyond the paper, at least 0 and finite.
        label_fn: Function `(observation) -> labels` that the attacker uses to find the labels. By default it takes
            those that the threat model grants.
        init_fn: Function `(key, observation) -> unknowns` that draws the first unknowns. None takes that of
            `modalities.graph`.
        objective_fn: Function `(simulated, observed) -> distance` that compares two updates. By default it is the
            cosine distance.
        optimizer: Optimiser that replaces Adam.

    Returns:
        The attack.

    Raises:
        ValueError: If `num_steps` is not a positive integer, or an argument is one that `modalities.graph` refuses.

    Examples:
        Every step ends with edges in [0, 1]:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, data, models, observe, run
        >>> apply_fn, params = models.functional(models.GCN(2, 3, widths=(8,), rngs=nnx.Rngs(0)))
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> path = jnp.array([[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
        >>> batch = Batch({"nodes": jnp.eye(3, 2)[None], "adjacency": path, "mask": jnp.ones((1, 3))}, jnp.array([2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, params, batch)
        >>> attack = attacks.glg(client_fn, blocks=[data.FeatureBlock("label", ("C", "N"))], max_nodes=3, num_steps=3)
        >>> found = jax.jit(lambda key: run(attack, key, seen)[0])(jax.random.key(1))
        >>> adjacency = found.batch.inputs["adjacency"]
        >>> adjacency.shape, bool(jnp.all((adjacency >= 0) & (adjacency <= 1)))
        ((1, 3, 3), True)
    """
    _check.integer(num_steps=num_steps)
    modality = modalities.graph(
        blocks,
        max_nodes,
        grants=grants,
        edges="box",
        smoothness_weight=smoothness_weight,
        sparsity_weight=sparsity_weight,
        binarity_weight=binarity_weight,
        init_fn=init_fn,
    )
    rates = {"nodes": 0.1, "edges": 0.01}
    adams: dict[Hashable, optax.GradientTransformation] = {
        name: optax.adam(step_schedule(rate, num_steps)) for name, rate in rates.items()
    }
    ours = optax.partition(adams, lambda unknowns: {name: "edges" if name == "edges" else "nodes" for name in unknowns})
    attack = gradient_matching(
        client_fn,
        **modality.matching(),
        objective_fn=objective_fn,
        label_fn=label_fn,
        optimizer=ours if optimizer is None else optimizer,
        residual_fn=cosine_residuals,
    )
    return attack._replace(num_steps=num_steps if optimizer is None else None)
