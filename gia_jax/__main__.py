"""`python -m gia_jax`: a demonstration, single attacks, and a list of what there is. It only calls the library."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gia_jax
from gia_jax import ThreatModel, labels, models, report
from gia_jax.attacks.named import ATTACKS, LEVENBERG_MARQUARDT_STEPS, SOLVERS
from gia_jax.cases import FIRST_LAYER, PRIOR_ONLY, Case, Outcome, attack, load_case, see
from gia_jax.plots import picture_grid
from gia_jax.protection import COMBINATIONS, DEFENSES, Named, Protected, parse

DATA = "photos, digits, or a prepared TFDS set such as mnist, cifar10, cifar100"
# What the demonstration defends with: strengths of the literature, the noise and the clipping in proportion to LeNet.
SHOWN = (
    "none",
    "prune:ratio=0.9",
    "gaussian:scale=0.01",
    "dpsgd:noise_multiplier=0.01,norm=1",
    "mixup:k=4",
    "instahide:k=4",
)


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
            _demonstration(Path(args.out), args.seed)
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
    single.add_argument("--attack", default="inverting_gradients", help=", ".join(ATTACKS))
    single.add_argument("--model", default="lenet", help=", ".join(models.MODELS))
    single.add_argument("--data", default="photos", help=DATA)
    single.add_argument("--victims", type=int, default=3, help="clients attacked, in the order of the data's ids")
    single.add_argument("--batch-size", type=int, default=1, help="images of a client")
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
        help=f"of the client; repeat it for several, in this order: {', '.join([*DEFENSES, *COMBINATIONS])}",
    )
    single.add_argument("--adaptive", action="store_true", help="the attacker knows the defenses, but not their keys")
    single.add_argument("--solver", default="paper", help=", ".join(SOLVERS))
    single.add_argument("--lanes", type=int, default=16, help="restarts under one vmap")
    single.add_argument("--no-prior-only", action="store_true", help="leave out the same attack on random updates")
    # The same options after the command; without a default here, those before it are kept.
    single.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="as before the command")
    single.add_argument("--out", default=argparse.SUPPRESS, help="as before the command")
    return parser


def _list() -> None:
    for title, names in (
        ("attacks", {name: named.summary for name, named in ATTACKS.items()}),
        ("solvers", SOLVERS),
        ("defenses", {name: f"{_settings(named)}{named.summary}" for name, named in DEFENSES.items()}),
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


def _attack(args: argparse.Namespace) -> None:
    for name, known in (("attack", ATTACKS), ("model", models.MODELS), ("solver", SOLVERS)):
        if getattr(args, name) not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {getattr(args, name)!r}")
    for name in ("victims", "batch_size", "restarts", "local_steps", "lanes", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    exact = args.solver == "levenberg_marquardt"
    args.labels = args.labels or ATTACKS[args.attack].labels
    args.steps = args.steps or (LEVENBERG_MARQUARDT_STEPS if exact else ATTACKS[args.attack].num_steps)
    if args.attack == "linear" and args.adaptive:
        raise ValueError("--attack linear has no objective to adapt, got --adaptive")
    if args.attack == "linear" and args.model not in FIRST_LAYER:
        raise ValueError(
            f"--attack linear needs a model that starts fully connected, mlp or linear, got {args.model!r}"
        )
    if args.attack == "idlg" and args.labels == "inferred" and args.batch_size > 1:
        raise ValueError(f"--attack idlg infers the label of one image, got --batch-size {args.batch_size}")
    parts = tuple(part for text in args.defense for part in parse(text))
    if args.adaptive and not parts:
        raise ValueError("--adaptive needs a --defense that the attacker could know, got none")
    out = _folder(Path(args.out))
    jax.config.update("jax_enable_x64", exact)
    case = load_case(
        args.model,
        args.data,
        victims=args.victims,
        batch_size=args.batch_size,
        seed=args.seed,
        local_steps=args.local_steps,
        learning_rate=args.local_learning_rate,
    )
    key_clients, key_attack = jax.random.split(jax.random.key(args.seed))
    protected = case.protect(parts)
    _banner(case, args.model, protected)
    known = args.labels == "known"
    defense = " ".join(str(part) for part in parts) or "none"
    outcomes = attack(
        case,
        see(case, {defense: protected}, key_clients, known=[known])[known],
        protected,
        args.attack,
        key_attack,
        model=args.model,
        known_labels=known,
        adaptive=args.adaptive,
        solver=args.solver,
        num_steps=args.steps,
        num_restarts=args.restarts,
        lanes=args.lanes,
        prior_only=None if args.no_prior_only else defense,
        progress_fn=_progress(args.attack),
        checkpoint=out / "checkpoint.npz",
    )
    outcome, prior = outcomes[defense], outcomes.get(PRIOR_ONLY)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "command")}
    threat = _threat(known, defense, args.adaptive)
    print(f"threat model: {threat}\n")
    guesses = report.baselines(case.pixels, case.gallery)
    print(_table([_row(args.attack, known, outcome, prior)], guesses))
    extra = {"baselines_psnr": {name: psnr.tolist() for name, psnr in guesses.items()}}
    if prior is not None:
        extra["prior_only_psnr"] = prior.scores.psnr.tolist()
    content = report.results(outcome.study, outcome.scores, settings=settings, threat_model=threat, extra=extra)
    title = f"{args.attack} on {args.model}" + (f", {defense}" if parts else "")
    _write(out, content)
    _picture(out / "reconstructions.png", case, {args.attack: outcome}, title)


def _threat(known: bool, defense: str, adaptive: bool) -> str:
    card = ThreatModel(labels=known).describe()
    if defense == "none":
        return card
    return f"{card}; {'knows' if adaptive else 'does not know'} the defense {defense}"


def _demonstration(out: Path, seed: int) -> None:
    out = _folder(out)
    case = load_case("lenet", "photos", victims=3, seed=seed)
    protected = {name: case.protect(() if name == "none" else parse(name)) for name in SHOWN}
    _banner(case, "lenet", protected["none"])
    print("The client sends the gradient of one photograph. What can the server see?\n")
    # name: steps, restarts
    plan = {"dlg": (1_200, 1), "idlg": (1_200, 3), "inverting_gradients": (1_600, 1)}
    key_clients, key_attack = jax.random.split(jax.random.key(seed))
    seen = see(case, protected, key_clients, known=(False, True))
    found = {}
    for name, (steps, restarts) in plan.items():
        known = ATTACKS[name].labels == "known"
        found[name] = attack(
            case,
            seen[known],
            protected["none"],
            name,
            key_attack,
            model="lenet",
            known_labels=known,
            num_steps=steps,
            num_restarts=restarts,
            prior_only="none",
            progress_fn=_progress(name),
        )
    guesses = report.baselines(case.pixels, case.gallery)
    rows = [
        _row(name, ATTACKS[name].labels == "known", outcomes["none"], outcomes[PRIOR_ONLY])
        for name, outcomes in found.items()
    ]
    print(_table(rows, guesses))
    print(
        "\nPSNR in dB after clipping to [0, 1]: above 20 a photograph is recognisable, above 40 it is a copy.\n"
        "Restarts are chosen by the attacker's own loss. 'prior only' is the same attack on a random update.\n"
        "Seconds are for all the defenses below together.\n\n"
        "The same attacks, which know of no defense, when the client defends itself; median PSNR in dB:\n"
    )
    medians = [[name, *(f"{np.median(o[shown].scores.psnr):.1f}" for shown in SHOWN)] for name, o in found.items()]
    print(report.table(["attack", *SHOWN], medians))
    print(
        "\nAn attacker that knows the defense may do better:\n"
        "python -m gia_jax attack --defense prune:ratio=0.9 --adaptive"
    )
    content: dict[str, Any] = {}
    for name, outcomes in found.items():
        known, (steps, restarts) = ATTACKS[name].labels == "known", plan[name]
        setting = {"attack": name, "model": "lenet", "data": "photos", "seed": seed, "steps": steps}
        for shown in SHOWN:
            content[name if shown == "none" else f"{name}, {shown}"] = report.results(
                outcomes[shown].study,
                outcomes[shown].scores,
                settings=setting | {"restarts": restarts, "defense": shown},
                threat_model=_threat(known, shown, False),
                extra={"prior_only_psnr": outcomes[PRIOR_ONLY].scores.psnr.tolist()},
            )
    content["baselines_psnr"] = {name: psnr.tolist() for name, psnr in guesses.items()}
    _write(out, content)
    undefended = {name: outcomes["none"] for name, outcomes in found.items()}
    _picture(out / "reconstructions.png", case, undefended, "What the server sees of three photographs")
    for name in ("idlg", "inverting_gradients"):
        defended = {shown.replace(":", "\n"): found[name][shown] for shown in SHOWN}
        _picture(out / f"defenses_{name}.png", case, defended, f"{name}, when the client defends itself")


def _row(name: str, known: bool, outcome: Outcome, prior: Outcome | None) -> list[str]:
    scores, timing = outcome.scores, outcome.study.timing
    return [
        name,
        "known" if known else "inferred",
        _list_of(scores.psnr),
        f"{np.median(scores.psnr):.1f}",
        f"{np.median(scores.ssim):.2f}",
        f"{np.mean(scores.label_correct):.0%}",
        "-" if prior is None else f"{np.median(prior.scores.psnr):.1f}",
        f"{timing.compile_seconds:.0f}",
        f"{timing.run_seconds:.0f}",
    ]


def _table(rows: list[list[str]], guesses: dict[str, np.ndarray]) -> str:
    rows += [[name, "", _list_of(psnr), f"{np.median(psnr):.1f}", "", "", "", "", ""] for name, psnr in guesses.items()]
    header = ["attack or guess", "labels", "PSNR", "median", "SSIM", "labels right", "prior only", "compile s", "run s"]
    return report.table(header, rows)


def _list_of(psnr: np.ndarray) -> str:
    values = psnr.reshape(-1)
    return " ".join(f"{value:.1f}" for value in values[:4]) + (" ..." if len(values) > 4 else "")


def _write(out: Path, content: Any) -> None:
    (out / "results.json").write_text(report.to_json(content))
    print(f"\nwrote {out / 'results.json'}")


def _picture(path: Path, case: Case, outcomes: dict[str, Outcome], title: str) -> None:
    flat = case.pixels.reshape(-1, *case.pixels.shape[2:])
    columns, captions = {"original": flat}, {}
    for name, outcome in outcomes.items():
        columns[name] = outcome.scores.images.reshape(flat.shape)
        captions[name] = [f"{psnr:.1f} dB" for psnr in outcome.scores.psnr.reshape(-1)]
    picture_grid(columns, path, captions=captions, title=title)
    print(f"wrote {path}")


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out must be a folder that can be written, got {str(out)!r}: {error.strerror}") from None
    return out


def _banner(case: Case, model: str, protected: Protected) -> None:
    victims, batch_size = case.truth.labels.shape
    shape = "x".join(str(n) for n in case.pixels.shape[2:])
    size = sum(leaf.size for leaf in jax.tree.leaves(protected.params))
    print(
        f"gia_jax {gia_jax.__version__}: {model}, untrained, {size:,} parameters; "
        f"{victims} clients with {batch_size} of {case.images.name} ({shape}) each; {report.hardware()}"
    )


def _progress(name: str):
    shown = {"percent": -1, "began": time.perf_counter()}

    def progress_fn(done: int, total: int, seconds: float) -> None:
        percent = 100 * done // total
        if percent == shown["percent"] or (not sys.stderr.isatty() and percent // 25 == shown["percent"] // 25):
            return
        shown["percent"] = percent
        line = f"{name}: {percent:3d} % of the steps, {seconds:.0f} s"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    return progress_fn


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
