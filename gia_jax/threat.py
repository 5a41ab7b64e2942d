"""What the adversary sees: the only place where a client's data, or an update on record, become an observation."""

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
    """Who attacks and what it is granted beside the parameters and the update; print it beside every number.

    Attributes:
        name: Who attacks.
        batch_size: Whether the shape of the batch is known (observation.extra["inputs_like"]).
        labels: Whether the labels are known, in no particular order (observation.extra["labels"]).
        label_order: Whether known labels come in the batch's own order. Local steps on minibatches leak through it
            which example was used when; one gradient of the whole batch does not depend on it.
        statistics: Whether the batch-normalisation statistics of the client's forward pass are known
            (observation.extra["statistics"]); True, or their kind where there are several, such as "inferred".
        batch_indices: Whether it is known which records each of several rounds used
            (observation.extra["batch_indices"]).
        draws: Whether the client's own random draws, such as dropout masks and noise layers, are known
            (observation.extra["draws"], the key that they come from).
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
        """One line for a table: who attacks, and what it knows."""
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
            observation: The observation. It does not tell whether its labels are in order: they are taken as unordered.
            name: Who attacks.

        Returns:
            The threat model.

        Examples:
            >>> import jax.numpy as jnp
            >>> from gia_jax import ThreatModel
            >>> from gia_jax.threat import observed
            >>> seen = observed({"w": jnp.ones(3)}, {"w": jnp.ones(3)}, inputs_like=jnp.zeros((1, 3)))
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
    """Lets the client work on its batch, and keeps of it what the threat model grants.

    Args:
        key: Randomness of the threat model: it shuffles granted labels. Never pass it on to an attack.
        threat: What the adversary is granted.
        client_fn: `(params, batch) -> update`.
        params: The parameters the server sent.
        batch: The client's data; nothing of it reaches the observation unless granted.
        num_classes: The number of classes, where the labels are classes: then they must be indices (b, *t) below it, or
            (b, *t, num_classes) probabilities. None leaves them to the client's loss.
        statistics: The statistics to grant where `threat.statistics` is True.
        batch_indices: The records of each round of a client of t rounds, such as `clients.vertical_sgd`, whose update
            has a leading axis of rounds; granted where `threat.batch_indices` is True.
        draws: The key of a client that draws, such as one with a loss of `models.stochastic`; granted where
            `threat.draws` is True.

    Returns:
        The observation, all arrays: `vmap` over keys and batches observes many victims.

    Raises:
        ValueError: An empty batch, labels of another number of examples or out of range, non-finite inputs, labels or
            parameters, an update unlike `params`, or granted statistics, batch indices or draws that are missing.
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
    """Makes an observation of an update that somebody recorded, such as the log of a server.

    No client is run and no truth is needed. What is not given is not known to the attack. The update must have the sign
    and scale of a gradient: `interop.pseudo_gradient` makes it from the parameters before and after local training, and
    `interop.from_torch` brings both from PyTorch or Flower. All checks are of concrete values and of shapes, before
    anything is compiled.

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
            are one array of shape (b, c), and else checks no range.
        statistics: Batch-normalisation statistics of the client's forward pass, where the attacker knows them.
        batch_indices: The records of each of t rounds, where the update is of several rounds.
        draws: The key of the client's random draws, where the attacker knows it.

    Returns:
        The observation, which every attack takes.

    Raises:
        ValueError: If the update does not fit the parameters, holds counters instead of numbers, is not finite or is
            zero everywhere; if the model does not take such inputs, with the reason where it is a missing batch
            axis or another order of the axes; or if labels are not those of such a batch.

    Examples:
        A linear model's update gives its image away:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import attacks, labels
        >>> from gia_jax.threat import observed
        >>> params = {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
        >>> image, error = jnp.array([0.5, -1.0, 2.0]), jnp.array([-0.5, 0.5])
        >>> update = {"head": {"kernel": jnp.outer(image, error), "bias": error}}
        >>> seen = observed(params, update, inputs_like=jnp.zeros((1, 3)))
        >>> head = labels.dense("head")
        >>> attacks.linear_inversion(head, label_fn=labels.idlg(head))(jax.random.key(0), seen).batch.inputs.tolist()
        [[0.5, -1.0, 2.0]]
    """
    _check.finite("params", params)
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
    if inputs_like is not None:
        extra["inputs_like"], outputs = _inputs_like(inputs_like, params, apply_fn)
        is_logits = isinstance(outputs, jax.ShapeDtypeStruct) and len(outputs.shape) == 2
        num_classes = outputs.shape[-1] if num_classes is None and is_logits else num_classes
    if labels is not None:
        labels = jax.tree.map(jnp.asarray, labels) if isinstance(labels, dict | tuple) else jnp.asarray(labels)
        sizes = extra["inputs_like"] if inputs_like is not None else jnp.zeros((len(jax.tree.leaves(labels)[0]), 1))
        _check.batch(sizes, labels, num_classes)
        extra["labels"] = labels
    extra |= _beside(statistics, batch_indices, draws)
    return Observation(jax.tree.map(jnp.asarray, params), cast, extra)


