"""Reads rows of a report from the folders that the command line wrote: results.json, and results.npz beside it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from gia_jax.modalities.base import Shown
from gia_jax.report.arrays import unpack
from gia_jax.report.page import check_installed
from gia_jax.report.plots import png
from gia_jax.report.rows import ON_RANDOM, Curve, Picture, Row, Score, score
from gia_jax.report.stores import rows_of, stores_in

MAX_LINES = 8  # largest number of victims with a loss curve
COST = {
    "compile_seconds": "compiling, s",
    "run_seconds": "running, s",
    "ms_per_step_per_restart": "a step of a restart, ms",
}
# Formats of the scores in records without the entry "shown".
PLAIN = {"psnr": Shown("PSNR", ".1f", " dB"), "ssim": Shown("SSIM", ".2f")}
LABELS = Shown("labels right", ".0%", average="mean")
EXPLAINED = Shown("update explained", ".0%")
DETAILS = {"loss": Shown("loss", ".3g"), "scale": Shown("scale of the update", ".3g")}


def read(folder: Path) -> list[Row]:
    """Reads the results in a folder and its subfolders.

    Args:
        folder: Path of the folder.

    Returns:
        A row for every attack in every file results.json, results_2.json and so on, ordered by the path of the file,
        followed by a row for every setting of every store of a sweep.

    Raises:
        ValueError: If there is no such folder, there are no results in it, or gia_jax did not write one of its files.
        OSError: If a file cannot be read.
        ImportError: If jinja2 or matplotlib is not installed, or the folder has a store and the extra `sweep` is not
            installed.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from gia_jax.report.runs import read
        >>> record = {"settings": {"attack": "idlg", "model": "lenet"}, "threat_model": "a curious server"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "results.json"
        ...     _ = file.write_text(json.dumps(record | {"victims": [{"psnr": 31.5, "loss": 0.1, "is_finite": True}]}))
        ...     (row,) = read(Path(folder))
        >>> row.title, row.scores["psnr"].value
        ('idlg on lenet', 31.5)
    """
    check_installed()
    if not folder.is_dir():
        raise ValueError(f"folder must be an existing folder, got {str(folder)!r}")
    named = sorted(path for path in folder.rglob("results*.json") if re.fullmatch(r"results(_\d+)?", path.stem))
    stores = stores_in(folder)
    if not named and not stores:
        raise ValueError(f"folder must hold results.json or a store of a sweep, got none in or below {str(folder)!r}")
    rows = [row for path in named for row in _rows(path, str(path.relative_to(folder)))]
    return rows + [row for path in stores for row in rows_of(path, path.name)]


def _rows(path: Path, source: str) -> Iterator[Row]:
    """Reads the rows of a file."""
    content = path.read_bytes()
    try:
        found = json.loads(content)
        if not isinstance(found, Mapping):
            raise ValueError("it holds no object")
        entries = {"": found} if "victims" in found else found
        guesses = {name: entry for name, entry in entries.items() if name.startswith("baselines_")}
        records = {name: entry for name, entry in entries.items() if isinstance(entry, Mapping) and name not in guesses}
        if not records:
            raise ValueError("it holds no attack")
        arrays = unpack(path.with_suffix(".npz"), content)
        any_settings = next(iter(records.values()))["settings"]
        for name, entry in entries.items():
            if name in records:
                yield _row({**guesses, **entry}, name, source, arrays.get(name, {}))
            elif name not in guesses and not isinstance(entry, str):
                raise ValueError(f"its entry {name!r} is no attack")
            elif name not in guesses:
                yield Row(f"{_title(any_settings)}: {name}", source=source, notes=(f"not attacked: {entry}",))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ValueError(f"{path} must be a results.json that gia_jax wrote: {reason}") from None


def _row(record: Mapping[str, Any], name: str, source: str, arrays: Mapping[str, np.ndarray]) -> Row:
    """Makes a row of a record and its arrays."""
    settings, victims = record["settings"], record["victims"]
    finite = [bool(victim["is_finite"]) for victim in victims]
    if not victims:
        raise ValueError("it has no victims")
    shown = {key: one for key, one in _shown(record).items() if key in victims[0]}
    columns = {key: ([float(victim[key]) for victim in victims], one) for key, one in shown.items()}
    if "label_correct" in victims[0]:
        columns["label_correct"] = [float(victim["label_correct"]) for victim in victims], LABELS
    details = {"loss": [float(victim["loss"]) for victim in victims]}
    if "explained" in victims[0]:
        columns["explained"] = [float(victim["explained"]["share"]) for victim in victims], EXPLAINED
        details["scale"] = [float(victim["explained"]["scale"]) for victim in victims]
    scores = {key: score(values, one, finite) for key, (values, one) in columns.items() if not np.all(np.isnan(values))}
    broken = finite.count(False)
    return Row(
        title=_title(settings) + ("" if name.startswith(settings["attack"]) or not name else f": {name}"),
        threat_model=str(record["threat_model"]),
        source=source,
        notes=[f"{broken} of {len(finite)} reconstructions are not finite"] if broken else [],
        scores=scores,
        details={key: Score(DETAILS[key], tuple(values), float(np.median(values))) for key, values in details.items()},
        compared=_compared(record, scores),
        curves=_curves(arrays, victims) + _quality(arrays, victims, record, next(iter(shown.items()), None)),
        examples=_examples(arrays, settings["attack"], victims, next(iter(shown.items()), None)),
        num_examples=sum(np.size(victim.get(f"{next(iter(shown), '')}_per_example", ())) for victim in victims),
        accuracy=None if record.get("accuracy") is None else float(record["accuracy"]),
        cost={words: float(record[key]) for key, words in COST.items() if key in record},
        settings={key.replace("_", " "): _text(value) for key, value in settings.items() if value not in (None, [])},
        versions={key: str(value) for key, value in record.get("versions", {}).items()},
        hardware=str(record.get("hardware", "")),
        command=str(record.get("command", "")),
    )


def _title(settings: Mapping[str, Any]) -> str:
    """Returns the title of a row: the attack, the model, the data and the defense."""
    known = [str(settings[name]) for name in ("model", "data") if settings.get(name)]
    known += ["a recorded update"] if settings.get("update") else []
    defense = settings.get("defense", "none")
    behind = _text(defense) if defense not in ("none", []) else ""
    on = f" on {', '.join(known)}" if known else ""
    return f"{settings['attack']}{on}" + (f", behind {behind}" if behind else "")


def _text(value: Any) -> str:
    """Writes the value of a setting."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_text, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _shown(record: Mapping[str, Any]) -> dict[str, Shown]:
    """Returns how the scores of a record are written, by their names, the first score first."""
    if "shown" not in record:
        return PLAIN
    found = {key: Shown(**one) for key, one in record["shown"].items()}
    for one in found.values():
        if not re.fullmatch(r"[+]?(\.\d)?[efg%]", one.form) or one.average not in ("median", "mean"):
            raise ValueError(f"scores are written in no known form, {one.form!r}, {one.average!r}")
    return found


def _compared(record: Mapping[str, Any], scores: Mapping[str, Score]) -> dict[str, dict[str, Score]]:
    """Returns the scores of random updates and of guesses, by the name of the baseline."""

    def of(prefix: str, values: Mapping[str, Any]) -> dict[str, Score]:
        own = {key: np.asarray(values[prefix + key], float) for key in scores if prefix + key in values}
        return {key: score(one.reshape(len(one), -1).mean(1).tolist(), scores[key].shown) for key, one in own.items()}

    found = {ON_RANDOM: of("prior_only_", record)}
    for key in scores:
        for guess, values in record.get(f"baselines_{key}", {}).items():
            found[f"without an update: {guess}"] = of("", {key: values})
    return {name: own for name, own in found.items() if own}


def _curves(arrays: Mapping[str, np.ndarray], victims: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Returns the losses of the chosen restarts of the first victims."""
    if "losses" not in arrays or len(arrays["losses"]) != len(victims):
        return []
    lines = {}
    for v, victim in enumerate(victims[:MAX_LINES]):
        ends = np.nan_to_num(np.asarray(victim["restart_losses"], float), nan=np.inf)
        chosen = int(ends.argmin()) if len(ends) == len(arrays["losses"][v]) else 0
        lines[f"victim {v + 1}"] = arrays["steps"], arrays["losses"][v, chosen]
    title = f"The attacker's loss over steps, best restart{_some(victims)}"
    return [Curve(title, ("step", "loss"), lines, ("linear", "log"))]


def _quality(
    arrays: Mapping[str, np.ndarray],
    victims: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    first: tuple[str, Shown] | None,
) -> list[Curve]:
    """Returns the first score of the first victims over steps and over seconds, where it is known."""
    name = f"path_{first[0]}" if first is not None else ""
    if first is None or name not in arrays or len(arrays[name]) != len(victims):
        return []
    heading, unit = first[1].heading, f", {first[1].unit.strip()}" if first[1].unit.strip() == "dB" else ""
    steps, scores = arrays["path_steps"], arrays[name][:MAX_LINES]
    # The time of all restarts of a victim, where that of the run is shared equally among all lanes.
    seconds = steps * float(record["ms_per_step_per_restart"]) * len(victims[0]["restart_losses"]) / 1e3
    return [
        Curve(
            f"{heading} over {over}, the best so far by the attacker's loss{_some(victims)}",
            (label, heading + unit),
            {f"victim {v + 1}": (x, own) for v, own in enumerate(scores)},
        )
        for over, x, label in (
            ("steps", steps, "step"),
            (
                "seconds",
                seconds,
                "seconds, one victim's share of the run",
            ),
        )
    ]


def _some(victims: Sequence[Any]) -> str:
    """Returns words for the first victims, where there are more than lines of a plot."""
    return f", first {MAX_LINES} of {len(victims)} victims" if len(victims) > MAX_LINES else ""


def _examples(
    arrays: Mapping[str, np.ndarray],
    attack: str,
    victims: Sequence[Mapping[str, Any]],
    first: tuple[str, Shown] | None,
) -> list[list[Picture]]:
    """Returns the pictures of each example, or one drawing of all of them."""
    if "drawing" in arrays:
        content = arrays["drawing"].tobytes()
        if content.startswith(b"\x89PNG"):
            return [[Picture("originals and reconstructions", png=content)]]
        blocks = content.decode().strip().split("\n\n")
        return [[Picture("", text=block)] for i, block in enumerate(blocks) if i or "\n" in block]  # without a title
    if "reconstruction" not in arrays:
        return []
    captions: list[str] = []
    if first is not None:
        each = [float(value) for victim in victims for value in np.ravel(victim.get(f"{first[0]}_per_example", ()))]
        captions = [first[1].text(value) + first[1].unit for value in each]
    heading = attack + str(arrays.get("note", ""))
    found = []
    for i, caption in zip(range(len(arrays["reconstruction"])), chain(captions, repeat(""))):
        pictures = [Picture("original", png(arrays["original"][i]), is_tile=True)] if "original" in arrays else []
        found.append([*pictures, Picture(heading, png(arrays["reconstruction"][i]), caption=caption, is_tile=True)])
    return found
