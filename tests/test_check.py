"""Checks of arguments: every refusal names the argument and the value, and a trace never trips over one."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import _check

INPUTS, LABELS = jnp.zeros((2, 3)), jnp.array([0, 1])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": jnp.array([0.0, jnp.nan])}, r"thing must be finite, got nan at thing\['a'\]"),
        ((jnp.zeros(2), [jnp.array([-jnp.inf])]), r"thing must be finite, got -inf at thing\[1\]\[0\]"),
    ],
)
def test_finite_names_the_first_bad_leaf(tree, message):
    with pytest.raises(ValueError, match=message):
        _check.finite("thing", tree)


def test_finite_accepts_integers_keys_and_the_largest_numbers():
    _check.finite("thing", {"i": jnp.array([2**31 - 1]), "k": jax.random.key(0), "f": jnp.array([3e38, -3e38, 0.0])})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": jnp.zeros(2)}, r"update does not fit params: update\['b'\] is missing"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(1), "c": jnp.zeros(1)}, r"update\['c'\] is one too many"),
        ({"a": jnp.zeros((2, 1)), "b": jnp.zeros(1)}, r"update\['a'\] has shape \(2, 1\), expected \(2,\)"),
    ],
)
def test_same_structure_names_the_place(tree, message):
    like = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    _check.same_structure("update", like, "params", like)
    with pytest.raises(ValueError, match=message):
        _check.same_structure("update", tree, "params", like)


@pytest.mark.parametrize("value", [0, -1, 0.0, -1e-9, float("nan"), np.array([1.0, -2.0])])
def test_positive_refuses(value):
    wrong = np.asarray(value).ravel()[-1]
    with pytest.raises(ValueError, match=f"width must be positive, got {wrong}"):
        _check.positive(width=value)


@pytest.mark.parametrize("value", [-1, -1e-9, float("nan")])
def test_not_negative_refuses(value):
    with pytest.raises(ValueError, match=f"width must not be negative, got {value}"):
        _check.not_negative(width=value)


@pytest.mark.parametrize("value", ["1", 1j, [1, "a"]])
def test_what_has_no_order_is_refused(value):
    for check in (_check.positive, _check.not_negative):
        with pytest.raises(ValueError, match="width must be a number, got "):
            check(width=value)


def test_an_array_is_no_single_number():
    _check.scalar(width=1.0, height=jnp.float32(2), depth=np.ones(()))
    with pytest.raises(ValueError, match=r"width must be a single number, got shape \(3,\)"):
        _check.scalar(width=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="width must be a single number, got None"):
        _check.scalar(width=None)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, r"thing must hold at least one array, got \{\}"),
        (None, "thing must hold at least one array, got None"),
        (
            {"a": 1.0, "b": ["x"]},
            r"thing\['b'\]\[0\] must be an array of numbers, .*, got str 'x': read on",
        ),
        ([np.array(["x"])], r"thing\[0\] must be an array of numbers, .* got ndarray array\(\['x'\]"),
    ],
)
def test_arrays_names_what_is_none(tree, message):
    _check.arrays("thing", [1, 2.0, True, np.zeros(2), jnp.zeros(2)])
    with pytest.raises(ValueError, match=message):
        _check.arrays("thing", tree, ": read on")


def test_a_list_of_numbers_is_no_batch():
    _check.batch([INPUTS, INPUTS], (LABELS, LABELS))  # trees of arrays are
    for labels in ([0, 1], (0, 1)):
        kind = type(labels).__name__
        with pytest.raises(ValueError, match=rf"batch\.labels must be an array, got a {kind} of 2: jnp\.asarray makes"):
            _check.batch(INPUTS, labels)
    with pytest.raises(ValueError, match=r"batch\.inputs must be an array, got a list of 2: jnp\.asarray makes"):
        _check.batch(INPUTS.tolist(), LABELS)


@pytest.mark.parametrize(
    ("inputs", "got"), [({"nodes": 0}, r"\['nodes'\]"), (("nodes", "adjacency", "mask"), "tuple"), (None, "NoneType")]
)
def test_what_is_no_dict_of_graphs_is_named(inputs, got):
    _check.graphs("inputs", MappingProxyType({"mask": 0, "adjacency": 0, "nodes": 0}))  # any mapping of the three parts
    with pytest.raises(ValueError, match=f"inputs must be a dict of 'nodes', 'adjacency' and 'mask', got {got}"):
        _check.graphs("inputs", inputs)


def test_keys_that_are_the_same_are_named():
    key, other = jax.random.split(jax.random.key(0))
    _check.different(key=key, order_key=None, loss_key=other)
    for same in (key, jax.random.key_data(key)):
        with pytest.raises(ValueError, match=r"loss_key must be another key than key, got \[.*\] for both"):
            _check.different(key=key, order_key=other, loss_key=same)


def test_bounds_accept():
    _check.positive(a=1, b=1e-30, c=None, d={"x": jnp.ones(2)})
    _check.not_negative(a=0, b=0.0, c=None)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32), r"batch\.inputs must have shape .* got \(0, 3\)"),
        (jnp.zeros(3), LABELS, r"batch\.inputs must have shape .* got \(3,\)"),
        (INPUTS, jnp.array([0]), r"batch\.labels must have a first axis of 2 examples, got \(1,\)"),
        (INPUTS, jnp.zeros((2, 1, 1)), r"batch\.labels must have 5 columns, got 1"),
        (INPUTS, jnp.array(1), r"batch\.labels must have a first axis .* got \(\)"),
        (INPUTS, {"a": LABELS, "b": LABELS[:1]}, r"a first axis of 2 examples, got \(1,\) at batch\.labels\['b'\]"),
        (INPUTS, {"a": LABELS}, r"batch\.labels must be one array where num_classes is given, got dict"),
        (INPUTS, jnp.array([[0, 1], [4, 5]]), r"batch\.labels must be at least 0 and below 5, got 5"),
        (INPUTS.at[1, 2].set(jnp.nan), LABELS, r"batch\.inputs must be finite, got nan"),
        (INPUTS.at[0, 0].set(jnp.inf), LABELS, r"batch\.inputs must be finite, got inf"),
        (INPUTS, jnp.array([[0.5, 0.5], [jnp.nan, 1.0]]), r"batch\.labels must be finite, got nan"),
        (INPUTS, jnp.full((2, 4), 0.25), r"batch\.labels must have 5 columns, got 4"),
        (INPUTS, jnp.full((2, 5), 0.2).at[1, 1].set(-0.5), r"batch\.labels must not be negative, got -0\.5"),
        (INPUTS, jnp.ones((2, 5), bool), r"batch\.labels of shape \(2, 5\) must be probabilities, got bool"),
        (INPUTS, jnp.full((2, 5), 0.2).at[1, 1].set(1.5), r"batch\.labels must add up to at most 1 .* got 2\.3"),
        (INPUTS, jnp.array([0.0, 1.0]), r"batch\.labels of shape \(2,\) must be integers, got float32"),
        (INPUTS, jnp.array([0, -1]), r"batch\.labels must be at least 0 and below 5, got -1"),
        (INPUTS, jnp.array([5, 0]), r"batch\.labels must be at least 0 and below 5, got 5"),
    ],
)
def test_batches_are_refused_by_name(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        _check.batch(inputs, labels, 5)


@pytest.mark.parametrize(
    "labels", [jnp.array([0, 4]), jnp.full((2, 5), 0.2), jnp.full((2, 5), 0.1), jnp.full((2, 5), 0.2, jnp.bfloat16)]
)
def test_right_batches_pass(labels):
    _check.batch(INPUTS, labels, 5)


@pytest.mark.parametrize(
    ("low", "high", "value", "message"),
    [
        (1, None, 0, "n must be an integer of at least 1, got 0"),
        (0, None, -1, "n must be an integer of at least 0, got -1"),
        (1, None, 2.5, r"n must be an integer of at least 1, got 2\.5"),
        (1, None, 2.0, r"n must be an integer of at least 1, got 2\.0"),
        (1, None, True, "n must be an integer of at least 1, got True"),
        (2, 16, 17, "n must be an integer from 2 to 16, got 17"),
    ],
)
def test_what_is_no_integer_of_a_range_is_named(low, high, value, message):
    with pytest.raises(ValueError, match=message):
        _check.integer(low, high, n=value)


def test_integers_of_numpy_are_integers():
    _check.integer(2, 16, n=np.int64(2), m=16, bits=np.uint8(3))


@pytest.mark.parametrize(
    "labels",
    [
        jnp.array([0, 1_000]),
        jnp.array([-7, 0]),
        jnp.array([-1.5, 2.0]),
        jnp.full((2, 1), -3.0),
        jnp.zeros((2, 4, 3), jnp.int32),
        {"a": LABELS, "b": (jnp.zeros((2, 5)),)},
        (),
    ],
)
def test_without_the_number_of_classes_labels_are_targets_of_any_kind(labels):
    _check.batch(INPUTS, labels)


def test_targets_are_finite():
    with pytest.raises(ValueError, match=r"batch\.labels must be finite, got nan at batch\.labels\['a'\]"):
        _check.batch(INPUTS, {"a": jnp.array([0.0, jnp.nan])})


def test_labels_of_several_places_are_classes_of_as_many_shapes():
    _check.batch(INPUTS, jnp.zeros((2, 7), jnp.int32), 5)
    _check.batch(INPUTS, jnp.full((2, 7, 5), 0.2), 5)
    _check.classes(jnp.zeros((2, 7), jnp.int32), (2, 7), 5)
    _check.classes(jnp.full((2, 7, 5), 0.2), (2, 7), 5)
    for labels in (jnp.zeros(2, jnp.int32), jnp.zeros((2, 6), jnp.int32), jnp.full((2, 5, 7), 0.1)):
        with pytest.raises(ValueError, match=r"batch\.labels must have shape \(2, 7\) or \(2, 7, 5\), got \(2,"):
            _check.classes(labels, (2, 7), 5)
    with pytest.raises(ValueError, match=r"batch\.labels of shape \(2, 5\) must be probabilities, got int32"):
        _check.classes(jnp.zeros((2, 5), jnp.int32), (2,), 5)


def test_traced_values_pass_and_traced_shapes_do_not():
    @jax.jit
    def traced(inputs, labels, width):
        _check.batch(inputs, labels, 5)
        _check.finite("inputs", inputs)
        _check.positive(width=width)
        return inputs

    traced(jnp.full((2, 3), jnp.nan), jnp.array([-1, 9]), -1.0)
    with pytest.raises(ValueError, match=r"batch\.labels must have a first axis of 2"):
        traced(INPUTS, jnp.array([0]), 1.0)
    with pytest.raises(ValueError, match="must be probabilities, got bool"):
        traced(INPUTS, jnp.zeros((2, 5), bool), 1.0)


def test_concrete_values_within_a_trace_are_checked():
    poisoned = jnp.array([jnp.nan])

    @jax.jit
    def traced(x):
        _check.batch(INPUTS, LABELS, 2)
        with pytest.raises(ValueError, match="below 1, got 1"):
            _check.batch(INPUTS, LABELS, 1)
        with pytest.raises(ValueError, match="got nan"):
            _check.finite("x", poisoned)
        return x

    traced(jnp.zeros(1))
