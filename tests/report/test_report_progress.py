"""Progress of a long run, in a terminal and in a log."""

import io
import re
import sys

import pytest

from gia_jax.report import progress
from gia_jax.sweep import Sign

SIGNS = (
    Sign("compiling", 0, 200, 0.0, None),
    Sign("warm-up", 1, 200, 1.0, None),
    Sign("warm-up", 50, 200, 50.0, None),  # too early for another line
    Sign("steps", 100, 200, 100.0, 99.7),
    Sign("steps", 150, 200, 50.0, 50.0),
    Sign("steps", 200, 200, 200.0, 0.0),
)


def test_a_log_has_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    progress_fn = progress("dlg")
    for sign in SIGNS:
        progress_fn(sign)
    assert capsys.readouterr().err.splitlines() == [
        "dlg: compiling",
        "dlg:   0 % of the steps, warming up, 1 s, 1 steps/s",
        "dlg:  50 % of the steps, 100 s, 1 steps/s, about 100 s left",
        "dlg: 100 % of the steps, 200 s, 1 steps/s",
    ]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_with_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress_fn = progress("dlg")
    for sign in SIGNS[:-1]:
        progress_fn(sign)
    shown = terminal.getvalue()
    assert "\n" not in shown  # one line, which is drawn again and again
    assert re.search(r"\rdlg:  75 % \|\S+ *\|, 50 s, 3 steps/s, about 50 s left", shown)
    progress_fn(SIGNS[-1])
    assert terminal.getvalue().endswith("\n")
    progress_fn(SIGNS[-1])
    assert terminal.getvalue().count("\n") == 1
    for sign in SIGNS:  # of another run
        progress_fn(sign)
    assert terminal.getvalue().count("100 % |") == 4
    assert terminal.getvalue().count("\n") == 2
