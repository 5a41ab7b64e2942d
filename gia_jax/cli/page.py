"""The report of the command line: one HTML page about the results in a folder."""

import argparse
import time
from pathlib import Path

from gia_jax._files import write_unclaimed
from gia_jax.report.page import MARK, page
from gia_jax.report.runs import read


def run(args: argparse.Namespace) -> None:
    """Writes the page, and prints its path.

    Args:
        args: Options of the command line.

    Raises:
        ValueError: If there are no results, gia_jax did not write a results file, or the page would replace another
            file.
        ImportError: If the extra `report` is not installed.
        OSError: If the page cannot be written.
    """
    began, folder = time.time(), Path(args.folder)
    output = folder / "report.html" if args.output is None else Path(args.output)
    rows = read(folder)
    _check(output)
    content = page(rows).encode()
    path = write_unclaimed(output, content, began)
    print(f"wrote {path}: {len(rows)} {'row' if len(rows) == 1 else 'rows'}, {len(content) / 2**20:.1f} MiB")


def _check(output: Path) -> None:
    """Raises ValueError for a path where no page can be written, or where there is a file that is no report."""
    if not output.parent.is_dir():
        raise ValueError(f"--output must be in an existing folder, got {str(output)!r}")
    if output.is_dir():
        raise ValueError(f"--output must be a file, got the folder {str(output)!r}")
    if output.exists():
        with output.open("rb") as file:
            if MARK.encode() not in file.read(2_000):
                raise ValueError(f"--output must be a new file or an earlier report, got another file, {str(output)!r}")
