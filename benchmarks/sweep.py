"""Sweeps: what settings cost in one program, 10,000 lanes in a store, and runs that are killed.

    python benchmarks/sweep.py [PART ...] [--rounds N] [--victims N] [--kills N]

Needs the extra `sweep`. Inverting Gradients on an untrained LeNet attacks random images of 32x32 pixels.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from flax import nnx
from parts import run_parts

from gia_jax import Attack, Batch, Observation, ThreatModel, attacks, clients, models, observe
from gia_jax.sweep import grid, open_sweep, stored_sweep, study, sweep
from gia_jax.sweep.store import Place, Progress, RunState

APPLY, PARAMS = models.functional(models.LeNet((32, 32, 3), 10, rngs=nnx.Rngs(0)))
CLIENT = clients.federated_sgd(clients.cross_entropy(APPLY))
THREAT = ThreatModel(labels=True)


def victims(number: int) -> Observation:
    """Observes clients of one random image each."""

    def of_one(key: jax.Array) -> Observation:
        batch = Batch(jax.random.normal(key, (1, 32, 32, 3)), jnp.array([3]))
        return observe(key, THREAT, CLIENT, PARAMS, batch)

    seen = jax.jit(jax.vmap(of_one))(jax.random.split(jax.random.key(0), number))
    return seen._replace(params=PARAMS)


def attack(weight: Any, num_steps: int) -> Attack:
    """Builds the attack with a weight of the total variation."""
    return attacks.inverting_gradients(CLIENT, bounds=(-2.0, 2.0), num_steps=num_steps, total_variation_weight=weight)


def program(args: argparse.Namespace) -> None:
    """Times 8 settings x 8 victims x 4 restarts beside one setting x 8 victims x 32 restarts, in turns."""
    seen, key, steps = victims(8), jax.random.key(1), 40
    settings = grid(weight=np.geomspace(1e-4, 1e-1, 8).tolist())
    runs = {
        "8 settings x 8 victims x 4 restarts": lambda: sweep(
            lambda setting: attack(setting["weight"], steps), settings, key, seen, num_restarts=4
        ),
        "1 setting x 8 victims x 32 restarts": lambda: study(attack(1e-2, steps), key, seen, num_restarts=32),
    }
    timings = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            timings[name].append(run().timing)
    several, one = ([timing.run_seconds for timing in timings[name]] for name in runs)
    rows = [
        {
            "run": name,
            "lanes": 256,
            "ms a step and lane": f"{np.median([1e3 * t.run_seconds / (256 * steps) for t in timings[name]]):.3f}",
            "compile s": f"{np.median([t.compile_seconds for t in timings[name]]):.1f}",
        }
        for name in runs
    ]
    ratio = np.asarray(several) / np.asarray(one)
    record.write(
        "program",
        "Settings in one program",
        rows,
        f"{args.rounds} rounds in turns, {steps} steps, 16 lanes side by side, float32. Ratio of the run times of both "
        f"rows by round: {', '.join(f'{value:.2f}' for value in ratio)}; median {np.median(ratio):.2f}.",
    )


def big(args: argparse.Namespace) -> None:
    """Runs 10 settings x victims x 10 restarts into a store, which another thread reads meanwhile."""
    steps, seen, key = 200, victims(args.victims), jax.random.key(1)
    settings = grid(weight=np.geomspace(1e-4, 1e-1, 10).tolist())
    small = jax.tree.map(lambda leaf: leaf[:8], (seen.update, seen.extra))
    few = Observation(PARAMS, *small)

    def of_few() -> float:
        found = study(attack(1e-2, steps), key, few, num_restarts=8)
        return 1e3 * found.timing.run_seconds / 64

    before, reads, is_over = of_few(), [], threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"

        def read() -> None:
            while not is_over.wait(20):
                began = time.perf_counter()
                if done := lanes_done(store):
                    reads.append((done, time.perf_counter() - began))

        reader = threading.Thread(target=read)
        reader.start()
        began = time.perf_counter()
        found = stored_sweep(
            store, lambda setting: attack(setting["weight"], steps), settings, key, seen, num_restarts=10
        )
        seconds = time.perf_counter() - began
        is_over.set()
        reader.join()
        assert found.done.all()
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    after, total = of_few(), 100 * args.victims
    each = 1e3 * seconds / total
    record.write(
        "big",
        f"{total} lanes in a store",
        [
            {
                "lanes": total,
                "steps": steps,
                "minutes": f"{seconds / 60:.1f}",
                "ms a lane": f"{each:.0f}",
                "ms a lane, of 64 lanes before and after": f"{before:.0f}, {after:.0f}",
                "ratio to their mean": f"{each / np.mean([before, after]):.2f}",
                "peak memory GB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}",
                "store MB": f"{size / 2**20:.0f}",
                "reads meanwhile": len(reads),
                "longest read s": f"{max((one for _, one in reads), default=0.0):.1f}",
            }
        ],
        "10 settings, 10 restarts, 16 lanes side by side, float32. The time is that of the whole call, with compiling. "
        "Peak memory is the process's, with JAX itself and with what reads the store meanwhile.",
    )


def state(args: argparse.Namespace) -> None:
    """Times how the state of 16 lanes is written and read, as one file and by orbax-checkpoint."""
    import orbax.checkpoint

    seen, made = victims(16), attack(1e-2, 40)
    keys = jax.random.split(jax.random.key(1), 16)
    one = jax.jit(jax.vmap(made.init, (0, Observation(None, 0, 0))))(keys, seen)
    like, checkpointer = jax.eval_shape(lambda: one), orbax.checkpoint.PyTreeCheckpointer()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        saved = RunState(Path(folder) / "file", "0" * 64)
        progress = Progress(Place(step=1), [], [np.zeros((16, 1))], one)
        ways = {
            "one file": (lambda i: saved.save(progress), lambda i: saved.load([like], None, Place(16, 1, 40))),
            "orbax-checkpoint": (
                lambda i: checkpointer.save(f"{folder}/orbax/{i}", one),
                lambda i: checkpointer.restore(f"{folder}/orbax/{i}"),
            ),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for i in range(4 * args.rounds):
            for name, (write, read) in ways.items():
                began = time.perf_counter()
                write(i)
                written = time.perf_counter()
                read(i)
                seconds[name].append((written - began, time.perf_counter() - written))
        files = {
            "one file": 1,
            "orbax-checkpoint": sum(path.is_file() for path in Path(f"{folder}/orbax/0").rglob("*")),
        }
        for name, times in seconds.items():
            writing, reading = 1e3 * np.median(times, 0)
            rows.append(
                {"how": name, "ms to write": f"{writing:.0f}", "ms to read": f"{reading:.0f}", "files": files[name]}
            )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(one)) / 2**20
    record.write(
        "state",
        "The state of a batch of lanes on disk",
        rows,
        f"Medians of {4 * args.rounds} saves in turns, of the first state of 16 lanes, {size:.1f} MB. The file is "
        "flushed to the disk, has a checksum and replaces the one before as a whole.",
    )


CHILD = """
import sys
sys.path.insert(0, {folder!r})
import jax
jax.config.update("jax_compilation_cache_dir", {cache!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
import sweep
from gia_jax.sweep import grid, stored_sweep
make = lambda setting: sweep.attack(setting["weight"], 30)
print("ready", flush=True)
stored_sweep({store!r}, make, grid(weight=[1e-3, 1e-2]), jax.random.key(1), sweep.victims(4), num_restarts=4, lanes=4,
    checkpoint_seconds=0.0)
"""


def lanes_done(store: Path) -> int:
    """Counts the lanes that are done in a store, of which there may be nothing yet."""
    try:
        return int(open_sweep(store).done.sum())
    except ValueError:
        return 0


def kills(args: argparse.Namespace) -> None:
    """Kills a process at random moments, runs it again to the end, and compares bits and files."""
    draw, outcomes = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:

        def child(store: Path) -> subprocess.Popen:
            script = CHILD.format(folder=str(Path(__file__).parent), cache=f"{folder}/cache", store=str(store))
            return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)

        whole = Path(folder) / "whole"
        for _ in range(2):  # the second time the programs come from the cache
            shutil.rmtree(whole, ignore_errors=True)
            running = child(whole)
            assert running.stdout is not None
            running.stdout.readline()
            began = time.perf_counter()
            assert running.wait() == 0
            length = time.perf_counter() - began
        expected = open_sweep(whole)
        names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*"))
        for number in range(args.kills):
            store = Path(folder) / str(number)
            running = child(store)
            assert running.stdout is not None
            running.stdout.readline()
            time.sleep(draw.uniform(0, length))
            os.kill(running.pid, signal.SIGKILL)
            killed = running.wait() == -signal.SIGKILL
            done = lanes_done(store)
            assert child(store).wait() == 0
            found = open_sweep(store)
            equal = all(np.array_equal(found[name], expected[name], equal_nan=True) for name in expected.variables)
            same_files = names == sorted(str(path.relative_to(store)) for path in store.rglob("*"))
            outcomes.append({"killed": killed, "lanes done": done, "equal": equal, "same files": same_files})
            print(outcomes[-1], flush=True)
            shutil.rmtree(store)
    killed = [one for one in outcomes if one["killed"]]
    record.write(
        "kills",
        "Sweeps that were killed",
        [
            {
                "kills": len(killed),
                "of these with some lanes done, and some not": sum(0 < one["lanes done"] < 32 for one in killed),
                "equal bit for bit": sum(one["equal"] for one in killed),
                "no other files": sum(one["same files"] for one in killed),
            }
        ],
        "kill -9 at moments drawn uniformly over the run, 2 settings x 4 victims x 4 restarts, 30 steps, the state of "
        "the batch under way saved after every call; then the same call again, to the end.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--victims", type=int, default=100, help="of the big sweep, each with 100 lanes")
    parser.add_argument("--kills", type=int, default=50)
    run_parts(parser, program, big, kills, state)


if __name__ == "__main__":
    main()
