"""What the gradient of a graph network gives away in closed form, before any search.

Sinha et al., Gradient Inversion Attack on Graph Neural Networks (GLG), 2024, state that the features of a target node
and the mean of its neighbours' follow from the gradient of GraphSAGE. Wei et al., GraphDLG, 2026, read the pooled
features from one column of the last layer's gradient. Here every column is used, which is least squares: no column
needs to be chosen, and nothing is divided by the gradient of a single class, which may be near 0. The label of one
graph is found by `labels.bias_counts`, which needs a bias in the last layer, or by `labels.idlg`, which needs features
of at least 0 in front of it.

Threat model of all three functions: an honest-but-curious server that knows the update of one graph, or of one labelled
node, and nothing else.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.labels import ClassifierFn, Dense
from gia_jax.precision import widened


class LayerInputs(NamedTuple):
    """What a dense layer saw, as far as its gradient tells.

    Attributes:
        inputs: Mean of the layer's inputs over the nodes or graphs that its gradient comes from, each with a weight of
            its own. For one node, or one graph, it is the input itself. Shape (d,).
        residual: Share of the gradient, in L2 norm, that one input does not explain, in [0, 1]. It is 0 up to rounding
            if the gradient comes from one input, and else the inputs above are a mixture. Both are NaN where the
            gradient of the layer's bias is 0, as that of a layer whose ReLUs are all off.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.graph_closed_form import LayerInputs
        >>> seen = LayerInputs(jnp.array([1.0, 2.0]), jnp.array(0.0))
        >>> seen.inputs.tolist()
        [1.0, 2.0]
    """

    inputs: Float[Array, " d"]
    residual: Float[Array, ""]


def pooled_embedding(update: Updates, classifier_fn: ClassifierFn) -> LayerInputs:
    """Computes the pooled features u of a graph from the gradient of the last layer, u = dW r / (r . r).

    Here dW = u r^T is the gradient of the head's kernel and r = p - e_y that of its bias. It is exact for one graph and
    the readouts "mean" and "sum". Of a batch it is a mixture, which the residual tells. With the readout "nodewise" the
    head sees every node, and u is a mean of the nodes' last features.

    Args:
        update: Update of one graph.
        classifier_fn: Function that picks the last layer, which must have a bias, such as `labels.dense("head")`.

    Returns:
        The pooled features, in float32 or wider, and the residual.

    Raises:
        ValueError: If the last layer has no bias.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import Batch, clients, labels, models
        >>> from gia_jax.attacks import graph_closed_form
        >>> module = models.GCN(2, 3, widths=(4,), rngs=nnx.Rngs(0))
        >>> apply_fn, params = models.functional(module)
        >>> path = jnp.array([[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
        >>> inputs = {"nodes": jnp.eye(3, 2)[None], "adjacency": path, "mask": jnp.ones((1, 3))}
        >>> update = clients.federated_sgd(clients.cross_entropy(apply_fn))(params, Batch(inputs, jnp.array([2])))
        >>> found = graph_closed_form.pooled_embedding(update, labels.dense("head"))
        >>> bool(jnp.allclose(found.inputs, module.embeddings(inputs)[-1][0].mean(0), atol=1e-5))
        True
    """
    return _single_input("pooled_embedding", classifier_fn(update))


def target_node(update: Updates, layer_fn: ClassifierFn) -> LayerInputs:
    """Computes what the first layer saw of the one labelled node of a graph, from the gradient of that layer.

    It is exact for a network of one graph layer, the readout "none", and a loss of one node v, whose gradient alone
    does not vanish: dW = x b^T for the input x of the layer at v and the gradient b of its bias. What x is depends on
    the network:

    * GraphSAGE: `dense("layer0", "self")` gives the features of v. `neighbour_mean` gives the mean of its neighbours';
    * GCN: `dense("layer0")` gives row v of Â X, a mean over v and its neighbours. The features of v are not in it.

    With two graph layers the gradient comes from the neighbours as well, and the result is a mixture, which the
    residual tells.

    Args:
        update: Update of one labelled node.
        layer_fn: Function that picks the first layer, which must have a bias.

    Returns:
        The input of the layer at that node, in float32 or wider, and the residual.

    Raises:
        ValueError: If the layer has no bias.

    Examples:
        The features of the node that is labelled come back:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import Batch, clients, labels, models
        >>> from gia_jax.attacks import graph_closed_form
        >>> module = models.GraphSAGE(2, 3, widths=(8,), readout="none", rngs=nnx.Rngs(0))
        >>> apply_fn, params = models.functional(module)
        >>> path = jnp.array([[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
        >>> nodes = jnp.array([[[1.0, 2.0], [3.0, -1.0], [0.0, 4.0]]])
        >>> inputs = {"nodes": nodes, "adjacency": path, "mask": jnp.ones((1, 3))}
        >>> client_fn = clients.federated_sgd(clients.node_cross_entropy(apply_fn))
        >>> update = client_fn(params, Batch(inputs, jnp.array([[-1, 0, -1]])))
        >>> own = graph_closed_form.target_node(update, labels.dense("layer0", "self"))
        >>> others = graph_closed_form.neighbour_mean(update, "layer0")
        >>> [f"{value:.3f}" for value in (*own.inputs, *others.inputs)]
        ['3.000', '-1.000', '0.500', '3.000']
    """
    return _single_input("target_node", layer_fn(update))


def neighbour_mean(update: Updates, *path: str) -> LayerInputs:
    """Computes the mean of the features of a labelled node's neighbours, from the gradient of a GraphSAGE layer.

    It is exact under the conditions of `target_node`, which has an example. It is 0 for a node without neighbours.

    Args:
        update: Update of one labelled node.
        *path: Keys from the root of the update to the layer, such as "layer0". It holds "self", with a bias, and
            "neighbours".

    Returns:
        The mean, in float32 or wider, and the residual.

    Raises:
        ValueError: If there is no such layer, or it has no bias.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks import graph_closed_form
        >>> bias = jnp.array([0.5, -1.0])
        >>> layer = {"self": {"kernel": jnp.ones((1, 2)), "bias": bias}, "neighbours": {"kernel": 3 * bias[None]}}
        >>> graph_closed_form.neighbour_mean({"layer0": layer}, "layer0").inputs.tolist()
        [3.0]
    """
    layer = update
    for key in path:
        if not isinstance(layer, dict) or key not in layer:
            raise ValueError(f"path must lead to a layer of the update, got {path}: {key!r} not found")
        layer = layer[key]
    if not isinstance(layer, dict) or not {"self", "neighbours"} <= set(layer):
        got = sorted(layer) if isinstance(layer, dict) else type(layer).__name__
        raise ValueError(f"the layer at {path} must hold 'self' and 'neighbours', got {got}")
    return _single_input("neighbour_mean", Dense(layer["neighbours"]["kernel"], layer["self"].get("bias")))


def features_present(kernel: Float[Array, "f d"], *, tolerance: float | None = None) -> Bool[Array, " f"]:
    """Tells which features are not 0 at every node, from the gradient of the first layer's kernel.

    Row j of the gradient is a combination of column j of the features, averaged over neighbours: it is 0 if no node has
    the feature, and hardly ever 0 otherwise. Of one-hot features it says which categories occur, such as the kinds of
    the atoms of a molecule.

    Args:
        kernel: Gradient of the kernel, shape (f, d): `update["layer0"]["kernel"]` of a GCN,
            `update["layer0"]["self"]["kernel"]` of GraphSAGE, `update["layer0"]["dense0"]["kernel"]` of GIN.
        tolerance: Share of the longest row below which a row counts as 0, at least 0. None takes 16 units of rounding
            of the gradient's type. A noisy update needs a larger one.

    Returns:
        Whether each feature occurs, shape (f,).

    Raises:
        ValueError: If `tolerance` is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks import graph_closed_form
        >>> graph_closed_form.features_present(jnp.array([[0.5, -1.0], [0.0, 0.0], [0.0, 0.25]])).tolist()
        [True, False, True]
    """
    if tolerance is None:
        tolerance = 16 * float(jnp.finfo(kernel.dtype).eps)
    _check.not_negative(tolerance=tolerance)
    lengths = jnp.linalg.norm(widened(kernel), axis=1)
    return lengths > tolerance * jnp.max(lengths)


def _single_input(name: str, layer: Dense) -> LayerInputs:
    """Returns the input x that explains the gradient of a layer best, dW = x b^T in least squares."""
    if layer.bias is None:
        raise ValueError(f"{name} needs a bias in the layer, got none")
    kernel, bias = widened(layer.kernel), widened(layer.bias)
    inputs = kernel @ bias / (bias @ bias)
    total = jnp.linalg.norm(kernel)
    residual = jnp.linalg.norm(kernel - jnp.outer(inputs, bias)) / jnp.where(total > 0, total, 1)
    return LayerInputs(inputs, residual)
