"""iDLG, which reads the label first: Zhao, Mopuri, Bilen, iDLG: Improved Deep Leakage from Gradients, 2020."""

import optax

from gia_jax.base import Attack, Batch, ClientFn, DecodeFn, InitFn, LabelFn, ObjectiveFn, PriorFn, ProjectFn
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
    decode_fn: DecodeFn = Batch,
    project_fn: ProjectFn | None = None,
    prior_fn: PriorFn | None = None,
    objective_fn: ObjectiveFn = euclidean,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Builds the iDLG attack, which reads the label from the last layer's gradient and optimises the input as DLG does.

    With features of at least 0 only the label's column of that gradient is negative (equation 5).

    Threat model: an honest-but-curious server that knows the parameters and the update, and that the batch is one
    example with a hard label. The rule needs features of at least 0 in front of the last layer.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes.
        classifier_fn: Function `(update) -> Dense` that picks the last layer, such as `gia_jax.labels.dense("head")`.
        label_fn: Function `(observation) -> labels` that replaces the paper's label rule, for batches or known labels.
        init_fn: Function `(key, observation) -> inputs` that draws the first dummy inputs. By default they are standard
            normal.
        decode_fn: Function `(z, labels) -> Batch` that makes the dummy batch from the unknowns of `init_fn`. By default
            they are the inputs. For data of another kind pass all of a modality: `idlg(..., **modality.matching())`.
        project_fn: Function `z -> z` that is applied to these unknowns after every step. None, as in the paper, leaves
            them as they are.
        prior_fn: Prior `(batch, observation) -> ` scalar that is added to the distance. None, as in the paper, adds
            nothing.
        objective_fn: Function `(simulated, observed) -> distance` that compares two updates. By default it is the
            paper's squared L2 distance. `gia_jax.matching.adaptive` has functions for a defended client.
        optimizer: Optimiser of the inputs. By default it is L-BFGS with fixed steps of 1, as in the paper.

    Returns:
        The attack. Under the paper's rule its `init` raises ValueError for more than one example.

    Examples:
        The label is exact before the first step:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, labels, observe, run
        >>> def apply_fn(params, inputs):
        ...     return inputs.reshape(len(inputs), -1) @ params["head"]["kernel"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> batch = Batch(jnp.ones((1, 2, 2, 1)), jnp.array([2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(), client_fn, {"head": {"kernel": jnp.eye(4, 3)}}, batch)
        >>> attack = attacks.idlg(client_fn, labels.dense("head"))
        >>> solve = jax.jit(lambda key: run(attack, key, seen, num_steps=1)[0])
        >>> solve(jax.random.key(1)).batch.labels.tolist()
        [2]
    """
    return gradient_matching(
        client_fn,
        init_fn=normal() if init_fn is None else init_fn,
        objective_fn=objective_fn,
        label_fn=idlg_labels(classifier_fn) if label_fn is None else label_fn,
        decode_fn=decode_fn,
        project_fn=project_fn,
        prior_fn=prior_fn,
        optimizer=fixed_step_lbfgs() if optimizer is None else optimizer,
    )
