"""A client with any number of defenses, and what an attacker assumes who knows them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray

from gia_jax import _check, clients, defenses, models
from gia_jax.base import Batch, ClientFn, LossFn, ObjectiveFn, Observation, Params, Updates
from gia_jax.defenses.mixing import InputDefenseFn, as_probabilities
from gia_jax.defenses.protected.attacker import adapted, reading_of
from gia_jax.defenses.protected.parts import Part, check_part, check_together, encoding_fn, transformation
from gia_jax.labels import dense
from gia_jax.models.functional import ApplyFn, BatchNormMode
from gia_jax.threat import ThreatModel, observe

WEIGHTS = 0x9EC0DE  # sets PRECODE's default weights, which are public, apart from all that a user draws from key 0


class Protected(NamedTuple):
    """A client with its defenses, as `protect` builds it, and what an attacker assumes who knows the defenses.

    Attributes:
        apply_fn: Model of the client, a function `(params, inputs) -> logits`.
        params: Initial parameters of the model. With PRECODE they are more than those of the module.
        encode_fn: Function `(key, batch) -> batch` that encodes the examples before the client sees them. It changes
            nothing without MixUp or InstaHide.
        client_fn: Function `(key) -> client` that returns the victim, which draws all of its random numbers from the
            key. Behind MixUp or InstaHide the client refuses a batch with class indices, because that was not encoded.
            `observe` encodes first.
        assumed_fn: Client that is assumed by an attacker who knows the defenses but not the key, a function
            `(params, batch) -> update`.
        adapt_fn: Function from the objective of an attacker who does not know the defenses to that of one who does.
        modelled: Whether the attacker has a use for what it knows of the defenses of the update. `protect` says when.
    """

    apply_fn: ApplyFn
    params: Params
    encode_fn: InputDefenseFn
    client_fn: Callable[[PRNGKeyArray], ClientFn]
    assumed_fn: ClientFn
    adapt_fn: Callable[[ObjectiveFn], ObjectiveFn]
    modelled: bool

    def observe(
        self, key: PRNGKeyArray, threat: ThreatModel, batch: Batch, others: Batch | None = None, **granted: Any
    ) -> Observation:
        """Encodes the batch, runs the client with its defenses, and returns what the adversary sees of it.

        Args:
            key: Random key of this client and this round, for its encoding, its defenses and the threat model. Never
                pass it on to an attack.
            threat: Threat model, which says what the adversary is granted.
            batch: The client's examples of this round, with labels of shape (b,) or (b, c).
            others: The client's other examples, which MixUp and InstaHide may mix in. None if it has none.
            **granted: Arguments `num_classes`, `statistics`, `batch_indices` and `draws` of `gia_jax.observe`.

        Returns:
            The observation. Granted labels are those that the client trained on, which MixUp and InstaHide mix.

        Raises:
            ValueError: If `batch` and `others` do not fit each other, or `gia_jax.observe` refuses its arguments.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from flax import nnx
            >>> from gia_jax import Batch, ThreatModel, models
            >>> from gia_jax.defenses.protected import parse, protect
            >>> module = models.MLP((3,), 2, hidden=(), rngs=nnx.Rngs(0))
            >>> protected = protect(parse("mixup:k=2"), module, num_classes=2)
            >>> batch = Batch(jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), jnp.array([0, 1]))
            >>> observe_fn = jax.jit(lambda key: protected.observe(key, ThreatModel(labels=True), batch))
            >>> observe_fn(jax.random.key(0)).extra["labels"].shape  # mixed labels are probabilities
            (2, 2)
        """
        key_encode, key_client, key_threat = jax.random.split(key, 3)
        encoding, update = self.share(key_encode, key_client, batch, others)
        return observe(key_threat, threat, lambda *_: update, self.params, encoding, **granted)

    def share(
        self,
        key_encode: PRNGKeyArray,
        key_client: PRNGKeyArray,
        batch: Batch,
        others: Batch | None = None,
        *,
        soft_classes: int | None = None,
    ) -> tuple[Batch, Updates]:
        """Encodes the batch, and runs the client with its defenses on the encodings.

        It is the only way from examples to an update. `observe` is for a single client and threat model. This is for
        several threat models of one update, and for updates that are summed before a server sees them.

        Args:
            key_encode: Random key of the encoding.
            key_client: Random key of the client and its other defenses.
            batch: The client's examples of this round, with labels of shape (b,) or (b, c).
            others: The client's other examples, which MixUp and InstaHide may mix in. None if it has none.
            soft_classes: Number of classes c, with which class indices become probabilities, as those of mixed images
                are: all clients then have labels of shape (b, c). None leaves labels as they are.

        Returns:
            The batch that the client trained on, and the update that it shares.

        Raises:
            ValueError: If `batch` and `others` do not fit each other, or the batch is empty or not finite.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from flax import nnx
            >>> from gia_jax import Batch, models
            >>> from gia_jax.defenses.protected import parse, protect
            >>> module = models.MLP((3,), 2, hidden=(), rngs=nnx.Rngs(0))
            >>> protected = protect(parse("prune:ratio=0.5"), module, num_classes=2)
            >>> batch = Batch(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([0]))
            >>> share_fn = jax.jit(lambda *keys: protected.share(*keys, batch, soft_classes=2))
            >>> encoding, update = share_fn(*jax.random.split(jax.random.key(0)))
            >>> encoding.labels.tolist(), int((update["head"]["kernel"] != 0).sum())
            ([[1.0, 0.0]], 3)
        """
        others = jax.tree.map(lambda leaf: leaf[:0], batch) if others is None else others
        encoding = encoded(self.encode_fn, key_encode, batch, others)
        if soft_classes is not None:
            encoding = Batch(encoding.inputs, as_probabilities(encoding, soft_classes))
        _check.batch(encoding.inputs, encoding.labels)
        return encoding, self.client_fn(key_client)(self.params, encoding)


def protect(
    parts: Sequence[Part],
    module: nnx.Module,
    *,
    num_classes: int,
    head: str = "head",
    key: PRNGKeyArray | None = None,
    batch_norm: BatchNormMode = "evaluation",
    make_client: Callable[[LossFn], ClientFn] = clients.federated_sgd,
) -> Protected:
    """Builds a client with any number of defenses, and what an attacker assumes who knows them.

    The client applies its defenses in this order: encodings of the examples, a changed model, defenses of examples and
    features (DP-SGD and Soteria), and last the defenses of the update, in the order of `parts`.

    The attacker knows the defenses and their settings, but not the random key and not the norm of a clipping that
    nothing random follows. What it does depends on the defenses of the update, before which DP-SGD has drawn its noise:

    * There are signs, and no noise. It takes the objective `adaptive.sign_hinge`, because no other of these defenses
      turns a sign. A zero counts as a zero of the gradient only if no defense prunes, rounds or is Soteria.
    * There are only clipping and pruning. Simulated updates are scaled to the length of the observed one by
      `adaptive.rescaled`, because the norm of the clipping is not known, and because the penalty of pruning is to weigh
      the same for short and for long updates. They are compared by `adaptive.pruned` if a defense prunes, and else by
      the given objective.
    * Noise or stochastic rounding is last, after clipping and pruning or alone. The attacker clips and prunes its own
      update with the known settings, since what it then has is the expectation of the observed one. The two are
      compared by `adaptive.relative(l1)` for Laplace noise alone, by `adaptive.relative(euclidean)` for Gaussian noise
      or a sum of several noises, and by the given objective for rounding and for DP-SGD, after whose clipping little
      but the direction is left. Rounding in a sum with noise counts as Gaussian noise.
    * Otherwise, such as for pruning after noise, the likelihood of the update is not known. These defenses are not
      modelled, and the attacker acts as if it did not know them.

    Against PRECODE the attacker assumes the mean code, and compares only the layers that compute the features. Their
    gradients then differ a little in length from the expectation. Against Soteria it does not compare the entries that
    are zero, beside pruning only those of the last layer. It leaves out the last layer where noise or rounding hides
    these zeros. A ratio or a scale of 0 is no defense, and changes neither the update nor the attacker. DP-SGD with a
    noise multiplier of 0 only clips, to a norm that the attacker knows.

    Args:
        parts: Defenses, as `parse` returns them. There can be one DP-SGD, one PRECODE, one Soteria, and one of MixUp
            and InstaHide.
        module: Model of the client, a flax module whose last operation is the dense layer `head`.
        num_classes: Number of classes of the model.
        head: Name of the last layer, an attribute of the module.
        key: Random key of the initial weights that PRECODE adds. None takes the same public key in every call.
        batch_norm: Mode of batch normalisation, "evaluation", "training" or "exact": `models.functional` explains them.
        make_client: Function from a loss to the client without defenses. Together with DP-SGD or PRECODE it must be
            `clients.federated_sgd` or a `functools.partial` of it. DP-SGD and Soteria take over its `lowering`.

    Returns:
        The protected client.

    Raises:
        ValueError: If a defense refuses its settings, there are several where only one can be, or DP-SGD or PRECODE
            meets a client of several steps, in which their noise would be the same in every step.

    Examples:
        The client keeps only the largest half of the entries of each tensor:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import Batch, models
        >>> from gia_jax.defenses.protected import parse, protect
        >>> module = models.MLP((3,), 2, hidden=(), rngs=nnx.Rngs(0))
        >>> protected = protect(parse("prune:ratio=0.5"), module, num_classes=2)
        >>> batch = Batch(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([0]))
        >>> update = jax.jit(protected.client_fn(jax.random.key(0)))(protected.params, batch)
        >>> int((update["head"]["kernel"] != 0).sum())
        3
    """
    for part in parts:
        check_part(part)
    check_together(parts)
    settings: dict[str, dict[str, Any]] = {part.name: part.settings for part in parts}
    # DP-SGD is a client of its own: what is left of `make_client` beside it are the options of federated SGD.
    plain = make_client if isinstance(make_client, functools.partial) else functools.partial(make_client)
    one_step = plain.func is clients.federated_sgd and not plain.args
    options = plain.keywords if one_step else {}
    for name in ("dpsgd", "precode"):
        if name in settings and not one_step:
            needed = "make_client must be clients.federated_sgd or a functools.partial of it"
            raise ValueError(f"defense {name} is for one step on the whole batch: {needed}, got {make_client!r}")

    apply_fn, loss_of, params = _model(
        module, settings.get("precode"), num_classes=num_classes, head=head, key=key, batch_norm=batch_norm
    )

    def client_fn(key: PRNGKeyArray) -> ClientFn:
        drawn = [(part, jax.random.fold_in(key, i)) for i, part in enumerate(parts, 1)]
        keys = {part.name: own for part, own in drawn}
        if "dpsgd" in settings:
            loss_key = keys.get("precode")
            loss_fn = loss_of(None) if loss_key is None else loss_of
            inner = defenses.dp_sgd(loss_fn, keys["dpsgd"], loss_key=loss_key, **settings["dpsgd"], **options)
        else:
            inner = make_client(loss_of(keys.get("precode")))
        if "soteria" in settings:
            inner = defenses.soteria(inner, apply_fn, dense(head), **settings["soteria"], **options)
        chain = [transformation(part, own) for part, own in drawn if part.acts_on == "update"]
        inner = defenses.defended(inner, optax.chain(*chain)) if chain else inner
        encoding = next((part.name for part in parts if part.acts_on == "input"), None)
        return inner if encoding is None else _of_encodings(encoding, inner)

    client_fn(jax.random.key(0))  # refuses bad settings here, and not in the middle of a trace
    assumed_fn = make_client(loss_of(None))
    if "dpsgd" in settings:
        norm = settings["dpsgd"]["norm"]
        assumed_fn = defenses.dp_sgd(loss_of(None), jax.random.key(0), norm=norm, noise_multiplier=0.0, **options)
    acting = [part for part in parts if 0 not in (part.settings.get("ratio"), part.settings.get("scale"))]
    reading = reading_of(acting)
    if reading is not None and reading.simulated:
        # Nothing in it is random: the key is not used.
        chain = optax.chain(*(transformation(part, jax.random.key(0)) for part in reading.simulated))
        assumed_fn = defenses.defended(assumed_fn, chain)
    adapt_fn = functools.partial(adapted, acting, reading, head)
    encode_fn = encoding_fn(settings, num_classes)
    return Protected(apply_fn, params, encode_fn, client_fn, assumed_fn, adapt_fn, reading is not None)


def _model(
    module: nnx.Module,
    bottleneck: dict[str, Any] | None,
    *,
    num_classes: int,
    head: str,
    key: PRNGKeyArray | None,
    batch_norm: BatchNormMode,
) -> tuple[ApplyFn, Callable[[PRNGKeyArray | None], LossFn], Params]:
    """Returns the model, with PRECODE's bottleneck where there are settings of it, its loss and its parameters.

    The loss is a function of the key of what the bottleneck draws. None is for its mean.
    """
    if bottleneck is not None:
        key = jax.random.fold_in(jax.random.key(0), WEIGHTS) if key is None else key
        features_fn, params = models.functional(models.headless(module, head), batch_norm=batch_norm)
        num_features = dense(head)(models.functional(module)[1]).kernel.shape[0]
        return defenses.precode(
            key, features_fn, params, num_features=num_features, num_classes=num_classes, **bottleneck
        )
    apply_fn, params = models.functional(module, batch_norm=batch_norm)

    def loss_of(key: PRNGKeyArray | None) -> LossFn:
        del key
        return clients.cross_entropy(apply_fn)

    return apply_fn, loss_of, params


def _of_encodings(name: str, client_fn: ClientFn) -> ClientFn:
    """Makes a client refuse a batch that was not encoded, which it would share without its defense."""

    def of_encodings(params: Params, batch: Batch) -> Updates:
        if jnp.ndim(batch.labels) == 1:
            raise ValueError(
                f"batch must be encoded by {name} before the client sees it, got class indices: "
                "`Protected.observe` encodes it"
            )
        return client_fn(params, batch)

    return of_encodings


def encoded(encode_fn: InputDefenseFn, key: PRNGKeyArray, batch: Batch, others: Batch) -> Batch:
    """Encodes the examples of this round, into which all examples of the client may be mixed.

    Args:
        encode_fn: Function `(key, batch) -> batch` of MixUp or InstaHide, or one that returns the batch as it is.
        key: Random key of the client.
        batch: The client's examples of this round, with labels of shape (b,) or (b, c).
        others: The client's other examples, m of them with m at least 0, with labels of the same kind.

    Returns:
        The b encodings, of which encoding i mixes example i of `batch` with other examples and has labels of shape
        (b, c). A function that returns the batch as it is gives `batch`.

    Raises:
        ValueError: If `batch` and `others` differ in structure, shapes or types, or the labels of one are not one for
            each example.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, defenses
        >>> from gia_jax.defenses.protected import encoded
        >>> batch = Batch(jnp.array([[1.0, 2.0]]), jnp.array([0]))
        >>> others = Batch(jnp.array([[3.0, 4.0], [5.0, 6.0]]), jnp.array([1, 2]))
        >>> encode_fn = defenses.mixup(3, k=2)
        >>> jax.eval_shape(lambda key: encoded(encode_fn, key, batch, others), jax.random.key(0)).labels.shape
        (1, 3)
    """
    if jax.tree.structure(batch) != jax.tree.structure(others):
        raise ValueError(f"others must be {jax.tree.structure(batch)} like batch, got {jax.tree.structure(others)}")
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(batch), jax.tree.leaves(others), strict=True):
        name, kinds = jax.tree_util.keystr(path), [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (ours, theirs)]
        if theirs.shape[1:] != ours.shape[1:] or kinds[0] != kinds[1]:
            wanted = f"{ours.dtype} of shape (m{''.join(f', {size}' for size in ours.shape[1:])})"
            raise ValueError(f"others{name} must be {wanted} like batch{name}, got {theirs.dtype} {theirs.shape}")
        for whose, leaf, one in (("batch", ours, batch), ("others", theirs, others)):
            size = jax.tree.leaves(one.inputs)[0].shape[0]
            if leaf.shape[:1] != (size,):
                raise ValueError(f"{whose}{name} must be {size}, one for each example, got {leaf.shape}")
    whole = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, others)
    size = jax.tree.leaves(batch.inputs)[0].shape[0]
    return jax.tree.map(lambda leaf: leaf[:size], encode_fn(key, whole))
