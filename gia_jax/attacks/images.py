"""What attacks on images by a box and total variation have in common, which take any other data by a `decode_fn`."""

from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Float

from gia_jax import _check
from gia_jax.base import Batch, DecodeFn, PriorFn, ProjectFn, Scalar
from gia_jax.matching import priors
from gia_jax.matching.solver import box


def images_or_other(
    *,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]] | None,
    total_variation_weight: Scalar | None,
    default_weight: Scalar,
    decode_fn: DecodeFn | None,
    project_fn: ProjectFn | None,
    prior_fn: PriorFn | None,
) -> dict[str, Any]:
    """Returns the decoding, the projection and the prior of an attack on images, or on the data of a `decode_fn`.

    Args:
        bounds: Darkest and brightest value of a pixel in the model's space, for images only, and needed there.
        total_variation_weight: Weight of the total variation, for images only. None takes `default_weight`.
        default_weight: Weight of the total variation that the attack has by default.
        decode_fn: Function `(z, labels) -> Batch` for data that are no images. None is for images.
        project_fn: Projection of the unknowns of a `decode_fn`, or None.
        prior_fn: Prior of the data of a `decode_fn`, or None.

    Returns:
        The arguments `decode_fn`, `project_fn` and `prior_fn` of `gradient_matching`.

    Raises:
        ValueError: If the bounds are in the wrong order, the weight is negative or not finite, or arguments for images
            and for other data are mixed: exactly one of `bounds` and `decode_fn` must be given.

    Examples:
        Pixels are kept in their range:

        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.images import images_or_other
        >>> others = dict.fromkeys(("total_variation_weight", "decode_fn", "project_fn", "prior_fn"))
        >>> parts = images_or_other(bounds=(0.0, 1.0), default_weight=1e-2, **others)
        >>> parts["project_fn"](jnp.array([-1.0, 0.5])).tolist()
        [0.0, 0.5]
    """
    if decode_fn is not None:
        if bounds is not None or total_variation_weight is not None:
            given = "bounds" if bounds is not None else "total_variation_weight"
            raise ValueError(f"{given} must not be given with decode_fn, whose data have project_fn and prior_fn")
        return {"decode_fn": decode_fn, "project_fn": project_fn, "prior_fn": prior_fn}
    if bounds is None:
        raise ValueError("bounds must be given for images, or decode_fn for data of another kind, got neither")
    for name, value in {"project_fn": project_fn, "prior_fn": prior_fn}.items():
        if value is not None:
            raise ValueError(f"{name} must be given with a decode_fn, got it without one")
    weight = default_weight if total_variation_weight is None else total_variation_weight
    _check.weight(total_variation_weight=weight)
    _check.limits("bounds", bounds)
    prior = priors.combine((weight, priors.total_variation()))
    return {"decode_fn": Batch, "project_fn": box(*bounds), "prior_fn": prior}
