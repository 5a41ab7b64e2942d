"""What the exact sum gives away, each time with the case in which it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from gia_jax import Batch, clients, labels, metrics, models
from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation import limits

N, WIDTH, KEY = 4, 24, jax.random.key(0)
APPLY, PARAMS = models.functional(models.MLP((5, 5, 1), num_classes=6, hidden=(WIDTH,), rngs=nnx.Rngs(0)))
CLIENT = clients.federated_sgd(clients.cross_entropy(APPLY))
BATCHES = Batch(jax.random.uniform(KEY, (N, 2, 5, 5, 1)), jnp.arange(2 * N).reshape(N, 2) % 6)
EACH = jax.jit(jax.vmap(CLIENT))
SAME = jax.jit(jax.vmap(CLIENT, in_axes=(None, 0)))
SECAGG = functools.partial(sa.secagg, N, threshold=3, clip=1.0)


def test_one_honest_client_among_colluders_is_read_bit_for_bit():
    updates = {"w": jax.random.normal(KEY, (N, 7)) / 3}
    params = {"w": jnp.zeros(7)}
    for protocol in (SECAGG(), sa.lightsecagg(N, privacy=1, survivors=3, clip=1.0)):
        view = sa.aggregate(KEY, protocol, updates, dropouts={1: 2})
        residues, _ = sa.quantized(KEY, protocol, updates)
        found = limits.lone_honest_client(view, 2, np.where(np.arange(N)[:, None] == 2, 0, residues), params)
        np.testing.assert_array_equal(found.update["w"], protocol.quantizer.decode(jnp.asarray(residues[2])))
        with pytest.raises(ValueError, match="client must be a contributor, got 1"):
            limits.lone_honest_client(view, 1, residues, params)


@pytest.fixture(scope="module")
def inconsistent():
    params = limits.inconsistent_models(PARAMS, ["dense0"], 2, N)
    victim = jax.tree.map(lambda leaf: leaf[2], SAME(PARAMS, BATCHES))
    return params, EACH(params, BATCHES), victim


def test_models_that_differ_leave_the_victim_alone_in_the_sum(inconsistent):
    _, gradients, victim = inconsistent
    view = sa.aggregate(KEY, SECAGG(), gradients)
    np.testing.assert_allclose(
        view.aggregate["dense0"]["kernel"], victim["dense0"]["kernel"], atol=1 / view.quantizer.scale
    )
    assert np.abs(victim["dense0"]["kernel"]).max() > 1e-2
    # Without the lie the others are in the sum.
    honest = sa.aggregate(KEY, SECAGG(), SAME(PARAMS, BATCHES))
    assert np.abs(honest.aggregate["dense0"]["kernel"] - victim["dense0"]["kernel"]).max() > 1e-2


def test_masks_bound_to_the_model_turn_that_sum_into_noise(inconsistent):
    params, gradients, _ = inconsistent
    hashes = [limits.model_hash(jax.tree.map(lambda leaf, i=i: leaf[i], params)) for i in range(N)]
    assert len(set(hashes)) == 2
    view = sa.aggregate(KEY, SECAGG(model_hashes=hashes), gradients, insecure_seed=0)
    residues, _ = sa.quantized(KEY, SECAGG(), gradients)
    error = view.total - residues.sum(0, dtype=np.uint32)
    assert stats.kstest(error / 2**32, "uniform").pvalue > 1e-4
    # Clients with one model get their sum, also where some drop out.
    for dropouts in ({}, {1: 2}):
        same = sa.aggregate(KEY, SECAGG(model_hashes=[hashes[0]] * N), gradients, dropouts=dropouts)
        left = list(same.contributors)
        np.testing.assert_array_equal(same.total, residues[left].sum(0, dtype=np.uint32))
    with pytest.raises(ValueError, match="model_hashes must be 4, got 3"):
        SECAGG(model_hashes=hashes[:3])


def test_a_hash_is_of_every_value_name_and_shape():
    base = {"a": jnp.arange(4.0), "b": jnp.zeros(2)}
    others = [
        {"a": jnp.arange(4.0).at[3].add(1e-6), "b": jnp.zeros(2)},
        {"a": jnp.arange(4.0), "c": jnp.zeros(2)},
        {"a": jnp.arange(4.0).reshape(2, 2), "b": jnp.zeros(2)},
        {"a": jnp.arange(4), "b": jnp.zeros(2)},
    ]
    assert limits.model_hash(base) == limits.model_hash(jax.tree.map(jnp.array, base))
    assert len({limits.model_hash(tree) for tree in [base, *others]}) == 5


def test_an_imprint_separates_examples_within_the_secure_sum():
    quantiles = stats.norm(0.5, jnp.std(BATCHES.inputs.mean((2, 3, 4)))).ppf(np.arange(1, WIDTH + 1) / (WIDTH + 1))
    altered = limits.imprinted(PARAMS, ["dense0"], ["head"], jnp.asarray(quantiles, jnp.float32))
    gradients = SAME(altered, BATCHES)
    # Coarse numbers are enough, because the altered layers keep the gradients of all labels large.
    protocol = SECAGG(bits=16)
    found = limits.imprint_inversion(sa.aggregate(KEY, protocol, gradients).aggregate, ["dense0"], tolerance=1e-3)
    truth = np.asarray(BATCHES.inputs.reshape(2 * N, 25))
    bins = np.searchsorted(quantiles, truth.mean(1))
    alone = np.array([np.sum(bins == own) == 1 and own > 0 for own in bins])
    assert 0 < alone.sum() < 2 * N
    errors = np.square(np.asarray(found.inputs)[None] - truth[:, None]).mean(-1).min(1)
    assert np.all((errors < 1e-3) == alone)
    np.testing.assert_array_equal(np.asarray(found.occupied), np.isin(np.arange(1, WIDTH + 1), bins))
    # The honest model's units overlap: the same reading finds an example only where a unit sees it alone.
    plain = SAME(PARAMS, BATCHES)
    blind = limits.imprint_inversion(sa.aggregate(KEY, protocol, plain).aggregate, ["dense0"]).inputs
    assert np.sum(np.square(np.asarray(blind)[None] - truth[:, None]).mean(-1).min(1) < 1e-3) <= 1 < alone.sum()


@pytest.mark.parametrize(("num_bins", "num_examples"), [(128, 8), (128, 128), (8, 3)])
def test_the_share_of_an_imprint_is_that_of_a_simulation(num_bins, num_examples):
    rng = np.random.default_rng(0)
    regions = rng.integers(0, num_bins + 1, (2000, num_examples))  # 0: below the first threshold
    counts = [np.bincount(row, minlength=num_bins + 1)[1:] for row in regions]
    shares = np.array([np.sum(row == 1) / num_examples for row in counts])
    expected = limits.imprint_share(num_bins, num_examples)
    assert abs(shares.mean() - expected) < 5 * shares.std() / np.sqrt(2000) + 1e-9


def test_many_sums_give_single_updates_where_they_are_enough():
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(5, 30))
    participation = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]], bool)
    found = limits.disaggregated(participation, participation @ updates)
    np.testing.assert_array_equal(found.determined, [True, True, True, False, False])
    np.testing.assert_allclose(found.updates[:3], updates[:3], atol=1e-12)
    # Always the same clients: their sum, however many rounds.
    assert not limits.disaggregated(np.ones((50, 5), bool), np.ones((50, 1)) * updates.sum(0)).determined.any()
    with pytest.raises(ValueError, match="sums must have 4 rounds, got 3"):
        limits.disaggregated(participation, np.zeros((3, 2)))


def test_sums_of_secure_rounds_are_disaggregated_up_to_rounding():
    updates = {"w": jax.random.normal(KEY, (N, 6)) / 4}
    rounds = [{}, {0: 0}, {1: 0}, {2: 0}, {3: 0}]
    views = [sa.aggregate(jax.random.key(i), SECAGG(), updates, dropouts=out) for i, out in enumerate(rounds)]
    participation = np.array([[client in view.contributors for client in range(N)] for view in views])
    found = limits.disaggregated(participation, np.stack([view.aggregate["w"] for view in views]))
    assert found.determined.all()
    np.testing.assert_allclose(found.updates, updates["w"], atol=1e-5)


def test_counts_in_the_clear_and_a_secure_sum_give_all_labels():
    sizes = (1, 3, 3, 1)
    parts = [Batch(BATCHES.inputs.reshape(-1, 5, 5, 1)[:size], jnp.array([0, 5, 5])[:size]) for size in sizes]
    small = jax.tree.map(lambda leaf: leaf * 0.1, PARAMS)
    client_fn = jax.jit(CLIENT)
    weighted = [jax.tree.map(lambda leaf, n=n: leaf * n, client_fn(small, part)) for n, part in zip(sizes, parts)]
    updates = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weighted)
    view = sa.aggregate(KEY, sa.secagg(N, threshold=3, clip=4.0), updates)
    found = limits.joint_labels(view, small, dict(enumerate(sizes)), labels.dense("head"))
    np.testing.assert_array_equal(np.sort(found), np.sort(np.concatenate([part.labels for part in parts])))
    with pytest.raises(ValueError, match=r"counts must be of the contributors \(0, 1, 2, 3\), got \[0\]"):
        limits.joint_labels(view, small, {0: 1}, labels.dense("head"))


def test_distributed_noise_is_weaker_against_sybils():
    left = limits.noise_against_server(5.0, num_clients=100, num_honest=1)
    assert left == pytest.approx(0.5)
    assert metrics.epsilon(5.0, delta=1e-5) == pytest.approx(0.73, abs=0.01)
    assert metrics.epsilon(left, delta=1e-5) == pytest.approx(10.0, abs=0.05)
    # By simulation: the honest clients' share of the variance.
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=2.0 / np.sqrt(10), size=(10, 20_000))
    assert noise[:3].sum(0).std() == pytest.approx(
        limits.noise_against_server(2.0, num_clients=10, num_honest=3), rel=0.03
    )
    assert limits.noise_against_server(2.0, num_clients=10, num_honest=10) == 2.0
    for bad in (0, 11):
        with pytest.raises(ValueError, match=f"num_honest must be an integer from 1 to 10, got {bad}"):
            limits.noise_against_server(1.0, num_clients=10, num_honest=bad)


def test_layers_that_are_missing_are_named():
    with pytest.raises(ValueError, match=r"layer \('dense9',\) does not exist: 'dense9' not found"):
        limits.inconsistent_models(PARAMS, ["dense9"], 0, N)
    with pytest.raises(ValueError, match="victim must be an integer from 0 to 3, got 4"):
        limits.inconsistent_models(PARAMS, ["dense0"], 4, N)
    with pytest.raises(ValueError, match=r"thresholds must have shape \(24,\), got \(3,\)"):
        limits.imprinted(PARAMS, ["dense0"], ["head"], jnp.zeros(3))
