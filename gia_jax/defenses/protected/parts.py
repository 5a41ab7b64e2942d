"""Defenses by name: what each acts on, its settings, how their text is read, and what makes it of them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PRNGKeyArray

from gia_jax import _check, defenses
from gia_jax.defenses.mixing import InputDefenseFn


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
UNBIASED = (*NOISE, "ternary", "quantize")  # their expectation is what enters them
ZEROING = ("prune", "topk", "ternary", "quantize", "soteria")  # a zero they share need not be one of the gradient


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
    check_part(part)
    return (part,)


def check_part(part: Part) -> None:
    """Raises ValueError for settings that a defense does not have or refuses, before there is a model or data.

    Args:
        part: Defense with its settings.

    Raises:
        ValueError: If the defense is unknown, it has other settings, or it refuses the value of one.
    """
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
            transformation(part, jax.random.key(0))
        elif part.acts_on == "input":
            encoding_fn({part.name: part.settings}, 2)
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


def transformation(part: Part, key: PRNGKeyArray) -> optax.GradientTransformation:
    """Makes the transformation of a defense of the update.

    Args:
        part: Defense that acts on the update.
        key: Random key of what the defense draws. Most draw nothing.

    Returns:
        The transformation.

    Raises:
        ValueError: If the defense refuses a setting.
    """
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


def encoding_fn(settings: dict[str, Any], num_classes: int) -> InputDefenseFn:
    """Makes the encoding of the examples.

    Args:
        settings: Settings of every defense of the client, by its name.
        num_classes: Number of classes.

    Returns:
        The function `(key, batch) -> batch` of MixUp or InstaHide, or one that returns the batch as it is.

    Raises:
        ValueError: If the defense refuses a setting.
    """
    for name, defense in (("mixup", defenses.mixup), ("instahide", defenses.instahide)):
        if name in settings:
            return defense(num_classes, k=settings[name]["k"])
    return lambda key, batch: batch
