"""The client's gradient and its derivatives of every kind, against plain nested `jax.grad` with native convolutions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.test_util import check_grads

from gia_jax.clients import parameter_gradient

LOWERINGS = ["matmul", "native"]


def network(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jnp.tanh(lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", dimension_numbers=numbers))
    return x.reshape(x.shape[0], -1) @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params, x, labels):
    """Cross-entropy with class indices, or with class probabilities that are given as logits."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(network(params, x), labels))
    return jnp.mean(optax.losses.softmax_cross_entropy(network(params, x), jax.nn.softmax(labels)))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def problem(seed=0, batch=2):
    """Parameters, images, class indices and soft labels."""
    head = {"kernel": normal(27, 4, seed=seed + 1) / 3, "bias": normal(4, seed=seed + 2)}
    params = {"conv": normal(3, 3, 2, 3, seed=seed), "head": head}
    labels = jnp.asarray(np.random.default_rng(seed).integers(0, 4, batch))
    return params, normal(batch, 5, 5, 2, seed=seed + 3), labels, normal(batch, 4, seed=seed + 4)


def close(found, expected, tolerance=1e-11):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * (1 + np.max(np.abs(e), initial=0)))


def distance(client_fn, target, *args):
    return sum(jnp.sum((g - t) ** 2) for g, t in zip(jax.tree.leaves(client_fn(*args)), jax.tree.leaves(target)))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_equals_the_plain_gradient(lowering, x64):
    params, x, hard, soft = problem()
    for labels in (hard, soft):
        found = jax.jit(parameter_gradient(loss_fn, lowering=lowering))(params, x, labels)
        close(found, jax.grad(loss_fn)(params, x, labels))


def push_forward(fn, *args):
    tangents = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), args)
    return jax.jvp(fn, args, tangents)


def linearized(fn, *args):
    value, push = jax.linearize(fn, *args)
    # Twice, as what is kept between the calls must be the primal point's.
    return value, push(*args), push(*[jax.tree.map(jnp.sin, arg) for arg in args])


def pull_back(fn, *args):
    value, pull = jax.vjp(fn, *args)
    return value, pull(jax.tree.map(lambda leaf: jnp.cos(7 * leaf), value)), pull(value)


def transposed_push(fn, *args):
    _, push = jax.linearize(fn, *args)
    return jax.linear_transpose(push, *args)(fn(*args))


DERIVATIVES = {
    "jvp": push_forward,
    "linearize": linearized,
    "vjp": pull_back,
    "linear_transpose": transposed_push,
    "jacfwd": lambda fn, *args: jax.jacfwd(fn, tuple(range(len(args))))(*args),
    "jacrev": lambda fn, *args: jax.jacrev(fn, tuple(range(len(args))))(*args),
    "checkpoint": lambda fn, *args: pull_back(jax.checkpoint(fn), *args),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name, x64):
    params, x, hard, soft = problem()
    # With respect to the images, the rest held fixed; and to everything at once.
    views = {
        "images": (lambda fn, images: fn(params, images, hard), (x,)),
        "all": (lambda fn, *args: fn(*args), (params, x, soft)),
    }
    for view, args in views.values():
        fast = functools.partial(view, parameter_gradient(loss_fn, lowering="matmul"))
        plain = functools.partial(view, jax.grad(loss_fn))
        found, expected = (jax.jit(functools.partial(DERIVATIVES[name], fn))(*args) for fn in (fast, plain))
        close(found, expected)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_finite_differences(lowering, x64):
    params, x, _, soft = problem()
    client_fn = jax.jit(parameter_gradient(loss_fn, lowering=lowering))
    check_grads(client_fn, (params, x, soft), order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_gradient_and_hessian_of_a_matching_loss(lowering, x64):
    params, x, labels, _ = problem()
    target = jax.grad(loss_fn)(params, problem(seed=9)[1], labels)

    def derivatives(client_fn):
        loss = functools.partial(distance, client_fn, target)
        # The Hessian takes third derivatives of the client's loss.
        hessian = jax.jacfwd(jax.grad(loss, 1), 1), jax.jacrev(jax.grad(loss, 1), 1)
        return jax.jit(lambda *args: (jax.grad(loss, (0, 1))(*args), [h(*args) for h in hessian]))(params, x, labels)

    close(derivatives(parameter_gradient(loss_fn, lowering=lowering)), derivatives(jax.grad(loss_fn)), 1e-10)


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, 0), (0, None, None), (None, 0, None)])
def test_lanes(axes, x64):
    lanes = [problem(seed)[:3] for seed in (0, 10, 20)]
    stacked = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *[lane[i] for lane in lanes]) if axis == 0 else lanes[0][i]
        for i, axis in enumerate(axes)
    ]
    loop = [[lane[i] if axis == 0 else lanes[0][i] for i, axis in enumerate(axes)] for lane in lanes]
    target = jax.grad(loss_fn)(*problem(seed=5)[:3])
    client_fn = parameter_gradient(loss_fn, lowering="matmul")

    def everything(client_fn, *args):
        value, gradients = jax.value_and_grad(functools.partial(distance, client_fn, target), (0, 1))(*args)
        forward = jax.jvp(lambda x: client_fn(args[0], x, args[2]), (args[1],), (jnp.ones_like(args[1]),))
        return value, gradients, forward

    found = jax.jit(jax.vmap(functools.partial(everything, client_fn), axes))(*stacked)
    plain = jax.jit(functools.partial(everything, jax.grad(loss_fn)))
    close(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *[plain(*lane) for lane in loop]))


