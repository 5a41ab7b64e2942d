"""The names that the command line knows: attacks with their papers' defaults, solvers and rules that find labels."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from gia_jax import labels as rules
from gia_jax.attacks.dlg import NUM_STEPS as DLG_STEPS
from gia_jax.attacks.fedleak import NUM_STEPS as FEDLEAK_STEPS
from gia_jax.attacks.gias import NUM_STEPS as GIAS_STEPS
from gia_jax.attacks.glg import NUM_STEPS as GLG_STEPS
from gia_jax.attacks.grad_inversion import NUM_STEPS as GRAD_INVERSION_STEPS
from gia_jax.attacks.idlg import NUM_STEPS as IDLG_STEPS
from gia_jax.attacks.inverting_gradients import NUM_STEPS as INVERTING_GRADIENTS_STEPS
from gia_jax.attacks.magia import NUM_STEPS as MAGIA_STEPS
from gia_jax.attacks.sme import NUM_STEPS as SME_STEPS
from gia_jax.base import Attack, InitFn, LabelFn, ReconstructFn
from gia_jax.cli import recipes
from gia_jax.cli.protocols import AGGREGATIONS, TARGETS, make_protocol
from gia_jax.cli.recipes import FIRST_LAYER, TOKEN_LAYERS, Choices, Generator, Target
from gia_jax.cli.solvers import BY_GRADIENT, FIRST_ORDER, SOLVERS
from gia_jax.matching.run import keep_best
from gia_jax.threat import granted_labels

__all__ = [
    "AGGREGATIONS",
    "ATTACKS",
    "FIRST_LAYER",
    "INVERTIBLE",
    "LABEL_RULES",
    "SOLVERS",
    "TARGETS",
    "TOKEN_LAYERS",
    "Generator",
    "Target",
    "label_rule",
    "make_analytic",
    "make_attack",
    "make_protocol",
]


class LabelRule(NamedTuple):
    """What the command line says of a rule that finds labels, and how it is made.

    Attributes:
        summary: One line on the rule.
        make: Function that makes the rule for a target.
        one_example: Whether the rule finds the label of one example only.
        mixed: Whether it also finds labels that are mixed, as probabilities.
    """

    summary: str
    make: Callable[[Target], LabelFn]
    one_example: bool = False
    mixed: bool = False


LABEL_RULES = {
    "idlg": LabelRule("the one class by sign, Zhao et al. 2020", lambda t: rules.idlg(t.classifier_fn), True),
    "soft_labels": LabelRule(
        "the one label as probabilities, Wang et al. 2024", lambda t: rules.soft_labels(t.classifier_fn), True, True
    ),
    "column_minimum": LabelRule("distinct classes, Yin et al. 2021", lambda t: rules.column_minimum(t.classifier_fn)),
    "bias_counts": LabelRule(
        "counts in closed form, with the model's predictions for random inputs",
        lambda t: rules.bias_counts(t.classifier_fn, apply_fn=t.apply_fn),
    ),
    "greedy_bias": LabelRule("negative biases first, as in breaching", lambda t: rules.greedy_bias(t.classifier_fn)),
    "llg": LabelRule("LLG, Wainakh et al. 2022", lambda t: rules.llg(t.classifier_fn)),
    "llg_plus": LabelRule(
        "LLG+, with what a simulated client measures", lambda t: rules.llg_plus(t.client_fn, t.classifier_fn)
    ),
    "ilrg": LabelRule("iLRG, Ma et al. 2023: a linear system", lambda t: rules.ilrg(t.classifier_fn)),
}


class Named(NamedTuple):
    """What the command line says of an attack, and how it is built.

    Attributes:
        summary: One line on the attack.
        num_steps: Number of steps of the paper; 0 for an analytic attack.
        labels: "known" where the paper takes labels as granted, "inferred" where it finds them.
        options: Options of the command line that it takes, beside those of the setting that is attacked.
        build: Function `(target, choices)` that builds the attack, or the analytic inversion.
        rule: Key of `LABEL_RULES` for the rule that infers labels by default. "auto" takes iDLG's for one example and
            counts in closed form for more, and "" stands for an attack that finds labels without a rule.
        solvers: Keys of `SOLVERS` for the solvers that it works with.
        model: Name of the model that is attacked by default.
        models: Names of the models that an analytic attack inverts. They are none for other attacks, which take all.
        one_example: Whether the attack is on one example only.
        data: "images" or "graphs" where it is on these alone; "" for an attack on any data.
        on_host: Whether it is a search on the host, which JAX cannot trace.
        needs_range: Whether it does not work without the range of pixels.
        x64: Whether it needs float64.
    """

    summary: str
    num_steps: int
    labels: str
    options: tuple[str, ...]
    build: Callable[[Target, Choices], Attack | ReconstructFn]
    rule: str = "auto"
    solvers: tuple[str, ...] = tuple(SOLVERS)
    model: str = "lenet"
    models: tuple[str, ...] = ()
    one_example: bool = False
    data: str = ""
    on_host: bool = False
    needs_range: bool = False
    x64: bool = False


STEPWISE = ("labels", "steps", "restarts", "lanes", "adaptive")  # options of attacks that go step by step

ATTACKS = {
    "dlg": Named(
        "Deep Leakage from Gradients, Zhu et al. 2019: data and labels by L-BFGS",
        DLG_STEPS,
        "inferred",
        (*STEPWISE, "solver"),
        recipes.build_dlg,
        rule="",
    ),
    "idlg": Named(
        "iDLG, Zhao et al. 2020: label by sign, data by L-BFGS",
        IDLG_STEPS,
        "inferred",
        (*STEPWISE, "label_rule", "solver"),
        recipes.build_idlg,
        rule="idlg",
    ),
    "inverting_gradients": Named(
        "Inverting Gradients, Geiping et al. 2020: cosine, total variation, signed Adam",
        INVERTING_GRADIENTS_STEPS,
        "known",
        (*STEPWISE, "label_rule", "solver"),
        recipes.build_inverting_gradients,
    ),
    "magia": Named(
        "MAGIA, 2025: data and labels by L-BFGS, random subsets of the dummy batch",
        MAGIA_STEPS,
        "inferred",
        (*STEPWISE, "solver"),
        recipes.build_magia,
        rule="",
        solvers=BY_GRADIENT,
    ),
    "fedleak": Named(
        "FedLeak, Fan et al. 2025: the largest entries of the gradient, by a regularised search",
        FEDLEAK_STEPS,
        "known",
        (*STEPWISE, "label_rule", "solver"),
        recipes.build_fedleak,
        solvers=BY_GRADIENT,
    ),
    "grad_inversion": Named(
        "GradInversion, Yin et al. 2021: seeds that agree, feature statistics",
        GRAD_INVERSION_STEPS,
        "inferred",
        (*STEPWISE, "label_rule", "solver", "statistics"),
        recipes.build_grad_inversion,
        rule="column_minimum",
        solvers=FIRST_ORDER,
        model="resnet20_4",
        data="images",
    ),
    "gias": Named(
        "GIAS, Jeon et al. 2021: latents of a generator, then its weights for each image",
        GIAS_STEPS,
        "known",
        (*STEPWISE, "label_rule", "generator", "latent_steps"),
        recipes.build_gias,
        solvers=("paper",),
        data="images",
        needs_range=True,
    ),
    "sme": Named(
        "SME, Zhu et al. 2023: the local steps as one gradient, between the parameters before and after",
        SME_STEPS,
        "known",
        (*STEPWISE, "label_rule"),
        recipes.build_sme,
        solvers=("paper",),
        data="images",
    ),
    "glg": Named(
        "GLG, Sinha et al. 2024: features and edges of graphs by cosine, smooth and sparse",
        GLG_STEPS,
        "inferred",
        (*STEPWISE, "label_rule", "solver"),
        recipes.build_glg,
        rule="bias_counts",
        solvers=FIRST_ORDER,
        model="gcn",
        data="graphs",
    ),
    "graph_spans": Named(
        "a graph from a GCN of two layers, exactly, by spans and counting",
        0,
        "inferred",
        (),
        recipes.build_graph_spans,
        rule="",
        model="gcn",
        models=("gcn",),
        one_example=True,
        data="graphs",
        on_host=True,
        x64=True,
    ),
    # Its labels are counted from the bias: iDLG's rule needs features >= 0, and a linear model's are its inputs.
    "linear": Named(
        "analytic inversion of a fully connected first layer, Phong et al. 2018",
        0,
        "inferred",
        ("labels", "label_rule"),
        recipes.build_linear,
        rule="bias_counts",
        model="mlp",
        models=tuple(FIRST_LAYER),
    ),
    "r_gap": Named(
        "R-GAP, Zhu and Blaschko 2021: closed form, layer by layer",
        0,
        "inferred",
        (),
        recipes.build_r_gap,
        rule="",
        model="cnn6",
        models=("cnn6",),
        one_example=True,
        data="images",
        needs_range=True,
        x64=True,
    ),
    # The features of a transformer's last layer have either sign, so its labels are counted as well.
    "april": Named(
        "APRIL, Lu et al. 2022: a vision transformer's patches in closed form",
        0,
        "inferred",
        ("labels", "label_rule"),
        recipes.build_april,
        rule="bias_counts",
        model="vit_april",
        models=("vit_april",),
        one_example=True,
        data="images",
        x64=True,
    ),
}
INVERTIBLE = {name: named.models for name, named in ATTACKS.items() if named.models}  # models of the analytic attacks


def rule_of(name: str, batch_size: int, chosen: str | None = None) -> str:
    """Returns the key of `LABEL_RULES` for the rule that infers the labels, or "" where an attack needs none.

    Args:
        name: Key of `ATTACKS`.
        batch_size: Number of examples.
        chosen: Name of the rule that the user chose; None takes the attack's own.
    """
    rule = ATTACKS[name].rule if chosen is None else chosen
    return _by_size(batch_size) if rule == "auto" else rule


def _by_size(batch_size: int) -> str:
    """Returns the rule for attacks without one of their own: iDLG's for one example, counts in closed form for more."""
    return "idlg" if batch_size == 1 else "bias_counts"


