"""Graph neural networks: graph convolutions, GraphSAGE with means, and graph isomorphism networks.

A batch of graphs is a dict of three arrays, padded to the same number n of nodes:

* "nodes", shape (b, n, f): the features of every node;
* "adjacency", shape (b, n, n): symmetric, 1 where two nodes are neighbours and else 0, without loops. Whatever is
  searched by descent may lie between;
* "mask", shape (b, n): 1 for a node and 0 for padding. It is a constant, of which no derivative is taken.

Padding is exact: what stands in padded rows and columns changes neither outputs nor gradients. All three networks are
written for the rows H of the nodes' features, with H = X before the first layer:

* `GCN`: H' = s(Â H W + b) with Â = D^(-1/2) (A + I) D^(-1/2) and the degrees D of A + I (Kipf and Welling, 2017);
* `GraphSAGE`: H' = s(H W_self + D^(-1) A H W_neighbours + b) with the degrees D of A (Hamilton et al., 2017);
* `GIN`: H' = s(s((A + (1 + epsilon) I) H W_0 + b_0) W_1 + b_1) (Xu et al., 2019).
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gia_jax import _check

Initializer = jax.nn.initializers.Initializer
Readout = Literal["mean", "sum", "nodewise", "none"]
GraphInputs = Any  # checked by `_checked`, with a message
DenseFn = Callable[..., nnx.Linear]

# Xavier uniform, as GRAIN and PyTorch Geometric have it.
KERNEL_INIT = jax.nn.initializers.glorot_uniform()


def normalized_adjacency(
    adjacency: Float[Array, "*b n n"], mask: Float[Array, "*b n"] | None = None
) -> Float[Array, "*b n n"]:
    """Computes Â = D^(-1/2) (A + I) D^(-1/2), by which a graph convolution averages over a node and its neighbours.

    Args:
        adjacency: Adjacency A of each graph, at least 0, symmetric and without loops, shape (*b, n, n).
        mask: 1 for a node and 0 for padding, shape (*b, n). None has no padding.

    Returns:
        The normalised adjacency, shape (*b, n, n). Rows and columns of padding are 0, and so are their derivatives.

    Examples:
        Two neighbours, beside a row of padding:

        >>> import jax.numpy as jnp
        >>> from gia_jax.models.graph import normalized_adjacency
        >>> adjacency = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> (2 * normalized_adjacency(adjacency, jnp.array([1.0, 1.0, 0.0]))).round(5).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    mask = jnp.ones(adjacency.shape[:-1], adjacency.dtype) if mask is None else mask
    looped = _masked(adjacency, mask) + mask[..., None] * jnp.eye(adjacency.shape[-1], dtype=adjacency.dtype)
    degrees = jnp.sum(looped, -1)
    # Twice `where`: the derivative of a root at 0 is infinite, and infinity times 0 is NaN.
    scale = jnp.where(degrees > 0, 1 / jnp.sqrt(jnp.where(degrees > 0, degrees, 1)), 0)
    return scale[..., :, None] * looped * scale[..., None, :]


