"""DLG: Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019."""

import jax
import optax
from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, Batch, ClientFn, InitFn, ObjectiveFn, Observation
from gia_jax.matching.initializations import normal
from gia_jax.matching.objectives import euclidean
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.matching.solver import gradient_matching

NUM_STEPS = 6_000  # the paper's 300 `.step`s of torch's L-BFGS, of up to 20 inner iterations each


def dlg(
    client_fn: ClientFn,
    *,
    num_classes: int,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = euclidean,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Dummy inputs and dummy labels are optimised together until their gradient is the observed one:

        x*, y* = argmin || d loss(x, softmax(y)) / d theta - update ||^2       (equation 4)

    Threat model: an honest-but-curious server that knows the parameters, the update and the shape of the batch; labels
    are unknown. The network must be twice differentiable (the paper replaces ReLU by sigmoid). L-BFGS without a line
    search sticks or diverges from a part of its starts: use `restarts` and `keep_best`.

    Departures: for batches the paper updates one example an iteration, against the permutation symmetry of the batch;
    here all are updated at once. `num_steps` counts inner iterations of L-BFGS, the paper's 300 steps are up to 6,000.

    Args:
        client_fn: The client the attacker assumes; its loss takes class probabilities.
        num_classes: Number of classes c of the model, >= 2.
        init_fn: Initialisation of the inputs. Default: standard normal, as in the paper.
        objective_fn: Distance of two updates. Default: the paper's; `gia_jax.matching.adaptive` has those for a
            defended client.
        optimizer: Optimiser of inputs and labels. Default: L-BFGS with fixed steps of 1, as in the paper.

    Returns:
        The attack. Its labels are probabilities (b, c).

    Raises:
        ValueError: If `num_classes` is no integer of at least 2.
    """
    _check.integer(2, num_classes=num_classes)
    inputs_fn = normal() if init_fn is None else init_fn

    def init_pair(key: PRNGKeyArray, observation: Observation) -> Batch:
        key_inputs, key_labels = jax.random.split(key)
        inputs = inputs_fn(key_inputs, observation)
        _check.fits(inputs.shape[0] * num_classes, num_classes=num_classes)
        return Batch(inputs, jax.random.normal(key_labels, (inputs.shape[0], num_classes), inputs.dtype))

    def decode(pair: Batch, labels: tuple[()]) -> Batch:
        del labels
        return Batch(pair.inputs, jax.nn.softmax(pair.labels))

    return gradient_matching(
        client_fn,
        init_fn=init_pair,
        objective_fn=objective_fn,
        label_fn=None,
        decode_fn=decode,
        optimizer=fixed_step_lbfgs() if optimizer is None else optimizer,
    )
