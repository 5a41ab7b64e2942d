"""The names that the command line knows: attacks and solvers, with each paper's defaults, and aggregation protocols."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import optax

from gia_jax import _check, labels, models
from gia_jax.attacks.dlg import NUM_STEPS as DLG_STEPS
from gia_jax.attacks.dlg import dlg
from gia_jax.attacks.gias import NUM_STEPS as GIAS_STEPS
from gia_jax.attacks.gias import GeneratorFn, gias
from gia_jax.attacks.grad_inversion import NUM_STEPS as GRAD_INVERSION_STEPS
from gia_jax.attacks.grad_inversion import grad_inversion
from gia_jax.attacks.idlg import NUM_STEPS as IDLG_STEPS
from gia_jax.attacks.idlg import idlg
from gia_jax.attacks.inverting_gradients import NUM_STEPS as INVERTING_GRADIENTS_STEPS
from gia_jax.attacks.inverting_gradients import inverting_gradients
from gia_jax.attacks.linear import linear_inversion
from gia_jax.attacks.r_gap import r_gap
from gia_jax.base import Attack, ClientFn, InitFn, LabelFn, ObjectiveFn, Observation, Params, ReconstructFn, Statistics
from gia_jax.defenses import protected
from gia_jax.labels import ClassifierFn, bias_counts, dense
from gia_jax.labels import idlg as idlg_labels
from gia_jax.matching.adaptive import supported
from gia_jax.matching.initializations import near_grey
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt
from gia_jax.matching.objectives import cosine, euclidean, layerwise_euclidean
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.matching.run import continued, keep_best
from gia_jax.models.functional import ApplyFn
from gia_jax.models.network import cnn6
from gia_jax.threat import granted_labels

if TYPE_CHECKING:
    from gia_jax.secure_aggregation import AggregationProtocol


class Generator(NamedTuple):
    """A generator and how long its latents are searched: arguments of `gias`, of these names."""

    generator_fn: GeneratorFn
    generator_params: Params
    latent_shape: tuple[int, ...]
    num_latent_steps: int


class Target(NamedTuple):
    """What an attack must know to be built; all of it is public.

    Attributes:
        client_fn: The client the attacker assumes.
        classifier_fn: Picks the last layer.
        num_classes: Number of classes of the model.
        batch_size: Number of examples of the client.
        bounds: Darkest and brightest pixel in the model's space.
        apply_fn: `(params, inputs) -> logits`, whose predictions the counting of labels measures; None for 1 / classes.
        adapt_fn: Makes from the attack's own objective that of an attacker that knows the defense.
        statistics_fn: `(params, inputs) -> ` statistics of the features; None leaves them out of the attack.
        known_statistics_fn: Reads from the observation the statistics to match; None for those the threat model grants.
        generator: A generator of such images, for GIAS.
    """

    client_fn: ClientFn
    classifier_fn: ClassifierFn
    num_classes: int
    batch_size: int
    bounds: tuple
    apply_fn: ApplyFn | None = None
    adapt_fn: Callable[[ObjectiveFn], ObjectiveFn] = lambda objective_fn: objective_fn
    statistics_fn: Callable[..., Statistics] | None = None
    known_statistics_fn: Callable[[Observation], Statistics] | None = None
    generator: Generator | None = None


class Named(NamedTuple):
    """What the command line says of an attack.

    Attributes:
        summary: One line on the attack.
        num_steps: The paper's number of steps; 0 for an analytic attack.
        labels: "known" where the attack takes labels as granted, "inferred" where it finds them.
        options: The options of the command line that it takes, beside those of the setting that is attacked.
        model: The model that is attacked by default.
        x64: Whether it needs float64.
    """

    summary: str
    num_steps: int
    labels: str
    options: tuple[str, ...]
    model: str = "lenet"
    x64: bool = False


DATA = "photos, digits, or a prepared TFDS set such as mnist, cifar10, cifar100"
CAFE = "CAFE, Jin et al. 2021: vertical federated learning of several rounds, by exact least squares"

STEPWISE = ("labels", "steps", "restarts", "lanes", "adaptive")  # options of attacks that go step by step


ATTACKS = {
    "dlg": Named(
        "Deep Leakage from Gradients, Zhu et al. 2019: data and labels by L-BFGS",
        DLG_STEPS,
        "inferred",
        (*STEPWISE, "solver"),
    ),
    "idlg": Named(
        "iDLG, Zhao et al. 2020: label by sign, data by L-BFGS", IDLG_STEPS, "inferred", (*STEPWISE, "solver")
    ),
    "inverting_gradients": Named(
        "Inverting Gradients, Geiping et al. 2020: cosine, total variation, signed Adam",
        INVERTING_GRADIENTS_STEPS,
        "known",
        (*STEPWISE, "solver"),
    ),
    "grad_inversion": Named(
        "GradInversion, Yin et al. 2021: seeds that agree, feature statistics",
        GRAD_INVERSION_STEPS,
        "inferred",
        (*STEPWISE, "solver", "statistics"),
        "resnet20_4",
    ),
    "gias": Named(
        "GIAS, Jeon et al. 2021: latents of a generator, then its weights for each image",
        GIAS_STEPS,
        "known",
        (*STEPWISE, "generator", "latent_steps"),
    ),
    "linear": Named(
        "analytic inversion of a fully connected first layer, Phong et al. 2018", 0, "inferred", ("labels",), "mlp"
    ),
    "r_gap": Named("R-GAP, Zhu and Blaschko 2021: closed form, layer by layer", 0, "inferred", (), "cnn6", x64=True),
}
FIRST_LAYER = {"linear": "head", "mlp": "dense0"}  # of the models that start fully connected
INVERTIBLE = {"linear": tuple(FIRST_LAYER), "r_gap": ("cnn6",)}  # models of the analytic attacks
SOLVERS = {
    "paper": "what the attack's paper uses",
    "adam": "Adam, 0.1 a step",
    "fixed_step_lbfgs": "L-BFGS with fixed steps of 1, as in DLG",
    "lbfgs": "L-BFGS with a zoom line search (optax)",
    "levenberg_marquardt": "1,500 fixed steps of L-BFGS from the best of 8 near-grey starts, then Levenberg-Marquardt "
    "(float64)",
}
# L-BFGS with fixed steps gets stuck from some starts, and Levenberg-Marquardt then does too. That shows in the first
# steps: after `SCREENING` steps the best start goes on alone.
WARM_UP_STARTS, SCREENING = 8, 300
WARM_UP = 1_500
LEVENBERG_MARQUARDT_STEPS = 20


def label_rule(labels: str, target: Target) -> LabelFn:
    """Granted labels for "known"; for "inferred" iDLG's rule for one example, counts in closed form for more."""
    if labels not in ("known", "inferred"):
        raise ValueError(f"labels must be known or inferred, got {labels!r}")
    if labels == "known":
        return granted_labels
    if target.batch_size == 1:
        return idlg_labels(target.classifier_fn)
    return bias_counts(target.classifier_fn, apply_fn=target.apply_fn)


