"""Soteria: the gradient of the last layer is shared without the features that tell most of the input.

Sun et al., Soteria: Provable Defense against Privacy Leakage in Federated Learning from Representation Perspective,
CVPR 2021, algorithm 1; scores as in the authors' code.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.extend import core as jex_core
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Shaped

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, Params, Updates
from gia_jax.defenses.pruning import checked_ratio, largest
from gia_jax.labels.classifier import ClassifierFn
from gia_jax.lowering import Lowering, lower, lowers_to_matmul
from gia_jax.models.functional import ApplyFn
from gia_jax.precision import is_floating, wide_dtype, widened, widened_tree

GUARD = 0.1  # added to |r_i| by the authors' code: a dead feature would divide by 0
LANES = 64  # derivatives of one example taken at once


def soteria(
    client_fn: ClientFn,
    apply_fn: ApplyFn,
    classifier_fn: ClassifierFn,
    *,
    ratio: float,
    num_probes: int = 0,
    lowering: Lowering = "auto",
) -> ClientFn:
    """Builds the client that shares no gradient for the features of least score |dr_i / dx| / (|r_i| + 0.1).

    r is the input of the last layer, with f features r_i, and x the client's input. Where that is a tree of arrays,
    such as a graph, x is all of its entries that are of a floating-point type. Exactly floor(ratio * f) features lose
    their row of the last kernel's gradient; every other entry of the update is shared as it is.

    The scores of the examples of a batch are added. A dead feature (r_i = 0 with no derivative) scores 0 and is pruned
    first, although its row is 0 already: see `live_share_pruned`. Through the mask there is no derivative.

    Departure, if `num_probes` is not 0: the lengths of f derivatives cost f passes for every example. From m directions
    v of independent normal entries, the same for all examples, |dr_i / dx|^2 is estimated as the mean of
    (dr_i / dx . v)^2, of all features at once. The length then has a relative standard error of about sqrt(1 / 2m).

    An attacker that knows the defense attacks the undefended client on what it sees not to be zero
    (`matching.adaptive.supported`), or without the last layer (`matching.objectives.selected`).

    Args:
        client_fn: Client to defend, a function `(params, batch) -> update`.
        apply_fn: Function `(params, inputs) -> logits`, whose last operation is the dense layer of `classifier_fn`.
        classifier_fn: Function that picks that layer from the parameters and from an update, such as
            `labels.dense("head")`.
        ratio: Share of the features to prune, in [0, 1). The paper prunes 0.01 to 0.8.
        num_probes: Number m of random directions that estimate the lengths, at least 0. 0 computes the lengths
            themselves, as in the paper.
        lowering: How convolutions are computed: "matmul" as matrix products, "native" as they are, "auto" chooses the
            first on CPU and the second elsewhere.

    Returns:
        The defended client, a function `(params, batch) -> update`.

    Raises:
        ValueError: If `ratio` is outside [0, 1), or `num_probes` is no integer of at least 0. The client raises it if
            the kernel that `classifier_fn` picks is no leaf of the update, such as a transposed one, no input is of a
            floating-point type, or `num_probes` is too large for memory.

    Examples:
        The inputs are the features here, and the largest one has the least score. Its row of the gradient is pruned:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, clients, defenses, labels
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> defended_fn = defenses.soteria(client_fn, apply_fn, labels.dense("head"), ratio=0.25)
        >>> batch = Batch(jnp.array([[1.0, 5.0, 2.0, 3.0]]), jnp.array([0]))
        >>> update = defended_fn({"head": {"kernel": jnp.ones((4, 2))}}, batch)
        >>> (update["head"]["kernel"] != 0).any(axis=1).tolist()
        [True, False, True, True]
    """
    checked_ratio(ratio)
    _check.integer(0, num_probes=num_probes)

    def client(params: Params, batch: Batch) -> Updates:
        update = client_fn(params, batch)
        kernel = classifier_fn(update).kernel
        if not any(leaf is kernel for leaf in jax.tree.leaves(update)):
            raise ValueError(
                f"classifier_fn must pick a leaf of the update as the kernel, got an array of its own {kernel.shape}"
            )
        options = {"ratio": ratio, "num_probes": num_probes, "lowering": lowering}
        kept = kept_features(apply_fn, classifier_fn, params, batch.inputs, **options)
        return jax.tree.map(lambda leaf: jnp.where(kept[:, None], leaf, 0) if leaf is kernel else leaf, update)

    return client


def kept_features(
    apply_fn: ApplyFn,
    classifier_fn: ClassifierFn,
    params: Params,
    inputs: PyTree[Shaped[Array, "b ..."]],
    *,
    ratio: float,
    num_probes: int = 0,
    lowering: Lowering = "auto",
) -> Bool[Array, " f"]:
    """Returns which features Soteria keeps: all but the floor(ratio * f) of least score, and the first of equal ones.

    Args:
        apply_fn: Function `(params, inputs) -> logits`, whose last operation is the dense layer of `classifier_fn`.
        classifier_fn: Function that picks that layer from the parameters, such as `labels.dense("head")`.
        params: Parameters of the model.
        inputs: Inputs of the client's batch, shape (b, *d), or a tree of arrays whose first axis has length b.
        ratio: Share of the features to prune, in [0, 1).
        num_probes: Number of random directions that estimate the lengths of the derivatives, at least 0. 0 computes the
            lengths themselves.
        lowering: How convolutions are computed: "matmul", "native" or "auto".

    Returns:
        A mask of shape (f,), True for the features kept.

    Raises:
        ValueError: If `ratio` is outside [0, 1), no input is of a floating-point type, `num_probes` is too large for
            memory, or `lowering` is unknown.

    Examples:
        The inputs are the features here. All have derivatives of length 1, and the largest one has the least score:

        >>> import jax.numpy as jnp
        >>> from gia_jax import defenses, labels
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"]
        >>> params = {"head": {"kernel": jnp.ones((4, 2))}}
        >>> inputs = jnp.array([[1.0, 5.0, 2.0, 3.0]])
        >>> defenses.kept_features(apply_fn, labels.dense("head"), params, inputs, ratio=0.25).tolist()
        [True, False, True, True]
    """
    scores = _scores(apply_fn, classifier_fn, params, inputs, num_probes, lowering)
    size = len(scores)
    return largest([scores], size - math.floor(checked_ratio(ratio) * size))[0]


def live_share_pruned(
    apply_fn: ApplyFn,
    classifier_fn: ClassifierFn,
    params: Params,
    inputs: PyTree[Shaped[Array, "b ..."]],
    *,
    ratio: float,
    num_probes: int = 0,
    lowering: Lowering = "auto",
) -> Float[Array, ""]:
    """Computes the share that Soteria prunes of the live features, which are not 0 for every example of the batch.

    Where it is 0, the update is the undefended one. It is 0 also where no feature is alive.

    Args:
        apply_fn: Function `(params, inputs) -> logits`, whose last operation is the dense layer of `classifier_fn`.
        classifier_fn: Function that picks that layer from the parameters, such as `labels.dense("head")`.
        params: Parameters of the model.
        inputs: Inputs of the client's batch, shape (b, *d), or a tree of arrays whose first axis has length b.
        ratio: Share of all features to prune, in [0, 1).
        num_probes: Number of random directions that estimate the lengths of the derivatives, at least 0. 0 computes the
            lengths themselves.
        lowering: How convolutions are computed: "matmul", "native" or "auto".

    Returns:
        The share of the live features that is pruned, in [0, 1].

    Raises:
        ValueError: If `ratio` is outside [0, 1), no input is of a floating-point type, `num_probes` is too large for
            memory, or `lowering` is unknown.

    Examples:
        One of four features is pruned. It is the dead one, so that nothing is defended:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import defenses, labels
        >>> apply_fn = lambda params, inputs: jax.nn.relu(inputs) @ params["head"]["kernel"]
        >>> params = {"head": {"kernel": jnp.ones((4, 2))}}
        >>> inputs = jnp.array([[-1.0, 5.0, 2.0, 3.0]])
        >>> float(defenses.live_share_pruned(apply_fn, labels.dense("head"), params, inputs, ratio=0.25))
        0.0
    """
    options = {"ratio": ratio, "num_probes": num_probes, "lowering": lowering}
    kept = kept_features(apply_fn, classifier_fn, params, inputs, **options)
    live = jnp.any(_features(apply_fn, classifier_fn, params, inputs) != 0, axis=0)
    return jnp.sum(live & ~kept) / jnp.maximum(jnp.sum(live), 1)


def _features(
    apply_fn: ApplyFn, classifier_fn: ClassifierFn, params: Params, inputs: PyTree[Shaped[Array, "b ..."]]
) -> Float[Array, "b f"]:
    """Returns what enters the last layer: the derivative of a logit with respect to its column of the kernel."""

    def logit(tree: Params, example: PyTree[Array]) -> Float[Array, ""]:
        return apply_fn(tree, jax.tree.map(lambda leaf: leaf[None], example))[0, 0]

    def features(example: PyTree[Array]) -> Float[Array, " f"]:
        return classifier_fn(jax.grad(logit)(params, example)).kernel[:, 0]

    return jax.vmap(features)(inputs)


def _scores(
    apply_fn: ApplyFn,
    classifier_fn: ClassifierFn,
    params: Params,
    inputs: PyTree[Shaped[Array, "b ..."]],
    num_probes: int,
    lowering: Lowering,
) -> Float[Array, " f"]:
    """Returns the score |dr_i / dx| / (|r_i| + 0.1) of every feature, added over the examples."""
    _check.examples(inputs, name="inputs")
    leaves, tree = jax.tree.flatten(inputs)
    moves = [is_floating(leaf) for leaf in leaves]
    if not any(moves):
        types = ", ".join(str(leaf.dtype) for leaf in leaves)
        raise ValueError(f"inputs must be of a floating-point type, got {types}")

    def scores_fn(params: Params, *leaves: Array) -> Float[Array, " f"]:
        def of_one(example: tuple[Array, ...]) -> Float[Array, " f"]:
            def features_fn(x: list[Array]) -> Float[Array, " f"]:
                found = iter(x)
                whole = [next(found) if moved else leaf for leaf, moved in zip(example, moves, strict=True)]
                batch = jax.tree.map(lambda leaf: leaf[None], jax.tree.unflatten(tree, whole))
                return _features(apply_fn, classifier_fn, params, batch)[0]

            x = [leaf for leaf, moved in zip(example, moves, strict=True) if moved]
            lengths_fn = functools.partial(_estimated_lengths, num_probes=num_probes) if num_probes else _lengths
            features, lengths = lengths_fn(features_fn, x)
            return lengths / (jnp.abs(widened(features)) + GUARD)

        # One example after the other: memory does not grow with the batch.
        return jnp.sum(jax.lax.map(of_one, leaves), axis=0)

    traced = jax.make_jaxpr(scores_fn)(params, *leaves)
    closed = lower(traced) if lowers_to_matmul(lowering) else traced
    return jex_core.jaxpr_as_fun(closed)(*jax.tree.leaves((params, leaves)))[0]


def _lengths(
    features_fn: Callable[[list[Array]], Array], x: list[Float[Array, "..."]]
) -> tuple[Float[Array, " f"], Float[Array, " f"]]:
    """Returns the features of one example and the lengths |dr_i / dx|, one derivative after the other."""
    features, pull = jax.vjp(features_fn, x)

    def length(i: Array) -> Float[Array, ""]:
        (row,) = pull(jnp.zeros_like(features).at[i].set(1))
        return optax.tree.norm(widened_tree(row))

    return features, jax.lax.map(length, jnp.arange(len(features)), batch_size=LANES)


def _estimated_lengths(
    features_fn: Callable[[list[Array]], Array], x: list[Float[Array, "..."]], *, num_probes: int
) -> tuple[Float[Array, " f"], Float[Array, " f"]]:
    """Returns the features of one example and estimates of |dr_i / dx|, from derivatives along random directions."""
    _check.fits(num_probes * sum(leaf.size for leaf in x), num_probes=num_probes)
    features, push = jax.linearize(features_fn, x)
    # The directions are public and the same for everyone. Their key is one that no user draws inputs from by chance.
    key = jax.random.key(int.from_bytes(b"prob"))
    keys = [key] if len(x) == 1 else jax.random.split(key, len(x))

    def drawn(key: PRNGKeyArray, leaf: Array) -> Float[Array, "m ..."]:
        return jax.random.normal(key, (num_probes, *leaf.shape), wide_dtype(leaf.dtype)).astype(leaf.dtype)

    directions = [drawn(own, leaf) for own, leaf in zip(keys, x, strict=True)]
    pushed = widened(jax.lax.map(push, directions, batch_size=LANES))
    return features, jnp.sqrt(jnp.mean(jnp.square(pushed), axis=0))
