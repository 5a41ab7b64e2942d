"""The defaults of the command line's options, and what is refused before data are read or a model is built."""

import argparse
import math
from collections.abc import Iterable
from typing import Any

from gia_jax import _check, models
from gia_jax.cli.examples import DATA, GRAPHS, KINDS, NUM_OTHERS, PHOTO_SIZE, kind_of
from gia_jax.cli.names import (
    AGGREGATIONS,
    ATTACKS,
    INVERTIBLE,
    LABEL_RULES,
    SOLVERS,
    rule_of,
)
from gia_jax.defenses.protected import Part, check_together, parse
from gia_jax.matching.second_order import NUM_STEPS as SECOND_ORDER_STEPS

# Options that say what is attacked, for every attack; each attack's own are in its entry of `ATTACKS`.
CLIENT = ("model", "batch_size", "defense", "local_steps", "no_prior_only")
SIMULATED = ("data", "image_size", "victims", "aggregation")
RECORDED = ("update", "params", "input_shape", "classes", "head", "mean", "std", "batch_norm", "truth")
NEEDED = ("params", "model", "input_shape")  # beside --update
ALWAYS = ("argv", "attack", "command", "out", "seed", "diagnose")
NUM_COPIES = 3  # least number of copies of a batch in memory: the examples, their gradient, and the best so far
COUNTS = ("victims", "batch_size", "restarts", "local_steps", "lanes", "steps", "clients", "classes", "image_size")

NEEDS = {"clients": "--aggregation", "clip": "--aggregation", "local_learning_rate": "--local-steps above 1"}
NEEDS |= dict.fromkeys(RECORDED, "--update")


def flag(name: str) -> str:
    """Returns an option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def taken(args: argparse.Namespace) -> tuple[str, ...]:
    """Finds the options that have a meaning for this attack on this setting.

    Args:
        args: Options of the command line. Those that were not given are None; `attack` gets its default here.

    Returns:
        Their names.

    Raises:
        ValueError: If another option was given, one is missing that a recorded update needs, or a count is below 1.
    """
    args.attack = "inverting_gradients" if args.attack is None else args.attack
    _one_of("attack", args.attack, ATTACKS)
    recorded = args.update is not None
    unknown = "head" if args.model is None or ":" not in args.model else "batch_norm"  # to this kind of model
    setting = [name for name in RECORDED if name != unknown] if recorded else SIMULATED
    taken = (*CLIENT, *setting, *ATTACKS[args.attack].options)
    if args.aggregation is not None:
        taken += ("clients", "clip")
    if args.local_steps is not None and args.local_steps > 1:
        taken += ("local_learning_rate",)
    for name, value in vars(args).items():
        if value is not None and name not in (*taken, *ALWAYS):
            raise ValueError(f"{flag(name)} {_why(name, args)}, got {value!r}")
    if recorded:
        for name in NEEDED:
            if getattr(args, name) is None:
                raise ValueError(f"--update needs {flag(name)}, got none")
    if args.image_size is not None and args.data not in (None, "photos"):
        raise ValueError(f"--image-size needs --data photos, got {args.image_size} with --data {args.data}")
    check_counts(args, COUNTS)
    return taken


def _why(name: str, args: argparse.Namespace) -> str:
    """Returns why an option has no meaning."""
    if args.update is not None and name in (*SIMULATED, "clients", "clip"):
        return "is not for --update"
    if args.update is not None and name in RECORDED:
        return f"is not for --model {args.model}"
    return f"needs {NEEDS[name]}" if name in NEEDS else f"is not for --attack {args.attack}"


def check_counts(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raises ValueError for a number among these options that is below 1 or too large for an index."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            raise ValueError(f"{flag(name)} must be at least 1 and below 2^31, got {value}")


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raises ValueError for a name that is not among the known ones."""
    if value not in known:
        raise ValueError(f"{flag(name)} must be one of {', '.join(known)}, got {value!r}")


