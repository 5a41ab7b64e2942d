"""Milliseconds a step, compile seconds, memory, and lanes: Inverting Gradients here and in PyTorch's `breaching`.

    python benchmarks/speed.py [PART ...] [--rounds N] [--models NAME ...]

The part `steps` needs the extra `peers`. Ratios count, not milliseconds: the two libraries take turns in one process
on the same threads, with the same weights and the same gradient. With a GPU that both see, the same command measures
both on it.
"""

import argparse
import functools
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import resnet20
from flax import nnx
from parts import run_parts

from gia_jax import Batch, ThreatModel, advance, clients, data, keep_best, models, observe, restarts, run
from gia_jax.attacks import inverting_gradients
from gia_jax.base import Attack, Observation
from gia_jax.lowering import Lowering, lowers_to_matmul
from gia_jax.sweep.lanes import over_lanes

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# The size of what enters the last layer, for the peer's weights.
MODELS = {"lenet": (8, 8, 12), "resnet18": (1, 1, 512), "convnet": (3, 3, 256), "resnet18_imagenet": (1, 1, 512)}
# Networks that the peer does not have, or not with these weights. They and the last one above have images of 224 pixels
# and 1,000 classes, but for ResNet-20.
OWN = ("resnet20", "efficientnet_lite0", "vit")
# Model, batch size, restarts, and the least ratio to the peer that counts as fast.
CASES = [
    ("lenet", 1, 1, 4.0),
    ("lenet", 1, 8, 12.0),
    ("resnet18", 1, 1, 2.0),
    ("resnet18", 8, 1, 1.2),
    ("resnet18", 1, 8, 2.5),
    ("convnet", 1, 1, 1.25),
    ("resnet18_imagenet", 1, 1, 2.0),
]


class Case(NamedTuple):
    """An attack and what it attacks."""

    attack: Attack
    observation: Observation
    forward_flops: float


def network(model: str) -> tuple[nnx.Module, tuple[int, int, int]]:
    """A network and the shape of its images."""
    small, large = (32, 32, 3), (224, 224, 3)
    if model == "resnet20":
        return resnet20.network(resnet20.weights_file("converged")), small
    if model == "efficientnet_lite0":
        return nnx.jit(lambda: models.EfficientNetLite0(large, rngs=nnx.Rngs(0)))(), large
    if model == "vit":
        return models.ViT(large, 1_000, patch_size=16, rngs=nnx.Rngs(0)), large
    if model == "resnet18_imagenet":
        return models.MODELS[model](large, 1_000, rngs=nnx.Rngs(0)), large
    return models.MODELS[model](small, 10, rngs=nnx.Rngs(0)), small


def case(model: str, batch_size: int, lowering: Lowering = "auto", peer: Any = None) -> Case:
    """The attack on a random network; with a peer, on its weights and its data."""
    module, shape = network(model)
    apply_fn, params = models.functional(module)
    inputs = jax.random.normal(jax.random.key(1), (batch_size, *shape))
    if peer is not None:
        from peer import to_jax

        params = jax.tree.map(jnp.asarray, to_jax(peer.weights(), params, MODELS[model]))
        inputs = jnp.asarray(peer.inputs.cpu().numpy().transpose(0, 2, 3, 1))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn), lowering=lowering)
    batch = Batch(inputs, jnp.arange(batch_size) % 10)
    threat = ThreatModel(labels=True, label_order=True)
    observation = jax.jit(lambda p, b: observe(jax.random.key(2), threat, client_fn, p, b))(params, batch)
    if peer is not None:
        theirs = to_jax([g.cpu().numpy() for g in peer.gradient], params, MODELS[model])
        error = optax.tree.norm(optax.tree.sub(observation.update, theirs)) / optax.tree.norm(theirs)
        if not error < 1e-4:
            raise RuntimeError(f"the gradients of {model} differ by {error}")
    photos = data.load("photos")
    attack = inverting_gradients(client_fn, bounds=photos.bounds(), total_variation_weight=0.2)
    cost = jax.jit(apply_fn).lower(params, inputs).compile().cost_analysis()
    return Case(keep_best(attack), observation, float((cost or {}).get("flops", np.nan)))


def stepper(attack: Attack, num_restarts: int, num_steps: int) -> Callable[..., Any]:
    """`(keys, states, observation) -> states`, `num_steps` steps of all restarts."""

    def one(key: jax.Array, state: Any, observation: Observation) -> Any:
        return advance(attack, key, state, observation, start=0, num_steps=num_steps)[0]

    return over_lanes(one, (0, 0, None), num_restarts)


