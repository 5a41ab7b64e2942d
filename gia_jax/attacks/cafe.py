"""CAFE: Jin, Chen, Hsu, Yu, Chen, CAFE: Catastrophic Data Leakage in Vertical Federated Learning, NeurIPS 2021.

Every worker passes its slice of record i through local layers to h_i, the input of its first fully connected layer
u_i = h_i W + b. Over the records of a batch the gradients of that layer are sums of what single records add, with
v_i = d loss / d u_i:

    grad b = sum over i of v_i        (step I recovers V)
    grad W = sum over i of h_i^T v_i  (step II recovers H, with V known)

and step III searches the data whose features are H, and whose gradients are the records' own. The records of every
batch are known: the servers of vertical federated learning align them. Without that, or without enough different
batches, sums cannot be told apart.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import (
    Attack,
    AttackInfo,
    AttackState,
    Batch,
    ClientFn,
    Observation,
    Params,
    ReconstructFn,
    Reconstruction,
    Updates,
)
from gia_jax.clients.vertical import SplitFn, check_batch_indices
from gia_jax.labels import ClassifierFn
from gia_jax.labels.classifier import Dense
from gia_jax.matching import priors
from gia_jax.matching.initializations import as_granted, granted_like, near_grey
from gia_jax.matching.objectives import euclidean
from gia_jax.matching.run import keep_best, run
from gia_jax.matching.solver import box, gradient_matching
from gia_jax.precision import wide_dtype, widened_tree, widening
from gia_jax.threat import granted, granted_labels

NUM_RECORDS = 800
BATCH_SIZE = 40
NUM_ROUNDS = 1_200
NUM_STEPS = 20_000  # of `cafe_descent`


class LayerRounds(NamedTuple):
    """The gradients of a fully connected layer with a bias in each of t rounds."""

    kernel: Float[Array, "t d r"]
    bias: Float[Array, "t r"]


LayersFn = Callable[[Updates], Sequence[Dense]]
FeaturesFn = Callable[[Params, Array], Sequence[Array]]
InvertFn = Callable[[PRNGKeyArray, Params, Sequence[Array], Batch, Updates], Array]


def cafe(
    layers_fn: LayersFn, classifier_fn: ClassifierFn, *, split_fn: SplitFn, invert_fn: InvertFn | None = None
) -> ReconstructFn:
    """All records of a vertical federation, with steps I and II solved exactly.

    The gradients of T rounds are G = S Z, where S, 0 or 1 of shape (T, N), says which records a round used, and row i
    of Z is what record i alone adds. Where S has rank N, Z = S^+ G, in exact arithmetic and for every layer at once:
    its rows at the biases are V, and those at the weights the products h_i^T v_i, so that h_i = Z_i v_i / |v_i|^2. The
    last bias gives the labels: of d loss / d logits = p - onehot(y) only the entry of the label is negative.

    Threat model: an honest-but-curious server that knows the parameters, each round's update and the records that it
    used (`ThreatModel(batch_indices=True)`), and the shape of the records; the labels are recovered.

    Departures: the paper finds V and H by stochastic gradient descent (`cafe_descent`). Its step III matches the
    gradients of rounds; here those of single records are known, Z, and each is matched by its own. The model is taken
    as frozen, as the paper's nearly is (Adam, learning rate 1e-6): where it moves, Z mixes the gradients of different
    rounds, and the loss shows it.

    Args:
        layers_fn: Picks from the update the first fully connected layer of every worker, with biases.
        classifier_fn: Picks from the update the last layer, whose outputs are the logits of a softmax.
        split_fn: Splits inputs (b, *d) into the workers' slices, such as `clients.quadrants`.
        invert_fn: Step III, `(key, params, H of every worker, batch of zeros with the labels found, the gradient of
            every record alone with a leading axis of records) -> inputs`, such as `feature_matching(...)`. None where
            the first layer of a worker is the fully connected one: H is the slice itself.

    Returns:
        `(key, observation) -> reconstruction`, the inputs (N, *d) in the records' own order. Its loss is the share of
        the workers' gradients, in L2 norm, that V and H do not explain. A record whose v_i is zero at a worker has no
        h_i there: it is left at 0. It raises ValueError for updates of another shape, a missing bias, indices out of
        range, and batches that cannot identify the records; inside a trace, where the indices are unknown, the latter
        make `is_finite` False.
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
        loss = _unexplained(selection, layers, features, gradients)
        finite = (rank == len(like)) & jnp.isfinite(loss) & jnp.all(jnp.isfinite(inputs))
        return Reconstruction(Batch(inputs, labels), loss, finite)

    return reconstruct_fn


