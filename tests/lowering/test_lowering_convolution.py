"""One convolution at a time against `lax.conv_general_dilated`, in the parameters of its equation."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from gia_jax.lowering.convolution import convolution

TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 3e-2}


def equation(lhs_shape, rhs_shape, **params):
    """Operands' shapes in the layout NC.. / OI.. and the parameters of an equation, by default the plainest ones."""
    rank = len(lhs_shape) - 2
    identity = tuple(range(rank + 2))
    defaults = {
        "window_strides": (1,) * rank,
        "padding": ((0, 0),) * rank,
        "lhs_dilation": (1,) * rank,
        "rhs_dilation": (1,) * rank,
        "dimension_numbers": lax.ConvDimensionNumbers(identity, identity, identity),
        "feature_group_count": 1,
        "batch_group_count": 1,
    }
    return lhs_shape, rhs_shape, defaults | params


def laid_out(shape, spec):
    """The shape of an array whose axis `spec[i]` is the i-th of `shape`."""
    return tuple(shape[spec.index(axis)] for axis in range(len(shape)))


def both(lhs_shape, rhs_shape, params, flipped=(), dtype="float64"):
    """The lowered and the native result, and the text of the lowered program."""
    numbers = params["dimension_numbers"]
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.normal(size=laid_out(lhs_shape, numbers.lhs_spec)), dtype)
    rhs = jnp.asarray(rng.normal(size=laid_out(rhs_shape, numbers.rhs_spec)), dtype)

    def lowered(lhs, rhs):
        return convolution(lhs, rhs, flipped=flipped, **params)

    def native(lhs, rhs):
        return lax.conv_general_dilated(lhs, lax.rev(rhs, flipped), **params)

    found, expected = jax.jit(lambda *operands: (lowered(*operands), native(*operands)))(lhs, rhs)
    return found, expected, str(jax.make_jaxpr(lowered)(lhs, rhs))


def agree(lhs_shape, rhs_shape, params, flipped=(), dtype="float64"):
    found, expected, program = both(lhs_shape, rhs_shape, params, flipped, dtype)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= TOLERANCE[dtype] * np.linalg.norm(expected)
    return program


