"""EfficientNet-Lite0 against loops of NumPy, and the names of its layers in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import models
from gia_jax.models.efficientnet import STAGES, InvertedResidual


def depthwise(x, kernel, stride):
    """TensorFlow's SAME: the output has ceil(size / stride) pixels, and what is padded more is below and right."""
    size, (h, w) = kernel.shape[0], x.shape[:2]
    out = -(-h // stride), -(-w // stride)
    pads = [max((o - 1) * stride + size - n, 0) for o, n in zip(out, (h, w), strict=True)]
    padded = np.pad(x, [*((p // 2, p - p // 2) for p in pads), (0, 0)])
    made = np.zeros((*out, x.shape[2]))
    for i, j in np.ndindex(out):
        window = padded[i * stride : i * stride + size, j * stride : j * stride + size]
        made[i, j] = np.sum(window * kernel[:, :, 0], (0, 1))
    return made


def normalised(x, norm):
    mean, var, scale, bias = (np.asarray(leaf[...]) for leaf in (norm.mean, norm.var, norm.scale, norm.bias))
    return (x - mean) / np.sqrt(var + 1e-3) * scale + bias


@pytest.mark.parametrize(("stride", "expansion", "features"), [(1, 6, 4), (2, 6, 4), (1, 1, 3), (2, 1, 4)])
def test_a_block_is_what_loops_compute(stride, expansion, features):
    block = InvertedResidual(4, features, 5, stride, expansion, rngs=nnx.Rngs(0))
    for norm in (layer for _, layer in nnx.iter_modules(block) if isinstance(layer, nnx.BatchNorm)):
        for i, leaf in enumerate((norm.mean, norm.var, norm.scale, norm.bias)):
            leaf[...] = jax.random.uniform(jax.random.key(i), leaf.shape, minval=0.5, maxval=1.5)
    block.eval()
    x = np.asarray(jax.random.normal(jax.random.key(5), (1, 7, 6, 4)))
    y = x[0].astype(float)
    if expansion > 1:
        y = np.clip(normalised(y @ np.asarray(block.expand.kernel[...])[0, 0], block.expand_norm), 0, 6)
    y = depthwise(y, np.asarray(block.depthwise.kernel[...]), stride)
    y = np.clip(normalised(y, block.depthwise_norm), 0, 6)
    y = normalised(y @ np.asarray(block.project.kernel[...])[0, 0], block.project_norm)
    expected = y + x[0] if stride == 1 and features == 4 else y
    np.testing.assert_allclose(block(jnp.asarray(x))[0], expected, rtol=1e-4, atol=1e-4)


def test_every_layer_has_a_name_in_pytorch():
    module = nnx.eval_shape(lambda: models.EfficientNetLite0(rngs=nnx.Rngs(0)))
    layers = {".".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    names = ["_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc"]
    for i in range(sum(stage.repeats for stage in STAGES)):
        own = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2", *(["_expand_conv", "_bn0"] if i else [])]
        names += [f"_blocks.{i}.{name}" for name in own]
    assert {models.efficientnet_lite0_names(name) for name in names} == layers
    assert models.efficientnet_lite0_names("_swish") is None
