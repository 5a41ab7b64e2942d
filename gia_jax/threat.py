"""What the adversary sees: here a client's data, or a recorded update, become an observation, and nowhere else."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Shaped

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, Observation, Params, Updates
from gia_jax.precision import widened, widened_tree


@dataclass(frozen=True)
class ThreatModel:
    """Who attacks, and what the adversary is granted beside the parameters and the update.

    A result of an attack holds under its threat model only, so `describe` belongs beside every number.

    Attributes:
        name: Name of the adversary.
        batch_size: Whether the adversary knows the number and the shape of the examples, which it finds in
            `observation.extra["inputs_like"]`.
        labels: Whether it knows the labels, which it finds in `observation.extra["labels"]`, shuffled.
        label_order: Whether the known labels are in the order of the batch instead. Of a client with local steps on
            minibatches, the order tells which example was used when. One gradient of the whole batch does not depend
            on it.
        statistics: Whether it knows the batch-normalisation statistics of the client's forward pass, which it finds in
            `observation.extra["statistics"]`. A string counts as True and names where they come from, such as
            "inferred", in the description.
        batch_indices: Whether it knows which examples each of several rounds used, from
            `observation.extra["batch_indices"]`.
        draws: Whether it knows the client's own random draws, such as those of dropout masks and noise layers, from the
            random key in `observation.extra["draws"]`.

    Raises:
        ValueError: If `label_order` is granted without `labels`.

    Examples:
        >>> from gia_jax import ThreatModel
        >>> ThreatModel(labels=True).describe()
        'honest-but-curious server; knows parameters, update, batch size, labels (unordered)'
    """

    name: str = "honest-but-curious server"
    batch_size: bool = True
    labels: bool = False
    label_order: bool = False
    statistics: bool | str = False
    batch_indices: bool = False
    draws: bool = False

    def __post_init__(self) -> None:
        if self.label_order and not self.labels:
            raise ValueError("label_order=True needs labels=True, got labels=False")

    def describe(self) -> str:
        """Returns one line that says who attacks, and what the adversary knows.

        Returns:
            The line, for a table or a plot.
        """
        known = ["parameters", "update"]
        known += ["batch size"] if self.batch_size else []
        known += [f"labels ({'in order' if self.label_order else 'unordered'})"] if self.labels else []
        kind = f"{self.statistics} " if isinstance(self.statistics, str) else ""
        known += [f"{kind}batch statistics"] if self.statistics else []
        known += ["batch indices"] if self.batch_indices else []
        known += ["the client's random draws"] if self.draws else []
        return f"{self.name}; knows {', '.join(known)}"

    @classmethod
    def of(cls, observation: Observation, *, name: str = "honest-but-curious server") -> "ThreatModel":
        """Returns the threat model under which an observation was made, as far as the observation tells.

        Args:
            observation: Observation whose entries are looked at. It does not tell whether its labels are in the order
                of the batch: they are taken as unordered.
            name: Name of the adversary, which the observation does not hold.

        Returns:
            The threat model.

        Examples:
            >>> import jax.numpy as jnp
            >>> from gia_jax import ThreatModel, observed
            >>> params, update = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([0.5, -1.0])}
            >>> seen = observed(params, update, inputs_like=jnp.zeros((1, 2)))
            >>> ThreatModel.of(seen).describe()
            'honest-but-curious server; knows parameters, update, batch size'
        """
        extra = observation.extra
        grants = {grant: grant in extra for grant in ("labels", "statistics", "batch_indices", "draws")}
        return cls(name=name, batch_size="inputs_like" in extra, **grants)


def observe(
    key: PRNGKeyArray,
    threat: ThreatModel,
    client_fn: ClientFn,
    params: Params,
    batch: Batch,
    *,
    num_classes: int | None = None,
    statistics: PyTree[Array] | None = None,
    batch_indices: Int[Array | np.ndarray, "t b"] | None = None,
    draws: PRNGKeyArray | None = None,
) -> Observation:
    """Runs a client on its batch, and returns what the adversary sees of it under a threat model.

    Args:
        key: Random key that shuffles the granted labels. Never pass it on to an attack.
        threat: Threat model, which says what the adversary is granted.
        client_fn: Client, a function `(params, batch) -> update`.
        params: Parameters that the server sent.
        batch: The client's examples. Nothing of them reaches the observation unless it is granted.
        num_classes: Number of classes, where the labels are classes. They must then be indices below it, shape (b, *t),
            or probabilities, shape (b, *t, num_classes). None leaves the labels unchecked, for losses on other targets.
        statistics: Batch-normalisation statistics of the client's forward pass. They are granted if `threat.statistics`
            is set.
        batch_indices: Positions in `batch` of the examples of each of t rounds, shape (t, b), for a client of several
            rounds such as `clients.vertical_sgd`. Every leaf of its update has a leading axis of length t. They are
            granted if `threat.batch_indices` is set.
        draws: Random key of a client that draws numbers, such as one with a loss from `models.stochastic`. It is
            granted if `threat.draws` is set.

    Returns:
        The observation. It holds arrays only, so that `jax.vmap` over keys and batches observes many victims.

    Raises:
        ValueError: If the batch is empty, its labels are out of range or not one for each example, the inputs, the
            labels, the parameters or the update are not finite, the update has not the structure and shapes of
            `params`, or what the threat model grants was not given.

    Examples:
        Known labels are shuffled, since the order of a batch is no part of its gradient:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, observe
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params = {"kernel": jnp.array([1.0, 1.0])}
        >>> batch = Batch(jnp.array([[0.0, 2.0], [2.0, 4.0]]), jnp.array([3, 7]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, params, batch)
        >>> seen.update["kernel"].tolist(), sorted(seen.extra["labels"].tolist()), seen.extra["inputs_like"].tolist()
        ([1.0, 3.0], [3, 7], [[0.0, 0.0], [0.0, 0.0]])
    """
    _check.batch(batch.inputs, batch.labels, num_classes)
    _check.finite("params", params)
    update = client_fn(params, batch)
    one_round = update if batch_indices is None else _first_round(update, len(batch_indices))
    _check.same_structure("update", one_round, "params", params)
    _check.finite("update", update)
    extra = grants(key, threat, batch, statistics=statistics, batch_indices=batch_indices, draws=draws)
    return Observation(params, update, extra)


def observed(
    params: PyTree[ArrayLike],
    update: PyTree[ArrayLike],
    *,
    inputs_like: PyTree[Shaped[Array | np.ndarray, "b ..."] | jax.ShapeDtypeStruct] | None = None,
    labels: PyTree[ArrayLike] | None = None,
    apply_fn: Callable[[Params, Any], PyTree[Array]] | None = None,
    num_classes: int | None = None,
    statistics: PyTree[Array] | None = None,
    batch_indices: Int[Array | np.ndarray, "t b"] | None = None,
    draws: PRNGKeyArray | None = None,
) -> Observation:
    """Makes an observation from a recorded update, such as one from the log of a server.

    No client is run and no true data are needed. What is not given is not known to the attack. The update must have the
    sign and scale of a gradient: `interop.pseudo_gradient` makes it from the parameters before and after local
    training, and `interop.from_torch` brings both from PyTorch or Flower. Values and shapes are checked before anything
    is compiled. What no shape tells, such as two tensors of one shape that were swapped, shows afterwards in a low
    share of `metrics.explained`.

    Args:
        params: Parameters that the server sent, a tree of arrays of JAX or NumPy.
        update: The client's update, a tree like `params`. It is cast to the types of the parameters. With
            `batch_indices` every leaf has a leading axis of rounds.
        inputs_like: An array, or its shape and type, like the client's batch as the model sees it, shape (b, *d), or a
            tree of these where the model takes a tree. Its values are not used. None if the attacker knows neither the
            number of examples nor their shape.
        labels: The labels of the batch where the attacker knows them, in any order; the first axis is that of the
            examples.
        apply_fn: The model, `(params, inputs) -> logits`. With it, the shapes of the inputs and the range of the labels
            are compared with what the model takes.
        num_classes: Number of classes, where labels are classes. None reads it from the logits of `apply_fn`, if these
            are one array of shape (b, c) with c > 1, and else checks no range.
        statistics: Batch-normalisation statistics of the client's forward pass, where the attacker knows them.
        batch_indices: Positions of the examples of each of t rounds, shape (t, b), where the update is of several
            rounds.
        draws: Random key that the client drew from, where the attacker knows it.

    Returns:
        The observation, which every attack takes.

    Raises:
        ValueError: If the update does not fit the parameters, holds counters instead of numbers, is not finite or is
            zero everywhere; if the model does not take such inputs, with the reason where it is a missing batch
            axis or another order of the axes; or if labels are not those of such a batch.

    Examples:
        A linear model's update gives its image away:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import attacks, labels, observed
        >>> params = {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
        >>> image, error = jnp.array([0.5, -1.0, 2.0]), jnp.array([-0.5, 0.5])
        >>> update = {"head": {"kernel": jnp.outer(image, error), "bias": error}}
        >>> seen = observed(params, update, inputs_like=jnp.zeros((1, 3)))
        >>> head = labels.dense("head")
        >>> attacks.linear_inversion(head, label_fn=labels.idlg(head))(jax.random.key(0), seen).batch.inputs.tolist()
        [[0.5, -1.0, 2.0]]
    """
    for name, tree in (("params", params), ("update", update)):
        _check.arrays(name, tree, ": interop.from_torch brings tensors of PyTorch")
    _check.finite("params", params)
    for name, tree, other, like in (("update", update, "params", params), ("params", params, "update", update)):
        if isinstance(tree, list | tuple) and isinstance(like, dict):
            kind = type(tree).__name__
            fit = f"interop.from_torch({name}, {other}) makes one of arrays in PyTorch's order"
            raise ValueError(f"{name} must be a dict as {other} is, got a {kind}: {fit}")
    for path, leaf in jax.tree.leaves_with_path(update):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            place = f"update{jax.tree_util.keystr(path)}"
            raise ValueError(f"{place} must be of a floating type, got {jnp.result_type(leaf)}: leave out counters")
    one_round = update if batch_indices is None else _first_round(update, len(batch_indices))
    _check.same_structure("update", one_round, "params", params)
    _check.finite("update", update)
    leaves = jax.tree.leaves(update)
    if _check.is_concrete(leaves) and not any(np.any(np.asarray(leaf)) for leaf in leaves):
        raise ValueError("update must not be zero everywhere: nothing moved")
    if jax.tree.structure(update) != jax.tree.structure(params):
        got, want = jax.tree.structure(update), jax.tree.structure(params)
        raise ValueError(f"update must be nested like params, {want}, got {got}")
    cast = jax.tree.map(lambda leaf, like: jnp.asarray(leaf).astype(jnp.result_type(like)), update, params)
    extra: dict[str, Any] = {}
    is_logits = False
    if inputs_like is not None:
        extra["inputs_like"], outputs = _inputs_like(inputs_like, params, apply_fn)
        is_logits = isinstance(outputs, jax.ShapeDtypeStruct) and len(outputs.shape) == 2 and outputs.shape[1] > 1
        num_classes = outputs.shape[-1] if num_classes is None and is_logits else num_classes
    if labels is not None:
        _check.arrays("labels", labels)
        is_row = isinstance(labels, tuple) and all(isinstance(label, float | int) for label in labels)
        is_tree = isinstance(labels, dict | tuple) and not is_row
        labels = jax.tree.map(jnp.asarray, labels) if is_tree else jnp.asarray(labels)
        sizes = extra["inputs_like"] if inputs_like is not None else jnp.zeros((len(jax.tree.leaves(labels)[0]), 1))
        _check.batch(sizes, labels, num_classes)
        if is_logits:
            _check.classes(labels, labels.shape[:1], num_classes)  # one class an example, as there are logits
        extra["labels"] = labels
    extra |= _beside(statistics, batch_indices, draws)
    return Observation(jax.tree.map(jnp.asarray, params), cast, extra)


def _inputs_like(
    like: PyTree[Any], params: Params, apply_fn: Callable[[Params, Any], Any] | None
) -> tuple[PyTree[Array], Any]:
    """Zeros of the shape of the inputs, and the shapes of what the model makes of them."""
    for leaf in jax.tree.leaves(like):
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(
                f"inputs_like must be an array or a jax.ShapeDtypeStruct, or a tree of them, got {like!r:.60}: pass "
                "jnp.zeros(shape) for a shape"
            )
        if leaf.dtype == jnp.uint8:
            raise ValueError(
                "inputs_like must be what the model sees, got uint8 pixels: divide them by 255 and normalise them"
            )
    _check.examples(like, name="inputs_like", hint=": is the batch axis missing?")
    for leaf in jax.tree.leaves(like):
        _check.fits(math.prod(leaf.shape), inputs_like=leaf.shape)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)), like)
    if apply_fn is None:
        return zeros, None

    def outputs_of(wanted: PyTree[Any]) -> Any:
        try:
            return jax.eval_shape(apply_fn, params, wanted)
        except Exception as error:  # whatever a user's model raises
            return error

    outputs = outputs_of(zeros)
    if isinstance(outputs, Exception):
        if str(outputs).startswith("params "):  # of `models.functional`: no inputs would do
            raise ValueError(str(outputs))
        if not hasattr(like, "shape"):
            shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), like)
            reason = " ".join(str(outputs).split())[:200]
            raise ValueError(f"inputs_like must be inputs of apply_fn, got the shapes {shapes}: {reason}")
        shape = tuple(like.shape)
        moved = {"the batch axis is missing": (1, *shape)}
        if len(shape) == 4:
            moved |= {
                "the channels are first (NCHW)": (shape[0], *shape[2:], shape[1]),
                "the channels are last (NHWC)": (shape[0], shape[3], *shape[1:3]),
            }
        if len(shape) == 3:
            moved["the batch axis is missing and the channels are first (CHW)"] = (1, *shape[1:], shape[0])

        def fits(other: tuple[int, ...]) -> bool:
            return not isinstance(outputs_of(jax.ShapeDtypeStruct(other, like.dtype)), Exception)

        fitting = [f": {why}, and the model takes {other}" for why, other in moved.items() if fits(other)]
        why = fitting[0] if fitting else f": {' '.join(str(outputs).split())[:200]}"
        raise ValueError(f"inputs_like must be inputs of apply_fn, got shape {shape}{why}")
    return zeros, outputs


def grants(
    key: PRNGKeyArray,
    threat: ThreatModel,
    batch: Batch,
    *,
    statistics: PyTree[Array] | None = None,
    batch_indices: Int[Array | np.ndarray, "t b"] | None = None,
    draws: PRNGKeyArray | None = None,
) -> dict[str, Any]:
    """Returns what a threat model grants beside the parameters and the update: the entries of `Observation.extra`.

    `observe` does this for a single client. It is of use by itself for an update that comes from elsewhere, such as a
    sum over clients.

    Args:
        key: Random key that shuffles the granted labels.
        threat: Threat model, which says what the adversary is granted.
        batch: Examples behind the update: those of one client, or of all clients behind a sum.
        statistics: Batch-normalisation statistics, granted if `threat.statistics` is set.
        batch_indices: Positions of the examples of each of t rounds, shape (t, b), granted if `threat.batch_indices` is
            set.
        draws: Random key that the client drew from, granted if `threat.draws` is set.

    Returns:
        The entries by name, which `Observation` describes.

    Raises:
        ValueError: If statistics, batch indices or draws are granted and not given.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, grants
        >>> batch = Batch(jnp.array([[0.5, -1.0]]), jnp.array([3]))
        >>> entries = grants(jax.random.key(0), ThreatModel(labels=True, label_order=True), batch)
        >>> {name: entry.tolist() for name, entry in entries.items()}
        {'inputs_like': [[0.0, 0.0]], 'labels': [3]}
    """
    extra: dict[str, Any] = {}
    if threat.batch_size:
        extra["inputs_like"] = jax.tree.map(jnp.zeros_like, batch.inputs)
    if threat.labels:
        size = _check.examples(batch.inputs)
        order = jnp.arange(size) if threat.label_order else jax.random.permutation(key, size)
        extra["labels"] = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], batch.labels)
    given = _beside(statistics, batch_indices, draws)
    for name in ("statistics", "batch_indices", "draws"):
        if getattr(threat, name):
            if name not in given:
                raise ValueError(f"{name} must be given where the threat model grants them, got None")
            extra[name] = given[name]
    return extra


def _beside(
    statistics: PyTree[Array] | None,
    batch_indices: Int[Array | np.ndarray, "t b"] | None,
    draws: PRNGKeyArray | None,
) -> dict[str, Any]:
    """Returns what is known beside the shape of the batch and its labels, as entries of `Observation.extra`."""
    indices = None if batch_indices is None else jnp.asarray(batch_indices)
    every = {"statistics": statistics, "batch_indices": indices, "draws": draws}
    return {name: value for name, value in every.items() if value is not None}


def _first_round(update: Updates, num_rounds: int) -> Updates:
    for path, leaf in jax.tree.leaves_with_path(update):
        if jnp.shape(leaf)[:1] != (num_rounds,):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"update must hold {num_rounds} rounds as batch_indices does, got {leaf.shape} at {name}")
    return jax.tree.map(lambda leaf: leaf[0], update)


def granted(observation: Observation, name: str) -> Any:
    """Returns an entry of `observation.extra`, for the parts of an attack that need it.

    Args:
        observation: Observation that the attack received.
        name: Name of the entry, such as "labels". `Observation` lists the names.

    Returns:
        The entry.

    Raises:
        ValueError: If the threat model does not grant it. The message names the entry and those that are there.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation, granted
        >>> seen = Observation(params={}, update={}, extra={"inputs_like": jnp.zeros((1, 2))})
        >>> granted(seen, "inputs_like").shape
        (1, 2)
        >>> granted(seen, "labels")
        Traceback (most recent call last):
        ValueError: the threat model does not grant 'labels'; observation.extra has ['inputs_like']
    """
    if name not in observation.extra:
        known = sorted(observation.extra) or "nothing"
        raise ValueError(f"the threat model does not grant {name!r}; observation.extra has {known}")
    return observation.extra[name]


def granted_labels(observation: Observation) -> PyTree[Array]:
    """Returns the labels that the threat model grants: the label rule of an adversary that knows them.

    It is the `label_fn` of an attack under a threat model with `labels=True`. `gia_jax.labels` holds rules that infer
    the labels from the update instead.

    Args:
        observation: Observation that the attack received.

    Returns:
        The labels, class indices (b,), class probabilities (b, c), or the targets of the client's loss.

    Raises:
        ValueError: If the threat model does not grant the labels.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation, granted_labels
        >>> granted_labels(Observation(params={}, update={}, extra={"labels": jnp.array([3, 7])})).tolist()
        [3, 7]
    """
    return granted(observation, "labels")


def stack(observations: Sequence[Observation]) -> Observation:
    """Joins the observations of several victims that hold the same parameters, for `jax.vmap` or `sweep.study`.

    Args:
        observations: Observations of the same parameters, one of each victim, at least 1. Their updates and what is
            granted must have equal structures, shapes and types.

    Returns:
        One observation, in which every leaf of `update` and `extra` has a leading axis of victims. The parameters are
        those of the first observation.

    Raises:
        ValueError: If there are no observations, or if the structure, a shape or a type of one differs from the first.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation, stack
        >>> params, first, second = ({"w": jnp.array(values)} for values in ([1.0, 1.0], [2.0, 3.0], [4.0, 5.0]))
        >>> stack([Observation(params, first), Observation(params, second)]).update["w"].tolist()
        [[2.0, 3.0], [4.0, 5.0]]
    """
    if not observations:
        raise ValueError("observations must hold at least 1 observation, got none")
    parts = [(one.update, one.extra) for one in observations]
    wanted = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), parts[0])
    for i, part in enumerate(parts):
        found = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), part)
        if found != wanted:
            raise ValueError(f"observations[{i}] must be like observations[0], {wanted}, got {found}")
    return Observation(observations[0].params, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))


def control(key: PRNGKeyArray, observations: Observation) -> Observation:
    """Replaces the updates by Gaussian noise of the same norms: the negative control of an attack.

    What an attack makes of noise comes from its prior and its starting point. So the score of an attack says something
    about the gradient only as far as it is better than the score of the same attack on the control.

    Args:
        key: Random key of the noise. Every victim gets noise of its own.
        observations: Observations with a leading axis of victims, such as those of `stack`. The updates must be of a
            floating-point type.

    Returns:
        The observations with noise for updates, and all else as it was. Each leaf of an update keeps its L2 norm and
        its type. A leaf of zeros stays zeros, and one that holds a NaN or an infinity becomes NaN.

    Raises:
        ValueError: If there are no updates, or if a leaf is of integers or lacks the axis of victims.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Observation, control
        >>> seen = Observation({"w": jnp.array([1.0, 1.0, 1.0])}, {"w": jnp.array([[3.0, 0.0, 4.0]])})
        >>> noise = jax.jit(control)(jax.random.key(0), seen).update["w"]
        >>> round(float(jnp.linalg.norm(noise)), 4)
        5.0
    """
    leaves = jax.tree.leaves_with_path(observations.update)
    if not leaves:
        raise ValueError("observations.update must have leaves, got none")
    victims = jnp.shape(leaves[0][1])[:1]
    for path, leaf in leaves:
        name = f"observations.update{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating type, got {leaf.dtype}")
        if not leaf.shape or leaf.shape[:1] != victims:
            raise ValueError(f"{name} must have a leading axis of the {victims} victims, got the shape {leaf.shape}")

    def one(key: PRNGKeyArray, update: Any) -> Any:
        # One draw for all leaves: the random bits of each would be a program of their own.
        flat, unravel = ravel_pytree(widened_tree(update))
        return jax.tree.map(_of_norm, unravel(jax.random.normal(key, flat.shape, flat.dtype)), update)

    return observations._replace(update=jax.vmap(one)(jax.random.split(key, victims[0]), observations.update))


def _of_norm(noise: Array, leaf: Array) -> Array:
    """The noise with the norm of a leaf, in the leaf's type; entries are scaled before they are squared."""
    wide = widened(leaf)
    largest = jnp.max(jnp.abs(wide), initial=0)
    norm = jnp.linalg.norm(wide / jnp.where(largest > 0, largest, 1))
    scaled = noise * (norm / jnp.maximum(jnp.linalg.norm(noise), jnp.finfo(noise.dtype).tiny)) * largest
    return scaled.astype(leaf.dtype)
