"""The vision transformer: against the formula, its published size, its derivatives, and what it refuses."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from gia_jax import Batch, Observation, clients, models
from gia_jax.metrics.diagnosis.layers import find_kinks
from gia_jax.models.vit import from_patches, patches

SETTINGS = {"patch_size": 2, "width": 8, "depth": 2, "heads": 2, "mlp_ratio": 3}
SHAPE = (4, 6, 2)


def built(first_block="residual"):
    """A network with weights in float64 and no bias or scale that is 0 or 1."""
    module = models.ViT(SHAPE, 3, **SETTINGS, first_block=first_block, rngs=nnx.Rngs(0))
    apply_fn, params = models.functional(module)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return apply_fn, jax.tree.unflatten(tree, [leaf + 0.3 * rng.normal(size=leaf.shape) for leaf in leaves])


def by_hand(params, image, first_block):
    """The logits of one image, one head after the other, in NumPy."""

    def dense(x, layer):
        return x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])

    def norm(x, layer):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * np.asarray(layer["scale"]) + np.asarray(layer["bias"])

    def attention(x, layer):
        total = np.asarray(layer["out"]["bias"])
        for head in range(SETTINGS["heads"]):
            query, key, value = (
                x @ np.asarray(layer[name]["kernel"])[:, head] + np.asarray(layer[name]["bias"])[head]
                for name in ("query", "key", "value")
            )
            weights = scipy.special.softmax(query @ key.T / np.sqrt(query.shape[1]), -1)
            total = total + weights @ value @ np.asarray(layer["out"]["kernel"])[head]
        return total

    cut = [image[i : i + 2, j : j + 2].ravel() for i in range(0, 4, 2) for j in range(0, 6, 2)]
    x = np.concatenate([np.asarray(params["class_token"]), dense(np.stack(cut), params["patch"])])
    x = x + np.asarray(params["position"])
    for i in range(SETTINGS["depth"]):
        block = params[f"block{i}"]
        if i == 0 and first_block == "plain":
            x = attention(x, block["attention"])
        else:
            x = x + attention(norm(x, block["norm0"]), block["attention"])
        hidden = dense(norm(x, block["norm1"]), block["dense0"])
        hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + dense(hidden, block["dense1"])
    return dense(norm(x[0], params["norm"]), params["head"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("first_block", ["residual", "plain"])
def test_the_logits_are_those_of_the_formula_to_float64(first_block):
    apply_fn, params = built(first_block)
    images = np.random.default_rng(1).normal(size=(2, *SHAPE))
    found = jax.jit(apply_fn)(params, images)
    for logits, image in zip(found, images, strict=True):
        np.testing.assert_allclose(logits, by_hand(params, image, first_block), rtol=1e-9)


def test_the_published_base_network_has_its_size():
    """ViT-B/16 for 224x224 pixels and 1,000 classes has 86,567,656 parameters."""
    module = nnx.eval_shape(
        lambda: models.ViT((224, 224, 3), 1000, patch_size=16, width=768, depth=12, heads=12, rngs=nnx.Rngs(0))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))) == 86_567_656


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("first_block", ["residual", "plain"])
def test_the_clients_second_derivatives_are_those_of_differences(first_block):
    apply_fn, params = built(first_block)
    gradient_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    rng = np.random.default_rng(2)
    images, along = (jnp.asarray(rng.normal(size=(1, *SHAPE))) for _ in range(2))
    weights = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)

    @jax.jit
    def value(images):
        gradient = gradient_fn(params, Batch(images, jnp.array([1])))
        return sum(jnp.vdot(w, g) for w, g in zip(*map(jax.tree.leaves, (weights, gradient)), strict=True))

    slope = float(jnp.vdot(jax.jit(jax.grad(value))(images), along))
    step = 1e-5
    difference = float(value(images + step * along) - value(images - step * along)) / (2 * step)
    assert slope == pytest.approx(difference, rel=1e-6)


def test_the_network_is_smooth():
    apply_fn, params = models.functional(models.ViT(SHAPE, 3, **SETTINGS, rngs=nnx.Rngs(0)))
    assert find_kinks(apply_fn, Observation(params, params, {"inputs_like": jnp.zeros((1, *SHAPE))})) == ()


def test_patches_are_the_slices_of_the_image_and_go_back():
    images = np.random.default_rng(3).normal(size=(2, 4, 9, 2)).astype(np.float32)
    cut = patches(jnp.asarray(images), (2, 3))
    expected = [images[:, i : i + 2, j : j + 3].reshape(2, -1) for i in (0, 2) for j in (0, 3, 6)]
    np.testing.assert_array_equal(cut, np.stack(expected, 1))
    np.testing.assert_array_equal(from_patches(cut, (2, 3), images.shape), images)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"patch_size": 4}, r"patch_size must divide the image's height and width \(4, 6\), got 4"),
        ({"heads": 3}, "width must be a multiple of heads=3, got 8"),
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"first_block": "bare"}, "first_block must be 'residual' or 'plain', got 'bare'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name_and_value(given, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(models.ViT.__init__)(
            object.__new__(models.ViT), SHAPE, 3, rngs=nnx.Rngs(0), **(SETTINGS | given)
        )
