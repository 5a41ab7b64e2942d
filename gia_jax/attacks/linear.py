"""The inversion of a fully connected layer in closed form.

Phong et al., Privacy-Preserving Deep Learning via Additively Homomorphic Encryption, IEEE TIFS 2018, section 3;
Geiping et al., Inverting Gradients, NeurIPS 2020, proposition 3.1; Boenisch et al., When the Curious Abandon Honesty,
EuroS&P 2023, section 4, for batches.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch, LabelFn, Observation, ReconstructFn, Reconstruction
from gia_jax.labels import ClassifierFn
from gia_jax.matching.initializations import as_granted, granted_like
from gia_jax.precision import widened_tree
from gia_jax.threat import granted_labels

# Rows whose bias gradient is below this fraction of the largest are noise: their quotient is not formed.
NEGLIGIBLE = 1e-9


def linear_inversion(
    layer_fn: ClassifierFn,
    *,
    label_fn: LabelFn = granted_labels,
    tolerance: float = 1e-3,
    flatten: tuple[int, ...] | None = None,
) -> ReconstructFn:
    """Builds the attack that reads the input of a fully connected first layer with a bias from its gradient:

        x = grad W_r / grad b_r   for a row r

    For one example it is exact at any row r with grad b_r != 0. In a batch every row gives a mixture of the inputs of
    the examples that activate it, which is exact for each row that one example activates alone. Such rows agree with
    each other, and mixtures hardly ever do. So the inputs on which most rows agree come first. Where no rows agree,
    those of the most negative bias gradient come first (for a linear classifier, the classes of the batch).

    Threat model: an honest-but-curious server that knows the parameters, the update and the shape of the batch.

    Args:
        layer_fn: Function `(update) -> Dense` that picks the first layer, such as `gia_jax.labels.dense("dense0")`.
        label_fn: Function `(observation) -> labels` that finds the labels of the reconstruction. They take no part in
            the inversion. By default it takes those that the threat model grants.
        tolerance: Relative L2 distance below which two rows agree, above 0 and finite. Where four units of rounding of
            the update are more than that, as in half precision, they take its place.
        flatten: Shape with the channels first, such as (3, 32, 32), in which the layer sees an example whose own
            channels are last: the order of flattening of a model that was taken over from PyTorch with its weights
            as they are. None is for a layer that sees the example in the example's own order.

    Returns:
        A function `(key, observation) -> reconstruction`, which does not use the key. Its loss is the share of the
        layer's gradient, in L2 norm, that no combination of the inputs found explains. It raises ValueError for integer
        inputs, and for a layer that has no bias or does not see the (flattened) example.

    Raises:
        ValueError: If `tolerance` is not positive and finite, or `flatten` is not of positive integers.

    Examples:
        One example comes back exactly, up to rounding:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, labels, observe
        >>> def apply_fn(params, inputs):
        ...     return inputs @ params["head"]["kernel"] + params["head"]["bias"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> params = {"head": {"kernel": jnp.eye(2, 3), "bias": jnp.zeros(3)}}
        >>> batch = Batch(jnp.array([[0.5, 2.0]]), jnp.array([1]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, params, batch)
        >>> found = jax.jit(attacks.linear_inversion(labels.dense("head")))(jax.random.key(1), seen)
        >>> bool(jnp.allclose(found.batch.inputs, batch.inputs, atol=0.001))
        True
    """
    _check.positive(tolerance=tolerance)
    _check.finite("tolerance", tolerance)
    for size in () if flatten is None else flatten:
        _check.integer(flatten=size)

    def reconstruct_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        del key
        shared, like = layer_fn(observation.update), granted_like(observation)
        if shared.bias is None:
            raise ValueError("linear_inversion needs a bias in the layer, got none")
        rounding = float(max(jnp.finfo(leaf.dtype).eps for leaf in (shared.kernel, shared.bias)))
        layer = widened_tree(shared)
        if flatten is not None and tuple(flatten) != (like.shape[-1], *like.shape[1:-1]):
            wanted = (like.shape[-1], *like.shape[1:-1])
            raise ValueError(f"flatten must be the example's shape with its channels first, {wanted}, got {flatten}")
        if layer.kernel.shape[0] * like.shape[0] != like.size:
            raise ValueError(f"the layer must see the example {like.shape[1:]}, got {layer.kernel.shape[0]} inputs")
        usable = jnp.abs(layer.bias) > NEGLIGIBLE * jnp.max(jnp.abs(layer.bias))
        rows = jnp.where(usable, layer.kernel / jnp.where(usable, layer.bias, 1), 0).T
        found = _most_agreed(rows, layer.bias, usable, like.shape[0], max(tolerance, 4 * rounding))
        explained = jnp.linalg.lstsq(found.T, layer.kernel)[0]
        loss = jnp.linalg.norm(layer.kernel - found.T @ explained) / jnp.linalg.norm(layer.kernel)
        images = found.reshape(like.shape) if flatten is None else jnp.moveaxis(found.reshape(-1, *flatten), 1, -1)
        inputs = as_granted(images, observation)
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(inputs)) & jnp.any(usable)
        return Reconstruction(Batch(inputs, label_fn(observation)), loss, finite)

    return reconstruct_fn


def _most_agreed(
    rows: Float[Array, "r d"], bias: Float[Array, " r"], usable: Bool[Array, " r"], count: int, tolerance: float
) -> Float[Array, "count d"]:
    """Picks `count` rows, each from the largest group of rows that agree, and drops those that agree with it."""
    squares = jnp.sum(jnp.square(rows), 1)
    distances = jnp.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0)
    agree = (distances <= tolerance**2 * squares[:, None]) & usable[None] & usable[:, None]
    magnitude = jnp.abs(bias) / jnp.max(jnp.abs(bias))

    def pick(left: Bool[Array, " r"], _: None) -> tuple[Bool[Array, " r"], Array]:
        group = jnp.sum(agree & left[None], 1)
        # Within a group the quotient of the largest divisor is the most accurate.
        preference = jnp.where(jnp.max(group) > 1, magnitude, -bias / jnp.max(jnp.abs(bias)))
        index = jnp.argmax(jnp.where(left, group + 0.5 * preference, -jnp.inf))
        return left & ~agree[index], index

    return rows[jax.lax.scan(pick, usable, None, length=count)[1]]