def neighbour_average(
    adjacency: Float[Array, "*b n n"], mask: Float[Array, "*b n"] | None = None
) -> Float[Array, "*b n n"]:
    """Computes D^(-1) A, by which GraphSAGE averages over the neighbours of a node, without the node itself.

    Args:
        adjacency: Adjacency A of each graph, at least 0, symmetric and without loops, shape (*b, n, n).
        mask: 1 for a node and 0 for padding, shape (*b, n). None has no padding.

    Returns:
        The averages' weights, shape (*b, n, n). The row of a node without neighbours is 0, and so is that of padding.

    Examples:
        The first node has two neighbours, and the last one has none:

        >>> import jax.numpy as jnp
        >>> from gia_jax.models.graph import neighbour_average
        >>> neighbour_average(jnp.zeros((4, 4)).at[0, 1:3].set(1).at[1:3, 0].set(1)).tolist()
        [[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    adjacency = adjacency if mask is None else _masked(adjacency, mask)
    degrees = jnp.sum(adjacency, -1, keepdims=True)
    return jnp.where(degrees > 0, adjacency / jnp.where(degrees > 0, degrees, 1), 0)


class GraphNetwork(nnx.Module):
    """What the three networks share: graph layers, a readout, and a dense layer `head` at the end.

    Args:
        num_features: Number f of features of a node, at least 1.
        num_classes: Number of classes, and so of logits, at least 1.
        widths: Number of features after each graph layer, each at least 1.
        activation: Function applied to every entry after each layer but the head. The default is ReLU.
        activate_last: Whether it is applied after the last graph layer as well.
        use_bias: Whether graph layers have a bias. The readout and the head always have one.
        readout: What is made of the last layer's features. "mean" and "sum" pool them over the nodes of a graph, before
            the head. "nodewise" is the readout of GRAIN (Drencheva et al., ICLR 2025): a dense network on the features
            before the first and after the last graph layer, for every node, whose logits are averaged over the nodes.
            Their network is a `GCN` with this readout, `activate_last=False` and `use_bias=False`. "none" applies the
            head to every node, for labels of nodes.
        readout_widths: Widths of the hidden layers of the "nodewise" readout, `readout0`, `readout1`, and so on.
        kernel_init: Initialiser of every kernel. The default is Xavier's uniform one.
        bias_init: Initialiser of every bias. The default is 0, as in a network that was not trained yet.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Raises:
        ValueError: If a number is no positive integer, there is no layer, or the readout is unknown. A call raises it
            for inputs that are no batch of graphs, or whose nodes have another number of features.

    Examples:
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = models.GRAPH_MODELS["gcn"](2, 3, widths=(5, 4), readout="nodewise", rngs=nnx.Rngs(0))
        >>> isinstance(module, models.GraphNetwork), module.readout0.kernel.shape
        (True, (6, 300))
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        widths: Sequence[int] = (300, 300),
        activation: Callable[[Array], Array] = jax.nn.relu,
        activate_last: bool = True,
        use_bias: bool = True,
        readout: Readout = "mean",
        readout_widths: Sequence[int] = (300, 64),
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ) -> None:
        _check.integer(num_features=num_features)
        _check.integer(num_classes=num_classes)
        for name, sizes in (("widths", widths), ("readout_widths", readout_widths)):
            for width in sizes:
                _check.integer(**{name: width})
        if readout not in get_args(Readout):
            raise ValueError(f"readout must be one of {get_args(Readout)}, got {readout!r}")
        if not widths:
            raise ValueError("widths must have an entry for each graph layer, got none")
        self.activation, self.activate_last, self.readout = activation, activate_last, readout
        self.num_features, self.num_layers = num_features, len(widths)
        self.num_readout_layers = len(readout_widths) if readout == "nodewise" else 0
        dense = functools.partial(nnx.Linear, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)
        features = num_features
        for i, width in enumerate(widths):
            setattr(self, f"layer{i}", self.layer(dense, features, width, use_bias))
            features = width
        features += num_features if readout == "nodewise" else 0
        for i, width in enumerate(readout_widths[: self.num_readout_layers]):
            setattr(self, f"readout{i}", dense(features, width))
            features = width
        self.head = dense(features, num_classes)

    @abc.abstractmethod
    def layer(self, dense: DenseFn, features: int, width: int, use_bias: bool) -> nnx.Module:
        """Builds a graph layer, which is called with the features, the adjacency and the mask.

        Args:
            dense: Function `(features, width, use_bias=) -> layer` of dense layers with the network's initialisers.
            features: Number of features before the layer.
            width: Number of features after it.
            use_bias: Whether it has a bias.

        Returns:
            The layer.
        """

    def embeddings(self, inputs: GraphInputs) -> tuple[Float[Array, "b n _"], ...]:
        """Computes the features of the nodes before the first layer and after each graph layer.

        Args:
            inputs: Batch of graphs, with "nodes", "adjacency" and "mask".

        Returns:
            X, H_1, ..., H_L, each of shape (b, n, width). Rows of padding are 0.

        Raises:
            ValueError: If the inputs are no such batch, or their nodes have another number of features.
        """
        nodes, adjacency, mask = _checked(inputs, self.num_features)
        found = [nodes * mask[..., None]]
        for i in range(self.num_layers):
            is_last = i == self.num_layers - 1
            hidden = getattr(self, f"layer{i}")(found[-1], adjacency, mask)
            hidden = hidden if is_last and not self.activate_last else self.activation(hidden)
            found.append(hidden * mask[..., None])
        return tuple(found)

    def __call__(self, inputs: GraphInputs) -> Float[Array, "b *n classes"]:
        nodes, *_, hidden = self.embeddings(inputs)
        mask = jax.lax.stop_gradient(inputs["mask"])
        if self.readout == "nodewise":
            hidden = jnp.concatenate([nodes, hidden], -1)
            for i in range(self.num_readout_layers):
                hidden = self.activation(getattr(self, f"readout{i}")(hidden))
            return pooled(self.head(hidden), mask)
        if self.readout == "none":
            return self.head(hidden) * mask[..., None]
        return self.head(pooled(hidden, mask) if self.readout == "mean" else jnp.sum(hidden, -2))


