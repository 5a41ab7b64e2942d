"""A function with fast convolutions has the values and derivatives of the function as it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from gia_jax import models
from gia_jax.lowering import lowered

pytestmark = pytest.mark.usefixtures("x64")


RNG = np.random.default_rng(0)
MODEL_FN, FLOAT32 = models.functional(models.Decoder((8, 8, 3), 4, width=2, rngs=nnx.Rngs(0)))
PARAMS = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), FLOAT32)  # made before float64 is enabled
Z = RNG.normal(size=(3, 4))


def decode(params, z):
    return MODEL_FN(*jax.tree.map(jnp.asarray, (params, z)))


def copies(params, z):
    """Kernels of its own for each image: grouped convolutions."""
    own = jax.tree.map(lambda leaf: leaf * jnp.arange(1.0, 4).reshape(3, *[1] * leaf.ndim), params)
    return jax.vmap(lambda p, one: decode(p, one[None])[0])(own, z)


PROGRAMS = {
    "shared": decode,
    "copies": copies,
    "scan": lambda params, z: jax.lax.scan(lambda c, one: (c, decode(params, one[None])), 0.0, z)[1],
}


def close(found, expected) -> None:
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (f.shape, f.dtype) == (e.shape, e.dtype)
        assert np.linalg.norm(f - e) <= 1e-12 * np.linalg.norm(e)


@pytest.mark.parametrize("name", PROGRAMS)
def test_value_and_derivatives_are_those_of_the_function(name: str) -> None:
    tangents = jax.tree.map(lambda leaf: np.cos(leaf + 1), (PARAMS, Z))

    def everything(fn):
        def loss(params, z):
            return jnp.sum(jnp.sin(3 * fn(params, z)))

        def run(params, z, tangents):
            over_victims = jax.vmap(jax.grad(loss), (None, 0))
            return {
                "value": fn(params, z),
                "forward": jax.jvp(fn, (params, z), tangents),
                "reverse": jax.grad(loss, (0, 1))(params, z),
                "of one argument": jax.grad(loss, 1)(params, z),
                "vmap": over_victims(params, jnp.stack([z, -z])),
            }

        return jax.jit(run)(PARAMS, Z, tangents)

    close(everything(lowered(PROGRAMS[name], lowering="matmul")), everything(PROGRAMS[name]))


def test_no_convolution_is_left_in_value_or_derivative() -> None:
    fast_fn = lowered(copies, lowering="matmul")
    for program in (fast_fn, jax.grad(lambda p, z: jnp.sum(fast_fn(p, z) ** 2), (0, 1))):
        assert "conv" not in jax.jit(program).lower(PARAMS, Z).as_text()
    assert "conv" in jax.jit(copies).lower(PARAMS, Z).as_text()


def test_native_is_the_function_itself() -> None:
    assert lowered(copies, lowering="native") is copies


def test_a_second_derivative_is_right() -> None:
    fast_fn = lowered(decode, lowering="matmul")
    check_grads(jax.jit(lambda z: fast_fn(PARAMS, z)), (Z,), order=2, modes=("fwd", "rev"))


def test_what_it_closes_over_is_differentiated() -> None:
    def loss(scale, wrap):
        return jnp.sum(wrap(lambda z: decode(PARAMS, scale * z))(Z) ** 2)

    matmul = functools.partial(lowered, lowering="matmul")
    close(*(jax.jit(jax.grad(functools.partial(loss, wrap=wrap)))(1.5) for wrap in (matmul, lambda fn: fn)))


def test_trees_and_integers_pass_through() -> None:
    def fn(tree, index):
        return {"made": decode(PARAMS, tree["z"])[index], "scale": tree["scale"]}

    tree = {"z": Z, "scale": jnp.asarray(2.0)}

    def everything(fn):
        made = jax.jit(fn)(tree, 1)
        return made, jax.jit(jax.grad(lambda t: fn(t, 1)["made"].sum()))(tree)

    close(everything(lowered(fn, lowering="matmul")), everything(fn))


def test_an_output_without_a_derivative_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fn must return floating-point arrays, got int\d+ at output\['n'\]"):
        lowered(lambda z: {"n": jnp.argmax(z)}, lowering="matmul")(Z)
