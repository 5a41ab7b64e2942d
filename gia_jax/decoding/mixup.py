"""Decodes MixUp: encodings are linear in the images, so enough of them give the images by least squares.

Huang et al., Evaluating Gradient Inversion Attacks and Defenses in Federated Learning, NeurIPS 2021, section 6,
minimise the same squares by Adam. The strongest adversary there knows which images are mixed and how much.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.defenses.mixing import Mixing
from gia_jax.precision import widened


def mixing_matrix(mixing: Mixing, num_images: int) -> Float[Array, "m n"]:
    """Returns the matrix M of coefficients: encodings are M times images, up to signs.

    Args:
        mixing: Mixing of one epoch, fields of shape (m, k), or of several, with more leading axes, which become one.
        num_images: Number N >= 1 of private images that mix with each other and with no others.

    Returns:
        M, with a row for each encoding and a column for each image, in float32 or wider.

    Raises:
        ValueError: If the fields have different shapes, or a source is no image.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import decoding, defenses
        >>> mixing = defenses.Mixing(jnp.array([[0, 1], [1, 2]]), jnp.array([[0.75, 0.25], [0.5, 0.5]]))
        >>> decoding.mixing_matrix(mixing, num_images=3).tolist()
        [[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]
    """
    sources, coefficients = mixing
    _check.integer(num_images=num_images)
    if sources.shape != coefficients.shape or sources.ndim < 2:
        raise ValueError(f"mixing.sources must have shape (m, k) like coefficients, got {sources.shape}")
    if _check.is_concrete(sources):
        values = np.asarray(sources)
        outside = values[(values < 0) | (values >= num_images)]
        if outside.size:
            raise ValueError(f"mixing.sources must be at least 0 and below num_images={num_images}, got {outside[0]}")
    k = sources.shape[-1]
    sources, coefficients = sources.reshape(-1, k), coefficients.reshape(-1, k)
    _check.fits(len(sources) * num_images, num_images=num_images)
    rows, coefficients = jnp.arange(len(sources))[:, None], widened(coefficients)
    return jnp.zeros((len(sources), num_images), coefficients.dtype).at[rows, sources].add(coefficients)


def decode_mixup(mixing: Mixing, encodings: Float[Array, "*m_d"], num_images: int) -> Float[Array, "n *d"]:
    """Finds the images X by least squares, min ||M X - E||, with a QR decomposition of M.

    Threat model: whoever has the encodings, exact or inverted from gradients, and knows the mixing. Errors of the
    encodings are carried over with `noise_gain`.

    Args:
        mixing: Mixing of the encodings, which is known. That of several epochs has more leading axes (`jax.vmap` of
            `draw_mixing`).
        encodings: Encodings E, shape `mixing.sources.shape[:-1] + d`, in any linear space of pixels.
        num_images: Number N of private images.

    Returns:
        The images, shape (n, *d), in the space of the encodings and of their type.

    Raises:
        ValueError: If shapes do not fit, or if the matrix (of a mixing that is not traced) has a rank below N: the
            images are not determined, observe more epochs.

    Examples:
        Two encodings of two images give both images away:

        >>> import jax.numpy as jnp
        >>> from gia_jax import decoding, defenses
        >>> images = jnp.array([[1.0, 2.0, 3.0], [5.0, 4.0, 0.0]])
        >>> mixing = defenses.Mixing(jnp.array([[0, 1], [1, 0]]), jnp.array([[0.75, 0.25], [0.75, 0.25]]))
        >>> found = decoding.decode_mixup(mixing, defenses.mix(mixing, images), num_images=2)
        >>> bool(jnp.allclose(found, images, atol=1e-4))
        True
    """
    matrix, flat, shape = system(mixing, encodings, num_images)
    q, r = jnp.linalg.qr(matrix)
    projected = jnp.matmul(q.T, flat, precision="highest")
    return jax.scipy.linalg.solve_triangular(r, projected).reshape(num_images, *shape).astype(encodings.dtype)


def system(
    mixing: Mixing, encodings: Float[Array, "*m_d"], num_images: int
) -> tuple[Float[Array, "m n"], Float[Array, "m p"], tuple[int, ...]]:
    """Sets up the linear system that encodings and their mixing are.

    Args:
        mixing: Mixing of the encodings, of one epoch or of several, with more leading axes.
        encodings: Encodings, shape `mixing.sources.shape[:-1] + d`.
        num_images: Number N of private images.

    Returns:
        The matrix of coefficients, the encodings as rows (both in float32 or wider), and the shape d of an image.

    Raises:
        ValueError: If shapes do not fit, the encodings are integers, or a concrete matrix has a rank below N.
    """
    if not jnp.issubdtype(encodings.dtype, jnp.floating):
        raise ValueError(f"encodings must be floating point, got {encodings.dtype}")
    wide = widened(encodings)
    matrix = mixing_matrix(mixing, num_images).astype(wide.dtype)
    leading = mixing.sources.shape[:-1]
    if encodings.shape[: len(leading)] != leading:
        raise ValueError(f"encodings must have shape {leading} + d like mixing, got {encodings.shape}")
    if len(matrix) < num_images:
        raise ValueError(f"encodings must be at least num_images={num_images}, got {len(matrix)}")
    if _check.is_concrete(matrix):
        rank = np.linalg.matrix_rank(np.asarray(matrix))
        if rank < num_images:
            raise ValueError(f"mixing must have rank num_images={num_images}, got {rank}: observe more epochs")
    return matrix, wide.reshape(len(matrix), -1), encodings.shape[len(leading) :]


def noise_gain(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    """Computes the mean squared error of the images for each unit of that of the encodings, tr((M^T M)^-1) / N.

    Args:
        matrix: Matrix M of coefficients, shape (m, n), from `mixing_matrix`.

    Returns:
        The gain, for errors that are uncorrelated between encodings. It is infinite, or beyond precision, below rank N.

    Examples:
        Images that come out of unmixed encodings have the same error; each image seen twice has half of it:

        >>> import jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> once, twice = jnp.eye(2), jnp.concatenate([jnp.eye(2), jnp.eye(2)])
        >>> print(f"{decoding.noise_gain(once):.2f} {decoding.noise_gain(twice):.2f}")
        1.00 0.50
    """
    return jnp.mean(jnp.square(1 / jnp.linalg.svd(widened(matrix), compute_uv=False)))


def predicted_psnr(encoding_mse: Float[ArrayLike, ""], matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    """Computes the PSNR in dB to expect of `decode_mixup`: -10 log10(encoding_mse * noise_gain).

    Args:
        encoding_mse: Mean squared error of the encodings, at least 0, of pixels whose range has length 1.
        matrix: Matrix M of coefficients, shape (m, n), from `mixing_matrix`.

    Returns:
        The PSNR of the mean squared error over all images, before any clipping.

    Raises:
        ValueError: If `encoding_mse` is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> print(f"{decoding.predicted_psnr(0.01, jnp.eye(2)):.1f}")
        20.0
    """
    _check.not_negative(encoding_mse=encoding_mse)
    return -10 * jnp.log10(
        widened(jnp.asarray(encoding_mse, jnp.result_type(encoding_mse, float))) * noise_gain(matrix)
    )
