"""CAFE with steps I and II solved exactly, as a linear system."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax.attacks.cafe.features import InvertFn
from gia_jax.attacks.cafe.records import (
    LayerRounds,
    LayersFn,
    check_identifiable,
    pseudo_inverse,
    rounds_of,
    selection_matrix,
    unexplained,
)
from gia_jax.base import Batch, Observation, ReconstructFn, Reconstruction
from gia_jax.clients.vertical import SplitFn
from gia_jax.labels import ClassifierFn
from gia_jax.matching.initializations import as_granted, granted_like
from gia_jax.precision import widened_tree
from gia_jax.threat import granted


def cafe(
    layers_fn: LayersFn, classifier_fn: ClassifierFn, *, split_fn: SplitFn, invert_fn: InvertFn | None = None
) -> ReconstructFn:
    """Builds the CAFE attack with steps I and II solved exactly, which recovers all records of a vertical federation.

    The gradients of T rounds are G = S Z, where S, 0 or 1 of shape (T, N), says which records a round used, and row i
    of Z is what record i alone adds. Where S has rank N, Z = S^+ G, in exact arithmetic and for every layer at once.
    Its rows at the biases are V, and those at the weights the products h_i^T v_i, so that h_i = Z_i v_i / |v_i|^2. The
    last bias gives the labels: of d loss / d logits = p - onehot(y) only the entry of the label is negative.

    Threat model: an honest-but-curious server that knows the parameters, each round's update and the records that it
    used (`ThreatModel(batch_indices=True)`), and the shape of the records. The labels are recovered.

    Departures: the paper finds V and H by stochastic gradient descent (`cafe_descent`). Its step III matches the
    gradients of rounds. Here those of single records are known, Z, and each is matched by its own. The model is taken
    as frozen, as the paper's nearly is (Adam, learning rate 1e-6). Where it moves, Z mixes the gradients of different
    rounds, and the loss shows it.

    Args:
        layers_fn: Function `(update) -> layers` that picks the first fully connected layer of every worker, with its
            bias.
        classifier_fn: Function `(update) -> Dense` that picks the last layer, whose outputs are the logits of a
            softmax.
        split_fn: Function that splits inputs of shape (n, *d) into the workers' slices, such as `clients.quadrants`.
        invert_fn: Function of step III, such as `feature_matching(...)`. It maps `(key, params, features, records,
            gradients)` to the inputs: the features are H of every worker, the records a batch of zeros with the labels
            found, and the gradients those of every record alone, with a leading axis of records. None is for workers
            whose first layer is the fully connected one: H is the slice itself.

    Returns:
        A function `(key, observation) -> reconstruction`, with inputs of shape (N, *d) in the records' own order. Its
        loss is the share of the workers' gradients, in L2 norm, that V and H do not explain. A record whose v_i is zero
        at a worker has no h_i there, so its slice is left at 0. The function raises ValueError for updates of another
        shape, a missing bias, indices out of range, and batches that cannot identify the records. Inside a trace, where
        the indices are unknown, such batches make `is_finite` False instead.

    Examples:
        Two workers hold one feature each, and every round uses one of the two records:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, labels, observe
        >>> def dense(layer, x):
        ...     return x @ layer["kernel"] + layer["bias"]
        >>> def split_fn(inputs):
        ...     return [inputs[:, :1], inputs[:, 1:]]
        >>> worker = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
        >>> params = {"workers": [worker, worker], "server": {"kernel": jnp.eye(4, 3), "bias": jnp.ones(3)}}
        >>> indices = jnp.array([[0], [1]])
        >>> loss_fn = clients.cross_entropy(clients.vertical_model(split_fn, dense, dense))
        >>> client_fn = jax.jit(clients.vertical_sgd(loss_fn, indices))
        >>> records = Batch(jnp.array([[0.5, 2.0], [1.0, 3.0]]), jnp.array([1, 2]))
        >>> threat = ThreatModel(batch_indices=True)
        >>> seen = observe(jax.random.key(0), threat, client_fn, params, records, batch_indices=indices)
        >>> def layers_fn(update):
        ...     return [labels.Dense(**layer) for layer in update["workers"]]
        >>> attack = attacks.cafe(layers_fn, labels.dense("server"), split_fn=split_fn)
        >>> found = jax.jit(lambda key: attack(key, seen))(jax.random.key(1))
        >>> bool(jnp.allclose(found.batch.inputs, records.inputs, atol=0.01)), found.batch.labels.tolist()
        (True, [1, 2])
    """

    def reconstruct_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        like, indices = granted_like(observation), granted(observation, "batch_indices")
        update = widened_tree(observation.update)
        layers = [rounds_of(layer, len(indices)) for layer in layers_fn(update)]
        classifier = rounds_of(classifier_fn(update), len(indices))
        check_identifiable(indices, len(like))
        selection = selection_matrix(indices, len(like))
        inverse, rank = pseudo_inverse(selection)
        features, gradients = zip(*(record_features(inverse, layer) for layer in layers), strict=True)
        labels = jnp.argmin(jnp.matmul(inverse, classifier.bias, precision="highest"), -1)
        if invert_fn is None:
            inputs = joined(features, split_fn, like)
        else:
            size = indices.shape[1]  # a round shares the mean of its records' gradients
            alone = jax.tree.map(
                lambda leaf: size * jnp.einsum("nt,t...->n...", inverse, leaf, precision="highest"), update
            )
            inputs = invert_fn(key, observation.params, features, Batch(like, labels), alone)
        inputs = as_granted(inputs, observation)
        loss = unexplained(selection, layers, features, gradients)
        finite = (rank == len(like)) & jnp.isfinite(loss) & jnp.all(jnp.isfinite(inputs))
        return Reconstruction(Batch(inputs, labels), loss, finite)

    return reconstruct_fn


def record_features(
    inverse: Float[Array, "n t"], layer: LayerRounds
) -> tuple[Float[Array, "n d"], Float[Array, "n r"]]:
    """Solves steps I and II for one worker.

    Args:
        inverse: Pseudo-inverse of the selection matrix, shape (n, t).
        layer: Gradients of the worker's first fully connected layer.

    Returns:
        H, shape (n, d), and V, shape (n, r).
    """
    gradients = jnp.matmul(inverse, layer.bias, precision="highest")
    lengths = jnp.sum(jnp.square(gradients), 1)

    def of_one(record: tuple[Array, Array, Array]) -> Float[Array, " d"]:
        weights, gradient, length = record
        product = jnp.tensordot(weights, layer.kernel, 1, precision="highest")
        return jnp.where(length > 0, product @ gradient / jnp.where(length > 0, length, 1), 0)

    # Some records after the others: the products of all are as large as the gradients of n rounds.
    return jax.lax.map(of_one, (inverse, gradients, lengths), batch_size=64), gradients


def joined(features: Sequence[Float[Array, "n _"]], split_fn: SplitFn, like: Float[Array, "n *d"]) -> Array:
    """Puts the workers' features together to inputs whose slices they are.

    Args:
        features: Features of every worker, each the flattened slice, shape (n, d).
        split_fn: Function that splits inputs into the workers' slices.
        like: Array of the shape of the inputs, (n, *d).

    Returns:
        The inputs, shaped like `like`.

    Raises:
        ValueError: If the number or the sizes of the slices are not those of the features.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.cafe import joined
        >>> features = [jnp.array([[5.0]]), jnp.array([[6.0]])]
        >>> joined(features, lambda inputs: [inputs[:, 1:], inputs[:, :1]], jnp.zeros((1, 2))).tolist()
        [[6.0, 5.0]]
    """
    places = split_fn(np.arange(like[0].size).reshape(1, *like.shape[1:]))
    if len(places) != len(features):
        raise ValueError(f"split_fn must give one slice a worker, got {len(places)} for {len(features)} layers")
    flat = jnp.zeros((len(like), like[0].size), jnp.result_type(*features))
    for place, feature in zip(places, features, strict=True):
        if feature.shape[1] != place.size:
            raise ValueError(f"the layer must see the slice {place.shape[1:]}, got {feature.shape[1]} inputs")
        flat = flat.at[:, place.reshape(-1)].set(feature)
    return flat.reshape(like.shape)
