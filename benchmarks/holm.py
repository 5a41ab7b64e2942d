"""Holm's correction over all tables of defenses together, as far as they keep every victim's figure.

    python benchmarks/holm.py

It asks of every defense whether knowing it changes what an attacker finds, and whether either attacker finds more than
one knows who has only the label and public examples.
"""

import csv
from pathlib import Path

import numpy as np
import record
from attackers import differs

LEVEL = 0.05
CLASS = ("class mean", "of the class")  # the guess that knows the label, of images and of rows


def differences(path: Path) -> dict[tuple[str, str, str, str], np.ndarray]:
    """Reads the differences of a table, by its folder and name, the split, the defense, and what is compared."""
    table = f"{path.parent.name}/{path.stem.removesuffix('_victims')}"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for split in dict.fromkeys(row["victims"] for row in rows):
        own = [row for row in rows if row["victims"] == split]
        (guess,) = (np.asarray([float(row[name]) for row in own]) for name in CLASS if name in own[0])
        figures = {name: np.asarray([float(row[name]) for row in own]) for name in own[0] if ", " in name}
        for column, psnr in figures.items():
            name, _, who = column.rpartition(", ")
            if who not in ("blind", "adaptive") or name.startswith(("prior only", "random search")):
                continue
            # Tables of utility have a second attacker only where it is another.
            other = differs(name) or table.endswith("_likelihood") or table.startswith("utility/")
            if who == "blind" or other:
                found[table, split, name, f"{who} - class"] = psnr - guess
            if who == "adaptive" and other and f"{name}, blind" in figures:
                found[table, split, name, "adaptive - blind"] = psnr - figures[f"{name}, blind"]
    return found


def main() -> None:
    found = {}
    for path in sorted(record.RESULTS.glob("*/*_victims.csv")):
        # Attacks that start near the truth are controls, and no attacker's.
        if "_near" not in path.stem:
            found |= differences(path)
    corrected = dict(zip(found, record.holm([record.sign_test(values) for values in found.values()])))
    rows = []
    for table, split in dict.fromkeys(key[:2] for key in found):
        stays = {
            (name, what): np.sign(values.mean()) * (corrected[table, split, name, what] <= LEVEL)
            for (own, of, name, what), values in found.items()
            if (own, of) == (table, split)
        }
        knowing = {name: sign for (name, what), sign in stays.items() if what == "adaptive - blind"}
        names = list(dict.fromkeys(name for name, _ in stays))
        best = {
            name: max(sign for (own, what), sign in stays.items() if own == name and "class" in what) for name in names
        }
        rows.append(
            {
                "table": table,
                "victims": split,
                "defenses": len(names),
                "knowing gains": f"{sum(s > 0 for s in knowing.values())} of {len(knowing)}" if knowing else "-",
                "knowing loses": f"{sum(s < 0 for s in knowing.values())} of {len(knowing)}" if knowing else "-",
                "an attacker is above the class": f"{sum(s > 0 for s in best.values())} of {len(names)}",
                "none is": ", ".join(name for name, sign in best.items() if sign <= 0) or "-",
            }
        )
    record.write(
        "table",
        "What stays of all tables of defenses, corrected together",
        rows,
        f"{len(found)} mean differences of every victim's figure (PSNR of images, fields of rows), tested by turning "
        f"their signs at random, corrected by Holm (1979) at {LEVEL:.0%} over all rows of this table. Knowing: the "
        "attacker that knows the defense beside the one that does not, where they are different attacks. The class: "
        "the mean image, or the commonest values, of public examples of the victim's class. The first tables of "
        "accuracy (utility) have one attacker for each defense, that which knows it. Tables without a file of victims "
        "are not in it.",
    )


if __name__ == "__main__":
    main()
