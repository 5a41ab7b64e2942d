"""What of an update a reconstruction explains, beside its definition in float64, and on the mistakes it must show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import Batch, Observation, clients, models
from gia_jax.metrics import explained

apply_fn, PARAMS = models.functional(models.MLP((4, 4, 3), 5, hidden=(6,), rngs=nnx.Rngs(0)))
CLIENT = clients.federated_sgd(clients.cross_entropy(apply_fn))
BATCH = Batch(jax.random.uniform(jax.random.key(1), (2, 4, 4, 3)), jnp.array([1, 3]))
UPDATE = CLIENT(PARAMS, BATCH)


def of(update, batch=BATCH, client_fn=CLIENT):
    return [float(x) for x in explained(client_fn, Observation(PARAMS, update, {}), batch)]


def constant(tree):
    """A client whose update is known, whatever its batch."""
    return lambda params, batch: tree


@settings(derandomize=True, max_examples=25, deadline=None)
@given(seed=st.integers(0, 100), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e15]))
def test_it_is_its_definition_in_float64(seed, scale):
    rng = np.random.default_rng(seed)
    u, g = ({"a": scale * rng.normal(size=(3, 2)), "b": scale * rng.normal(size=4)} for _ in range(2))
    flat = [np.concatenate([tree["a"].ravel(), tree["b"]]) for tree in (u, g)]
    best = max(flat[0] @ flat[1] / (flat[1] @ flat[1]), 0)
    share = 1 - np.sum((flat[0] - best * flat[1]) ** 2) / np.sum(flat[0] ** 2)
    mismatch = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0])
    as_arrays = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree) for tree in (u, g)]
    found = of(as_arrays[0], client_fn=constant(as_arrays[1]))
    np.testing.assert_allclose(found, [share, mismatch, flat[0] @ flat[1] / (flat[1] @ flat[1])], rtol=1e-4, atol=1e-5)


def test_the_truth_explains_all_of_its_update():
    assert of(UPDATE) == pytest.approx([1, 0, 1], abs=1e-6)


@pytest.mark.parametrize("factor", [-1.0, 0.01, 30.0])
def test_a_wrong_sign_and_a_wrong_scale_show_themselves(factor):
    share, mismatch, scale = of(jax.tree.map(lambda leaf: factor * leaf, UPDATE))
    assert share == pytest.approx(float(factor > 0), abs=1e-5)
    assert mismatch == pytest.approx(abs(1 - 1 / factor), rel=1e-4)
    assert scale == pytest.approx(factor, rel=1e-4)


def test_a_kernel_in_another_order_explains_little():
    kernel = UPDATE["dense0"]["kernel"]
    other_order = kernel.reshape(4, 4, 3, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    assert of(UPDATE | {"dense0": UPDATE["dense0"] | {"kernel": other_order}})[0] < 0.9


def test_other_images_explain_less_than_the_truth():
    other = BATCH._replace(inputs=jax.random.uniform(jax.random.key(9), BATCH.inputs.shape))
    assert of(UPDATE, other)[0] < 0.99


@pytest.mark.parametrize(("u", "g", "expected"), [(0, 0, [1, 0, 1]), (0, 1, [0, np.inf, 0]), (1, 0, [0, 1, np.inf])])
def test_updates_of_zeros(u, g, expected):
    trees = [{"a": jnp.full(3, float(value))} for value in (u, g)]
    assert of(trees[0], client_fn=constant(trees[1])) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_compared_in_float32(dtype):
    tree = {"a": jnp.full(300, 3e4, dtype)}
    found = explained(constant(tree), Observation(PARAMS, tree, {}), BATCH)
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}
    assert [float(leaf) for leaf in found] == pytest.approx([1, 0, 1], abs=1e-5)


def test_a_nan_stays_in_its_lane_and_another_structure_is_refused():
    batches = Batch(jnp.stack([BATCH.inputs, BATCH.inputs.at[0, 0].set(jnp.nan)]), jnp.stack([BATCH.labels] * 2))
    found = jax.vmap(lambda batch: explained(CLIENT, Observation(PARAMS, UPDATE, {}), batch))(batches)
    assert np.isnan(found.share).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"client_fn must give an update of the observed one's shapes, .* got \{'a'"):
        of(UPDATE, client_fn=constant({"a": jnp.ones(3)}))
