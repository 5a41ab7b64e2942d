"""The types that all parts of the library share, such as batches, observations and attacks: trees of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Shaped

Params = PyTree[Array]
"""Parameters of a model: a tree of arrays of any structure."""

Updates = PyTree[Array]
"""What a client returns: a tree of the shapes of its parameters, with the sign and scale of a gradient."""

Scalar = float | Float[Array, ""]
"""A number, such as a weight or a rate. It may be traced, so that one compiled program serves many values."""

Statistics = list[tuple[Float[Array, "_"], Float[Array, "_"]]]
"""Mean and biased variance, each of shape (features,), of the inputs of every call of a batch-normalisation layer."""


class Batch(NamedTuple):
    """Training examples, b of them, with their labels.

    Attributes:
        inputs: Inputs as the model sees them, which is after normalisation, shape (b, *d), or any tree of arrays whose
            first axis is that of the b examples, such as {"numbers": (b, n), "codes": (b, m)}.
        labels: Class indices, shape (b,), or class probabilities, shape (b, c). A client with another loss may take
            any tree of arrays whose first axis has length b.

    Examples:
        Two images of 4x4 grey pixels, of the classes 3 and 7:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch
        >>> batch = Batch(inputs=jnp.zeros((2, 4, 4, 1)), labels=jnp.array([3, 7]))
        >>> batch.inputs.shape, batch.labels.shape
        ((2, 4, 4, 1), (2,))
    """

    inputs: PyTree[Shaped[Array, "b ..."]]
    labels: PyTree[Shaped[Array, "b ..."]]


class Observation(NamedTuple):
    """All that an attack receives: the parameters, the client's update, and what else the adversary knows.

    `gia_jax.observe` makes it from a simulated client, `gia_jax.observed` from a recorded update, and
    `gia_jax.secure_aggregation.observe` from what a protocol lets the server see.

    Attributes:
        params: Parameters that the server sent.
        update: What the client returned, a tree like `params`. It has the sign and scale of a gradient: a difference of
            parameters is turned into such a pseudo-gradient before it gets here. A client of t rounds returns the
            updates of all rounds, and every leaf then has a leading axis of length t.
        extra: What the threat model grants besides, by name. Each entry is there only where it is granted:

            * "inputs_like" is an array of zeros of the shape (b, *d) of the batch, or a tree of them where the inputs
              are one: it tells the number of examples and their shape;
            * "labels" are the labels of the batch, shuffled unless the threat model grants their order;
            * "statistics" are the batch-normalisation statistics of the client's own forward pass;
            * "draws" is the random key that the client drew from, such as for its dropout masks;
            * "inputs" is a dict of the parts of the inputs that are known, such as the "mask" of graphs;
            * "batch_indices", shape (t, b), tells which examples each of t rounds used, as positions in "inputs_like".

    Examples:
        The server knows an update and that it comes from one example of three numbers:

        >>> import jax.numpy as jnp
        >>> from gia_jax import observed
        >>> params, update = {"kernel": jnp.array([1.0, 1.0, 1.0])}, {"kernel": jnp.array([0.5, -1.0, 2.0])}
        >>> observation = observed(params, update, inputs_like=jnp.zeros((1, 3)))
        >>> sorted(observation.extra), observation.update["kernel"].tolist()
        (['inputs_like'], [0.5, -1.0, 2.0])
    """

    params: Params
    update: Updates
    extra: Any = {}  # noqa: RUF012, never changed


class AttackInfo(NamedTuple):
    """What one step of an attack reports: three scalars, measured at the candidate that the step started from.

    `gia_jax.run` and `gia_jax.advance` return them for all steps, so that each field has shape (num_steps,).

    Attributes:
        loss: Loss that the attack minimises, which is the objective plus the priors.
        match: Objective alone, the distance between the simulated and the observed update.
        grad_norm: L2 norm of the gradient of `loss` with respect to the unknowns.

    Examples:
        The prior's part of the loss is what is left without the objective:

        >>> import jax.numpy as jnp
        >>> from gia_jax import AttackInfo
        >>> info = AttackInfo(loss=jnp.array(1.5), match=jnp.array(1.0), grad_norm=jnp.array(0.2))
        >>> float(info.loss - info.match)
        0.5
    """

    loss: Float[Array, ""]
    match: Float[Array, ""]
    grad_norm: Float[Array, ""]


class Reconstruction(NamedTuple):
    """What an attack believes the client's data to be.

    Attributes:
        batch: Reconstructed inputs and labels.
        loss: Loss of `batch` as the attacker can compute it, without the true data. Lower is better, and the best of
            several restarts is chosen by it.
        is_finite: Whether the loss and every value of `batch` are finite. It is False where an attack diverged, which
            raises no exception.
        restart_losses: Loss of each of r restarts, shape (r,). It is the empty tuple for a single run.
        client: What the attack found of the client beside its data, such as a learning rate. It is the empty tuple
            where nothing of the client was searched for.
        path: Batches that the attack would have returned after fewer steps, a `Batch` whose leaves have a leading axis
            of points. It is the empty tuple without `gia_jax.keep_path`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Reconstruction
        >>> batch = Batch(jnp.array([[0.5, -1.0]]), jnp.array([0]))
        >>> reconstruction = Reconstruction(batch, loss=jnp.array(0.1), is_finite=jnp.array(True))
        >>> reconstruction.batch.inputs.tolist(), reconstruction.restart_losses
        ([[0.5, -1.0]], ())
    """

    batch: Batch
    loss: Float[Array, ""]
    is_finite: Bool[Array, ""]
    restart_losses: Any = ()
    client: Any = ()
    path: Any = ()


@runtime_checkable
class ClientFn(Protocol):
    """A client: a function from the server's parameters and the client's own data to an update.

    The functions of `gia_jax.clients` build such clients, and any pure function of this form is one.

    Examples:
        The gradient of a linear model's mean output is the mean of the inputs:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ClientFn
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(batch.inputs @ params["kernel"])
        >>> client_fn = jax.jit(jax.grad(loss_fn))
        >>> batch = Batch(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([0, 1]))
        >>> client_fn({"kernel": jnp.array([0.0, 0.0])}, batch)["kernel"].tolist(), isinstance(client_fn, ClientFn)
        ([2.0, 3.0], True)
    """

    def __call__(self, params: Params, batch: Batch, /) -> Updates:
        """Computes the update of the client.

        Args:
            params: Parameters that the server sent.
            batch: The client's examples.

        Returns:
            The update, a tree of the structure and shapes of `params`, with the sign and scale of a gradient.
        """
        ...


LossFn = Callable[[Params, Batch], Float[Array, ""]]
"""Function `(params, batch) -> loss`: what a client minimises, a scalar."""

ObjectiveFn = Callable[[Updates, Updates], Float[Array, ""]]
"""Function `(simulated, observed) -> distance`: how far a simulated update is from the observed one, a scalar."""

PriorFn = Callable[[Batch, Observation], Float[Array, ""]]
"""Function `(batch, observation) -> penalty`: how unlikely a candidate is before the update is looked at, a scalar."""

LabelFn = Callable[[Observation], Array]
"""Function `(observation) -> labels`: how an attacker finds the labels, indices (b,) or probabilities (b, c)."""

InitFn = Callable[[PRNGKeyArray, Observation], PyTree[Array]]
"""Function `(key, observation) -> unknowns`: what an attack starts from, a tree of arrays."""

DecodeFn = Callable[[PyTree[Array], Any], Batch]
"""Function `(unknowns, labels) -> batch`: the batch as the model sees it, differentiable in the unknowns."""

ProjectFn = Callable[[PyTree[Array]], PyTree[Array]]
"""Function `unknowns -> unknowns`: the nearest unknowns that are possible."""

ReconstructFn = Callable[[PRNGKeyArray, Observation], Reconstruction]
"""Function `(key, observation) -> reconstruction`: a whole attack, from start to end."""


class AttackState(NamedTuple):
    """The state of an iterative attack between two steps.

    Attributes:
        candidate: Current candidate, such as the dummy inputs and labels. `Attack.finalize` turns it into a
            reconstruction, so it is all that has to be stored of a good step.
        memory: What only the next step needs, such as the state of the optimizer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import AttackState
        >>> state = AttackState(candidate=jnp.array([[0.5, -1.0]]), memory=())
        >>> state._replace(candidate=state.candidate + 1).candidate.tolist()
        [[1.5, 0.0]]
    """

    candidate: Any
    memory: Any


class Attack(NamedTuple):
    """An iterative attack, given by three pure functions that `gia_jax.run` calls.

    `gia_jax.gradient_matching` builds attacks from their parts, and `gia_jax.attacks` holds those of published papers.

    Attributes:
        init: Function `(key, observation) -> state` that returns the first state, an `AttackState`.
        step: Function `(key, state, observation) -> (state, info)` that does one step and reports an `AttackInfo`.
        finalize: Function `(candidate, observation) -> reconstruction` that turns a candidate into a `Reconstruction`
            and evaluates its loss.
        warm_up: Another attack that runs inside `init`, or None. A driver may run it step by step in place of `init`,
            to show progress and to survive an interruption. `gia_jax.matching.run.warmed_up` sets it.
        num_steps: Number of steps that a schedule inside `step` is made for, such as that of the learning rate, or None
            where any number will do. Drivers take it from here and refuse another one.

    Examples:
        An attack on a client whose update is its input. Each step halves the distance to the observed update:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Attack, AttackInfo, AttackState, Batch, Observation, Reconstruction, run
        >>> def init(key, observation):
        ...     return AttackState(candidate=jnp.zeros(2), memory=())
        >>> def step(key, state, observation):
        ...     error = state.candidate - observation.update
        ...     loss = error @ error
        ...     return AttackState(state.candidate - error / 2, ()), AttackInfo(loss, loss, 2 * jnp.sqrt(loss))
        >>> def finalize(candidate, observation):
        ...     error = candidate - observation.update
        ...     return Reconstruction(Batch(candidate[None], jnp.array([0])), error @ error, jnp.array(True))
        >>> observation = Observation(params=jnp.array([1.0, 1.0]), update=jnp.array([4.0, -8.0]))
        >>> attack_fn = jax.jit(lambda key: run(Attack(init, step, finalize), key, observation, num_steps=2))
        >>> reconstruction, info = attack_fn(jax.random.key(0))
        >>> reconstruction.batch.inputs.tolist(), info.loss.tolist()
        ([[3.0, -6.0]], [80.0, 20.0])
    """

    init: Callable[[PRNGKeyArray, Observation], AttackState]
    step: Callable[[PRNGKeyArray, AttackState, Observation], tuple[AttackState, AttackInfo]]
    finalize: Callable[[Any, Observation], Reconstruction]
    warm_up: "WarmUp | None" = None
    num_steps: int | None = None


class WarmUp(NamedTuple):
    """An attack that runs before another one starts.

    The `init` of the second attack splits its key in three: the first part is for the `init` of `attack`, the second
    for its steps, and the third for `hand_over`.

    Attributes:
        attack: Attack that runs first.
        num_steps: Number of its steps, at least 0.
        hand_over: Function `(key, state, observation) -> state` that turns the last state of `attack` into the first
            state of the second attack.
    """

    attack: Attack
    num_steps: int
    hand_over: Callable[[PRNGKeyArray, AttackState, Observation], AttackState]
