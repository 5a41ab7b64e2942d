"""Label recovery: rules that find the labels of the batch from an observation, in no particular order.

For an update of unknown scale, such as one that was clipped or divided by a guessed learning rate, take a rule that
gives the same labels at every positive scale: `idlg`, `column_minimum`, `greedy_bias` or `llg`. `bias_counts`, `ilrg`
and, where labels repeat, `llg_plus` need the scale of a mean loss. They notice an update that is too long, and not one
that is too short: at a hundredth of the scale they return wrong labels without a word.
"""

from gia_jax.labels.classifier import ClassifierFn, Dense, dense
from gia_jax.labels.counts import bias_counts, greedy_bias, interpolated_counts
from gia_jax.labels.ilrg import ilrg, ilrg_system
from gia_jax.labels.llg import llg, llg_plus
from gia_jax.labels.signs import column_minimum, idlg
from gia_jax.labels.soft import soft_labels

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
    "interpolated_counts",
    "llg",
    "llg_plus",
    "soft_labels",
]