GEOMETRIES = {
    "plain": equation((2, 3, 8, 7), (4, 3, 3, 3)),
    "strided": equation((2, 3, 9, 8), (4, 3, 3, 3), window_strides=(2, 3), padding=((1, 1), (0, 2))),
    "cropped": equation((2, 3, 9, 8), (4, 3, 3, 3), padding=((-1, 2), (1, -2))),
    "dilated kernel": equation((2, 3, 9, 9), (4, 3, 3, 2), rhs_dilation=(2, 3), padding=((2, 2), (0, 0))),
    "dilated input": equation((2, 3, 5, 4), (4, 3, 3, 4), lhs_dilation=(2, 3), padding=((2, 2), (3, 1))),
    "dilated input, few taps": equation((2, 3, 5, 5), (4, 3, 1, 2), lhs_dilation=(3, 3), padding=((0, 2), (1, 1))),
    "dilated both": equation((2, 3, 5, 4), (4, 3, 3, 2), lhs_dilation=(2, 2), rhs_dilation=(3, 1)),
    "dilated input, strided": equation((2, 3, 5, 4), (4, 3, 3, 2), lhs_dilation=(2, 3), window_strides=(3, 2)),
    "kernel gradient": equation((3, 2, 9, 9), (4, 2, 4, 4), rhs_dilation=(2, 2), padding=((1, 0), (1, 0))),
    "kernel gradient, exchanged": equation((3, 2, 4, 4), (4, 2, 9, 9), lhs_dilation=(2, 2), padding=((2, 1), (2, 1))),
    "pointwise": equation((2, 3, 6, 5), (4, 3, 1, 1), window_strides=(2, 1)),
    "groups": equation((2, 6, 6, 5), (4, 3, 3, 3), feature_group_count=2, padding=((1, 1), (1, 1))),
    "depthwise": equation((2, 3, 6, 5), (6, 1, 3, 3), feature_group_count=3),
    "batch groups": equation((4, 3, 6, 5), (6, 3, 3, 3), batch_group_count=2),
    "one dimension": equation((2, 3, 9), (4, 3, 4), window_strides=(2,), padding=((3, 0),)),
    "three dimensions": equation((1, 2, 5, 4, 4), (3, 2, 2, 3, 2), window_strides=(1, 2, 1)),
    "no dimension": equation((2, 3), (4, 3)),
}
# Groups of one feature each.
GEOMETRIES |= {
    f"depthwise, {name}": equation(*shapes, feature_group_count=3, **params)
    for name, shapes, params in [
        ("plain", ((2, 3, 6, 5), (3, 1, 3, 2)), {"padding": ((1, 1), (0, 2))}),
        ("strided", ((2, 3, 9, 8), (3, 1, 3, 3)), {"window_strides": (2, 3), "padding": ((0, 1), (-1, 2))}),
        ("dilated kernel", ((2, 3, 9, 9), (3, 1, 3, 2)), {"rhs_dilation": (2, 3), "window_strides": (2, 1)}),
        ("dilated input", ((2, 3, 4, 3), (3, 1, 3, 5)), {"lhs_dilation": (2, 3), "padding": ((2, 1), (3, 4))}),
        ("few taps", ((2, 3, 4, 3), (3, 1, 1, 2)), {"lhs_dilation": (2, 3), "padding": ((0, 1), (0, 2))}),
        (
            "dilated input, strided",
            ((2, 3, 5, 4), (3, 1, 3, 2)),
            {"lhs_dilation": (2, 3), "window_strides": (3, 2)},
        ),
        ("large kernel", ((1, 3, 9, 9), (3, 1, 9, 8)), {"padding": ((4, 4), (4, 3))}),
    ]
}
GEOMETRIES |= {
    f"depthwise kernel gradient, {name}": equation(*shapes, batch_group_count=3, **params)
    for name, shapes, params in [
        ("plain", ((3, 2, 6, 5), (3, 2, 6, 5)), {"padding": ((1, 1), (1, 1))}),
        ("strided", ((3, 2, 7, 8), (3, 2, 4, 4)), {"rhs_dilation": (2, 2), "padding": ((1, 1), (0, 1))}),
        ("exchanged", ((3, 2, 4, 3), (3, 2, 7, 6)), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 2))}),
        ("many outputs", ((3, 2, 12, 9), (3, 2, 3, 1)), {}),
    ]
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, x64):
    rank = len(GEOMETRIES[name][0]) - 2
    for flipped in {(), tuple(range(2, rank + 2)), tuple(range(rank + 1))}:
        assert "conv_general_dilated" not in agree(*GEOMETRIES[name], flipped)


DEPTHWISE = ["depthwise, plain", "depthwise kernel gradient, plain"]


@pytest.mark.parametrize("name", ["plain", "dilated input", "kernel gradient", *DEPTHWISE])
def test_single_precision(name):
    assert "conv_general_dilated" not in agree(*GEOMETRIES[name], dtype="float32")


@pytest.mark.parametrize("name", ["plain", "dilated input", "kernel gradient", *DEPTHWISE])
def test_preferred_element_type(name):
    lhs_shape, rhs_shape, params = GEOMETRIES[name]
    agree(lhs_shape, rhs_shape, params | {"preferred_element_type": jnp.float32}, dtype="bfloat16")


@pytest.mark.parametrize("specs", list(itertools.product([(0, 1, 2, 3), (0, 3, 1, 2), (3, 2, 0, 1)], repeat=3)))
def test_layouts(specs, x64):
    lhs_shape, rhs_shape, params = equation((2, 3, 6, 5), (4, 3, 3, 2), padding=((1, 1), (0, 0)))
    agree(lhs_shape, rhs_shape, params | {"dimension_numbers": lax.ConvDimensionNumbers(*specs)})


