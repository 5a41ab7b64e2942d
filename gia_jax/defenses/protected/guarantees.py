"""What the defenses of a client promise for one release, and what they take from its examples."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float, PyTree, Shaped

from gia_jax import _check, defenses, metrics
from gia_jax.base import Params
from gia_jax.defenses.protected.parts import Part
from gia_jax.labels import dense
from gia_jax.models.functional import ApplyFn
from gia_jax.precision import is_floating

CANDIDATES = 10  # of whom one is the client's, for the chance of a reconstruction


def promises(
    parts: Sequence[Part],
    *,
    information: Float[Array, "d d"] | None = None,
    covariance: Float[Array, "d d"] | None = None,
) -> list[str]:
    """Writes what the noise of a client promises for one release of a batch of known size.

    Args:
        parts: Defenses of the client, as `parse` returns them.
        information: Fisher information of the update with DP-SGD's noise about the d numbers of an example, averaged
            over the prior, shape (d, d). None leaves out the bounds on the error of a reconstruction.
        covariance: Covariance of the Gaussian prior of an example, shape (d, d). None leaves out the bound of van
            Trees.

    Returns:
        Lines of text. For DP-SGD they state epsilon and the largest chance gamma that one of `CANDIDATES` equally
        likely examples is reconstructed, where MixUp and InstaHide make an example an encoding. One line states that
        there is no epsilon where noise is added without clipping before it, where Soteria chooses features by the
        examples beside DP-SGD, and where the extra `privacy` is not installed. There is no line for other noise after
        clipping, whose epsilon is not computed.

    Raises:
        ValueError: If `information` or `covariance` is given and there is no noise of DP-SGD, or Soteria beside it.

    Examples:
        >>> from gia_jax.defenses.protected import parse, promises
        >>> promises(parse("gaussian:scale=0.1"))
        ['no epsilon: the sensitivity is unbounded']
    """
    names = [part.name for part in parts]
    noise = [i for i, part in enumerate(parts) if part.name in ("gaussian", "laplace") and part.settings["scale"] > 0]
    private = next((part for part in parts if part.name == "dpsgd"), None)
    chosen = any(part.name == "soteria" and part.settings["ratio"] > 0 for part in parts)
    for name, matrix in (("information", information), ("covariance", covariance)):
        if matrix is not None and (private is None or private.settings["noise_multiplier"] == 0 or chosen):
            wanted = "None but for dpsgd with noise and without soteria"
            raise ValueError(f"{name} must be {wanted}, got an array of {len(matrix)} rows")
    if private is None:
        clipped = "clip" in names and any(i > names.index("clip") for i in noise)
        return metrics.privacy_lines(None) if noise and not clipped else []
    if chosen:
        return ["no epsilon is computed: Soteria chooses the features it leaves out by the examples"]
    multiplier = private.settings["noise_multiplier"]
    if multiplier == 0 and noise:
        return []
    lines = []
    if multiplier > 0 and any(part.acts_on == "input" and part.settings["k"] > 1 for part in parts):
        lines += ["what follows is of one encoding, and an image may be part of every one of the batch"]
    try:
        lines += metrics.privacy_lines(
            multiplier, relation="replace_one", prior=1 / CANDIDATES, information=information, covariance=covariance
        )
    except ImportError as error:
        lines += [f"no epsilon: {error}"]
    return lines


def live_shares(
    parts: Sequence[Part],
    apply_fn: ApplyFn,
    params: Params,
    inputs: PyTree[Shaped[Array, "v b ..."]],
    *,
    head: str = "head",
) -> Float[Array, " v"]:
    """Computes the share that Soteria prunes of the live features, which are not 0 for every example of a batch.

    Args:
        parts: Defenses of the client, with Soteria among them.
        apply_fn: Model of the client, a function `(params, inputs) -> logits`.
        params: Parameters of the model.
        inputs: Batches of v victims as the model sees them, shape (v, b, *d), of a floating-point type and finite, or a
            tree of arrays whose first axes are of v and b, such as graphs.
        head: Name of the last layer, a key of the parameters.

    Returns:
        The share for each victim, in [0, 1], shape (v,).

    Raises:
        ValueError: If Soteria is not among `parts`, or `inputs` have another shape or type, are empty or not finite.

    Examples:
        Half of the four features are pruned:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> from gia_jax.defenses.protected import live_shares, parse
        >>> apply_fn, params = models.functional(models.MLP((4,), 2, hidden=(), rngs=nnx.Rngs(0)))
        >>> inputs = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
        >>> share_fn = jax.jit(lambda params: live_shares(parse("soteria:ratio=0.5"), apply_fn, params, inputs))
        >>> share_fn(params).tolist()
        [0.5]
    """
    leaves = jax.tree.leaves_with_path(inputs)
    for path, leaf in leaves:
        # One array without a third axis lacks that of the victims or of the batch; in a tree it is one field.
        if leaf.ndim < (2 if path else 3) or 0 in leaf.shape or not any(is_floating(other) for _, other in leaves):
            where = f"inputs{jax.tree_util.keystr(path)}"
            raise ValueError(f"{where} must be floating (v, b, *d), nothing of it 0, got {leaf.dtype} {leaf.shape}")
    _check.examples(inputs, name="inputs")
    _check.finite("inputs", inputs)
    found = [part.settings for part in parts if part.name == "soteria"]
    if not found:
        raise ValueError(f"parts must have soteria, got {[part.name for part in parts]}")

    def of_one(inputs: PyTree[Shaped[Array, "b ..."]]) -> Float[Array, ""]:
        return defenses.live_share_pruned(apply_fn, dense(head), params, inputs, **found[0])

    return jax.lax.map(of_one, inputs)
