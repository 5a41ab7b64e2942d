"""Reads rows of a report from the stores that sweeps wrote, one row for every setting."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gia_jax.modalities.base import Shown
from gia_jax.report.arrays import thinned
from gia_jax.report.plots import png
from gia_jax.report.rows import Curve, Picture, Row, Score, score
from gia_jax.sweep.results import open_sweep
from gia_jax.sweep.scores import best_restart
from gia_jax.sweep.shards import SCORES, inside, open_group, whole

MAX_NUMBERS = 8  # largest number of numbers of one setting that are written out
OWN = ("title", "threat_model", "versions", "hardware", "command", "fingerprint", "compile_seconds", "run_seconds")
COST = {"compile_seconds": "compiling, s", "run_seconds": "running, s"}
LOSS = Shown("loss", ".3g")


def stores_in(folder: Path) -> list[Path]:
    """Returns the stores in a folder and its subfolders, and the folder itself if it is one."""
    return sorted({path.parent.parent for path in folder.rglob("shard-*/zarr.json")})


def rows_of(store: Path, source: str) -> list[Row]:
    """Reads a row for every setting of a sweep.

    Args:
        store: Path of the store.
        source: Source of the rows, such as the name of the store.

    Returns:
        The rows. The title, the threat model and the command are the attributes "title", "threat_model" and "command"
        that `stored_sweep` received. The scores are those that `score_sweep` wrote. Without them the loss is the only
        score.

    Raises:
        ValueError: If the path is not a store of a single sweep.
        ImportError: If the extra `sweep` is not installed.
    """
    found = open_sweep(store)
    shown, pictures = _scored(store, found)
    best, attributes = best_restart(found), found.attrs
    counts = (best.is_finite & best.done).values
    rows = []
    for i in range(found.sizes["setting"]):
        setting = {str(name): _number(array.values[i]) for name, array in found.coords.items()}
        columns = {
            name: (best[_name(found, name)].values[i].reshape(len(counts[i]), -1), one) for name, one in shown.items()
        }
        scores = {
            name: score(values.mean(1).tolist(), one, counts[i].tolist())
            for name, (values, one) in columns.items()
            if counts[i].any()
        }
        losses = best.loss.values[i].tolist()
        missing = int((~found.done.values[i]).sum())
        broken = int((found.done & ~found.is_finite).values[i].sum())
        notes = [f"{missing} of {found.done.values[i].size} lanes have not been run"] if missing else []
        notes += (
            [f"{broken} of {found.done.values[i].size} lanes ended with a loss or reconstruction that is not finite"]
            if broken
            else []
        )
        captions = next(iter(columns.values()))[0].ravel().tolist() if columns else []
        words = ", ".join(f"{name} {own}" for name, own in setting.items())
        rows.append(
            Row(
                title=f"{attributes.get('title', source)}: {words}",
                threat_model=str(attributes.get("threat_model", "")),
                source=source,
                notes=notes,
                scores=scores or {"loss": score(losses, LOSS, counts[i].tolist())},
                details={"loss": Score(LOSS, tuple(losses), float(np.median(losses)))},
                curves=_curves(best.losses.values[i]) + ([] if i else _over_settings(found, best, shown, counts)),
                examples=_examples(pictures, i, captions, next(iter(shown.values()), None)),
                num_examples=len(captions),
                cost={words: float(attributes[name]) for name, words in COST.items()} if i == 0 else {},
                settings=setting | {name: str(value) for name, value in attributes.items() if name not in OWN},
                versions=attributes.get("versions", {}),
                hardware=str(attributes.get("hardware", "")),
                command=str(attributes.get("command", "")),
            )
        )
    return rows


def _scored(store: Path, found: Any) -> tuple[dict[str, Shown], dict[str, np.ndarray]]:
    """Returns how the scores in a store are written, and the pixels of its pictures."""
    if not (store / SCORES / "zarr.json").exists():
        return {}, {}
    with whole(inside(str(store), SCORES)):
        group = open_group(inside(str(store), SCORES), "r")
        shown = {name: Shown(**one) for name, one in group.attrs.get("shown", {}).items()}
        if not all(_name(found, name) in found for name in shown):  # they are of fewer lanes than have been run
            return {}, {}
        pictures = group["pictures"].arrays() if "pictures" in group else ()
        return shown, {name: np.asarray(array[:]) for name, array in pictures}


def _name(found: Any, name: str) -> str:
    """Returns the name that a score has in the dataset."""
    return f"{SCORES}.{name}" if f"{SCORES}.{name}" in found else name


def _number(value: Any) -> str:
    """Writes a number of a setting, or several; of many only how they lie."""
    if np.size(value) > MAX_NUMBERS:
        return f"numbers of shape {np.shape(value)}"
    return ", ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in np.ravel(value).tolist())


def _curves(losses: np.ndarray) -> list[Curve]:
    """Plots the losses of the best restarts over steps: their minimum, median and maximum over victims at each step."""
    finite = losses[np.isfinite(losses).all(1)]
    if not len(finite):
        return []
    steps = thinned(losses)["steps"]
    names = {"best victim": 0.0, "median victim": 0.5, "worst victim": 1.0} if len(finite) > 1 else {"victim": 0.5}
    lines = {name: (steps, np.quantile(finite, share, 0)[steps - 1]) for name, share in names.items()}
    return [Curve("The attacker's loss over steps, best restart", ("step", "loss"), lines, ("linear", "log"))]


def _over_settings(found: Any, best: Any, shown: Mapping[str, Shown], counts: np.ndarray) -> list[Curve]:
    """Plots the first score over every number of the settings that has several values."""
    if not shown:
        return []
    name, one = next(iter(shown.items()))
    values, curves = best[_name(found, name)].values, []
    values = values.reshape(*counts.shape, -1).mean(2)
    average = np.mean if one.average == "mean" else np.median
    sums = np.asarray([average(v[c]) if c.any() else np.nan for v, c in zip(values, counts, strict=True)])
    for setting, array in found.coords.items():
        numbers = np.asarray(array.values, float)
        is_known = np.isfinite(numbers) & ~np.isnan(sums) if numbers.ndim == 1 else np.zeros(0, bool)
        each = np.unique(numbers[is_known]) if is_known.any() else np.zeros(0)
        if len(each) > 1:
            line = each, np.asarray([sums[is_known & (numbers == number)].mean() for number in each])
            several = len(each) < is_known.sum()
            title = f"{one.heading} over {setting}" + (", mean over the other settings" if several else "")
            decades = each[0] > 0 and each[-1] >= 10 * each[0]
            scales = ("log" if decades else "linear", "linear")
            curves.append(Curve(title, (str(setting), one.heading + one.unit), {one.heading: line}, scales))
    return curves


def _examples(
    pictures: Mapping[str, np.ndarray], i: int, captions: list[float], shown: Shown | None
) -> list[list[Picture]]:
    """Returns originals beside their reconstructions under a setting."""
    if not pictures or shown is None:
        return []
    found = []
    for original, reconstruction, caption in zip(pictures["original"], pictures["reconstruction"][i], captions):
        words = "" if np.isnan(caption) else shown.text(caption) + shown.unit
        both = ("original", original, ""), ("reconstruction", np.nan_to_num(reconstruction), words)
        found.append([Picture(name, png(pixels), caption=below, is_tile=True) for name, pixels, below in both])
    return found
