"""A client of which the attacker does not know everything, and searches for the rest along with the data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, InitFn, Observation, Params, ProjectFn, Updates
from gia_jax.precision import wide_dtype


class UnknownClient(NamedTuple):
    """A client with unknowns of its own, such as its learning rate. `gradient_matching` searches for them and the data.

    It is given to an attack in place of a client. `with_unknown` makes one, and `attacks.sme` makes its own.

    Attributes:
        assumed_fn: Client that is simulated where nothing is searched for, such as by a label rule.
        init_fn: Function `(key, observation) -> unknowns` that returns the first unknowns of the client.
        client_fn: Function `(unknowns, observation) -> client`, differentiable in the unknowns.
        report_fn: Function `unknowns -> values` that returns what is reported as `Reconstruction.client`.
        project_fn: Function `unknowns -> unknowns` that is applied after every step. None leaves them as they are.
        penalty_fn: Function `unknowns -> penalty`, a scalar that is added to the loss. None adds nothing.
    """

    assumed_fn: ClientFn
    init_fn: InitFn
    client_fn: Callable[[PyTree[Array], Observation], ClientFn]
    report_fn: Callable[[PyTree[Array]], Any]
    project_fn: ProjectFn | None = None
    penalty_fn: Callable[[PyTree[Array]], Float[Array, ""]] | None = None

    def __call__(self, params: Params, batch: Batch, /) -> Updates:
        """Computes the update of the client that is assumed where nothing is searched for."""
        return self.assumed_fn(params, batch)


def with_unknown(
    client_of_fn: Callable[[Any], ClientFn], *, guess: PyTree[float | Float[Array, "..."]]
) -> UnknownClient:
    """Builds a client with unknown positive numbers, such as a learning rate, that an attack finds along with the data.

    The unknown is u in value = guess * exp(u). It starts at 0, and the attack's optimizer moves it as it moves the
    data: a step of 0.1 is one of 10 %. What was found is `Reconstruction.client`.

    A pseudo-gradient is the change of the parameters divided by the number of local steps and the learning rate. A
    server that does not know these divides the change by a number of its own. Give that number as the `divisor` of
    `federated_averaging`, so that the simulated change is divided by the same one. Where the objective does not depend
    on the scale, as the cosine distance, only the curvature of the local steps tells the learning rate. The number of
    steps has no derivative: attack with each of a few, and let `matching.best_of` choose.

    Args:
        client_of_fn: Function `value -> client` that builds the client, for a value that is traced.
        guess: First value, above 0 and finite: a number, an array, or a tree of them.

    Returns:
        The client, for the `client_fn` of an attack that `gradient_matching` builds.

    Raises:
        ValueError: If `guess` is not positive and finite, or holds no number.

    Examples:
        Each of two steps halves the distance to the input. The server knows the input's bounds, but no rate:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, attacks, box, clients, gradient_matching, observed, run
        >>> loss_fn = lambda params, batch: 0.5 * jnp.mean(jnp.square(params - batch.inputs))
        >>> def client_of_fn(rate):
        ...     return clients.federated_averaging(loss_fn, learning_rate=rate, local_epochs=2, divisor=1.0)
        >>> change = client_of_fn(0.5)(jnp.array(0.0), Batch(jnp.ones((1, 1)), jnp.array([0])))
        >>> seen = observed(jnp.array(0.0), change, inputs_like=jnp.ones((1, 1)), labels=jnp.array([0]))
        >>> client_fn = clients.with_unknown(client_of_fn, guess=0.3)
        >>> attack = gradient_matching(client_fn, project_fn=box(0.999, 1.001))
        >>> found, _ = jax.jit(lambda key: run(attack, key, seen, num_steps=200))(jax.random.key(0))
        >>> print(f"{found.client:.2f}")
        0.50
    """
    _check.functions(client_of_fn=client_of_fn)
    _check.arrays("guess", guess)
    _check.positive(guess=guess)
    _check.finite("guess", guess)

    def value_of(unknowns: PyTree[Array]) -> Any:
        return jax.tree.map(lambda first, u: first * jnp.exp(u), guess, unknowns)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> PyTree[Array]:
        del key
        dtype = wide_dtype(jnp.result_type(*jax.tree.leaves(observation.update)))
        return jax.tree.map(lambda first: jnp.zeros(jnp.shape(first), dtype), guess)

    return UnknownClient(
        client_of_fn(guess), init_fn, lambda unknowns, _: client_of_fn(value_of(unknowns)), report_fn=value_of
    )
