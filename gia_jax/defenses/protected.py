"""Defenses by the names of the command line, any number of them in one client, and the attacker that knows them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check, clients, defenses, metrics, models
from gia_jax.base import Batch, ClientFn, LossFn, ObjectiveFn, Observation, Params, Updates
from gia_jax.defenses.mixing import InputDefenseFn
from gia_jax.labels import dense
from gia_jax.matching import adaptive
from gia_jax.matching.objectives import euclidean, l1, selected
from gia_jax.models.functional import ApplyFn, BatchNormMode
from gia_jax.threat import ThreatModel, observe


class Part(NamedTuple):
    """One defense and its settings, a key of `DEFENSES` and values for its settings."""

    name: str
    settings: dict[str, Any]

    @property
    def acts_on(self) -> str:
        """What it acts on: "update", "client", "input" or "model"."""
        return DEFENSES[self.name].acts_on

    def __str__(self) -> str:
        """The part as it is written on the command line."""
        return self.name + (":" + ",".join(f"{k}={v:.15g}" for k, v in self.settings.items()) if self.settings else "")


class Named(NamedTuple):
    """What the command line says of a defense: one line, its settings with their defaults, and what it acts on."""

    summary: str
    settings: dict[str, float]
    acts_on: str


DEFENSES = {
    "prune": Named("largest entries of each tensor, Zhu et al. 2019", {"ratio": 0.9}, "update"),
    "topk": Named("largest entries of the whole update, without memory, Stich et al. 2018", {"ratio": 0.9}, "update"),
    "clip": Named("bounded L2 norm", {"norm": 1.0}, "update"),
    "gaussian": Named("Gaussian noise, Zhu et al. 2019", {"scale": 1e-2}, "update"),
    "laplace": Named("Laplace noise, Zhu et al. 2019", {"scale": 1e-2}, "update"),
    "sign": Named("signs and a scale for each tensor, Bernstein et al. 2018", {}, "update"),
    "ternary": Named("TernGrad, Wen et al. 2017", {}, "update"),
    "quantize": Named("stochastic rounding, Alistarh et al. 2017", {"bits": 4}, "update"),
    "dpsgd": Named(
        "examples clipped, noise added, Abadi et al. 2016", {"noise_multiplier": 1.0, "norm": 1.0}, "client"
    ),
    "mixup": Named("mixed images and labels, Zhang et al. 2018", {"k": 4}, "input"),
    "instahide": Named("mixed images with random signs, Huang et al. 2020", {"k": 4}, "input"),
    "soteria": Named(
        "last layer without revealing features, Sun et al. 2021", {"ratio": 0.8, "num_probes": 0}, "client"
    ),
    "precode": Named("variational bottleneck, Scheliga et al. 2022", {"size": 256}, "model"),
}
# Of Huang et al., Evaluating Gradient Inversion Attacks and Defenses in Federated Learning, NeurIPS 2021.
COMBINATIONS = {
    "prune_mixup": ("mixup:k=4", "prune:ratio=0.9"),
    "prune_instahide": ("instahide:k=4", "prune:ratio=0.9"),
}
NAMES = ("none", *DEFENSES, *COMBINATIONS)
LEAST, LARGEST = 1e-15, 1e15  # of a setting: its square and the updates that it scales are numbers of float32
INTEGERS = ("bits", "k", "num_probes", "size")
NOISE = ("dpsgd", "gaussian", "laplace")
WEIGHTS = 0x9EC0DE  # sets PRECODE's default weights, which are public, apart from all that a user draws from key 0
CANDIDATES = 10  # of whom one is the client's, for the chance of a reconstruction
UNBIASED = (*NOISE, "ternary", "quantize")  # their expectation is what enters them
ZEROING = ("prune", "topk", "ternary", "quantize", "soteria")  # a zero they share need not be one of the gradient


class Protected(NamedTuple):
    """A client with its defenses.

    Attributes:
        apply_fn: `(params, inputs) -> logits`.
        params: The initial parameters; PRECODE has more of them than the module.
        encode_fn: `(key, batch) -> batch`, before the client sees it.
        client_fn: `(key) -> ClientFn`, the victim's, all of its randomness from the key. Behind MixUp or InstaHide it
            refuses class indices, which no encoded batch has: `observe` encodes, and is the way to use a client.
        assumed_fn: The client that an attacker assumes who knows the defenses but not the key.
        adapt_fn: Makes from the objective of an attacker that does not know the defenses that of one that does.
        modelled: Whether the attacker makes use of what it knows of the defenses of the update: see `protect`.
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
        """Lets the client work on its batch behind its defenses, and keeps of it what the threat model grants.

        Args:
            key: Key of this client and this round: of its encoding, of its defenses, and of the threat model. Never
                pass it on to an attack.
            threat: What the adversary is granted.
            batch: The client's examples of this round, labels (b,) or (b, c).
            others: The client's other examples, which MixUp and InstaHide may mix in. None if it has none.
            **granted: `num_classes`, `statistics`, `batch_indices` and `draws` of `gia_jax.observe`.

        Returns:
            The observation. Granted labels are those that the client trained on: mixed, where images were.

        Raises:
            ValueError: If the examples do not fit each other, and what `gia_jax.observe` refuses.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from flax import nnx
            >>> from gia_jax import Batch, ThreatModel, models
            >>> from gia_jax.defenses.protected import parse, protect
            >>> module = models.MLP((3,), 2, hidden=(), rngs=nnx.Rngs(0))
            >>> protected = protect(parse("mixup:k=2"), module, num_classes=2)
            >>> batch = Batch(jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), jnp.array([0, 1]))
            >>> seen = protected.observe(jax.random.key(0), ThreatModel(labels=True), batch)
            >>> seen.extra["labels"].shape  # mixed labels are probabilities
            (2, 2)
        """
        key_encode, key_client, key_threat = jax.random.split(key, 3)
        others = jax.tree.map(lambda leaf: leaf[:0], batch) if others is None else others
        encoding = encoded(self.encode_fn, key_encode, batch, others)
        return observe(key_threat, threat, self.client_fn(key_client), self.params, encoding, **granted)


def parse(text: str) -> tuple[Part, ...]:
    """The defenses that "NAME" or "NAME:setting=value,setting=value" means: one, or those of a combination.

    Args:
        text: Such as "prune:ratio=0.99"; a name of `NAMES`, those of `COMBINATIONS` and "none" without settings.

    Returns:
        The parts, every setting filled in; none of them for "none".

    Raises:
        ValueError: An unknown name or setting, a value that is no number, or one that the defense refuses.
    """
    name, colon, rest = text.partition(":")
    if name == "none" or name in COMBINATIONS:
        if colon:
            raise ValueError(f"defense {name} takes no settings, got {rest!r}")
        return tuple(part for one in COMBINATIONS.get(name, ()) for part in parse(one))
    if name not in DEFENSES:
        raise ValueError(f"defense must be one of {', '.join(NAMES)}, got {name!r}")
    settings = dict(DEFENSES[name].settings)
    for item in rest.split(",") if colon else ():
        key, _, value = item.partition("=")
        if key not in settings:
            known = ", ".join(settings) or "nothing"
            raise ValueError(f"defense {name} can be set {known}, got {item!r}")
        if sum(other.partition("=")[0] == key for other in rest.split(",")) > 1:
            raise ValueError(f"defense {name} must set {key} once, got {rest!r}")
        try:
            settings[key] = int(value) if key in INTEGERS else float(value)
        except ValueError:
            kind = "an integer" if key in INTEGERS else "a number"
            raise ValueError(f"defense {name} needs {kind} for {key}, got {value!r}") from None
    part = Part(name, settings)
    _check_part(part)
    return (part,)


def _check_part(part: Part) -> None:
    """Raises ValueError, naming the defense, for settings that it does not have or refuses, without data or a model."""
    if part.name not in DEFENSES:
        raise ValueError(f"defense must be one of {', '.join(DEFENSES)}, got {part.name!r}")
    if part.settings.keys() != DEFENSES[part.name].settings.keys():
        names = ", ".join(DEFENSES[part.name].settings) or "nothing"
        raise ValueError(f"defense {part.name} must set {names}, got {', '.join(part.settings) or 'nothing'}")

    for name, value in part.settings.items():
        if isinstance(value, float) and value and math.isfinite(value) and not LEAST <= abs(value) <= LARGEST:
            raise ValueError(f"defense {part}: {name} must be 0 or from {LEAST:g} to {LARGEST:g}, got {value}")

    def unused(*_: Any) -> Any:
        raise NotImplementedError

    try:
        if part.acts_on == "update":
            _transformation(part, jax.random.key(0))
        elif part.acts_on == "input":
            _encoding({part.name: part.settings}, 2)
        elif part.name == "dpsgd":
            defenses.dp_sgd(unused, jax.random.key(0), **part.settings)
        elif part.name == "soteria":
            defenses.soteria(unused, unused, unused, **part.settings)
        else:  # PRECODE has at least three weights for each entry of the code, whatever the model
            _check.integer(size=part.settings["size"])
            _check.fits(3 * part.settings["size"], size=part.settings["size"])
    except ValueError as error:
        raise ValueError(f"defense {part}: {error}") from None


def check_together(parts: Sequence[Part], *, local_steps: int = 1) -> None:
    """Raises ValueError for defenses that cannot be in one client, and for those that local steps would weaken.

    Args:
        parts: Defenses from `parse`; of DP-SGD, PRECODE, Soteria and the encodings there can be one each.
        local_steps: Number of local steps of the client; in more than one, the noise of DP-SGD and PRECODE would be
            the same in every step.
    """
    alone = {"encoding": ("mixup", "instahide"), "client": ("dpsgd",), "model": ("precode",), "pruning": ("soteria",)}
    for kind, names in alone.items():
        found = [part.name for part in parts if part.name in names]
        if len(found) > 1:
            raise ValueError(f"defenses must name one {kind} at most, got {' and '.join(found)}")
    for part in parts:
        if part.name in ("dpsgd", "precode") and local_steps > 1:
            raise ValueError(f"defense {part.name} is for one step on the whole batch, got {local_steps} local steps")


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
    """Any defenses in one client: encodings, then the model, then what acts on examples and features, then the update.

    What an attacker does that knows the chain of the update's defenses, DP-SGD's noise being drawn before all of them:

    * signs, with anything but noise: `adaptive.sign_hinge`, as nothing else turns a sign; a zero is one of the gradient
      where nothing prunes or rounds, Soteria included;
    * clipping and pruning only: `adaptive.pruned`, or the given objective where nothing is pruned, between updates of
      the observed length (`adaptive.rescaled`): a norm of clipping is not known, and what pruning's penalty weighs
      beside a direction must not depend on how long the update is of the image that the search is at;
    * clipping and pruning, then noise or stochastic rounding: it clips and prunes its own update, which is then the
      expectation, and takes `relative(l1)` for Laplace noise alone, `relative(euclidean)` for Gaussian noise or a sum
      of noises, the given objective for rounding and for DP-SGD, whose clipping leaves little but a direction. The
      norms are given: noise lengthens the update;
    * else, such as noise and then signs, pruning or clipping, no likelihood is at hand: the chain is not modelled, and
      the attack is that of an attacker that does not know of it.

    With PRECODE it takes the mean code and compares the features' layers only; their gradients' lengths are then not
    quite the expectation's. In a sum with other noise, that of rounding is taken for Gaussian. Noise and rounding hide
    the zeros of Soteria: the last layer is then left out. Beside pruning, whose penalty is for entries that are zero,
    what Soteria may have removed is free of it: the zeros of the last layer. A ratio or a scale of 0 is no defense, and
    changes neither the update nor the attacker; DP-SGD with noise of 0 only clips, to a norm that is given.

    Args:
        parts: Defenses from `parse`. Those that act on the update are chained in this order; of DP-SGD, PRECODE,
            Soteria and the encodings there can be one each.
        module: A model whose last operation is the dense layer `head`.
        num_classes: Number of classes of the model.
        head: Name of its last layer.
        key: Key of the initial weights that PRECODE adds; None takes the same public key in every call.
        batch_norm: Mode of batch normalisation, as for `models.functional`.
        make_client: Makes from a loss the client without a defense. Beside DP-SGD and PRECODE it must be
            `clients.federated_sgd` or a `functools.partial` of it. DP-SGD and Soteria take the lowering of such a one.

    Returns:
        The protected client.

    Raises:
        ValueError: A setting that its defense refuses, the same one twice where one is meant, or DP-SGD or PRECODE with
            another client than that of one step: their noise would be the same in every step.
    """
    for part in parts:
        _check_part(part)
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

    classifier_fn = dense(head)
    if "precode" in settings:
        key = jax.random.fold_in(jax.random.key(0), WEIGHTS) if key is None else key
        features_fn, params = models.functional(models.headless(module, head), batch_norm=batch_norm)
        num_features = classifier_fn(models.functional(module)[1]).kernel.shape[0]
        size = settings["precode"]["size"]
        model = defenses.precode(
            key, features_fn, params, num_features=num_features, num_classes=num_classes, size=size
        )
        apply_fn, loss_of, params = model
    else:
        apply_fn, params = models.functional(module, batch_norm=batch_norm)

        def loss_of(key: PRNGKeyArray | None) -> LossFn:
            del key
            return clients.cross_entropy(apply_fn)

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
            inner = defenses.soteria(inner, apply_fn, classifier_fn, **settings["soteria"], **options)
        chain = [_transformation(part, own) for part, own in drawn if part.acts_on == "update"]
        inner = defenses.defended(inner, optax.chain(*chain)) if chain else inner
        encoding = next((part.name for part in parts if part.acts_on == "input"), None)
        return inner if encoding is None else _of_encodings(encoding, inner)

    client_fn(jax.random.key(0))  # refuses bad settings here, and not in the middle of a trace
    assumed_fn = make_client(loss_of(None))
    if "dpsgd" in settings:
        norm = settings["dpsgd"]["norm"]
        assumed_fn = defenses.dp_sgd(loss_of(None), jax.random.key(0), norm=norm, noise_multiplier=0.0, **options)
    acting = [part for part in parts if 0 not in (part.settings.get("ratio"), part.settings.get("scale"))]
    reading = _reading(acting)
    if reading is not None and reading.simulated:
        # Nothing in it is random: the key is not used.
        chain = optax.chain(*(_transformation(part, jax.random.key(0)) for part in reading.simulated))
        assumed_fn = defenses.defended(assumed_fn, chain)
    adapt_fn = functools.partial(_adapted, acting, reading, head)
    encode_fn = _encoding(settings, num_classes)
    return Protected(apply_fn, params, encode_fn, client_fn, assumed_fn, adapt_fn, reading is not None)


def _of_encodings(name: str, client_fn: ClientFn) -> ClientFn:
    """The client, which refuses a batch that was not encoded: it would share it undefended."""

    def of_encodings(params: Params, batch: Batch) -> Updates:
        if jnp.ndim(batch.labels) == 1:
            raise ValueError(
                f"batch must be encoded by {name} before the client sees it, got class indices: "
                "`Protected.observe` encodes it"
            )
        return client_fn(params, batch)

    return of_encodings


