"""APRIL, two attacks on vision transformers through the gradient of their position embedding.

Lu et al., APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers, CVPR 2022. `april` is the closed form,
for a network whose first attention alone reads the tokens; `april_optimization` is the descent, for any network with a
learnable position embedding.

The closed form departs from the paper as follows:

* What the server knows of the tokens, which is the class token, the position embedding and the bias of the patch
  embedding, is subtracted before the tokens are solved for, and not after. So the patches have to be no more than the
  width, where the paper counts the class token too.
* The paper takes the condition on the network for granted. Here it is verified.
* The query, key and value may have biases, any number of heads, or one kernel together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import (
    Attack,
    Batch,
    ClientFn,
    InitFn,
    LabelFn,
    ObjectiveFn,
    Observation,
    PriorFn,
    ReconstructFn,
    Reconstruction,
    Scalar,
    Updates,
)
from gia_jax.matching.initializations import as_granted, granted_like
from gia_jax.matching.objectives import cosine, euclidean
from gia_jax.matching.solver import box, gradient_matching
from gia_jax.models.vit import from_patches, patches
from gia_jax.precision import wide_dtype, widening
from gia_jax.threat import granted_labels

LayersFn = Callable[[PyTree[Array]], "TokenLayers"]


class TokenLayers(NamedTuple):
    """The layers of a vision transformer from the pixels to its first attention, or the gradients of these layers.

    Attributes:
        position: Position embedding, shape (t, d), of all t tokens of width d.
        patch_kernel: Kernel of the patch embedding: shape (p, d) of a dense layer that sees the p pixels of a square
            patch, row by row and with the channels last, or (h, w, c, d) of a convolution whose stride is its size.
        patch_bias: Bias of the patch embedding, shape (d,). None where it has none.
        attention: Kernels of the layers through which the first attention reads the tokens, each of shape (d, ...): of
            the query, the key and the value, or one kernel of all three.
        class_token: Tokens before those of the patches, shape (k, d). None where there are none.

    Examples:
        The layers of a model of one's own are named, with a dot between the keys of the parameters:

        >>> from flax import nnx
        >>> from gia_jax import attacks, models
        >>> _, params = models.functional(models.ViT((8, 8, 3), 10, width=12, depth=1, rngs=nnx.Rngs(0)))
        >>> layers_fn = attacks.TokenLayers.named(
        ...     position="position", patch="patch", attention="block0.attention", class_token="class_token"
        ... )
        >>> layers = layers_fn(params)
        >>> layers.position.shape, [kernel.shape for kernel in layers.attention]
        ((5, 12), [(12, 3, 4), (12, 3, 4), (12, 3, 4)])
    """

    position: Float[Array, "t d"]
    patch_kernel: Float[Array, "*p d"]
    patch_bias: Float[Array, " d"] | None
    attention: Sequence[Float[Array, "d ..."]]
    class_token: Float[Array, "k d"] | None = None

    @staticmethod
    def named(*, position: str, patch: str, attention: str | Sequence[str], class_token: str | None = None) -> LayersFn:
        """Names the layers by their paths in the parameters. They are never guessed.

        Args:
            position: Path of the position embedding, such as "position" or "encoder.positions", with a dot between
                keys. It leads to an array of shape (t, d) or (1, t, d), or to a layer that holds one as "embedding".
            patch: Path of the patch embedding, a dense layer or a convolution. A layer holds "kernel" and "bias"
                (flax), "w" and "b" (haiku), or "weight" and "bias" (PyTorch, equinox), whose first axis is the output.
            attention: Path of the first attention that holds "query", "key" and "value" (`nnx.MultiHeadAttention`), or
                of one dense layer for all three, or a sequence of the paths of several dense layers.
            class_token: Path of the token before those of the patches, an array whose last axis has length d. None is
                for a network without one.

        Returns:
            A function that maps parameters, or an update, to their `TokenLayers`. It raises ValueError that says of
            each layer that is not found what is there instead.
        """
        several = (attention,) if isinstance(attention, str) else tuple(attention)
        wanted = [("position", position), ("patch", patch), *(("attention", path) for path in several)]
        wanted += [] if class_token is None else [("class_token", class_token)]

        def layers_fn(tree: PyTree[Array]) -> TokenLayers:
            found: dict[str, list[Any]] = {name: [] for name in _READERS}
            missing = []
            for name, path in wanted:
                try:
                    found[name].append(_READERS[name](_at(tree, path)))
                except KeyError as error:
                    missing.append(f"{name}={path!r}: {error.args[0]}")
            if missing:
                raise ValueError(f"layers must be among the parameters, got {'; '.join(missing)}")
            ((kernel, bias),) = found["patch"]
            first = found["class_token"][0] if found["class_token"] else None
            return TokenLayers(
                found["position"][0], kernel, bias, [each for group in found["attention"] for each in group], first
            )

        return layers_fn


def _at(tree: PyTree[Array], path: str) -> Any:
    """Returns what a path of keys with dots leads to; the message of its KeyError says what is there."""
    node: Any = tree
    for key in path.split("."):
        here = node if isinstance(node, Mapping) else dict(enumerate(node)) if isinstance(node, tuple | list) else {}
        known = {str(name): name for name in here}
        if key not in known:
            raise KeyError(f"no {key!r} among {', '.join(known) or 'the entries of an array'}")
        node = here[known[key]]
    return node


def _embedding(node: Any) -> Float[Array, "t d"]:
    """Reads an array of tokens, which a layer may hold as its embedding."""
    if isinstance(node, Mapping):
        if "embedding" not in node:
            raise KeyError(f"no array and no 'embedding' among {', '.join(map(str, node))}")
        node = node["embedding"]
    return node.reshape(-1, node.shape[-1])


def _layer(node: Any) -> tuple[Array, Array | None]:
    """Reads the kernel, whose last axis becomes the output, and the bias of a dense layer or a convolution."""
    held = node if isinstance(node, Mapping) else {}
    for kernel, bias in (("kernel", "bias"), ("w", "b")):
        if kernel in held:
            return held[kernel], held.get(bias)
    if "weight" in held:
        weight = held["weight"]
        return weight.T if weight.ndim == 2 else jnp.moveaxis(weight, (0, 1), (-1, -2)), held.get("bias")
    raise KeyError(f"no 'kernel', 'w' or 'weight' among {', '.join(map(str, held)) or 'the entries of an array'}")


def _projections(node: Any) -> list[Array]:
    """Reads the kernels of an attention, or the one of a dense layer."""
    parts = ("query", "key", "value")
    if isinstance(node, Mapping) and set(parts) <= set(node):
        return [_layer(node[part])[0] for part in parts]
    return [_layer(node)[0]]


_READERS: dict[str, Callable[[Any], Any]] = {
    "position": _embedding,
    "patch": _layer,
    "attention": _projections,
    "class_token": _embedding,
}


def april(
    client_fn: ClientFn, *, layers_fn: LayersFn, label_fn: LabelFn = granted_labels, tolerance: float = 1e-4
) -> ReconstructFn:
    """Builds the closed form, which solves a linear system for the tokens that the first attention reads.

    With the tokens z, shape (t, d), the gradient A of the position embedding is that of the tokens themselves. Where
    they are read by the query, the key and the value alone, which have the kernels W and gradients G, it satisfies

        A^T z = sum over the three of W G^T = b

    The tokens of the patches are solved for by least squares, and the patches by the inverse of their embedding.

    Conditions: One image; a position embedding that is learned; no more patches than the width d, and no more pixels in
    a patch; and a network without LayerNorm before its first attention and without a residual path around it, such as
    `gia_jax.models.ViT(first_block="plain")`. No shape of an update tells the last one. So the attacker, who has the
    parameters, simulates the client on an image that it draws, whose tokens it knows, and compares A^T z with b before
    the observed update is read. The attack compares them itself, so that no caller can leave it out; `condition_holds`
    in this module is the comparison alone. Where the observation is concrete, a network that fails is refused by
    ValueError. Inside of `jit` and the like, where an error comes too late, its reconstruction is NaN, with `is_finite`
    False.

    Conditioning: The system is solved in the widest type that is enabled, but A and b carry the rounding errors of the
    update, which the condition number of A multiplies. On an untrained network of 64 patches it is about 1e3 for white
    noise, and 1e5 for photographs, whose patches are alike. So exact images need float64: of photographs a float32
    update leaves about 70 dB, and a bfloat16 update nothing (benchmarks/april.py). A network of one block that
    classifies by its class token has an A of rank 2 * heads + 1 at most, and nothing finds its patches; the loss is
    then 1.

    The patches come in the order of the tokens, which the position embedding tells the server: row by row, as
    `gia_jax.models.vit.patches` cuts them. A network that orders its tokens or pixels in another way is refused like
    one with a residual path. For a descent that has to find the order by itself, see
    `gia_jax.matching.priors.patch_borders`.

    Threat model: an honest-but-curious server that knows the parameters, the update and the shape of the image.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes, of one step of SGD.
        layers_fn: Function that picks the layers from parameters and from an update, such as one of
            `TokenLayers.named`.
        label_fn: Function `(observation) -> labels` that finds the label of the reconstruction. It takes no part in the
            inversion. By default it takes the label that the threat model grants.
        tolerance: Largest relative residual of A^T z = b at the image that the attacker draws, above 0 and finite.
            Where 16 units of rounding of the update are more than that, as in half precision, they take its place. The
            label of that image is the granted one, or class 0 where none is granted.

    Returns:
        A function `(key, observation) -> reconstruction`, which draws the attacker's own image from the key. Its loss
        is the relative residual of A^T z = b at the tokens of the reconstruction or, where that is more, the update's
        unit of rounding times the larger condition number of A and of the patch embedding, up to 1: an error of such a
        relative size need not show in the residual. It raises ValueError for more than one image, for
        layers that do not fit each other, the image or the conditions above, and for a network that is refused.

    Raises:
        ValueError: If `tolerance` is not positive and finite, or `layers_fn` or `label_fn` is no function.

    Examples:
        An image comes back exactly, up to rounding:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, models, observe
        >>> settings = {"patch_size": 2, "width": 6, "heads": 2, "depth": 2, "first_block": "plain"}
        >>> module = models.ViT((4, 4, 1), 3, **settings, rngs=nnx.Rngs(0))
        >>> apply_fn, params = models.functional(module)
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> layers_fn = attacks.TokenLayers.named(
        ...     position="position", patch="patch", attention="block0.attention", class_token="class_token"
        ... )
        >>> batch = Batch(jax.random.normal(jax.random.key(1), (1, 4, 4, 1)), jnp.array([2]))
        >>> seen = observe(jax.random.key(2), ThreatModel(labels=True), client_fn, params, batch)
        >>> found = jax.jit(attacks.april(client_fn, layers_fn=layers_fn))(jax.random.key(3), seen)
        >>> bool(jnp.allclose(found.batch.inputs, batch.inputs, atol=1e-2))
        True
    """
    _check.positive(tolerance=tolerance)
    _check.finite("tolerance", tolerance)
    _check.functions(layers_fn=layers_fn, label_fn=label_fn)

    def reconstruct_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        like = granted_like(observation)
        known, shared = layers_fn(observation.params), layers_fn(observation.update)
        size = _patch_size(known, like.shape)
        rounding = _rounding(shared)
        known, shared = _widest(known), _widest(shared)
        holds = condition_holds(key, client_fn, layers_fn, observation, tolerance=tolerance)

        system, right = _system(known, shared)
        kernel = known.patch_kernel.reshape(-1, known.patch_kernel.shape[-1])
        offset = _tokens(known, jnp.zeros(like.shape, right.dtype), size)
        matrix = system[-_num_patches(like.shape, size) :].T
        embedded, _, _, values = jnp.linalg.lstsq(matrix, right - system.T @ offset)
        pixels, _, _, own_values = jnp.linalg.lstsq(kernel.T, embedded.T)
        images = from_patches(pixels.T[None], size, like.shape)

        residual = _residual(system, right, _tokens(known, images, size))
        condition = jnp.maximum(values[0] / values[-1], own_values[0] / own_values[-1])
        loss = jnp.maximum(residual, jnp.minimum(rounding * condition, 1))
        loss, images = (jnp.where(holds, value, jnp.nan) for value in (loss, images))
        inputs = as_granted(images, observation)
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(inputs))
        return Reconstruction(Batch(inputs, label_fn(observation)), loss.astype(wide_dtype(like.dtype)), finite)

    return reconstruct_fn


def _patch_size(layers: TokenLayers, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the height and the width of a patch, or raises ValueError where the closed form cannot be had."""
    if shape[0] != 1:
        raise ValueError(f"april needs a batch of one example, got {shape[0]}")
    if len(shape) != 4:
        raise ValueError(f"april needs an image, shape (1, h, w, c), got {shape}")
    (_, h, w, c), (count, width) = shape, layers.position.shape
    *patch, features = layers.patch_kernel.shape
    if len(patch) == 1:
        side = math.isqrt(patch[0] // c)
        patch = [side, side, c] if side * side * c == patch[0] else patch
    if len(patch) != 3 or patch[2] != c or features != width or h % patch[0] or w % patch[1]:
        raise ValueError(
            f"patch_kernel must embed patches that tile the image {shape[1:]} in the width {width} of the position "
            f"embedding, got shape {layers.patch_kernel.shape}"
        )
    for kernel in layers.attention:
        if kernel.ndim < 2 or kernel.shape[0] != width:
            raise ValueError(f"attention must read tokens of the width {width}, got a kernel of shape {kernel.shape}")
    num_patches, pixels = _num_patches(shape, (patch[0], patch[1])), math.prod(patch)
    others = 0 if layers.class_token is None else layers.class_token.shape[0]
    if count != num_patches + others:
        raise ValueError(
            f"position must have a row for each of {others} class tokens and {num_patches} patches, got {count}"
        )
    if num_patches > width:
        raise ValueError(f"april needs no more patches than the width {width}, got {num_patches}")
    if pixels > width:
        raise ValueError(f"april needs no more pixels in a patch than the width {width}, got {pixels}")
    return patch[0], patch[1]


def _num_patches(shape: tuple[int, ...], size: tuple[int, int]) -> int:
    """Returns the number of patches of an image of shape (b, h, w, c)."""
    return (shape[1] // size[0]) * (shape[2] // size[1])


def _widest(layers: TokenLayers) -> TokenLayers:
    """Returns the layers in float64 where that is enabled, and in float32 elsewhere."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), layers)


def _system(known: TokenLayers, shared: TokenLayers) -> tuple[Float[Array, "t d"], Float[Array, "d d"]]:
    """Returns A and b of A^T z = b."""
    pairs = zip(known.attention, shared.attention, strict=True)
    products = [kernel.reshape(len(kernel), -1) @ own.reshape(len(own), -1).T for kernel, own in pairs]
    return shared.position, jnp.sum(jnp.stack(products), 0)


def _tokens(known: TokenLayers, images: Float[Array, "1 h w c"], size: tuple[int, int]) -> Float[Array, "t d"]:
    """Returns the tokens of an image."""
    embedded = patches(images, size)[0] @ known.patch_kernel.reshape(-1, known.patch_kernel.shape[-1])
    embedded = embedded if known.patch_bias is None else embedded + known.patch_bias
    first = () if known.class_token is None else (known.class_token,)
    return jnp.concatenate([*first, embedded]) + known.position


def _residual(system: Float[Array, "t d"], right: Float[Array, "d d"], tokens: Float[Array, "t d"]) -> Array:
    """Returns the relative residual of A^T z = b."""
    return jnp.linalg.norm(system.T @ tokens - right) / jnp.linalg.norm(right)


def _rounding(shared: TokenLayers) -> float:
    """Returns the unit of rounding of the gradients."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in (shared.position, *shared.attention))


def condition_holds(
    key: PRNGKeyArray, client_fn: ClientFn, layers_fn: LayersFn, observation: Observation, *, tolerance: float = 1e-4
) -> Bool[Array, ""]:
    """Tells whether A^T z = b holds at an image that the attacker draws, as `april` explains it.

    Args:
        key: Key of the image.
        client_fn: Client that the attacker assumes.
        layers_fn: Function that picks the layers from parameters and from an update.
        observation: Observation of the attack, of which the parameters and what is granted are read.
        tolerance: Largest relative residual.

    Returns:
        Whether it holds.

    Raises:
        ValueError: If the layers do not fit each other, the image or the conditions of `april`, or the parameters are
            concrete and A^T z = b does not hold.
    """
    like = granted_like(observation)
    known = layers_fn(observation.params)
    size = _patch_size(known, like.shape)
    drawn = as_granted(jax.random.normal(key, like.shape, wide_dtype(like.dtype)), observation)
    labels = observation.extra.get("labels", jnp.zeros(1, jnp.int32))
    shared = layers_fn(client_fn(observation.params, Batch(drawn, labels)))
    tolerance = max(tolerance, 16 * _rounding(shared))
    known, shared = _widest(known), _widest(shared)
    system, right = _system(known, shared)
    tokens = _tokens(known, drawn.astype(right.dtype), size)
    residual = _residual(system, right, tokens)
    if _check.is_concrete(residual) and not residual <= tolerance:
        raise ValueError(
            "april needs a first attention that reads the tokens as they are, and that alone reads them: at an image "
            f"that the attacker drew, A^T z = b fails by {float(residual):.2g} of b, above {tolerance:.2g}. "
            f"{_reason(system, shared, tokens, tolerance)}"
        )
    return residual <= tolerance


def _reason(system: Float[Array, "t d"], shared: TokenLayers, tokens: Float[Array, "t d"], tolerance: float) -> str:
    """Says what a network does with its tokens for which A^T z = b does not hold."""
    if not jnp.any(system):
        return "The position embedding has no gradient: it must be learned, and added to the tokens"
    reads = "the attention reads something else than the tokens, such as their LayerNorm or another order of pixels"
    beside = "something beside the attention reads the tokens, such as a residual path"
    if tokens.shape[0] >= tokens.shape[1]:  # they span everything
        return f"Either {reads}, or {beside}"
    # The gradient of a kernel has its columns in the span of what the layer reads.
    gradients = jnp.concatenate([own.reshape(len(own), -1) for own in shared.attention], 1)
    span = jnp.linalg.lstsq(tokens.T, gradients)[0]
    outside = jnp.linalg.norm(tokens.T @ span - gradients) / jnp.linalg.norm(gradients)
    return f"Here {reads if outside > tolerance else beside}"


def april_optimization(
    client_fn: ClientFn,
    *,
    position_fn: Callable[[Updates], Array],
    position_weight: Scalar = 10.0,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]] | None = None,
    label_fn: LabelFn = granted_labels,
    init_fn: InitFn | None = None,
    prior_fn: PriorFn | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Builds the descent, which matches the gradient and, once more, the direction of that of the position embedding:

        x* = argmin over x of  |d loss(x, y) / d theta - update|^2 + alpha (1 - cos of the position embedding's part)

    It needs a position embedding that is learned, and nothing else of the network: LayerNorm and residual paths are as
    they may be, and the batch is of any size. Where tokens are far smaller than 1, such as a class token that no
    training has moved, their LayerNorm makes the loss so steep that most starts end far from the image.

    Threat model: an honest-but-curious server that knows the parameters, the update and the shape of the batch. Labels
    are taken as known. They can also be read from the gradient first: pass a rule of `gia_jax.labels`.

    Departures: The paper subtracts the cosine, which is the same up to the constant alpha. The weight 10 was the best
    of 0, 1 and 10 on small networks with random weights and images, and Adam with a learning rate of 0.1 is the
    library's own default; neither was compared with the paper's.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes.
        position_fn: Function that picks the gradient of the position embedding from an update, such as
            `lambda update: update["position"]`.
        position_weight: Weight alpha of the cosine in the loss, at least 0 and finite.
        bounds: Darkest and brightest value of a pixel in the model's space, as two numbers or two arrays with one value
            for each channel. None sets no bounds.
        label_fn: Function `(observation) -> labels` that the attacker uses to find the labels. By default it takes
            those that the threat model grants.
        init_fn: Function `(key, observation) -> images` that draws the first dummy images. By default their pixels are
            standard normal.
        prior_fn: Prior `(batch, observation) -> ` scalar, such as `gia_jax.matching.priors.patch_borders`. None has
            none.
        optimizer: Optimiser that replaces Adam.

    Returns:
        The attack.

    Raises:
        ValueError: If `position_weight` is negative or not finite, the bounds are in the wrong order, or an argument
            that must be a function is none.

    Examples:
        The simulated gradient comes closer to the observed one with every step:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, models, observe, run
        >>> module = models.ViT((4, 4, 1), 3, patch_size=2, width=6, heads=2, depth=1, rngs=nnx.Rngs(0))
        >>> apply_fn, params = models.functional(module)
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> batch = Batch(jax.random.normal(jax.random.key(1), (1, 4, 4, 1)), jnp.array([2]))
        >>> seen = observe(jax.random.key(2), ThreatModel(labels=True), client_fn, params, batch)
        >>> attack = attacks.april_optimization(client_fn, position_fn=lambda update: update["position"])
        >>> attack_fn = jax.jit(lambda key: run(attack, key, seen, num_steps=3))
        >>> reconstruction, info = attack_fn(jax.random.key(3))
        >>> info.match.shape, bool(info.match[2] < info.match[0])
        ((3,), True)
    """
    _check.weight(position_weight=position_weight)
    _check.functions(position_fn=position_fn)
    if bounds is not None:
        _check.limits("bounds", bounds)
    return gradient_matching(
        client_fn,
        init_fn=init_fn,
        objective_fn=with_position(euclidean, position_fn, position_weight),
        prior_fn=prior_fn,
        label_fn=label_fn,
        project_fn=None if bounds is None else box(*bounds),
        optimizer=optimizer,
    )


def with_position(
    objective_fn: ObjectiveFn, position_fn: Callable[[Updates], Array], position_weight: Scalar = 1.0
) -> ObjectiveFn:
    """Adds the cosine distance of the position embedding's gradient to an objective.

    Args:
        objective_fn: Objective `(simulated, observed) -> distance`, any of `gia_jax.matching.objectives`.
        position_fn: Function that picks the gradient of the position embedding from an update.
        position_weight: Weight of the cosine distance.

    Returns:
        The objective.

    Examples:
        The gradients of the position embedding are orthogonal:

        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.april import with_position
        >>> from gia_jax.matching import objectives
        >>> objective = with_position(objectives.euclidean, lambda update: update["position"], 10.0)
        >>> simulated, observed = {"position": jnp.array([1.0, 0.0])}, {"position": jnp.array([0.0, 1.0])}
        >>> print(f"{objective(simulated, observed):.2f}")
        12.00
    """

    @widening
    def both_fn(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        angle = cosine(position_fn(simulated), position_fn(observed))
        return objective_fn(simulated, observed) + position_weight * angle

    return both_fn