def feature_matching(
    features_fn: FeaturesFn,
    *,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]],
    client_fn: ClientFn | None = None,
    total_variation_weight: float = 0.0,
    num_steps: int = 2_000,
    optimizer: optax.GradientTransformation | None = None,
) -> InvertFn:
    """Step III where features and gradients of every record are known exactly: the inputs in the pixel box that have
    them, by descent on the sum over records, workers and tensors of the squared distances relative to what is known.

    Args:
        features_fn: `(params, inputs) -> ` the input of every worker's first fully connected layer, (n, d) each.
        bounds: Darkest and brightest value of a pixel in the model's space, numbers or one a channel.
        client_fn: `(params, records) -> ` the gradient of every record alone, such as `clients.per_example(loss_fn)`.
            None leaves gradients out: they say more than H does where layers with weights come before it, such as
            convolutions.
        total_variation_weight: Weight beta of the total variation, >= 0 and finite.
        num_steps: Number of optimiser steps, at least 1.
        optimizer: Default: Adam, from 0.1 down to 0 along a cosine.

    Returns:
        The `invert_fn` of `cafe`; it keeps the best step.

    Raises:
        ValueError: A weight that is negative or not finite, a number of steps that is no positive integer, or bounds
            in the wrong order.
    """
    _check.not_negative(total_variation_weight=total_variation_weight)
    _check.finite("total_variation_weight", total_variation_weight)
    _check.integer(num_steps=num_steps)
    project_fn = box(*bounds)

    def invert_fn(
        key: PRNGKeyArray, params: Params, features: Sequence[Array], records: Batch, gradients: Updates
    ) -> Array:
        def known(inputs: Array) -> Any:
            batch = Batch(inputs, records.labels)
            return tuple(features_fn(params, inputs)), () if client_fn is None else client_fn(params, batch)

        # What is matched stands in place of an update, and no parameter is read but in `known`.
        wanted = tuple(features), () if client_fn is None else gradients
        attack = gradient_matching(
            lambda _, batch: known(batch.inputs),
            init_fn=near_grey(),
            objective_fn=recordwise,
            prior_fn=priors.combine((total_variation_weight, priors.total_variation())),
            label_fn=granted_labels,
            project_fn=project_fn,
            optimizer=optax.adam(optax.cosine_decay_schedule(0.1, num_steps)) if optimizer is None else optimizer,
        )
        extra = {"inputs_like": records.inputs, "labels": records.labels}
        observation = Observation(wanted, wanted, extra)
        return run(keep_best(attack), key, observation, num_steps=num_steps)[0].batch.inputs

    return invert_fn


