"""iDLG: Zhao, Mopuri, Bilen, iDLG: Improved Deep Leakage from Gradients, 2020."""

import optax

from gia_jax.base import Attack, ClientFn, InitFn, LabelFn, ObjectiveFn
from gia_jax.labels import ClassifierFn
from gia_jax.labels import idlg as idlg_labels
from gia_jax.matching.initializations import normal
from gia_jax.matching.objectives import euclidean
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.matching.solver import gradient_matching

NUM_STEPS = 6_000  # 300 `.step`s of torch's L-BFGS, as in DLG


def idlg(
    client_fn: ClientFn,
    classifier_fn: ClassifierFn,
    *,
    label_fn: LabelFn | None = None,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = euclidean,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """The label is read from the sign of the last layer's gradient (equation 5), then DLG optimises the input alone.

    Threat model: an honest-but-curious server that knows the parameters, the update and that the batch is one example
    with a hard label. The rule needs features >= 0 in front of the last layer.

    Args:
        client_fn: The client the attacker assumes.
        classifier_fn: Picks the last layer, such as `gia_jax.labels.dense("head")`.
        label_fn: Another label rule, for batches or known labels.
        init_fn: Initialisation of the inputs. Default: standard normal.
        objective_fn: Distance of two updates. Default: the paper's; `gia_jax.matching.adaptive` has those for a
            defended client.
        optimizer: Optimiser of the inputs. Default: L-BFGS with fixed steps of 1, as in the paper.

    Returns:
        The attack; its `init` raises ValueError for more than one example under the paper's rule.
    """
    return gradient_matching(
        client_fn,
        init_fn=normal() if init_fn is None else init_fn,
        objective_fn=objective_fn,
        label_fn=idlg_labels(classifier_fn) if label_fn is None else label_fn,
        optimizer=fixed_step_lbfgs() if optimizer is None else optimizer,
    )
