"""Levenberg-Marquardt: on problems with known solutions, and inside gradient matching."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from flax import nnx
from jax.flatten_util import ravel_pytree

from gia_jax import Batch, Observation, clients, gradient_matching, keep_best, models, run
from gia_jax.matching.initializations import near_grey
from gia_jax.matching.levenberg_marquardt import _linearized, levenberg_marquardt

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
    x, values = minimise(
        lambda x: x - 1, jnp.zeros(3), 40, prior_fn=lambda x: jnp.sum(x**2), equations=None, least_fall=0.0
    )
    np.testing.assert_allclose(x, 0.5, atol=1e-6)
    assert values[-1] <= values[0]


def test_nothing_happens_below_the_tolerance_nor_from_nan() -> None:
    start = jnp.asarray([0.3, 0.2])
    x, _ = minimise(lambda x: x, start, 1, tolerance=1.0)
    np.testing.assert_array_equal(x, start)
    x, _ = minimise(lambda x: x / 0 * 0, start, 1)
    np.testing.assert_array_equal(x, start)


def test_an_ended_search_computes_nothing_more_once_all_lanes_have_ended() -> None:
    residual_fn, _ = overdetermined()
    solver, calls = levenberg_marquardt(equations=None), []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return residual_fn(x)

    def value_fn(x):
        return jnp.sum(jnp.square(residual_fn(x)))

    @jax.jit
    @jax.vmap
    def step(x, state):
        value, grad = jax.value_and_grad(value_fn)(x)
        updates, state = solver.update(grad, state, x, value=value, value_fn=value_fn, residual_fn=counted)
        return x + updates, state

    x = jnp.stack([jnp.zeros(12), jnp.full(12, 0.3)])
    state, counts = jax.vmap(solver.init)(x), []
    for _ in range(12):
        x, state = step(x, state)
        jax.block_until_ready(x)
        jax.effects_barrier()
        counts.append(len(calls))
    assert counts[0] > 0
    assert counts[-1] == counts[-3] > counts[0]
    assert np.all(jax.vmap(value_fn)(x) <= 1e-20)


def test_a_local_minimum_ends_the_search_and_slow_steps_to_a_solution_do_not() -> None:
    # The residuals x^2 - 4 and 0.1 x have a minimum that is not zero, and a search from 3 ends in it.
    solver = levenberg_marquardt(equations=None)

    def last(residual_fn, x, num_steps):
        value_fn = lambda z: jnp.sum(jnp.square(residual_fn(z)))  # noqa: E731
        state = solver.init(x)
        for _ in range(num_steps):
            value, grad = jax.value_and_grad(value_fn)(x)
            updates, state = solver.update(grad, state, x, value=value, value_fn=value_fn, residual_fn=residual_fn)
            x = x + updates
        return x, state

    x, state = jax.jit(lambda: last(lambda z: jnp.concatenate([z**2 - 4, 0.1 * z]), jnp.array([3.0]), 10))()
    np.testing.assert_allclose(x, np.sqrt(4 - 0.005), rtol=1e-4)
    assert state.slow >= 3
    # Of a residual x^2 every step halves x, and so its loss falls by 15 / 16: it goes on.
    x, state = jax.jit(lambda: last(lambda z: z**2, jnp.array([3.0]), 10))()
    assert state.slow == 0
    np.testing.assert_allclose(x, 3 / 2**10, rtol=0.1)


@pytest.mark.parametrize("equations", [None, 1.5])
def test_products_with_the_jacobian_and_its_transpose_are_those_of_finite_differences(equations) -> None:
    """Through the client's own rules of derivatives, of a network with convolutions."""
    module = models.LeNet((4, 4, 1), 3, rngs=nnx.Rngs(0))
    apply_fn, params = models.functional(module)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    x, v = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 1))

    def residual_fn(z):
        return jax.tree.map(lambda leaf: leaf - 0.1, client_fn(params, Batch(z, jnp.array([1]))))

    @jax.jit
    def products(x, v):
        value_fn = lambda z: optax.tree.norm(residual_fn(z), squared=True)  # noqa: E731
        local = _linearized(jax.grad(value_fn)(x), x, value_fn, residual_fn, equations)
        pushed = local.push(v.ravel())
        w = jnp.cos(jnp.arange(pushed.size))
        step = 1e-5 * v.ravel()
        slope = (local.merit_fn(local.x + step) - local.merit_fn(local.x - step)) / 2e-5
        return pushed, w, local.pull(w), jnp.vdot(local.gradient, v.ravel()), slope

    pushed, w, pulled, along, slope = products(x, v)
    np.testing.assert_allclose(np.vdot(pushed, w), np.vdot(v.ravel(), pulled), rtol=1e-10)
    np.testing.assert_allclose(along, slope, rtol=1e-6)
    if equations is None:
        ahead, behind = (ravel_pytree(residual_fn(x + step * v))[0] for step in (1e-5, -1e-5))
        np.testing.assert_allclose(pushed, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-8)
    else:
        assert pushed.size == 24


def test_conjugate_gradients_take_unknowns_of_very_different_scale() -> None:
    """Columns differ by up to ten thousand, and 30 products for each of 4 updates are enough with the diagonal."""
    scale = jnp.logspace(-2, 2, 200)
    matrix = jax.random.normal(jax.random.key(0), (800, 200)) * scale
    options = {"initial_damping": 1e-12, "linear_solver": "cg", "cg_steps": 30}
    x, _ = minimise(lambda x: matrix @ x - matrix @ (1 / scale), jnp.zeros(200), 4, equations=None, **options)
    np.testing.assert_allclose(x * scale, 1, atol=1e-6)


def test_conjugate_gradients_do_not_form_the_jacobian() -> None:
    weights = jax.ShapeDtypeStruct((300, 2_000), jnp.float64)
    size = {}
    for linear_solver in ("cholesky", "cg"):
        solver = levenberg_marquardt(equations=None, linear_solver=linear_solver)

        def update(weights, x, solver=solver):
            residual_fn = lambda z: jnp.tanh(z @ weights)  # noqa: E731
            value_fn = lambda z: jnp.sum(jnp.square(residual_fn(z)))  # noqa: E731
            value, grad = jax.value_and_grad(value_fn)(x)
            extra = {"value": value, "value_fn": value_fn, "residual_fn": residual_fn}
            return solver.update(grad, solver.init(x), x, **extra)[0]

        compiled = jax.jit(update).lower(weights, jax.ShapeDtypeStruct((300,), jnp.float64)).compile()
        size[linear_solver] = compiled.memory_analysis().temp_size_in_bytes
    jacobian = 8 * 300 * 2_000
    assert size["cholesky"] > jacobian
    assert size["cg"] < jacobian / 10


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
        ({"least_fall": -0.1}, "least_fall must not be negative, got -0.1"),
    ],
)
def test_bad_settings_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        levenberg_marquardt(**options)
