"""One attack on one setting of the command line."""

import argparse
import time
from pathlib import Path
from typing import Any

import jax

from gia_jax import Observation, labels, metrics, report
from gia_jax.cli import console, federation, options
from gia_jax.cli.cases import PRIOR_ONLY, Case, attack, load_case, see
from gia_jax.cli.names import ATTACKS, FIRST_LAYER, TARGETS, make_protocol
from gia_jax.defenses.protected import Part, Protected, live_shares, promises


def run(args: argparse.Namespace) -> None:
    """Runs one attack on one setting, prints the table and writes the results and pictures.

    Args:
        args: Options of the command line. Those that were not given are None, and get their defaults here.

    Raises:
        ValueError: If an option has no meaning for the attack or is out of its range.
        OSError: If the results cannot be written.
    """
    taken, began = options.taken(args), time.time()
    if args.attack == "cafe":
        federation.run(args, began)
        return
    statistics_given = args.statistics not in (None, "none")
    options.fill(args, taken)
    parts, clients = options.checked(args), options.num_clients(args)
    protocol = None if args.aggregation is None else make_protocol(args.aggregation, clients, clip=args.clip)
    names = ("",) if protocol is None else TARGETS
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
        from gia_jax.cli.aggregated import see_aggregated

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
    guesses = metrics.baselines(case.pixels, case.gallery)
    rows, found, content = [], {}, {}
    for target, (seen_case, observations) in targets.items():
        title = f"{args.attack}, {target}" if target else args.attack
        if not isinstance(observations, Observation):
            rows.append([title, "-", str(observations), *[""] * 7])
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
            extra["prior_only_explained"] = prior.explained.share.tolist()
        content[target] = report.results(
            outcome.study,
            outcome.scores,
            explained=outcome.explained,
            settings=settings,
            threat_model=threat,
            extra=extra,
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


def _live(parts: tuple[Part, ...], case: Case, protected: Protected) -> list[str]:
    """What Soteria takes from these victims; a feature that is 0 anyway is no loss to the attacker."""
    if "soteria" not in [part.name for part in parts] or any(part.acts_on == "input" for part in parts):
        return []
    shares = live_shares(parts, protected.apply_fn, protected.params, case.truth.inputs)
    return [f"soteria prunes {shares.mean():.0%} of the features that are not 0 for the victims' images"]
