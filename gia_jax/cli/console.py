"""What the command line prints, and the files that it writes."""

import argparse
import contextlib
import io
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gia_jax
from gia_jax import ThreatModel, report
from gia_jax._files import write_unclaimed, write_whole
from gia_jax.base import Batch
from gia_jax.cli.cases import Case
from gia_jax.cli.outcomes import Outcome
from gia_jax.defenses.protected import Part, Protected
from gia_jax.modalities import Modality
from gia_jax.report import arrays
from gia_jax.report.plots import MAX_ROWS
from gia_jax.sweep import store

RESULTS, ARRAYS, RECONSTRUCTION = "results.json", "results.npz", "reconstruction.npz"


def write(out: Path, content: Any, outcomes: Iterable[Outcome], since: float) -> Path:
    """Writes results.json to a folder, so that nothing that was computed is lost.

    Args:
        out: Folder of the file.
        content: Content of the file, for `report.to_json`.
        outcomes: Outcomes of the attacks whose states are kept until the results are written.
        since: When the run began, in seconds as `time.time` counts them: a file that another run wrote since is left
            alone, and a number is put behind the name.

    Returns:
        The path of the file.

    Raises:
        OSError: If the file cannot be written. The states are kept, or, where one is missing, the content was printed.
    """
    text = report.to_json(content)
    try:
        path = write_unclaimed(out / RESULTS, text.encode(), since)
    except OSError as error:
        reason = f"{str(out / RESULTS)!r} cannot be written: {error.strerror}"
        states = [outcome.study.checkpoint for outcome in outcomes]
        if None in states:
            print(text)
            raise OSError(f"{reason}; its content was printed instead") from None
        raise OSError(f"{reason}; nothing is lost: the same command writes it without computing again") from None
    print(f"\nwrote {path}")
    return path


def write_arrays(results: Path, rows: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes the curves and pictures of results to results.npz beside results.json, for a report.

    Args:
        results: Path of results.json.
        rows: Arrays by the name of the row, as `seen` returns them.

    Raises:
        OSError: If the file cannot be written.
    """
    path = results.with_suffix(".npz")
    write_whole(path, arrays.pack(results.read_bytes(), rows))
    print(f"wrote {path}")


def seen(modality: Modality, truth: Batch | None, outcome: Outcome, drawing: bytes | None) -> dict[str, np.ndarray]:
    """Returns the curves and pictures of an outcome that a report shows.

    Args:
        modality: What an example is.
        truth: Originals as the model sees them, with a leading axis of victims. None if they are not known.
        outcome: What the attack achieved.
        drawing: Content of a file that shows both, for examples that are not images. None if there is no such file.

    Returns:
        The loss curves, the first score after some steps, such as "path_psnr" after "path_steps", where it is known,
        and the pixels of the first examples, in uint8, or the drawing.
    """
    found = arrays.thinned(outcome.study.losses)
    if outcome.path is not None:
        found |= {"path_steps": outcome.path[0], f"path_{modality.main}": outcome.path[1]}
    if modality.pixels_fn is None:
        return found if drawing is None else found | {"drawing": np.frombuffer(drawing, np.uint8)}
    batch = outcome.study.reconstruction.batch if outcome.scored is None else outcome.scored.batch
    for name, shown in {"original": truth, "reconstruction": batch}.items():
        if shown is not None:
            pixels, note = modality.pixels_fn(shown)
            found[name] = np.round(255 * pixels[:MAX_ROWS].astype(np.float32)).astype(np.uint8)
            found["note"] = np.array(note)
    return found


def command(args: argparse.Namespace) -> str:
    """Returns the command line that repeats the results."""
    return shlex.join(["python", "-m", "gia_jax", *args.argv])


def forget(out: Path, outcomes: Iterable[Outcome]) -> None:
    """Removes the states of runs whose results are written.

    Args:
        out: Folder of the results.
        outcomes: Outcomes of the runs.
    """
    for outcome in outcomes:
        if outcome.study.checkpoint is not None:
            store.forget(outcome.study.checkpoint)
    with contextlib.suppress(OSError):  # there is none, or it keeps the state of another run
        states(out).rmdir()


def states(out: Path) -> Path:
    """Returns the folder of the states of interrupted runs, in the folder of the results."""
    return out / "states"


def write_reconstruction(out: Path, outcome: Outcome, since: float) -> None:
    """Writes the arrays that an attack found, inputs as the model sees them and labels, to `RECONSTRUCTION`.

    Args:
        out: Folder of the file.
        outcome: What the attack achieved, of which the first victim is written.
        since: When the run began, as for `write`.
    """
    batch, content = outcome.study.reconstruction.batch, io.BytesIO()
    np.savez(content, inputs=np.asarray(batch.inputs)[0], labels=np.asarray(batch.labels)[0])
    print(f"wrote {write_unclaimed(out / RECONSTRUCTION, content.getvalue(), since)}")


def picture(
    path: Path, modality: Modality, truth: Batch, outcomes: Mapping[str, Outcome], title: str, since: float
) -> bytes | None:
    """Draws originals beside what attacks made of them, where such examples can be drawn.

    Args:
        path: Path of the picture.
        modality: What an example is.
        truth: Originals in the model's space, with a leading axis of victims.
        outcomes: What attacks achieved, with scores, by their names.
        title: Words above the picture.
        since: When the run began, as for `write`.

    Returns:
        The content of the picture, or None if no picture was drawn.
    """
    shown = modality.shown[modality.main]
    columns, captions = {"original": truth}, {}
    for name, outcome in outcomes.items():
        assert outcome.scored is not None
        columns[name] = outcome.scored.batch
        captions[name] = [shown.text(score) + shown.unit for score in outcome.scores(modality.main).ravel().tolist()]
    return _draw(path, modality, columns, captions, title, since)


def picture_without_truth(
    path: Path, modality: Modality, outcome: Outcome, name: str, title: str, since: float
) -> bytes | None:
    """Draws what an attack made of an update whose examples nobody knows, or says why there is no picture.

    Args:
        path: Path of the picture.
        modality: What an example is.
        outcome: What the attack achieved.
        name: Name of the attack.
        title: Words above the picture.
        since: When the run began, as for `write`.

    Returns:
        The content of the picture, or None if no picture was drawn.
    """
    return _draw(path, modality, {name: outcome.study.reconstruction.batch}, {}, title, since)


def _draw(
    path: Path,
    modality: Modality,
    columns: Mapping[str, Batch],
    captions: Mapping[str, Sequence[str]],
    title: str,
    since: float,
) -> bytes | None:
    """Writes a drawing to a path that no other run has claimed, and returns its content."""
    if modality.draw_fn is None:
        shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(modality.like))
        print(f"no picture: inputs of shape {shapes} are no images (h, w, c) of 1 or 3 channels")
        return None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        drawing = Path(folder) / path.name
        modality.draw_fn(columns, drawing, captions=captions, title=title)
        content = drawing.read_bytes()
    print(f"wrote {write_unclaimed(path, content, since)}")
    return content


def folder(out: Path, names: Iterable[str]) -> Path:
    """Makes a folder to which files can be written.

    Args:
        out: Path of the folder, which may exist.
        names: Names of the files.

    Returns:
        The path.

    Raises:
        OSError: If the folder cannot be made or written, or one of the names is a folder in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"--out must be a folder that can be written, got {str(out)!r}: {error.strerror}") from None
    for name in names:
        if (out / name).is_dir():
            raise OSError(f"--out must have no folder where the file {name!r} is to be, got {str(out)!r}")
    return out


