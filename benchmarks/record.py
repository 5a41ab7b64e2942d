"""Where figures are written: one CSV and one Markdown table a measurement, with everything needed to repeat it.

No other file names the folder of the results. Every script has a folder of its own in it, of the script's name.
"""

import csv
import datetime
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from gia_jax import metrics, report

RESULTS = Path(__file__).parent / "results"
Key = TypeVar("Key")


def commit() -> str:
    """The commit of the working tree, with a plus sign where the package or the benchmarks differ from it."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "gia_jax", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def folder() -> Path:
    """Makes the folder of the running script's tables, where it is missing, and returns it."""
    path = RESULTS / Path(sys.argv[0]).stem
    path.mkdir(parents=True, exist_ok=True)
    return path


def read(table: str) -> list[dict[str, str]]:
    """Returns the rows of a table, such as "utility/cifar10", as columns to cells."""
    with (RESULTS / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(
    name: str,
    title: str,
    rows: Sequence[dict[str, Any]],
    notes: str = "",
    *,
    victims: Sequence[dict[str, Any]] = (),
    **more_versions: str,
) -> None:
    """Writes `<name>.csv`, a row with its provenance each, and `<name>.md` into the script's folder; prints the latter.

    Args:
        name: File name without its suffix. The script's own name before it, which commands on record have, is left out.
        title: The table's heading.
        rows: Columns to values; every row has the same columns.
        notes: Markdown below the table: what the figures mean.
        victims: What the table is the mean of, a row each, for `<name>_victims.csv`; none for no such file.
        **more_versions: Of packages beside the library's own.
    """
    script = Path(sys.argv[0])
    where, name = folder(), name.removeprefix(f"{script.stem}_")
    versions = ", ".join(f"{package} {version}" for package, version in (report.versions() | more_versions).items())
    provenance = {
        "commit": commit(),
        "command": shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "hardware": report.hardware(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
    with (where / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *provenance])
        writer.writeheader()
        writer.writerows({**row, **provenance} for row in rows)
    if victims:
        with (where / f"{name}_victims.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(victims[0]))
            writer.writeheader()
            writer.writerows(victims)

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    table = [line(list(rows[0])), line(["---"] * len(rows[0])), *(line(list(row.values())) for row in rows)]
    origin = [f"* {key}: {value}" for key, value in provenance.items()]
    parts = [f"# {title}", "\n".join(table), *([notes.strip()] if notes else []), "\n".join(origin)]
    text = "\n\n".join(parts) + "\n"
    (where / f"{name}.md").write_text(text)
    print(text, flush=True)


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], Any], form: str) -> str:
    """A statistic with its percentile bootstrap interval of 95 %.

    Args:
        values: With a leading axis of victims, two or more, which are drawn anew.
        statistic: From values to a number.
        form: Of the three numbers, such as ".2f".
    """
    low, high = metrics.bootstrap_interval(values, statistic)
    return f"{statistic(values):{form}} [{low:{form}}, {high:{form}}]"


def gain(differences: np.ndarray) -> str:
    """The mean of paired differences with its percentile bootstrap interval of 95 %, called none where that covers 0.

    Args:
        differences: One for each victim, shape (v,), of the unit of the column; of one victim there is no interval.
    """
    if len(differences) < 2:
        return f"{differences.mean():+.2f}"
    low, high = metrics.bootstrap_interval(differences, np.mean)
    return interval(differences, np.mean, "+.2f") + (": none" if low <= 0 <= high else "")


def gains(differences: dict[Key, np.ndarray]) -> dict[Key, str]:
    """`gain` of each, with its p-value: of a test that turns the signs of the differences at random, corrected over all
    of them by Holm (1979). Where some are not finite there is neither.

    Args:
        differences: As for `gain`, two victims or more.
    """
    finite = {key: values for key, values in differences.items() if np.all(np.isfinite(values))}
    corrected = dict(zip(finite, holm([sign_test(values) for values in finite.values()])))
    return {
        key: f"{gain(values)}, p {corrected[key]:.2g}"
        if key in finite
        else f"not finite for {np.sum(~np.isfinite(values))}"
        for key, values in differences.items()
    }


def sign_test(differences: np.ndarray) -> float:
    """Two-sided p-value of a mean of 0, where each sign might as well be the other: 100,000 draws of signs, so at least
    2e-5.
    """
    if not np.any(differences):
        return 1.0
    options = {"permutation_type": "samples", "n_resamples": 99_999, "batch": 10_000}
    return stats.permutation_test((differences,), np.mean, rng=np.random.default_rng(0), **options).pvalue


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's (1979) step-down correction: below a level is what can be claimed together at that level."""
    values = np.asarray(p_values)
    order = np.argsort(values)
    scaled = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected
