"""Clients with any number of defenses, by the names of these, and what an attacker does who knows the defenses."""

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
    """One defense with its settings.

    Attributes:
        name: Name of the defense, a key of `DEFENSES`.
        settings: Value of every setting of the defense, by its name.

    Examples:
        >>> from gia_jax.defenses.protected import Part
        >>> part = Part("prune", {"ratio": 0.9})
        >>> str(part), part.acts_on
        ('prune:ratio=0.9', 'update')
    """

    name: str
    settings: dict[str, Any]

    @property
    def acts_on(self) -> str:
        """What the defense acts on: "update", "client", "input" or "model"."""
        return DEFENSES[self.name].acts_on

    def __str__(self) -> str:
        """Returns the text from which `parse` makes this part."""
        return self.name + (":" + ",".join(f"{k}={v:.15g}" for k, v in self.settings.items()) if self.settings else "")


class Named(NamedTuple):
    """The facts about a defense.

    Attributes:
        summary: What the defense does and which paper it is from, in one line.
        settings: Default of every setting, by its name.
        acts_on: What the defense acts on: "update" is for a change of the finished update, "client" for another way to
            compute it, "input" for a change of the examples, and "model" for a change of the network.
    """

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
        others = jax.tree.map(lambda leaf: leaf[:0], batch) if others is None else others
        encoding = encoded(self.encode_fn, key_encode, batch, others)
        return observe(key_threat, threat, self.client_fn(key_client), self.params, encoding, **granted)


def parse(text: str) -> tuple[Part, ...]:
    """Reads the text that names a defense, or a combination of defenses, and its settings.

    Args:
        text: Name of a defense, or a name, a colon and settings between commas, such as "prune:ratio=0.99". `NAMES`
            lists the names. "none" and the names of combinations take no settings.

    Returns:
        The defense or those of the combination, with the default of every setting that was not given. There is none
        for "none".

    Raises:
        ValueError: If the name or a setting is unknown, a setting is given twice, or a value is no number or is refused
            by the defense.

    Examples:
        >>> from gia_jax.defenses.protected import parse
        >>> [str(part) for part in parse("prune:ratio=0.99")], [str(part) for part in parse("prune_mixup")]
        (['prune:ratio=0.99'], ['mixup:k=4', 'prune:ratio=0.9'])
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
    """Raises ValueError for settings that a defense does not have or refuses, before there is a model or data."""
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
    """Checks that defenses can be in one client.

    Args:
        parts: Defenses, as `parse` returns them.
        local_steps: Number of local steps of the client, at least 1. DP-SGD and PRECODE are for a single step, because
            their noise would be the same in every one.

    Raises:
        ValueError: If there are two of DP-SGD, two of PRECODE, two of Soteria, or two of MixUp and InstaHide, or if
            DP-SGD or PRECODE meets several local steps.

    Examples:
        >>> from gia_jax.defenses.protected import check_together, parse
        >>> check_together(parse("mixup") + parse("instahide"))
        Traceback (most recent call last):
        ValueError: defenses must name one encoding at most, got mixup and instahide
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
    """Makes a client refuse a batch that was not encoded, which it would share without its defense."""

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
    """What an attacker does who knows the defenses of the update.

    Attributes:
        simulated: Defenses that it applies to its own update.
        adapt_fn: Function that changes its objective.
    """

    simulated: Sequence[Part]
    adapt_fn: Callable[[ObjectiveFn], ObjectiveFn]


def _reading(parts: Sequence[Part]) -> _Reading | None:
    """Returns what an attacker does who knows the defenses, or None if they are not modelled, as `protect` explains."""
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
    """Writes what the noise of a client promises for one release of a batch of known size.

    Args:
        parts: Defenses of the client, as `parse` returns them.
        information: Fisher information of the update with DP-SGD's noise about the d numbers of an example, averaged
            over the prior, shape (d, d). None leaves out the bounds on the error of a reconstruction.
        covariance: Covariance of the Gaussian prior of an example, shape (d, d). None leaves out the bound of van
            Trees.

    Returns:
        Lines of text. For DP-SGD they state epsilon and the largest chance gamma that one of `CANDIDATES` equally
        likely examples is reconstructed, where MixUp and InstaHide make an example an encoding. One line states that
        there is no epsilon where noise is added without clipping before it, where Soteria chooses features by the
        images beside DP-SGD, and where the extra `privacy` is not installed. There is no line for other noise after
        clipping, whose epsilon is not computed.

    Raises:
        ValueError: If `information` or `covariance` is given and there is no noise of DP-SGD, or Soteria beside it.

    Examples:
        >>> from gia_jax.defenses.protected import parse, promises
        >>> promises(parse("gaussian:scale=0.1"))
        ['no epsilon: the sensitivity is unbounded']
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
    """Computes the share that Soteria prunes of the live features, which are not 0 for every example of a batch.

    Args:
        parts: Defenses of the client, with Soteria among them.
        apply_fn: Model of the client, a function `(params, inputs) -> logits`.
        params: Parameters of the model.
        inputs: Batches of v victims as the model sees them, shape (v, b, *d), of a floating-point type and finite.
        head: Name of the last layer, a key of the parameters.

    Returns:
        The share for each victim, in [0, 1], shape (v,).

    Raises:
        ValueError: If Soteria is not among `parts`, or `inputs` have another shape or type, are empty or not finite.

    Examples:
        Half of the four features are pruned:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> from gia_jax.defenses.protected import live_shares, parse
        >>> apply_fn, params = models.functional(models.MLP((4,), 2, hidden=(), rngs=nnx.Rngs(0)))
        >>> inputs = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
        >>> share_fn = jax.jit(lambda params: live_shares(parse("soteria:ratio=0.5"), apply_fn, params, inputs))
        >>> share_fn(params).tolist()
        [0.5]
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
