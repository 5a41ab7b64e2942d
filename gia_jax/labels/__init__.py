"""Label recovery: rules that find the labels of the batch from an observation, in no particular order."""

from gia_jax.labels.classifier import ClassifierFn, Dense, dense
from gia_jax.labels.counts import bias_counts, greedy_bias
from gia_jax.labels.ilrg import ilrg, ilrg_system
from gia_jax.labels.llg import llg, llg_plus
from gia_jax.labels.signs import column_minimum, idlg

__all__ = [
    "ClassifierFn",
    "Dense",
    "bias_counts",
    "column_minimum",
    "dense",
    "greedy_bias",
    "idlg",
    "ilrg",
    "ilrg_system",
    "llg",
    "llg_plus",
]