def _transformation(part: Part, key: PRNGKeyArray) -> optax.GradientTransformation:
    if part.name == "quantize":
        return defenses.quantize(key, part.settings["bits"])
    fixed: dict[str, Callable[..., optax.GradientTransformation]] = {
        "prune": defenses.prune,
        "topk": functools.partial(defenses.top_k, error_feedback=False),
        "clip": defenses.clip,
        "sign": defenses.sign,
    }
    if part.name in fixed:
        return fixed[part.name](**part.settings)
    drawn = {"gaussian": defenses.gaussian_noise, "laplace": defenses.laplace_noise, "ternary": defenses.ternary}
    return drawn[part.name](key, **part.settings)


def _encoding(settings: dict[str, Any], num_classes: int) -> InputDefenseFn:
    for name, defense in (("mixup", defenses.mixup), ("instahide", defenses.instahide)):
        if name in settings:
            return defense(num_classes, k=settings[name]["k"])
    return lambda key, batch: batch


class _Reading(NamedTuple):
    """How an attacker that knows the update's chain reads it: what it does to its own update, and how it compares."""

    simulated: Sequence[Part]
    adapt_fn: Callable[[ObjectiveFn], ObjectiveFn]


def _reading(parts: Sequence[Part]) -> _Reading | None:
    """How an attacker reads a chain, as the docstring of `protect` says; None for a chain that is not modelled."""
    drawn_first = [part for part in parts if part.name == "dpsgd" and part.settings["noise_multiplier"] > 0]
    chain = drawn_first + [part for part in parts if part.acts_on == "update"]
    names = {part.name for part in chain}
    if "sign" in names:
        if names.intersection(NOISE):
            return None
        makes_zeros = any(part.name in ZEROING for part in parts)
        hinge = adaptive.sign_hinge(zero_weight=0.0 if makes_zeros else 1.0)
        return _Reading((), lambda _: hinge)
    first = next((i for i, part in enumerate(chain) if part.name in UNBIASED), len(chain))
    drawn = {part.name for part in chain[first:]}
    if not drawn:
        # The support is read from the update: a pruning of its own would hide entries that are to grow.
        if names.intersection(("prune", "topk")):
            return _Reading((), lambda objective_fn: adaptive.rescaled(adaptive.pruned(objective_fn)))
        return _Reading((), adaptive.rescaled if "clip" in names else _unchanged)
    if not drawn.issubset(UNBIASED):
        return None
    if drawn == {"laplace"}:
        return _Reading(chain[:first], lambda _: adaptive.relative(l1))
    if drawn.intersection(("gaussian", "laplace")):
        return _Reading(chain[:first], lambda _: adaptive.relative(euclidean))
    return _Reading(chain[:first], _unchanged)


def _unchanged(objective_fn: ObjectiveFn) -> ObjectiveFn:
    return objective_fn


def _adapted(parts: Sequence[Part], reading: _Reading | None, head: str, objective_fn: ObjectiveFn) -> ObjectiveFn:
    names = {part.name for part in parts}
    adapted = objective_fn if reading is None else reading.adapt_fn(objective_fn)
    if "soteria" in names:
        if any(part.name in UNBIASED and part.acts_on == "update" for part in parts):
            adapted = selected(adapted, lambda path: f"['{head}']" not in path)
        elif names.intersection(("prune", "topk")):
            adapted = adaptive.supported(adapted, among=lambda path: f"['{head}']" in path)
        else:
            adapted = adaptive.supported(adapted)
    if "precode" in names:
        adapted = selected(adapted, lambda path: "features" in path)
    return adapted


