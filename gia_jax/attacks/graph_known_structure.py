"""The features of graphs whose structure is known, from the gradient of a GCN, by nonlinear least squares.

Wei et al., GraphDLG, 2026, propose to read the features layer by layer from the gradient, once the structure is known.
Such a recursion needs the derivatives of the loss by the hidden features, which depend on the features themselves. Here
all layers are matched together, by the method of Levenberg and Marquardt.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, AttackInfo, AttackState, Batch, ClientFn, LabelFn, Observation, Reconstruction, Updates
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt
from gia_jax.matching.solver import gradient_matching
from gia_jax.models.graph import normalized_adjacency
from gia_jax.precision import wide_dtype
from gia_jax.threat import granted, granted_labels

START = 0.1  # standard deviation of the first propagated features

InitFn = Callable[[PRNGKeyArray, Observation], Float[Array, "b n f"]]


def graph_known_structure(
    client_fn: ClientFn,
    *,
    label_fn: LabelFn = granted_labels,
    init_fn: InitFn | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Builds the attack that finds the features X of graphs from the gradient of a GCN, with their structure known.

    A graph convolution sees X only as the propagated features Y = Â X, with Â = D^(-1/2) (A + I) D^(-1/2). So Y is
    searched, by Levenberg-Marquardt on the differences between the gradients of all tensors, each relative to the
    length of the observed one. Among the X with this Y it returns the shortest, X = pinv(Â) Y.

    What it finds: Y to rounding, in float64, with a smooth activation such as tanh or GELU, and layers that are wider
    than the graph has nodes, from a start that is near enough. For graphs of 10 nodes, that is all starts with errors
    of a sixth of the spread of Y, half of those with a third, and hardly one in ten starts from noise: take many
    (`gia_jax.restarts`). The loss tells which of them it is, since it falls to rounding only where all gradients agree.

    What it does not find:

    * the part of X in the null space of Â, of which no gradient tells anything. It is not empty for about half of all
      molecules; `graph_identifiability` says its dimension, "blind". Score Â X beside X;
    * features of a network with ReLU, whose kinks stop the method almost always;
    * which of two nodes is which, where an exchange of both leaves the structure as it is;
    * features seen past a convolution, by GraphSAGE, or by the readout "nodewise". These networks are not blind, and
      `gradient_matching` with `modalities.graph` searches X itself.

    Threat model: an honest-but-curious server that knows the parameters, the update, the shape of the batch, and the
    structure and the numbers of nodes of its graphs, `ThreatModel(inputs=("adjacency", "mask"))`. For labels pass a
    rule of `gia_jax.labels`, such as `labels.bias_counts`, which is exact for one graph.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes.
        label_fn: Function `(observation) -> labels` that the attacker uses to find the labels. By default it takes
            those that the threat model grants.
        init_fn: Function `(key, observation) -> propagated` that returns the first Y, shape (b, n, f). None draws it
            from N(0, 0.1^2), which is near the mean of standardised features.
        optimizer: Solver in place of `matching.levenberg_marquardt`, which is used with all of the equations. It is
            passed the residuals as `residual_fn`.

    Returns:
        The attack. Some 50 steps are enough. Its `init` raises ValueError if the threat model does not grant the
        structure, the numbers of nodes or the shape of the batch, or the inputs are no graphs.

    Examples:
        The features of a path of three nodes come back, up to an exchange of its ends, which changes no gradient:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, models, observe, run
        >>> biases = jax.nn.initializers.normal(0.3)
        >>> gcn = models.GCN(1, 2, widths=(16, 16), activation=jnp.tanh, bias_init=biases, rngs=nnx.Rngs(0))
        >>> apply_fn, params = models.functional(gcn)
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> threat = ThreatModel(labels=True, inputs=("adjacency", "mask"))
        >>> with jax.enable_x64(True):
        ...     params = jax.tree.map(lambda leaf: leaf.astype(float), params)
        ...     path = jnp.array([[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
        ...     nodes = jnp.array([[[0.3], [-0.4], [0.8]]])
        ...     inputs = {"nodes": nodes, "adjacency": path, "mask": jnp.ones((1, 3))}
        ...     seen = observe(jax.random.key(0), threat, client_fn, params, Batch(inputs, jnp.array([1])))
        ...     attack = attacks.graph_known_structure(client_fn)
        ...     found, _ = jax.jit(lambda key: run(attack, key, seen, num_steps=30))(jax.random.key(1))
        >>> [f"{value:.6f}" for value in sorted(found.batch.inputs["nodes"].ravel().tolist())]
        ['-0.400000', '0.300000', '0.800000']
    """
    solver = levenberg_marquardt(initial_damping=1e-3, equations=None) if optimizer is None else optimizer
    first_fn = _noise if init_fn is None else init_fn

    def matching(observation: Observation) -> Attack:
        known = _known(observation)
        back = jnp.linalg.pinv(normalized_adjacency(known["adjacency"], known["mask"]), hermitian=True)

        def decode_fn(propagated: Float[Array, "b n f"], labels: Any) -> Batch:
            return Batch({"nodes": back.astype(propagated.dtype) @ propagated, **known}, labels)

        return gradient_matching(
            client_fn,
            init_fn=first_fn,
            objective_fn=_relative_squares,
            label_fn=label_fn,
            decode_fn=decode_fn,
            optimizer=solver,
            residual_fn=_relative_residuals,
        )

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        return matching(observation).init(key, observation)

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        return matching(observation).step(key, state, observation)

    def finalize(candidate: Any, observation: Observation) -> Reconstruction:
        return matching(observation).finalize(candidate, observation)

    return Attack(init, step, finalize)


def _known(observation: Observation) -> dict[str, Array]:
    """Returns the structure and the numbers of nodes that the threat model grants."""
    known = granted(observation, "inputs")
    for name in ("adjacency", "mask"):
        if name not in known:
            raise ValueError(f"the threat model does not grant the inputs' {name!r}, got {sorted(known)}")
    like = granted(observation, "inputs_like")
    _check.graphs("inputs", like)
    _check.examples(like, name="inputs")
    return {"adjacency": known["adjacency"], "mask": known["mask"]}


def _noise(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b n f"]:
    """Returns the first propagated features."""
    nodes, mask = granted(observation, "inputs_like")["nodes"], _known(observation)["mask"]
    dtype = wide_dtype(nodes.dtype)
    return START * jax.random.normal(key, nodes.shape, dtype) * mask[..., None].astype(dtype)


def _relative_residuals(simulated: Updates, observed: Updates) -> Updates:
    """Returns differences of the tensors, each relative to the length of the observed one: the deep ones count too."""

    def relative(one: Array, other: Array) -> Array:
        length = jnp.linalg.norm(other)
        return (one - other) / jnp.where(length > 0, length, 1)

    return jax.tree.map(relative, simulated, observed)


def _relative_squares(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Returns the sum of the squares of the residuals."""
    return optax.tree.norm(_relative_residuals(simulated, observed), squared=True)
