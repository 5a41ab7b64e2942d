"""The cosine attack with total variation: Geiping, Bauermeister, Droege, Moeller, Inverting Gradients, NeurIPS 2020."""

import optax
from jax.typing import ArrayLike
from jaxtyping import Float

from gia_jax.attacks.images import images_or_other
from gia_jax.base import Attack, ClientFn, DecodeFn, InitFn, LabelFn, ObjectiveFn, PriorFn, ProjectFn, Scalar
from gia_jax.matching.initializations import normal
from gia_jax.matching.objectives import cosine, cosine_residuals
from gia_jax.matching.optimizers import step_schedule
from gia_jax.matching.solver import gradient_matching
from gia_jax.threat import granted_labels

NUM_STEPS = 4_800  # the default of the authors' library; their command line runs 24,000


def inverting_gradients(
    client_fn: ClientFn,
    *,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]] | None = None,
    num_steps: int = NUM_STEPS,
    total_variation_weight: Scalar | None = None,
    label_fn: LabelFn = granted_labels,
    init_fn: InitFn | None = None,
    decode_fn: DecodeFn | None = None,
    project_fn: ProjectFn | None = None,
    prior_fn: PriorFn | None = None,
    objective_fn: ObjectiveFn = cosine,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Builds the Inverting Gradients attack, which finds images with the direction of the observed gradient and little
    total variation:

        x* = argmin over x in the pixel box of  1 - cos(d loss(x, y) / d theta, update) + alpha TV(x)       (equation 4)

    The optimiser is Adam on the signs of the gradient. Its rate is 0.1, and ten times lower after each of 3/8, 5/8 and
    7/8 of the steps.

    Threat model: an honest-but-curious server that knows the parameters, the update and the shape of the batch. The
    paper treats labels as known. They can also be read from the gradient first: pass a rule of `gia_jax.labels`.

    Departures: alpha is 1e-2, the best of 1e-1, 1e-2, 1e-3 and 1e-4 for LeNet on 32 training images of CIFAR-10 (in
    benchmarks/results). The default of the authors' library is 1e-1, that of their command line 1e-4. The optional
    median filter is left out.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes.
        bounds: Darkest and brightest value of a pixel in the model's space, as two numbers or two arrays with one value
            for each channel. They are ((0 - mean) / std, (1 - mean) / std) for pixels in [0, 1] from which a mean of
            your own is subtracted before they are divided by your std. They are needed for images, and have no meaning
            with a `decode_fn`.
        num_steps: Number of steps that the learning rate's schedule is made for, at least 1. `run` takes it from
            the attack. It has no meaning with an `optimizer` of one's own.
        total_variation_weight: Weight alpha of the total variation in the loss, at least 0 and finite. None takes 1e-2.
            The best one depends on the network, and the next power of ten can cost decibels: on LeNet 1e-3 is 3.5 dB
            worse than 1e-2. For a network of your own compare 1e-3, 1e-2 and 1e-1 on clients that you simulate. Only
            images have a total variation, so it has no meaning with a `decode_fn`.
        label_fn: Function `(observation) -> labels` that the attacker uses to find the labels. By default it takes
            those that the threat model grants.
        init_fn: Function `(key, observation) -> images` that draws the first dummy images. By default their pixels are
            standard normal.
        decode_fn: Function `(z, labels) -> Batch` for data that are no images: it makes the dummy batch from the
            unknowns of `init_fn`. Pass all of a modality: `inverting_gradients(client_fn, **modality.matching())`.
        project_fn: Function `z -> z` that is applied to the unknowns of a `decode_fn` after every step, in place of
            `bounds`. None leaves them as they are.
        prior_fn: Prior `(batch, observation) -> ` scalar of the data of a `decode_fn`, in place of the total variation.
            None has none.
        objective_fn: Function `(simulated, observed) -> distance` that compares two updates. By default it is the
            paper's cosine distance. `gia_jax.matching.adaptive` has functions for a defended client.
        optimizer: Optimiser that replaces the paper's.

    Returns:
        The attack.

    Raises:
        ValueError: If the bounds are in the wrong order, `total_variation_weight` is negative or not finite,
            `num_steps` is not a positive integer, or arguments for images and for other data are mixed: exactly one of
            `bounds` and `decode_fn` must be given.

    Examples:
        Every step ends inside of the pixel box:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, observe, run
        >>> def apply_fn(params, inputs):
        ...     return inputs.reshape(len(inputs), -1) @ params["kernel"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> batch = Batch(jnp.full((1, 2, 2, 1), 0.5), jnp.array([2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, {"kernel": jnp.eye(4, 3)}, batch)
        >>> attack = attacks.inverting_gradients(client_fn, bounds=(0.0, 1.0), num_steps=3)
        >>> solve = jax.jit(lambda key: run(attack, key, seen, num_steps=3)[0])
        >>> found = solve(jax.random.key(1))
        >>> bool(jnp.all((found.batch.inputs >= 0) & (found.batch.inputs <= 1)))
        True
    """
    parts = images_or_other(
        bounds=bounds,
        total_variation_weight=total_variation_weight,
        default_weight=1e-2,
        decode_fn=decode_fn,
        project_fn=project_fn,
        prior_fn=prior_fn,
    )
    paper = optax.chain(optax.scale_by_sign(), optax.adam(step_schedule(0.1, num_steps)))
    attack = gradient_matching(
        client_fn,
        init_fn=normal() if init_fn is None else init_fn,
        objective_fn=objective_fn,
        label_fn=label_fn,
        **parts,
        optimizer=paper if optimizer is None else optimizer,
        residual_fn=cosine_residuals,
    )
    return attack._replace(num_steps=num_steps if optimizer is None else None)
