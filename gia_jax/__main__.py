"""`python -m gia_jax`: a demonstration, single attacks, and a list of what there is. It only calls the library."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import gia_jax
from gia_jax import Batch, Observation, ThreatModel, clients, data, labels, models, observe, report
from gia_jax.attacks.named import ATTACKS, LEVENBERG_MARQUARDT_STEPS, SOLVERS, Target, make_attack, make_linear
from gia_jax.plots import picture_grid
from gia_jax.study import Study, study, study_analytic

DATA = "photos, digits, or a prepared TFDS set such as mnist, cifar10, cifar100"
FIRST_LAYER = {"linear": "head", "mlp": "dense0"}


class Case(NamedTuple):
    """Victims and what is public about them."""

    images: data.ImageData
    truth: Batch  # in the model's space, leading axis of victims
    pixels: np.ndarray  # the same images in [0, 1]
    gallery: np.ndarray
    params: Any
    client_fn: Any
    num_parameters: int


class Outcome(NamedTuple):
    """A study of true and of random updates, and its scores."""

    study: Study
    scores: report.Scores
    prior_only: np.ndarray | None
    threat: ThreatModel


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
    attack = commands.add_parser(
        "attack", help="one attack on one setting", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    attack.add_argument("--attack", default="inverting_gradients", help=", ".join(ATTACKS))
    attack.add_argument("--model", default="lenet", help=", ".join(models.MODELS))
    attack.add_argument("--data", default="photos", help=DATA)
    attack.add_argument("--victims", type=int, default=3, help="clients attacked, in the order of the data's ids")
    attack.add_argument("--batch-size", type=int, default=1, help="images of a client")
    attack.add_argument("--steps", type=int, help="of each restart; default: the paper's")
    attack.add_argument("--restarts", type=int, default=1, help="starts of each attack; the lowest loss is kept")
    attack.add_argument("--labels", choices=["known", "inferred"], help="default: as in the attack's paper")
    attack.add_argument("--local-steps", type=int, default=1, help="local SGD steps of the client on its whole batch")
    attack.add_argument(
        "--local-learning-rate", type=float, default=1e-2, help="of the local steps, known to the attacker"
    )
    attack.add_argument("--solver", default="paper", help=", ".join(SOLVERS))
    attack.add_argument("--lanes", type=int, default=16, help="restarts under one vmap")
    attack.add_argument("--no-prior-only", action="store_true", help="leave out the same attack on random updates")
    # The same options after the command; without a default here, those before it are kept.
    attack.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="as before the command")
    attack.add_argument("--out", default=argparse.SUPPRESS, help="as before the command")
    return parser


def _list() -> None:
    for title, names in (
        ("attacks", {name: named.summary for name, named in ATTACKS.items()}),
        ("solvers", SOLVERS),
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
    if args.attack == "linear" and args.model not in FIRST_LAYER:
        raise ValueError(
            f"--attack linear needs a model that starts fully connected, mlp or linear, got {args.model!r}"
        )
    if args.attack == "idlg" and args.labels == "inferred" and args.batch_size > 1:
        raise ValueError(f"--attack idlg infers the label of one image, got --batch-size {args.batch_size}")
    out = _folder(Path(args.out))
    jax.config.update("jax_enable_x64", exact)
    case = _case(
        args.model, args.data, args.victims, args.batch_size, args.seed, args.local_steps, args.local_learning_rate
    )
    _banner(case, args.model)
    outcome = _run(
        case,
        args.attack,
        model=args.model,
        known_labels=args.labels == "known",
        num_steps=args.steps,
        num_restarts=args.restarts,
        solver=args.solver,
        seed=args.seed,
        lanes=args.lanes,
        prior_only=not args.no_prior_only,
        checkpoint=out / "checkpoint.npz",
    )
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "command")}
    print(f"threat model: {outcome.threat.describe()}\n")
    guesses = report.baselines(case.pixels, case.gallery)
    print(_table({args.attack: outcome}, guesses))
    extra = {"baselines_psnr": {name: psnr.tolist() for name, psnr in guesses.items()}}
    if outcome.prior_only is not None:
        extra["prior_only_psnr"] = outcome.prior_only.tolist()
    content = report.results(
        outcome.study, outcome.scores, settings=settings, threat_model=outcome.threat.describe(), extra=extra
    )
    _write(out, case, content, {args.attack: outcome}, f"{args.attack} on {args.model}")


def _demonstration(out: Path, seed: int) -> None:
    out = _folder(out)
    case = _case("lenet", "photos", 3, 1, seed, 1, 1e-2)
    _banner(case, "lenet")
    print("The client sends the gradient of one photograph. What can the server see?\n")
    plan = {"dlg": (1_200, 4), "idlg": (1_200, 4), "inverting_gradients": (ATTACKS["inverting_gradients"].num_steps, 1)}
    outcomes = {}
    for name, (steps, restarts) in plan.items():
        outcomes[name] = _run(
            case,
            name,
            model="lenet",
            known_labels=ATTACKS[name].labels == "known",
            num_steps=steps,
            num_restarts=restarts,
            solver="paper",
            seed=seed,
        )
    guesses = report.baselines(case.pixels, case.gallery)
    print(_table(outcomes, guesses))
    print(
        "\nPSNR in dB after clipping to [0, 1]: above 20 a photograph is recognisable, above 40 it is a copy.\n"
        "Restarts are chosen by the attacker's own loss. 'prior only' is the same attack on a random update."
    )
    settings = {name: {"steps": steps, "restarts": restarts} for name, (steps, restarts) in plan.items()}
    content = {
        name: report.results(
            outcome.study,
            outcome.scores,
            settings={"attack": name, "model": "lenet", "data": "photos", "seed": seed, **settings[name]},
            threat_model=outcome.threat.describe(),
            extra={"prior_only_psnr": outcome.prior_only.tolist()} if outcome.prior_only is not None else {},
        )
        for name, outcome in outcomes.items()
    }
    content |= {"baselines_psnr": {name: psnr.tolist() for name, psnr in guesses.items()}}
    _write(out, case, content, outcomes, "What the server sees of three photographs")


def _case(
    model: str, name: str, victims: int, batch_size: int, seed: int, local_steps: int, learning_rate: float
) -> Case:
    count = victims * batch_size
    images = data.load(name) if name in ("photos", "digits") else data.load(name, limit=count)
    if len(images.images) < count:
        raise ValueError(f"--victims times --batch-size must be at most {len(images.images)} for {name}, got {count}")
    if name in ("photos", "digits"):
        kept = (
            ~np.isin(images.labels, images.labels[:count])
            if name == "photos"
            else np.arange(len(images.images)) >= count
        )
        gallery = images.images[kept] if kept.any() else np.full_like(images.images[:1], 0.5)
    else:
        gallery = data.load(name, split="train", limit=2_000).images
    pixels = images.images[:count].reshape(victims, batch_size, *images.images.shape[1:])
    truth = Batch(
        jnp.asarray(images.normalize(pixels.astype(jnp.result_type(float)))),
        jnp.asarray(images.labels[:count].reshape(victims, batch_size)),
    )
    shape, classes = images.images.shape[1:], len(images.class_names)
    apply_fn, params = models.functional(models.MODELS[model](shape, classes, rngs=nnx.Rngs(seed)))
    params = jax.tree.map(lambda leaf: leaf.astype(truth.inputs.dtype), params)
    loss_fn = clients.cross_entropy(apply_fn)
    if local_steps == 1:
        client_fn = clients.federated_sgd(loss_fn)
    else:
        client_fn = clients.federated_averaging(loss_fn, learning_rate=learning_rate, local_epochs=local_steps)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Case(images, truth, pixels, gallery, params, client_fn, size)


def _run(
    case: Case,
    name: str,
    *,
    model: str,
    known_labels: bool,
    num_steps: int,
    num_restarts: int,
    solver: str,
    seed: int,
    lanes: int = 16,
    prior_only: bool = True,
    checkpoint: Path | None = None,
) -> Outcome:
    threat = ThreatModel(labels=known_labels)
    key_threat, key_attack, key_random = jax.random.split(jax.random.key(seed), 3)
    victims, batch_size = case.truth.labels.shape
    classes = len(case.images.class_names)

    def of_one(key: jax.Array, batch: Batch) -> Observation:
        return observe(key, threat, case.client_fn, case.params, batch, num_classes=classes)

    observations = jax.jit(jax.vmap(of_one))(jax.random.split(key_threat, victims), case.truth)
    observations = observations._replace(params=case.params)
    if prior_only:
        noise = jax.jit(report.random_updates)(key_random, observations)
        both = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), observations._replace(params=()), noise._replace(params=())
        )
        observations = both._replace(params=case.params)
    low, high = (bound.astype(case.truth.inputs.dtype) for bound in case.images.bounds())
    target = Target(case.client_fn, labels.dense("head"), classes, batch_size, (low, high))
    rule = "known" if known_labels else "inferred"
    if name == "linear":
        reconstruct_fn = make_linear(target, layer_fn=labels.dense(FIRST_LAYER[model]), labels=rule)
        found = study_analytic(reconstruct_fn, key_attack, observations)
    else:
        attack = make_attack(name, target, labels=rule, solver=solver, num_steps=num_steps)
        found = study(
            attack,
            key_attack,
            observations,
            num_steps=num_steps,
            num_restarts=num_restarts,
            lanes=lanes,
            progress_fn=_progress(name),
            checkpoint=checkpoint,
        )
    truth = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), case.truth) if prior_only else case.truth
    scores = report.score(found.reconstruction.batch, truth, case.images)
    first = jax.tree.map(lambda leaf: leaf[:victims], found.reconstruction)
    kept = found._replace(reconstruction=first, losses=found.losses[:victims])
    own = report.Scores(*(field[:victims] for field in scores))
    return Outcome(kept, own, scores.psnr[victims:] if prior_only else None, threat)


def _table(outcomes: dict[str, Outcome], guesses: dict[str, np.ndarray]) -> str:
    rows = []
    for name, outcome in outcomes.items():
        psnr, timing = outcome.scores.psnr, outcome.study.timing
        rows.append(
            [
                name,
                "known" if outcome.threat.labels else "inferred",
                _list_of(psnr),
                f"{np.median(psnr):.1f}",
                f"{np.median(outcome.scores.ssim):.2f}",
                f"{np.mean(outcome.scores.label_correct):.0%}",
                "-" if outcome.prior_only is None else f"{np.median(outcome.prior_only):.1f}",
                f"{timing.compile_seconds:.0f}",
                f"{timing.run_seconds:.0f}",
            ]
        )
    rows += [[name, "", _list_of(psnr), f"{np.median(psnr):.1f}", "", "", "", "", ""] for name, psnr in guesses.items()]
    header = ["attack or guess", "labels", "PSNR", "median", "SSIM", "labels right", "prior only", "compile s", "run s"]
    return report.table(header, rows)


def _list_of(psnr: np.ndarray) -> str:
    values = psnr.reshape(-1)
    return " ".join(f"{value:.1f}" for value in values[:4]) + (" ..." if len(values) > 4 else "")


def _write(out: Path, case: Case, content: Any, outcomes: dict[str, Outcome], title: str) -> None:
    (out / "results.json").write_text(report.to_json(content))
    flat = case.pixels.reshape(-1, *case.pixels.shape[2:])
    columns, captions = {"original": flat}, {}
    for name, outcome in outcomes.items():
        columns[name] = outcome.scores.images.reshape(flat.shape)
        captions[name] = [f"{psnr:.1f} dB" for psnr in outcome.scores.psnr.reshape(-1)]
    picture_grid(columns, out / "reconstructions.png", captions=captions, title=title)
    print(f"\nwrote {out / 'results.json'} and {out / 'reconstructions.png'}")


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out must be a folder that can be written, got {str(out)!r}: {error.strerror}") from None
    return out


def _banner(case: Case, model: str) -> None:
    victims, batch_size = case.truth.labels.shape
    shape = "x".join(str(n) for n in case.pixels.shape[2:])
    print(
        f"gia_jax {gia_jax.__version__}: {model}, untrained, {case.num_parameters:,} parameters; "
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