def promises(
    parts: Sequence[Part],
    *,
    information: Float[Array, "d d"] | None = None,
    covariance: Float[Array, "d d"] | None = None,
) -> list[str]:
    """What one release of a batch of known size promises by its noise.

    Args:
        parts: Defenses from `parse`.
        information: Fisher information of the update with DP-SGD's noise, as for `metrics.privacy_lines`.
        covariance: Covariance of the images, as for `metrics.privacy_lines`.

    Returns:
        For DP-SGD, lines on epsilon and on gamma for one of `CANDIDATES` equally likely examples, which are encodings
        where the client shares those. A line that there is no epsilon for noise without clipping before it, for DP-SGD
        beside Soteria, which chooses features by the images, and without the extra `privacy`. No line for other noise
        after clipping, whose epsilon is not computed.

    Raises:
        ValueError: `information` or `covariance` is given where there is no noise of DP-SGD, or Soteria beside it.
    """
    names = [part.name for part in parts]
    noise = [i for i, part in enumerate(parts) if part.name in ("gaussian", "laplace") and part.settings["scale"] > 0]
    private = next((part for part in parts if part.name == "dpsgd"), None)
    chosen = any(part.name == "soteria" and part.settings["ratio"] > 0 for part in parts)
    for name, matrix in (("information", information), ("covariance", covariance)):
        if matrix is not None and (private is None or private.settings["noise_multiplier"] == 0 or chosen):
            wanted = "None but for dpsgd with noise and without soteria"
            raise ValueError(f"{name} must be {wanted}, got an array of {len(matrix)} rows")
    if private is None:
        clipped = "clip" in names and any(i > names.index("clip") for i in noise)
        return metrics.privacy_lines(None) if noise and not clipped else []
    if chosen:
        return ["no epsilon is computed: Soteria chooses the features it leaves out by the images"]
    multiplier = private.settings["noise_multiplier"]
    if multiplier == 0 and noise:
        return []
    lines = []
    if multiplier > 0 and any(part.acts_on == "input" and part.settings["k"] > 1 for part in parts):
        lines += ["what follows is of one encoding, and an image may be part of every one of the batch"]
    try:
        lines += metrics.privacy_lines(
            multiplier, relation="replace_one", prior=1 / CANDIDATES, information=information, covariance=covariance
        )
    except ImportError as error:
        lines += [f"no epsilon: {error}"]
    return lines


def live_shares(
    parts: Sequence[Part], apply_fn: ApplyFn, params: Params, inputs: Float[Array, "v b *d"], *, head: str = "head"
) -> Float[Array, " v"]:
    """The share that Soteria prunes of the features that are not 0 for every example of a batch, in [0, 1].

    Args:
        parts: Defenses of the client; Soteria is one of them.
        apply_fn: The client's model.
        params: Its parameters.
        inputs: Batches of v victims, as the model sees them, of a floating type and finite.
        head: The name of the model's last layer.

    Returns:
        One share for each victim.

    Raises:
        ValueError: There is no Soteria among `parts`, or `inputs` are not such batches.
    """
    if jnp.ndim(inputs) < 3 or 0 in inputs.shape or not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(f"inputs must be floating (v, b, *d), nothing of it 0, got {inputs.dtype} {jnp.shape(inputs)}")
    _check.finite("inputs", inputs)
    found = [part.settings for part in parts if part.name == "soteria"]
    if not found:
        raise ValueError(f"parts must have soteria, got {[part.name for part in parts]}")

    def of_one(inputs: Float[Array, "b *d"]) -> Float[Array, ""]:
        return defenses.live_share_pruned(apply_fn, dense(head), params, inputs, **found[0])

    return jax.lax.map(of_one, inputs)


def encoded(encode_fn: InputDefenseFn, key: PRNGKeyArray, batch: Batch, others: Batch) -> Batch:
    """The first encodings of a client's whole data set, as many as `batch` has examples.

    Args:
        encode_fn: MixUp or InstaHide, or what returns a batch as it is.
        key: The client's key.
        batch: The examples of this round, labels (b,) or (b, c).
        others: The client's other examples, which may be mixed in, none or more, with labels of the same kind.

    Returns:
        Encoding i mixes example i of `batch` with others, labels of shape (b, c); or the batch as it is.

    Raises:
        ValueError: The examples of the two do not fit each other, or a batch and its labels.
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
