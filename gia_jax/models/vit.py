"""Vision transformers for images of any size (Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.models.layers import linear
from gia_jax.precision import widened

FirstBlock = Literal["residual", "plain"]

# Of the class token and of the position embedding.
small_normal = jax.nn.initializers.normal(0.02)


def patches(images: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b n p"]:
    """Cuts images into patches that do not overlap, row by row, and flattens each with its channels last.

    Args:
        images: Images, shape (b, h, w, c).
        size: Height and width of a patch, divisors of those of the images.

    Returns:
        The pixels of n patches, shape (b, n, p) with p = height * width * c.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.models.vit import patches
        >>> patches(jnp.arange(8).reshape(1, 2, 4, 1) / 1.0, (2, 2)).tolist()
        [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    (b, h, w, c), (height, width) = images.shape, size
    tiles = images.reshape(b, h // height, height, w // width, width, c)
    return tiles.swapaxes(2, 3).reshape(b, -1, height * width * c)


def from_patches(
    pixels: Float[Array, "b n p"], size: tuple[int, int], shape: tuple[int, ...]
) -> Float[Array, "b h w c"]:
    """Puts the patches of images back in their places, the inverse of `patches`.

    Args:
        pixels: Pixels of the patches, shape (b, n, p).
        size: Height and width of a patch.
        shape: Shape (b, h, w, c) of the images.

    Returns:
        The images, shape (b, h, w, c).

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.models.vit import from_patches, patches
        >>> images = jnp.arange(8).reshape(1, 2, 4, 1) / 1.0
        >>> bool((from_patches(patches(images, (2, 2)), (2, 2), images.shape) == images).all())
        True
    """
    (b, h, w, c), (height, width) = shape, size
    tiles = pixels.reshape(b, h // height, w // width, height, width, c)
    return tiles.swapaxes(2, 3).reshape(shape)


def _attend(
    query: Float[Array, "b t n e"], key: Float[Array, "b t n e"], value: Float[Array, "b t n e"], **_: Any
) -> Float[Array, "b t n e"]:
    """Computes the attention of all heads. That of flax rounds its weights to float32 where all else is float64."""
    scores = jnp.einsum("bqne,bkne->bnqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(widened(scores)).astype(value.dtype)
    return jnp.einsum("bnqk,bkne->bqne", weights, value)


class TransformerBlock(nnx.Module):
    """A block of multi-head attention and of two dense layers with GELU, each behind a LayerNorm and beside a residual
    path.

    Args:
        width: Number of features of a token.
        heads: Number of heads of the attention, a divisor of `width`.
        mlp_ratio: Number of features between the dense layers, in multiples of `width`.
        plain: Whether the attention has no LayerNorm before it and no residual path around it.
        rngs: Random streams of the initial weights (`nnx.Rngs`).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int, *, plain: bool, rngs: nnx.Rngs) -> None:
        self.plain = plain
        if not plain:
            self.norm0 = nnx.LayerNorm(width, use_fast_variance=False, rngs=rngs)
        init = jax.nn.initializers.xavier_uniform()
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, attention_fn=_attend, kernel_init=init, rngs=rngs
        )
        self.norm1 = nnx.LayerNorm(width, use_fast_variance=False, rngs=rngs)
        self.dense0 = linear(width, mlp_ratio * width, rngs=rngs)
        self.dense1 = linear(mlp_ratio * width, width, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        tokens = self.attention(tokens) if self.plain else tokens + self.attention(self.norm0(tokens))
        return tokens + self.dense1(jax.nn.gelu(self.dense0(self.norm1(tokens))))


class ViT(nnx.Module):
    """A vision transformer: patches are embedded, pass through blocks of attention, and the class token is classified.

    Every patch is flattened and embedded by the dense layer `patch`. A learnable `class_token` comes first, a learnable
    `position` embedding is added to all tokens, and the blocks `block0`, `block1`, ... follow, each with its LayerNorms
    before the attention and the dense layers. There is no dropout.

    With `first_block="plain"` the first attention reads its tokens as they are and its output replaces them: it has no
    LayerNorm before it and no residual path around it. That is not the published network. It is the one whose input
    `gia_jax.attacks.april` finds in closed form, from two blocks on: behind a single block the class token alone is
    read, and then too few gradients come back to the other tokens.

    Args:
        input_shape: Shape (h, w, c) of an image.
        num_classes: Number of classes, and so of logits.
        patch_size: Height and width of a patch in pixels, a divisor of the image's height and width.
        width: Number of features of a token, a multiple of `heads`.
        depth: Number of blocks, at least 1.
        heads: Number of heads of every attention.
        mlp_ratio: Number of features between the two dense layers of a block, in multiples of `width`.
        first_block: "residual" for a first block like the others, or "plain", as explained above.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Raises:
        ValueError: If a size is no positive integer, `patch_size` does not divide the image's height and width, `heads`
            does not divide `width`, or `first_block` is another one.

    Examples:
        An image of 8x8 pixels has four patches of 4x4, and one token more:

        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = nnx.eval_shape(lambda: models.ViT((8, 8, 3), 10, width=12, rngs=nnx.Rngs(0)))
        >>> module.position.shape, module.patch.kernel.shape
        ((5, 12), (48, 12))
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        patch_size: int = 4,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        mlp_ratio: int = 4,
        first_block: FirstBlock = "residual",
        rngs: nnx.Rngs,
    ) -> None:
        _check.integer(patch_size=patch_size, width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        height, wide, channels = input_shape
        if height % patch_size or wide % patch_size:
            raise ValueError(f"patch_size must divide the image's height and width {(height, wide)}, got {patch_size}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}, got {width}")
        if first_block not in ("residual", "plain"):
            raise ValueError(f"first_block must be 'residual' or 'plain', got {first_block!r}")
        self.patch_size, self.depth = patch_size, depth
        num_patches = (height // patch_size) * (wide // patch_size)
        self.patch = linear(patch_size * patch_size * channels, width, rngs=rngs)
        self.class_token = nnx.Param(small_normal(rngs.params(), (1, width)))
        self.position = nnx.Param(small_normal(rngs.params(), (1 + num_patches, width)))
        for i in range(depth):
            plain = i == 0 and first_block == "plain"
            setattr(self, f"block{i}", TransformerBlock(width, heads, mlp_ratio, plain=plain, rngs=rngs))
        self.norm = nnx.LayerNorm(width, use_fast_variance=False, rngs=rngs)
        self.head = linear(width, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        embedded = self.patch(patches(x, (self.patch_size, self.patch_size)))
        first = jnp.broadcast_to(self.class_token[...], (len(x), *self.class_token.shape)).astype(embedded.dtype)
        tokens = jnp.concatenate([first, embedded], 1) + self.position[...]
        for i in range(self.depth):
            tokens = getattr(self, f"block{i}")(tokens)
        return self.head(self.norm(tokens[:, 0]))
