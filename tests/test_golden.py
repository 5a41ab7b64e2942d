"""Losses, updates and second-order gradients against the numbers of PyTorch that `golden/make.py` wrote."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden import recipe

from gia_jax import Batch, models
from gia_jax.clients import cross_entropy, federated_sgd
from gia_jax.matching import objectives
from gia_jax.matching.optimizers import fixed_step_lbfgs

FOLDER = Path(__file__).parent / "golden"
OBJECTIVES = {"euclidean": objectives.euclidean, "cosine": objectives.cosine}


def by_path(tree) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): v for path, v in jax.tree.leaves_with_path(tree)}


def drawn_model(name: str, dtype: str):
    """The model of a golden file with its drawn parameters and running statistics, as `(apply_fn, params)`."""
    model_name, side, mode = recipe.CASES[name]
    make = getattr(models, model_name)
    module = nnx.eval_shape(lambda: make((side, side, 3), recipe.CLASSES, rngs=nnx.Rngs(0)))
    state = nnx.state(module, (nnx.Param, nnx.BatchStat))
    pure = nnx.to_pure_dict(state)
    values = recipe.variables({path: leaf.shape for path, leaf in by_path(pure).items()})
    filled = jax.tree.unflatten(jax.tree.structure(pure), [jnp.asarray(values[path], dtype) for path in by_path(pure)])
    nnx.replace_by_pure_dict(state, filled)
    nnx.update(module, state)
    return models.functional(module, batch_norm=mode)


def computed(name: str, lowering: str, dtype: str) -> dict[str, np.ndarray]:
    """What the golden file of that name holds, and the whole update, as this library computes them."""
    apply_fn, params = drawn_model(name, dtype)
    loss_fn = cross_entropy(apply_fn)
    client_fn = federated_sgd(loss_fn, lowering=lowering)

    def weighted(inputs, labels, target, weights):
        update = client_fn(params, Batch(inputs, labels))
        values = {key: fn(update, target) for key, fn in OBJECTIVES.items()}
        return sum(weights[key] * values[key] for key in OBJECTIVES), (values, update)

    def run(inputs, labels, target, one):
        """All values, and the gradient of one objective. One compilation serves both, and the client."""
        inputs, weights = jnp.asarray(inputs, dtype), {key: jnp.asarray(key == one, dtype) for key in OBJECTIVES}
        (_, (values, update)), gradient = compiled(inputs, jnp.asarray(labels), target, weights)
        return values, update, gradient

    compiled = jax.jit(jax.value_and_grad(weighted, has_aux=True))
    images, labels, client_images, client_labels = recipe.batches(recipe.CASES[name][1])
    _, target, _ = run(client_images, client_labels, jax.tree.map(jnp.zeros_like, params), None)
    found = {"loss": loss_fn(params, Batch(jnp.asarray(images, dtype), jnp.asarray(labels)))}
    for key in OBJECTIVES:
        values, update, found[f"{key}_gradient"] = run(images, labels, target, key)
    found |= values | by_path(update)
    assert {leaf.dtype.name for leaf in found.values()} == {dtype}
    return {key: np.asarray(value, np.float64) for key, value in found.items()}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def matches_torch(name: str, lowering: str, dtype: str, tolerance: float) -> None:
    found, golden = computed(name, lowering, dtype), np.load(FOLDER / f"{name}.npz")
    errors = {key: error(found[key], golden[key]) for key in golden.files if key != "summary"}
    # A bias in front of a training-mode normalisation has gradient zero: measure it against the largest tensor.
    summary, expected = recipe.summary({k: v for k, v in found.items() if "/" in k}), golden["summary"]
    norms = np.maximum(expected[:, 0], 1e-3 * expected[:, 0].max())
    errors["summary"] = np.max(np.linalg.norm(summary - expected, axis=1) / norms)
    assert {key: value for key, value in errors.items() if not value <= tolerance} == {}


@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        ("lenet", "matmul"),
        ("lenet", "native"),
        ("convnet_evaluation", "native"),
        ("convnet_training", "matmul"),
        ("resnet18_evaluation", "matmul"),
        ("resnet18_training", "native"),
    ],
)
def test_double_precision(name, lowering, x64):
    matches_torch(name, lowering, "float64", 1e-9)


@pytest.mark.parametrize(
    ("name", "lowering", "tolerance"),
    [
        ("lenet", "matmul", 1e-4),
        ("lenet", "native", 1e-4),
        # Rounding may carry one of half a million units over the kink of relu: then some tensor changes by up to 1%.
        ("convnet_evaluation", "matmul", 2e-2),
    ],
)
def test_single_precision(name, lowering, tolerance):
    matches_torch(name, lowering, "float32", tolerance)


def test_lenet_update_is_stored_whole():
    _, params = drawn_model("lenet", "float32")
    golden = np.load(FOLDER / "lenet.npz")
    assert {path: golden[path].shape for path in by_path(params)} == {k: v.shape for k, v in by_path(params).items()}


@pytest.mark.parametrize("history_size", [100, 4])
def test_lbfgs_walks_as_torch_does(history_size, x64):
    # The function is not convex: some pairs have negative curvature and are dropped; a history of 4 is overwritten.
    matrix, start = map(jnp.asarray, recipe.quartic())
    optimizer = fixed_step_lbfgs(memory_size=history_size)

    def value(x):
        return jnp.sum(jnp.log(jnp.cosh(matrix @ x))) + jnp.sum(x**4 / 4 - x**2 / 2)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(value)(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    _, iterates = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=30))(start)
    expected = np.load(FOLDER / "lbfgs.npz")[f"history_{history_size}"]
    np.testing.assert_array_equal(start, expected[0])
    for found, iterate in zip(iterates, expected[1:], strict=True):
        assert error(found, iterate) < 1e-7
