"""What reaches the adversary: what is granted, and nothing of the truth beside it."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, Observation, ThreatModel, clients, granted, granted_labels, models, observe, observed
from gia_jax.threat.recorded import _inputs_like

PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
BATCH = Batch(jax.random.normal(jax.random.key(0), (8, 4)), jnp.array([0, 1, 2, 0, 1, 2, 2, 2]))
STATISTICS = [(jnp.arange(4.0), jnp.ones(4))]
CLIENT = clients.federated_sgd(clients.cross_entropy(lambda params, x: x @ params["kernel"] + params["bias"]))
GRANTS = {"batch_size": "inputs_like", "labels": "labels", "statistics": "statistics"}
EVERY_THREAT = [
    ThreatModel(batch_size=batch_size, labels=labels, statistics=statistics)
    for batch_size, labels, statistics in itertools.product([False, True], repeat=3)
]


def silent_client(params, batch):
    """Its update tells nothing: what else arrives comes from the grants alone."""
    del batch
    return jax.tree.map(jnp.zeros_like, params)


def see(threat, batch=BATCH, *, seed=1, client_fn=CLIENT, statistics=STATISTICS):
    return observe(jax.random.key(seed), threat, client_fn, PARAMS, batch, statistics=statistics)


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def test_params_and_update_are_what_server_and_client_sent():
    observation = see(ThreatModel())
    assert equal(observation.params, PARAMS)
    assert equal(observation.update, CLIENT(PARAMS, BATCH))


@pytest.mark.parametrize("threat", EVERY_THREAT, ids=ThreatModel.describe)
def test_exactly_the_grants_are_named(threat):
    assert set(see(threat).extra) == {name for grant, name in GRANTS.items() if getattr(threat, grant)}


@pytest.mark.parametrize("threat", EVERY_THREAT, ids=ThreatModel.describe)
def test_what_is_not_granted_leaves_no_trace(threat):
    other = Batch(
        -3 * BATCH.inputs,
        BATCH.labels if threat.labels else (BATCH.labels + 1) % 3,
    )
    statistics = STATISTICS if threat.statistics else [(jnp.full(4, jnp.nan),) * 2]
    before = see(threat, client_fn=silent_client)
    after = see(threat, other, client_fn=silent_client, statistics=statistics)
    assert equal(before, after)


def test_the_batch_size_grants_a_shape_without_pixels():
    like = see(ThreatModel()).extra["inputs_like"]
    assert (like.shape, like.dtype) == (BATCH.inputs.shape, BATCH.inputs.dtype)
    assert not np.any(like)


def test_an_order_of_the_batch_does_not_show_in_unordered_labels():
    """The multiset is granted; a permuted batch gives an observation of the same distribution."""
    labels = [see(ThreatModel(labels=True), seed=seed).extra["labels"] for seed in range(12)]
    for found in labels:
        np.testing.assert_array_equal(np.sort(found), np.sort(BATCH.labels))
    assert len({tuple(map(int, found)) for found in labels}) > 6
    again = see(ThreatModel(labels=True), seed=3).extra["labels"]
    np.testing.assert_array_equal(again, labels[3])


def test_the_order_of_labels_comes_only_with_its_grant():
    found = see(ThreatModel(labels=True, label_order=True)).extra["labels"]
    np.testing.assert_array_equal(found, BATCH.labels)
    with pytest.raises(ValueError, match="label_order=True needs labels=True, got labels=False"):
        ThreatModel(label_order=True)


def test_soft_labels_are_shuffled_by_rows():
    soft = jax.nn.softmax(jax.random.normal(jax.random.key(2), (8, 3)))
    found = np.asarray(see(ThreatModel(labels=True), BATCH._replace(labels=soft)).extra["labels"])
    matches = np.all(found[:, None] == np.asarray(soft)[None], -1)
    np.testing.assert_array_equal(matches.sum(0), np.ones(8))
    assert not np.array_equal(found, soft)


def test_statistics_are_passed_on_or_missed():
    assert equal(see(ThreatModel(statistics=True)).extra["statistics"], STATISTICS)
    with pytest.raises(ValueError, match="statistics must be given where the threat model grants them, got None"):
        see(ThreatModel(statistics=True), statistics=None)


def test_draws_are_passed_on_or_missed():
    key = jax.random.key(9)
    found = observe(key, ThreatModel(draws=True), CLIENT, PARAMS, BATCH, draws=key).extra
    assert found["draws"] == key
    assert "draws" not in observe(key, ThreatModel(), CLIENT, PARAMS, BATCH, draws=key).extra
    with pytest.raises(ValueError, match="draws must be given where the threat model grants them, got None"):
        see(ThreatModel(draws=True))
    assert ThreatModel(draws=True).describe().endswith("update, batch size, the client's random draws")


def test_a_tree_of_labels_is_shuffled_by_one_permutation():
    many = {"place": 10.0 * jnp.arange(8)[:, None], "number": (jnp.arange(8),)}
    found = see(ThreatModel(labels=True), BATCH._replace(labels=many), client_fn=silent_client).extra["labels"]
    order = np.asarray(found["number"][0])
    np.testing.assert_array_equal(np.sort(order), np.arange(8))
    assert not np.array_equal(order, np.arange(8))
    np.testing.assert_array_equal(found["place"][:, 0], 10.0 * order)
    np.testing.assert_array_equal(
        order,
        see(ThreatModel(labels=True), BATCH._replace(labels=jnp.arange(8)), client_fn=silent_client).extra["labels"],
    )


def test_description_names_every_grant():
    assert ThreatModel(batch_size=False).describe() == "honest-but-curious server; knows parameters, update"
    everything = ThreatModel(name="eavesdropper", labels=True, statistics=True).describe()
    assert everything == ("eavesdropper; knows parameters, update, batch size, labels (unordered), batch statistics")
    assert ThreatModel(statistics="inferred").describe().endswith("batch size, inferred batch statistics")
    assert "labels (in order)" in ThreatModel(labels=True, label_order=True).describe()


def test_many_victims_are_observed_under_vmap_and_jit():
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1], leaf]), BATCH)
    keys = jax.random.split(jax.random.key(4), 3)
    threat = ThreatModel(labels=True)
    many = jax.jit(jax.vmap(lambda key, batch: observe(key, threat, CLIENT, PARAMS, batch)))(keys, batches)
    for i in range(3):
        one = observe(keys[i], threat, CLIENT, PARAMS, jax.tree.map(lambda leaf, i=i: leaf[i], batches))
        np.testing.assert_allclose(many.update["kernel"][i], one.update["kernel"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(many.extra["labels"][i], one.extra["labels"])


def test_a_missing_grant_is_named_with_what_there_is():
    nothing = Observation(PARAMS, PARAMS, {})
    with pytest.raises(ValueError, match=r"does not grant 'labels'; observation\.extra has nothing"):
        granted_labels(nothing)
    with pytest.raises(ValueError, match=r"does not grant 'statistics'; .* \['inputs_like', 'labels'\]"):
        granted(see(ThreatModel(labels=True)), "statistics")


def unlike(params, batch):
    del batch
    return {"kernel": params["kernel"]}


def not_a_number(params, batch):
    del batch
    return jax.tree.map(lambda p: p * jnp.nan, params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": Batch(BATCH.inputs[:0], BATCH.labels[:0])}, r"batch\.inputs .* got \(0, 4\)"),
        ({"batch": Batch(BATCH.inputs[:3], BATCH.labels)}, r"batch\.labels must have a first axis of 3 .* got \(8,\)"),
        ({"batch": BATCH._replace(labels=BATCH.labels + 1)}, r"batch\.labels must be at least 0 and below 3, got 3"),
        ({"batch": BATCH._replace(labels=BATCH.labels - 2)}, r"batch\.labels .* got -2"),
        ({"batch": BATCH._replace(inputs=BATCH.inputs * jnp.nan)}, r"batch\.inputs must be finite, got nan"),
        ({"params": {**PARAMS, "bias": jnp.full(3, jnp.nan)}}, r"params must be finite, got nan at params\['bias'\]"),
        ({"client_fn": unlike}, r"update does not fit params: update\['bias'\] is missing"),
        ({"client_fn": not_a_number}, r"update must be finite, got nan"),
    ],
)
def test_refusals_name_argument_and_value(arguments, message):
    given = {"client_fn": CLIENT, "params": PARAMS, "batch": BATCH, **arguments}
    with pytest.raises(ValueError, match=message):
        observe(jax.random.key(0), ThreatModel(), **given, num_classes=3)


UPDATE = CLIENT(PARAMS, BATCH)


def test_a_recorded_update_is_seen_like_that_of_a_simulated_client():
    threat = ThreatModel(labels=True, statistics=True)
    seen = observed(PARAMS, UPDATE, inputs_like=BATCH.inputs, labels=BATCH.labels, statistics=STATISTICS)
    simulated = see(threat)
    assert equal(seen._replace(extra={}), simulated._replace(extra={}))
    assert seen.extra.keys() == simulated.extra.keys()
    assert not np.any(seen.extra["inputs_like"])
    assert ThreatModel.of(seen) == threat
    assert observed(PARAMS, UPDATE).extra == {}


def test_a_recorded_update_takes_the_types_of_the_parameters():
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), UPDATE)
    seen = observed(PARAMS, double, inputs_like=jax.ShapeDtypeStruct((8, 4), jnp.float32), labels=[2] * 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(seen.update)} == {jnp.dtype(jnp.float32)}
    assert seen.extra["labels"].tolist() == [2] * 8


def image_model(params, images):
    return jax.lax.conv_general_dilated(
        images, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).mean((1, 2))


IMAGES = {"conv": jnp.ones((3, 3, 3, 5))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": {"kernel": UPDATE["kernel"]}}, r"update\['bias'\] is missing"),
        ({"update": list(UPDATE.values())}, r"update must be a dict as params is, got a list: interop\.from_torch"),
        ({"params": list(PARAMS.values())}, r"params must be a dict as update is, got a list: interop\.from_torch"),
        ({"update": None}, "update must hold at least one array, got None"),
        (
            {"update": UPDATE | {"kernel": UPDATE["kernel"].T}},
            r"\['kernel'\] has shape \(3, 4\), expected \(4, 3\)",
        ),
        ({"update": UPDATE | {"bias": UPDATE["bias"].at[1].set(jnp.nan)}}, "update must be finite, got nan"),
        ({"update": UPDATE | {"bias": jnp.arange(3)}}, "must be of a floating type, got int32: leave out counters"),
        ({"update": jax.tree.map(jnp.zeros_like, UPDATE)}, "update must not be zero everywhere"),
        ({"inputs_like": jnp.zeros(4)}, r"got \(4,\): is the batch axis missing"),
        ({"inputs_like": jnp.zeros((8, 5)), "apply_fn": lambda p, x: x @ p["kernel"]}, r"got shape \(8, 5\)"),
        ({"inputs_like": np.zeros((1, 4), np.uint8)}, "got uint8 pixels: divide them by 255"),
        ({"labels": [0, 1]}, "batch.labels must have a first axis of 8 examples"),
        ({"labels": [3] * 8, "num_classes": 3}, "batch.labels must be at least 0 and below 3, got 3"),
        ({"labels": [3] * 8, "apply_fn": lambda p, x: x @ p["kernel"]}, "must be at least 0 and below 3, got 3"),
        ({"labels": [[2]] * 8, "apply_fn": lambda p, x: x @ p["kernel"]}, r"shape \(8, 1\) must be probabilities"),
    ],
)
def test_what_was_not_recorded_of_such_a_client_is_refused(change, message):
    arguments = {"params": PARAMS, "update": UPDATE, "inputs_like": BATCH.inputs} | change
    with pytest.raises(ValueError, match=message):
        observed(**arguments)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 3, 8, 8), "the channels are first (NCHW), and the model takes (2, 8, 8, 3)"),
        ((8, 8, 3), "the batch axis is missing, and the model takes (1, 8, 8, 3)"),
        (
            (3, 8, 8),
            "the batch axis is missing and the channels are first (CHW), and the model takes (1, 8, 8, 3)",
        ),
    ],
)
def test_images_of_another_layout_are_named_as_such(shape, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        observed(IMAGES, IMAGES, inputs_like=jnp.zeros(shape), apply_fn=image_model)
    good = observed(IMAGES, IMAGES, inputs_like=jnp.zeros((2, 8, 8, 3)), apply_fn=image_model)
    assert good.extra["inputs_like"].shape == (2, 8, 8, 3)


@pytest.mark.parametrize("like", [(2, 8, 8, 3), [2, 8, 8, 3], 2, "images"])
def test_a_shape_is_no_array(like):
    message = f"inputs_like must be an array or a jax.ShapeDtypeStruct, or a tree of them, got {like!r}: pass jnp.zeros"
    with pytest.raises(ValueError, match=re.escape(message)):
        _inputs_like(like, IMAGES, None)


def test_parameters_of_another_model_are_not_blamed_on_the_inputs():
    apply_fn, params = models.functional(models.MLP((4,), 3, hidden=(), rngs=nnx.Rngs(0)))
    other = {"fc": params["head"]}
    with pytest.raises(ValueError, match=r"^params does not fit the module: params\['head'\]\['bias'\] is missing"):
        observed(other, jax.tree.map(jnp.ones_like, other), inputs_like=BATCH.inputs, apply_fn=apply_fn)


@pytest.mark.filterwarnings("error")
def test_a_numpy_array_of_doubles_and_a_tuple_of_labels_will_do():
    seen = observed(PARAMS, UPDATE, inputs_like=np.zeros((8, 4)), labels=(2,) * 8)
    assert seen.extra["inputs_like"].dtype == jnp.float32
    assert seen.extra["labels"].tolist() == [2] * 8


def test_one_output_says_nothing_of_the_number_of_classes():
    one = {"kernel": jnp.ones((4, 1))}
    seen = observed(one, one, inputs_like=BATCH.inputs, labels=[1] * 8, apply_fn=lambda p, x: x @ p["kernel"])
    assert seen.extra["labels"].tolist() == [1] * 8


GRAPHS = Batch({"nodes": jnp.ones((2, 3, 4)), "mask": jnp.array([[1.0, 1, 0], [1, 1, 1]])}, jnp.array([0, 1]))


def graphs_client(params, batch):
    return {"w": batch.inputs["nodes"].sum() * params["w"]}


def test_known_parts_of_the_inputs_are_granted_and_said():
    params, threat = {"w": jnp.ones(2)}, ThreatModel(inputs=("mask",))
    seen = observe(jax.random.key(0), threat, graphs_client, params, GRAPHS)
    assert list(seen.extra["inputs"]) == ["mask"]
    np.testing.assert_array_equal(seen.extra["inputs"]["mask"], GRAPHS.inputs["mask"])
    assert threat.describe().endswith("batch size, number of nodes")
    assert ThreatModel(inputs=("adjacency", "color")).describe().endswith("structure, the inputs' color")
    assert ThreatModel.of(seen) == threat
    recorded = observed(
        params, seen.update, inputs_like=GRAPHS.inputs, inputs={"mask": np.array([[1, 1, 0], [1, 1, 1]])}
    )
    assert equal(recorded, seen)
    assert "inputs" not in observe(jax.random.key(0), ThreatModel(), graphs_client, params, GRAPHS).extra


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("edges",), r"threat.inputs must name some of the parts \['mask', 'nodes'\], but not all, got \('edges',\)"),
        (("mask", "nodes"), r"threat.inputs must name some of the parts .*, but not all, got \('mask', 'nodes'\)"),
    ],
)
def test_known_parts_that_cannot_be_are_named(names, message):
    with pytest.raises(ValueError, match=message):
        observe(jax.random.key(0), ThreatModel(inputs=names), graphs_client, {"w": jnp.ones(2)}, GRAPHS)


def test_what_is_known_of_a_record_has_the_shapes_of_the_inputs():
    given = {"params": {"w": jnp.ones(2)}, "update": {"w": jnp.ones(2)}, "inputs_like": GRAPHS.inputs}
    with pytest.raises(ValueError, match=r"inputs\['mask'\] must have shape \(2, 3\), got \(2, 2\)"):
        observed(**given, inputs={"mask": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"must be different names, got \('mask', 'mask'\)"):
        ThreatModel(inputs=("mask", "mask"))
    with pytest.raises(ValueError, match="inputs must be given with inputs_like, whose parts they are, got only"):
        observed(given["params"], given["update"], inputs={"mask": jnp.ones((2, 3))})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("names", ["mask", None, (3,), (["mask"],), {"mask": True}])
def test_names_of_known_parts_are_a_tuple_of_text(names):
    with pytest.raises(ValueError, match="inputs must be a tuple of names, such as"):
        ThreatModel(inputs=names)
    assert ThreatModel(inputs=["mask"]) == ThreatModel(inputs=("mask",))
    assert hash(ThreatModel(inputs=["mask"])) == hash(ThreatModel(inputs=("mask",)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("mask", "inputs must be a dict of arrays by the names of parts, got 'mask'"),
        (np.ones((2, 3)), "inputs must be a dict of arrays by the names of parts, got array"),
        ({"mask": [[1, 1], [1]]}, r"inputs\['mask'\] must be an array, got a list"),
        ({"mask": None}, r"inputs\['mask'\] must hold at least one array"),
        ({"mask": np.full((2, 3), "a")}, r"inputs\['mask'\] must be an array of numbers"),
        ({"mask": np.ones((2, 3), complex)}, r"inputs\['mask'\] must be real, got complex"),
        ({"mask": np.full((2, 3), np.nan)}, r"inputs\['mask'\] must be finite, got nan"),
    ],
)
def test_known_parts_of_a_record_that_are_no_arrays_are_named(inputs, message):
    with pytest.raises(ValueError, match=message) as raised:
        observed({"w": jnp.ones(2)}, {"w": jnp.ones(2)}, inputs_like=GRAPHS.inputs, inputs=inputs)
    assert "\n" not in str(raised.value)
