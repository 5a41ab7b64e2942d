"""`python -m gia_jax`: a demonstration, single attacks, and a list of what there is. It only calls the library."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax

import gia_jax
from gia_jax import Observation, _check, console, data, demonstration, labels, metrics, models, report, vertical
from gia_jax.aggregation import AGGREGATIONS, make_protocol
from gia_jax.aggregation import TARGETS as AGGREGATED_TARGETS
from gia_jax.attacks.cafe import BATCH_SIZE, NUM_RECORDS, NUM_ROUNDS
from gia_jax.attacks.gias import NUM_LATENT_STEPS
from gia_jax.attacks.named import ATTACKS, FIRST_LAYER, INVERTIBLE, LEVENBERG_MARQUARDT_STEPS, SOLVERS
from gia_jax.cases import NUM_OTHERS, PRIOR_ONLY, Case, attack, load_case, see
from gia_jax.protection import (
    COMBINATIONS,
    DEFENSES,
    NAMES,
    Named,
    Part,
    Protected,
    check_together,
    live_shares,
    parse,
    promises,
)

TERMINATED = "terminated"
DATA = "photos, digits, or a prepared TFDS set such as mnist, cifar10, cifar100"
CAFE = "CAFE, Jin et al. 2021: vertical federated learning of several rounds, by exact least squares"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit status: 0 for success, 2 for a mistake, 130 after Ctrl-C, 143 after a request to terminate.
    """
    args = _parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # so that what was printed before a kill is not lost
    try:
        with warnings.catch_warnings(), _terminating():
            warnings.showwarning = console.warn
            if not 0 <= args.seed < 2**32:
                raise ValueError(f"--seed must be at least 0 and below 2^32, got {args.seed}")
            if args.out == "":
                raise ValueError("--out must name a folder, got ''")
            if args.command == "list":
                _list()
            elif args.command == "attack":
                _attack(args)
            else:
                demonstration.run(Path(args.out), args.seed)
    except (ValueError, ImportError, OSError, OverflowError) as error:
        print(f"gia_jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        kept = f"the same command goes on from the states kept in {console.states(Path(args.out))}"
        any_kept = next(console.states(Path(args.out)).glob("*.state"), None)
        print(f"\ngia_jax: interrupted; {kept if any_kept else 'no state was kept'}", file=sys.stderr)
        return 143 if stopped.args == (TERMINATED,) else 130
    return 0


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Within it, a request to terminate (SIGTERM) raises KeyboardInterrupt, so that the state of a run is saved."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def process() -> NoReturn:
    """Runs `main` as a process of its own; an interruption does not wait for compilers that are still at work."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    status = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed before the start
        with contextlib.suppress(OSError):
            stream.flush()
    if status > 128:
        os._exit(status)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gia_jax", description=gia_jax.__doc__)
    parser.add_argument("--out", default="gia_jax_out", help="folder for results.json and the pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model's weights and of the attacks")
    commands = parser.add_subparsers(dest="command", metavar="{attack,list}")
    commands.add_parser("list", help="names of attacks, models, data and solvers")
    # Options get their defaults later, in `_defaults`: one that was given without meaning for the attack is refused.
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
    return parser


def _list() -> None:
    for title, names in (
        ("attacks", {name: named.summary for name, named in ATTACKS.items()} | {"cafe": CAFE}),
        ("solvers", SOLVERS),
        ("defenses", {name: f"{_settings(named)}{named.summary}" for name, named in DEFENSES.items()}),
        ("aggregation", {name: named.summary for name, named in AGGREGATIONS.items()}),
        ("combinations of defenses", {name: " ".join(parts) for name, parts in COMBINATIONS.items()}),
        ("models", dict.fromkeys(models.MODELS, "")),
        ("data", {"photos": "scikit-image's photographs", "digits": "scikit-learn's digits", "any TFDS set": DATA}),
        (
            "label rules",
            {name: "" for name in labels.__all__ if name[0].islower() and name not in ("dense", "ilrg_system")},
        ),
    ):
        print(f"{title}:")
        for name, summary in names.items():
            print(f"  {name:<22}{summary}".rstrip())


def _settings(named: Named) -> str:
    return "".join(f"{key}={value:g} " for key, value in named.settings.items())


# Options that say what is attacked, for every attack but cafe; each attack's own are in its entry of `ATTACKS`.
SETTING = ("model", "data", "victims", "batch_size", "defense", "local_steps", "aggregation", "no_prior_only")
CAFE_OPTIONS = ("data", "records", "rounds", "batch_size")
COUNTS = ("victims", "batch_size", "restarts", "local_steps", "lanes", "steps", "clients", "records", "rounds")

NEEDS = {"clients": "--aggregation", "clip": "--aggregation", "local_learning_rate": "--local-steps above 1"}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _options(args: argparse.Namespace) -> tuple[str, ...]:
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


def _defaults(args: argparse.Namespace, taken: tuple[str, ...]) -> None:
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


def _checked(args: argparse.Namespace) -> tuple[Part, ...]:
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
    size = args.batch_size * _num_clients(args)
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


def _num_clients(args: argparse.Namespace) -> int:
    return 1 if args.aggregation is None else args.clients


def _attack(args: argparse.Namespace) -> None:
    taken, began = _options(args), time.time()
    if args.attack == "cafe":
        _cafe(args, began)
        return
    statistics_given = args.statistics not in (None, "none")
    _defaults(args, taken)
    parts, clients = _checked(args), _num_clients(args)
    protocol = None if args.aggregation is None else make_protocol(args.aggregation, clients, clip=args.clip)
    names = ("",) if protocol is None else AGGREGATED_TARGETS
    out = console.folder(Path(args.out), [console.RESULTS, *map(_picture_name, names)])
    jax.config.update("jax_enable_x64", args.solver == "levenberg_marquardt" or ATTACKS[args.attack].x64)
    case = load_case(
        args.model,
        args.data,
        victims=args.victims,
        batch_size=args.batch_size * clients,
        seed=args.seed,
        local_steps=args.local_steps,
        learning_rate=args.local_learning_rate,
    )
    key_clients, key_attack, key_generator = jax.random.split(jax.random.key(args.seed), 3)
    generator = None
    if args.attack == "gias":
        file = None if args.generator is None else Path(args.generator)
        generator = case.generator(file, key_generator, num_latent_steps=args.latent_steps)
        args.generator, args.latent_steps = args.generator or "untrained", generator.num_latent_steps
    protected = case.protect(parts)
    console.banner(case, args.model, protected, clients)
    if case.statistics_fn is None:
        if statistics_given:
            given = f"--statistics {args.statistics}"
            raise ValueError(f"{given} needs a model with batch normalisation, got --model {args.model}")
        args.statistics = "none"
    exact_statistics = args.statistics == "exact"
    known = args.labels == "known"
    defense = " ".join(str(part) for part in parts) or "none"
    threat = console.threat(known, defense, args.adaptive, exact_statistics)
    if args.adaptive and not protected.modelled:
        threat += ", but no likelihood for this chain: attacks as if it did not"
    if args.statistics == "running":
        threat += "; matches running statistics"
    if args.attack == "gias":
        threat += "; has a generator, " + (
            "untrained" if args.generator == "untrained" else f"trained: {args.generator}"
        )
    if protocol is None:
        seen = see(case, {defense: protected}, key_clients, known=[known], statistics=exact_statistics)
        targets: dict[str, Any] = {"": (case, seen[known][defense])}
        said = _live(parts, case, protected)
    else:
        from gia_jax.secure_aggregation.cases import see_aggregated

        targets = see_aggregated(case, protected, protocol, key_clients, known=known)
        threat += f"; {args.aggregation} of {clients} clients"
        said = []  # a case has the images of all clients in one batch
    print("\n".join([f"threat model: {threat}", *promises(parts, **case.bounds_of(parts)), *said]) + "\n")
    # The parameters that the server sent tell every attacker the model, with or without a bottleneck.
    plain = case.protect([part for part in parts if part.acts_on == "model"])
    if args.diagnose:
        _diagnose(args.model, case, plain, targets)
    settings = {name: getattr(args, name) for name in ("attack", *taken, "seed")}
    assumed = protected if args.adaptive else plain
    guesses = report.baselines(case.pixels, case.gallery)
    rows, found, content = [], {}, {}
    for target, (seen_case, observations) in targets.items():
        title = f"{args.attack}, {target}" if target else args.attack
        if not isinstance(observations, Observation):
            rows.append([title, "-", str(observations), *[""] * 6])
            content[target] = str(observations)
            continue
        outcomes = attack(
            seen_case,
            {defense: observations},
            assumed,
            args.attack,
            key_attack,
            model=args.model,
            known_labels=known,
            adaptive=args.adaptive,
            statistics=args.statistics,
            generator=generator,
            solver=args.solver,
            num_steps=args.steps,
            num_restarts=args.restarts,
            lanes=args.lanes,
            prior_only=None if args.no_prior_only else defense,
            progress_fn=console.progress(title),
            checkpoint=console.states(out),
        )
        outcome, prior = outcomes[defense], outcomes.get(PRIOR_ONLY)
        rows.append(console.row(title, known, outcome, prior))
        found[target] = seen_case, outcome
        extra = {"baselines_psnr": {name: psnr.tolist() for name, psnr in guesses.items()}}
        if prior is not None:
            extra["prior_only_psnr"] = prior.scores.psnr.tolist()
        content[target] = report.results(
            outcome.study, outcome.scores, settings=settings, threat_model=threat, extra=extra
        )
    attacked = [outcome for _, outcome in found.values()]
    console.write(out, content.get("", content), attacked, began)  # first of all: a closed pipe loses the rest only
    print(console.table(rows, guesses) + "\n")
    for target, (seen_case, outcome) in found.items():
        title = f"{args.attack} on {args.model}" + (f", {defense}" if parts else "") + (f", {target}" if target else "")
        console.picture(out / _picture_name(target), seen_case.pixels, {args.attack: outcome}, title, began)
    console.forget(out, attacked)


def _diagnose(model: str, case: Case, plain: Protected, targets: dict[str, Any]) -> None:
    """Prints what the update of the first victim tells an attacker that knows of no defense but those of the model."""
    first_layer = FIRST_LAYER.get(model)
    for target, (_, seen) in targets.items():
        if isinstance(seen, Observation):
            update, extra = jax.tree.map(lambda leaf: leaf[0], (seen.update, seen.extra))
            found = metrics.diagnose(
                Observation(seen.params, update, extra),
                plain.assumed_fn,
                key=jax.random.key(0),
                classifier_fn=labels.dense("head"),
                apply_fn=plain.apply_fn,
                first_layer_fn=None if first_layer is None else labels.dense(first_layer),
                module=case.module,
                num_classes=case.num_classes,
            )
            print("\n".join([f"the first victim's update{f', {target}' if target else ''}:", *found.lines()]) + "\n")


def _picture_name(target: str) -> str:
    return f"reconstructions_{target.replace(':', '_')}.png" if target else "reconstructions.png"


def _cafe(args: argparse.Namespace, began: float) -> None:
    defaults = {"data": "mnist", "records": NUM_RECORDS, "rounds": NUM_ROUNDS, "batch_size": BATCH_SIZE}
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    _check.fits(args.records * args.rounds, **{"--records": args.records})
    out = console.folder(Path(args.out), [console.RESULTS, "reconstructions.png"])
    images = data.load(args.data, limit=args.records)
    if len(images.labels) < args.records:
        raise ValueError(f"--records must be at most {len(images.labels)} for {args.data}, got {args.records}")
    print(
        f"gia_jax {gia_jax.__version__}: {vertical.NUM_WORKERS} workers hold a quarter each of {args.records} images "
        f"of {images.name}; {args.rounds} rounds of {args.batch_size}, model untrained and frozen; {report.hardware()}"
    )
    threat = vertical.THREAT.describe()
    print(f"threat model: {threat}\n")
    key = jax.random.key(args.seed)
    outcome, pixels, condition = vertical.cafe_on_federation(
        images, key, batch_size=args.batch_size, rounds=args.rounds
    )
    print(f"the batches identify every record: rank {args.records}, condition number {condition:.0f}\n")
    small = args.data in ("photos", "digits")
    gallery = images.images[:0] if small else data.load(args.data, split="train", limit=2_000).images
    guesses = report.baselines(pixels, gallery)
    settings = {"attack": "cafe"} | {name: getattr(args, name) for name in (*CAFE_OPTIONS, "seed")}
    content = report.results(outcome.study, outcome.scores, settings=settings, threat_model=threat)
    console.write(out, content, [outcome], began)
    print(console.table([console.row("cafe", False, outcome, None)], guesses) + "\n")
    first = outcome._replace(scores=report.Scores(*(field[:8] for field in outcome.scores)))
    console.picture(out / "reconstructions.png", pixels[:8], {"cafe": first}, f"cafe on {images.name}", began)


def _live(parts: tuple[Part, ...], case: Case, protected: Protected) -> list[str]:
    """What Soteria takes from these victims; a feature that is 0 anyway is no loss to the attacker."""
    if "soteria" not in [part.name for part in parts] or any(part.acts_on == "input" for part in parts):
        return []
    shares = live_shares(parts, protected.apply_fn, protected.params, case.truth.inputs)
    return [f"soteria prunes {shares.mean():.0%} of the features that are not 0 for the victims' images"]


if __name__ == "__main__":
    process()
