"""Holm's correction over the gains of all tables of defenses together.

    python benchmarks/holm.py

A gain is a mean with an interval of 95 %, from which its standard error and a two-sided p-value follow as of a normal
distribution: tables that hold p-values of their own are corrected again, with those of all the others.
"""

import csv
import re

import numpy as np
import record
from scipy import stats

COLUMN, LEVEL = "adaptive - blind, dB", 0.05
GAIN = re.compile(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]")


def main() -> None:
    found = []
    for path in sorted(record.RESULTS.glob("defenses_*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if match := GAIN.match(row.get(COLUMN, "")):
                    found.append((path.stem, *map(float, match.groups())))
    tables, means, lows, highs = map(np.asarray, zip(*found))
    errors = (highs - lows) / (2 * stats.norm.ppf(0.975))
    # No error at all: of differences that are all the same, here zeros.
    z = np.divide(np.abs(means), errors, out=np.where(means == 0, 0.0, np.inf), where=errors > 0)
    kept = record.holm(2 * stats.norm.sf(z)) <= LEVEL
    alone = (lows > 0) | (highs < 0)
    rows = [
        {
            "table": str(table),
            "gains and losses": int(own.sum()),
            "gains with an interval above 0": int((own & (lows > 0)).sum()),
            "gains after Holm": int((own & kept & (means > 0)).sum()),
            "losses with an interval below 0": int((own & (highs < 0)).sum()),
            "losses after Holm": int((own & kept & (means < 0)).sum()),
            "smallest difference that stays, dB": f"{np.abs(means[own & kept]).min():.2f}"
            if (own & kept).any()
            else "-",
        }
        for table in dict.fromkeys(tables)
        for own in [tables == table]
    ]
    total = {"table": "all", **{name: sum(row[name] for row in rows) for name in list(rows[0])[1:-1]}}
    rows.append(total | {"smallest difference that stays, dB": f"{np.abs(means[kept]).min():.2f}"})
    record.write(
        "defenses_holm",
        "What stays of the gains of attackers that know, corrected over all tables",
        rows,
        f"The {len(means)} differences of the column '{COLUMN}' of every table of defenses as one family, corrected "
        f"by Holm (1979) at {LEVEL:.0%}; p-values from the bootstrap intervals of 95 %, as of a normal distribution. "
        f"Alone {alone.sum()} intervals leave out 0, after the correction {kept.sum()} differences are not 0.",
    )


if __name__ == "__main__":
    main()