def _inputs_like(
    like: PyTree[Any], params: Params, apply_fn: Callable[[Params, Any], Any] | None
) -> tuple[PyTree[Array], Any]:
    """Zeros of the shape of the inputs, and the shapes of what the model makes of them."""
    for leaf in jax.tree.leaves(like):
        if leaf.dtype == jnp.uint8:
            raise ValueError(
                "inputs_like must be what the model sees, got uint8 pixels: divide them by 255 and normalise them"
            )
    _check.examples(like, name="inputs_like", hint=": is the batch axis missing?")
    for leaf in jax.tree.leaves(like):
        _check.fits(math.prod(leaf.shape), inputs_like=leaf.shape)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    if apply_fn is None:
        return zeros, None

    def outputs_of(wanted: PyTree[Any]) -> Any:
        try:
            return jax.eval_shape(apply_fn, params, wanted)
        except Exception as error:  # whatever a user's model raises
            return error

    outputs = outputs_of(zeros)
    if isinstance(outputs, Exception):
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
    """What the threat model grants beside the parameters and the update: `Observation.extra`.

    Args:
        key: Randomness of the threat model: it shuffles granted labels.
        threat: What the adversary is granted.
        batch: The data behind the update: of one client, or of all clients behind a sum.
        statistics: The statistics to grant where `threat.statistics` is True.
        batch_indices: The records of each round, to grant where `threat.batch_indices` is True.
        draws: The key of the client's draws, to grant where `threat.draws` is True.

    Raises:
        ValueError: Granted statistics, batch indices or draws that are missing.
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
    """`observation.extra[name]`, or a ValueError that says which grant is missing."""
    if name not in observation.extra:
        known = sorted(observation.extra) or "nothing"
        raise ValueError(f"the threat model does not grant {name!r}; observation.extra has {known}")
    return observation.extra[name]


def granted_labels(observation: Observation) -> PyTree[Array]:
    """The label rule of an adversary that knows the labels."""
    return granted(observation, "labels")


def stack(observations: Sequence[Observation]) -> Observation:
    """Puts the observations of several victims of one model together, for `jax.vmap` or `sweep.study`.

    Args:
        observations: Observations of the same parameters, one of each victim, at least 1. Their updates and what is
            granted must have equal structures, shapes and types.

    Returns:
        One observation, whose update and extra have a leading axis of victims. The parameters are those of the first.

    Raises:
        ValueError: If there are no observations, or if one is unlike the first.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation
        >>> from gia_jax.threat import stack
        >>> params = {"w": jnp.ones(3)}
        >>> stack([Observation(params, {"w": jnp.full(3, v)}, {}) for v in (1.0, 2.0)]).update["w"].shape
        (2, 3)
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
    """Replaces the updates by noise of their norms. What an attack makes of noise is the work of its prior alone: a
    figure says something of the gradient only as far as it is better.

    Args:
        key: Key of the noise. Every victim gets noise of its own.
        observations: Observations with a leading axis of victims, such as those of `stack`. The updates must be of a
            floating-point type.

    Returns:
        The observations. Each leaf of an update has the norm and the type that it had. A leaf of zeros stays zeros, and
        one that holds a NaN or an infinity becomes NaN.

    Raises:
        ValueError: If there are no updates, or if a leaf is of integers or lacks the axis of victims.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation
        >>> from gia_jax.threat import control
        >>> seen = Observation({"w": jnp.ones(3)}, {"w": jnp.array([[3.0, 0.0, 4.0]])}, {})
        >>> round(float(jnp.linalg.norm(control(jax.random.key(0), seen).update["w"])), 4)
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
