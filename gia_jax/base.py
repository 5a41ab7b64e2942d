"""The nouns: what data, observations, attacks and reconstructions are. Everything is a pytree of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Shaped

Params = PyTree[Array]
Updates = PyTree[Array]
# For every call of a batch-normalisation layer: mean and biased variance of its inputs, each of shape (features,).
Statistics = list[tuple[Float[Array, "_"], Float[Array, "_"]]]


class Batch(NamedTuple):
    """Training examples.

    Attributes:
        inputs: Inputs in the model's own (normalised) space, shape (b, *d), or any tree of arrays whose first axis is
            that of the b examples, such as {"numbers": (b, n), "codes": (b, m)}.
        labels: Class indices, shape (b,), or class probabilities, shape (b, c). For a client with a loss of its own,
            any tree of arrays whose first axis is that of the examples.
    """

    inputs: PyTree[Shaped[Array, "b ..."]]
    labels: PyTree[Shaped[Array, "b ..."]]


class Observation(NamedTuple):
    """All that an attack receives.

    `gia_jax.observe` makes it of a simulated client, `gia_jax.observed` of an update on record, and
    `gia_jax.secure_aggregation.observe` of what a protocol lets the server see; nothing else does.

    Attributes:
        params: The parameters the server sent.
        update: What the client returned, with the sign and scale of a gradient (a pseudo-gradient), always. A client of
            several rounds returns them stacked: a leading axis t in every leaf.
        extra: What else the threat model grants, by name:

            * "inputs_like": zeros like the batch's inputs, of shape (b, *d), or a tree where these are one: the shape
              of an example and the size of the batch;
            * "labels": the batch's labels, shuffled unless the threat model grants their order;
            * "statistics": the batch-normalisation statistics of the client's own forward pass;
            * "draws": the key of the client's own random draws;
            * "batch_indices": the records that each round used, shape (t, b), places in "inputs_like".
    """

    params: Params
    update: Updates
    extra: Any = {}  # noqa: RUF012, never changed


class AttackInfo(NamedTuple):
    """Scalars of one step, all measured before the step moved; `lax.scan` stacks them.

    Attributes:
        loss: The objective with its priors.
        match: The objective alone.
        grad_norm: L2 norm of the loss's gradient.
    """

    loss: Float[Array, ""]
    match: Float[Array, ""]
    grad_norm: Float[Array, ""]


class Reconstruction(NamedTuple):
    """What an attack believes the client's data to be.

    Attributes:
        batch: The reconstructed inputs and labels.
        loss: The attacker's own score of `batch`, lower is better; restarts are chosen by it.
        is_finite: Whether the loss and every value of `batch` is finite. A failure is a value, not an exception.
        restart_losses: The score of every restart, shape (r,); () before any choice was made.
    """

    batch: Batch
    loss: Float[Array, ""]
    is_finite: Bool[Array, ""]
    restart_losses: Any = ()


@runtime_checkable
class ClientFn(Protocol):
    """What a client computes from the server's parameters and its own data: a pseudo-gradient."""

    def __call__(self, params: Params, batch: Batch, /) -> Updates:
        """`(params, batch) -> update`, a tree like `params`."""
        ...


LossFn = Callable[[Params, Batch], Float[Array, ""]]
ObjectiveFn = Callable[[Updates, Updates], Float[Array, ""]]
PriorFn = Callable[[Batch, Observation], Float[Array, ""]]
LabelFn = Callable[[Observation], Array]
InitFn = Callable[[PRNGKeyArray, Observation], PyTree[Array]]
ReconstructFn = Callable[[PRNGKeyArray, Observation], Reconstruction]


class AttackState(NamedTuple):
    """The state of an iterative attack.

    Attributes:
        candidate: What `finalize` reads; all that a wrapper needs to keep of a good iterate.
        memory: What only the next step needs, such as the optimizer's state.
    """

    candidate: Any
    memory: Any


class Attack(NamedTuple):
    """An iterative attack, as three pure functions. `gia_jax.run` drives it.

    Attributes:
        init: `(key, observation) -> state`.
        step: `(key, state, observation) -> (state, info)`; one update of the dummy data.
        finalize: `(candidate, observation) -> reconstruction`; it evaluates the loss of the candidate.
        warm_up: The attack that runs inside `init`, where there is one: a driver may run it step by step in place of
            `init`, to show progress and to survive an interruption. Made by `gia_jax.matching.run.warmed_up`.
    """

    init: Callable[[PRNGKeyArray, Observation], AttackState]
    step: Callable[[PRNGKeyArray, AttackState, Observation], tuple[AttackState, AttackInfo]]
    finalize: Callable[[Any, Observation], Reconstruction]
    warm_up: "WarmUp | None" = None


class WarmUp(NamedTuple):
    """What an attack does before its own steps.

    `init` splits its key in three: for the `init` of `attack`, for its steps, and for `hand_over`.

    Attributes:
        attack: The attack that runs first.
        num_steps: Number of its steps, at least 0.
        hand_over: `(key, state, observation) -> state`; turns the last state of `attack` into the first one of
            the attack that is warmed up.
    """

    attack: Attack
    num_steps: int
    hand_over: Callable[[PRNGKeyArray, AttackState, Observation], AttackState]
