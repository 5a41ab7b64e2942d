"""Inputs and targets that are trees of arrays go through every part of the core that does not need one array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import (
    Attack,
    Batch,
    Observation,
    ThreatModel,
    attacks,
    clients,
    defenses,
    gradient_matching,
    keep_best,
    labels,
    metrics,
    observe,
    observed,
    restarts,
    run,
    stack,
)
from gia_jax.base import LossFn
from gia_jax.matching import box, group, initializations, priors
from gia_jax.sweep.study import study

NUMBERS, CODES, HIDDEN = 3, 4, 24


def features(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
    hidden = inputs["numbers"] @ params["numbers"] + inputs["codes"] @ params["codes"]
    return jnp.tanh(hidden + params["bias"])


def parameters(key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key, 5)
    return {
        "numbers": 0.5 * jax.random.normal(keys[0], (NUMBERS, HIDDEN)),
        "codes": 0.5 * jax.random.normal(keys[1], (CODES, HIDDEN)),
        "bias": 0.5 * jax.random.normal(keys[2], (HIDDEN,)),
        "classes": {"kernel": 0.5 * jax.random.normal(keys[3], (HIDDEN, 2)), "bias": jnp.zeros(2)},
        "value": 0.5 * jax.random.normal(keys[4], (HIDDEN,)),
    }


def classify(params: Any, inputs: Any) -> jax.Array:
    return features(params, inputs) @ params["classes"]["kernel"] + params["classes"]["bias"]


def regress(params: Any, inputs: Any) -> jax.Array:
    return features(params, inputs) @ params["value"]


def two_heads(params: Any, batch: Batch) -> jax.Array:
    """A class and a number, by the targets {"kind": (b,), "value": (b,)}."""
    kind = clients.cross_entropy(classify)(params, Batch(batch.inputs, batch.labels["kind"]))
    return kind + clients.squared_error(regress)(params, Batch(batch.inputs, batch.labels["value"]))


def drawn_inputs(key: jax.Array, size: int) -> dict[str, jax.Array]:
    first, second = jax.random.split(key)
    return {"numbers": jax.random.normal(first, (size, NUMBERS)), "codes": jax.random.uniform(second, (size, CODES))}


LOSSES: dict[str, tuple[LossFn, Callable[[int], Any]]] = {
    "classes": (clients.cross_entropy(classify), lambda size: jnp.arange(size) % 2),
    "regression": (clients.squared_error(regress), lambda size: jnp.linspace(-1.0, 2.0, size)),
    "two heads": (two_heads, lambda size: {"kind": jnp.arange(size) % 2, "value": jnp.linspace(-1.0, 2.0, size)}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_tree_of_inputs_is_reconstructed_whatever_the_targets(name: str) -> None:
    loss_fn, targets = LOSSES[name]
    client_fn = clients.federated_sgd(loss_fn)
    params, batch = parameters(jax.random.key(0)), Batch(drawn_inputs(jax.random.key(1), 1), targets(1))
    seen = observe(jax.random.key(2), ThreatModel(labels=True), client_fn, params, batch)
    assert jax.tree.map(jnp.shape, seen.extra["inputs_like"]) == {"numbers": (1, NUMBERS), "codes": (1, CODES)}

    attack = keep_best(gradient_matching(client_fn, optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 600))))
    solve = restarts(lambda key, seen: run(attack, key, seen, num_steps=600)[0], 6)
    found = jax.jit(solve)(jax.random.key(3), seen)
    assert bool(found.is_finite)
    share = metrics.explained(client_fn, seen, found.batch).share
    assert float(share) > 0.999
    for field, inputs in batch.inputs.items():
        np.testing.assert_allclose(found.batch.inputs[field], inputs, atol=0.05)

    noise = initializations.normal()(jax.random.key(4), seen)
    assert float(metrics.explained(client_fn, seen, batch._replace(inputs=noise)).share) < 0.99


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 4), name=st.sampled_from(sorted(LOSSES)), seed=st.integers(0, 2**16), ordered=st.booleans())
def test_what_is_granted_of_a_tree_has_the_shapes_and_targets_of_the_batch(
    size: int, name: str, seed: int, ordered: bool
) -> None:
    loss_fn, targets = LOSSES[name]
    batch = Batch(drawn_inputs(jax.random.key(seed), size), targets(size))
    client_fn = clients.federated_sgd(loss_fn)
    params = parameters(jax.random.key(seed + 1))
    seen = observe(jax.random.key(seed), ThreatModel(labels=True, label_order=ordered), client_fn, params, batch)
    for like, leaf in zip(jax.tree.leaves(seen.extra["inputs_like"]), jax.tree.leaves(batch.inputs), strict=True):
        assert like.shape == leaf.shape
        assert not like.any()
    given, true = jax.tree.leaves(seen.extra["labels"]), jax.tree.leaves(batch.labels)
    rows = [np.stack([np.asarray(leaf, np.float64) for leaf in leaves], 1) for leaves in (given, true)]
    if not ordered:  # one order for all targets of an example
        rows = [one[np.lexsort(one.T)] for one in rows]
    np.testing.assert_array_equal(*rows)
    # The update does not depend on the order of the examples, and is exact at the truth.
    assert float(metrics.explained(client_fn, seen, batch).share) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        initializations.normal,
        initializations.near_grey,
        initializations.truncated_normal,
        initializations.uniform,
        initializations.constant,
    ],
)
def test_every_initialisation_follows_the_granted_tree(make: Callable[[], Any]) -> None:
    like = {"numbers": jnp.zeros((2, NUMBERS)), "codes": jnp.zeros((2, CODES), jnp.bfloat16)}
    drawn = make()(jax.random.key(0), Observation({}, {}, {"inputs_like": like}))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, like)
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype(jnp.float32)}
    cast = initializations.as_granted(drawn, Observation({}, {}, {"inputs_like": like}))
    assert cast["codes"].dtype == jnp.bfloat16
    assert cast["numbers"].dtype == jnp.float32


def test_arrays_of_a_tree_are_drawn_with_keys_of_their_own_and_one_array_with_the_key_itself() -> None:
    key, one = jax.random.key(0), jnp.zeros((2, 3))
    alone = initializations.normal()(key, Observation({}, {}, {"inputs_like": one}))
    np.testing.assert_array_equal(alone, jax.random.normal(key, (2, 3)))
    both = initializations.normal()(key, Observation({}, {}, {"inputs_like": {"a": one, "b": one}}))
    assert not np.any(np.asarray(both["a"]) == np.asarray(both["b"]))


def test_priors_of_a_tree_are_those_of_its_arrays_side_by_side() -> None:
    inputs = drawn_inputs(jax.random.key(0), 3)
    flat = Batch(jnp.concatenate([inputs["codes"], inputs["numbers"]], 1), jnp.arange(3))
    tree, nothing = Batch(inputs, jnp.arange(3)), Observation({}, {}, {})
    for prior_fn in (priors.norm(), priors.norm(exponent=1.0), priors.orthogonality):
        assert float(prior_fn(tree, nothing)) == pytest.approx(float(prior_fn(flat, nothing)), rel=1e-5)
    both = priors.combine((0.5, priors.norm()), (2.0, priors.orthogonality))
    assert float(both(tree, nothing)) == pytest.approx(float(both(flat, nothing)), rel=1e-5)
    with pytest.raises(ValueError, match=r"batch\.inputs must be one array of shape \(b, \*d\) here, got a dict"):
        priors.total_variation()(tree, nothing)


def test_clients_of_single_examples_and_local_steps_take_trees() -> None:
    loss_fn, targets = LOSSES["two heads"]
    params, batch = parameters(jax.random.key(0)), Batch(drawn_inputs(jax.random.key(1), 4), targets(4))
    whole = clients.federated_sgd(loss_fn)(params, batch)
    singles = clients.per_example(loss_fn)(params, batch)
    averaged = clients.federated_averaging(loss_fn, learning_rate=0.1)(params, batch)
    private = defenses.dp_sgd(loss_fn, jax.random.key(2), norm=1e6, noise_multiplier=0.0)(params, batch)
    means = jax.tree.map(lambda leaf: leaf.mean(0), singles)
    for found in (means, averaged, private):
        jax.tree.map(lambda leaf, wanted: np.testing.assert_allclose(leaf, wanted, atol=1e-5), found, whole)


def tree_attack() -> tuple[Attack, list[Observation]]:
    loss_fn, targets = LOSSES["two heads"]
    client_fn, params = clients.federated_sgd(loss_fn), parameters(jax.random.key(0))
    batches = [Batch(drawn_inputs(jax.random.key(i), 2), targets(2)) for i in range(2)]
    threat = ThreatModel(labels=True, label_order=True)
    return gradient_matching(client_fn), [observe(jax.random.key(9), threat, client_fn, params, b) for b in batches]


def test_many_victims_and_restarts_of_trees_agree_with_one_at_a_time() -> None:
    attack, seen = tree_attack()
    found = study(attack, jax.random.key(0), stack(seen), num_steps=3, num_restarts=2).reconstruction
    assert jax.tree.map(jnp.shape, found.batch.inputs) == {"numbers": (2, 2, NUMBERS), "codes": (2, 2, CODES)}
    assert found.restart_losses.shape == (2, 2)

    one_fn = restarts(lambda key, observation: run(attack, key, observation, num_steps=3)[0], 2)
    looped = [one_fn(jax.random.key(1), observation) for observation in seen]
    axes = Observation(params=None, update=0, extra=0)
    mapped = jax.vmap(one_fn, (None, axes))(jax.random.key(1), stack(seen))
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one.batch.inputs for one in looped])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), mapped.batch.inputs, together)


def test_seeds_that_run_together_take_trees() -> None:
    _, seen = tree_attack()
    client_fn = clients.federated_sgd(two_heads)
    attack = group.together(gradient_matching(client_fn, prior_fn=group.consistency), 3, group.mean)
    found, _ = run(attack, jax.random.key(0), seen[0], num_steps=2)
    assert bool(found.is_finite)
    assert found.batch.inputs["codes"].shape == (2, CODES)


def test_labels_among_the_unknowns_go_with_a_tree_of_inputs() -> None:
    client_fn = clients.federated_sgd(clients.cross_entropy(classify))
    params, batch = parameters(jax.random.key(0)), Batch(drawn_inputs(jax.random.key(1), 2), jnp.array([0, 1]))
    seen = observe(jax.random.key(2), ThreatModel(), client_fn, params, batch)
    found, info = run(attacks.dlg(client_fn, num_classes=2), jax.random.key(3), seen, num_steps=2)
    assert found.batch.labels.shape == (2, 2)
    assert bool(jnp.isfinite(info.loss).all())


def test_a_box_holds_every_array_of_a_tree() -> None:
    inputs = {"a": jnp.array([[-2.0, 0.5]]), "b": jnp.array([[3.0]], jnp.bfloat16)}
    held = box(-1.0, 1.0)(inputs)
    assert held["a"].tolist() == [[-1.0, 0.5]]
    assert held["b"].tolist() == [[1.0]]
    assert held["b"].dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(), (4, 5)])
def test_one_integer_label_a_pixel(shape: tuple[int, ...]) -> None:
    params = {"kernel": 0.5 * jax.random.normal(jax.random.key(0), (2, 3)), "bias": jnp.zeros(3)}
    client_fn = clients.federated_sgd(clients.cross_entropy(lambda p, x: x @ p["kernel"] + p["bias"]))
    pixels = Batch(
        jax.random.normal(jax.random.key(1), (2, *shape, 2)),
        jax.random.randint(jax.random.key(2), (2, *shape), 0, 3),
    )
    threat = ThreatModel(labels=True, label_order=True)
    seen = observe(jax.random.key(3), threat, client_fn, params, pixels, num_classes=3)
    np.testing.assert_array_equal(seen.extra["labels"], pixels.labels)
    found, info = run(gradient_matching(client_fn), jax.random.key(4), seen, num_steps=20)
    assert found.batch.labels.shape == (2, *shape)
    assert float(info.match[-1]) < float(info.match[0])
    assert float(metrics.explained(client_fn, seen, pixels).share) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"batch\.labels must be at least 0 and below 3, got 3"):
        observe(
            jax.random.key(3),
            threat,
            client_fn,
            params,
            pixels._replace(labels=jnp.full_like(pixels.labels, 3)),
            num_classes=3,
        )


def test_an_update_on_record_may_be_of_a_tree() -> None:
    client_fn = clients.federated_sgd(clients.cross_entropy(classify))
    params, batch = parameters(jax.random.key(0)), Batch(drawn_inputs(jax.random.key(1), 2), jnp.array([0, 1]))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch.inputs)
    seen = observed(
        params, client_fn(params, batch), inputs_like=like, labels=batch.labels, apply_fn=classify, num_classes=2
    )
    assert jax.tree.map(jnp.shape, seen.extra["inputs_like"]) == jax.tree.map(jnp.shape, batch.inputs)
    renamed = {"numbers": like["numbers"], "words": like["codes"]}
    with pytest.raises(ValueError, match=r"inputs_like must be inputs of apply_fn, got the shapes .*words"):
        observed(params, client_fn(params, batch), inputs_like=renamed, apply_fn=classify)


def test_what_is_wrong_with_a_tree_is_named() -> None:
    client_fn = clients.federated_sgd(clients.cross_entropy(classify))
    params, inputs = parameters(jax.random.key(0)), drawn_inputs(jax.random.key(1), 2)
    threat, key = ThreatModel(labels=True), jax.random.key(2)

    def see(inputs: Any, targets: Any) -> Observation:
        return observe(key, threat, client_fn, params, Batch(inputs, targets))

    with pytest.raises(ValueError, match=r"batch\.inputs\['numbers'\] must have a first axis of 3 examples, as "):
        see(inputs | {"codes": jnp.zeros((3, CODES))}, jnp.array([0, 1]))
    with pytest.raises(ValueError, match=r"batch\.inputs\['codes'\] must have shape \(b, \*d\) with b > 0, got \(\)"):
        see(inputs | {"codes": jnp.zeros(())}, jnp.array([0, 1]))
    with pytest.raises(ValueError, match=r"batch\.inputs must hold at least one array, got \{\}"):
        see({}, jnp.array([0, 1]))
    with pytest.raises(ValueError, match=r"batch\.labels must have a first axis of 2 examples, got \(3,\)"):
        see(inputs, jnp.array([0, 1, 1]))
    with pytest.raises(ValueError, match=r"batch\.inputs must be finite, got nan at batch\.inputs\['codes'\]"):
        see(inputs | {"codes": jnp.full((2, CODES), jnp.nan)}, jnp.array([0, 1]))

    seen = see(inputs, jnp.array([0, 1]))
    codes = seen._replace(extra=seen.extra | {"inputs_like": inputs | {"codes": jnp.zeros((2, CODES), jnp.int32)}})
    with pytest.raises(ValueError, match=r"observation\.extra\['inputs_like'\]\['codes'\] must be floating point"):
        gradient_matching(client_fn).init(key, codes)
    other = gradient_matching(client_fn, decode_fn=lambda z, labels: Batch(z["numbers"], labels))
    with pytest.raises(ValueError, match="inputs must be a tree like the granted inputs"):
        run(other, key, seen, num_steps=1)
    linear = attacks.linear_inversion(labels.dense("classes"), label_fn=labels.idlg(labels.dense("classes")))
    with pytest.raises(ValueError, match=r"inputs_like'\] must be one array of shape \(b, \*d\) here, got a dict"):
        linear(key, seen)
    with pytest.raises(ValueError, match=r"inputs_like'\] must be one array of shape \(b, \*d\) here, got a dict"):
        metrics.diagnose(seen, client_fn, key=key)
    with pytest.raises(ValueError, match=r"batch\.inputs must be one array of shape \(b, \*d\) for mixup, got a dict"):
        defenses.mixup(2, k=2)(key, Batch(inputs, jnp.array([0, 1])))
