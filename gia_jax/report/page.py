"""An HTML page about results: tables, curves and pictures in a single file that loads nothing else.

The page is made from `gia_jax.report.rows.Row`s. `gia_jax.report.runs` reads them from the files of the command line.
"""

import base64
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gia_jax.metrics.images import PSNR_IN_WORDS
from gia_jax.report.plots import line_plot
from gia_jax.report.rows import ON_RANDOM, Curve, Row

MARK = '<meta name="generator" content="gia_jax report">'  # marks a file as an earlier report


def check_installed() -> None:
    """Raises ImportError if jinja2 or matplotlib is not installed. The extra `report` installs both."""
    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        raise ImportError("the report needs the extra 'report': pip install 'gia-jax[report]'")


def page(rows: Sequence[Row], *, title: str = "What do these updates give away?") -> str:
    """Makes an HTML page about results.

    The page embeds its pictures and loads nothing, which its content security policy enforces. Text of the rows is
    escaped.

    Args:
        rows: Results in the order of the page, at least one.
        title: Title of the page.

    Returns:
        The HTML.

    Raises:
        ValueError: If there are no rows.
        ImportError: If jinja2 or matplotlib is not installed.

    Examples:
        >>> from gia_jax import ThreatModel
        >>> from gia_jax.modalities import Shown
        >>> from gia_jax.report.page import page
        >>> from gia_jax.report.rows import Row, score
        >>> row = Row("iDLG on LeNet", ThreatModel().describe(), scores={"psnr": score([31.5], Shown("PSNR", ".1f"))})
        >>> "iDLG on LeNet" in page([row])
        True
    """
    if not rows:
        raise ValueError("rows must hold at least one result, got none")
    check_installed()
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plot"] = _plot
    environment.filters["uri"] = _uri
    template = environment.from_string((files("gia_jax.report") / "page.html.jinja").read_text(encoding="utf-8"))
    threats = list(dict.fromkeys(row.threat_model for row in rows if row.threat_model))
    tables: dict[tuple[str, ...], list[tuple[int, Row]]] = {}
    for number, row in enumerate(rows, 1):
        tables.setdefault(tuple(row.scores), []).append((number, row))
    psnr = PSNR_IN_WORDS if any("psnr" in row.scores for row in rows) else ""
    return template.render(
        title=title,
        rows=rows,
        tables=tables,
        threats=threats,
        mark=Markup(MARK),
        against=_against(rows),
        psnr=psnr,
        on_random=ON_RANDOM,
        has_random=any(ON_RANDOM in row.compared for row in rows),
    )


def _against(rows: Sequence[Row]) -> Sequence[Curve]:
    """Returns plots of leakage against accuracy, one for each score that attacks are judged by."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        if row.accuracy is not None and row.scores:
            first = next(iter(row.scores.values()))
            point = np.array([row.accuracy]), np.array([first.value])
            found.setdefault(("accuracy", first.shown.heading + first.shown.unit), {})[str(number)] = point
    return [Curve("Leakage against accuracy", labels, lines) for labels, lines in found.items()]


def _plot(curve: Curve) -> str:
    """Draws a curve, as a data URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.png"
        line_plot(curve.lines, path, labels=curve.labels, scales=curve.scales)
        return _uri(path.read_bytes())


def _uri(content: bytes) -> str:
    """Returns a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
