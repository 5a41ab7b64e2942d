"""Gradients of PyTorch models with their own names and layouts: read by `gia_jax.interop`, reproduced, and attacked.

    python benchmarks/strangers.py [FOLDER]

Seven clients compute one gradient each of photographs in PyTorch on a CPU, from modules as a stranger would write them.
The state dict and the gradient are saved as `.safetensors`, the batch as `.npz`. JAX reads them, computes the gradient
of the same batch (the table `table`), and attacks the gradient without the batch, in code and by the command line's
`main` (the table `attacks`). PyTorch and the extras `demo` and `interop` are needed, and about 16 minutes of CPU time.
"""

import argparse
import contextlib
import functools
import io
import json
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
from flax import nnx

from gia_jax import (
    Batch,
    ThreatModel,
    attacks,
    clients,
    data,
    interop,
    labels,
    metrics,
    models,
    observed,
    solve,
)
from gia_jax.base import ClientFn, ReconstructFn
from gia_jax.cli import main as command_line
from gia_jax.models.functional import ApplyFn, BatchNormMode

CLASSES = 10
TOLERANCE = 1e-5  # relative error of a gradient that counts as reproduced
HEAD = labels.dense("head")
photos_of = functools.cache(lambda side: data.photos(size=side))  # of 32 pixels it takes seconds
THREAT = ThreatModel().describe()  # of an observation with the shape of the batch and without labels


class Case(NamedTuple):
    """A model in both libraries, the batch of its client, and the attack on it.

    Attributes:
        title: What it is, for the table.
        network: Name of the function of `torch_networks` that makes the module of PyTorch.
        model: Key of `models.MODELS`, the name of the model of JAX.
        attack: Name of the attack on the command line.
        steps: Number of its steps; 0 for an analytic attack.
        side: Height and width of the images, in pixels.
        batch_size: Number of images.
        batch_norm: Mode of batch normalisation.
        flatten: Shapes that `interop` cannot find by itself, by the layer that takes them; "auto" for none.
    """

    title: str
    network: str
    model: str
    attack: str
    steps: int = 0
    side: int = 32
    batch_size: int = 1
    batch_norm: BatchNormMode = "evaluation"
    flatten: Any = "auto"


class Row(NamedTuple):
    """How well the gradient of a case is reproduced.

    Attributes:
        parameters: Number of parameters.
        error: L2 norm of the difference over that of PyTorch's gradient.
        worst_error: The largest error of one tensor, over that tensor's norm.
        worst: Name of that tensor.
    """

    parameters: int
    error: float
    worst_error: float
    worst: str


class Found(NamedTuple):
    """What an attack found.

    Attributes:
        share: Share of the gradient that the reconstruction explains, in [0, 1].
        psnr: Mean PSNR of the images, in dB.
        right: Share of the labels that are right, in [0, 1].
        seconds: CPU time of reading, compiling and attacking, in seconds.
    """

    share: float
    psnr: float
    right: float
    seconds: float


CASES = {
    "linear": Case("linear", "linear", "linear", "linear", flatten={"head": (3, 32, 32)}),
    "lenet": Case("LeNet, sigmoid", "lenet", "lenet", "inverting_gradients", 400),
    "cnn6": Case("CNN6", "cnn6", "cnn6", "r_gap"),
    "convnet": Case("ConvNet, evaluation BN", "convnet", "convnet", "inverting_gradients", 50),
    "lenet_body": Case("LeNet in two parts", "lenet_body", "lenet", "inverting_gradients", 400, batch_size=4),
    "resnet18_evaluation": Case("ResNet-18, evaluation BN", "resnet18", "resnet18", "inverting_gradients", 50, side=16),
    "resnet18_training": Case(
        "ResNet-18, training BN",
        "resnet18",
        "resnet18",
        "inverting_gradients",
        50,
        side=16,
        batch_size=4,
        batch_norm="training",
    ),
}


