"""What an attack is given: the only way from a server's view to an observation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanges import fft
from flax import nnx

from gia_jax import Batch, ThreatModel, attacks, clients, grants, labels, models
from gia_jax import secure_aggregation as sa

N = 4
MODULE = models.MLP((6, 6, 1), hidden=(), num_classes=5, rngs=nnx.Rngs(0))
APPLY, PARAMS = models.functional(MODULE)
CLIENT = clients.federated_sgd(clients.cross_entropy(APPLY))
BATCH = Batch(jax.random.uniform(jax.random.key(0), (N, 1, 6, 6, 1)), jnp.arange(N)[:, None])
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def gradients():
    return jax.jit(jax.vmap(CLIENT, in_axes=(None, 0)))(PARAMS, BATCH)


def masked():
    return {
        "secagg": sa.secagg(N, threshold=3, clip=2.0),
        "lightsecagg": sa.lightsecagg(N, privacy=1, survivors=3, clip=2.0),
    }


def close(tree, other, tolerance):
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, atol=tolerance)


@pytest.mark.parametrize("kind", masked())
def test_the_aggregate_is_the_gradient_of_all_batches_together(kind, gradients):
    view = sa.aggregate(KEY, masked()[kind], gradients)
    observation = sa.observe(view, "aggregate", PARAMS)
    together = Batch(BATCH.inputs.reshape(N, 6, 6, 1), BATCH.labels.reshape(N))
    close(observation.update, jax.jit(CLIENT)(PARAMS, together), 1e-5)
    assert jax.tree.structure(observation.update) == jax.tree.structure(PARAMS)
    assert observation.extra == {}


@pytest.mark.parametrize("kind", masked())
def test_colluders_that_are_all_others_leave_the_victim_bit_for_bit(kind, gradients):
    protocol = masked()[kind]
    view = sa.aggregate(KEY, protocol, gradients, dropouts={1: 2})
    residues, _ = sa.quantized(KEY, protocol, gradients)
    colluders = {client: residues[client] for client in (0, 3)}
    in_clear = view._replace(uploads={2: residues[2]})
    for target in ("client:2", "aggregate"):
        update = sa.observe(view, target, PARAMS, colluders=colluders).update
        alone = sa.observe(in_clear, "client:2", PARAMS).update
        for one, two in zip(jax.tree.leaves(update), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(one, two)
    # One colluder less: the rest is a sum of two, and the upload is masked.
    rest = sa.observe(view, "aggregate", PARAMS, colluders={0: residues[0]}).update
    close(rest, jax.tree.map(lambda leaf: (leaf[2] + leaf[3]) / 2, gradients), 1e-5)
    upload = sa.observe(view, "client:2", PARAMS, colluders={0: residues[0]}).update
    close(upload, sa.observe(view, "client:2", PARAMS).update, 0)


def test_what_the_threat_model_grants_and_nothing_else(gradients):
    view = sa.aggregate(KEY, masked()["secagg"], gradients)
    extra = grants(jax.random.key(0), ThreatModel(), Batch(BATCH.inputs[2], BATCH.labels[2]))
    observation = sa.observe(view, "client:2", PARAMS, extra=extra)
    assert set(observation.extra) == {"inputs_like"}
    assert not np.any(observation.extra["inputs_like"])


def reconstruction(observation, size):
    like = jnp.zeros((size, 6, 6, 1))
    attack = attacks.linear_inversion(labels.dense("head"), label_fn=lambda _: jnp.zeros(size, int))
    return jax.jit(attack)(jax.random.key(0), observation._replace(extra={"inputs_like": like})).batch.inputs


def squared_error(found, truth):
    return jnp.mean(jnp.square(jnp.clip(found, 0, 1) - truth))


def test_an_attack_on_an_upload_finds_nothing_and_on_one_client_alone_everything(gradients):
    protocol = masked()["secagg"]
    residues, _ = sa.quantized(KEY, protocol, gradients)
    view = sa.aggregate(KEY, protocol, gradients)
    truth = BATCH.inputs[2]
    everyone = {client: residues[client] for client in (0, 1, 3)}
    opened = reconstruction(sa.observe(view, "client:2", PARAMS, colluders=everyone), 1)
    assert squared_error(opened, truth) < 1e-5
    # The null: the same attack on uniform residues in place of the upload.
    noise = np.random.default_rng(0).integers(0, 2**32, residues.shape[1], dtype=np.uint32)
    for uploads in (view.uploads, {2: noise}):
        observation = sa.observe(view._replace(uploads=uploads), "client:2", PARAMS)
        assert squared_error(reconstruction(observation, 1), truth) > 0.05


def test_a_sum_of_one_client_is_no_protection(gradients):
    alone = jax.tree.map(lambda leaf: leaf[:1], gradients)
    for protocol in (sa.secagg(1, threshold=1, clip=2.0), sa.lightsecagg(1, privacy=0, survivors=1, clip=2.0)):
        observation = sa.observe(sa.aggregate(KEY, protocol, alone), "aggregate", PARAMS)
        close(observation.update, jax.tree.map(lambda leaf: leaf[0], alone), 2e-6)


def test_ciphertext_is_named_and_never_an_observation():
    protocol = fft(6)
    view = sa.aggregate(KEY, protocol, {"w": jnp.ones((6, 3)) / 2})
    seen = sa.observe(view, "client:3", {"w": jnp.zeros(3)})
    assert isinstance(seen, sa.Ciphertext)
    assert str(seen) == "n/a: ciphertext"
    assert seen.num_bytes == len(view.uploads[3]) > 100
    close(sa.observe(view, "aggregate", {"w": jnp.zeros(3)}).update, {"w": np.full(3, 0.5)}, 1e-6)


def test_bad_targets_and_colluders_are_named(gradients):
    protocol = masked()["secagg"]
    view = sa.aggregate(KEY, protocol, gradients, dropouts={1: 2})
    residues, _ = sa.quantized(KEY, protocol, gradients)
    for target in ("client", "client:", "client:x", "client:-1", "all"):
        with pytest.raises(ValueError, match='target must be "aggregate" or such as "client:3", got'):
            sa.observe(view, target, PARAMS)
    with pytest.raises(ValueError, match="target must name a client that sent something, got 'client:1'"):
        sa.observe(view, "client:1", PARAMS)
    with pytest.raises(ValueError, match="colluders must be contributors, got client 1"):
        sa.observe(view, "aggregate", PARAMS, colluders={1: residues[1]})
    with pytest.raises(ValueError, match="colluders must leave a client to observe"):
        sa.observe(view, "aggregate", PARAMS, colluders={client: residues[client] for client in (0, 2, 3)})
    with pytest.raises(sa.AggregationAborted) as caught:
        sa.aggregate(KEY, protocol, gradients, dropouts={1: 3, 2: 3})
    with pytest.raises(ValueError, match="the aggregate of a run that gave none"):
        sa.observe(caught.value.view, "aggregate", PARAMS)
    assert isinstance(sa.observe(caught.value.view, "client:0", PARAMS).update, dict)
