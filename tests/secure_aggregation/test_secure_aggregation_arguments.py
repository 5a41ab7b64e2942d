"""Numbers that are no whole numbers, out of range, or too large for memory are refused in one line that names them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import labels
from gia_jax import secure_aggregation as sa
from gia_jax.cli.names import make_protocol
from gia_jax.secure_aggregation import limits

KEY, NAN = jax.random.key(0), float("nan")
ZEROS = np.zeros((3, 2), np.uint32)
PLAIN = sa.plain_sum(3, clip=1.0)
LAYERS = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "b": {"kernel": jnp.ones((3, 2))}}


pytestmark = pytest.mark.usefixtures("unchecked")


def secagg(n=4, **options):
    return sa.secagg(n, **{"threshold": 3, "clip": 1.0, **options})


def light(n=4, **options):
    return sa.lightsecagg(n, **{"privacy": 1, "survivors": 3, "clip": 1.0, **options})


def packed(n=4, **options):
    return sa.packed_shamir(n, **{"num_secrets": 1, "privacy": 1, **options})


def fft(grid=(2, 3), zeros=(0, 1), secrets=(1, 1)):
    return sa.fft_sharing(grid, zeros=zeros, secrets=secrets)


def paillier(n=3, **options):
    return sa.homomorphic(n, "paillier", clip=1.0, **options)


def run(protocol=PLAIN, residues=ZEROS, **options):
    return sa.aggregate_residues(protocol, residues, **options)


def weighted(weights, max_weight=9):
    return sa.weighted_mean(KEY, PLAIN, {"w": jnp.zeros((3, 1))}, weights, max_weight=max_weight)


def imprinted(thresholds=(0.1, 0.2, 0.3), gain=0.25):
    return limits.imprinted(LAYERS, ["a"], ["b"], jnp.array(thresholds), gain=gain)


def joint(counts):
    view = sa.aggregate(KEY, PLAIN, {"w": jnp.zeros((3, 1))})
    return limits.joint_labels(view, {}, counts, labels.dense("head"))


def noise(multiplier=1.0, **options):
    return limits.noise_against_server(multiplier, **{"num_clients": 4, "num_honest": 2, **options})


WHOLE = "must be an integer "
REFUSED = [
    # Whole numbers.
    (lambda: secagg(2.5), "num_clients " + WHOLE + "of at least 1, got 2.5"),
    (lambda: secagg(bits=2.5), "bits " + WHOLE + "from 2 to 31, got 2.5"),
    (lambda: secagg(threshold=1.5), "threshold " + WHOLE + "of at least 1, got 1.5"),
    (lambda: secagg(threshold=NAN), "threshold " + WHOLE + "of at least 1, got nan"),
    (lambda: secagg(threshold=True), "threshold " + WHOLE + "of at least 1, got True"),
    (lambda: secagg(neighbours=2.0), "neighbours " + WHOLE + "of at least 1, got 2.0"),
    (lambda: secagg(model_hashes=["model"] * 4), "model_hashes must be bytes, got 'model'"),
    (lambda: light(4.0), "num_clients " + WHOLE + "of at least 1, got 4.0"),
    (lambda: light(privacy=1.0), "privacy " + WHOLE + "of at least 0, got 1.0"),
    (lambda: light(survivors=3.0), "survivors " + WHOLE + "of at least 1, got 3.0"),
    (lambda: light(prime=2.0**31 - 1), "modulus " + WHOLE + "from 3 to 4294967296, got 2147483647.0"),
    (lambda: packed(4.0), "num_shares " + WHOLE + "of at least 1, got 4.0"),
    (lambda: packed(num_secrets=1.0), "num_secrets " + WHOLE + "of at least 1, got 1.0"),
    (lambda: packed(privacy=-1), "privacy " + WHOLE + "of at least 0, got -1"),
    (lambda: packed(prime=13.0), "prime " + WHOLE + "of at least 1, got 13.0"),
    (lambda: packed(prime=15), "prime must be one, above 6 and below 2^31, got 15"),
    (lambda: light(prime=2**31 - 3), "prime must be one, above 7 and below 2^31, got 2147483645"),
    (lambda: fft((2.0, 3)), "grid " + WHOLE + "from 0 to 2048, got 2.0"),
    (lambda: fft(zeros=(0, 1.0)), "zeros " + WHOLE + "from 0 to 2048, got 1.0"),
    (lambda: fft(secrets=(1.5, 1)), "secrets " + WHOLE + "from 0 to 2048, got 1.5"),
    (lambda: paillier(3.0), "num_clients " + WHOLE + "of at least 1, got 3.0"),
    (lambda: paillier(key_bits=2048.0), "key_bits " + WHOLE + "from 1024 to 16384, got 2048.0"),
    (lambda: make_protocol("secagg", 2.5, clip=1.0), "num_clients " + WHOLE + "of at least 1, got 2.5"),
    (lambda: sa.Quantizer(1.0, 8, 1, 97.0), "modulus " + WHOLE + "from 3 to 4294967296, got 97.0"),
    (lambda: run(dropouts={1.0: 0}), "dropouts must name clients from 0 to 2, got 1.0"),
    (lambda: run(dropouts={True: 0}), "dropouts must name clients from 0 to 2, got True"),
    (lambda: run(dropouts={1: 0.5}), "dropouts[1] " + WHOLE + "from 0 to 1, got 0.5"),
    (lambda: run(dropouts={1: -1}), "dropouts[1] " + WHOLE + "from 0 to 1, got -1"),
    (lambda: run(dropouts={1: 2}), "dropouts[1] " + WHOLE + "from 0 to 1, got 2"),
    (lambda: run(insecure_seed=1.0), "insecure_seed " + WHOLE + "of at least 0, got 1.0"),
    (lambda: run(insecure_seed=-1), "insecure_seed " + WHOLE + "of at least 0, got -1"),
    (lambda: weighted([1, 2.0, 3]), "weights must be integers from 1 to max_weight=9, got 2.0"),
    (lambda: weighted([1, 2, 3], 9.0), "max_weight " + WHOLE + "of at least 1, got 9.0"),
    # Residues.
    (lambda: run(residues=ZEROS.astype(float)), "residues must be of uint32, got float64"),
    (lambda: run(residues=ZEROS.astype(int) - 1), "residues must be of uint32, got int64"),
    (lambda: run(residues=ZEROS[0]), "residues must have shape (3, p > 0), got (2,)"),
    (lambda: run(like=jnp.zeros(3)), "like must have 2 entries, as residues have, got 3"),
    (
        lambda: sa.observe(run(), "aggregate", {}, colluders={1: ZEROS[1].astype(float)}),
        "colluders[1] must be of uint32, got float64",
    ),
    (lambda: sa.observe(run(), "aggregate", {}, colluders={1: ZEROS}), "colluders[1] must have shape (2,), got (3, 2)"),
    # Memory and time.
    (lambda: secagg(10**12), "bits must be small enough for a sum of 1000000000000 clients modulo 4294967296, got 22"),
    (
        lambda: light(10**8, bits=2, survivors=10**8),
        "num_secrets + privacy must be at most 2048, and times num_shares at most 4194304, "
        "got 100000000 times 100000000",
    ),
    (
        lambda: packed(10**7),
        "num_secrets + privacy must be at most 2048, and times num_shares at most 4194304, got 2 times 10000000",
    ),
    (lambda: fft((10**6, 10**6 + 1)), "grid " + WHOLE + "from 0 to 2048, got 1000000"),
    (lambda: paillier(key_bits=10**9), "key_bits " + WHOLE + "from 1024 to 16384, got 1000000000"),
    (lambda: joint({0: 10**12, 1: 1, 2: 1}), "counts must fit into memory"),
    (lambda: limits.inconsistent_models(LAYERS, ["a"], 0, 10**12), "num_clients must fit into memory"),
    # Limits.
    (lambda: limits.inconsistent_models(LAYERS, ["a"], 0.0, 3), "victim " + WHOLE + "from 0 to 2, got 0.0"),
    (lambda: limits.imprint_share(2.5, 3), "num_bins " + WHOLE + "of at least 1, got 2.5"),
    (lambda: limits.imprint_share(3, -1), "num_examples " + WHOLE + "of at least 1, got -1"),
    (lambda: noise(NAN), "noise_multiplier must be positive, got nan"),
    (lambda: noise(float("inf")), "noise_multiplier must be finite, got inf"),
    (lambda: noise(num_clients=2.5), "num_clients " + WHOLE + "of at least 1, got 2.5"),
    (lambda: noise(num_honest=1.5), "num_honest " + WHOLE + "from 1 to 4, got 1.5"),
    (lambda: joint({0: 1, 1: 0, 2: 1}), "counts[1] " + WHOLE + "of at least 1, got 0"),
    (lambda: joint({0: 1, 1: -1, 2: 1}), "counts[1] " + WHOLE + "of at least 1, got -1"),
    (lambda: joint({0: 1, 1: 1.5, 2: 1}), "counts[1] " + WHOLE + "of at least 1, got 1.5"),
    (lambda: imprinted((0.1, 0.3, 0.2)), "thresholds must rise, got 0.3"),
    (lambda: imprinted((0.1, NAN, 0.2)), "thresholds must be finite, got nan"),
    (lambda: imprinted(gain=NAN), "gain must be positive, got nan"),
    (lambda: limits.imprint_inversion(LAYERS, ["a"], tolerance=NAN), "tolerance must be from 0 to 1, got nan"),
    (lambda: limits.imprint_inversion(LAYERS, ["a"], tolerance=-1.0), "tolerance must be from 0 to 1, got -1.0"),
    (
        lambda: limits.disaggregated(np.ones((2, 2), bool), np.array([[1.0], [NAN]])),
        "sums must be finite, got nan",
    ),
    (lambda: limits.disaggregated(np.ones((1, 2)), np.ones((1, 1))), "participation must be of booleans, got float64"),
    (lambda: limits.lone_honest_client(run(), 0, ZEROS[:2], {}), "residues must have 3 rows, one for each client"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_it_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, compared below
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_integers_of_numpy_are_whole_numbers():
    four = np.int64(4)
    for protocol in (secagg(four, threshold=np.int8(3)), light(four, privacy=np.int64(1)), PLAIN):
        count = protocol.quantizer.num_clients
        view = run(protocol, np.ones((count, 2), np.uint32), dropouts={np.int64(1): np.int64(1)}, insecure_seed=four)
        assert view.total.tolist() == [len(view.contributors)] * 2


def test_integers_of_numpy_do_not_overflow():
    with pytest.raises(ValueError, match="bits must be small enough for a sum of 2000000000 clients"):
        sa.Quantizer(1.0, np.int8(31), np.int32(2 * 10**9))
    assert sa.Quantizer(1.0, np.int8(31), np.int8(1), np.int64(2**32)) == sa.Quantizer(1.0, 31, 1)
    sharing = packed(np.int8(100), num_secrets=np.int8(90), prime=np.int64(2**31 - 1))
    assert (sharing.num_shares, sharing.prime) == (100, 2**31 - 1)
    assert fft((np.int8(13), np.int8(14))).num_shares == 182


def test_old_keys_give_what_new_ones_give():
    updates = {"w": jax.random.normal(KEY, (3, 5))}
    old, new = (sa.quantized(key, PLAIN, updates)[0] for key in (jax.random.PRNGKey(7), jax.random.key(7)))
    np.testing.assert_array_equal(old, new)


def test_a_bin_that_is_not_a_number_is_seen_and_spoils_no_other():
    kernel = jnp.arange(6.0).reshape(2, 3)
    clean = limits.imprint_inversion({"a": {"kernel": kernel, "bias": jnp.array([3.0, 2.0, 1.0])}}, ["a"])
    bad = limits.imprint_inversion({"a": {"kernel": kernel, "bias": jnp.array([jnp.nan, 2.0, 1.0])}}, ["a"])
    assert jnp.isnan(bad.inputs[0]).all()
    assert bad.occupied.all()
    np.testing.assert_array_equal(bad.inputs[1:], clean.inputs[1:])
