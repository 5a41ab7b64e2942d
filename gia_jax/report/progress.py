"""Progress of a long run: a bar in a terminal, and a line now and then in a log."""

import sys
import time

from tqdm import tqdm

from gia_jax.sweep.progress import ProgressFn, Sign

QUIET_SECONDS = 10.0  # least time between two lines where standard error is no terminal
BAR = "{desc}: {percentage:3.0f} % |{bar:30}|{postfix}"


def progress(name: str) -> ProgressFn:
    """Makes a function that shows on standard error how far a study or a sweep is.

    In a terminal it updates one line with a bar, the steps per second and the time left. Elsewhere it prints a line at
    every new phase, and at most one every ten seconds from then on.

    Args:
        name: Text before the progress, such as the name of the attack.

    Returns:
        The `progress_fn` for `gia_jax.sweep`.

    Examples:
        >>> from gia_jax.report import progress
        >>> from gia_jax.sweep import Sign
        >>> progress_fn = progress("dlg")  # for study(..., progress_fn=progress_fn)
        >>> progress_fn(Sign("steps", done=50, total=100, seconds=2.0, seconds_left=2.0))
    """
    return _bar(name) if sys.stderr is not None and sys.stderr.isatty() else _lines(name)


def _bar(name: str) -> ProgressFn:
    """Returns a function that draws a bar again at every call, and a new one for every run."""
    bars: list[tqdm] = []

    def progress_fn(sign: Sign) -> None:
        if not bars and sign.done == sign.total and sign.phase != "compiling":
            return  # the end was shown
        if not bars:
            bars.append(tqdm(desc=name, bar_format=BAR, mininterval=0, delay=1e-9))
        bars[0].total, bars[0].n = sign.total, sign.done
        bars[0].set_postfix_str(_said(sign))
        if sign.done == sign.total:
            bars.pop().close()

    return progress_fn


def _lines(name: str) -> ProgressFn:
    """Returns a function that prints a line at every new phase, and at most one every `QUIET_SECONDS` in between."""
    shown: dict[str, float] = {}

    def progress_fn(sign: Sign) -> None:
        now = time.perf_counter()
        if sign.done == sign.total or now - shown.get(sign.phase, -QUIET_SECONDS) >= QUIET_SECONDS:
            shown[sign.phase] = now
            share = "" if sign.phase == "compiling" else f" {100 * sign.done // sign.total:3d} % of the steps,"
            print(f"{name}:{share} {_said(sign)}", file=sys.stderr, flush=True)

    return progress_fn


def _said(sign: Sign) -> str:
    """Returns the text of a sign beside its share of the steps."""
    if sign.phase == "compiling":
        return "compiling"
    parts = ["warming up"] if sign.phase == "warm-up" else []
    parts.append(f"{sign.seconds:.0f} s")
    if sign.seconds > 0 and sign.done:
        parts.append(f"{sign.done / sign.seconds:,.0f} steps/s")
    if sign.seconds_left is not None and sign.done < sign.total:
        parts.append(f"about {sign.seconds_left:.0f} s left")
    return ", ".join(parts)
