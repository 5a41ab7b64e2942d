"""The command line: a demonstration, attacks, a vertical federation, a report on results, and a list of names.

Nothing of the library imports it.
"""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any, NoReturn

from gia_jax.cli import attack, console, demonstration, federation, listing, page, parser

TERMINATED = "terminated"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments of the command line. None takes those of the process.

    Returns:
        The exit status: 0 for success, 2 for a mistake, 130 after Ctrl-C, 143 after a request to terminate.
    """
    args = parser.parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # so that what was printed before a kill is not lost
    try:
        with warnings.catch_warnings(), _terminating():
            warnings.showwarning = console.warn
            if not 0 <= args.seed < 2**32:
                raise ValueError(f"--seed must be at least 0 and below 2^32, got {args.seed}")
            if args.out == "":
                raise ValueError("--out must name a folder, got ''")
            if args.command == "list":
                listing.show()
            elif args.command == "attack":
                attack.run(args)
            elif args.command == "federation":
                federation.run(args)
            elif args.command == "report":
                page.run(args)
            else:
                demonstration.run(args)
    except (ValueError, ImportError, OSError, OverflowError) as error:
        print(f"gia_jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        kept = f"the same command goes on from the states kept in {console.states(Path(args.out))}"
        any_kept = next(console.states(Path(args.out)).glob("*.state"), None)
        print(f"\ngia_jax: interrupted; {kept if any_kept else 'no state was kept'}", file=sys.stderr)
        return 143 if stopped.args == (TERMINATED,) else 130
    return 0


@contextlib.contextmanager
def _terminating() -> Generator[None]:
    """Turns a request to terminate (SIGTERM) into KeyboardInterrupt while it lasts, so that a run's state is saved."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def process() -> NoReturn:
    """Runs `main` as a process of its own. An interruption does not wait for compilers that are still at work."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    status = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed before the start
        with contextlib.suppress(OSError):
            stream.flush()
    if status > 128:
        os._exit(status)
    sys.exit(status)