def banner(case: Case, model: str, protected: Protected, clients: int = 1) -> None:
    """Prints a line on clients that are simulated.

    Args:
        case: Victims with their data.
        model: Name of the model.
        protected: Client with its defenses.
        clients: Number of clients whose examples are together in a batch of the case.
    """
    victims, batch_size = case.truth.labels.shape
    groups = f"{victims} clients" if clients == 1 else f"{victims} groups of {clients} clients"
    like = case.modality.like
    shape = ", ".join(
        "x".join(map(str, leaf.shape)) + (f" {name}" if name else "")
        for name, leaf in (like.items() if isinstance(like, dict) else [("", like)])
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(protected.params))
    print(
        f"gia_jax {gia_jax.__version__}: {model}, untrained, {size:,} parameters; "
        f"{groups} with {batch_size // clients} of {case.data.name} ({shape}) each; {report.hardware()}"
    )


def words(parts: Sequence[Part]) -> str:
    """Returns the words for the defenses of a client, "none" without any."""
    return " ".join(map(str, parts)) or "none"


def threat(
    model: ThreatModel, parts: Sequence[Part], args: argparse.Namespace | None = None, *, modelled: bool = True
) -> str:
    """Says what the server is, has and knows.

    Args:
        model: Threat model of the observation.
        parts: Defenses of the client.
        args: Options of the attacker. None for one that knows of no defense and has nothing of its own.
        modelled: Whether an attacker that knows these defenses makes use of it.

    Returns:
        One line.
    """
    adaptive = args is not None and args.adaptive
    said = [model.describe()]
    if parts:
        said.append(f"{'knows' if adaptive else 'does not know'} the defense {words(parts)}")
    if adaptive and not modelled:
        said[-1] += ", but no likelihood for this chain: attacks as if it did not"
    if args is not None and args.statistics == "running":
        said.append("matches running statistics")
    if args is not None and args.attack == "gias":
        trained = "untrained" if args.generator == "untrained" else f"trained: {args.generator}"
        said.append(f"has a generator, {trained}")
    return "; ".join(said)


def warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Prints a warning in one line: it takes the place of `warnings.showwarning`."""
    kind = "warning" if category is UserWarning else category.__name__
    print(f"gia_jax: {kind}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