@widening
def recordwise(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """The sum over leaves and records of |s - o|^2 / |o|^2; a record whose o is zero does not count in that leaf.

    Args:
        simulated: Simulated gradients of single records, leaves of shape (n, ...).
        observed: Known gradients of the same records, a tree like `simulated`.
    """

    def of_leaf(s: Array, o: Array) -> Float[Array, ""]:
        axes = tuple(range(1, o.ndim))
        length = jnp.sum(jnp.square(o), axes)
        missed = jnp.sum(jnp.square(s - o), axes)
        return jnp.sum(jnp.where(length > 0, missed / jnp.where(length > 0, length, 1), 0))

    return jnp.asarray(optax.tree.sum(jax.tree.map(of_leaf, simulated, observed)))


class Guess(NamedTuple):
    """What `cafe_descent` believes: V and H of every worker, the inputs, and the labels' logits."""

    gradients: Sequence[Float[Array, "n r"]]
    features: Sequence[Float[Array, "n d"]]
    inputs: Float[Array, "n *d"]
    logits: Float[Array, "n c"]


def cafe_descent(
    client_fn: ClientFn, *, layers_fn: LayersFn, features_fn: FeaturesFn, num_classes: int, learning_rate: float = 1e-2
) -> Attack:
    """The paper's single loop (algorithm 4): a step takes one round and moves the guesses of that round's records.

    * Step I: V by SGD on |sum v_i - grad b|^2, learning rate 5e-3.
    * Step II: H by Adam on |sum h_i^T v_i - grad W|^2.
    * Step III: inputs by Adam on 1e-2 D + 1e-3 |h(x) - H|^2 + 1e-4 TV, the last only where TV, the sum of absolute
      differences of an image, is above 25 in the mean; labels by Adam on 100 D, with D the squared distance of the
      round's gradients.

    Weights, rates and starts are those of the authors' code. Adam keeps moments for each record and moves only the
    chosen ones; its count is that of all steps.

    Threat model: as for `cafe`. Departures: a step draws its round at random, so that a number of rounds may be smaller
    than that of steps; the rate does not decay; TV is of the whole image, not of its slices.

    Args:
        client_fn: The client of one round that the attacker assumes, such as `federated_sgd`.
        layers_fn: Picks from the update the first fully connected layer of every worker, as for `cafe`.
        features_fn: `(params, inputs) -> ` the input of each of those layers, as for `feature_matching`.
        num_classes: Number of classes of the model, >= 2.
        learning_rate: Learning rate of Adam, > 0 and finite.

    Returns:
        The attack. Its reconstruction has probabilities for labels and the loss of `cafe`.

    Raises:
        ValueError: `num_classes` is no integer of at least 2, or `learning_rate` is not positive and finite.
    """
    _check.integer(2, num_classes=num_classes)
    _check.positive(learning_rate=learning_rate)
    _check.finite("learning_rate", learning_rate)
    optimizer = optax.adam(learning_rate)

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        like, indices = granted_like(observation), granted(observation, "batch_indices")
        check_batch_indices(indices, len(like))
        _check.fits(len(like) * num_classes, num_classes=num_classes)
        layers = [rounds_of(layer, len(indices)) for layer in layers_fn(observation.update)]
        key_v, key_h, key_x, key_y = jax.random.split(key, 4)

        def draw(key: PRNGKeyArray, shape: tuple[int, ...], low: float, high: float) -> Array:
            return jax.random.uniform(key, (len(like), *shape), wide_dtype(like.dtype), low, high)

        widths = [layer.kernel.shape[1:] for layer in layers]
        keys_v, keys_h = jax.random.split(key_v, len(widths)), jax.random.split(key_h, len(widths))
        guess = Guess(
            [draw(k, (r,), -8e-4, 8e-4) for k, (_, r) in zip(keys_v, widths, strict=True)],
            [draw(k, (d,), 0.0, 8e-2) for k, (d, _) in zip(keys_h, widths, strict=True)],
            draw(key_x, like.shape[1:], 0.0, 1.0),
            draw(key_y, (num_classes,), 0.0, 1.0),
        )
        return AttackState(guess, optimizer.init(guess[1:]))

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        indices = granted(observation, "batch_indices")
        this_round = jax.random.randint(key, (), 0, len(indices))
        chosen = indices[this_round]
        update = widened_tree(jax.tree.map(lambda leaf: leaf[this_round], observation.update))
        layers = layers_fn(update)
        guess, memory = rows(state.candidate, chosen), rows(state.memory, chosen)

        gradients = [v - 1e-2 * (v.sum(0) - layer.bias) for v, layer in zip(guess.gradients, layers, strict=True)]
        by_features = [
            2 * v @ (h.T @ v - layer.kernel).T for h, v, layer in zip(guess.features, gradients, layers, strict=True)
        ]

        def distance(inputs: Array, logits: Array) -> Float[Array, ""]:
            batch = Batch(as_granted(inputs, observation), jax.nn.softmax(logits))
            return euclidean(client_fn(observation.params, batch), update)

        def data_loss(inputs: Array) -> Float[Array, ""]:
            seen = features_fn(observation.params, as_granted(inputs, observation))
            missed = euclidean(list(seen), guess.features)
            variation = jnp.sum(jnp.abs(jnp.diff(inputs, axis=1))) + jnp.sum(jnp.abs(jnp.diff(inputs, axis=2)))
            variation /= len(inputs)
            return 1e-3 * missed + 1e-4 * jnp.where(variation > 25, variation, 0)

        match, by_data = jax.value_and_grad(distance, (0, 1))(guess.inputs, guess.logits)
        rest, by_rest = jax.value_and_grad(data_loss)(guess.inputs)
        grads = (by_features, 1e-2 * by_data[0] + by_rest, 100 * by_data[1])
        moves, memory = optimizer.update(grads, memory)
        moved = Guess(gradients, *optax.tree.add(guess[1:], moves))
        info = AttackInfo(1e-2 * match + rest, match, optax.tree.norm(grads))
        return AttackState(*with_rows(state, chosen, AttackState(moved, memory))), info

    def finalize(candidate: Guess, observation: Observation) -> Reconstruction:
        indices = granted(observation, "batch_indices")
        layers = [rounds_of(layer, len(indices)) for layer in layers_fn(widened_tree(observation.update))]
        selection = selection_matrix(indices, len(candidate.inputs))
        batch = Batch(as_granted(candidate.inputs, observation), jax.nn.softmax(candidate.logits))
        features = widened_tree(list(features_fn(observation.params, batch.inputs)))
        loss = _unexplained(selection, layers, features, candidate.gradients)
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(batch.inputs)) & jnp.all(jnp.isfinite(batch.labels))
        return Reconstruction(batch, loss, finite)

    return Attack(init, step, finalize)