def export(name: str, case: Case, folder: Path, suffix: str = ".safetensors", seed: int = 0) -> None:
    """The half in PyTorch: writes the state dict, the gradient and the batch of a case into a folder.

    Args:
        name: First part of the files' names.
        case: The case.
        folder: Folder that exists.
        suffix: Format of the tensors.
        seed: Seed of the weights.
    """
    import torch
    import torch_networks

    torch.manual_seed(seed)
    module = getattr(torch_networks, case.network)(case.side)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # no constants, which would hide a mistake
            for tensor in (layer.weight, layer.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (layer.bias, layer.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)
    module.train(case.batch_norm == "training")
    photos = photos_of(case.side)
    images = torch.tensor(photos.normalize(photos.images[: case.batch_size])).permute(0, 3, 1, 2)
    classes = torch.tensor(photos.labels[: case.batch_size], dtype=torch.int64)
    state = {key: value.clone() for key, value in module.state_dict().items()}  # before training moves the statistics
    torch.nn.functional.cross_entropy(module(images), classes).backward()
    gradient = {key: parameter.grad for key, parameter in module.named_parameters()}
    interop.save_tensors(folder / f"{name}_state{suffix}", state)
    interop.save_tensors(folder / f"{name}_gradient{suffix}", gradient)
    interop.save_tensors(folder / f"{name}_truth.npz", {"inputs": images.permute(0, 2, 3, 1), "labels": classes})


def load(name: str, case: Case, folder: Path, suffix: str = ".safetensors") -> tuple[ApplyFn, Any, Any]:
    """What it takes to read a stranger's model and gradient: the forward pass, the parameters and the update."""
    module = models.MODELS[case.model]((case.side, case.side, 3), CLASSES, rngs=nnx.Rngs(0))
    module = interop.load_torch(module, interop.load_tensors(folder / f"{name}_state{suffix}"), flatten=case.flatten)
    apply_fn, params = models.functional(module, batch_norm=case.batch_norm)
    gradient = interop.load_tensors(folder / f"{name}_gradient{suffix}")
    return apply_fn, params, interop.from_torch(gradient, params, flatten=case.flatten)


def true_batch(name: str, folder: Path) -> Batch:
    """The client's batch, for the scores."""
    truth = interop.load_tensors(folder / f"{name}_truth.npz")
    return Batch(jnp.asarray(truth["inputs"]), jnp.asarray(truth["labels"], jnp.int32))


def reproduce(name: str, case: Case, folder: Path, suffix: str = ".safetensors") -> Row:
    """The half in JAX: reads what `export` wrote, and computes the gradient of the batch anew.

    Args:
        name: First part of the files' names.
        case: The case.
        folder: Folder with the files.
        suffix: Format of the tensors.

    Returns:
        How far the two gradients are apart.
    """
    apply_fn, params, update = load(name, case, folder, suffix)
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    found, update = jax.tree.map(np.asarray, (client_fn(params, true_batch(name, folder)), update))
    differences = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), found, update)
    path, worst = max(jax.tree.leaves_with_path(differences), key=lambda item: item[1])
    error, norm = (
        np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (jax.tree.map(np.subtract, found, update), update)
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Row(size, float(error / norm), worst, jax.tree_util.keystr(path, simple=True, separator="."))


def attacker(case: Case, client_fn: ClientFn, apply_fn: ApplyFn, bounds: tuple[Any, Any]) -> ReconstructFn:
    """The attack of a case, as one builds it in code."""
    one_label = case.batch_size == 1 and case.attack != "linear"  # iDLG's rule needs features of at least 0
    label_fn = labels.idlg(HEAD) if one_label else labels.bias_counts(HEAD, apply_fn=apply_fn)
    if case.attack == "linear":
        return attacks.linear_inversion(HEAD, label_fn=label_fn)
    if case.attack == "r_gap":
        return attacks.r_gap(models.cnn6(CLASSES, bias=True), bounds=bounds)
    return solve(attacks.inverting_gradients(client_fn, bounds=bounds, num_steps=case.steps, label_fn=label_fn))


def in_code(name: str, case: Case, folder: Path) -> Found:
    """Attacks the gradient of a case in code, seed 0, and scores what is found."""
    began, photos = time.process_time(), photos_of(case.side)
    with jax.enable_x64(case.attack == "r_gap"):
        apply_fn, params, update = load(name, case, folder)
        if case.attack == "r_gap":
            params, update = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, update))
        like = jax.ShapeDtypeStruct((case.batch_size, case.side, case.side, 3), jnp.result_type(float))
        seen = observed(params, update, inputs_like=like, apply_fn=apply_fn)
        client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        found = jax.jit(attacker(case, client_fn, apply_fn, photos.bounds()))(jax.random.key(0), seen)
        share = float(jax.jit(lambda seen, batch: metrics.explained(client_fn, seen, batch).share)(seen, found.batch))
        seconds = time.process_time() - began

        truth = true_batch(name, folder)
        scores = metrics.image_scores(*(photos.denormalize(np.asarray(batch.inputs)) for batch in (found.batch, truth)))
        right = np.mean(np.sort(found.batch.labels) == np.sort(truth.labels))
        return Found(share, float(scores.psnr.mean()), float(right), seconds)


def arguments(name: str, case: Case, folder: Path) -> list[str]:
    """The command that attacks the files of a case."""
    photos = photos_of(case.side)
    mean, std = (",".join(map(str, values)) for values in (photos.mean, photos.std))
    options = ["--attack", case.attack, "--model", case.model, "--input-shape", f"{case.side},{case.side},3"]
    options += ["--batch-size", str(case.batch_size), "--mean", mean, "--std", std]
    options += ["--steps", str(case.steps)] if case.steps else []
    options += ["--batch-norm", case.batch_norm] if case.batch_norm != "evaluation" else []
    options += ["--no-prior-only"]
    files = {
        "params": f"{name}_state.safetensors",
        "update": f"{name}_gradient.safetensors",
        "truth": f"{name}_truth.npz",
    }
    for option, file in files.items():
        options += [f"--{option}", str(folder / file)]
    return ["attack", *options, "--out", str(folder / name)]


