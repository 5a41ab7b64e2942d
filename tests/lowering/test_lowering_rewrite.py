"""Whole programs with their convolutions rewritten: the same values and derivatives, everything else left alone."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend import core as jex_core

from gia_jax.clients import federated_averaging, federated_sgd, parameter_gradient, per_example
from gia_jax.lowering import lower, lowers_to_matmul

TOLERANCE = {"float64": 1e-12, "float32": 1e-4}


def conv(x, kernel, strides=(1, 1), padding="SAME", **kwargs):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs)


def lowered(fn):
    """`fn` with its convolutions rewritten."""

    def lowered_fn(*args):
        flat, tree = jax.tree.flatten(args)
        closed, shape = jax.make_jaxpr(lambda *v: fn(*jax.tree.unflatten(tree, v)), return_shape=True)(*flat)
        return jax.tree.unflatten(jax.tree.structure(shape), jex_core.jaxpr_as_fun(lower(closed))(*flat))

    return lowered_fn


def has_convolution(fn, *args) -> bool:
    return "conv_general_dilated" in str(jax.make_jaxpr(fn)(*args))


def close(found, expected, dtype="float64"):
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (f.shape, f.dtype) == (e.shape, e.dtype)
        assert np.linalg.norm(f - e) <= TOLERANCE[dtype] * np.linalg.norm(e)


def normal(*shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


X, K = (2, 6, 5, 3), (3, 3, 3, 3)

LAYERS = {
    "same": ((7, 6, 3), functools.partial(nnx.Conv, 3, 4, (3, 3), padding="SAME")),
    "same, strided": ((7, 6, 3), functools.partial(nnx.Conv, 3, 4, (3, 3), 2, padding="SAME")),
    "valid": ((7, 6, 3), functools.partial(nnx.Conv, 3, 4, (3, 2), padding="VALID")),
    "asymmetric": ((7, 6, 3), functools.partial(nnx.Conv, 3, 4, (3, 3), (2, 1), padding=((0, 2), (3, 1)))),
    "circular": ((7, 6, 3), functools.partial(nnx.Conv, 3, 4, (3, 3), padding="CIRCULAR")),
    "dilated kernel": ((9, 9, 3), functools.partial(nnx.Conv, 3, 4, (3, 3), kernel_dilation=(2, 3))),
    "dilated input": (
        (4, 5, 3),
        functools.partial(nnx.Conv, 3, 4, (3, 3), padding=((1, 2), (2, 0)), input_dilation=(2, 3)),
    ),
    "groups": ((7, 6, 4), functools.partial(nnx.Conv, 4, 6, (3, 3), 2, feature_group_count=2)),
    "depthwise": ((7, 6, 3), functools.partial(nnx.Conv, 3, 6, (3, 3), feature_group_count=3)),
    "pointwise": ((7, 6, 3), functools.partial(nnx.Conv, 3, 4, (1, 1), 2, padding="VALID")),
    "causal, one dimension": ((9, 3), functools.partial(nnx.Conv, 3, 4, (4,), padding="CAUSAL")),
    "transposed": ((4, 5, 3), functools.partial(nnx.ConvTranspose, 3, 4, (3, 3), (2, 3))),
    "transposed, valid": ((4, 5, 3), functools.partial(nnx.ConvTranspose, 3, 4, (4, 2), (2, 2), padding="VALID")),
    "wide": ((16, 16, 64), functools.partial(nnx.Conv, 64, 64, (3, 3))),
    "wide, odd": ((15, 18, 64), functools.partial(nnx.Conv, 64, 64, (3, 3), padding="VALID")),
}


def gradients(layer, shape, lowering, dtype):
    """The gradient of a loss of the layer, and the gradient of a distance of such gradients: parameters and data."""
    graph, state = nnx.split(nnx.eval_shape(lambda: layer(rngs=nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    params = jax.tree.map(lambda p: 3 * normal(*p.shape, seed=1, dtype=dtype) / p.size**0.5, shapes)
    data, other = normal(3, *shape, seed=2, dtype=dtype), normal(3, *shape, seed=3, dtype=dtype)
    client_fn = parameter_gradient(lambda p, x: jnp.mean(jnp.sin(nnx.merge(graph, p)(x)) ** 2), lowering=lowering)

    def distance(params, data, target):
        difference = jax.tree.map(jnp.subtract, client_fn(params, data), target)
        return sum(jnp.sum(d**2) for d in jax.tree.leaves(difference))

    def everything(params, data, other):
        target = client_fn(params, other)
        return target, jax.grad(distance, (0, 1))(params, data, target)

    assert has_convolution(everything, params, data, other) == (lowering == "native")
    return jax.jit(everything)(params, data, other)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_their_second_order_gradients(name, x64):
    shape, layer = LAYERS[name]
    close(gradients(layer, shape, "matmul", "float64"), gradients(layer, shape, "native", "float64"))


@pytest.mark.parametrize("name", ["same, strided", "transposed", "groups", "wide"])
def test_layers_in_single_precision(name):
    shape, layer = LAYERS[name]
    found, expected = (gradients(layer, shape, lowering, "float32") for lowering in ("matmul", "native"))
    close(found, expected, "float32")


def scanned(x, kernel):
    return lax.scan(lambda h, k: (jnp.tanh(conv(h, k)), jnp.sum(h)), x, jnp.stack([kernel, 2 * kernel, -kernel]))


def switched(x, kernel):
    # The index is data, so that the branches stay branches.
    branches = [lambda h: conv(h, kernel), jnp.sin, lambda h: conv(h, kernel[::-1])]
    index = jnp.sum(x > 0) % 3
    return lax.switch(index, branches, x) + lax.cond(index > 0, branches[0], branches[1], x)


def looped(x, kernel):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(conv(s[1], kernel))), (0, x))


PROGRAMS = {
    "jit": jax.jit(conv),
    "checkpoint": jax.checkpoint(lambda x, k: jnp.sin(conv(x, k))),
    "checkpoint without barriers": jax.checkpoint(lambda x, k: jnp.sin(conv(x, k)), prevent_cse=False),
    "nested": jax.jit(jax.checkpoint(jax.jit(lambda x, k: scanned(conv(x, k), k)))),
    "scan": scanned,
    "map": lambda x, k: lax.map(lambda image: conv(image[None], k), x),
    "cond and switch": switched,
    "while": looped,
    "vmap": lambda x, k: jax.vmap(lambda image, scale: conv(image[None], scale * k))(x, jnp.arange(1.0, len(x) + 1)),
    "closed-over constants": lambda x, k: conv(x, k) + conv(normal(*X, seed=5), k),
    "reversed kernels": lambda x, k: conv(x, k[::-1, :, ::-1]) * jnp.flip(k)[0, 0, 0],
    "no convolution": lambda x, k: jnp.tensordot(x, k, 1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name, x64):
    program, arguments = PROGRAMS[name], (normal(*X), normal(*K, seed=1) / 3)
    assert has_convolution(program, *arguments) == (name != "no convolution")
    assert not has_convolution(lowered(program), *arguments)
    close(jax.jit(lowered(program))(*arguments), jax.jit(program)(*arguments))


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "while"])
def test_programs_differentiated(name, x64):
    def gradient(x, kernel):
        return jax.grad(lambda *v: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(PROGRAMS[name](*v))), (0, 1))(
            x, kernel
        )

    arguments = (normal(*X), normal(*K, seed=1) / 3)
    assert not has_convolution(lowered(gradient), *arguments)
    close(jax.jit(lowered(gradient))(*arguments), jax.jit(gradient)(*arguments))


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_lanes(axes, x64):
    arguments = [normal(3, *s, seed=4) if axis == 0 else normal(*s) for s, axis in zip((X, K), axes)]
    found = jax.jit(jax.vmap(lowered(scanned), axes))(*arguments)
    lanes = [[v[i] if axis == 0 else v for v, axis in zip(arguments, axes)] for i in range(3)]
    close(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *[scanned(*lane) for lane in lanes]))


def test_activations_keep_their_rules(x64):
    # Inlined, the rule of relu would be that of `maximum`, with the derivative 1/2 at 0.
    def program(x):
        return jnp.sum(jax.nn.relu(conv(x, jnp.zeros(K))) + jax.nn.relu6(x))

    assert not has_convolution(lowered(program), jnp.zeros(X))
    np.testing.assert_array_equal(jax.grad(lowered(program))(jnp.zeros(X)), 0)


def custom_vjp():
    rule = jax.custom_vjp(lambda x, k: conv(x, k))
    rule.defvjp(lambda x, k: (conv(x, k), (x, k)), lambda kept, c: (conv(c, kept[1]) * 3, kept[1] * jnp.sum(c)))
    return rule


def custom_jvp():
    rule = jax.custom_jvp(lambda x, k: conv(x, k))
    rule.defjvp(lambda primals, tangents: (conv(*primals), 3 * conv(tangents[0], primals[1])))
    return rule


@pytest.mark.parametrize("make_rule", [custom_vjp, custom_jvp])
def test_custom_rules_around_convolutions(make_rule, x64):
    # The rules are not the true derivatives, so that losing one shows.
    rule, arguments = make_rule(), (normal(*X), normal(*K, seed=1))
    close(jax.jit(lowered(rule))(*arguments), conv(*arguments))
    assert not has_convolution(lowered(rule), *arguments)

    def gradient(x, kernel):
        return jax.grad(lambda *v: jnp.sum(jnp.sin(rule(*v))), (0, 1))(x, kernel)

    # Differentiated, then lowered as the library does it; and lowered, then differentiated.
    close(jax.jit(lowered(gradient))(*arguments), gradient(*arguments))
    assert not has_convolution(lowered(gradient), *arguments)
    close(jax.grad(lambda *v: jnp.sum(jnp.sin(lowered(rule)(*v))), (0, 1))(*arguments), gradient(*arguments))


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_what_it_does_not_know_stays(dtype):
    arguments = (5 * normal(*X)).astype(dtype), (5 * normal(*K)).astype(dtype)
    assert has_convolution(lowered(conv), *arguments)
    np.testing.assert_array_equal(lowered(conv)(*arguments), conv(*arguments))


@pytest.mark.parametrize("shape", [(2, 2, 5, 3), (0, 6, 5, 3)], ids=["no outputs", "no batch"])
def test_empty_outputs(shape, x64):
    def loss(kernel, x):
        y = conv(x, kernel, padding="VALID")
        return jnp.sum(y**2) + jnp.sum(kernel**2)

    x, kernel = normal(*shape), normal(*K)
    gradient_fn = parameter_gradient(loss, lowering="matmul")
    second = jax.jit(jax.grad(lambda k: jnp.sum(gradient_fn(k, x) ** 2)))(kernel)
    close((gradient_fn(kernel, x), second), (2 * kernel, 8 * kernel))


def test_side_effects_stay():
    seen = []

    def program(x, kernel):
        jax.debug.callback(lambda total: seen.append(float(total)), jnp.sum(conv(x, kernel)))
        return conv(x, kernel)

    total = float(jnp.sum(jax.jit(lowered(program))(normal(*X), normal(*K))))
    jax.effects_barrier()
    assert seen == [pytest.approx(total, rel=1e-4, abs=1e-3)]


def test_names():
    assert lowers_to_matmul("matmul")
    assert not lowers_to_matmul("native")
    assert lowers_to_matmul("auto") == (jax.default_backend() == "cpu")


@pytest.mark.parametrize(
    "make", [parameter_gradient, federated_sgd, per_example, functools.partial(federated_averaging, learning_rate=0.1)]
)
def test_unknown_name(make, monkeypatch):
    # Without the type checker of the tests, which would see it first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="im2col"):
        make(lambda params, batch: jnp.sum(params), lowering="im2col")
