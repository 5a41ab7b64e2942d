"""Where secure aggregation does not protect: what a server does with the exact sum, and with what travels beside it.

Each attack here shows one such limit. All but `inconsistent_models` and `imprinted` leave the protocol and the models
alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from gia_jax import _check
from gia_jax.base import Observation, Params, Updates
from gia_jax.labels import ClassifierFn, bias_counts
from gia_jax.precision import widened_tree
from gia_jax.secure_aggregation.observe import Ciphertext, observe
from gia_jax.secure_aggregation.protocol import ServerView

Path = Sequence[str]


def lone_honest_client(
    view: ServerView, client: int, residues: UInt32[np.ndarray, "n p"], params: Params
) -> Observation | Ciphertext:
    """Reads the exact update of one client when all other contributors collude with the server, or are its sybils.

    No protocol prevents it: the sum less what the others put in is what is left.

    Args:
        view: The server's view after a run.
        client: Number of the only honest client.
        residues: What every client put in, shape (n, p), from `quantized`. The row of `client` is not read.
        params: Parameters that the server sent.

    Returns:
        The observation of the client, or `Ciphertext` where the server does not learn the sum.

    Raises:
        ValueError: If `client` is not in the sum, or the residues are not of all clients.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.secagg(3, threshold=2, clip=1.0)
        >>> updates = jnp.array([[0.5, 0.25], [0.1, 0.1], [0.2, 0.0]])
        >>> view = sa.aggregate(jax.random.key(0), protocol, updates)
        >>> residues, _ = sa.quantized(jax.random.key(0), protocol, updates)
        >>> found = sa.limits.lone_honest_client(view, 0, residues, params=jnp.zeros(2))
        >>> [round(float(entry), 2) for entry in found.update]
        [0.5, 0.25]
    """
    if (count := view.quantizer.num_clients) != len(residues):
        raise ValueError(f"residues must have {count} rows, one for each client, got {len(residues)}")
    if client not in view.contributors:
        raise ValueError(f"client must be a contributor, got {client}")
    colluders = {other: residues[other] for other in view.contributors if other != client}
    return observe(view, "aggregate", params, colluders=colluders)


def inconsistent_models(params: Params, layer: Path, victim: int, num_clients: int) -> Params:
    """Makes different parameters for every client, so that only the victim's gradient of a layer is in the sum.

    Pasquini, Francati and Ateniese, Eluding Secure Aggregation in Federated Learning via Model Inconsistency, CCS 2022.
    All but the victim get a layer of which no unit is ever active: behind ReLU its gradient is zero, for any data. It
    works with any number of clients and any protocol. Clients notice it by comparing models. `secagg` with
    `model_hashes` makes the sum useless.

    Threat model: a malicious server that sends each client parameters of its own.

    Args:
        params: Parameters that the victim gets.
        layer: Keys that lead to a layer with "kernel" and "bias" that is followed by ReLU.
        victim: Number of the victim, from 0 to N - 1.
        num_clients: Number N of clients, at least 1.

    Returns:
        A tree like `params` with a leading axis of the clients, for `vmap(client_fn)`.

    Raises:
        ValueError: If there is no such layer or victim, or the models do not fit into memory.

    Examples:
        The bias of client 1 is as it was, and that of client 0 keeps every unit inactive:

        >>> import jax.numpy as jnp
        >>> from gia_jax.secure_aggregation import limits
        >>> params = {"first": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
        >>> sent = limits.inconsistent_models(params, ["first"], victim=1, num_clients=2)
        >>> sent["first"]["bias"].tolist()
        [[-1.0, -1.0], [0.0, 0.0]]
    """
    _check.integer(num_clients=num_clients)
    _check.integer(0, num_clients - 1, victim=victim)
    _check.fits(num_clients * sum(leaf.size for leaf in jax.tree.leaves(params)), num_clients=num_clients)
    old = _layer(params, layer)
    dead = _replaced(params, layer, {"kernel": jnp.zeros_like(old["kernel"]), "bias": -jnp.ones_like(old["bias"])})
    sent = [params if client == victim else dead for client in range(num_clients)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sent)


def model_hash(params: Params) -> bytes:
    """Hashes a model for `secagg(model_hashes=...)`: two models share a hash only where all their parameters are equal.

    Args:
        params: Parameters of the model.

    Returns:
        The hash, 32 bytes, of every name, type, shape and value.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.secure_aggregation import limits
        >>> first, second = {"w": jnp.zeros(2)}, {"w": jnp.array([0.0, 1e-6])}
        >>> len(limits.model_hash(first)), limits.model_hash(first) == limits.model_hash(second)
        (32, False)
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.digest()


def imprinted(
    params: Params, layer: Path, following: Path, thresholds: Float[Array, " k"], *, gain: float = 0.25
) -> Params:
    """Alters a dense layer of k units so that single examples come apart in its gradient.

    They do so also in the gradient of a sum over clients.

    Fowl et al., Robbing the Fed, ICLR 2022, section 4: unit j is active where the mean of the input is above threshold
    j, and all units feed the next layer alike. So the gradients of neighbours differ by the examples in between.

    Departure: the units feed the next layer with `gain` and -`gain` in turn, which makes an example's gradient about as
    large whatever its label, and with outputs of 1 / k, with which the softmax stays away from 0 and 1. That is above
    the rounding and below the clipping of a quantizer.

    Threat model: a malicious server that sends all clients the same altered parameters.

    Args:
        params: Parameters of a network with a first layer on the flattened example, ReLU behind it, and a dense layer.
        layer: Keys that lead to the first layer, with "kernel" (d, k) and "bias" (k,).
        following: Keys that lead to the next layer, with "kernel" (k, c).
        thresholds: Quantiles of the mean of an input, as the attacker guesses them, shape (k,), rising and finite.
            Traced ones that do not rise make the layer's bias NaN.
        gain: About the largest entry of the layer's gradient, times that of an input and over the batch size. It is
            positive.

    Returns:
        The altered parameters.

    Raises:
        ValueError: If a layer is missing, or has not k units, if the thresholds do not rise, or if an argument is out
            of range.

    Examples:
        Two examples, of means 0.2 and 0.5, activate one unit and two:

        >>> import jax.numpy as jnp
        >>> from gia_jax.secure_aggregation import limits
        >>> params = {"first": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "next": {"kernel": jnp.ones((3, 2))}}
        >>> altered = limits.imprinted(params, ["first"], ["next"], jnp.array([0.0, 0.3, 0.6]))
        >>> inputs = jnp.array([[0.1, 0.3], [0.4, 0.6]])
        >>> (inputs @ altered["first"]["kernel"] + altered["first"]["bias"] > 0).tolist()
        [[True, False, False], [True, True, False]]
    """
    _check.positive(gain=gain)
    _check.finite("gain", gain)
    first, after = _layer(params, layer), _layer(params, following)
    if first["bias"].shape != thresholds.shape:
        raise ValueError(f"thresholds must have shape {first['bias'].shape}, got {thresholds.shape}")
    _check.finite("thresholds", thresholds)
    if _check.is_concrete(thresholds) and np.any(flat := np.diff(np.asarray(thresholds)) <= 0):
        i = int(np.argmax(flat))
        raise ValueError(f"thresholds must rise, got {thresholds[i]} before {thresholds[i + 1]}")
    thresholds = jnp.where(jnp.all(jnp.diff(thresholds) > 0), thresholds, jnp.nan)
    size, num_bins = first["kernel"].shape
    kernel = jnp.full_like(first["kernel"], 1 / (size * num_bins))
    altered = _replaced(
        params, layer, {**first, "kernel": kernel, "bias": (-thresholds / num_bins).astype(first["bias"].dtype)}
    )
    signs = 1 - 2 * (jnp.arange(after["kernel"].shape[1]) % 2)
    alike = jnp.broadcast_to(gain * signs, after["kernel"].shape).astype(after["kernel"].dtype)
    return _replaced(altered, following, {**after, "kernel": alike})


class Bins(NamedTuple):
    """What the bins of an imprint hold.

    Attributes:
        inputs: The example in each bin, shape (k, d). It is a mixture where the bin holds several.
        occupied: Whether the bin holds any example, shape (k,). A bin whose gradients are not finite counts as
            occupied.
    """

    inputs: Float[Array, "k d"]
    occupied: Bool[Array, " k"]


def imprint_inversion(update: Updates, layer: Path, *, tolerance: float = 1e-4) -> Bins:
    """Reads the examples out of the gradient of an imprinted layer: of one client, or of any sum over clients.

    An example is the quotient of the differences of neighbouring units' weight and bias gradients. The last unit is a
    bin by itself.

    Args:
        update: The gradient, as observed.
        layer: Keys that lead to the first layer, with "kernel" (d, k) and "bias" (k,), which `imprinted` altered.
        tolerance: Fraction from 0 to 1 of the largest difference of bias gradients. What is below it is taken to be
            rounding. Behind a quantizer, one step of it times the root of the number of clients, in that unit, is not
            enough: take several.

    Returns:
        What the bins hold.

    Raises:
        ValueError: If the layer is missing, or the tolerance out of range.

    Examples:
        The mean gradient of two examples gives both away, and the third bin is empty:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax.secure_aggregation import limits
        >>> params = {"first": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "next": {"kernel": jnp.ones((3, 2))}}
        >>> altered = limits.imprinted(params, ["first"], ["next"], jnp.array([0.0, 0.3, 0.6]))
        >>> inputs = jnp.array([[0.1, 0.3], [0.4, 0.6]])
        >>> def loss(params):
        ...     hidden = jax.nn.relu(inputs @ params["first"]["kernel"] + params["first"]["bias"])
        ...     return -jnp.mean(jax.nn.log_softmax(hidden @ params["next"]["kernel"])[:, 0])
        >>> bins = limits.imprint_inversion(jax.jit(jax.grad(loss))(altered), ["first"])
        >>> bool(jnp.allclose(bins.inputs[:2], inputs, atol=1e-3)), bins.occupied.tolist()
        (True, [True, True, False])
    """
    if _check.is_concrete(tolerance) and not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance must be from 0 to 1, got {tolerance}")
    given = _layer(update, layer)
    gradient = widened_tree(given)
    kernel = jnp.diff(gradient["kernel"].T, axis=0, append=0)
    bias = jnp.diff(gradient["bias"], append=0)
    # The comparison is negated, so that NaN is not taken for an empty bin.
    occupied = ~(jnp.abs(bias) <= tolerance * jnp.nanmax(jnp.abs(bias)))
    inputs = jnp.where(occupied[:, None], kernel / jnp.where(occupied, bias, 1)[:, None], 0)
    return Bins(inputs.astype(given["kernel"].dtype), occupied)


def imprint_share(num_bins: int, num_examples: int) -> float:
    """Computes the expected share of all clients' examples that an imprint gives away: those alone in a bin.

    It is for thresholds that are the k quantiles of the mean of an input, i / (k + 1), and without a bin below the
    first: an example is in a bin with probability k / (k + 1), and none of the others is in it with
    (1 - 1 / (k + 1))^(n - 1). An attacker that wants more takes more bins.

    Args:
        num_bins: Number k of bins, at least 1.
        num_examples: Number n of examples in the sum over all clients, at least 1.

    Returns:
        The share, in (0, 1).

    Raises:
        ValueError: If a number is no integer of at least 1.

    Examples:
        >>> from gia_jax.secure_aggregation import limits
        >>> print(f"{limits.imprint_share(100, num_examples=8):.2f} {limits.imprint_share(100, num_examples=100):.2f}")
        0.92 0.37
    """
    _check.integer(num_bins=num_bins, num_examples=num_examples)
    return (num_bins / (num_bins + 1)) ** num_examples


class Disaggregated(NamedTuple):
    """Updates of single clients, from many sums.

    Attributes:
        updates: The update of each client, shape (n, p).
        determined: Whether the client's update follows from the sums, shape (n,). The other updates mean nothing.
    """

    updates: Float[np.ndarray, "n p"]
    determined: Bool[np.ndarray, " n"]


def disaggregated(participation: Bool[np.ndarray, "rounds n"], sums: Float[np.ndarray, "sums p"]) -> Disaggregated:
    """Finds single updates in the sums of many rounds with changing participants.

    Lam et al., Gradient Disaggregation, ICML 2021: linear least squares. It is exact where a client's update is the
    same in every round, as with frozen parameters and full batches. Updates that change are noise.

    Threat model: an honest-but-curious server that sees who takes part, as it does in every protocol here.

    Args:
        participation: Which clients are in the sum of each round, booleans, shape (rounds, n).
        sums: The sum of each round, finite, shape (rounds, p).

    Returns:
        The updates, in float64, and which of them are determined.

    Raises:
        ValueError: If there is not one sum for each round, one is not finite, or `participation` is not boolean.

    Examples:
        Client 1 takes part in two rounds, and in the second alone. Client 2 takes part in none:

        >>> import numpy as np
        >>> from gia_jax.secure_aggregation import limits
        >>> participation = np.array([[True, True, False], [False, True, False]])
        >>> found = limits.disaggregated(participation, np.array([[5.0], [2.0]]))
        >>> found.determined.tolist(), found.updates[:2].round(2).tolist()
        ([True, True, False], [[3.0], [2.0]])
    """
    if len(sums) != len(participation):
        raise ValueError(f"sums must have {len(participation)} rounds, got {len(sums)}")
    if participation.dtype != bool:
        raise ValueError(f"participation must be of booleans, got {participation.dtype}")
    _check.finite("sums", sums)
    system = participation.astype(np.float64)
    inverse = np.linalg.pinv(system)
    # A client is determined where its unit vector lies in the row space, on which inverse @ system projects.
    determined = np.isclose(np.diag(inverse @ system), 1)
    return Disaggregated(inverse @ sums.astype(np.float64), determined)


def joint_labels(
    view: ServerView, params: Params, counts: Mapping[int, int], classifier_fn: ClassifierFn
) -> Int[Array, " b"]:
    """Finds the labels of all contributors together, from the sum and the example counts that clients send openly.

    Clients weight their gradient by the number of their examples, and send the number beside it, as federated averaging
    does. The total makes the sum a mean, from whose last bias `bias_counts` reads the labels. `weighted_mean` hides who
    has how many, but `bias_counts` reads the same from its mean and its total.

    Args:
        view: The server's view after a run whose updates were gradients times counts.
        params: Parameters that the server sent.
        counts: Number of examples of each contributor, at least 1, by client.
        classifier_fn: Function that picks the last layer, which must have a bias, such as `labels.dense("head")`.

    Returns:
        The labels, shape (b,) for b examples in all, in the order in which `bias_counts` finds them.

    Raises:
        ValueError: If the counts are not of the contributors, are no such numbers or add up to more labels than fit
            into memory, or if there is no sum.

    Examples:
        A network predicts 1 / 3 for each class. Client 0 has the label 2, and client 1 the labels 0 and 2:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import labels
        >>> from gia_jax import secure_aggregation as sa
        >>> bias = jnp.array([[1 / 3, 1 / 3, 1 / 3 - 1], [2 / 3 - 1, 2 / 3, 2 / 3 - 1]])
        >>> updates = {"head": {"kernel": jnp.zeros((2, 1, 3)), "bias": bias}}
        >>> view = sa.aggregate(jax.random.key(0), sa.secagg(2, threshold=2, clip=4.0), updates)
        >>> found = sa.limits.joint_labels(view, {}, {0: 1, 1: 2}, labels.dense("head"))
        >>> sorted(found.tolist())
        [0, 2, 2]
    """
    if set(counts) != set(view.contributors):
        raise ValueError(f"counts must be of the contributors {view.contributors}, got {sorted(counts)}")
    for client, count in counts.items():
        _check.integer(**{f"counts[{client}]": count})
    total = sum(map(int, counts.values()))
    _check.fits(total, counts=total)
    if (aggregate := view.aggregate) is None:
        raise ValueError(f"view must have an aggregate, got one of {view.protocol} without")
    mean = jax.tree.map(lambda leaf: leaf / total, aggregate)
    return bias_counts(classifier_fn)(Observation(params, mean, {"inputs_like": jnp.zeros((total, 1))}))


def noise_against_server(noise_multiplier: float, *, num_clients: int, num_honest: int) -> float:
    """Computes the noise multiplier that is left of distributed noise when only `num_honest` clients add theirs.

    Each client adds a share of 1 / sqrt(n) of the noise, so that the sum has all of it. Those that collude know their
    own, and sybils add none. Boenisch et al., Reconstructing Individual Data Points in Federated Learning Hardened with
    Differential Privacy and Secure Aggregation, EuroS&P 2023. Pass both multipliers to `gia_jax.metrics.epsilon`.

    Args:
        noise_multiplier: Noise multiplier of the whole sum, positive and finite.
        num_clients: Number n of clients, at least 1.
        num_honest: Number of honest clients, from 1, the worst case, to n.

    Returns:
        The noise multiplier that is left, `noise_multiplier` times sqrt(num_honest / n).

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from gia_jax.secure_aggregation import limits
        >>> limits.noise_against_server(2.0, num_clients=4, num_honest=1)
        1.0
    """
    _check.positive(noise_multiplier=noise_multiplier)
    _check.finite("noise_multiplier", noise_multiplier)
    _check.integer(num_clients=num_clients)
    _check.integer(1, num_clients, num_honest=num_honest)
    return noise_multiplier * (num_honest / num_clients) ** 0.5


def _layer(tree: Params, path: Path) -> dict[str, Any]:
    """Returns the layer to which a path of keys leads, and raises ValueError where there is none."""
    layer = tree
    for key in path:
        if key not in layer:
            raise ValueError(f"layer {tuple(path)} does not exist: {key!r} not found")
        layer = layer[key]
    return layer


def _replaced(tree: Params, path: Path, layer: dict[str, Any]) -> Params:
    """Returns a copy of a tree of parameters in which the layer at `path` is replaced."""
    return layer if not path else {**tree, path[0]: _replaced(tree[path[0]], path[1:], layer)}
