"""The pseudo-gradient of two sets of parameters against closed forms and against the library's own client."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Batch, clients, interop


def test_it_is_the_mean_gradient_of_plain_sgd() -> None:
    gradients = np.random.default_rng(0).normal(size=(4, 3))
    after = 1.0 - 0.05 * gradients.sum(0)
    found = interop.pseudo_gradient({"w": np.ones(3)}, {"w": after}, learning_rate=0.05, local_steps=4)
    np.testing.assert_allclose(found["w"], gradients.mean(0), rtol=1e-5)
    one_step = interop.pseudo_gradient({"w": np.ones(3)}, {"w": after}, learning_rate=0.05)
    np.testing.assert_allclose(one_step["w"], gradients.sum(0), rtol=1e-5)
    bare = interop.pseudo_gradient({"w": np.ones(3)}, {"w": after})
    np.testing.assert_allclose(bare["w"], 0.05 * gradients.sum(0), rtol=1e-5)


def test_it_is_what_the_client_of_federated_averaging_returns() -> None:
    rng = np.random.default_rng(0)
    params = {"head": {"kernel": jnp.asarray(rng.normal(size=(4, 3))), "bias": jnp.zeros(3)}}
    loss_fn = clients.cross_entropy(lambda params, x: x @ params["head"]["kernel"] + params["head"]["bias"])
    batch = Batch(jnp.asarray(rng.normal(size=(2, 4))), jnp.array([0, 2]))
    trained = params
    gradient_fn = jax.jit(jax.grad(loss_fn))
    for _ in range(3):
        gradient = gradient_fn(trained, batch)
        trained = jax.tree.map(lambda p, g: p - 0.5 * g, trained, gradient)
    found = interop.pseudo_gradient(params, trained, learning_rate=0.5, local_steps=3)
    expected = jax.jit(clients.federated_averaging(loss_fn, learning_rate=0.5, local_epochs=3))(params, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_state_dicts_are_compared_by_name_and_keep_their_order() -> None:
    before = {"b.weight": np.ones(2), "a.num_batches_tracked": np.asarray(3), "a.weight": np.zeros(2)}
    after = OrderedDict(reversed([(name, value + 1) for name, value in before.items()]))
    found = interop.pseudo_gradient(before, after)
    assert list(found) == list(before)
    assert found["b.weight"].tolist() == found["a.weight"].tolist() == [-1.0, -1.0]
    assert int(found["a.num_batches_tracked"]) == 4  # no parameter: what came back
    assert isinstance(interop.pseudo_gradient([np.ones(1)], [np.zeros(1)]), list)


def test_half_precision_is_widened() -> None:
    before, after = (jnp.asarray([value], jnp.bfloat16) for value in (1.0, 0.9921875))
    found = interop.pseudo_gradient([before], [after], learning_rate=0.1)[0]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [0.078125], rtol=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "settings", "match"),
    [
        ({"w": np.ones(2)}, {"w": np.ones(2)}, {}, "got equal parameters: the client did not move"),
        ({"w": np.ones(2)}, {"w": np.ones(3)}, {}, r"'w' has shape \(3,\), expected \(2,\)"),
        ({"w": np.ones(2)}, {"v": np.ones(2)}, {}, r"'w' of shape \(2,\) is missing; 'v' of shape \(2,\) is left over"),
        ({"w": np.ones(2)}, {"w": np.array([1, np.nan])}, {}, r"after\['w'\] must be finite, got nan"),
        ({"w": np.ones(2)}, {"w": None}, {}, r"after\['w'\] must be an array of numbers, got NoneType"),
        ({"w": np.ones(2)}, {"w": np.ones(2, int)}, {}, "'w' is of type int64, expected float64"),
        ({"n": np.asarray(1)}, {"n": np.asarray(2)}, {}, "floating-point numbers, got none"),
        ({"w": np.ones(2)}, {"w": np.zeros(2)}, {"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"w": np.ones(2)}, {"w": np.zeros(2)}, {"learning_rate": -0.1}, "learning_rate must be positive, got -0.1"),
        ({"w": np.ones(2)}, {"w": np.zeros(2)}, {"learning_rate": float("nan")}, "learning_rate must be .* got nan"),
        ({"w": np.ones(2)}, {"w": np.zeros(2)}, {"learning_rate": float("inf")}, "learning_rate must be .* got inf"),
        (
            {"w": np.ones(2)},
            {"w": np.zeros(2)},
            {"learning_rate": 1.0, "local_steps": 0},
            "local_steps must be .* got 0",
        ),
        ({"w": np.ones(2)}, {"w": np.zeros(2)}, {"local_steps": 2}, "local_steps must be None .* got 2"),
    ],
)
def test_what_is_no_update_is_refused(before: dict, after: dict, settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        interop.pseudo_gradient(before, after, **settings)
    assert "\n" not in str(caught.value)
