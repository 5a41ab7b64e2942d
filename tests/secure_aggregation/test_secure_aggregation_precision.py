"""Updates in half precision give the same numbers as in float32 in every protocol; they are cast last."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanges import protocols

from gia_jax import secure_aggregation as sa

KEY = jax.random.key(0)
PROTOCOLS = protocols(6) | {"paillier": sa.homomorphic(6, "paillier", clip=1.0, key_bits=1024)}
HALF = [jnp.float16, jnp.bfloat16]


def of_clip(kind, clip):
    if kind in ("bfv", "ckks"):
        pytest.importorskip("tenseal")
    protocol = sa.homomorphic(6, kind, clip=1.0) if kind in ("bfv", "ckks") else PROTOCOLS[kind]
    return protocol._replace(quantizer=dataclasses.replace(protocol.quantizer, clip=clip))


@pytest.mark.parametrize("kind", [*PROTOCOLS, "bfv", "ckks"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_gives_what_float32_gives(kind, dtype):
    # The sums, 180,000 and more, do not fit into float16.
    protocol, params = of_clip(kind, 40000.0), {"w": jnp.zeros(3)}
    updates = {"w": jnp.tile(jnp.array([30000.0, 1.6, -1.2]), (6, 1)).astype(dtype)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates)
    half, full = (sa.aggregate(KEY, protocol, given) for given in (updates, wide))
    np.testing.assert_array_equal(half.total, full.total)
    assert half.aggregate["w"].dtype == jnp.float32
    np.testing.assert_array_equal(half.aggregate["w"], full.aggregate["w"])
    seen, expected = (sa.observe(view, "aggregate", params).update["w"] for view in (half, full))
    assert (seen.dtype, expected.dtype) == (dtype, jnp.float32)
    np.testing.assert_array_equal(seen, expected.astype(dtype))
    np.testing.assert_allclose(expected, wide["w"][0], atol=1 / protocol.quantizer.scale)


@pytest.mark.parametrize("kind", PROTOCOLS)
@pytest.mark.parametrize("dtype", HALF)
def test_a_weighted_mean_is_divided_before_it_is_cast(kind, dtype):
    protocol = of_clip(kind, 40000.0)
    protocol = protocol._replace(quantizer=dataclasses.replace(protocol.quantizer, bits=18))
    updates = {"w": jnp.full((6, 2), 30000.0, dtype)}
    found = sa.weighted_mean(KEY, protocol, updates, [9, 1, 2, 3, 4, 5], max_weight=9)
    assert found.mean["w"].dtype == dtype
    np.testing.assert_allclose(found.mean["w"].astype(float), updates["w"][0].astype(float), rtol=1e-3)


@pytest.mark.parametrize("bits", [12, 17, 22, 28])
@pytest.mark.parametrize("dtype", HALF)
def test_a_quantizer_computes_in_float32(bits, dtype):
    quantizer = sa.Quantizer(2.0, bits, 3)
    values = jnp.array([1.6, 0.8, -1.2, 3.0]).astype(dtype)
    wide = values.astype(jnp.float32)
    np.testing.assert_array_equal(quantizer.encode(KEY, values), quantizer.encode(KEY, wide))
    decoded = quantizer.decode(quantizer.encode(KEY, values))
    np.testing.assert_allclose(decoded, jnp.clip(wide, -2, 2), atol=2 / quantizer.scale + 1e-6)
    # In half precision 0.3 is a little more than that: the comparison with the clip is in float32.
    assert float(jnp.asarray(0.3, dtype)) > 0.3
    assert sa.Quantizer(0.3, bits, 3).clipped(jnp.full(2, 0.3, dtype)) == 1


def test_what_is_not_a_number_is_refused_or_seen():
    quantizer = sa.Quantizer(1.0, 8, 1)
    with pytest.raises(ValueError, match="values must be finite, got nan"):
        quantizer.encode(KEY, jnp.array([0.0, jnp.nan]))
    assert jnp.isnan(quantizer.clipped(jnp.array([0.0, jnp.nan])))


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_float64_is_within_rounding_of_float32(kind, x64):
    protocol = PROTOCOLS[kind]
    values = jnp.tile(jnp.array([0.3, -0.7], jnp.float64), (6, 1))
    view = sa.aggregate(KEY, protocol, {"w": values})
    assert view.aggregate["w"].dtype == jnp.float64
    np.testing.assert_allclose(view.aggregate["w"], values.sum(0), atol=6 / protocol.quantizer.scale)


def test_leaves_of_several_types_come_back_in_their_own():
    updates = {"a": jnp.full((3, 2), 0.3, jnp.float16), "b": jnp.full((3, 2), 0.3, jnp.bfloat16), "c": jnp.ones((3, 1))}
    view = sa.aggregate(KEY, sa.plain_sum(3, clip=1.0), updates)
    seen = sa.observe(view, "client:1", {}).update
    assert jax.tree.map(lambda leaf: leaf.dtype, seen) == jax.tree.map(lambda leaf: leaf.dtype, updates)
    for name, leaf in seen.items():
        np.testing.assert_array_equal(leaf, updates[name][1])
