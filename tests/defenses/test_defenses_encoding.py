"""MixUp and InstaHide: what is mixed, how much, and what a client makes of it."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gia_jax import Batch, ThreatModel, clients, models, observe
from gia_jax.defenses import draw_mixing, instahide, mix, mixup

IMAGES = jax.random.normal(jax.random.key(0), (6, 4, 4, 3))
LABELS = jnp.array([0, 1, 2, 2, 1, 0])
BATCH = Batch(IMAGES, LABELS)


@pytest.mark.parametrize("defense", [mixup, instahide])
def test_images_of_whole_numbers_are_refused(defense):
    """Their coefficients would be whole as well: 0, and a client that shares nothing looks well defended."""
    with pytest.raises(ValueError, match=r"batch\.inputs must be of a floating type, got uint8"):
        defense(3, k=3)(jax.random.key(0), Batch(jnp.ones((6, 4, 4, 3), jnp.uint8), LABELS))


drawn = jax.jit(draw_mixing, static_argnums=1, static_argnames=("k", "high"))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**20))
def test_rows_mix_themselves_with_distinct_others_and_add_up(k, seed):
    high = 1.0 if k == 1 else 0.65
    mixing = drawn(jax.random.key(seed), 6, k=k, high=high)
    sources, coefficients = np.asarray(mixing.sources), np.asarray(mixing.coefficients)
    assert (sources[:, 0] == np.arange(6)).all()
    assert all(len(set(row)) == k and 0 <= min(row) <= max(row) < 6 for row in sources.tolist())
    np.testing.assert_allclose(coefficients.sum(1), 1, rtol=1e-5)
    assert coefficients.min() >= 0
    assert coefficients.max() <= high + 1e-6


def test_coefficients_have_the_law_of_the_paper():
    keys = jax.random.split(jax.random.key(0), 500)
    free = jax.vmap(lambda key: draw_mixing(key, 6, k=4).coefficients)(keys)
    # The first marginal of Dirichlet(3, 1, 1, 1) is Beta(3, 3), the others are Beta(1, 5).
    assert stats.kstest(np.ravel(free[..., 0]), stats.beta(3, 3).cdf).pvalue > 1e-3
    assert stats.kstest(np.ravel(free[..., 2]), stats.beta(1, 5).cdf).pvalue > 1e-3
    bounded = jax.vmap(lambda key: draw_mixing(key, 6, k=4, low=0.05, high=0.5).coefficients)(keys)
    assert (bounded.min(), bounded.max()) == (pytest.approx(0.05, abs=0.02), pytest.approx(0.5, abs=0.02))
    # Conditioning is not clipping: no mass at the bounds.
    assert np.mean(bounded == 0.5) == 0


def test_partners_are_uniform():
    keys = jax.random.split(jax.random.key(0), 2_000)
    partners = np.asarray(jax.vmap(lambda key: draw_mixing(key, 4, k=2).sources[0, 1])(keys))
    assert stats.chisquare(np.bincount(partners, minlength=4)[1:]).pvalue > 1e-3
    assert (partners != 0).all()


def test_encodings_are_the_sums_by_hand():
    mixing = draw_mixing(jax.random.key(1), 6, k=3)
    for i, (row, weights) in enumerate(zip(*map(np.asarray, mixing), strict=True)):
        by_hand = sum(w * np.asarray(IMAGES[s]) for s, w in zip(row, weights, strict=True))
        np.testing.assert_allclose(mix(mixing, IMAGES)[i], by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [mixup, instahide])
def test_labels_are_mixed_like_images(make):
    # Images that show their class: what is mixed into an encoding can be read off it.
    shown = Batch(jax.nn.one_hot(LABELS, 3), LABELS)
    encoded = make(3, k=3)(jax.random.key(0), shown)
    np.testing.assert_allclose(np.abs(encoded.inputs), encoded.labels, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(encoded.labels.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("make", [mixup, instahide])
def test_epochs_and_clients_draw_differently_and_keys_repeat(make):
    encode = make(3, k=2)
    keys = jax.random.split(jax.random.key(0), 2)
    both = jax.jit(jax.vmap(encode, (0, None)))(keys, BATCH)
    assert not np.allclose(both.inputs[0], both.inputs[1])
    np.testing.assert_allclose(both.inputs[0], encode(keys[0], BATCH).inputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [mixup, instahide])
def test_types_are_kept(make):
    half = Batch(IMAGES.astype(jnp.bfloat16), LABELS)
    encoded = make(3, k=2)(jax.random.key(0), half)
    assert encoded.inputs.dtype == encoded.labels.dtype == jnp.bfloat16


def test_one_image_is_left_as_it_is():
    encoded = mixup(3, k=1)(jax.random.key(0), BATCH)
    np.testing.assert_allclose(encoded.inputs, IMAGES, rtol=1e-6)
    np.testing.assert_array_equal(encoded.labels, jax.nn.one_hot(LABELS, 3))


def test_labels_that_are_probabilities_are_mixed_again():
    once = mixup(3, k=2)(jax.random.key(0), BATCH)
    twice = mixup(3, k=2)(jax.random.key(1), once)
    np.testing.assert_allclose(twice.labels.sum(1), 1, rtol=1e-5)


def test_signs_are_fresh_for_every_pixel_and_every_encoding():
    encoded = instahide(3, k=1)(jax.random.key(0), BATCH)
    signs = np.asarray(jnp.sign(encoded.inputs * IMAGES))
    np.testing.assert_allclose(np.abs(encoded.inputs), np.abs(IMAGES), rtol=1e-6)
    assert abs(signs.mean()) < 4 / np.sqrt(signs.size)
    for other in range(1, 6):
        assert abs(np.mean(signs[0] * signs[other])) < 4 / np.sqrt(signs[0].size)


def test_public_images_are_mixed_without_labels():
    # Private images live in the first half of the features, public ones in the second.
    private = Batch(jnp.concatenate([jax.nn.one_hot(LABELS, 3), jnp.zeros((6, 5))], 1), LABELS)
    public = jnp.concatenate([jnp.zeros((5, 3)), jnp.eye(5)], 1)
    encoded = instahide(3, k=5, public=public)(jax.random.key(0), private)
    size = np.abs(encoded.inputs)
    np.testing.assert_allclose(size[:, :3], encoded.labels, rtol=1e-5, atol=1e-6)
    assert (np.count_nonzero(size[:, 3:], axis=1) == 2).all()  # 3 of 5 are private
    np.testing.assert_allclose(size.sum(1), 1, rtol=1e-5)
    assert (np.asarray(encoded.labels.sum(1)) < 1).all()


@pytest.mark.parametrize("make", [mixup, instahide])
def test_a_client_takes_encodings(make):
    apply_fn, params = models.functional(models.MLP((4, 4, 3), 3, hidden=(5,), rngs=nnx.Rngs(0)))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    encoded = make(3, k=2)(jax.random.key(0), BATCH)
    threat = ThreatModel(labels=True, label_order=True)
    observation = observe(jax.random.key(1), threat, client_fn, params, encoded, num_classes=3)
    np.testing.assert_array_equal(observation.extra["labels"], encoded.labels)
    plain = client_fn(params, BATCH)
    assert not np.allclose(observation.update["head"]["kernel"], plain["head"]["kernel"])


@pytest.mark.parametrize("make", [mixup, instahide])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be an integer from 1 to 10000, got 0"),
        ({"k": 2.5}, r"k must be an integer from 1 to 10000, got 2\.5"),
        ({"k": 2.0}, r"k must be an integer from 1 to 10000, got 2\.0"),
        ({"k": 1, "low": 5, "high": -1}, r"low must be in \[0, 1\], got 5"),
        ({"k": 1, "high": -1.0}, r"high must be in \[low, 1\] = \[0\.0, 1\], got -1\.0"),
        ({"low": 0.3, "high": 0.2}, r"high must be in \[low, 1\] = \[0\.3, 1\], got 0\.2"),
        ({"high": 1.5}, r"high must be in \[low, 1\] = \[0\.0, 1\], got 1\.5"),
        ({"low": float("nan")}, r"low must be in \[0, 1\], got nan"),
        ({"k": 4, "high": 0.2}, r"low=0.0 and high=0.2 admit fewer than one in 1,000 draws of k=4"),
        ({"k": 4, "low": 0.3, "high": 0.9}, r"low=0.3 and high=0.9 admit fewer than one in 1,000 draws of k=4"),
        ({"k": 4, "high": 0.2501}, "admit fewer than one in 1,000 draws"),
    ],
)
def test_settings_that_nothing_satisfies_are_named(make, arguments, message, monkeypatch):
    # Without the type checker of the tests, which would see some first; k=2 to have passed before k=2.0 does not.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    make(3, k=2)
    with pytest.raises(ValueError, match=message):
        make(3, **arguments)


@pytest.mark.parametrize("make", [mixup, instahide])
@pytest.mark.parametrize("num_classes", [-3, 0, 2.5])
def test_numbers_of_classes_are_named(make, num_classes, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"num_classes must be an integer of at least 1, got {num_classes}"):
        make(num_classes)(jax.random.key(0), BATCH)


@pytest.mark.parametrize("make", [mixup, instahide])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (jnp.array([[3], [1], [2]]), r"batch\.labels of shape \(3, 1\) must be probabilities, got int32"),
        (jnp.array([[3.0], [1.0], [2.0]]), r"batch\.labels must have 3 columns, got 1"),
        (jnp.full((3, 2), 0.5), r"batch\.labels must have 3 columns, got 2"),
        (jnp.full((3, 3), 0.5), r"batch\.labels must add up to at most 1 in each row, got 1\.5"),
        (jnp.eye(3).at[0, 0].set(-1.0), r"batch\.labels must not be negative, got -1\.0"),
        (jnp.eye(3).at[0, 0].set(jnp.nan), r"batch\.labels must be finite, got nan"),
        (jnp.array([0, 7, 1]), r"batch\.labels must be at least 0 and below 3, got 7"),
        (jnp.array([0, -1, 1]), r"batch\.labels must be at least 0 and below 3, got -1"),
        (jnp.array([0, 1]), r"batch\.labels must have shape \(3,\) or \(3, 3\), got \(2,\)"),
    ],
)
def test_labels_that_are_none_are_named(make, labels, message):
    with pytest.raises(ValueError, match=message):
        make(3, k=2)(jax.random.key(0), Batch(IMAGES[:3], labels))


def test_too_few_images_are_named():
    with pytest.raises(ValueError, match="k=4 needs as many images, got 3"):
        mixup(3, k=4)(jax.random.key(0), Batch(IMAGES[:3], LABELS[:3]))
    with pytest.raises(ValueError, match="k=6 needs 3 private images, got 2"):
        instahide(3, k=6, public=IMAGES)(jax.random.key(0), Batch(IMAGES[:2], LABELS[:2]))


def test_no_more_is_drawn_than_the_images_ask_for():
    with pytest.raises(ValueError, match="k must be an integer from 1 to 10000, got 99999"):
        mixup(3, k=99_999)
    with pytest.raises(ValueError, match="k=9999 needs as many images, got 3"):
        mixup(3, k=9_999)(jax.random.key(0), Batch(IMAGES[:3], LABELS[:3]))
    with pytest.raises(ValueError, match=r"size must fit into memory: it needs .* GiB of .* GiB, got 10000000"):
        draw_mixing(jax.random.key(0), 10**7, k=2)
    with pytest.raises(ValueError, match=r"num_classes must fit into memory: it needs .* GiB, got 1000000000000"):
        mixup(10**12, k=2)(jax.random.key(0), Batch(IMAGES[:3], LABELS[:3]))


def test_targets_that_are_no_classes_are_not_mixed():
    with pytest.raises(ValueError, match=r"batch\.labels must be class indices .* to be mixed, got a dict"):
        mixup(3, k=2)(jax.random.key(0), Batch(IMAGES[:3], {"age": jnp.zeros(3)}))


def test_bad_public_images_are_named():
    with pytest.raises(ValueError, match="public must have at least 3 images, got 2"):
        instahide(3, k=6, public=IMAGES[:2])
    with pytest.raises(ValueError, match="public must be finite, got nan"):
        instahide(3, k=2, public=IMAGES.at[0, 0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"public must have images of shape \(4, 4, 3\), got \(2, 4, 3\)"):
        instahide(3, k=2, public=IMAGES[:, :2])(jax.random.key(0), BATCH)
