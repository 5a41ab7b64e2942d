"""Lanes on eight devices against a loop on one. Devices must exist before JAX starts, so this runs in a subprocess."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import map_sharded

SCRIPT = """
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from gia_jax import Batch, map_sharded, models
from gia_jax.clients import cross_entropy, federated_sgd
from gia_jax.matching import objectives

assert len(jax.devices()) == 8
jax.config.update("jax_enable_x64", True)
apply_fn, shapes = models.functional(models.LeNet((8, 8, 2), 3, rngs=nnx.Rngs(0)))
rng = np.random.default_rng(0)
lanes = 16
params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(lanes, *leaf.shape))), shapes)
images, dummies = jnp.asarray(rng.normal(size=(2, lanes, 1, 8, 8, 2)))
labels = jnp.asarray(rng.integers(0, 3, (lanes, 1)))

def victim(params, image, label, dummy, lowering):
    client_fn = federated_sgd(cross_entropy(apply_fn), lowering=lowering)
    update = client_fn(params, Batch(image, label))
    loss = lambda inputs: objectives.cosine(client_fn(params, Batch(inputs, label)), update)

    def step(inputs, _):
        value, gradient = jax.value_and_grad(loss)(inputs)
        return inputs - 0.1 * jnp.sign(gradient), value

    return update, jax.lax.scan(step, dummy, length=2)

for lowering, kind in (("matmul", AxisType.Explicit), ("native", AxisType.Auto)):
    fn = lambda *args: victim(*args, lowering)
    arguments = (params, images, labels, dummies)
    one = jax.jit(fn)
    loop = [one(*jax.tree.map(lambda leaf: leaf[i], arguments)) for i in range(lanes)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    mesh = jax.make_mesh((8,), ("lanes",), axis_types=(kind,))
    mapped = jax.jit(map_sharded(fn, mesh, "lanes"))
    for placed in (arguments, jax.device_put(arguments, NamedSharding(mesh, PartitionSpec("lanes")))):
        found = mapped(*placed)
        for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert len(f.sharding.device_set) == 8
            np.testing.assert_allclose(f, e, rtol=0, atol=1e-10 * np.abs(e).max())

# One axis of two takes the lanes; random keys travel as well.
mesh, keys = jax.make_mesh((4, 2), ("rest", "lanes")), jax.random.split(jax.random.key(0), 6)
found = jax.jit(map_sharded(jax.random.normal, mesh, "lanes"))(keys)
np.testing.assert_array_equal(found, jax.vmap(jax.random.normal)(keys))
for shape in ((12,), ()):
    try:
        map_sharded(lambda tree: tree["x"], jax.make_mesh((8,), ("lanes",)), "lanes")({"x": jnp.zeros(shape)})
    except ValueError as error:
        print(error)
"""


def test_equals_a_loop_on_eight_devices():
    # One example per victim and convolutions: where letting XLA partition the program gives wrong kernel gradients.
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    message = "lanes must be a positive multiple of the 8 devices, got shape {} at args[0]['x']"
    assert done.stdout.splitlines() == [message.format(shape) for shape in ("(12,)", "()")]


def test_one_device_is_vmap():
    mapped = map_sharded(lambda tree, x: (tree["a"] * x, jnp.sum(x)), jax.make_mesh((1,), ("lanes",)), "lanes")
    a, x = jnp.arange(3.0), jnp.arange(6.0).reshape(3, 2)
    found = jax.jit(mapped)({"a": a}, x)
    np.testing.assert_array_equal(found[0], a[:, None] * x)
    np.testing.assert_array_equal(found[1], x.sum(1))


def test_unknown_axis():
    with pytest.raises(ValueError, match=r"\('lanes',\).*'victims'"):
        map_sharded(jnp.sin, jax.make_mesh((1,), ("lanes",)), "victims")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "args must have a leaf with lanes, got none"),
        ((1.0,), r"lanes must be a positive multiple of the 1 devices, got shape \(\) at args\[0\]"),
        ((np.zeros((0, 2)),), r"lanes must be a positive multiple of the 1 devices, got shape \(0, 2\) at args\[0\]"),
        ((np.zeros(2), np.zeros(3)), r"lanes must be 2 as at args\[0\], got \(3,\) at args\[1\]"),
    ],
)
def test_arguments_without_common_lanes_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        map_sharded(lambda *args: args, jax.make_mesh((1,), ("lanes",)), "lanes")(*args)
