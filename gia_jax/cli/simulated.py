"""Simulated clients of the command line: what the server sees of them, and an attack on that."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from gia_jax import labels
from gia_jax._compile import RUN_ONCE
from gia_jax.base import Batch, Observation
from gia_jax.cli import console, options
from gia_jax.cli.cases import Case, load_case
from gia_jax.cli.names import FIRST_LAYER, TOKEN_LAYERS, Generator, make_protocol
from gia_jax.cli.outcomes import Outcome, attack_target, with_scores
from gia_jax.cli.settings import Known, Setting, Victims
from gia_jax.defenses.protected import Part, Protected, live_shares, promises
from gia_jax.threat import ThreatModel, observe


def observe_simulated(args: argparse.Namespace, parts: tuple[Part, ...], *, statistics_given: bool) -> Setting:
    """Lets simulated clients work on their data, and prints a line on them.

    Args:
        args: Options of the command line. Those that depend on the model get their last values here.
        parts: Defenses of the clients.
        statistics_given: Whether the user asked for statistics of batch normalisation.

    Returns:
        The setting.

    Raises:
        ValueError: If an option does not fit the data or the model.
    """
    clients = options.num_clients(args)
    protocol = None if args.aggregation is None else make_protocol(args.aggregation, clients, clip=args.clip)
    case = load_case(
        args.model,
        args.data,
        victims=args.victims,
        batch_size=args.batch_size * clients,
        seed=args.seed,
        local_steps=args.local_steps,
        learning_rate=args.local_learning_rate,
        image_size=args.image_size,
    )
    key_clients, key_attack, key_generator = jax.random.split(jax.random.key(args.seed), 3)
    generator = _generator(args, case, key_generator)
    protected = case.protect(parts)
    console.banner(case, args.model, protected, clients)
    if case.statistics_fn is None:
        if statistics_given:
            given = f"--statistics {args.statistics}"
            raise ValueError(f"{given} needs a model with batch normalisation, got --model {args.model}")
        args.statistics = "none"
    known, exact = args.labels == "known", args.statistics == "exact"
    if protocol is None:
        seen = see(case, {"": protected}, key_clients, known=[known], statistics=exact)[known][""]
        targets: dict[str, tuple[Case, Any]] = {"": (case, seen)}
        live = _live(parts, case, protected)
    else:
        from gia_jax.cli.aggregated import see_aggregated

        targets = see_aggregated(case, protected, protocol, key_clients, known=known)
        live = []  # a case has the examples of all clients in one batch
    # The parameters that the server sent tell every attacker the model, with or without a bottleneck.
    plain = case.protect([part for part in parts if part.acts_on == "model"])
    assumed = protected if args.adaptive else plain

    def victims(own: Case, observations: Any) -> Victims:
        target = own.target(assumed, adaptive=args.adaptive, statistics=args.statistics, generator=generator)
        return Victims(observations, target, own.truth)

    first_layer = FIRST_LAYER.get(args.model)
    first_layer_fn = None if first_layer is None else labels.dense(first_layer)
    head, token_layers_fn = labels.dense("head"), TOKEN_LAYERS.get(args.model)
    granted = ThreatModel(labels=known, statistics=exact, inputs=case.data.grants)
    threat = console.threat(granted, parts, args, modelled=protected.modelled)
    return Setting(
        defense=console.words(parts),
        threat=threat + ("" if protocol is None else f"; {args.aggregation} of {clients} clients"),
        notes=[*promises(parts, **case.bounds_of(parts)), *live],
        targets={name: victims(*target) for name, target in targets.items()},
        modality=case.modality,
        guesses=case.modality.guess_fn(case.truth, case.data.public),
        known=Known(plain.assumed_fn, plain.apply_fn, head, first_layer_fn, case.module, token_layers_fn),
        key=key_attack,
    )


def _generator(args: argparse.Namespace, case: Case, key: PRNGKeyArray) -> Generator | None:
    """Returns the generator of GIAS, and names it in the options; None for another attack."""
    if args.attack != "gias":
        return None
    file = None if args.generator is None else Path(args.generator)
    made = case.generator(file, key, num_latent_steps=args.latent_steps)
    args.generator, args.latent_steps = args.generator or "untrained", made.num_latent_steps
    return made


def _live(parts: tuple[Part, ...], case: Case, protected: Protected) -> list[str]:
    """Returns what Soteria takes from these victims; a feature that is 0 anyway is no loss to the attacker."""
    if "soteria" not in [part.name for part in parts] or any(part.acts_on == "input" for part in parts):
        return []
    shares = live_shares(parts, protected.apply_fn, protected.params, case.truth.inputs)
    return [f"soteria prunes {shares.mean():.0%} of the features that are not 0 for the victims' examples"]


def see(
    case: Case,
    protected: Mapping[str, Protected],
    key: PRNGKeyArray,
    *,
    known: Sequence[bool],
    statistics: bool = False,
) -> Any:
    """Lets every victim work behind every defense, and keeps what the server sees with and without its labels.

    Args:
        case: Victims with their data.
        protected: Clients by a name. They share one set of parameters.
        key: Random key of the clients, each of which draws its own, and of the threat model.
        known: Whether labels are granted: one or both of False and True.
        statistics: Whether the feature statistics of the client's batch are granted.

    Returns:
        Observations with a leading axis of victims, by the values of `known` and then by name. With more than one
        client, which one program then attacks, labels are probabilities, so that those of mixed images are like the
        others.

    Raises:
        ValueError: If statistics are to be granted, and the model has no batch normalisation.
    """
    params, measure = next(iter(protected.values())).params, case.statistics_fn
    if statistics and measure is None:
        raise ValueError("statistics need a model with batch normalisation, got one without")
    soft = case.num_classes if len(protected) > 1 else None

    def of_one(key: PRNGKeyArray, batch: Batch) -> Any:
        seen: dict[bool, dict[str, Observation]] = {granted: {} for granted in known}
        for name, one in protected.items():
            key, key_encode, key_client, key_threat = jax.random.split(key, 4)
            # The gradient once, for all that the threat models grant.
            sharing = one._replace(params=params)
            encoding, update = sharing.share(key_encode, key_client, batch, case.others, soft_classes=soft)
            for granted in known:
                observation = observe(
                    key_threat,
                    ThreatModel(labels=granted, statistics=statistics, inputs=case.data.grants),
                    lambda *_, u=update: u,
                    params,
                    encoding,
                    num_classes=case.num_classes,
                    statistics=measure(params, encoding.inputs) if statistics and measure is not None else None,
                )
                seen[granted][name] = observation._replace(params=())
        return seen

    victims = len(case.truth.labels)
    seen = jax.jit(jax.vmap(of_one), compiler_options=RUN_ONCE)(jax.random.split(key, victims), case.truth)
    return {granted: {name: o._replace(params=params) for name, o in group.items()} for granted, group in seen.items()}


def attack(
    case: Case,
    observations: Mapping[str, Observation],
    assumed: Protected,
    name: str,
    key: PRNGKeyArray,
    *,
    adaptive: bool = False,
    statistics: str = "none",
    generator: Generator | None = None,
    **settings: Any,
) -> dict[str, Outcome]:
    """Runs one attack, as one program, on all observations and on random updates, and scores it.

    Args:
        case: Victims with their data.
        observations: Observations by name, as `see` makes them.
        assumed: Client that the attacker assumes. For an attacker that does not know the defenses it has those of the
            model alone, which the parameters that the server sent tell.
        name: Key of `ATTACKS`.
        key: Random key of the attacker.
        adaptive: Whether it compares updates as one that knows the defenses of `assumed`.
        statistics: Statistics of the features that GradInversion matches: "none", the model's "running" ones, or the
            "exact" ones that were granted.
        generator: Generator of GIAS, from `Case.generator`.
        settings: The other arguments of `attack_target`, such as its labels, steps and restarts.

    Returns:
        Outcomes by the names of the observations, and of the random updates by "prior only".
    """
    target = case.target(assumed, adaptive=adaptive, statistics=statistics, generator=generator)
    found = attack_target(target, observations, name, key, **settings)
    return with_scores(found, case.truth, case.modality)
