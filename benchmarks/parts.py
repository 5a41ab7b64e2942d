"""A command line that runs the named parts of a script, one measurement each."""

import argparse
from collections.abc import Callable

Part = Callable[[argparse.Namespace], None]


def run_parts(parser: argparse.ArgumentParser, *parts: Part) -> None:
    """Adds the positional argument PART to the parser, parses, and runs the parts named; all where none is."""
    known = {part.__name__: part for part in parts}
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; default: all")
    args = parser.parse_args()
    for name in args.parts:
        if name not in known:
            parser.error(f"PART must be one of {', '.join(known)}, got {name!r}")
    for name in args.parts or known:
        known[name](args)