def make_attack(name: str, target: Target, *, labels: str, solver: str, num_steps: int) -> Attack:
    """An iterative attack by its name, keeping its best iterate.

    Args:
        name: A key of `ATTACKS` that is not of `INVERTIBLE`.
        target: What is attacked.
        labels: "known" (granted) or "inferred" (DLG optimises them, the others use a label rule).
        solver: A key of `SOLVERS`.
        num_steps: Steps its schedule is made for.

    Returns:
        The attack.

    Raises:
        ValueError: An unknown name, and what its attack raises.
    """
    iterative = [known for known in ATTACKS if known not in INVERTIBLE]
    for argument, value, known in (("name", name, iterative), ("solver", solver, SOLVERS)):
        if value not in known:
            raise ValueError(f"{argument} must be one of {', '.join(known)}, got {value!r}")

    def build(optimizer: optax.GradientTransformation | None, init_fn: InitFn | None = None) -> Attack:
        if name == "grad_inversion":
            return grad_inversion(
                target.client_fn,
                target.classifier_fn,
                statistics_fn=target.statistics_fn,
                known_statistics_fn=target.known_statistics_fn,
                num_steps=num_steps,
                num_warm_up_steps=min(50, num_steps // 10),
                bounds=target.bounds,
                label_fn=granted_labels if labels == "known" else None,
                init_fn=init_fn,
                objective_fn=target.adapt_fn(layerwise_euclidean),
                optimizer=optimizer,
            )
        label_fn = label_rule(labels, target)
        objective_fn = target.adapt_fn(cosine if name == "inverting_gradients" else euclidean)
        if name == "inverting_gradients":
            return inverting_gradients(
                target.client_fn,
                bounds=target.bounds,
                num_steps=num_steps,
                label_fn=label_fn,
                init_fn=init_fn,
                objective_fn=objective_fn,
                optimizer=optimizer,
            )
        options: dict[str, Any] = {"init_fn": init_fn, "objective_fn": objective_fn, "optimizer": optimizer}
        if name == "dlg" and labels == "inferred":
            return dlg(target.client_fn, num_classes=target.num_classes, **options)
        # With its labels given, DLG is iDLG.
        return idlg(target.client_fn, target.classifier_fn, label_fn=label_fn, **options)

    if name == "gias":
        if solver != "paper":
            raise ValueError(f"solver of the attack gias must be paper, got {solver!r}")
        if target.generator is None:
            raise ValueError("target must have a generator for the attack gias, got None")
        return keep_best(
            gias(
                target.client_fn,
                **target.generator._asdict(),
                num_steps=num_steps,
                label_fn=label_rule(labels, target),
                objective_fn=target.adapt_fn(supported()),
            )
        )
    if name == "grad_inversion" and solver == "levenberg_marquardt":
        raise ValueError("solver levenberg_marquardt is for one seed, got the attack grad_inversion")
    if solver == "levenberg_marquardt":
        return keep_best(continued(warm_up(build), build(levenberg_marquardt()), num_steps=WARM_UP))
    optimizers: dict[str, Callable[[], optax.GradientTransformation | None]] = {
        "paper": lambda: None,
        "adam": lambda: optax.adam(0.1),
        "fixed_step_lbfgs": fixed_step_lbfgs,
        "lbfgs": lambda: optax.lbfgs(memory_size=100),
    }
    return keep_best(build(optimizers[solver]()))


def warm_up(build_fn: Callable[[optax.GradientTransformation, InitFn], Attack]) -> Attack:
    """The attack before Levenberg-Marquardt: fixed steps of L-BFGS from the best of several near-grey starts.

    Args:
        build_fn: `(optimizer, init_fn) -> attack`, a gradient-matching attack.

    Returns:
        The attack, with the starts as its warm-up.
    """
    one = build_fn(fixed_step_lbfgs(), near_grey())
    return keep_best(continued(keep_best(one), one, num_steps=SCREENING, num_starts=WARM_UP_STARTS))


def make_analytic(name: str, target: Target, *, model: str, labels: str) -> ReconstructFn:
    """An analytic attack by its name.

    Args:
        name: A key of `INVERTIBLE`: "linear", on the layer that sees the example, or "r_gap".
        target: What is attacked.
        model: Name of the model.
        labels: "known" or "inferred", as for `make_attack`; R-GAP finds its own.

    Returns:
        The attack.

    Raises:
        ValueError: An unknown name, or a model that the attack cannot invert.
    """
    if name not in INVERTIBLE:
        raise ValueError(f"name must be one of {', '.join(INVERTIBLE)}, got {name!r}")
    if model not in INVERTIBLE[name]:
        raise ValueError(f"attack {name} needs one of the models {', '.join(INVERTIBLE[name])}, got {model!r}")
    if name == "r_gap":
        return r_gap(cnn6(target.num_classes, bias=True), bounds=target.bounds)
    # Inferred labels are counted from the bias: iDLG's rule needs features >= 0, and a linear model's are its inputs.
    counted = bias_counts(target.classifier_fn, apply_fn=target.apply_fn)
    label_fn = counted if labels == "inferred" else label_rule(labels, target)
    return linear_inversion(dense(FIRST_LAYER[model]), label_fn=label_fn)


TARGETS = ("client:0", "aggregate")  # the two things that the command line attacks: one client's upload, and the sum


class Protocol(NamedTuple):
    """What the command line says of a protocol, and how it is made, with room for a quarter of the clients to drop out.

    Attributes:
        summary: One line on the protocol.
        make: The function that makes it from the package `secure_aggregation`, the number of clients, and the
            quantizer's options.
    """

    summary: str
    make: Callable[..., Any]


AGGREGATIONS = {
    "plain": Protocol("every update in the clear: the control", lambda sa, n, **options: sa.plain_sum(n, **options)),
    "secagg": Protocol(
        "pairwise masks that cancel, Bonawitz et al. 2017",
        lambda sa, n, **options: sa.secagg(n, threshold=2 * n // 3 + 1, **options),
    ),
    "lightsecagg": Protocol(
        "Lagrange-coded masks, So et al. 2022",
        lambda sa, n, **options: sa.lightsecagg(n, privacy=n // 4, survivors=n // 2 + 1, **options),
    ),
    "fastsecagg": Protocol(
        "multi-secret sharing by FFT, Kadhe et al. 2020",
        lambda sa, n, **options: sa.fastsecagg(
            sa.fft_sharing((1, n), zeros=(0, n // 4), secrets=(1, max(n // 4, 1))), **options
        ),
    ),
    "bfv": Protocol("homomorphic encryption, exact", lambda sa, n, **options: sa.homomorphic(n, "bfv", **options)),
    "ckks": Protocol(
        "homomorphic encryption, approximate", lambda sa, n, **options: sa.homomorphic(n, "ckks", **options)
    ),
}


def make_protocol(name: str, num_clients: int, *, clip: float, bits: int = 22) -> "AggregationProtocol":
    """A protocol by its name.

    Args:
        name: A key of `AGGREGATIONS`.
        num_clients: N >= 1. SecAgg needs answers of more than two thirds of them, LightSecAgg of more than half, where
            up to a quarter may collude; FastSecAgg bears that a quarter drops out and nearly half collude.
        clip: Largest magnitude of an entry.
        bits: Bits an entry.

    Returns:
        The protocol.

    Raises:
        ValueError: An unknown name, and what its protocol raises.
        ImportError: Without the extra `secure`; BFV or CKKS without the extra `he`.
    """
    if name not in AGGREGATIONS:
        raise ValueError(f"name must be one of {', '.join(AGGREGATIONS)}, got {name!r}")
    _check.integer(num_clients=num_clients)
    from gia_jax import secure_aggregation

    return AGGREGATIONS[name].make(secure_aggregation, num_clients, clip=clip, bits=bits)


def show() -> None:
    """Prints all names, with a line on each."""
    for title, names in (
        ("attacks", {name: named.summary for name, named in ATTACKS.items()} | {"cafe": CAFE}),
        ("solvers", SOLVERS),
        ("defenses", {name: f"{_settings(named)}{named.summary}" for name, named in protected.DEFENSES.items()}),
        ("aggregation", {name: named.summary for name, named in AGGREGATIONS.items()}),
        ("combinations of defenses", {name: " ".join(parts) for name, parts in protected.COMBINATIONS.items()}),
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


def _settings(named: protected.Named) -> str:
    return "".join(f"{key}={value:g} " for key, value in named.settings.items())