# Wide, square and of stride one: these go through Winograd's algorithm (even and odd sizes, all padded or cropped).
WIDE = {
    "forward": equation((2, 64, 16, 16), (64, 64, 3, 3), padding=((1, 1), (1, 1))),
    "forward, odd": equation((3, 64, 15, 17), (65, 64, 3, 3), padding=((0, 1), (2, -1))),
    "kernel gradient": equation((64, 8, 18, 18), (64, 8, 16, 16)),
    "kernel gradient, odd": equation((65, 10, 15, 15), (64, 10, 14, 15), padding=((1, 0), (1, 1))),
    "groups": equation((2, 128, 16, 16), (128, 64, 3, 3), feature_group_count=2, padding=((1, 1), (1, 1))),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", WIDE)
def test_wide(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        program = agree(*WIDE[name], dtype=dtype)
        # One product for each of the 16 entries of a tile: the algorithm with fewer multiplications is what ran.
        (product,) = [line for line in program.splitlines() if "= dot_general[" in line]
        sizes = re.search(r"\[([\d,]+)\] = dot_general", product)
        assert sizes is not None
        assert "16" in sizes.group(1).split(",")


@pytest.mark.parametrize("flipped", [(2, 3), (2,)])
def test_wide_reversed(flipped, x64):
    agree(*WIDE["forward"], flipped=flipped)


EMPTY = {
    "no outputs": equation((2, 3, 2, 5), (4, 3, 3, 3)),
    "far from any output": equation((2, 3, 2, 2), (4, 3, 7, 7), rhs_dilation=(2, 2)),
    "cropped away": equation((2, 3, 4, 4), (4, 3, 1, 1), padding=((-2, -2), (0, 0))),
    "no batch": equation((0, 3, 5, 5), (4, 3, 3, 3)),
    "no features": equation((2, 0, 5, 5), (4, 0, 3, 3)),
    "no output features": equation((2, 3, 5, 5), (0, 3, 3, 3)),
    "no inputs, padded": equation((2, 3, 0, 5), (4, 3, 3, 3), padding=((2, 2), (0, 0))),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_arrays(name, x64):
    agree(*EMPTY[name])


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_other_types_stay_native(dtype):
    found, expected, program = both(*GEOMETRIES["strided"], flipped=(3,), dtype=dtype)
    assert "conv_general_dilated" in program
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_products_keep_their_precision():
    lhs_shape, rhs_shape, params = GEOMETRIES["plain"]
    *_, program = both(lhs_shape, rhs_shape, params | {"precision": lax.Precision.HIGHEST}, dtype="float32")
    assert "HIGHEST" in program


@st.composite
def equations(draw):
    """Any convolution of one or two dimensions, with its layouts and reversed kernel axes."""
    rank = draw(st.integers(1, 2))

    def sizes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kind = draw(st.sampled_from(["plain", "features", "batch"]))
    groups = draw(st.integers(1, 3)) if kind != "plain" else 1
    batch, features, out = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3)) * groups
    batch = batch * groups if kind == "batch" else batch
    lhs_shape = (batch, features * groups if kind == "features" else features, *sizes(1, 7))
    rhs_shape = (out, features, *sizes(1, 5))
    axes = st.permutations(range(rank + 2)).map(tuple)
    params = {
        "window_strides": sizes(1, 3),
        "padding": tuple(zip(sizes(-1, 3), sizes(-1, 3))),
        "lhs_dilation": sizes(1, 3),
        "rhs_dilation": sizes(1, 3),
        "dimension_numbers": lax.ConvDimensionNumbers(draw(axes), draw(axes), draw(axes)),
        "feature_group_count": groups if kind == "features" else 1,
        "batch_group_count": groups if kind == "batch" else 1,
    }
    return lhs_shape, rhs_shape, params, tuple(sorted(draw(st.sets(st.integers(0, rank + 1)))))


@settings(derandomize=True, max_examples=25, deadline=None)
@given(equations())
def test_any_convolution(drawn):
    with jax.enable_x64(True):
        agree(*drawn)


def test_lanes_with_their_own_kernels(x64):
    # Strided, then transposed: `vmap` over kernels, inputs or both equals a loop, and stays a matrix product.
    for name, axes in itertools.product(["strided", "dilated input"], [(0, 0), (None, 0), (0, None)]):
        lhs_shape, rhs_shape, params = GEOMETRIES[name]
        rng = np.random.default_rng(0)
        lhs, rhs = (jnp.asarray(rng.normal(size=(3, *shape))) for shape in (lhs_shape, rhs_shape))
        operands = [value if axis == 0 else value[0] for value, axis in zip((lhs, rhs), axes)]
        lanes = jax.vmap(lambda *v, params=params: convolution(*v, **params), axes)
        loop = [
            lax.conv_general_dilated(*[v[i] if axis == 0 else v for v, axis in zip(operands, axes)], **params)
            for i in range(3)
        ]
        assert "conv_general_dilated" not in str(jax.make_jaxpr(lanes)(*operands))
        np.testing.assert_allclose(jax.jit(lanes)(*operands), jnp.stack(loop), rtol=0, atol=1e-12)
