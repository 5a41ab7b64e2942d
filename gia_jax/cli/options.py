"""The options of the command line, their defaults, and what is refused before data are read or a model is built."""

import argparse
from collections.abc import Iterable

import gia_jax
from gia_jax import _check, models
from gia_jax.attacks.cafe import BATCH_SIZE, NUM_RECORDS, NUM_ROUNDS
from gia_jax.attacks.gias import NUM_LATENT_STEPS
from gia_jax.cli.cases import NUM_OTHERS
from gia_jax.cli.names import AGGREGATIONS, ATTACKS, DATA, INVERTIBLE, LEVENBERG_MARQUARDT_STEPS, SOLVERS
from gia_jax.defenses.protected import NAMES, Part, check_together, parse

# Options that say what is attacked, for every attack but cafe; each attack's own are in its entry of `ATTACKS`.
SETTING = ("model", "data", "victims", "batch_size", "defense", "local_steps", "aggregation", "no_prior_only")
CAFE_OPTIONS = ("data", "records", "rounds", "batch_size")
COUNTS = ("victims", "batch_size", "restarts", "local_steps", "lanes", "steps", "clients", "records", "rounds")

NEEDS = {"clients": "--aggregation", "clip": "--aggregation", "local_learning_rate": "--local-steps above 1"}


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m gia_jax", description=gia_jax.__doc__)
    made.add_argument("--out", default="gia_jax_out", help="folder for results.json and the pictures")
    made.add_argument("--seed", type=int, default=0, help="seed of the model's weights and of the attacks")
    commands = made.add_subparsers(dest="command", metavar="{attack,list}")
    commands.add_parser("list", help="names of attacks, models, data and solvers")
    # Options get their defaults later, in `fill`: one that was given without meaning for the attack is refused.
    single = commands.add_parser("attack", help="one attack on one setting")
    single.add_argument("--attack", help=f"{', '.join([*ATTACKS, 'cafe'])}; default: inverting_gradients")
    single.add_argument("--model", help=f"{', '.join(models.MODELS)}; default: lenet, or one that suits the attack")
    single.add_argument("--data", help=f"{DATA}; default: photos, for cafe mnist")
    single.add_argument("--victims", type=int, help="clients attacked, in the order of the data's ids; default: 3")
    single.add_argument("--batch-size", type=int, help=f"images of a client; default: 1, for cafe {BATCH_SIZE}")
    single.add_argument("--records", type=int, help=f"records of cafe's federation; default: {NUM_RECORDS}")
    single.add_argument("--rounds", type=int, help=f"rounds of cafe's federation; default: {NUM_ROUNDS}")
    single.add_argument("--steps", type=int, help="steps of each restart; default: the paper's")
    single.add_argument("--restarts", type=int, help="starts of each attack; the lowest loss is kept; default: 1")
    single.add_argument("--labels", choices=["known", "inferred"], help="default: as in the attack's paper")
    single.add_argument("--local-steps", type=int, help="local SGD steps of the client on its whole batch; default: 1")
    single.add_argument(
        "--local-learning-rate",
        type=float,
        help="learning rate of the local steps, which the attacker knows; default: 0.01",
    )
    single.add_argument(
        "--defense",
        action="append",
        metavar="NAME[:k=v,k=v]",
        help=f"a defense of the client; repeat it for several, in their order: {', '.join(NAMES)}",
    )
    single.add_argument(
        "--adaptive", action="store_true", default=None, help="the attacker knows the defenses, but not their keys"
    )
    single.add_argument(
        "--aggregation", help=f"the protocol by which --clients add up their updates: {', '.join(AGGREGATIONS)}"
    )
    single.add_argument("--clients", type=int, help="clients that aggregate, with --batch-size images each; default: 4")
    single.add_argument("--clip", type=float, help="largest entry of an update that aggregation keeps; default: 2")
    single.add_argument(
        "--statistics",
        choices=["none", "running", "exact"],
        help="statistics of batch normalisation that grad_inversion matches: the running ones of the model, which say "
        "nothing of data before training, or the exact ones of the client's batch, granted; default: exact",
    )
    single.add_argument(
        "--generator",
        metavar="FILE",
        help="trained generator of gias, of models.save_decoder or benchmarks/generators.py; default: an untrained one",
    )
    single.add_argument(
        "--latent-steps",
        type=int,
        help=f"steps of gias before --steps; default: {NUM_LATENT_STEPS}, or 0 where the generator is untrained",
    )
    single.add_argument("--solver", help=f"{', '.join(SOLVERS)}; default: paper")
    single.add_argument("--lanes", type=int, help="restarts under one vmap; default: 16")
    single.add_argument(
        "--no-prior-only", action="store_true", default=None, help="leave out the same attack on random updates"
    )
    single.add_argument(
        "--diagnose",
        action="store_true",
        default=None,
        help="say before the attack what was done to the first victim's update, as far as it shows, and which attacks "
        "can work on it",
    )
    # The same options after the command; without a default here, those before it are kept.
    single.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="as before the command")
    single.add_argument("--out", default=argparse.SUPPRESS, help="as before the command")
    return made


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def taken(args: argparse.Namespace) -> tuple[str, ...]:
    """The options that have a meaning for this attack; raises ValueError for another one that was given."""
    args.attack = "inverting_gradients" if args.attack is None else args.attack
    _one_of("attack", args.attack, [*ATTACKS, "cafe"])
    cafe = args.attack == "cafe"
    taken = CAFE_OPTIONS if cafe else (*SETTING, *ATTACKS[args.attack].options)
    if args.aggregation is not None:
        taken += ("clients", "clip")
    if args.local_steps is not None and args.local_steps > 1:
        taken += ("local_learning_rate",)
    given = [name for name, value in vars(args).items() if value is not None]
    for name in given:
        if name not in (*taken, "attack", "command", "out", "seed", *(() if cafe else ("diagnose",))):
            reason = f"needs {NEEDS[name]}" if name in NEEDS and not cafe else f"is not for --attack {args.attack}"
            raise ValueError(f"{_flag(name)} {reason}, got {getattr(args, name)!r}")
    for name in set(given).intersection(COUNTS):
        if not 1 <= getattr(args, name) < 2**31:
            raise ValueError(f"{_flag(name)} must be at least 1 and below 2^31, got {getattr(args, name)}")
    return taken


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{_flag(name)} must be one of {', '.join(known)}, got {value!r}")


