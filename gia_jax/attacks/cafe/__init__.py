"""CAFE, an attack on vertical federated learning, in which workers hold different features of the same records.

Jin, Chen, Hsu, Yu, Chen, CAFE: Catastrophic Data Leakage in Vertical Federated Learning, NeurIPS 2021.

Every worker passes its slice of record i through local layers to h_i, the input of its first fully connected layer
u_i = h_i W + b. Over the records of a batch the gradients of that layer are sums of what single records add, with
v_i = d loss / d u_i:

    grad b = sum over i of v_i        (step I recovers V)
    grad W = sum over i of h_i^T v_i  (step II recovers H, with V known)

Step III searches the data whose features are H, and whose gradients are the records' own. The records of every batch
are known, because the servers of vertical federated learning align them. Without that, or without enough different
batches, the sums cannot be told apart.

`cafe` solves steps I and II exactly (`exact`), with step III by `feature_matching` (`features`); `cafe_descent` is the
paper's single loop (`descent`). Which batches identify the records is in `records`.
"""

from gia_jax.attacks.cafe.descent import Guess, cafe_descent, rows, with_rows
from gia_jax.attacks.cafe.exact import cafe, joined, record_features
from gia_jax.attacks.cafe.features import InvertFn, feature_matching, recordwise
from gia_jax.attacks.cafe.records import (
    FeaturesFn,
    LayerRounds,
    LayersFn,
    batch_condition,
    batch_rank,
    check_identifiable,
    pseudo_inverse,
    rounds_of,
    selection_matrix,
)

# Size of the paper's experiment.
NUM_RECORDS = 800
BATCH_SIZE = 40
NUM_ROUNDS = 1_200

__all__ = [
    "BATCH_SIZE",
    "NUM_RECORDS",
    "NUM_ROUNDS",
    "FeaturesFn",
    "Guess",
    "InvertFn",
    "LayerRounds",
    "LayersFn",
    "batch_condition",
    "batch_rank",
    "cafe",
    "cafe_descent",
    "check_identifiable",
    "feature_matching",
    "joined",
    "pseudo_inverse",
    "record_features",
    "recordwise",
    "rounds_of",
    "rows",
    "selection_matrix",
    "with_rows",
]
