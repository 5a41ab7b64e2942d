"""Residual networks with the stem of ImageNet: their pooling, and the names of their weights in torchvision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import models
from gia_jax.models.layers import max_pool
from gia_jax.models.resnet import BasicBlock


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (3, 2, 0), (2, None, 0), (3, 3, 0), (3, 1, 1)])
def test_pooling_is_the_maximum_of_every_window(size, stride, padding):
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 9, 8, 3))) - 3  # below 0, so that padding with 0 would show
    step = stride or size
    padded = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)), constant_values=-np.inf)
    rows, columns = ((n - size) // step + 1 for n in padded.shape[1:3])
    wanted = np.zeros((2, rows, columns, 3))
    for i, j in np.ndindex(rows, columns):
        wanted[:, i, j] = padded[:, i * step : i * step + size, j * step : j * step + size].max((1, 2))
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), size, stride=stride, padding=padding), wanted)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_of_overlapping_pooling_are_finite_differences():
    x, v = np.asarray(jax.random.normal(jax.random.key(1), (2, 1, 6, 6, 1), jnp.float64))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(max_pool(x, 3, stride=2, padding=1) ** 3))(x)

    pushed = jax.jit(lambda x, v: jax.jvp(gradient, (x,), (v,))[1])(x, v)
    step = 1e-5
    np.testing.assert_allclose(pushed, (gradient(x + step * v) - gradient(x - step * v)) / (2 * step), atol=1e-7)


def test_the_stem_of_imagenet_makes_images_a_quarter_as_large(monkeypatch):
    """The sizes of He et al., table 1: 56 pixels enter the first block of a network for 224, and 7 leave the last."""
    sizes, block = [], BasicBlock.__call__

    def watched(self, x):
        y = block(self, x)
        sizes.extend((x.shape, y.shape))
        return y

    monkeypatch.setattr(BasicBlock, "__call__", watched)
    nnx.eval_shape(
        lambda: models.ResNet((224, 224, 3), 1_000, stem="imagenet", rngs=nnx.Rngs(0))(jnp.zeros((1, 224, 224, 3)))
    )
    assert [sizes[0], sizes[-1]] == [(1, 56, 56, 64), (1, 7, 7, 512)]


@pytest.mark.parametrize("blocks", [(2, 2, 2, 2), (3, 4, 6, 3)])
def test_names_of_torchvision_are_the_layers(blocks):
    module = nnx.eval_shape(lambda: models.ResNet((64, 64, 3), 10, blocks=blocks, stem="imagenet", rngs=nnx.Rngs(0)))
    layers = {
        ".".join(map(str, path))
        for path, layer in nnx.iter_modules(module)
        if isinstance(layer, (nnx.Conv, nnx.BatchNorm, nnx.Linear))
    }
    names = ["conv1", "bn1", "fc"]
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            own = ["conv1", "bn1", "conv2", "bn2"]
            own += ["downsample.0", "downsample.1"] if stage > 1 and block == 0 else []
            names += [f"layer{stage}.{block}.{name}" for name in own]
    assert {models.resnet_names(name) for name in names} == layers
    assert models.resnet_names("layer1.0.conv3") is None
    assert models.resnet_names("avgpool") is None
