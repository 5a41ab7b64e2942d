"""What people read of a study: a record in JSON, tables in plain text, pictures, and an HTML page of them all."""

from gia_jax.report.graph_plots import graph_grid
from gia_jax.report.plots import loss_curves, picture_grid
from gia_jax.report.progress import progress
from gia_jax.report.records import hardware, results, to_json, versions
from gia_jax.report.tables import table

__all__ = [
    "graph_grid",
    "hardware",
    "loss_curves",
    "picture_grid",
    "progress",
    "results",
    "table",
    "to_json",
    "versions",
]
