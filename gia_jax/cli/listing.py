"""What `python -m gia_jax list` prints."""

from gia_jax import models
from gia_jax.cli.examples import DATA_SETS
from gia_jax.cli.names import AGGREGATIONS, ATTACKS, LABEL_RULES, SOLVERS
from gia_jax.defenses import protected


def show() -> None:
    """Prints all names, with a line on each."""
    for title, names in (
        ("attacks", {name: named.summary for name, named in ATTACKS.items()}),
        ("federation", {"cafe": "CAFE, Jin et al. 2021: vertical federated learning, by exact least squares"}),
        ("solvers", {name: solver.summary for name, solver in SOLVERS.items()}),
        ("defenses", {name: f"{_settings(named)}{named.summary}" for name, named in protected.DEFENSES.items()}),
        ("aggregation", {name: named.summary for name, named in AGGREGATIONS.items()}),
        ("combinations of defenses", {name: " ".join(parts) for name, parts in protected.COMBINATIONS.items()}),
        ("models", dict.fromkeys(models.MODELS, "") | dict.fromkeys(models.GRAPH_MODELS, "of graphs")),
        ("data", DATA_SETS),
        ("label rules", {name: rule.summary for name, rule in LABEL_RULES.items()}),
    ):
        print(f"{title}:")
        for name, summary in names.items():
            print(f"  {name:<22}{summary}".rstrip())


def _settings(named: protected.Named) -> str:
    """Returns the settings of a defense with their defaults."""
    return "".join(f"{key}={value:g} " for key, value in named.settings.items())