def rows(tree: Any, chosen: Int[Array, " b"]) -> Any:
    """The chosen records of every leaf; scalars, such as Adam's count, are shared by all."""
    return jax.tree.map(lambda leaf: leaf[chosen] if leaf.ndim else leaf, tree)


def with_rows(tree: Any, chosen: Int[Array, " b"], moved: Any) -> Any:
    """The tree with the chosen records of every leaf in place of its own."""
    return jax.tree.map(lambda leaf, new: leaf.at[chosen].set(new) if leaf.ndim else new, tree, moved)


def selection_matrix(batch_indices: Int[Array, "t b"], num_records: int) -> Float[Array, "t n"]:
    """How often each round used each record."""
    return jnp.sum(jax.nn.one_hot(batch_indices, num_records, dtype=jnp.result_type(float)), 1)


def batch_rank(batch_indices: Array | np.ndarray, num_records: int) -> int:
    """The rank of the selection matrix, in float64: the records are identified if and only if it is their number.

    It takes T = N rounds at least; independent random batches reach it there, badly conditioned, and do well with
    1.5 N. Batches of shuffled epochs need E >= (N - 1) / (N / B - 1) epochs, since each epoch sums to the same row. A
    fixed partition has rank N / B, and the batch of all records rank 1, whatever T.

    Raises:
        ValueError: Indices that are no matrix of integers, or out of range.
    """
    return int(np.linalg.matrix_rank(_exact_selection(batch_indices, num_records)))


def batch_condition(batch_indices: Array | np.ndarray, num_records: int) -> float:
    """The condition number of the selection matrix, in float64, by which rounding errors of the updates may grow.

    Raises:
        ValueError: As `batch_rank`.
    """
    return float(np.linalg.cond(_exact_selection(batch_indices, num_records)))


def _exact_selection(batch_indices: Array | np.ndarray, num_records: int) -> np.ndarray:
    check_batch_indices(batch_indices, num_records)
    selection = np.zeros((len(batch_indices), num_records))
    np.add.at(selection, (np.arange(len(batch_indices))[:, None], np.asarray(batch_indices)), 1)
    return selection