def label_rule(labels: str, target: Target, rule: str | None = None) -> LabelFn:
    """Makes the function that gives an attack its labels.

    Args:
        labels: "known" for the labels that the threat model grants, or "inferred".
        target: What is attacked.
        rule: Key of `LABEL_RULES`. None takes iDLG's rule for one example, and counts in closed form for more.

    Returns:
        The function `(observation) -> labels`.

    Raises:
        ValueError: If `labels` is none of the two, or the rule is unknown.
    """
    if labels not in ("known", "inferred"):
        raise ValueError(f"labels must be known or inferred, got {labels!r}")
    if labels == "known":
        return granted_labels
    rule = _by_size(target.batch_size) if rule is None else rule
    if rule not in LABEL_RULES:
        raise ValueError(f"rule must be one of {', '.join(LABEL_RULES)}, got {rule!r}")
    return LABEL_RULES[rule].make(target)


def _label_fn(name: str, target: Target, labels: str, rule: str | None) -> LabelFn | None:
    """Returns the rule that finds the labels, or None where the attack finds them without one."""
    chosen = rule_of(name, target.batch_size, rule)
    return None if labels == "inferred" and not chosen else label_rule(labels, target, chosen or None)


def make_attack(
    name: str, target: Target, *, labels: str, solver: str, num_steps: int, rule: str | None = None
) -> Attack:
    """Makes an iterative attack by its name. It keeps its best iterate.

    Args:
        name: Key of `ATTACKS` that is not of `INVERTIBLE`.
        target: What is attacked.
        labels: "known" for granted labels, or "inferred". DLG then optimises them, and the others use a label rule.
        solver: Key of `SOLVERS`.
        num_steps: Number of steps that its schedule is made for, at least 1.
        rule: Key of `LABEL_RULES` for labels that are inferred. None takes the attack's own.

    Returns:
        The attack.

    Raises:
        ValueError: If a name is unknown, the solver is not one of the attack's, or the attack refuses the target.
    """
    iterative = [known for known in ATTACKS if known not in INVERTIBLE]
    for argument, value, known in (("name", name, iterative), ("solver", solver, SOLVERS)):
        if value not in known:
            raise ValueError(f"{argument} must be one of {', '.join(known)}, got {value!r}")
    named = ATTACKS[name]
    if solver not in named.solvers:
        raise ValueError(f"solver of the attack {name} must be {', '.join(named.solvers)}, got {solver!r}")
    label_fn = _label_fn(name, target, labels, rule)

    def build(optimizer: optax.GradientTransformation | None, init_fn: InitFn | None = None) -> Attack:
        made = named.build(target, Choices(label_fn, num_steps, optimizer, init_fn))
        assert isinstance(made, Attack)
        return made

    return keep_best(SOLVERS[solver].solve(build))


def make_analytic(name: str, target: Target, *, model: str, labels: str, rule: str | None = None) -> ReconstructFn:
    """Makes an analytic attack by its name.

    Args:
        name: Key of `INVERTIBLE`, such as "linear", on the layer that sees the example.
        target: What is attacked.
        model: Name of the model.
        labels: "known" or "inferred", as for `make_attack`; R-GAP finds its own.
        rule: Key of `LABEL_RULES` for labels that are inferred. None takes the attack's own.

    Returns:
        The attack.

    Raises:
        ValueError: If the name is unknown, or the attack cannot invert the model.
    """
    if name not in INVERTIBLE:
        raise ValueError(f"name must be one of {', '.join(INVERTIBLE)}, got {name!r}")
    if model not in INVERTIBLE[name]:
        raise ValueError(f"attack {name} needs one of the models {', '.join(INVERTIBLE[name])}, got {model!r}")
    made = ATTACKS[name].build(target, Choices(_label_fn(name, target, labels, rule), model=model))
    assert not isinstance(made, Attack)
    return made
