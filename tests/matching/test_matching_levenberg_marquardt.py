"""Levenberg-Marquardt: on problems with known solutions, and inside gradient matching."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from gia_jax import Batch, Observation, clients, gradient_matching, keep_best, run
from gia_jax.matching.initializations import near_grey
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt

pytestmark = pytest.mark.usefixtures("x64")


def minimise(residual_fn, start, num_steps, prior_fn=None, **options):
    """`num_steps` updates; the loss after each."""
    solver = levenberg_marquardt(**options)

    def value_fn(x):
        return jnp.sum(jnp.square(residual_fn(x))) + (0 if prior_fn is None else prior_fn(x))

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(value_fn)(x)
        updates, state = solver.update(grad, state, x, value=value, value_fn=value_fn, residual_fn=residual_fn)
        return optax.apply_updates(x, updates), state

    x, state, values = start, solver.init(start), []
    for _ in range(num_steps):
        x, state = step(x, state)
        values.append(float(value_fn(x)))
    return x, values


def rosenbrock(x):
    return jnp.concatenate([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


@pytest.mark.parametrize("linear_solver", ["cholesky", "cg"])
def test_rosenbrock_is_solved_and_never_rises(linear_solver) -> None:
    x, values = minimise(rosenbrock, jnp.full(6, -1.2), 60, equations=None, linear_solver=linear_solver)
    np.testing.assert_allclose(x, 1, atol=1e-9)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


def overdetermined(dimensions=12, equations=200):
    """Smooth residuals that vanish at a known point."""
    matrix = jax.random.normal(jax.random.key(0), (equations, dimensions)) / 4
    solution = jax.random.normal(jax.random.key(1), (dimensions,)) / 2
    return lambda x: jnp.tanh(matrix @ x) - jnp.tanh(matrix @ solution), solution


@pytest.mark.parametrize("equations", [None, 2.0, 5.0])
def test_zero_residuals_are_found_with_and_without_the_sketch(equations) -> None:
    residual_fn, solution = overdetermined()
    x, values = minimise(residual_fn, jnp.zeros(12), 15, equations=equations)
    np.testing.assert_allclose(x, solution, atol=1e-9)
    # Quadratic convergence: the last reduction above rounding squares the one before.
    logs = -np.log10(np.asarray([value for value in values if value > 1e-20]))
    assert logs[-1] > 1.7 * logs[-2]


def test_nonzero_residuals_agree_with_scipy() -> None:
    residual_fn, _ = overdetermined()
    shifted = lambda x: residual_fn(x) + 0.05 * jnp.cos(jnp.arange(200.0))  # noqa: E731
    theirs = scipy.optimize.least_squares(shifted, np.zeros(12), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    ours, _ = minimise(shifted, jnp.zeros(12), 30, equations=None, least_fall=0.0)
    np.testing.assert_allclose(ours, theirs.x, atol=1e-6)


def test_the_sketch_is_biased_where_residuals_do_not_vanish() -> None:
    residual_fn, _ = overdetermined()
    shifted = lambda x: residual_fn(x) + 0.05 * jnp.cos(jnp.arange(200.0))  # noqa: E731
    ours, _ = minimise(shifted, jnp.zeros(12), 30, equations=2.0)
    theirs = scipy.optimize.least_squares(shifted, np.zeros(12)).x
    assert np.max(np.abs(ours - theirs)) > 1e-4


def test_a_prior_takes_part_in_the_gradient_and_the_acceptance() -> None:
    x, values = minimise(lambda x: x - 1, jnp.zeros(3), 40, prior_fn=lambda x: jnp.sum(x**2), equations=None, least_fall=0.0)
    np.testing.assert_allclose(x, 0.5, atol=1e-6)
    assert values[-1] <= values[0]


def test_nothing_happens_below_the_tolerance_nor_from_nan() -> None:
    start = jnp.asarray([0.3, 0.2])
    x, _ = minimise(lambda x: x, start, 1, tolerance=1.0)
    np.testing.assert_array_equal(x, start)
    x, _ = minimise(lambda x: x / 0 * 0, start, 1)
    np.testing.assert_array_equal(x, start)


def test_lanes_equal_a_loop() -> None:
    residual_fn, _ = overdetermined()
    starts = jax.random.normal(jax.random.key(2), (3, 12)) / 4
    solver = levenberg_marquardt(equations=None)

    def steps(x):
        value_fn = lambda z: jnp.sum(jnp.square(residual_fn(z)))  # noqa: E731
        state = solver.init(x)
        for _ in range(3):
            value, grad = jax.value_and_grad(value_fn)(x)
            updates, state = solver.update(grad, state, x, value=value, value_fn=value_fn, residual_fn=residual_fn)
            x = x + updates
        return x

    np.testing.assert_allclose(jax.vmap(steps)(starts), jnp.stack([steps(x) for x in starts]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("activation", "solves"), [(jax.nn.sigmoid, True), (jax.nn.relu, False)])
def test_gradient_matching_to_rounding_in_a_smooth_network_only(activation, solves) -> None:
    def apply_fn(params, inputs):
        hidden = activation(inputs.reshape(len(inputs), -1) @ params["w1"])  # no bias: no analytic inversion either
        return activation(hidden @ params["w2"]) @ params["w3"]

    keys = jax.random.split(jax.random.key(3), 5)
    shapes = {"w1": (12, 16), "w2": (16, 16), "w3": (16, 4)}
    params = {name: jax.random.normal(k, s) * 0.7 for k, (name, s) in zip(keys[:3], shapes.items(), strict=True)}
    batch = Batch(jax.random.normal(keys[3], (1, 2, 2, 3)), jnp.asarray([1]))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    observation = Observation(
        params, client_fn(params, batch), {"inputs_like": jnp.zeros_like(batch.inputs), "labels": batch.labels}
    )
    attack = gradient_matching(client_fn, init_fn=near_grey(scale=0.1), optimizer=levenberg_marquardt())
    found, _ = jax.jit(lambda key, o: run(keep_best(attack), key, o, num_steps=40))(keys[4], observation)
    error = float(jnp.max(jnp.abs(found.batch.inputs - batch.inputs)))
    assert (error < 1e-7) if solves else (error > 1e-3)
    assert bool(found.is_finite)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equations": 0.5}, "equations .* 0.5"),
        ({"initial_damping": 0.0}, "initial_damping .* 0"),
        ({"max_trials": 0}, "max_trials .* 0"),
        ({"tolerance": -1.0}, "tolerance .* -1"),
    ],
)
def test_bad_settings_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        levenberg_marquardt(**options)
