"""MAGIA, the batch's gradient matched by random subsets of the dummy batch as well.

MAGIA: Sensing Per-Image Signals from Single-Round Averaged Gradients for Label-Inference-Free Gradient Inversion, 2025
(arXiv 2509.18170).
"""

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.attacks.dlg import dlg
from gia_jax.attacks.images import images_or_other
from gia_jax.base import (
    Attack,
    AttackInfo,
    AttackState,
    Batch,
    ClientFn,
    DecodeFn,
    InitFn,
    LabelFn,
    ObjectiveFn,
    Observation,
    Params,
    PriorFn,
    ProjectFn,
    Scalar,
    Updates,
)
from gia_jax.clients.unknown import UnknownClient
from gia_jax.matching.objectives import euclidean
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.matching.solver import gradient_matching

NUM_STEPS = 6_000  # the authors' 300 `.step`s of torch's L-BFGS, of up to 20 inner iterations each


def magia(
    client_fn: ClientFn,
    *,
    num_classes: int,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]] | None = None,
    subset_size: int = 2,
    subset_weight: Scalar = 1e-6,
    total_variation_weight: Scalar | None = None,
    label_fn: LabelFn | None = None,
    init_fn: InitFn | None = None,
    decode_fn: DecodeFn | None = None,
    project_fn: ProjectFn | None = None,
    prior_fn: PriorFn | None = None,
    objective_fn: ObjectiveFn = euclidean,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Builds the MAGIA attack, which optimises dummy images and labels together, as DLG does, and in every step also
    compares the gradient of a random subset T of s of the b dummy examples with that of the client's whole batch:

        x*, y* = argmin  (1 - w) D(g(x, y), update) + w D(g(x_T, y_T), update) + lambda TV(x)

    Here g is the client's mean gradient, which holds the combinatorial rescaling. An example is in C(b - 1, s - 1) of
    the C(b, s) subsets. So C(b, s) / C(b - 1, s - 1) = b / s times the sum over a random subset is the sum over the
    batch in expectation, and the expectation of g(x_T) is g(x). With D the squared distance, that of the subset's term
    is

        E_T |g(x_T) - update|^2 = |g(x) - update|^2 + (b - s) / (s (b - 1)) * mean over i of |g(x_i) - g(x)|^2

    It bounds the whole batch's distance from above, the tighter the larger s is, and equals it at s = b. The gap is a
    penalty on dummy examples whose gradients differ from their mean. It does not vanish at the client's own batch,
    which is why the weight w is small.

    Threat model: an honest-but-curious server that knows the parameters, the update and the shape of the batch. Labels
    are unknown, and no rule infers them. The network must be twice differentiable.

    Departures: of the paper only the abstract and the authors' code were at hand, and these equations are the code's.
    The code multiplies both distances by a rescaling that is not published with it, which only changes the weight of
    the total variation; here it is 1. It divides the subset's mean gradient by s and the update by b once more, for
    which the expectation above does not hold; here both are means. It takes w = 1e-3 of the mean of squares in each
    layer, and here squares add up, so that w is 1e-6, for layers of a thousand entries or more. At 1e-3 subsets that
    change from step to step disturb L-BFGS: it did not leave its start for any of 4 batches of 4 images, and with 1e-5
    it did. What the abstract calls a mixing by momentum is a fixed weight in the code, as it is here. The code's weight
    of the total variation is 5e-3; 5e-6 is the best of 5e-3, 5e-4, 5e-5 and 5e-6 for LeNet on 8 training images of
    CIFAR-10. Of the schedules of s only constants are here, because the number of examples is part of the compiled
    program: `continued` puts attacks of different `subset_size` one after the other. Dummy images start standard
    normal, without the code's cut at 0, and stay in the pixel box. `run` counts inner iterations of L-BFGS, of which
    the authors' 300 steps are up to 6,000.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes, of a mean loss that accepts
            class probabilities as labels. It is also run on batches of `subset_size`.
        num_classes: Number of classes c of the model, at least 2. It is not used with a `label_fn`.
        bounds: Darkest and brightest value of a pixel in the model's space, as two numbers or two arrays with one value
            for each channel. They are needed for images, and have no meaning with a `decode_fn`.
        subset_size: Number s of examples of a subset, at least 1. A batch of at most as many has no smaller subset, and
            the attack is then that on the whole batch. The authors' code takes 2 by default.
        subset_weight: Weight w of the subset's distance, in [0, 1].
        total_variation_weight: Weight lambda of the total variation, at least 0 and finite. None takes 5e-6. It
            has no meaning with a `decode_fn`.
        label_fn: Function `(observation) -> labels` that finds the labels, for an attacker that knows them or reads
            them first. None, as in the paper, optimises them with the images.
        init_fn: Function `(key, observation) -> inputs` that draws the first dummy inputs. By default they are standard
            normal.
        decode_fn: Function `(z, labels) -> Batch` for data that are no images: it makes the dummy batch from the
            unknowns of `init_fn`. Pass all of a modality: `magia(client_fn, num_classes=c, **modality.matching())`.
        project_fn: Function `z -> z` that is applied to the unknowns of a `decode_fn` after every step, in place of
            `bounds`. None leaves them as they are.
        prior_fn: Prior `(batch, observation) -> ` scalar of the data of a `decode_fn`, in place of the total variation.
            None has none.
        objective_fn: Function D `(simulated, observed) -> distance` that compares two updates. By default it is the
            squared L2 distance.
        optimizer: Optimiser of inputs and labels. By default it is L-BFGS with fixed steps of 1. One with a line search
            does not fit, because what it evaluates is the whole batch's loss.

    Returns:
        The attack. Labels that it optimises are probabilities of shape (b, c). All losses that it reports are those of
        the whole batch, whatever subsets were drawn, so that `keep_best` and `restarts` compare like with like.

    Raises:
        ValueError: If `num_classes` or `subset_size` is no integer in its range, `subset_weight` is not in [0, 1], the
            bounds are in the wrong order, a weight is negative or not finite, or arguments for images and for other
            data are mixed: exactly one of `bounds` and `decode_fn` must be given.

    Examples:
        Three images, of which one at a time is compared with the mean gradient of all:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, observe, run
        >>> def apply_fn(params, inputs):
        ...     return inputs.reshape(len(inputs), -1) @ params["kernel"] + params["bias"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> params = {"kernel": jnp.eye(4, 3), "bias": jnp.zeros(3)}
        >>> batch = Batch(jnp.eye(3, 4).reshape(3, 2, 2, 1), jnp.array([0, 2, 1]))
        >>> seen = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> attack = attacks.magia(client_fn, num_classes=3, bounds=(0.0, 1.0), subset_size=1)
        >>> solve = jax.jit(lambda key: run(attack, key, seen, num_steps=2)[0])
        >>> found = solve(jax.random.key(1))
        >>> found.batch.inputs.shape, found.batch.labels.shape
        ((3, 2, 2, 1), (3, 3))
    """
    _check.integer(subset_size=subset_size)
    _check.share(subset_weight=subset_weight)
    parts = images_or_other(
        bounds=bounds,
        total_variation_weight=total_variation_weight,
        default_weight=5e-6,
        decode_fn=decode_fn,
        project_fn=project_fn,
        prior_fn=prior_fn,
    )

    def mixed_fn(pair: tuple[Updates, Updates], observed: Updates) -> Float[Array, ""]:
        whole, subset = (objective_fn(simulated, observed) for simulated in pair)
        mixed = (1 - subset_weight) * whole + subset_weight * subset
        return mixed + jax.lax.stop_gradient(whole - mixed)  # its value is that of the whole batch, its gradient is not

    def matching(client_fn: ClientFn, objective_fn: ObjectiveFn) -> Attack:
        own = {"init_fn": init_fn, "objective_fn": objective_fn, "optimizer": optimizer or fixed_step_lbfgs()}
        if label_fn is None:
            return dlg(client_fn, num_classes=num_classes, **parts, **own)
        return gradient_matching(client_fn, label_fn=label_fn, **parts, **own)

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        key_subset, key_step = jax.random.split(key)
        return matching(_with_subset(client_fn, subset_size, key_subset), mixed_fn).step(key_step, state, observation)

    return matching(client_fn, objective_fn)._replace(step=step)


def _with_subset(client_fn: ClientFn, size: int, key: PRNGKeyArray) -> ClientFn:
    """Returns the client that also answers for a random subset of its batch: a pair of updates."""
    if isinstance(client_fn, UnknownClient):
        of_fn = client_fn.client_fn
        return client_fn._replace(client_fn=lambda unknowns, seen: _with_subset(of_fn(unknowns, seen), size, key))

    def both_fn(params: Params, batch: Batch) -> tuple[Updates, Updates]:
        whole, count = client_fn(params, batch), _check.examples(batch.inputs)
        if size >= count:
            return whole, whole
        chosen = jax.random.permutation(key, count)[:size]
        return whole, client_fn(params, jax.tree.map(lambda leaf: leaf[chosen], batch))

    return both_fn
