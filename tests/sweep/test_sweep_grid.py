"""Sweeps over settings: one program finds what a study of every setting finds."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import (
    Attack,
    Batch,
    Observation,
    ThreatModel,
    attacks,
    clients,
    data,
    gradient_matching,
    keep_best,
    labels,
    modalities,
    observe,
)
from gia_jax.base import Scalar
from gia_jax.matching import adaptive, initializations, objectives, optimizers, priors
from gia_jax.matching.run import continued
from gia_jax.sweep import grid, study, sweep

pytestmark = pytest.mark.usefixtures("x64")

NUM_STEPS = 6


def _apply(params: Any, inputs: jax.Array) -> jax.Array:
    return inputs @ params["kernel"] + params["bias"]


CLIENT = clients.federated_sgd(clients.cross_entropy(_apply))


def _observations() -> Observation:
    params = {"kernel": jax.random.normal(jax.random.key(0), (5, 3)), "bias": jnp.zeros(3)}

    def of_one(inputs: jax.Array) -> Observation:
        batch = Batch(inputs, jnp.array([0, 2]))
        return observe(jax.random.key(1), ThreatModel(labels=True), CLIENT, params, batch)

    return jax.vmap(of_one)(jax.random.normal(jax.random.key(2), (3, 2, 5)))._replace(params=params)


def _attack(setting: Any) -> Attack:
    """Reads a number from the optimiser, the prior and the objective."""
    prior_fn = priors.combine((setting["weight"], lambda batch, _: jnp.sum(jnp.square(batch.inputs))))
    return gradient_matching(CLIENT, prior_fn=prior_fn, optimizer=optax.adam(setting["rate"]))


def _warmed_up(setting: Any) -> Attack:
    first = keep_best(_attack({"rate": 0.1, "weight": setting["weight"]}))
    return keep_best(continued(first, _attack(setting), num_steps=3))


SETTINGS = grid(rate=[0.05, 0.5], weight=[0.0, 0.1])


@pytest.mark.parametrize("make_attack", [_attack, _warmed_up])
def test_a_sweep_is_a_study_of_every_setting(make_attack: Any) -> None:
    key, seen = jax.random.key(3), _observations()
    found = sweep(make_attack, SETTINGS, key, seen, num_steps=NUM_STEPS, num_restarts=2, lanes=5)
    assert found.losses.shape == (4, 3, 2, NUM_STEPS)
    for i in range(4):
        setting = {name: values[i] for name, values in SETTINGS.items()}
        alone = study(make_attack(setting), key, seen, num_steps=NUM_STEPS, num_restarts=2)
        np.testing.assert_allclose(found.losses[i], alone.losses, rtol=1e-9)
        jax.tree.map(
            lambda a, d, i=i: np.testing.assert_allclose(a[i], d, rtol=1e-9), found.reconstruction, alone.reconstruction
        )
    assert len(np.unique(found.losses[:, 0, 0, -1])) == 4  # every number was read


def test_a_setting_that_diverges_leaves_the_others_alone() -> None:
    seen = _observations()
    both = grid(rate=[0.1, 1e200], weight=[0.1])
    found = sweep(_attack, both, jax.random.key(3), seen, num_steps=NUM_STEPS)
    alone = sweep(_attack, grid(rate=[0.1], weight=[0.1]), jax.random.key(3), seen, num_steps=NUM_STEPS)
    np.testing.assert_allclose(found.losses[0], alone.losses[0], rtol=1e-9)
    assert not np.isfinite(found.losses[1, :, :, -1]).any()


def test_an_interrupted_sweep_goes_on(tmp_path: Any) -> None:
    seen, signs = _observations(), []

    def stop(sign: Any) -> None:
        signs.append(sign)
        if len(signs) == 4:
            raise KeyboardInterrupt

    options = {"num_steps": NUM_STEPS, "lanes": 5, "checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        sweep(_attack, SETTINGS, jax.random.key(3), seen, progress_fn=stop, **options)
    resumed = sweep(_attack, SETTINGS, jax.random.key(3), seen, **options)
    whole = sweep(_attack, SETTINGS, jax.random.key(3), seen, num_steps=NUM_STEPS, lanes=5)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert resumed.checkpoint is not None
    # Other numbers in the settings are another run, though the program is the same.
    other = sweep(_attack, grid(rate=[0.05, 0.5], weight=[0.0, 0.2]), jax.random.key(3), seen, **options)
    assert other.checkpoint != resumed.checkpoint
    assert (other.losses[0] == whole.losses[0]).all()
    assert (other.losses[1, ..., -1] != whole.losses[1, ..., -1]).all()


def _statistics(params: Any, inputs: jax.Array) -> Any:
    return [(inputs.mean(0), inputs.var(0))]


BLOCKS = [data.FeatureBlock("label", ("C", "N"))]

OF_NUMBERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "inverting_gradients": (attacks.inverting_gradients, {"client_fn": CLIENT, "bounds": (0.0, 1.0)}),
    "grad_inversion": (
        attacks.grad_inversion,
        {"client_fn": CLIENT, "classifier_fn": labels.dense(), "statistics_fn": _statistics},
    ),
    "glg": (attacks.glg, {"client_fn": CLIENT, "blocks": BLOCKS, "max_nodes": 3}),
    "image": (modalities.image, {"shape": (4, 4, 1)}),
    "graph": (modalities.graph, {"blocks": BLOCKS, "max_nodes": 3}),
    "normal": (initializations.normal, {}),
    "uniform": (initializations.uniform, {}),
    "truncated_normal": (initializations.truncated_normal, {}),
    "tag": (objectives.tag, {}),
    "pruned": (adaptive.pruned, {}),
    "sign_hinge": (adaptive.sign_hinge, {}),
    "lbfgs": (optimizers.fixed_step_lbfgs, {}),
    "step_schedule": (optimizers.step_schedule, {"num_steps": 9}),
    "federated_averaging": (clients.federated_averaging, {"loss_fn": clients.cross_entropy(_apply)}),
}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_what_may_be_traced_is_traced(name: str) -> None:
    """Every argument that is declared as a number which may be traced can be one of a setting."""
    build, needed = OF_NUMBERS[name]
    parameters = inspect.signature(build).parameters.values()
    numbers = [p.name for p in parameters if p.annotation in (Scalar, Scalar | None)]
    assert numbers
    jax.make_jaxpr(lambda setting: (build(**needed, **setting), 0)[1])(dict.fromkeys(numbers, 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "settings must hold at least one array"),
        ({"rate": np.ones(())}, r"settings\['rate'\] must have a first axis of settings, at least 1, got shape \(\)"),
        ({"rate": np.zeros(0)}, r"settings\['rate'\] must have a first axis of settings, at least 1, got shape \(0,\)"),
        (
            {"rate": np.ones(2), "weight": np.ones(3)},
            r"settings must have leading axes of one length: settings\['rate'\] has 2 and settings\['weight'\] has 3",
        ),
        ({"rate": np.ones(2), "weight": np.array([0.1, -1.0])}, "weight must not be negative, got -1.0"),
        ({"rate": ["a"]}, r"settings\['rate'\]\[0\] must be an array of numbers"),
        (jax.random.split(jax.random.key(0)), "settings must be numbers, got random keys"),
        ({"rate": [0.1, 0.2]}, r"settings\['rate'\]\[0\] must have a first axis of settings"),
    ],
)
def test_settings_that_are_none_are_named(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(_attack, settings, jax.random.key(3), _observations(), num_steps=2)


def _branching(setting: Any) -> Attack:
    return _attack({"rate": 0.1 if setting["rate"] > 0.2 else 0.2, "weight": 0.0})


def _of_other_steps(setting: Any) -> Attack:
    return _attack({"rate": 0.1, "weight": 0.0})._replace(num_steps=int(setting["rate"]))


@pytest.mark.parametrize(
    ("make_attack", "message"),
    [
        (_branching, "make_attack must not branch on the numbers of a setting"),
        (
            lambda setting: (2 * [_attack({"rate": 0.1, "weight": 0.0})])[setting["rate"].astype(int) - 2],
            "must not branch",
        ),
        (_of_other_steps, r"make_attack must make attacks of equal steps and warm-ups, got \(3,\) steps for setting 1"),
        (lambda setting: "none", "make_attack must return an Attack, got 'none' for setting 0"),
    ],
)
def test_functions_that_make_no_attack_are_named(make_attack: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(make_attack, {"rate": np.array([2.0, 3.0])}, jax.random.key(3), _observations(), num_steps=2)


def test_a_mesh_without_lanes_is_named() -> None:
    seen = _observations()
    with pytest.raises(ValueError, match=r"mesh must have an axis 'lanes', got the axes \('data',\)"):
        sweep(_attack, SETTINGS, jax.random.key(3), seen, num_steps=2, mesh=jax.make_mesh((1,), ("data",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "values must have at least one name"),
        ({"rate": []}, r"rate must be a sequence of at least one number, got \[\]"),
    ],
)
def test_values_that_make_no_grid_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(**values)


def test_another_mesh_that_is_set_is_named() -> None:
    explicit = jax.make_mesh((1,), ("lanes",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="mesh must be given as an argument, and not be set"):
        sweep(_attack, SETTINGS, jax.random.key(3), _observations(), num_steps=2, mesh=explicit)


def test_a_sweep_in_a_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="a sweep must be called outside of"):
        jax.jit(lambda rate: sweep(_attack, {"rate": rate, "weight": rate}, jax.random.key(3), _observations()))(
            jnp.ones(2)
        )
    with pytest.raises(ValueError, match="a study must be called outside of"):
        jax.jit(lambda key: study(_attack({"rate": 0.1, "weight": 0.0}), key, _observations(), num_steps=2).losses)(
            jax.random.key(3)
        )
