"""An update that was recorded, from files to a setting that is attacked as a simulated one is. No client is run."""

import argparse
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

import gia_jax
from gia_jax import clients, interop, modalities, models, report
from gia_jax.base import Batch, LossFn, Observation, Params
from gia_jax.cli import console
from gia_jax.cli.files import Model, function_model, registered_model
from gia_jax.cli.names import TOKEN_LAYERS, Target
from gia_jax.cli.pixels import generator_of
from gia_jax.cli.settings import Known, Setting, Victims
from gia_jax.data import ImageData
from gia_jax.defenses.protected import Part, protect
from gia_jax.labels import ClassifierFn
from gia_jax.modalities import Modality
from gia_jax.threat import ThreatModel, observed, stack

ARGUMENTS = {"inputs_like": "--input-shape", "apply_fn": "the model", "batch.labels": "the labels of --truth"}
PIXEL_TOLERANCE = 1e-3  # by which rounding may take the true pixels out of [0, 1]


def observe_recorded(args: argparse.Namespace, parts: tuple[Part, ...]) -> Setting:
    """Reads the files of a recorded update, and prints a line on them.

    Args:
        args: Options of the command line, checked.
        parts: Defenses that the attacker knows of.

    Returns:
        The setting, with one victim.

    Raises:
        ValueError: If a file does not hold what it is said to hold, or the model does not take it.
        ImportError: If a file needs a package that is not installed.
    """
    dtype = jnp.result_type(float)
    made = function_model(args) if ":" in args.model else registered_model(args)
    params, update = _cast(made.params, dtype), _cast(made.update, dtype)
    like = jax.ShapeDtypeStruct((args.batch_size, *args.input_shape), dtype)
    truth = _read_truth(args, dtype)
    num_classes = _num_classes(args, made, params, like)
    granted = truth["labels"] if args.labels == "known" else None
    with _naming_options(args.update):
        seen = observed(
            params, update, inputs_like=like, apply_fn=made.apply_fn, labels=granted, num_classes=num_classes
        )
    modality, images = _modality(args, dtype)
    _check_pixels(args, truth.get("inputs"))
    make_client = _make_client(args)
    client_fn = make_client(clients.cross_entropy(made.apply_fn))
    _check_client(args, client_fn, seen, like)
    target = _target(args, made, modality, images, client_fn, num_classes)
    head = _head(args, made, num_classes)
    known = Known(client_fn, made.apply_fn, head, made.first_layer_fn, made.module, TOKEN_LAYERS.get(args.model))
    modelled = True
    if parts:
        assert made.module is not None
        protected = protect(
            parts, made.module, num_classes=num_classes, batch_norm=args.batch_norm, make_client=make_client
        )
        target = target._replace(client_fn=protected.assumed_fn, adapt_fn=protected.adapt_fn)
        modelled = protected.modelled
    batch = None if "inputs" not in truth else Batch(truth["inputs"][None], truth["labels"][None])
    nothing = Batch(np.zeros((0, *args.input_shape), dtype), ())
    _banner(args, params)
    threat = console.threat(ThreatModel.of(seen), parts, args, modelled=modelled)
    return Setting(
        defense=console.words(parts),
        threat=threat,
        notes=[*made.notes, *_range_notes(args)],
        targets={"": Victims(stack([seen]), target, batch)},
        modality=modality,
        guesses={} if batch is None else modality.guess_fn(batch, nothing),
        known=known,
        key=jax.random.key(args.seed),
    )


@contextmanager
def _naming_options(file: str) -> Generator[None]:
    """Names options in the place of arguments in the errors that are raised while it lasts."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for argument, option in ARGUMENTS.items():
            text = text.replace(argument, option)
        raise ValueError(f"--update {file}: {text}") from None


def _cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Returns the tree with its floating-point leaves in the precision of the run."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.asarray(leaf), tree
    )


def _num_classes(args: argparse.Namespace, made: Model, params: Params, like: jax.ShapeDtypeStruct) -> int:
    """Returns the number of the model's classes, from its logits, or raises ValueError where there are no logits."""
    try:
        outputs: Any = jax.eval_shape(made.apply_fn, params, like)
    except Exception:  # of a user's own function; `observed` says what is wrong
        return args.classes or 1
    if not isinstance(outputs, jax.ShapeDtypeStruct) or len(outputs.shape) != 2 or outputs.shape[0] != like.shape[0]:
        raise ValueError(f"--model {args.model} must return logits of shape ({like.shape[0]}, classes), got {outputs}")
    if args.classes not in (None, outputs.shape[1]):
        raise ValueError(f"--classes must be {outputs.shape[1]}, as the model has logits, got {args.classes}")
    return outputs.shape[1]


def _head(args: argparse.Namespace, made: Model, num_classes: int) -> ClassifierFn | None:
    """Returns what picks the last layer, or None where `--head` leads to none and no label rule reads it."""
    try:
        features = made.classifier_fn(made.params).kernel.shape[-1]
        if features != num_classes:
            raise ValueError(f"--head must lead to the layer of the {num_classes} logits, got one of {features}")
    except ValueError:
        if args.label_rule is None:
            return None
        raise
    return made.classifier_fn


def _make_client(args: argparse.Namespace) -> Callable[[LossFn], Any]:
    """Returns what makes the client that the attacker assumes from its loss."""
    if args.local_steps == 1:
        return clients.federated_sgd

    def averaging(loss_fn: LossFn) -> Any:
        return clients.federated_averaging(
            loss_fn, learning_rate=args.local_learning_rate, local_epochs=args.local_steps
        )

    return averaging