def prepare(built: Case, num_restarts: int, num_steps: int) -> tuple[Any, Any, Any, float]:
    """The compiled steps, keys, states, and the seconds it took to trace and compile."""
    keys = jax.random.split(jax.random.key(3), num_restarts)
    states = jax.jit(jax.vmap(lambda key: built.attack.init(key, built.observation)))(keys)
    began = time.perf_counter()
    compiled = jax.jit(stepper(built.attack, num_restarts, num_steps)).lower(keys, states, built.observation).compile()
    return compiled, keys, states, time.perf_counter() - began


def matrix_rate() -> float:
    """GFLOP/s of XLA's matrix product, float32, 2048 x 2048, the best of five."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = np.inf
    for _ in range(5):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best / 1e9


def steps(args: argparse.Namespace) -> None:
    """A/B/A/B against the peer."""
    from peer import Peer

    rows = []
    for model, batch_size, num_restarts, floor in (case for case in CASES if case[0] in args.models):
        peer = Peer(model, batch_size, THREADS)
        built = case(model, batch_size, peer=peer)
        peer_block, own_block = (100, 400 // num_restarts) if model == "lenet" else (8, 8)
        compiled, keys, states, _ = prepare(built, num_restarts, own_block)
        compiled(keys, states, built.observation)
        theirs, ours, rates = [], [], []
        for _ in range(args.rounds):
            theirs += peer.step_times(peer_block)
            time.sleep(1)  # for the peer's threads to end their spinning
            # Until as many steps as the peer's were timed.
            for _ in range(max(1, peer_block // own_block)):
                began = time.perf_counter()
                jax.block_until_ready(compiled(keys, states, built.observation))
                ours.append((time.perf_counter() - began) / own_block / num_restarts)
            rates.append(matrix_rate())
        own, other, rate = np.median(ours), np.median(theirs), np.median(rates)
        achieved = 8 * built.forward_flops / own / 1e9
        rows.append(
            {
                "model": model,
                "batch": str(batch_size),
                "restarts": str(num_restarts),
                "breaching ms": f"{1e3 * other:.2f}",
                "gia_jax ms a restart": f"{1e3 * own:.3f}",
                "ratio": f"{other / own:.2f}",
                "floor": f"{floor:g}",
                "peer steps": str(len(theirs)),
                "own blocks": f"{len(ours)} of {own_block}",
                "GFLOP/s": f"{achieved:.0f}",
                "of matrix product": f"{achieved / rate:.0%}",
                "matrix product GFLOP/s": f"{rate:.0f}",
            }
        )
        print(rows[-1], flush=True)
    torch_version = peer.torch.__version__
    record.write(
        "steps",
        "A step of Inverting Gradients (cosine + total variation, box, signed Adam), interleaved with breaching 0.1.2",
        rows,
        f"Medians; {THREADS} threads each, one process, {args.rounds} rounds A/B, evaluation-mode batch normalisation, "
        "the same weights and the same gradient (checked to 1e-4). The peer runs restarts one after the other, so a "
        "restart costs it what one costs. GFLOP/s count a step as 8 forward passes, whatever was computed.",
        breaching="0.1.2",
        torch=torch_version,
    )


def lanes(args: argparse.Namespace) -> None:
    """Time a restart as the number of restarts grows."""
    built, num_steps, times, rows = case("lenet", 1), 100, {}, []
    counts = (1, 8, 64, 512)
    compiled = {}
    for count in counts:

        def attack_all(key: jax.Array, observation: Observation, count: int = count) -> Any:
            one = functools.partial(_reconstruct, built.attack, num_steps)
            return restarts(one, count)(key, observation)

        compiled[count] = jax.jit(attack_all).lower(jax.random.key(0), built.observation).compile()
        compiled[count](jax.random.key(0), built.observation)
        times[count] = []
    for _ in range(args.rounds):
        for count in counts:
            for _ in range(max(1, 16 // count)):
                began = time.perf_counter()
                jax.block_until_ready(compiled[count](jax.random.key(0), built.observation))
                times[count].append(1e3 * (time.perf_counter() - began) / num_steps / count)
    best = min(np.median(times[count]) for count in counts)
    for count in counts:
        value = np.median(times[count])
        rows.append(
            {"restarts": str(count), "ms a step a restart": f"{value:.3f}", "to the best": f"{value / best:.2f}"}
        )
    record.write(
        "lanes",
        "LeNet, Inverting Gradients: cost of a restart in `restarts(..., batch_size=16)`",
        rows,
        f"Medians of {args.rounds} interleaved rounds of {num_steps} steps.",
    )


def _reconstruct(attack: Attack, num_steps: int, key: jax.Array, observation: Observation) -> Any:
    return run(attack, key, observation, num_steps=num_steps)[0]


def compile_and_memory(args: argparse.Namespace) -> None:
    """Compile time of fresh processes with empty caches; temporaries by XLA's own count; peak resident memory."""
    rows = []
    usual, other = ("matmul", "native") if lowers_to_matmul("auto") else ("native", "matmul")
    measured = [(model, 1, usual) for model in (*MODELS, *OWN)] + [("resnet18", 8, usual), ("resnet18", 8, other)]
    for model, batch_size, lowering in measured:
        if model in args.models:
            rows.append(_in_new_process("one", model, str(batch_size), lowering))
            print(rows[-1], flush=True)
    if importlib.util.find_spec("breaching") is None:
        print("breaching is not installed: its memory is left out")
    elif "resnet18" in args.models:
        rows += [_in_new_process("peer", "resnet18", batch_size, "-") for batch_size in ("1", "8")]
    record.write(
        "compile_and_memory",
        "Compile seconds, memory and second victims of an Inverting Gradients step, each in a process of its own",
        rows,
        "Compile: trace, lowering and XLA's compile of 8 scanned steps, no cache. A step: of the second run of the "
        "eight, and its share of the matrix product's rate, where a step counts as 8 forward passes. Second victim: "
        "first call of the compiled program on another observation, seconds beyond the call before it. RSS: peak of "
        "the process, libraries and compiler included; the peak on the device is the GPU's own count. Rows "
        "`breaching`: 8 steps of the peer. ResNet-20 is trained (CIFAR-10); ResNet-18 with the stem of ImageNet, "
        "EfficientNet-Lite0 and a ViT of 196 patches, width 192 and 4 blocks are untrained, on images of 224 pixels.",
    )