def pooled(hidden: Float[Array, "*b n d"], mask: Float[Array, "*b n"]) -> Float[Array, "*b d"]:
    """Computes the mean over the nodes of every graph.

    Args:
        hidden: Features of the nodes, shape (*b, n, d).
        mask: 1 for a node and 0 for padding, shape (*b, n).

    Returns:
        The means, shape (*b, d). They are 0 for a graph without nodes.
    """
    count = jnp.sum(mask, -1, keepdims=True)
    return jnp.sum(hidden * mask[..., None], -2) / jnp.where(count > 0, count, 1)


class GCN(GraphNetwork):
    """A network of graph convolutions, H' = s(Â H W + b), with layers `layer0`, `layer1`, ... of a kernel and a bias.

    A graph convolution sees the features X only as Â X. Where A + I is singular, as for two neighbours alone, different
    features have the same gradient. The arguments are those of `GraphNetwork`.

    Examples:
        Two graphs, one of them with a padded node:

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> apply_fn, params = models.functional(models.GCN(2, 3, widths=(5,), rngs=nnx.Rngs(0)))
        >>> params["layer0"]["kernel"].shape, params["head"]["kernel"].shape
        ((2, 5), (5, 3))
        >>> mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
        >>> inputs = {"nodes": jnp.ones((2, 3, 2)), "adjacency": jnp.ones((2, 3, 3)) - jnp.eye(3), "mask": mask}
        >>> apply_fn(params, inputs).shape
        (2, 3)
    """

    def layer(self, dense: DenseFn, features: int, width: int, use_bias: bool) -> nnx.Module:
        return _Convolution(dense(features, width, use_bias=use_bias))


class GraphSAGE(GraphNetwork):
    """A network of GraphSAGE's layers with means, H' = s(H W_self + D^(-1) A H W_neighbours + b).

    Every layer `layer0`, `layer1`, ... holds `self`, with a kernel and the bias, and `neighbours`, with a kernel. The
    arguments are those of `GraphNetwork`.

    Examples:
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> _, params = models.functional(models.GraphSAGE(2, 3, widths=(5,), rngs=nnx.Rngs(0)))
        >>> sorted(params["layer0"]["self"]), sorted(params["layer0"]["neighbours"])
        (['bias', 'kernel'], ['kernel'])
    """

    def layer(self, dense: DenseFn, features: int, width: int, use_bias: bool) -> nnx.Module:
        return _SelfAndNeighbours(dense(features, width, use_bias=use_bias), dense(features, width, use_bias=False))


