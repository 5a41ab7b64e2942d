"""`python -m gia_jax`: a demonstration, single attacks, and a list of what there is. It only calls the library."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gia_jax
from gia_jax import Observation, console, data, demonstration, labels, models, report, vertical
from gia_jax.aggregation import AGGREGATIONS, make_protocol
from gia_jax.attacks.cafe import BATCH_SIZE, NUM_RECORDS, NUM_ROUNDS
from gia_jax.attacks.gias import NUM_LATENT_STEPS
from gia_jax.attacks.named import ATTACKS, INVERTIBLE, LEVENBERG_MARQUARDT_STEPS, SOLVERS
from gia_jax.cases import PRIOR_ONLY, Case, attack, load_case, see
from gia_jax.protection import COMBINATIONS, DEFENSES, NAMES, Named, Part, Protected, live_shares, parse, promises

DATA = "photos, digits, or a prepared TFDS set such as mnist, cifar10, cifar100"
CAFE = "CAFE, Jin et al. 2021: vertical federated learning of several rounds, by exact least squares"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if not 0 <= args.seed < 2**32:
            raise ValueError(f"--seed must be at least 0 and below 2^32, got {args.seed}")
        if args.command == "list":
            _list()
        elif args.command == "attack":
            _attack(args)
        else:
            demonstration.run(Path(args.out), args.seed)
    except (ValueError, ImportError, OSError) as error:
        print(f"gia_jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gia_jax", description=gia_jax.__doc__)
    parser.add_argument("--out", default="gia_jax_out", help="folder for results.json and the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the model's weights and of the attacks")
    commands = parser.add_subparsers(dest="command", metavar="{attack,list}")
    commands.add_parser("list", help="names of attacks, models, data and solvers")
    single = commands.add_parser(
        "attack", help="one attack on one setting", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    single.add_argument("--attack", default="inverting_gradients", help=", ".join([*ATTACKS, "cafe"]))
    single.add_argument("--model", help=f"{', '.join(models.MODELS)}; default: lenet, or one that suits the attack")
    single.add_argument("--data", help=f"{DATA}; default: photos, for cafe mnist")
    single.add_argument("--victims", type=int, default=3, help="clients attacked, in the order of the data's ids")
    single.add_argument("--batch-size", type=int, help=f"images of a client; default: 1, for cafe {BATCH_SIZE}")
    single.add_argument("--records", type=int, default=NUM_RECORDS, help="of cafe's federation")
    single.add_argument("--rounds", type=int, default=NUM_ROUNDS, help="of cafe's federation")
    single.add_argument("--steps", type=int, help="of each restart; default: the paper's")
    single.add_argument("--restarts", type=int, default=1, help="starts of each attack; the lowest loss is kept")
    single.add_argument("--labels", choices=["known", "inferred"], help="default: as in the attack's paper")
    single.add_argument("--local-steps", type=int, default=1, help="local SGD steps of the client on its whole batch")
    single.add_argument(
        "--local-learning-rate", type=float, default=1e-2, help="of the local steps, known to the attacker"
    )
    single.add_argument(
        "--defense",
        action="append",
        default=[],
        metavar="NAME[:k=v,k=v]",
        help=f"of the client; repeat it for several, in this order: {', '.join(NAMES)}",
    )
    single.add_argument("--adaptive", action="store_true", help="the attacker knows the defenses, but not their keys")
    single.add_argument("--aggregation", help=f"of the updates of --clients, run for real: {', '.join(AGGREGATIONS)}")
    single.add_argument("--clients", type=int, default=4, help="that aggregate, --batch-size images each")
    single.add_argument("--clip", type=float, default=2.0, help="largest entry of an update that aggregation keeps")
    single.add_argument(
        "--statistics",
        choices=["none", "running", "exact"],
        default="exact",
        help="of batch normalisation, that grad_inversion matches: the model's running ones, which say nothing of data "
        "before training, or the client's own, granted",
    )
    single.add_argument(
        "--generator",
        metavar="FILE",
        help="of gias, trained (models.save_decoder, benchmarks/generators.py); default: one that is untrained",
    )
    single.add_argument(
        "--latent-steps",
        type=int,
        help=f"of gias, before --steps; default: {NUM_LATENT_STEPS}, or 0 where the generator is untrained",
    )
    single.add_argument("--solver", default="paper", help=", ".join(SOLVERS))
    single.add_argument("--lanes", type=int, default=16, help="restarts under one vmap")
    single.add_argument("--no-prior-only", action="store_true", help="leave out the same attack on random updates")
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


def _checked(args: argparse.Namespace) -> tuple[Part, ...]:
    """Fills in defaults, refuses what does not go together, and reads the defenses."""
    args.data, args.batch_size = args.data or "photos", 1 if args.batch_size is None else args.batch_size
    args.model = args.model or (ATTACKS[args.attack].model if args.attack in ATTACKS else "lenet")
    for name, known in (("attack", [*ATTACKS, "cafe"]), ("model", models.MODELS), ("solver", SOLVERS)):
        if getattr(args, name) not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {getattr(args, name)!r}")
    if args.aggregation is not None and args.aggregation not in AGGREGATIONS:
        raise ValueError(f"--aggregation must be one of {', '.join(AGGREGATIONS)}, got {args.aggregation!r}")
    for name in ("victims", "batch_size", "restarts", "local_steps", "lanes", "steps", "clients"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    args.labels = args.labels or ATTACKS[args.attack].labels
    args.steps = args.steps or (
        LEVENBERG_MARQUARDT_STEPS if args.solver == "levenberg_marquardt" else ATTACKS[args.attack].num_steps
    )
    if args.attack in INVERTIBLE and args.adaptive:
        raise ValueError(f"--attack {args.attack} has no objective to adapt, got --adaptive")
    if args.model not in INVERTIBLE.get(args.attack, models.MODELS):
        fits = ", ".join(INVERTIBLE[args.attack])
        raise ValueError(f"--attack {args.attack} needs one of the models {fits}, got {args.model!r}")
    if args.attack != "grad_inversion":
        args.statistics = "none"
    if args.attack == "gias" and args.solver != "paper":
        raise ValueError(f"--attack gias needs --solver paper, got {args.solver!r}")
    own = {"records": ("cafe", NUM_RECORDS), "rounds": ("cafe", NUM_ROUNDS)}
    own |= {"generator": ("gias", None), "latent_steps": ("gias", None)}
    for name, (owner, default) in own.items():
        if args.attack != owner and getattr(args, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is for --attack {owner}, got --attack {args.attack}")
    if args.latent_steps is not None and args.latent_steps < 0:
        raise ValueError(f"--latent-steps must be at least 0, got {args.latent_steps}")
    size = args.batch_size * _num_clients(args)
    if args.attack == "r_gap" and size > 1:
        raise ValueError(f"--attack r_gap needs a batch of one image, got {size}")
    if args.attack == "idlg" and args.labels == "inferred" and size > 1:
        raise ValueError(f"--attack idlg infers the label of one image, got {size}")
    parts = tuple(part for text in args.defense for part in parse(text))
    if args.adaptive and args.solver == "levenberg_marquardt":
        raise ValueError("--solver levenberg_marquardt has an objective of its own, got --adaptive")
    if args.adaptive and not parts:
        raise ValueError("--adaptive needs a --defense that the attacker could know, got none")
    mixing = [part.name for part in parts if part.acts_on == "input"]
    if args.adaptive and mixing and args.labels == "inferred" and args.attack != "dlg":
        raise ValueError(f"--adaptive with {mixing[0]} needs --labels known: no rule finds mixed labels, got inferred")
    return parts


def _num_clients(args: argparse.Namespace) -> int:
    return 1 if args.aggregation is None else args.clients


def _attack(args: argparse.Namespace) -> None:
    if args.attack == "cafe":
        _cafe(args)
        return
    parts, clients = _checked(args), _num_clients(args)
    out = console.folder(Path(args.out))
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
    key_clients, key_attack = jax.random.split(jax.random.key(args.seed))
    generator = None
    if args.attack == "gias":
        file = None if args.generator is None else Path(args.generator)
        generator = case.generator(file, jax.random.fold_in(key_attack, 1), num_latent_steps=args.latent_steps)
        args.generator, args.latent_steps = args.generator or "untrained", generator.num_latent_steps
    protected = case.protect(parts)
    console.banner(case, args.model, protected, clients)
    if case.statistics_fn is None:
        args.statistics = "none"
    exact_statistics = args.statistics == "exact"
    if exact_statistics and args.aggregation is not None:
        raise ValueError("--statistics exact is of one client, got --aggregation")
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
    if args.aggregation is None:
        seen = see(case, {defense: protected}, key_clients, known=[known], statistics=exact_statistics)
        targets: dict[str, Any] = {"": (case, seen[known][defense])}
        said = _live(parts, case, protected)
    else:
        targets = _aggregated(args, case, protected, key_clients)
        threat += f"; {args.aggregation} of {clients} clients"
        said = []  # a case has the images of all clients in one batch
    print("\n".join([f"threat model: {threat}", *promises(parts, **case.bounds_of(parts)), *said]) + "\n")
    unused = {"out", "command", "records", "rounds"} | (set() if args.aggregation else {"clients", "clip"})
    unused |= set() if args.attack == "gias" else {"generator", "latent_steps"}
    settings = {key: value for key, value in vars(args).items() if key not in unused}
    # The parameters that the server sent tell every attacker the model, with or without a bottleneck.
    assumed = protected if args.adaptive else case.protect([part for part in parts if part.acts_on == "model"])
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
            checkpoint=out / "checkpoint.npz",
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
    print(console.table(rows, guesses))
    console.write(out, content.get("", content))
    for target, (seen_case, outcome) in found.items():
        title = f"{args.attack} on {args.model}" + (f", {defense}" if parts else "") + (f", {target}" if target else "")
        name = f"reconstructions_{target.replace(':', '_')}.png" if target else "reconstructions.png"
        console.picture(out / name, seen_case.pixels, {args.attack: outcome}, title)


def _refuse_others(args: argparse.Namespace, taken: set[str]) -> None:
    """Raises ValueError for an option of a single attack that has no meaning for this one."""
    defaults = vars(_parser().parse_args(["attack"]))
    for name, value in vars(args).items():
        if name not in taken | {"attack", "command", "out", "seed"} and value != defaults[name]:
            raise ValueError(f"--attack {args.attack} takes no --{name.replace('_', '-')}, got {value}")


def _cafe(args: argparse.Namespace) -> None:
    _refuse_others(args, {"data", "records", "rounds", "batch_size"})
    args.data, args.batch_size = args.data or "mnist", BATCH_SIZE if args.batch_size is None else args.batch_size
    options = ("data", "records", "rounds", "batch_size", "seed")
    for name in options[1:4]:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    out = console.folder(Path(args.out))
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
    gallery = data.load(args.data, split="train", limit=2_000).images if args.data not in ("photos", "digits") else None
    guesses = report.baselines(pixels, np.full_like(pixels[0], 0.5) if gallery is None else gallery)
    print(console.table([console.row("cafe", False, outcome, None)], guesses))
    settings = {"attack": "cafe"} | {name: getattr(args, name) for name in options}
    console.write(out, report.results(outcome.study, outcome.scores, settings=settings, threat_model=threat))
    first = outcome._replace(scores=report.Scores(*(field[:8] for field in outcome.scores)))
    console.picture(out / "reconstructions.png", pixels[:8], {"cafe": first}, f"cafe on {images.name}")


def _aggregated(args: argparse.Namespace, case: Case, protected: Protected, key: Any) -> dict[str, Any]:
    from gia_jax.secure_aggregation.cases import see_aggregated

    protocol = make_protocol(args.aggregation, args.clients, clip=args.clip)
    return see_aggregated(case, protected, protocol, key, known=args.labels == "known")


def _live(parts: tuple[Part, ...], case: Case, protected: Protected) -> list[str]:
    """What Soteria takes from these victims; a feature that is 0 anyway is no loss to the attacker."""
    if "soteria" not in [part.name for part in parts] or any(part.acts_on == "input" for part in parts):
        return []
    shares = live_shares(parts, protected.apply_fn, protected.params, case.truth.inputs)
    return [f"soteria prunes {shares.mean():.0%} of the features that are not 0 for the victims' images"]


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
