"""Decodes InstaHide, given which images are mixed: solves |E| = |M X| for X, up to a sign for each pixel.

Carlini et al., An Attack on InstaHide: Is Private Learning Possible with Instance Encoding?, arXiv 2011.05315, end with
this system and solve it by gradient descent; here it is phase retrieval with real signs, solved by relaxed reflections
(RAAR: Luke, Relaxed averaged alternating reflections for diffraction imaging, Inverse Problems 21, 2005).
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from scipy.sparse import coo_matrix, csgraph

from gia_jax import _check
from gia_jax.decoding.mixup import system
from gia_jax.defenses.mixing import Mixing
from gia_jax.precision import widened

POLISH = 10  # alternating projections after the reflections, which hover around a solution


class InstaHideDecoding(NamedTuple):
    """The images that `decode_instahide` found, and how well they explain the encodings.

    Attributes:
        images: Images, shape (n, *d), in the space of the encodings.
        residuals: Relative residual of each pixel and channel, || |M x| - |e| || / ||e||, shape d.
        solved: Whether the residual is within the tolerance, shape d. Unsolved values are the best found.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> residuals, solved = jnp.array([0.0, 0.2, 0.0, 0.0]), jnp.array([True, False, True, True])
        >>> found = decoding.InstaHideDecoding(jnp.zeros((2, 4)), residuals, solved)
        >>> int(found.solved.sum())
        3
    """

    images: Float[Array, "n *d"]
    residuals: Float[Array, "*d"]
    solved: Bool[Array, "*d"]


def decode_instahide(
    key: PRNGKeyArray,
    mixing: Mixing,
    encodings: Float[Array, "*m_d"],
    num_images: int,
    *,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]] | None = None,
    num_restarts: int = 20,
    num_steps: int = 100,
    tolerance: float = 1e-3,
    weights: Float[Array, "*m"] | None = None,
) -> InstaHideDecoding:
    """Finds the images behind encodings with random signs: `retrieve`, then `synchronize`.

    Threat model: whoever has the encodings and knows the mixing; signs are neither known nor used. All images that are
    mixed are unknowns: of a cross-dataset mixing pass the indices of public images too, or they act as noise.

    Args:
        key: Random key of the starts.
        mixing: Mixing of the encodings, which is known. That of several epochs has more leading axes (`jax.vmap` of
            `draw_mixing`).
        encodings: Encodings E, shape `mixing.sources.shape[:-1] + d`, in the space in which they were made, where 0
            lies within the images' range (the model's normalised space): in [0, 1] the signs hide nothing, and |E| is
            MixUp.
        num_images: Number N of images that mix with each other.
        bounds: Darkest and brightest pixel in that space, broadcast against d; they settle the last sign.
        num_restarts: Largest number of restarts of a pixel, at least 1. A pixel that is solved needs no more.
        num_steps: Number of reflections in each restart, at least 1.
        tolerance: Relative residual of a solved pixel, above 0 and finite.
        weights: Trust in each encoding, positive, shape (..., m) like the mixing. For inverted encodings it is the
            inverse of the squared error expected. By default all are trusted alike.

    Returns:
        The decoding. This is host code around `retrieve`, which can be compiled.

    Raises:
        ValueError: If shapes do not fit, the rank is below N, there are fewer than 2 N - 1 encodings (then other images
            fit as well), the mixing falls apart into groups of images, whose signs are then unrelated, or a setting is
            out of its range.

    Examples:
        Four encodings of two images give both images away, although their signs were changed:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import decoding, defenses
        >>> images = jnp.array([[1.0, 0.8, 0.6], [-0.5, 0.4, 0.9]])
        >>> coefficients = jnp.array([[0.75, 0.25], [0.75, 0.25], [0.6, 0.4], [0.55, 0.45]])
        >>> mixing = defenses.Mixing(jnp.array([[0, 1], [1, 0], [0, 1], [1, 0]]), coefficients)
        >>> signs = jnp.array([[1, -1, 1], [-1, 1, 1], [1, 1, -1], [-1, -1, 1]])
        >>> encodings = signs * defenses.mix(mixing, images)
        >>> found = decoding.decode_instahide(jax.random.key(1), mixing, encodings, num_images=2)
        >>> bool(jnp.allclose(found.images, images, atol=0.02))
        True
    """
    _check.integer(num_restarts=num_restarts, num_steps=num_steps)
    _check.positive(tolerance=tolerance, weights=weights)
    _check.finite("tolerance", tolerance)
    _check.finite("weights", weights)
    _check.finite("encodings", encodings)
    matrix, flat, shape = system(mixing, encodings, num_images)
    if len(matrix) < 2 * num_images - 1:
        raise ValueError(f"encodings must be at least 2 * num_images - 1 = {2 * num_images - 1}, got {len(matrix)}")
    groups, _ = csgraph.connected_components(coo_matrix(np.asarray(matrix.T @ matrix)), directed=False)
    if groups > 1:
        raise ValueError(f"mixing must connect all images, got {groups} groups that never mix")
    if weights is not None:
        if weights.shape != mixing.sources.shape[:-1]:
            raise ValueError(f"weights must have shape {mixing.sources.shape[:-1]} like mixing, got {weights.shape}")
        root = jnp.sqrt(widened(weights)).reshape(-1, 1).astype(matrix.dtype)
        matrix, flat = root * matrix, root * flat
    images, residuals = retrieve(
        key, matrix, jnp.abs(flat), num_restarts=num_restarts, num_steps=num_steps, tolerance=tolerance
    )
    images, residuals = images.reshape(num_images, *shape), residuals.reshape(shape)
    solved = residuals <= tolerance
    images = synchronize(images, solved, bounds=bounds).astype(encodings.dtype)
    return InstaHideDecoding(images, residuals, solved)


def retrieve(
    key: PRNGKeyArray,
    matrix: Float[Array, "m n"],
    magnitudes: Float[Array, "m p"],
    *,
    num_restarts: int = 20,
    num_steps: int = 100,
    tolerance: float = 1e-3,
    relaxation: float = 0.7,
    batch_size: int = 512,
) -> tuple[Float[Array, "n p"], Float[Array, " p"]]:
    """Solves |M x| = magnitudes for every column of the magnitudes, each up to its sign.

    With P the projection onto the range of M, Q the one onto vectors of the given magnitudes and b the relaxation, a
    step is z <- b (z + Q(2 P z - z) - P z) + (1 - b) P z. Alternating projections, z <- Q(P z), stop at the nearest
    local minimum; these pass most of them.

    Args:
        key: Random key of the starts, which are random images x of unit variance.
        matrix: Matrix M, shape (m, n), of rank n.
        magnitudes: Magnitudes, not negative, shape (m, p), a column for each problem.
        num_restarts: Largest number of restarts of a column, at least 1.
        num_steps: Number of reflections in each restart, at least 1.
        tolerance: Relative residual at which a column is solved, above 0 and finite.
        relaxation: Relaxation b, in (0, 1].
        batch_size: Number of columns solved at a time, at least 1: memory is proportional to it.

    Returns:
        The columns x, shape (n, p), and their relative residuals, shape (p,), in float32 or wider.

    Raises:
        ValueError: If a count is no positive integer, the tolerance is not positive and finite, or the relaxation is
            outside (0, 1].

    Examples:
        The magnitudes of x = (1, -1) tell that its entries have opposite signs:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> matrix = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> columns, residuals = decoding.retrieve(jax.random.key(0), matrix, jnp.array([[1.0], [1.0], [0.0]]))
        >>> print(f"{columns[0, 0] * columns[1, 0]:.1f}")
        -1.0
    """
    _check.integer(num_restarts=num_restarts, num_steps=num_steps, batch_size=batch_size)
    _check.positive(tolerance=tolerance)
    _check.finite("tolerance", tolerance)
    if not 0 < relaxation <= 1:
        raise ValueError(f"relaxation must be in (0, 1], got {relaxation}")
    matrix, magnitudes = widened(matrix), widened(magnitudes)
    q, r = jnp.linalg.qr(matrix)

    def project(z: Array) -> Array:
        return jnp.matmul(q, jnp.matmul(q.T, z, precision="highest"), precision="highest")

    def solve(key: PRNGKeyArray, sizes: Float[Array, " m"]) -> tuple[Array, Array]:
        norm = jnp.maximum(jnp.linalg.norm(sizes), jnp.finfo(sizes.dtype).tiny)

        def signed(z: Array) -> Array:
            return jnp.where(z < 0, -sizes, sizes)

        def reflect(z: Array, _: None) -> tuple[Array, None]:
            near = project(z)
            return relaxation * (z + signed(2 * near - z) - near) + (1 - relaxation) * near, None

        def restart(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            count, best, least = carry
            start = jax.random.normal(jax.random.fold_in(key, count), (matrix.shape[1],), matrix.dtype)
            z, _ = jax.lax.scan(reflect, jnp.matmul(matrix, start), length=num_steps)
            z, _ = jax.lax.scan(lambda z, _: (project(signed(z)), None), project(z), length=POLISH)
            residual = jnp.linalg.norm(jnp.abs(z) - sizes) / norm
            better = residual < least
            return count + 1, jnp.where(better, z, best), jnp.where(better, residual, least)

        def unsolved(carry: tuple[Array, Array, Array]) -> Array:
            return (carry[0] < num_restarts) & (carry[2] > tolerance)

        first = (jnp.asarray(0), jnp.zeros_like(sizes), jnp.asarray(jnp.inf, sizes.dtype))
        _, z, residual = jax.lax.while_loop(unsolved, restart, first)
        return jax.scipy.linalg.solve_triangular(r, jnp.matmul(q.T, z, precision="highest")), residual

    keys = jax.random.split(key, magnitudes.shape[1])
    columns, residuals = jax.lax.map(lambda one: solve(*one), (keys, magnitudes.T), batch_size=batch_size)
    return columns.T, residuals


def synchronize(
    images: Float[Array, "n *d"],
    solved: Bool[Array, "*p"],
    *,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]] | None = None,
) -> Float[Array, "n *d"]:
    """Gives every pixel the sign that agrees with its neighbours, and all images together the likelier sign.

    Neighbours d and d' have equal signs where sum_n X[n, d] X[n, d'] > 0. The signs are followed along the spanning
    tree of the largest correlations, through solved pixels first. Assumption: in this space neighbouring pixels, and
    neighbouring channels of one, are positively correlated over the images. The last sign, of all images, is the one
    with less of them outside `bounds`; without bounds or with a tie the one with a brighter mean, which is a guess
    where the space is normalised to mean 0.

    Args:
        images: Images, shape (n, *d), every pixel with an arbitrary sign. Axes of d are places, and neighbours differ
            by at most 1 along each.
        solved: Which pixels to trust, shape d.
        bounds: Darkest and brightest pixel, broadcast against d. By default the brighter mean decides.

    Returns:
        The images with their signs. The function runs on the host and cannot be compiled.

    Raises:
        ValueError: If `solved` has another shape than an image.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> images = jnp.array([[1.0, -2.0, 3.0], [1.0, -1.0, 1.0]])
        >>> decoding.synchronize(images, jnp.ones(3, bool)).tolist()
        [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
    """
    if solved.shape != images.shape[1:]:
        raise ValueError(f"solved must have shape {images.shape[1:]} of an image, got {solved.shape}")
    values = np.asarray(widened(images))
    signs = _tree_signs(values, np.asarray(solved))
    found = values * signs
    trusted = found[:, np.asarray(solved)] if np.any(solved) else found
    outside = [0.0, 0.0]
    if bounds is not None:
        low, high = (np.broadcast_to(np.asarray(bound), values.shape[1:]) for bound in bounds)
        low, high = (bound[np.asarray(solved)] if np.any(solved) else bound for bound in (low, high))
        outside = [float(np.sum(np.maximum(0, low - s * trusted) + np.maximum(0, s * trusted - high))) for s in (1, -1)]
    flip = outside[0] > outside[1] if outside[0] != outside[1] else trusted.mean() < 0
    return jnp.asarray(-found if flip else found).astype(images.dtype)


def _tree_signs(values: np.ndarray, solved: np.ndarray) -> np.ndarray:
    """Returns signs +-1 of the pixels, relative to the first one, whose sign is 1."""
    shape = values.shape[1:]
    places = np.arange(solved.size).reshape(shape)
    unit = values / np.maximum(np.linalg.norm(values, axis=0), np.finfo(values.dtype).tiny)
    heads, tails, agreements = [], [], []
    # Half of all offsets, so that every pair of neighbours comes once.
    for offset in itertools.product((-1, 0, 1), repeat=len(shape)):
        if offset <= (0,) * len(shape):
            continue
        here: Any = tuple(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, shape))
        there: Any = tuple(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, shape))
        heads.append(places[here].ravel())
        tails.append(places[there].ravel())
        agreements.append(np.sum(unit[(slice(None), *here)] * unit[(slice(None), *there)], 0).ravel())
    head, tail, agreement = (np.concatenate(part) for part in (heads, tails, agreements))
    # A minimum spanning tree of costs, all above zero because a zero is no edge to SciPy; unsolved pixels come last.
    trusted = solved.ravel()[head] & solved.ravel()[tail]
    cost = 1.5 - np.abs(agreement) + 2 * ~trusted
    tree = csgraph.minimum_spanning_tree(coo_matrix((cost, (head, tail)), (solved.size, solved.size)))
    order, parents = csgraph.breadth_first_order(tree, 0, directed=False)
    signs = np.ones(solved.size, values.dtype)
    flat = unit.reshape(len(values), -1)
    for place in order[1:]:
        agree = np.dot(flat[:, place], flat[:, parents[place]]) >= 0
        signs[place] = signs[parents[place]] * (1 if agree else -1)
    return signs.reshape(shape)
