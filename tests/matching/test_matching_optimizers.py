"""Optimisers of the dummy data: schedules, noise, and L-BFGS against a recursion in NumPy and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax.matching import optimizers


@pytest.mark.parametrize("num_steps", [80, 4_800, 24_000])
def test_step_schedule_drops_tenfold_at_three_five_and_seven_eighths(num_steps):
    schedule = optimizers.step_schedule(0.2, num_steps)
    for eighths, before in ((3, 0.2), (5, 0.02), (7, 0.002)):
        boundary = eighths / 8 * num_steps
        # The published code divides by 2.667, 1.6 and 1.142 and rounds down: within two steps or a thousandth.
        slack = 2 + 1e-3 * num_steps
        assert float(schedule(int(boundary - slack))) == pytest.approx(before)
        assert float(schedule(int(boundary + slack))) == pytest.approx(before / 10)
    assert float(schedule(0)) == pytest.approx(0.2)
    assert float(schedule(num_steps - 1)) == pytest.approx(0.2e-3)


def test_soft_sign_goes_from_tanh_to_the_gradient_itself():
    transform = optimizers.soft_sign(1000)
    gradient = jnp.array([-3.0, -1e-3, 0.0, 0.5, 40.0])
    first, state = transform.update(gradient, transform.init(gradient))
    np.testing.assert_allclose(first, np.tanh(gradient), rtol=1e-6)
    half, _ = transform.update(gradient, jnp.asarray(500))
    np.testing.assert_allclose(half, 2 * np.tanh(gradient / 2), rtol=1e-5)
    for step in (999, 1000, 5000):  # beyond the end the slope stays above zero
        last, _ = transform.update(gradient, jnp.asarray(step))
        np.testing.assert_allclose(last, gradient, rtol=1e-3)
    second, _ = transform.update(gradient, state)
    assert np.all(np.abs(second) >= np.abs(first))
    assert np.all(np.sign(second) == np.sign(gradient))


def test_langevin_noise_adds_independent_normal_noise_of_its_scale():
    transform = optimizers.langevin_noise(0.3)
    updates = {"a": jnp.full(20_000, 5.0), "b": jnp.zeros((100, 200))}
    noisy, _ = transform.update(updates, transform.init(updates), key=jax.random.key(0))
    noise = {name: np.asarray(noisy[name] - updates[name]).ravel() for name in updates}
    for leaf in noise.values():
        assert leaf.mean() == pytest.approx(0, abs=5 * 0.3 / 141)
        assert leaf.std() == pytest.approx(0.3, rel=5 / 200)
        assert np.mean(np.abs(leaf) > 0.6) == pytest.approx(0.0455, abs=0.008)  # beyond two deviations
    assert abs(np.corrcoef(noise["a"], noise["b"])[0, 1]) < 5 / 141


def test_langevin_noise_follows_the_key_and_differs_between_lanes():
    transform = optimizers.langevin_noise(1.0)
    zeros = jnp.zeros(8)
    state = transform.init(zeros)
    keys = jax.random.split(jax.random.key(0), 3)
    lanes = jax.vmap(lambda key: transform.update(zeros, state, key=key)[0])(keys)
    assert np.unique(lanes).size == lanes.size
    np.testing.assert_array_equal(lanes[1], transform.update(zeros, state, key=keys[1])[0])


def test_langevin_noise_takes_a_schedule():
    transform = optimizers.langevin_noise(optax.piecewise_constant_schedule(1.0, {1: 0.0}))
    zeros = jnp.zeros(8)
    first, state = transform.update(zeros, transform.init(zeros), key=jax.random.key(0))
    second, state = transform.update(zeros, state, key=jax.random.key(1))
    third, _ = transform.update(zeros, state, key=jax.random.key(2))
    assert np.all(first != 0)
    np.testing.assert_array_equal([second, third], np.zeros((2, 8)))


def iterates(transform, value_fn, start, num_steps):
    """x_1 ... x_T."""

    def body(carry, _):
        x, state = carry
        updates, state = transform.update(jax.grad(value_fn)(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    scan = jax.jit(lambda x: jax.lax.scan(body, (x, transform.init(x)), None, length=num_steps)[1])
    return jax.tree.map(np.asarray, scan(start))


def two_loop_steps(path, gradients, *, learning_rate, memory_size):
    """The step that L-BFGS by its two loops (Nocedal and Wright, Algorithm 7.4) takes from every point of a path, and
    how many pairs it skipped.
    """
    pairs, scale, skipped, steps = [], 1.0, 0, []
    for t, g in enumerate(gradients):
        if t > 0:
            s, y = path[t] - path[t - 1], g - gradients[t - 1]
            if s @ y > 1e-10:
                pairs, scale = (pairs + [(s, y)])[-memory_size:], s @ y / (y @ y)
            else:
                skipped += 1
        direction, alphas = g.copy(), []
        for s, y in reversed(pairs):
            alphas.append(s @ direction / (s @ y))
            direction -= alphas[-1] * y
        direction *= scale
        for (s, y), alpha in zip(pairs, reversed(alphas)):
            direction += s * (alpha - y @ direction / (s @ y))
        steps.append(-learning_rate * (min(1.0, 1 / np.abs(g).sum()) if t == 0 else 1.0) * direction)
    return np.array(steps), skipped


def random_smooth(size, waves):
    """A random smooth function and a start; with waves it starts where the curvature is negative."""
    generator = np.random.default_rng(size)
    matrix = jnp.asarray(generator.normal(size=(2 * size, size)) / size**0.5)
    shift = jnp.asarray(generator.normal(size=2 * size))

    def value_fn(x):
        return (
            jnp.sum(jnp.logaddexp(matrix @ x - shift, shift - matrix @ x))
            + 0.05 * x @ x
            + waves * jnp.sum(jnp.sin(3 * x))
        )

    offset = generator.normal(size=size)
    return value_fn, jnp.asarray(np.pi / 6 + 0.05 * offset if waves else offset)


@pytest.mark.parametrize("memory_size", [1, 3, 100])
@pytest.mark.parametrize("waves", [0.0, 2.0], ids=["convex", "waves"])
def test_lbfgs_is_the_two_loop_recursion(x64, memory_size, waves):
    value_fn, start = random_smooth(20, waves)
    transform = optimizers.fixed_step_lbfgs(learning_rate=0.8, memory_size=memory_size)
    path = np.concatenate([[start], iterates(transform, value_fn, start, 18)])
    gradients = np.asarray(jax.vmap(jax.grad(value_fn))(path[:-1]))
    # Every step is compared from the same point, so that a path that runs wild cannot amplify rounding.
    expected, skipped = two_loop_steps(path, gradients, learning_rate=0.8, memory_size=memory_size)
    errors = np.linalg.norm(np.diff(path, axis=0) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < 1e-6
    assert (skipped > 0) == (waves > 0)  # pairs of non-positive curvature occurred, and were skipped


# torch.optim.LBFGS(lr=0.7, max_iter=t, history_size=m), PyTorch 2.13, float64: where t inner iterations end.
TORCH = {
    (100, 4): [1.4565175066, -1.307233867, 0.224228669],
    (100, 12): [-0.0699579246, 0.0223598326, 0.1072005425],
    (2, 4): [1.4453529182, -1.3222766954, 0.2427682742],
    (2, 12): [-0.0980722248, 0.0283418598, 0.0994751952],
}


@pytest.mark.parametrize(("memory_size", "step"), TORCH)
def test_lbfgs_is_that_of_pytorch(x64, memory_size, step):
    i, j = jnp.arange(4.0)[:, None], jnp.arange(3.0)[None]
    matrix, shift = jnp.cos(1 + i + 2 * j), jnp.array([0.3, -0.2, 0.5, 0.1])

    def value_fn(x):
        return jnp.sum(jnp.log(jnp.cosh(matrix @ x - shift))) + 0.2 * jnp.sum(x**2)

    transform = optimizers.fixed_step_lbfgs(learning_rate=0.7, memory_size=memory_size)
    ours = iterates(transform, value_fn, jnp.array([2.0, -1.5, 1.0]), step)
    np.testing.assert_allclose(ours[-1], TORCH[memory_size, step], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [2, 5, 10])
def test_lbfgs_solves_a_quadratic_in_little_more_steps_than_unknowns(x64, size):
    generator = np.random.default_rng(size)
    rotation, _ = np.linalg.qr(generator.normal(size=(size, size)))
    hessian = jnp.asarray(rotation * np.linspace(1, 3, size) @ rotation.T)
    solution = jnp.asarray(generator.normal(size=size))
    transform = optimizers.fixed_step_lbfgs()
    path = iterates(transform, lambda x: 0.5 * (x - solution) @ hessian @ (x - solution), jnp.zeros(size), size + 8)
    assert np.linalg.norm(path[-1] - solution) < 1e-4 * np.linalg.norm(solution)
    descent = iterates(
        optax.sgd(0.5), lambda x: 0.5 * (x - solution) @ hessian @ (x - solution), jnp.zeros(size), size + 8
    )
    assert np.linalg.norm(path[-1] - solution) < np.linalg.norm(descent[-1] - solution)


def test_lbfgs_first_step_is_no_longer_than_one(x64):
    transform = optimizers.fixed_step_lbfgs(learning_rate=0.5)
    for gradient, length in ((jnp.array([300.0, -100.0]), 1 / 400), (jnp.array([0.01, 0.02]), 1)):
        updates, _ = jax.jit(transform.update)(gradient, transform.init(gradient), jnp.zeros(2))
        np.testing.assert_allclose(updates, -0.5 * length * gradient, rtol=1e-12)


def test_lbfgs_stays_at_a_stationary_point_and_works_on_trees(x64):
    value_fn, start = random_smooth(6, 0.0)
    transform = optimizers.fixed_step_lbfgs()
    flat = iterates(transform, value_fn, start, 6)
    tree = {"a": start[:2].reshape(2, 1), "b": (start[2:],)}
    split = iterates(transform, lambda t: value_fn(jnp.concatenate([t["a"].ravel(), t["b"][0]])), tree, 6)
    np.testing.assert_allclose(np.concatenate([split["a"][:, :, 0], split["b"][0]], 1), flat, rtol=1e-6)
    still = iterates(transform, lambda x: jnp.sum(x**2), jnp.zeros(3), 4)
    np.testing.assert_array_equal(still, np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizers.step_schedule(0.0, 10), r"learning_rate must be positive, got 0\.0"),
        (lambda: optimizers.step_schedule(0.1, 0), "num_steps must be an integer of at least 1, got 0"),
        (lambda: optimizers.soft_sign(-1), "num_steps must be an integer from 1 to 2147483647, got -1"),
        (lambda: optimizers.langevin_noise(-0.1), r"scale must not be negative, got -0\.1"),
        (lambda: optimizers.fixed_step_lbfgs(learning_rate=-1.0), r"learning_rate must be positive, got -1\.0"),
        (lambda: optimizers.fixed_step_lbfgs(memory_size=0), "memory_size must be an integer of at least 1, got 0"),
    ],
)
def test_refusals_name_argument_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradient_regularization_is_exact_for_a_quadratic(x64):
    matrix = np.random.default_rng(0).normal(size=(5, 5))
    matrix, start = jnp.asarray(matrix @ matrix.T), jnp.arange(1.0, 6.0)

    def value_fn(x):
        return 0.5 * x @ matrix @ x - x.sum()

    def regularized_fn(x):
        return value_fn(x) + 0.3 * 2.0 * jnp.linalg.norm(jax.grad(value_fn)(x))

    transform = optimizers.gradient_regularization(0.3, radius=2.0)
    found, _ = transform.update(jax.grad(value_fn)(start), transform.init(start), start, value_fn=value_fn)
    np.testing.assert_allclose(found, jax.grad(regularized_fn)(start), rtol=1e-12)


def test_gradient_regularization_comes_to_the_penalty_as_its_radius_shrinks(x64):
    start = {"a": jnp.array([0.3, -1.2]), "b": jnp.array([[0.7]])}

    def value_fn(x):
        return jnp.sum(jnp.sin(3 * x["a"]) * jnp.exp(x["b"])) + jnp.sum(x["a"] ** 4)

    def norm_fn(x):
        return optax.tree.norm(jax.grad(value_fn)(x))

    gradient, wanted = jax.grad(value_fn)(start), jax.grad(norm_fn)(start)
    errors = []
    for radius in (1e-2, 1e-3, 1e-4):
        found, _ = optimizers.gradient_regularization(1.0, radius=radius).update(
            gradient, optax.EmptyState(), start, value_fn=value_fn
        )
        penalty = jax.tree.map(lambda f, g: (f - g) / radius, found, gradient)  # noqa: B023, called here
        errors.append(float(optax.tree.norm(optax.tree.sub(penalty, wanted)) / optax.tree.norm(wanted)))
    assert errors[0] < 0.2
    np.testing.assert_allclose(np.asarray(errors[:-1]) / errors[1:], 10, rtol=0.2)


def test_gradient_regularization_at_a_minimum_is_finite_and_in_a_chain_is_handed_on():
    start = jnp.zeros(3)
    chain = optax.chain(optimizers.gradient_regularization(0.5, radius=1.0), optax.sgd(0.1))
    found, _ = chain.update(start, chain.init(start), start, value_fn=lambda x: jnp.sum(x**2))
    np.testing.assert_array_equal(found, 0)
    one = jnp.ones(3)
    found, _ = chain.update(2 * one, chain.init(one), one, value_fn=lambda x: jnp.sum(x**2))
    np.testing.assert_allclose(found, -0.1 * (2 + 0.5 * 2 / np.sqrt(3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("share", "radius", "message"),
    [
        (1.5, 1.0, r"share must be in \[0, 1\], got 1.5"),
        (-0.1, 1.0, r"share must be in \[0, 1\], got -0.1"),
        (0.5, 0.0, "radius must be positive, got 0.0"),
        (0.5, float("inf"), "radius must be finite, got inf"),
    ],
)
def test_gradient_regularization_refuses_bad_settings(share, radius, message):
    with pytest.raises(ValueError, match=message):
        optimizers.gradient_regularization(share, radius=radius)