class GIN(GraphNetwork):
    """A graph isomorphism network, H' = s(s((A + (1 + epsilon) I) H W_0 + b_0) W_1 + b_1).

    Every layer `layer0`, `layer1`, ... holds two dense layers of the layer's width, `dense0` and `dense1`.

    Args:
        num_features: Number f of features of a node, at least 1.
        num_classes: Number of classes, and so of logits, at least 1.
        epsilon: Weight that a node has beside its neighbours, less 1. It is a constant and not trained.
        **settings: The other arguments of `GraphNetwork`.

    Raises:
        ValueError: If `epsilon` is not finite, and as for `GraphNetwork`.

    Examples:
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> _, params = models.functional(models.GIN(2, 3, widths=(5,), epsilon=0.1, rngs=nnx.Rngs(0)))
        >>> [params["layer0"][name]["kernel"].shape for name in ("dense0", "dense1")]
        [(2, 5), (5, 5)]
    """

    def __init__(self, num_features: int, num_classes: int, *, epsilon: float = 0.0, **settings: Any) -> None:
        _check.finite("epsilon", epsilon)
        self.epsilon = epsilon
        super().__init__(num_features, num_classes, **settings)

    def layer(self, dense: DenseFn, features: int, width: int, use_bias: bool) -> nnx.Module:
        first, second = dense(features, width, use_bias=use_bias), dense(width, width, use_bias=use_bias)
        return _Isomorphism(first, second, self.activation, self.epsilon)


# The graph networks by name, each a class `(num_features, num_classes, rngs=) -> module`.
GRAPH_MODELS: dict[str, type[GraphNetwork]] = {"gcn": GCN, "graphsage": GraphSAGE, "gin": GIN}


class _Convolution(nnx.Module):
    """A graph convolution: a dense layer on averages over a node and its neighbours."""

    def __init__(self, dense: nnx.Linear) -> None:
        self.kernel = dense.kernel
        if dense.bias is not None:
            self.bias = dense.bias

    def __call__(
        self, hidden: Float[Array, "b n d"], adjacency: Float[Array, "b n n"], mask: Float[Array, "b n"]
    ) -> Float[Array, "b n _"]:
        mixed = normalized_adjacency(adjacency, mask) @ hidden @ self.kernel[...]
        return mixed + self.bias[...] if hasattr(self, "bias") else mixed


class _SelfAndNeighbours(nnx.Module):
    """A layer of GraphSAGE, of two dense layers."""

    def __init__(self, own: nnx.Linear, neighbours: nnx.Linear) -> None:
        self.self = own
        self.neighbours = neighbours

    def __call__(
        self, hidden: Float[Array, "b n d"], adjacency: Float[Array, "b n n"], mask: Float[Array, "b n"]
    ) -> Float[Array, "b n _"]:
        return self.self(hidden) + self.neighbours(neighbour_average(adjacency, mask) @ hidden)


class _Isomorphism(nnx.Module):
    """A layer of a graph isomorphism network, of two dense layers."""

    def __init__(
        self, dense0: nnx.Linear, dense1: nnx.Linear, activation: Callable[[Array], Array], epsilon: float
    ) -> None:
        self.dense0, self.dense1, self.activation, self.epsilon = dense0, dense1, activation, epsilon

    def __call__(
        self, hidden: Float[Array, "b n d"], adjacency: Float[Array, "b n n"], mask: Float[Array, "b n"]
    ) -> Float[Array, "b n _"]:
        summed = _masked(adjacency, mask) @ hidden + (1 + self.epsilon) * hidden
        return self.dense1(self.activation(self.dense0(summed)))


def _masked(adjacency: Float[Array, "*b n n"], mask: Float[Array, "*b n"]) -> Float[Array, "*b n n"]:
    """Returns the adjacency with rows and columns of padding at 0."""
    return adjacency * mask[..., :, None] * mask[..., None, :]


def _checked(
    inputs: GraphInputs, num_features: int
) -> tuple[Float[Array, "b n f"], Float[Array, "b n n"], Float[Array, "b n"]]:
    """Returns the three arrays of a batch of graphs, or raises ValueError."""
    _check.graphs("inputs", inputs)
    nodes, adjacency, mask = (inputs[name] for name in _check.GRAPH_PARTS)
    if nodes.ndim != 3 or nodes.shape[-1] != num_features:
        raise ValueError(f"inputs['nodes'] must have shape (b, n, {num_features}), got {nodes.shape}")
    size, count = nodes.shape[:2]
    for name, array, shape in (("adjacency", adjacency, (size, count, count)), ("mask", mask, (size, count))):
        if array.shape != shape:
            raise ValueError(f"inputs[{name!r}] must have shape {shape}, got {array.shape}")
    # Else an empty row would count in what adds up derivatives by the inputs, as Soteria does.
    return nodes, adjacency, jax.lax.stop_gradient(mask)
