"""CAFE, an attack on vertical federated learning, in which workers hold different features of the same records.

Jin, Chen, Hsu, Yu, Chen, CAFE: Catastrophic Data Leakage in Vertical Federated Learning, NeurIPS 2021.

Every worker passes its slice of record i through local layers to h_i, the input of its first fully connected layer
u_i = h_i W + b. Over the records of a batch the gradients of that layer are sums of what single records add, with
v_i = d loss / d u_i:

    grad b = sum over i of v_i        (step I recovers V)
    grad W = sum over i of h_i^T v_i  (step II recovers H, with V known)

Step III searches the data whose features are H, and whose gradients are the records' own. The records of every batch
are known, because the servers of vertical federated learning align them. Without that, or without enough different
batches, the sums cannot be told apart.
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


class LayerRounds(NamedTuple):
    """The gradients that a fully connected layer with a bias has in each of t rounds.

    Attributes:
        kernel: Gradients of the kernel, shape (t, d, r).
        bias: Gradients of the bias, shape (t, r).
    """

    kernel: Float[Array, "t d r"]
    bias: Float[Array, "t r"]


LayersFn = Callable[[Updates], Sequence[Dense]]
FeaturesFn = Callable[[Params, Array], Sequence[Array]]
InvertFn = Callable[[PRNGKeyArray, Params, Sequence[Array], Batch, Updates], Array]


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
    """Builds step III of `cafe`, which searches the images in the pixel box that have the known features and gradients.

    It descends on the sum over records, workers and tensors of the squared distances relative to what is known, which
    steps I and II found for every record exactly.

    Args:
        features_fn: Function `(params, images) -> features` that computes the input of every worker's first fully
            connected layer, one array of shape (n, d) each.
        bounds: Darkest and brightest value of a pixel in the model's space, as two numbers or two arrays with one value
            for each channel.
        client_fn: Function `(params, records) -> gradients` that computes the gradient of every record alone, such as
            `clients.per_example(loss_fn)`. None leaves gradients out. They say more than H does where layers with
            weights come before it, such as convolutions.
        total_variation_weight: Weight beta of the total variation in the loss, at least 0 and finite.
        num_steps: Number of optimiser steps, at least 1.
        optimizer: Optimiser of the images. By default it is Adam, whose rate goes from 0.1 down to 0 along a cosine.

    Returns:
        The `invert_fn` of `cafe`, which keeps the best step.

    Raises:
        ValueError: If `total_variation_weight` is negative or not finite, `num_steps` is not a positive integer, or the
            bounds are in the wrong order.

    Examples:
        The features are twice the pixels, and the pixels are found from them:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch
        >>> from gia_jax.attacks.cafe import feature_matching
        >>> def features_fn(params, images):
        ...     return [2 * images.reshape(len(images), -1)]
        >>> invert_fn = feature_matching(features_fn, bounds=(0.0, 1.0), num_steps=100)
        >>> images = jnp.array([0.25, 0.75]).reshape(1, 1, 2, 1)
        >>> records = Batch(jnp.zeros_like(images), jnp.array([0]))
        >>> found = jax.jit(lambda key: invert_fn(key, {}, features_fn({}, images), records, ()))(jax.random.key(0))
        >>> bool(jnp.all(jnp.abs(found - images) < 0.01))
        True
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
    """Computes the sum over leaves and records of |s - o|^2 / |o|^2.

    A record whose o is zero in a leaf does not count there.

    Args:
        simulated: Simulated gradients s of single records, leaves of shape (n, ...).
        observed: Known gradients o of the same records, a tree like `simulated`.

    Returns:
        The sum, a scalar of at least 0.

    Examples:
        The first record is all wrong, the second is right, and the third does not count:

        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.cafe import recordwise
        >>> observed = jnp.array([[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]])
        >>> print(f"{recordwise(jnp.array([[0.0, 0.0], [1.0, 2.0], [5.0, 5.0]]), observed):.2f}")
        1.00
    """

    def of_leaf(s: Array, o: Array) -> Float[Array, ""]:
        axes = tuple(range(1, o.ndim))
        length = jnp.sum(jnp.square(o), axes)
        missed = jnp.sum(jnp.square(s - o), axes)
        return jnp.sum(jnp.where(length > 0, missed / jnp.where(length > 0, length, 1), 0))

    return jnp.asarray(optax.tree.sum(jax.tree.map(of_leaf, simulated, observed)))