def check_identifiable(batch_indices: Array | np.ndarray, num_records: int) -> None:
    """Raises ValueError for wrong indices, and where concrete batches cannot identify the records."""
    check_batch_indices(batch_indices, num_records)
    if _check.is_concrete(batch_indices):
        rank = batch_rank(batch_indices, num_records)
        if rank < num_records:
            raise ValueError(
                f"batch_indices cannot identify the records: the {len(batch_indices)} batches must have rank "
                f"{num_records}, got {rank}"
            )


def rounds_of(layer: Dense, num_rounds: int) -> LayerRounds:
    """The layer's gradients; ValueError without a bias, or where they are not those of `num_rounds` rounds."""
    if layer.bias is None:
        raise ValueError("cafe needs a bias in the layers, got none")
    if layer.kernel.ndim != 3 or layer.bias.ndim != 2 or {len(layer.kernel), len(layer.bias)} != {num_rounds}:
        raise ValueError(
            f"the layers' gradients must have shapes ({num_rounds}, d, r) and ({num_rounds}, r), got "
            f"{layer.kernel.shape} and {layer.bias.shape}"
        )
    return LayerRounds(layer.kernel, layer.bias)


def pseudo_inverse(selection: Float[Array, "t n"]) -> tuple[Float[Array, "n t"], Int[Array, ""]]:
    """S^+ and the rank of S, by singular values above the usual max(t, n) eps of the largest."""
    u, s, vt = jnp.linalg.svd(selection, full_matrices=False)
    kept = s > max(selection.shape) * jnp.finfo(s.dtype).eps * s[0]
    scaled = vt.T * jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    return jnp.matmul(scaled, u.T, precision="highest"), jnp.sum(kept)


def record_features(
    inverse: Float[Array, "n t"], layer: LayerRounds
) -> tuple[Float[Array, "n d"], Float[Array, "n r"]]:
    """Steps I and II for one worker: H, and V, from the gradients (t, d, r) and (t, r) of its layer."""
    gradients = jnp.matmul(inverse, layer.bias, precision="highest")
    lengths = jnp.sum(jnp.square(gradients), 1)

    def of_one(record: tuple[Array, Array, Array]) -> Float[Array, " d"]:
        weights, gradient, length = record
        product = jnp.tensordot(weights, layer.kernel, 1, precision="highest")
        return jnp.where(length > 0, product @ gradient / jnp.where(length > 0, length, 1), 0)

    # Some records after the others: the products of all are as large as the gradients of n rounds.
    return jax.lax.map(of_one, (inverse, gradients, lengths), batch_size=64), gradients


def joined(features: Sequence[Float[Array, "n d"]], split_fn: SplitFn, like: Float[Array, "n *d"]) -> Array:
    """Inputs shaped `like` whose slices are, flattened, the features."""
    places = split_fn(np.arange(like[0].size).reshape(1, *like.shape[1:]))
    if len(places) != len(features):
        raise ValueError(f"split_fn must give one slice a worker, got {len(places)} for {len(features)} layers")
    flat = jnp.zeros((len(like), like[0].size), jnp.result_type(*features))
    for place, feature in zip(places, features, strict=True):
        if feature.shape[1] != place.size:
            raise ValueError(f"the layer must see the slice {place.shape[1:]}, got {feature.shape[1]} inputs")
        flat = flat.at[:, place.reshape(-1)].set(feature)
    return flat.reshape(like.shape)


def _unexplained(
    selection: Float[Array, "t n"], layers: Sequence[LayerRounds], features: Sequence[Array], gradients: Sequence[Array]
) -> Float[Array, ""]:
    missed = [
        layer.kernel - jnp.einsum("tn,nd,nr->tdr", selection, h, v, precision="highest")
        for layer, h, v in zip(layers, features, gradients, strict=True)
    ]
    return optax.tree.norm(missed) / optax.tree.norm([layer.kernel for layer in layers])