def fill(args: argparse.Namespace, taken: tuple[str, ...]) -> None:
    """Fills in the defaults of the options that were not given."""
    named = ATTACKS[args.attack]
    defaults = {
        "model": named.model,
        "data": "photos",
        "victims": 3,
        "batch_size": 1,
        "restarts": 1,
        "lanes": 16,
        "labels": named.labels,
        "local_steps": 1,
        "local_learning_rate": 1e-2,
        "defense": [],
        "adaptive": False,
        "clients": 4,
        "clip": 2.0,
        "statistics": "exact" if "statistics" in taken else "none",
        "solver": "paper",
        "no_prior_only": False,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps is None:
        args.steps = LEVENBERG_MARQUARDT_STEPS if args.solver == "levenberg_marquardt" else named.num_steps


def checked(args: argparse.Namespace) -> tuple[Part, ...]:
    """Refuses options that do not go together, and reads the defenses, before data are read or a model is built."""
    for name, known in (("model", models.MODELS), ("solver", SOLVERS)):
        _one_of(name, getattr(args, name), known)
    if args.aggregation is not None:
        _one_of("aggregation", args.aggregation, AGGREGATIONS)
    if args.model not in INVERTIBLE.get(args.attack, models.MODELS):
        fits = ", ".join(INVERTIBLE[args.attack])
        raise ValueError(f"--attack {args.attack} needs one of the models {fits}, got {args.model!r}")
    if not 0 < args.local_learning_rate < float("inf"):
        raise ValueError(f"--local-learning-rate must be positive and finite, got {args.local_learning_rate}")
    if args.latent_steps is not None and args.latent_steps < 0:
        raise ValueError(f"--latent-steps must be at least 0, got {args.latent_steps}")
    if args.attack == "grad_inversion" and args.solver == "levenberg_marquardt":
        raise ValueError("--solver levenberg_marquardt solves for one seed only, got --attack grad_inversion")
    if args.statistics == "exact" and args.aggregation is not None:
        raise ValueError(f"--statistics exact are those of one client only, got --aggregation {args.aggregation}")
    _check.fits(args.victims * args.restarts, **{"--restarts": args.restarts})
    _check.fits(args.victims * args.restarts * max(args.steps, 1), **{"--steps": args.steps})
    size = args.batch_size * num_clients(args)
    if args.attack == "r_gap" and size > 1:
        raise ValueError(f"--attack r_gap needs a batch of one image, got {size}")
    if args.attack == "idlg" and args.labels == "inferred" and size > 1:
        raise ValueError(f"--attack idlg infers the label of one image, got {size}")
    parts = tuple(part for text in args.defense for part in parse(text))
    check_together(parts, local_steps=args.local_steps)
    if args.adaptive and args.solver == "levenberg_marquardt":
        raise ValueError("--solver levenberg_marquardt has an objective of its own, got --adaptive")
    if args.adaptive and not parts:
        raise ValueError("--adaptive needs a --defense that the attacker could know, got none")
    for part in parts:
        if part.acts_on != "input":
            continue
        if part.settings["k"] > args.batch_size + NUM_OTHERS:
            most = args.batch_size + NUM_OTHERS
            raise ValueError(f"--defense {part} must mix at most the {most} images that a client has")
        if args.adaptive and args.labels == "inferred" and args.attack != "dlg":
            raise ValueError(
                f"--adaptive with {part.name} needs --labels known: no rule finds mixed labels, got inferred"
            )
    return parts


def num_clients(args: argparse.Namespace) -> int:
    """Returns the number of clients whose update is attacked together; 1 without aggregation."""
    return 1 if args.aggregation is None else args.clients
