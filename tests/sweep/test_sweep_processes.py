"""Sweeps on several devices and in several processes, against a sweep on one device.

Devices must exist before JAX starts, so these run in processes of their own.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gia_jax.sweep import open_sweep

# Seven lanes of a convolutional network, one example for each victim, where letting XLA partition the program gives
# wrong kernel gradients; two settings make two batches of at most four lanes on each of several devices.
SCRIPT = """
import os, signal, sys
import jax
store, index, count, address, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
if address:
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=10)
import jax.numpy as jnp
from gia_jax import Batch, Observation, ThreatModel, attacks, observe, stack
from gia_jax.clients import cross_entropy, federated_sgd
from gia_jax.sweep import grid, stored_sweep

jax.config.update("jax_enable_x64", True)
keys = jax.random.split(jax.random.key(0), 9)
params = jax.random.normal(keys[7], (3, 3, 1, 2)), jax.random.normal(keys[8], (32, 3))

def apply_fn(params, images):
    maps = jax.lax.conv_general_dilated(images, params[0], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.sigmoid(maps).reshape(len(images), -1) @ params[1]

client_fn = federated_sgd(cross_entropy(apply_fn))
threat, label = ThreatModel(labels=True), jnp.array([1])
victim = jax.jit(lambda image: observe(keys[0], threat, client_fn, params, Batch(image, label)))
seen = stack([victim(jax.random.uniform(key, (1, 6, 6, 1))) for key in keys[:7]])
made = lambda setting: attacks.inverting_gradients(
    client_fn, bounds=(0.0, 1.0), num_steps=4, total_variation_weight=setting["weight"])
signs = []

def killed(sign):
    signs.append(sign)
    if len(signs) == calls:
        os.kill(os.getpid(), signal.SIGKILL)

process, settings = None if address else (index, count), grid(weight=[1e-3, 1e-1])
found = stored_sweep(store, made, settings, keys[1], seen, lanes=4, process=process, progress_fn=killed)
print(len(jax.local_devices()), int(found.done.sum()), signs[1].done if signs[1:] else None)
"""


def _start(store: Path, *, devices: int, process: tuple[int, int] = (0, 1), address: str = "", calls: int = 0):
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    arguments = [str(store), *map(str, process), address, str(calls)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, text=True, stdout=subprocess.PIPE
    )


def _said(running: subprocess.Popen) -> list[str]:
    out, _ = running.communicate(timeout=300)
    assert running.returncode == 0
    return out.split()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    store = tmp_path_factory.mktemp("alone")
    assert _said(_start(store, devices=1)) == ["1", "14", "4"]
    return open_sweep(store)


def _assert_same(store: Path, alone) -> None:
    found = open_sweep(store)
    assert found.done.all()
    for name in ("losses", "loss", "inputs"):
        np.testing.assert_allclose(found[name], alone[name], rtol=0, atol=1e-12)


def test_devices_share_the_lanes(tmp_path: Path, alone) -> None:
    assert _said(_start(tmp_path, devices=4))[:2] == ["4", "14"]
    _assert_same(tmp_path, alone)


def test_a_process_dies_and_the_others_finish(tmp_path: Path, alone) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [_start(tmp_path, devices=2, process=(i, 2), address=address, calls=calls) for i, calls in ((0, 0), (1, 3))]
    both[1].communicate(timeout=300)
    assert both[1].returncode == -signal.SIGKILL
    assert int(_said(both[0])[1]) >= 8
    done = open_sweep(tmp_path).done.values
    assert 8 <= done.sum() < 14
    # A single process completes the store, and does nothing but what is missing.
    assert _said(_start(tmp_path, devices=2))[1] == "14"
    _assert_same(tmp_path, alone)