def _in_new_process(*arguments: str) -> dict[str, str]:
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, __file__, "--child", *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return dict(pair.split("=", 1) for pair in printed.strip().splitlines()[-1].split("|"))


def child(kind: str, model: str, batch_size: str, lowering: Any) -> None:
    columns = {"model": model, "batch": batch_size, "convolutions": lowering}
    if kind == "peer":
        from peer import Peer

        columns["convolutions"] = "breaching"
        peer = Peer(model, int(batch_size), THREADS)
        seconds = peer.step_times(8)
        columns |= {"compile s": "-", "ms a step": f"{1e3 * np.median(seconds):.0f}"}
        columns |= dict.fromkeys(("of matrix product", "temporaries MB", "arguments MB", "second victim s"), "-")
        columns["on the device MB"] = peer.device_memory()
    else:
        built = case(model, int(batch_size), lowering)
        compiled, keys, states, seconds = prepare(built, 1, 8)
        memory = compiled.memory_analysis()
        other = built.observation._replace(update=jax.tree.map(lambda leaf: -leaf, built.observation.update))
        spent = []
        for observation in (built.observation, built.observation, other):
            began = time.perf_counter()
            jax.block_until_ready(compiled(keys, states, observation))
            spent.append(time.perf_counter() - began)
        columns |= {
            "compile s": f"{seconds:.1f}",
            "ms a step": f"{1e3 * spent[1] / 8:.1f}",
            "of matrix product": f"{8 * 8 * built.forward_flops / spent[1] / 1e9 / matrix_rate():.0%}",
            "temporaries MB": f"{memory.temp_size_in_bytes / 1e6:.0f}",
            "arguments MB": f"{memory.argument_size_in_bytes / 1e6:.0f}",
            "second victim s": f"{spent[2] - spent[1]:+.2f}",
        }
        used = jax.local_devices()[0].memory_stats()
        columns["on the device MB"] = f"{used['peak_bytes_in_use'] / 1e6:.0f}" if used else "-"
    # Linux counts what this process was forked from into `getrusage`, but not into this.
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    columns["peak RSS MB"] = f"{int(kilobytes) / 1e3:.0f}"
    print("|".join(f"{key}={value}" for key, value in columns.items()))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="A/B rounds")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *OWN], default=[*MODELS, *OWN])
    run_parts(parser, steps, lanes, compile_and_memory)


if __name__ == "__main__":
    main()