def by_command(name: str, case: Case, folder: Path) -> Found:
    """Attacks the gradient of a case by the command line, whose `results.json` has the scores."""
    began, before, printed = time.process_time(), jax.config.jax_enable_x64, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = command_line(arguments(name, case, folder))
    finally:
        jax.config.update("jax_enable_x64", before)
    if status:
        raise SystemExit(f"{shlex.join(arguments(name, case, folder))} failed:\n{printed.getvalue()}")
    (victim,) = json.loads((folder / name / "results.json").read_text())["victims"]
    seconds = time.process_time() - began
    return Found(victim["explained"]["share"], victim["psnr"], victim["label_correct"], seconds)


def write_reproduced(rows: dict[str, Row], version: str) -> None:
    """Writes the table of gradients that are computed anew."""
    record.write(
        "table",
        "Gradients exported from PyTorch, reproduced in JAX, float32",
        [
            {
                "model": CASES[name].title,
                "batch": CASES[name].batch_size,
                "parameters": row.parameters,
                "relative error": f"{row.error:.1e}",
                "of the worst tensor": f"{row.worst_error:.1e}",
                "worst tensor": row.worst,
                "reproduced": "yes" if row.error <= TOLERANCE else "NO",
            }
            for name, row in rows.items()
        ],
        "Relative error: L2 norm of the difference over that of PyTorch's gradient, of the whole gradient and of the "
        f"tensor where it is largest; reproduced: the former is at most {TOLERANCE:g}. BN: batch normalisation, "
        "evaluation or training mode. Random weights, seed 0, and photographs. No attack: the batch is known.",
        torch=version,
    )


def grey(case: Case) -> float:
    """The mean PSNR in dB of grey images in place of a client's own."""
    truth = photos_of(case.side).images[: case.batch_size]
    return float(metrics.image_scores(np.full_like(truth, 0.5), truth).psnr.mean())


def write_attacked(found: dict[str, tuple[Found, Found]], version: str) -> None:
    """Writes the table of attacks, a pair for every case: in code, and by the command line."""

    def cells(name: str) -> dict[str, Any]:
        case, (code, command) = CASES[name], found[name]
        return {
            "model": case.title,
            "images": f"{case.batch_size} of {case.side}x{case.side}",
            "attack": case.attack + (f", {case.steps:,} steps" if case.steps else ""),
            "explained, code": f"{code.share:.4f}",
            "explained, command": f"{command.share:.4f}",
            "PSNR, code": f"{code.psnr:.1f}",
            "PSNR, command": f"{command.psnr:.1f}",
            "PSNR, grey": f"{grey(case):.1f}",
            "labels right, code": f"{code.right:.0%}",
            "labels right, command": f"{command.right:.0%}",
            "CPU s, code": f"{code.seconds:.0f}",
            "CPU s, command": f"{command.seconds:.0f}",
        }

    shown = " ".join(arguments("lenet", CASES["lenet"], Path("FOLDER")))
    record.write(
        "attacks",
        "Gradients exported from PyTorch, attacked in code and by the command line",
        [cells(name) for name in found],
        "Explained: share of the gradient that the reconstruction explains at its best scale, which needs no "
        "truth. PSNR in dB, mean over the batch; grey: of images of 0.5. CPU seconds of all cores: reading the "
        "files, compiling and attacking. The two start from other random images. BN: batch normalisation. First "
        "weights of PyTorch, of the LeNets those of DLG, U(-0.5, 0.5), seed 0; photographs; attack seed 0, 1 "
        "start.\n\n"
        "The steps, and the small images of ResNet-18, are what fits into minutes, not what the attacks need. "
        "Of ConvNet and ResNet-18 in evaluation mode 50 steps explain most of the gradient and leave the images "
        "about as bad as grey; in training mode they explain hardly any of it, and the images are worse than "
        "grey. For these three the table says that both ways run, and nothing of what the networks give away.\n\n"
        f"Threat model: {THREAT}, and the range of pixels.\n\n"
        f"The command for LeNet: `python -m gia_jax {shown}`. The others differ in `--attack`, `--model`, `--steps`, "
        "`--input-shape` and `--batch-size`; only training-mode BN needs another option, `--batch-norm training`.",
        torch=version,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the files are kept; by default they are not")
    rows, found = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = parser.parse_args().folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, case in CASES.items():
            export(name, case, folder)
            rows[name] = reproduce(name, case, folder)
            found[name] = in_code(name, case, folder), by_command(name, case, folder)
            print(f"{case.title}: {rows[name].error:.1e}, {found[name]}", flush=True)
    import torch

    write_reproduced(rows, torch.__version__)
    write_attacked(found, torch.__version__)
    if failed := [name for name, row in rows.items() if not row.error <= TOLERANCE]:
        raise SystemExit(f"not reproduced: {', '.join(failed)}")


if __name__ == "__main__":
    main()
