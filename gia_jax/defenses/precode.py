"""PRECODE: a random code between the features and the last layer.

The variational bottleneck makes gradients depend on a noise that only the client knows. Scheliga et al., PRECODE: A
Generic Model Extension to Prevent Deep Gradient Leakage, WACV 2022, section 3; the standard deviation as in Alemi et
al., Deep Variational Information Bottleneck, ICLR 2017.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Batch, LossFn, Params
from gia_jax.clients.sgd import classification_loss
from gia_jax.models.functional import ApplyFn
from gia_jax.precision import wide_dtype, widened


class Precode(NamedTuple):
    """A model with a variational bottleneck, as `precode` builds it.

    Attributes:
        apply_fn: Function `(params, inputs) -> logits` that uses the mean code, for evaluation.
        loss_fn: Function `(key) -> loss_fn` that returns the loss of a client whose noise comes from this key, which
            the attacker never has. None takes the mean code. One key is for one call on one batch: later calls draw the
            same noise, and so do calls mapped over the examples. A client that calls its loss more than once (`dp_sgd`,
            `per_example`, `federated_averaging`) is therefore weaker than PRECODE. Give `dp_sgd` the function itself
            with a `loss_key`: `defenses.protected.protect` does so, and refuses local steps.
        params: Parameters {"features": the given ones, "encoder", "decoder", "head"}. The last three are dense layers,
            {"kernel", "bias"}.

    Examples:
        The loss depends on the key of the client's noise:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, defenses
        >>> options = {"num_features": 2, "num_classes": 3, "size": 4}
        >>> model = defenses.precode(jax.random.key(0), lambda params, inputs: inputs, {}, **options)
        >>> batch = Batch(jnp.ones((1, 2)), jnp.array([0]))
        >>> one, other = (model.loss_fn(jax.random.key(seed))(model.params, batch) for seed in (1, 2))
        >>> bool(one == other)
        False
    """

    apply_fn: ApplyFn
    loss_fn: Callable[[PRNGKeyArray | None], LossFn]
    params: Params


def precode(
    key: PRNGKeyArray,
    features_fn: ApplyFn,
    params: Params,
    *,
    num_features: int,
    num_classes: int,
    size: int = 256,
    weight: float = 1e-3,
) -> Precode:
    """Builds the model whose features pass through a random code z before the last layer.

    With epsilon ~ N(0, 1), drawn anew for each example of the batch that the loss is called on,

        mu, s = encoder(features(x)),  z = mu + softplus(s - 5) * epsilon,  logits = head(decoder(z)),

    with the loss  cross-entropy + weight * KL(N(mu, softplus(s - 5)^2) || N(0, 1)).

    An attacker that knows the defense does not know epsilon. It draws its own or takes the mean code, and leaves out
    the layers whose gradient depends on epsilon most: `matching.objectives.selected(objective, lambda path: "features"
    in path)`.

    Args:
        key: Key of the initial weights (drawn as in PyTorch's layers), not of epsilon.
        features_fn: Function `(params, inputs) -> features` of shape (b, num_features), such as
            `models.functional(models.headless(module))` returns it.
        params: Parameters of `features_fn`.
        num_features: Number of features that `features_fn` gives, at least 1.
        num_classes: Number of classes of the model, at least 1.
        size: Number of entries of the code z, at least 1.
        weight: Weight of the divergence in the loss, at least 0 and finite.

    Returns:
        The model: its forward pass, its loss and its parameters.

    Raises:
        ValueError: If `size`, `num_features` or `num_classes` is no positive integer or makes a layer that does not fit
            into memory, or `weight` is negative or not finite.

    Examples:
        The encoder gives a mean and a standard deviation for each of the 4 entries of the code:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> features_fn = lambda params, inputs: jnp.tanh(inputs @ params["kernel"])
        >>> params = {"kernel": jnp.ones((5, 2))}
        >>> model = defenses.precode(jax.random.key(0), features_fn, params, num_features=2, num_classes=3, size=4)
        >>> model.params["encoder"]["kernel"].shape
        (2, 8)
        >>> model.apply_fn(model.params, jnp.ones((6, 5))).shape
        (6, 3)
    """
    _check.integer(num_features=num_features, num_classes=num_classes, size=size)
    _check.fits(num_features, num_features=num_features)
    _check.fits(num_features * num_classes, num_classes=num_classes)
    _check.fits(3 * num_features * size, size=size)
    _check.not_negative(weight=weight)
    _check.finite("weight", weight)

    def code(params: Params, inputs: PyTree[Array]) -> tuple[Float[Array, "b z"], Float[Array, "b z"]]:
        mean, scale = jnp.split(_dense(params["encoder"], features_fn(params["features"], inputs)), 2, axis=1)
        return mean, jax.nn.softplus(scale - 5)

    def logits(params: Params, z: Float[Array, "b z"]) -> Float[Array, "b c"]:
        return _dense(params["head"], _dense(params["decoder"], z))

    def loss_fn(key: PRNGKeyArray | None) -> LossFn:
        def loss(params: Params, batch: Batch) -> Float[Array, ""]:
            mean, deviation = code(params, batch.inputs)
            noise = 0 if key is None else deviation * jax.random.normal(key, mean.shape, mean.dtype)
            divergence = 0.5 * (jnp.square(mean) + jnp.square(deviation) - 1) - jnp.log(deviation)
            match = classification_loss(logits(params, mean + noise), batch.labels)
            return match + weight * jnp.mean(jnp.sum(divergence, 1))

        return loss

    keys = jax.random.split(key, 3)
    dtype = jnp.result_type(*jax.tree.leaves(params)) if jax.tree.leaves(params) else jnp.result_type(float)
    layers = {
        "encoder": _initial(keys[0], num_features, 2 * size, dtype),
        "decoder": _initial(keys[1], size, num_features, dtype),
        "head": _initial(keys[2], num_features, num_classes, dtype),
    }
    return Precode(
        lambda params, inputs: logits(params, code(params, inputs)[0]), loss_fn, {"features": params, **layers}
    )


def _dense(layer: Params, inputs: Float[Array, "b i"]) -> Float[Array, "b o"]:
    """Applies a dense layer in float32 or wider, because the code, its divergence and the logits come from it."""
    return widened(inputs) @ widened(layer["kernel"]) + widened(layer["bias"])


def _initial(key: PRNGKeyArray, size: int, outputs: int, dtype: jnp.dtype) -> Params:
    """Draws the parameters of a dense layer as PyTorch does, uniformly within 1 / sqrt(size) of 0."""
    key_kernel, key_bias = jax.random.split(key)
    limit, wide = size**-0.5, wide_dtype(dtype)
    return {
        "kernel": jax.random.uniform(key_kernel, (size, outputs), wide, -limit, limit).astype(dtype),
        "bias": jax.random.uniform(key_bias, (outputs,), wide, -limit, limit).astype(dtype),
    }
