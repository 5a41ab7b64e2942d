"""Finds which private images each InstaHide encoding mixes, from encodings alone: similarity, threshold, clusters.

Carlini et al., An Attack on InstaHide: Is Private Learning Possible with Instance Encoding?, arXiv 2011.05315, section
4.2, train a network to tell whether two encodings share an image. Nothing is trained here: signs vanish from squares,
and squares are whitened by those of public encodings, so that what all natural images have in common counts little.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from scipy.optimize import nnls

from gia_jax import _check
from gia_jax.decoding.instahide import retrieve
from gia_jax.decoding.mixup import mixing_matrix
from gia_jax.defenses.mixing import Mixing
from gia_jax.precision import widened

EPSILON = 1e-12  # keeps a factor's update from dividing by zero
JITTER = 1e-4  # gives images that no encoding is thought to mix a rank


def similarity(
    encodings: Float[Array, "m *d"], public: Float[Array, "q *p"], *, ridge: float = 0.03
) -> Float[Array, "m m"]:
    """Computes the cosines of the encodings' squares, centred and whitened by those of public encodings.

    Squares e^2 of two encodings that share an image x with coefficients a and b share a^2 b^2 <x^2, x^2>. Squares of
    natural images are alike in a few smooth patterns, which hide that: whitened, all pixels count alike.

    Threat model: whoever has the encodings, knows the scheme, and has public images like the private ones to encode.

    Args:
        encodings: Encodings of private images, shape (m, *d); signs play no part.
        public: Encodings that the attacker made of public images by the same scheme, shape (q, *d). As many as pixels
            or more are of use, and two are needed.
        ridge: Share of the covariance's mean variance that is added to the covariance, above 0 and finite.

    Returns:
        The similarity of every pair of encodings, shape (m, m), in [-1, 1], about 0 where no image is shared.

    Raises:
        ValueError: If shapes differ, there are fewer than two public encodings, or `ridge` is not positive and finite.

    Examples:
        Signs of the encodings play no part:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> public = jax.random.normal(jax.random.key(0), (8, 4))
        >>> encodings = jax.random.normal(jax.random.key(1), (3, 4))
        >>> values = decoding.similarity(encodings, public)
        >>> values.shape, bool(jnp.array_equal(values, decoding.similarity(-encodings, public)))
        ((3, 3), True)
    """
    _check.positive(ridge=ridge)
    _check.finite("ridge", ridge)
    if encodings.shape[1:] != public.shape[1:]:
        raise ValueError(f"public must have shape (q, *{encodings.shape[1:]}) like encodings, got {public.shape}")
    if len(public) < 2:
        raise ValueError(f"public must have at least 2 encodings, got {len(public)}")
    known = jnp.square(widened(public).reshape(len(public), -1))
    mean = jnp.mean(known, 0)
    covariance = jnp.matmul((known - mean).T, known - mean) / len(known)
    size = len(covariance)
    factor = jnp.linalg.cholesky(covariance + ridge * jnp.trace(covariance) / size * jnp.eye(size, dtype=mean.dtype))
    squares = jnp.square(widened(encodings).reshape(len(encodings), -1)) - mean
    white = jax.scipy.linalg.solve_triangular(factor, squares.T, lower=True)
    white /= jnp.maximum(jnp.linalg.norm(white, axis=0), EPSILON)
    return jnp.matmul(white.T, white)


def same_source(matrix: Float[Array, "m n"]) -> Bool[Array, "m m"]:
    """Tells which pairs of encodings share an image.

    Args:
        matrix: Matrix of coefficients, shape (m, n), from `mixing_matrix`, which is known.

    Returns:
        A boolean for every pair of encodings, shape (m, m).

    Examples:
        Encodings 0 and 1 share image 1, and encodings 1 and 2 share image 2:

        >>> import jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> matrix = jnp.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.5, 0.5]])
        >>> decoding.same_source(matrix).astype(int).tolist()
        [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """
    mixed = (matrix > 0).astype(jnp.float32)
    return jnp.matmul(mixed, mixed.T) > 0


def precision_recall(
    predicted: Bool[Array, "m m"], truth: Bool[Array, "m m"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes the share of predicted pairs of different encodings that are true, and of true ones that are predicted.

    Args:
        predicted: Predicted pairs, shape (m, m), a symmetric matrix whose diagonal plays no part.
        truth: True pairs, a matrix of the same kind.

    Returns:
        Precision and recall, in [0, 1]. Precision is NaN where nothing is predicted, and recall where nothing is true.

    Examples:
        Both pairs that were predicted are true, and one of three true pairs was missed:

        >>> import jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> truth = jnp.ones((3, 3), bool)
        >>> predicted = truth.at[0, 2].set(False).at[2, 0].set(False)
        >>> precision, recall = decoding.precision_recall(predicted, truth)
        >>> print(f"{precision:.2f} {recall:.2f}")
        1.00 0.67
    """
    pairs = ~jnp.eye(len(truth), dtype=bool)
    hits = jnp.sum(predicted & truth & pairs)
    return hits / jnp.sum(predicted & pairs), hits / jnp.sum(truth & pairs)


def calibrated_threshold(values: Float[Array, "m m"], truth: Bool[Array, "n n"]) -> Float[Array, ""]:
    """Finds the similarity above which as many pairs lie as are true, so that precision equals recall.

    Args:
        values: Similarities of encodings that the attacker made of public images, shape (m, m).
        truth: Their `same_source`, shape (m, m). Never the victim's: its pairs are what the threshold is for.

    Returns:
        The threshold, the least similarity among those pairs.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        One of the three pairs is true, so the threshold is the largest similarity:

        >>> import jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> values = jnp.array([[1.0, 0.75, 0.25], [0.75, 1.0, 0.0], [0.25, 0.0, 1.0]])
        >>> truth = jnp.eye(3, dtype=bool).at[0, 1].set(True).at[1, 0].set(True)
        >>> float(decoding.calibrated_threshold(values, truth))
        0.75
    """
    if values.shape != truth.shape:
        raise ValueError(f"truth must have shape {values.shape} like values, got {truth.shape}")
    rows, columns = np.triu_indices(len(values), 1)
    ordered = jnp.sort(values[rows, columns])
    count = jnp.sum(truth[rows, columns])
    return ordered[jnp.clip(len(ordered) - count, 0, len(ordered) - 1)]


def recover_mixing(
    key: PRNGKeyArray,
    values: Float[Array, "m m"],
    num_images: int,
    *,
    k: int,
    num_restarts: int = 4,
    num_steps: int = 1_000,
) -> Mixing:
    """Finds overlapping clusters of the encodings as a mixing: W >= 0 with values close to W W^T off the diagonal.

    Entry (i, n) of W grows with the square of the coefficient of image n in encoding i. W is found by multiplicative
    updates from random starts, the closest one is kept, and the k largest entries of each row become its sources.

    Args:
        key: Random key of the starts.
        values: Similarities of the encodings, from `similarity`, shape (m, m).
        num_images: Number N of images, of which there are as many clusters, in an order of their own.
        k: Number of images in an encoding, from 1 to N.
        num_restarts: Number of random starts, at least 1.
        num_steps: Number of updates from each start, at least 1.

    Returns:
        The mixing, shape (m, k). Its coefficients are rough: roots of the entries, adding up to 1. Unlike a drawn
        mixing it lists sources by coefficient.

    Raises:
        ValueError: If `k` is no integer from 1 to N, or a count is no positive integer or too large for memory.

    Examples:
        Two encodings of one image and two of another are told apart:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import decoding
        >>> values = jnp.kron(jnp.eye(2), jnp.ones((2, 2)))
        >>> found = decoding.recover_mixing(jax.random.key(0), values, num_images=2, k=1, num_steps=100)
        >>> (found.sources == found.sources[0]).ravel().tolist()
        [True, True, False, False]
    """
    _check.integer(num_images=num_images, num_restarts=num_restarts, num_steps=num_steps)
    _check.integer(1, num_images, k=k)
    _check.fits(len(values) * num_images, num_images=num_images)
    _check.fits(len(values) * num_images * num_restarts, num_restarts=num_restarts)
    values = widened(values)
    off = 1 - jnp.eye(len(values), dtype=values.dtype)
    above, below = off * jnp.maximum(values, 0), off * jnp.maximum(-values, 0)

    def update(w: Array, _: None) -> tuple[Array, None]:
        # The root of the usual ratio: in a model that is quadratic in W full steps overshoot.
        ratio = above @ w / ((off * (w @ w.T) + below) @ w + EPSILON)
        return w * jnp.sqrt(ratio), None

    def start(key: PRNGKeyArray) -> tuple[Array, Array]:
        scale = 2 * jnp.sqrt(jnp.mean(above) / num_images)
        w = scale * jax.random.uniform(key, (len(values), num_images), values.dtype)
        w, _ = jax.lax.scan(update, w, length=num_steps)
        return w, jnp.sum(jnp.square(off * (values - w @ w.T)))

    found, losses = jax.lax.map(start, jax.random.split(key, num_restarts))
    weights, sources = jax.lax.top_k(found[jnp.argmin(losses)], k)
    roots = jnp.sqrt(weights) + EPSILON
    return Mixing(sources, roots / jnp.sum(roots, 1, keepdims=True))


def refine_mixing(
    key: PRNGKeyArray,
    mixing: Mixing,
    encodings: Float[Array, "m *d"],
    num_images: int,
    *,
    num_rounds: int = 6,
    num_pixels: int = 256,
) -> Mixing:
    """Corrects a rough mixing by turns: some pixels of the images given the mixing, the mixing given these.

    The first half is `retrieve`. The second fits every encoding by itself, |e| = |lambda X| with lambda >= 0: squares
    first, e^2 ~ lambda^2 X^2, which is convex and needs no start, then alternating signs and non-negative least
    squares; the k largest stay. An encoding that was wrongly mapped hardly moves the images, which fit many others, and
    so finds its true sources. Later rounds trust encodings by their residual; one that fits worse than the best
    is undone, and the next starts with the two images that are most alike made one, and a free one for the worst fits.

    Args:
        key: Random key of the choice of pixels and of `retrieve`.
        mixing: Rough mixing from `recover_mixing`, shape (m, k).
        encodings: Encodings of private images, shape (m, *d); signs play no part.
        num_images: Number N of private images.
        num_rounds: Number of rounds, at least 1. The mixing of the one with the least mean residual is returned.
        num_pixels: Number of pixels and channels used, chosen at random, at least 1. All are used where there are
            fewer.

    Returns:
        The mixing, shape (m, k), with coefficients that add up to 1. The function is host code around `retrieve`.

    Raises:
        ValueError: If lengths differ, or a count is no positive integer.

    Examples:
        The refined mixing has the form of the rough one, and its coefficients add up to 1:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import decoding, defenses
        >>> images = jax.random.normal(jax.random.key(0), (2, 8))
        >>> sources = jnp.array([[0, 1], [1, 0], [0, 1], [1, 0]])
        >>> true = defenses.Mixing(sources, jnp.array([[0.75, 0.25], [0.75, 0.25], [0.6, 0.4], [0.55, 0.45]]))
        >>> rough = true._replace(coefficients=jnp.array([[0.7, 0.3]] * 4))
        >>> found = decoding.refine_mixing(jax.random.key(1), rough, defenses.mix(true, images), 2, num_rounds=1)
        >>> found.sources.shape, bool(jnp.allclose(found.coefficients.sum(1), 1))
        ((4, 2), True)
    """
    _check.integer(num_rounds=num_rounds, num_pixels=num_pixels)
    _check.fits(2 * num_rounds, num_rounds=num_rounds)
    if len(encodings) != len(mixing.sources):
        raise ValueError(f"encodings must be {len(mixing.sources)} like mixing, got {len(encodings)}")
    key_pixels, *keys = jax.random.split(key, num_rounds + 1)
    flat = jnp.abs(widened(encodings)).reshape(len(encodings), -1)
    sizes = flat[:, jax.random.permutation(key_pixels, flat.shape[1])[:num_pixels]]
    weights, best, least, reseeded = np.ones(len(flat)), mixing, np.inf, mixing
    for key_round in keys:
        key_jitter, key_retrieve = jax.random.split(key_round)
        matrix = mixing_matrix(mixing, num_images).astype(flat.dtype)
        matrix += JITTER * jax.random.uniform(key_jitter, matrix.shape, matrix.dtype)
        root = jnp.sqrt(jnp.asarray(weights, flat.dtype))[:, None]
        images, _ = retrieve(key_retrieve, root * matrix, root * sizes, num_restarts=3, num_steps=60, tolerance=1e-2)
        fits = [_fit(np.asarray(images), size, mixing.sources.shape[1]) for size in np.asarray(sizes)]
        sources, coefficients, residuals = (np.stack(part) for part in zip(*fits))
        mixing = Mixing(jnp.asarray(sources), jnp.asarray(coefficients, flat.dtype))
        if residuals.mean() < least:
            best, least, reseeded = mixing, residuals.mean(), _reseed(np.asarray(images), mixing, residuals)
            # Never more than twice the trust of the median, or a few encodings determine the images by themselves.
            weights = 1 / (np.square(residuals) + np.median(residuals) ** 2 + EPSILON)
            weights /= weights.mean()
        else:
            mixing, weights = reseeded, np.ones(len(flat))
    return best


def _reseed(images: np.ndarray, mixing: Mixing, residuals: np.ndarray) -> Mixing:
    """Makes one image of the two most alike, and gives the place of the other to the encodings that fit worst.

    A cluster split in two leaves another image without one. Signs of pixels are common to all images and cancel.
    """
    unit = images / np.maximum(np.linalg.norm(images, axis=1, keepdims=True), EPSILON)
    kept, freed = divmod(int(np.argmax(np.abs(np.triu(unit @ unit.T, 1)))), len(images))
    sources, coefficients = np.array(mixing.sources), np.array(mixing.coefficients)
    sources[sources == freed] = kept
    worst = np.argsort(-residuals)[: len(sources) // len(images)]
    sources[worst, -1] = freed  # in place of the smallest coefficient
    coefficients[worst, -1] = np.maximum(coefficients[worst, -1], 1 / (2 * sources.shape[1]))
    return Mixing(jnp.asarray(sources), jnp.asarray(coefficients / coefficients.sum(1, keepdims=True)))


def _fit(images: np.ndarray, size: np.ndarray, k: int, num_steps: int = 8) -> tuple[np.ndarray, np.ndarray, float]:
    """Finds the k sources of one encoding, their coefficients, and the relative residual."""
    squared, _ = nnls(np.square(images).T, np.square(size))
    found = np.sqrt(squared)
    for _ in range(num_steps):
        found, _ = nnls(images.T, np.where(found @ images < 0, -size, size))
    sources = np.argsort(-found)[:k]
    coefficients = found[sources] / max(found[sources].sum(), EPSILON)
    residual = np.linalg.norm(np.abs(coefficients @ images[sources]) - size) / max(np.linalg.norm(size), EPSILON)
    return sources, coefficients, float(residual)