def test_lanes_of_cotangents(x64):
    # `vmap` over the linear map alone: what it kept is shared, what moves is not; and two levels of it.
    params, x, labels, _ = problem()

    def pulled(client_fn):
        value, pull = jax.vjp(lambda images: client_fn(params, images, labels), x)
        return jax.vmap(jax.vmap(pull))(jax.tree.map(lambda leaf: normal(2, 3, *leaf.shape), value))

    close(*(jax.jit(pulled, static_argnums=0)(fn) for fn in (parameter_gradient(loss_fn), jax.grad(loss_fn))))


def test_inside_scan(x64):
    params, x, labels, _ = problem()
    target = jax.grad(loss_fn)(*problem(seed=5)[:3])

    def descended(client_fn):
        def step(images, _):
            value, gradient = jax.value_and_grad(functools.partial(distance, client_fn, target), 1)(
                params, images, labels
            )
            return images - 0.1 * gradient, value

        return jax.jit(lambda images: lax.scan(step, images, length=3))(x)

    close(descended(parameter_gradient(loss_fn, lowering="matmul")), descended(jax.grad(loss_fn)))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_loss_that_closes_over_traced_values(lowering, x64):
    params, x, labels, _ = problem()

    def outer(gradient_of, images, scale):
        def closed_loss(p):
            return loss_fn(p, scale * images, labels) + scale * jnp.sum(p["conv"] ** 2)

        return distance(gradient_of(closed_loss), params, params)

    fast = functools.partial(outer, functools.partial(parameter_gradient, lowering=lowering))
    plain, scales = functools.partial(outer, jax.grad), jnp.array([0.5, 2.0])
    for make in (
        lambda fn: jax.jit(fn)(x, 0.7),
        lambda fn: jax.jit(jax.grad(fn, (0, 1)))(x, 0.7),
        lambda fn: jax.jvp(functools.partial(fn, x), (0.7,), (1.0,)),
        jax.jit(lambda fn: jax.vmap(jax.grad(fn), (None, 0))(x, scales), static_argnums=0),
        jax.jit(lambda fn: lax.map(lambda scale: jax.grad(fn)(x, scale), scales), static_argnums=0),
    ):
        close(make(fast), make(plain))


def test_trees_of_any_kind(x64):
    # Parameters in a tuple with an unused one; several data arguments, one of them a random key, one empty.
    def loss(params, batch, key, nothing):
        assert nothing is None
        weight, (bias, _) = params
        kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        return jnp.sum(jnp.sin(batch["x"] * kept @ weight) + bias**3)

    params = (normal(3, 2), (normal(2), normal(5)))
    data = ({"x": normal(4, 3, seed=1)}, jax.random.key(0), None)

    def matched(client_fn, batch):
        return distance(client_fn, params, params, batch, *data[1:])

    fast, plain = parameter_gradient(loss), jax.grad(loss)
    close(jax.jit(fast)(params, *data), plain(params, *data))
    close(*(jax.jit(jax.grad(functools.partial(matched, client_fn)))(data[0]) for client_fn in (fast, plain)))


def test_update_that_ignores_the_data_has_derivative_zero(x64):
    def loss(params, x):
        return jnp.sum(params**2) + jnp.sum(x**2)

    gradient = jax.grad(lambda x: jnp.sum(parameter_gradient(loss)(jnp.ones(3), x)))(normal(4))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_kinks_keep_their_rule(lowering, x64):
    # All activations sit at the kink of relu, whose derivative there is 0 by convention.
    def loss(params, x):
        return jnp.sum(jax.nn.relu(network(params, x)) + network(params, x))

    zeros = jax.tree.map(jnp.zeros_like, problem()[0])
    x = problem()[1]
    client_fn = parameter_gradient(loss, lowering=lowering)
    close(client_fn(zeros, x), jax.grad(loss)(zeros, x))
    np.testing.assert_array_equal(client_fn(zeros, x)["head"]["bias"], len(x))


def test_gradient_is_float32_by_default():
    params, x, labels, _ = jax.tree.map(lambda v: v.astype(jnp.float32) if v.ndim > 1 else v, problem())
    update = parameter_gradient(loss_fn)(params, x, labels)
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype("float32")}


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"scalar.*\(3,\)"):
        parameter_gradient(lambda p: p**2)(jnp.ones(3))
    with pytest.raises(ValueError, match=r"floating point.*int32.*\['steps'\]"):
        parameter_gradient(lambda p: jnp.sum(p["w"]))({"w": jnp.ones(3), "steps": jnp.arange(2)})