def _check_client(args: argparse.Namespace, client_fn: Any, seen: Observation, like: jax.ShapeDtypeStruct) -> None:
    """Raises ValueError for a model of the user's that has logits, but no gradient."""

    def update_of(params: Params, inputs: Array) -> Any:
        return client_fn(params, Batch(inputs, jnp.zeros(len(inputs), jnp.int32)))

    try:
        jax.eval_shape(update_of, seen.params, like)
    except Exception as error:  # whatever a user's function raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--model {args.model} must be differentiable by its parameters, got {reason}") from None


def _target(
    args: argparse.Namespace,
    made: Model,
    modality: Modality,
    images: ImageData | None,
    client_fn: Any,
    num_classes: int,
) -> Target:
    """Returns what the attacker knows of the victim."""
    bounds = None
    if images is not None:
        bounds = images.bounds() if args.mean is not None else (-math.inf, math.inf)
    target = Target(
        client_fn,
        made.classifier_fn,
        num_classes,
        args.batch_size,
        modality,
        bounds=bounds,
        apply_fn=made.apply_fn,
        gradient_fn=clients.federated_sgd(clients.cross_entropy(made.apply_fn)),
        scale=args.local_steps * args.local_learning_rate,
    )
    if args.statistics == "running":
        module, like = made.module, jnp.zeros((1, *args.input_shape))
        if module is None or not made.has_statistics:
            needed = "a --model by its name and its running statistics in --params"
            raise ValueError(f"--statistics running needs {needed}, got none")
        target = target._replace(
            statistics_fn=models.batch_norm_inputs(module, batch_norm=args.batch_norm),
            known_statistics_fn=lambda seen: models.running_statistics(module, seen.params, like),
        )
    if args.attack == "gias":
        assert images is not None
        file = None if args.generator is None else Path(args.generator)
        key = jax.random.fold_in(jax.random.key(args.seed), 1)
        made_by = generator_of(images, args.input_shape, file, key, num_latent_steps=args.latent_steps)
        args.generator, args.latent_steps = args.generator or "untrained", made_by.num_latent_steps
        target = target._replace(generator=made_by)
    return target


def _read_truth(args: argparse.Namespace, dtype: DTypeLike) -> dict[str, Any]:
    """Returns the true labels and, where the file has them, inputs. Without a file there is nothing."""
    if args.truth is None:
        return {}
    found: dict[str, Any] = dict(interop.load_tensors(args.truth))
    if "labels" not in found or not set(found) <= {"inputs", "labels"}:
        raise ValueError(f"--truth must hold labels, and inputs for scores, got {', '.join(found)}")
    labels = found["labels"]
    if labels.shape[:1] != (args.batch_size,):
        raise ValueError(f"--truth must hold {args.batch_size} labels as --batch-size says, got {labels.shape}")
    found["labels"] = jnp.asarray(labels, dtype if labels.dtype.kind == "f" else jnp.int32)
    if "inputs" in found:
        shape = (args.batch_size, *args.input_shape)
        if found["inputs"].shape != shape:
            raise ValueError(f"--truth must hold inputs of shape {shape}, got {found['inputs'].shape}")
        if found["inputs"].dtype.kind != "f":
            raise ValueError(f"--truth must hold inputs of a floating type, got {found['inputs'].dtype}")
        found["inputs"] = jnp.asarray(found["inputs"], dtype)
    return found


def _modality(args: argparse.Namespace, dtype: DTypeLike) -> tuple[Modality, ImageData | None]:
    """Returns what an example is, by its shape: images (h, w, c), with the numbers that lead to pixels, or arrays."""
    shape, channels = args.input_shape, args.input_shape[-1]
    mean, std = args.mean or (0.0,) * channels, args.std or (1.0,) * channels
    nothing = np.zeros((0, *shape), np.float32)
    images = ImageData("the update", nothing, np.zeros(0, np.int32), (), (), mean, std)
    if len(shape) != 3:
        return modalities.array(shape, bounds=None if args.mean is None else images.bounds(), dtype=dtype), None
    return modalities.image(shape, mean=mean, std=std, in_range=args.mean is not None, dtype=dtype), images


def _check_pixels(args: argparse.Namespace, inputs: Any) -> None:
    """Raises ValueError for true images whose pixels leave [0, 1]."""
    if inputs is None or len(args.input_shape) != 3:
        return
    pixels = np.asarray(inputs) * np.asarray(args.std or 1.0) + np.asarray(args.mean or 0.0)
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE):
        undone = "once --mean and --std are undone" if args.mean else "or come with --mean and --std"
        raise ValueError(f"--truth must hold pixels in [0, 1] {undone}, got {low:.3g} to {high:.3g}")


def _range_notes(args: argparse.Namespace) -> list[str]:
    """Returns lines on what is not known of the inputs."""
    notes = []
    if args.mean is None and len(args.input_shape) == 3:
        notes.append("the range of the pixels is not known: no attack keeps to it; --mean and --std give it")
    shape = args.input_shape
    if len(shape) == 3 and shape[0] in (1, 3) and shape[-1] not in (1, 3):
        notes.append(f"--input-shape {shape} looks like channels first: image priors take the last axis for channels")
    return notes


def _banner(args: argparse.Namespace, params: Params) -> None:
    """Prints a line on the setting."""
    shape = "x".join(map(str, args.input_shape))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"gia_jax {gia_jax.__version__}: {args.model}, {size:,} parameters; the update in {args.update} of "
        f"{args.batch_size} of {shape}; {report.hardware()}"
    )
