"""DLG, the joint search for inputs and labels: Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, Batch, ClientFn, DecodeFn, InitFn, ObjectiveFn, Observation, PriorFn, ProjectFn
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
    decode_fn: DecodeFn = Batch,
    project_fn: ProjectFn | None = None,
    prior_fn: PriorFn | None = None,
    objective_fn: ObjectiveFn = euclidean,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Builds the DLG attack, which optimises dummy inputs and dummy labels together until their gradient is the
    observed one:

        x*, y* = argmin || d loss(x, softmax(y)) / d theta - update ||^2       (equation 4)

    Threat model: an honest-but-curious server that knows the parameters, the update and the shape of the batch. Labels
    are unknown. The network must be twice differentiable (the paper replaces ReLU by sigmoid). L-BFGS without a line
    search gets stuck or diverges from some of its starts: use `restarts` and `keep_best`.

    Departures: for batches the paper updates one example in each iteration, to break the permutation symmetry of the
    batch. Here all examples are updated at once. `run` counts inner iterations of L-BFGS, of which the paper's 300
    steps are up to 6,000.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes. Its loss must accept class
            probabilities as labels.
        num_classes: Number of classes c of the model, at least 2.
        init_fn: Function `(key, observation) -> inputs` that draws the first dummy inputs. By default they are standard
            normal, as in the paper.
        decode_fn: Function `(z, labels) -> Batch` that makes the dummy batch from the unknowns of `init_fn`. By default
            they are the inputs. For data of another kind pass all of a modality: `dlg(..., **modality.matching())`.
        project_fn: Function `z -> z` that is applied to these unknowns after every step. None, as in the paper, leaves
            them as they are.
        prior_fn: Prior `(batch, observation) -> ` scalar that is added to the distance. None, as in the paper, adds
            nothing.
        objective_fn: Function `(simulated, observed) -> distance` that compares two updates. By default it is the
            paper's squared L2 distance. `gia_jax.matching.adaptive` has functions for a defended client.
        optimizer: Optimiser of inputs and labels. By default it is L-BFGS with fixed steps of 1, as in the paper.

    Returns:
        The attack. Its labels are probabilities of shape (b, c).

    Raises:
        ValueError: If `num_classes` is not an integer of at least 2.

    Examples:
        The labels are among the unknowns, so they come out as probabilities:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, observe, run
        >>> def apply_fn(params, inputs):
        ...     return inputs.reshape(len(inputs), -1) @ params["kernel"] + params["bias"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> params = {"kernel": jnp.eye(4, 3), "bias": jnp.zeros(3)}
        >>> batch = Batch(jnp.ones((2, 2, 2, 1)), jnp.array([0, 2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> attack = attacks.dlg(client_fn, num_classes=3)
        >>> solve = jax.jit(lambda key: run(attack, key, seen, num_steps=2)[0])
        >>> found = solve(jax.random.key(1))
        >>> found.batch.inputs.shape, found.batch.labels.shape
        ((2, 2, 2, 1), (2, 3))
    """
    _check.integer(2, num_classes=num_classes)
    inputs_fn = normal() if init_fn is None else init_fn

    def init_pair(key: PRNGKeyArray, observation: Observation) -> Batch:
        key_inputs, key_labels = jax.random.split(key)
        inputs = inputs_fn(key_inputs, observation)
        size, dtype = _check.examples(inputs, name="inputs"), jnp.result_type(*jax.tree.leaves(inputs))
        _check.fits(size * num_classes, num_classes=num_classes)
        return Batch(inputs, jax.random.normal(key_labels, (size, num_classes), dtype))

    def decode(pair: Batch, labels: tuple[()]) -> Batch:
        del labels
        return decode_fn(pair.inputs, jax.nn.softmax(pair.labels))

    def project(pair: Batch) -> Batch:
        assert project_fn is not None
        return pair._replace(inputs=project_fn(pair.inputs))

    return gradient_matching(
        client_fn,
        init_fn=init_pair,
        objective_fn=objective_fn,
        label_fn=None,
        decode_fn=decode,
        project_fn=None if project_fn is None else project,
        prior_fn=prior_fn,
        optimizer=fixed_step_lbfgs() if optimizer is None else optimizer,
    )