class Guess(NamedTuple):
    """The unknowns that `cafe_descent` moves, with one row for every record.

    Attributes:
        gradients: V of every worker, shape (n, r) each.
        features: H of every worker, shape (n, d) each.
        inputs: Inputs of the records, shape (n, *d).
        logits: Logits of the labels, shape (n, c).
    """

    gradients: Sequence[Float[Array, "n _"]]
    features: Sequence[Float[Array, "n _"]]
    inputs: Float[Array, "n *d"]
    logits: Float[Array, "n c"]


def cafe_descent(
    client_fn: ClientFn, *, layers_fn: LayersFn, features_fn: FeaturesFn, num_classes: int, learning_rate: float = 1e-2
) -> Attack:
    """Builds the CAFE attack as the paper's single loop (algorithm 4).

    A step takes one round and moves the guesses of that round's records:

    * Step I: V by SGD on |sum v_i - grad b|^2, learning rate 5e-3.
    * Step II: H by Adam on |sum h_i^T v_i - grad W|^2.
    * Step III: inputs by Adam on 1e-2 D + 1e-3 |h(x) - H|^2 + 1e-4 TV, and labels by Adam on 100 D. D is the squared
      distance of the round's gradients. TV is the sum of absolute differences of an image, in the mean over the round's
      images, and counts only where it is above 25.

    Weights, rates and starts are those of the authors' code. Adam keeps moments for each record and moves only the
    chosen ones. Its count is that of all steps.

    Threat model: an honest-but-curious server that knows the parameters, each round's update and the records that it
    used (`ThreatModel(batch_indices=True)`), and the shape of the records. The labels are recovered.

    Departures: a step draws its round at random, so that the number of rounds may be smaller than that of steps. The
    rate does not decay. TV is of the whole image, not of its slices.

    Args:
        client_fn: Client function `(params, batch) -> update` of one round that the attacker assumes, such as
            `federated_sgd`.
        layers_fn: Function `(update) -> layers` that picks the first fully connected layer of every worker, with its
            bias.
        features_fn: Function `(params, images) -> features` that computes the input of each of those layers, one array
            of shape (n, d) each.
        num_classes: Number of classes of the model, at least 2.
        learning_rate: Learning rate of Adam, above 0 and finite.

    Returns:
        The attack. The labels of its reconstruction are probabilities. Its loss is the share of the workers' gradients,
        in L2 norm, that V and the features of the reconstructed inputs do not explain.

    Raises:
        ValueError: If `num_classes` is not an integer of at least 2, or `learning_rate` is not positive and finite.

    Examples:
        Two workers hold one half of each image, and the labels are among the unknowns:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, labels, observe, run
        >>> def dense(layer, x):
        ...     return x.reshape(len(x), -1) @ layer["kernel"] + layer["bias"]
        >>> def split_fn(images):
        ...     return [images[:, :1], images[:, 1:]]
        >>> worker = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> params = {"workers": [worker, worker], "server": {"kernel": jnp.eye(4, 3), "bias": jnp.ones(3)}}
        >>> indices = jnp.array([[0], [1]])
        >>> loss_fn = clients.cross_entropy(clients.vertical_model(split_fn, dense, dense))
        >>> client_fn = jax.jit(clients.vertical_sgd(loss_fn, indices))
        >>> records, threat = Batch(jnp.ones((2, 2, 2, 1)), jnp.array([1, 2])), ThreatModel(batch_indices=True)
        >>> seen = observe(jax.random.key(0), threat, client_fn, params, records, batch_indices=indices)
        >>> attack = attacks.cafe_descent(
        ...     clients.federated_sgd(loss_fn),
        ...     layers_fn=lambda update: [labels.Dense(**layer) for layer in update["workers"]],
        ...     features_fn=lambda params, images: [part.reshape(len(part), -1) for part in split_fn(images)],
        ...     num_classes=3,
        ... )
        >>> found = jax.jit(lambda key: run(attack, key, seen, num_steps=2)[0])(jax.random.key(1))
        >>> found.batch.inputs.shape, found.batch.labels.shape
        ((2, 2, 2, 1), (2, 3))
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
    """Takes the chosen records out of every leaf. Scalars, such as Adam's count, belong to all records and stay.

    Args:
        tree: Tree of arrays with a leading axis of records, and of scalars.
        chosen: Indices of the records, shape (b,).

    Returns:
        The tree of the chosen records.
    """
    return jax.tree.map(lambda leaf: leaf[chosen] if leaf.ndim else leaf, tree)


def with_rows(tree: Any, chosen: Int[Array, " b"], moved: Any) -> Any:
    """Puts new values of the chosen records into every leaf, the reverse of `rows`. Scalars are replaced as a whole.

    Args:
        tree: Tree of arrays with a leading axis of records, and of scalars.
        chosen: Indices of the records, shape (b,).
        moved: New values of the chosen records, a tree as `rows` returns it.

    Returns:
        The tree with the new values.
    """
    return jax.tree.map(lambda leaf, new: leaf.at[chosen].set(new) if leaf.ndim else new, tree, moved)


def selection_matrix(batch_indices: Int[Array, "t b"], num_records: int) -> Float[Array, "t n"]:
    """Computes the matrix S that says how often each round used each record.

    Args:
        batch_indices: Indices of the records that each round used, shape (t, b).
        num_records: Number n of records.

    Returns:
        The matrix, shape (t, n).

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.cafe import selection_matrix
        >>> selection_matrix(jnp.array([[0, 2], [1, 1]]), 3).tolist()
        [[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]]
    """
    return jnp.sum(jax.nn.one_hot(batch_indices, num_records, dtype=jnp.result_type(float)), 1)


def batch_rank(batch_indices: Array | np.ndarray, num_records: int) -> int:
    """Computes the rank of the selection matrix, in float64.

    The records are identified if and only if the rank is their number N. At least T = N rounds are needed. Independent
    random batches reach rank N there, badly conditioned, and do well with 1.5 N rounds. Batches of B records from E
    shuffled epochs need E >= (N - 1) / (N / B - 1), since each epoch sums to the same row. A fixed partition has rank N
    / B, and the batch of all records rank 1, whatever T.

    Args:
        batch_indices: Indices of the records that each round used, shape (t, b).
        num_records: Number N of records.

    Returns:
        The rank.

    Raises:
        ValueError: If the indices are not a matrix of integers, or are out of range.

    Examples:
        Three pairs of three records identify them, and one pair with the rest does not:

        >>> import numpy as np
        >>> from gia_jax.attacks.cafe import batch_rank
        >>> batch_rank(np.array([[0, 1], [1, 2], [2, 0]]), 3), batch_rank(np.array([[0, 1], [1, 0], [2, 2]]), 3)
        (3, 2)
    """
    return int(np.linalg.matrix_rank(_exact_selection(batch_indices, num_records)))


def batch_condition(batch_indices: Array | np.ndarray, num_records: int) -> float:
    """Computes the condition number of the selection matrix, in float64.

    Rounding errors of the updates may grow by this factor.

    Args:
        batch_indices: Indices of the records that each round used, shape (t, b).
        num_records: Number of records.

    Returns:
        The condition number, at least 1.

    Raises:
        ValueError: If the indices are not a matrix of integers, or are out of range.

    Examples:
        Rounds of one record add no error, and these pairs may double it:

        >>> import numpy as np
        >>> from gia_jax.attacks.cafe import batch_condition
        >>> print(f"{batch_condition(np.array([[0], [1], [2]]), 3):.2f}")
        1.00
        >>> print(f"{batch_condition(np.array([[0, 1], [1, 2], [2, 0]]), 3):.2f}")
        2.00
    """
    return float(np.linalg.cond(_exact_selection(batch_indices, num_records)))


def _exact_selection(batch_indices: Array | np.ndarray, num_records: int) -> np.ndarray:
    """Returns the selection matrix in float64, for indices that are checked first."""
    check_batch_indices(batch_indices, num_records)
    selection = np.zeros((len(batch_indices), num_records))
    np.add.at(selection, (np.arange(len(batch_indices))[:, None], np.asarray(batch_indices)), 1)
    return selection


def check_identifiable(batch_indices: Array | np.ndarray, num_records: int) -> None:
    """Raises ValueError for wrong indices, and where concrete batches cannot identify the records.

    Args:
        batch_indices: Indices of the records that each round used, shape (t, b).
        num_records: Number of records.

    Raises:
        ValueError: If the indices are not a matrix of integers, are out of range, or have too small a `batch_rank`.
    """
    check_batch_indices(batch_indices, num_records)
    if _check.is_concrete(batch_indices):
        rank = batch_rank(batch_indices, num_records)
        if rank < num_records:
            raise ValueError(
                f"batch_indices cannot identify the records: the {len(batch_indices)} batches must have rank "
                f"{num_records}, got {rank}"
            )


def rounds_of(layer: Dense, num_rounds: int) -> LayerRounds:
    """Checks that a layer's gradients are those of the rounds, and returns them.

    Args:
        layer: Gradients of a layer, as `layers_fn` picks them from the update.
        num_rounds: Number t of rounds.

    Returns:
        The gradients, of shapes (t, d, r) and (t, r).

    Raises:
        ValueError: If the layer has no bias, or its gradients have other shapes.
    """
    if layer.bias is None:
        raise ValueError("cafe needs a bias in the layers, got none")
    if layer.kernel.ndim != 3 or layer.bias.ndim != 2 or {len(layer.kernel), len(layer.bias)} != {num_rounds}:
        raise ValueError(
            f"the layers' gradients must have shapes ({num_rounds}, d, r) and ({num_rounds}, r), got "
            f"{layer.kernel.shape} and {layer.bias.shape}"
        )
    return LayerRounds(layer.kernel, layer.bias)


def pseudo_inverse(selection: Float[Array, "t n"]) -> tuple[Float[Array, "n t"], Int[Array, ""]]:
    """Computes S^+ and the rank of S, by the singular values above the usual max(t, n) eps of the largest.

    Args:
        selection: Selection matrix S, shape (t, n).

    Returns:
        The pseudo-inverse, shape (n, t), and the rank.
    """
    u, s, vt = jnp.linalg.svd(selection, full_matrices=False)
    kept = s > max(selection.shape) * jnp.finfo(s.dtype).eps * s[0]
    scaled = vt.T * jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    return jnp.matmul(scaled, u.T, precision="highest"), jnp.sum(kept)


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


def _unexplained(
    selection: Float[Array, "t n"], layers: Sequence[LayerRounds], features: Sequence[Array], gradients: Sequence[Array]
) -> Float[Array, ""]:
    """Computes the share of the kernels' gradients, in L2 norm, that the features H and gradients V do not explain."""
    missed = [
        layer.kernel - jnp.einsum("tn,nd,nr->tdr", selection, h, v, precision="highest")
        for layer, h, v in zip(layers, features, gradients, strict=True)
    ]
    return optax.tree.norm(missed) / optax.tree.norm([layer.kernel for layer in layers])
