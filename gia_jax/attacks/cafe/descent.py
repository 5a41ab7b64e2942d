"""CAFE as the single loop of its paper, which descends on all three steps at once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.attacks.cafe.records import FeaturesFn, LayerRounds, LayersFn, rounds_of, selection_matrix, unexplained
from gia_jax.base import Attack, AttackInfo, AttackState, Batch, ClientFn, Observation, Reconstruction
from gia_jax.clients.vertical import check_batch_indices
from gia_jax.labels.classifier import Dense
from gia_jax.matching.initializations import as_granted, granted_like
from gia_jax.matching.objectives import euclidean
from gia_jax.precision import wide_dtype, widened_tree
from gia_jax.threat import granted


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
        guess = _first_guess(key, like, layers, num_classes)
        return AttackState(guess, optimizer.init(guess[1:]))

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        indices = granted(observation, "batch_indices")
        this_round = jax.random.randint(key, (), 0, len(indices))
        chosen = indices[this_round]
        update = widened_tree(jax.tree.map(lambda leaf: leaf[this_round], observation.update))
        layers = layers_fn(update)
        guess, memory = rows(state.candidate, chosen), rows(state.memory, chosen)

        gradients, by_features = _by_layers(guess, layers)

        def distance(inputs: Array, logits: Array) -> Float[Array, ""]:
            batch = Batch(as_granted(inputs, observation), jax.nn.softmax(logits))
            return euclidean(client_fn(observation.params, batch), update)

        def data_loss(inputs: Array) -> Float[Array, ""]:
            seen = features_fn(observation.params, as_granted(inputs, observation))
            missed = euclidean(list(seen), guess.features)
            variation = _variation(inputs)
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
        loss = unexplained(selection, layers, features, candidate.gradients)
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(batch.inputs)) & jnp.all(jnp.isfinite(batch.labels))
        return Reconstruction(batch, loss, finite)

    return Attack(init, step, finalize)


def _first_guess(key: PRNGKeyArray, like: Array, layers: Sequence[LayerRounds], num_classes: int) -> Guess:
    """Draws where the descent starts, for every record of `like`."""
    key_v, key_h, key_x, key_y = jax.random.split(key, 4)

    def draw(key: PRNGKeyArray, shape: tuple[int, ...], low: float, high: float) -> Array:
        return jax.random.uniform(key, (len(like), *shape), wide_dtype(like.dtype), low, high)

    widths = [layer.kernel.shape[1:] for layer in layers]
    keys_v, keys_h = jax.random.split(key_v, len(widths)), jax.random.split(key_h, len(widths))
    return Guess(
        [draw(k, (r,), -8e-4, 8e-4) for k, (_, r) in zip(keys_v, widths, strict=True)],
        [draw(k, (d,), 0.0, 8e-2) for k, (d, _) in zip(keys_h, widths, strict=True)],
        draw(key_x, like.shape[1:], 0.0, 1.0),
        draw(key_y, (num_classes,), 0.0, 1.0),
    )


def _by_layers(guess: Guess, layers: Sequence[Dense]) -> tuple[list[Array], list[Array]]:
    """Does step I, and returns the new V of every worker with the derivatives of step II by H."""
    biases = [layer.bias for layer in layers if layer.bias is not None]  # `init` refuses a layer without one
    gradients = [v - 1e-2 * (v.sum(0) - bias) for v, bias in zip(guess.gradients, biases, strict=True)]
    by_features = [
        2 * v @ (h.T @ v - layer.kernel).T for h, v, layer in zip(guess.features, gradients, layers, strict=True)
    ]
    return gradients, by_features


def _variation(images: Float[Array, "b *d"]) -> Float[Array, ""]:
    """Returns the sum of absolute differences of an image, in the mean over the images."""
    variation = jnp.sum(jnp.abs(jnp.diff(images, axis=1))) + jnp.sum(jnp.abs(jnp.diff(images, axis=2)))
    return variation / len(images)


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