def fill(args: argparse.Namespace, taken: tuple[str, ...]) -> None:
    """Fills in the defaults of the options that were not given.

    Args:
        args: Options of the command line, which are changed.
        taken: Names of the options that have a meaning.
    """
    named, recorded = ATTACKS[args.attack], args.update is not None
    infers = recorded or args.label_rule is not None
    data = "photos" if args.data is None else args.data
    defaults = {
        "model": kind_of(data).model or named.model,
        "data": data,
        "image_size": PHOTO_SIZE if data == "photos" and not recorded else None,
        "victims": 1 if recorded else 3,
        "batch_size": 1,
        "restarts": 1,
        "lanes": 16,
        "labels": "inferred" if infers else named.labels,
        "local_steps": 1,
        "local_learning_rate": 1e-2,
        "defense": [],
        "adaptive": False,
        "clients": 4,
        "clip": 2.0,
        "statistics": "exact" if "statistics" in taken and not recorded else "none",
        "solver": "paper",
        "no_prior_only": False,
        "head": "head",
        "batch_norm": "evaluation",
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps is None:
        args.steps = SECOND_ORDER_STEPS if args.solver == "levenberg_marquardt" else named.num_steps
    if args.label_rule is None and "label_rule" in taken and args.labels == "inferred":
        args.label_rule = rule_of(args.attack, args.batch_size * num_clients(args))


def checked(args: argparse.Namespace) -> tuple[Part, ...]:
    """Refuses options that do not go together, before data are read or a model is built.

    Args:
        args: Options of the command line with their defaults. Those of a recorded update become tuples of numbers.

    Returns:
        The defenses.

    Raises:
        ValueError: If an option is out of its range, or has no meaning beside another one.
    """
    named, size = ATTACKS[args.attack], args.batch_size * num_clients(args)
    if args.update is None:
        _check_data(args)
    else:
        _check_recorded(args)
    _one_of("solver", args.solver, SOLVERS)
    if args.aggregation is not None:
        _one_of("aggregation", args.aggregation, AGGREGATIONS)
    if args.model not in INVERTIBLE.get(args.attack, (args.model,)):
        raise ValueError(
            f"--attack {args.attack} needs one of the models {', '.join(named.models)}, got {args.model!r}"
        )
    if not 0 < args.local_learning_rate < float("inf"):
        raise ValueError(f"--local-learning-rate must be positive and finite, got {args.local_learning_rate}")
    if args.latent_steps is not None and args.latent_steps < 0:
        raise ValueError(f"--latent-steps must be at least 0, got {args.latent_steps}")
    if args.solver not in named.solvers:
        known = ", ".join(named.solvers)
        raise ValueError(f"--solver of --attack {args.attack} must be one of {known}, got {args.solver!r}")
    if args.statistics == "exact" and args.aggregation is not None:
        raise ValueError(f"--statistics exact are those of one client only, got --aggregation {args.aggregation}")
    _check.fits(args.victims * args.restarts, **{"--restarts": args.restarts})
    _check.fits(args.victims * args.restarts * max(args.steps, 1), **{"--steps": args.steps})
    if named.one_example and size > 1:
        raise ValueError(f"--attack {args.attack} needs a batch of one example, got {size}")
    _check_labels(args, size)
    parts = tuple(part for text in args.defense for part in parse(text))
    _check_defenses(args, parts)
    return parts


def _check_data(args: argparse.Namespace) -> None:
    """Refuses a model or an attack that does not take such data."""
    kind, wanted = kind_of(args.data), ATTACKS[args.attack].data
    if args.data not in KINDS and args.data.lower() in KINDS:
        raise ValueError(f"--data must be {DATA}, got {args.data!r}: names are in lower case")
    if wanted not in ("", kind.name):
        raise ValueError(f"--attack {args.attack} needs {wanted}, got --data {args.data}")
    if args.model not in kind.models:
        place = "--model" if kind.name == "images" else f"--model of --data {args.data}"
        where = ": it is for graphs, which --data must be" if args.model in GRAPHS.models else ""
        raise ValueError(f"{place} must be one of {', '.join(kind.models)}, got {args.model!r}{where}")
    if kind.name == "graphs" and args.solver == "levenberg_marquardt":
        raise ValueError(f"--solver levenberg_marquardt needs inputs that are one array, got --data {args.data}")


def _check_labels(args: argparse.Namespace, size: int) -> None:
    """Refuses label rules that are unknown, have nothing to infer, or infer fewer labels than there are examples."""
    if args.label_rule is None:
        return
    _one_of("label_rule", args.label_rule, LABEL_RULES)
    if args.labels == "known":
        raise ValueError(f"--label-rule infers labels, got {args.label_rule!r} with --labels known")
    if size > 1 and LABEL_RULES[args.label_rule].one_example:
        own = ATTACKS[args.attack].rule == args.label_rule
        who = f"--attack {args.attack}" if own else f"--label-rule {args.label_rule}"
        raise ValueError(f"{who} infers the label of one example, got {size}: take --label-rule bias_counts")


def _check_defenses(args: argparse.Namespace, parts: tuple[Part, ...]) -> None:
    """Refuses defenses that cannot be in one client, and what an attacker cannot make of them."""
    check_together(parts, local_steps=args.local_steps)
    if args.adaptive and args.solver == "levenberg_marquardt":
        raise ValueError("--solver levenberg_marquardt has an objective of its own, got --adaptive")
    if args.adaptive and not parts:
        raise ValueError("--adaptive needs a --defense that the attacker could know, got none")
    for part in parts:
        if args.update is not None:
            if not args.adaptive:
                raise ValueError(f"--defense {part} of a recorded --update needs --adaptive: the client has acted")
            if part.acts_on in ("input", "model"):
                raise ValueError(f"--defense {part} is not for --update: it changes the client's {part.acts_on}")
        elif part.acts_on == "input":
            if kind_of(args.data).name == "graphs":
                raise ValueError(f"--defense {part} mixes inputs that are one array, got --data {args.data}")
            if part.settings["k"] > args.batch_size + NUM_OTHERS:
                most = args.batch_size + NUM_OTHERS
                raise ValueError(f"--defense {part} must mix at most the {most} examples that a client has")
            rule = args.label_rule if args.adaptive and args.labels == "inferred" else None
            if rule is not None and not LABEL_RULES[rule].mixed:
                mixed = " or ".join(name for name, known in LABEL_RULES.items() if known.mixed)
                needed = f"needs --labels known, or --label-rule {mixed} for one example"
                raise ValueError(f"--adaptive with {part.name} {needed}: {rule} finds no mixed labels")


def _check_recorded(args: argparse.Namespace) -> None:
    """Reads the numbers of a recorded update's options, and refuses what cannot be."""
    if ":" not in args.model and args.model not in models.MODELS:
        raise ValueError(f"--model must be MODULE:FUNCTION or one of {', '.join(models.MODELS)}, got {args.model!r}")
    if ":" in args.model and args.defense:
        raise ValueError(f"--defense of a recorded --update needs a --model by its name, got {args.model!r}")
    if args.statistics == "exact":
        raise ValueError("--statistics exact is not for --update: nobody recorded them, got 'exact'")
    if args.labels == "known" and args.truth is None:
        raise ValueError("--labels known needs a --truth with the labels, got none")
    if (args.mean is None) != (args.std is None):
        given = "--mean" if args.std is None else "--std"
        raise ValueError(f"--mean and --std must be given together, got only {given}")
    args.input_shape = _numbers("input_shape", args.input_shape, int)
    if not all(size >= 1 for size in args.input_shape):
        raise ValueError(f"--input-shape must be of sizes of at least 1, got {args.input_shape}")
    entries, lanes = math.prod(args.input_shape), min(args.lanes, args.restarts)
    _check.fits(entries, **{"--input-shape": args.input_shape})
    _check.fits(lanes * args.batch_size * entries * NUM_COPIES, **{"--batch-size": args.batch_size})
    for name in ("mean", "std"):
        if getattr(args, name) is not None:
            setattr(args, name, _per_channel(name, getattr(args, name), args.input_shape[-1]))
    if args.std is not None and min(args.std) <= 0:
        raise ValueError(f"--std must be above 0, got {min(args.std)}")
    wanted = ATTACKS[args.attack].data
    if wanted == "graphs" or (wanted == "images" and len(args.input_shape) != 3):
        raise ValueError(f"--attack {args.attack} needs {wanted}, got --input-shape {args.input_shape}")
    if ATTACKS[args.attack].needs_range and args.mean is None:
        raise ValueError(f"--attack {args.attack} needs --mean and --std, for the range of pixels, got none")


def _numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """Reads numbers with commas between them."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{flag(name)} must be {what} with commas between them, got {text!r}") from None


def _per_channel(name: str, text: str, channels: int) -> tuple[float, ...]:
    """Reads one finite number for each channel, or one for all."""
    values = _numbers(name, text, float)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{flag(name)} must be finite, got {text!r}")
    if len(values) not in (1, channels):
        raise ValueError(f"{flag(name)} must be one number or {channels}, one for each channel, got {len(values)}")
    return values * channels if len(values) == 1 else values


def num_clients(args: argparse.Namespace) -> int:
    """Returns the number of clients whose update is attacked together; 1 without aggregation."""
    return 1 if args.aggregation is None else args.clients
