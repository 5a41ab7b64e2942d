"""InstaHide undone with a known mapping: signs of pixels, signs between pixels, and the last sign."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax.decoding import decode_instahide, mixing_matrix, retrieve, synchronize
from gia_jax.defenses import mix
from gia_jax.defenses.mixing import Mixing

SIZE = 8
BOUNDS = (-1.5, 2.5)


def smooth_images(seed):
    """Ramps of random direction with a bright corner beyond the mirrored box: neighbours agree, mean near 0."""
    weights = jax.random.normal(jax.random.key(seed), (SIZE, 3))
    place = jnp.linspace(-1, 1, 6)
    basis = jnp.stack([jnp.ones((6, 6)), *jnp.meshgrid(0.3 * place, 0.3 * place)])
    images = jnp.einsum("nb,bhw->nhw", weights, basis)[..., None] * jnp.array([1.0, 0.9])
    return jnp.clip(images, -1.5, None).at[0, 0, 0].set(2.4)


def epochs(seed, count, k=3, size=SIZE):
    """Drawn by NumPy, which compiles nothing: rows with themselves and k - 1 others."""
    rng = np.random.default_rng(seed)
    others = [
        [[i, *rng.permutation(np.delete(np.arange(size), i))[: k - 1]] for i in range(size)] for _ in range(count)
    ]
    coefficients = rng.dirichlet([3.0] + [1.0] * (k - 1), (count, size))
    return Mixing(jnp.asarray(others), jnp.asarray(coefficients))


def encode(mixing, images, seed=5):
    clear = jax.vmap(lambda one: mix(one, images))(mixing)
    return clear * jax.random.rademacher(jax.random.key(seed), clear.shape, clear.dtype)


def test_exact_encodings_give_the_images_with_all_signs_whatever_theirs_are(x64):
    mixing, images = epochs(0, 8), smooth_images(1)
    one, other = (
        decode_instahide(jax.random.key(2), mixing, encode(mixing, images, seed), SIZE, bounds=BOUNDS)
        for seed in (5, 6)
    )
    assert one.solved.all()
    np.testing.assert_allclose(one.images, images, atol=1e-3)
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.residuals, other.residuals)


def test_columns_are_retrieved_up_to_a_sign_each_and_compile(x64):
    matrix = mixing_matrix(epochs(0, 6), SIZE)
    columns = jax.random.normal(jax.random.key(1), (SIZE, 40))
    run = jax.jit(lambda key, sizes: retrieve(key, matrix, sizes, tolerance=1e-6, num_steps=150, batch_size=16))
    found, residuals = run(jax.random.key(2), jnp.abs(matrix @ columns))
    assert residuals.max() < 1e-6
    np.testing.assert_allclose(found * jnp.sign(jnp.sum(found * columns, 0)), columns, atol=1e-4)


def test_vmap_over_sets_of_magnitudes(x64):
    matrix = mixing_matrix(epochs(0, 6), SIZE)
    sizes = jnp.abs(matrix @ jax.random.normal(jax.random.key(1), (2, SIZE, 5)))
    keys = jax.random.split(jax.random.key(3), 2)
    solve = jax.jit(lambda key, size: retrieve(key, matrix, size, num_restarts=2, num_steps=20)[0])
    together = jax.jit(jax.vmap(solve))(keys, sizes)
    for i in range(2):
        np.testing.assert_allclose(together[i], solve(keys[i], sizes[i]), atol=1e-8)


def test_noise_is_unsolved():
    mixing = epochs(0, 8)
    noise = jax.random.normal(jax.random.key(1), (8, SIZE, 3, 3, 1))
    decoding = decode_instahide(jax.random.key(2), mixing, noise, SIZE, num_restarts=2, num_steps=20)
    assert not decoding.solved.any()
    assert decoding.residuals.min() > 0.1
    assert jnp.isfinite(decoding.images).all()


def test_weights_silence_a_bad_epoch(x64):
    mixing, images = epochs(0, 9), smooth_images(1)
    encodings = encode(mixing, images).at[-1].set(3.0)
    weights = jnp.ones((9, SIZE)).at[-1].set(1e-12)
    settings = {"bounds": BOUNDS, "num_restarts": 5}
    trusted = decode_instahide(jax.random.key(2), mixing, encodings, SIZE, weights=weights, **settings)
    naive = decode_instahide(jax.random.key(2), mixing, encodings, SIZE, **settings)
    np.testing.assert_allclose(trusted.images, images, atol=1e-2)
    assert jnp.mean(jnp.square(naive.images - images)) > 1e-2


def test_shuffled_signs_are_found_again():
    images = smooth_images(3)
    signs = jax.random.rademacher(jax.random.key(1), images.shape[1:], images.dtype)
    for flip in (1, -1):
        found = synchronize(flip * signs * images, jnp.ones(signs.shape, bool), bounds=BOUNDS)
        np.testing.assert_array_equal(found, images)


def test_without_bounds_the_brighter_sign_is_taken():
    images = smooth_images(3)
    found = synchronize(images, jnp.ones(images.shape[1:], bool))
    np.testing.assert_array_equal(found, images * jnp.sign(images.mean()))


def test_unsolved_pixels_do_not_cut_the_others_apart():
    images = smooth_images(3)
    solved = jnp.ones(images.shape[1:], bool).at[2, :5].set(False)
    broken = images.at[:, 2, :5].set(jax.random.normal(jax.random.key(0), (SIZE, 5, 2)))
    signs = jax.random.rademacher(jax.random.key(1), solved.shape, images.dtype)
    found = synchronize(signs * broken, solved, bounds=BOUNDS)
    np.testing.assert_array_equal(found[:, solved], images[:, solved])


def test_what_is_not_determined_is_named():
    with pytest.raises(ValueError, match=r"at least 2 \* num_images - 1 = 15, got 8"):
        decode_instahide(jax.random.key(0), epochs(1, 1), jnp.ones((1, SIZE, 2)), SIZE)
    with pytest.raises(ValueError, match="mixing must connect all images, got 8 groups"):
        decode_instahide(jax.random.key(0), epochs(0, 2, k=1), jnp.ones((2, SIZE, 2)), SIZE)
    repeated = jax.tree.map(lambda leaf: jnp.tile(leaf[:1, :3], (3, 2, 1)), epochs(0, 1))
    with pytest.raises(ValueError, match="mixing must have rank num_images=8, got 3"):
        decode_instahide(jax.random.key(0), repeated, jnp.ones((3, 6, 2)), SIZE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_restarts": 0}, "num_restarts must be an integer of at least 1, got 0"),
        ({"num_steps": -1}, "num_steps must be an integer of at least 1, got -1"),
        ({"tolerance": 0.0}, "tolerance must be positive, got 0"),
        ({"weights": jnp.zeros((2, SIZE))}, "weights must be positive, got 0"),
        ({"weights": jnp.ones(SIZE)}, r"weights must have shape \(2, 8\) like mixing, got \(8,\)"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        decode_instahide(jax.random.key(0), epochs(0, 2), jnp.ones((2, SIZE, 2)), SIZE, **arguments)


def test_bad_values_and_shapes_are_named():
    with pytest.raises(ValueError, match="encodings must be finite, got nan"):
        decode_instahide(jax.random.key(0), epochs(0, 2), jnp.full((2, SIZE, 2), jnp.nan), SIZE)
    with pytest.raises(ValueError, match=r"solved must have shape \(4, 4\) of an image, got \(4,\)"):
        synchronize(jnp.ones((2, 4, 4)), jnp.ones(4, bool))
    short = Mixing(jnp.zeros((3, 2), int), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"encodings must have shape \(3,\) \+ d like mixing, got \(2, 4\)"):
        decode_instahide(jax.random.key(0), short, jnp.ones((2, 4)), 2)
