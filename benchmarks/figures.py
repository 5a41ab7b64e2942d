"""The README's results, computed from the tables.

    python benchmarks/figures.py [--check]

Rewrites what stands between two comments of the README. With `--check` nothing is written, and the exit status is 1
where the README and the tables differ.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import record

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- results, written by benchmarks/figures.py -->", "<!-- end of the results -->"
KNOWN = "server; labels known"


def row(table: str, **cells: str) -> dict[str, str]:
    """The one row of a table that has these cells; an underscore in a column's name stands for a space."""
    wanted = {column.replace("_", " "): cell for column, cell in cells.items()}
    (found,) = (row for row in record.read(table) if wanted.items() <= row.items())
    return found


def number(cell: str) -> str:
    """A cell's first number to one decimal, such as 12.5 of "12.46 +- 0.30"."""
    return f"{float(cell.split()[0]):.1f}"


def gain(cell: str) -> str:
    """A difference and its interval to one decimal, without the p-value."""
    value, low, high = (f"{float(found):+.1f}" for found in re.findall(r"[+-][\d.]+", cell)[:3])
    return f"{value} dB, 95 % interval [{low}, {high}]"


def undefended() -> tuple[str, ...]:
    """Table 1 of Inverting Gradients."""
    table = "inverting_gradients_table1/cosine"
    every = row(table, model_seed="all")
    prior = np.mean([float(row["prior only"]) for row in record.read(table) if row["prior only"]])
    return (
        f"**An undefended image leaks.** Inverting Gradients finds it at {number(every['PSNR mean'])} dB on average "
        f"(standard error {number(every['standard error'])}); on random updates it reaches {prior:.1f} dB.",
        f"{every['n']} (100 images, 3 networks)",
        KNOWN,
        table,
    )


def exact() -> tuple[str, ...]:
    """The second-order solver."""
    table = "inverting_gradients_table1/levenberg_marquardt"
    (found,) = record.read(table)
    return (
        f"**Often exactly.** Levenberg-Marquardt in float64 brings {found['>= 100 dB']} of {found['n']} images above "
        f"100 dB, with a median of {float(found['median']):.0f} dB.",
        found["n"],
        KNOWN,
        table,
    )


def adaptive() -> tuple[str, ...]:
    """What knowing a defense gains."""
    table = "defenses/lenet_untrained"
    none, sign, soteria = (row(table, defense=name) for name in ("none", "sign", "soteria:ratio=0.8"))

    def both(found: dict[str, str]) -> str:
        blind, known = number(found["blind PSNR"]), number(found["adaptive PSNR"])
        return f"{blind} dB to {known} dB ({gain(found['adaptive - blind, dB'])})"

    return (
        "**A defense that is known protects less.** Knowing it takes Inverting Gradients from "
        f"{both(sign)} behind signs, and from {both(soteria)} behind Soteria; without a defense it has "
        f"{number(none['blind PSNR'])} dB.",
        str(len(record.read(f"{table}_victims"))),
        f"{KNOWN}; the defense known, not its key",
        table,
    )


def noise() -> tuple[str, ...]:
    """What DP-SGD hides, and what it costs."""
    table, cost, name = "defenses/lenet_untrained", "utility/cifar10", "dpsgd:noise_multiplier=0.1,norm=1"
    found, trained = row(table, defense=name), row(cost, defense=name)
    victims = record.read(f"{table}_victims")
    guess = np.mean([float(victim["class mean"]) for victim in victims])
    return (
        f"**Noise hides an image, at a price.** Behind DP-SGD (norm 1, noise 0.1) the same attack has "
        f"{number(found['blind PSNR'])} dB, less than the mean image of the class ({guess:.1f} dB). A network that "
        f"learns CIFAR-10 under it has a test accuracy of {number(trained['accuracy %'])} % in place of "
        f"{number(trained['undefended'])} % ([table](benchmarks/results/{cost}.md)).",
        f"{len(victims)}; accuracy: 3 seeds",
        KNOWN,
        table,
    )


def masked() -> tuple[str, ...]:
    """One client's update behind secure aggregation."""
    table = "aggregated/views"
    found = row(table, protocol="secagg")
    return (
        f"**A masked update is noise to an attack.** Behind SecAgg it finds {number(found['upload, mean dB'])} dB, as "
        f"in uniform noise (difference {found['difference, mean dB']} dB, with its 95 % interval).",
        "64",
        KNOWN,
        table,
    )


def results() -> str:
    """The README's table."""
    lines = ["| result | n | threat model | table |", "|---|---|---|---|"]
    for measured in (undefended, exact, adaptive, noise, masked):
        text, victims, threat, table = measured()
        lines.append(f"| {text} | {victims} | {threat} | [{table}](benchmarks/results/{table}.md) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the README differs")
    check = parser.parse_args().check
    page = README.read_text()
    before, _, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README} needs the lines {START} and {END}")
    written = f"{before}{START}\n{results()}\n{END}{after}"
    if check and written != page:
        raise SystemExit("the README's results differ from the tables: run python benchmarks/figures.py")
    if not check:
        README.write_text(written)


if __name__ == "__main__":
    main()
