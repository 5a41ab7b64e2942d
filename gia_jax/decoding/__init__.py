"""From encodings back to images: what MixUp and InstaHide give away to whoever has the encodings of several epochs."""

from gia_jax.decoding.instahide import InstaHideDecoding, decode_instahide, retrieve, synchronize
from gia_jax.decoding.mapping import (
    calibrated_threshold,
    precision_recall,
    recover_mixing,
    refine_mixing,
    same_source,
    similarity,
)
from gia_jax.decoding.mixup import decode_mixup, mixing_matrix, noise_gain, predicted_psnr

__all__ = [
    "InstaHideDecoding",
    "calibrated_threshold",
    "decode_instahide",
    "decode_mixup",
    "mixing_matrix",
    "noise_gain",
    "precision_recall",
    "predicted_psnr",
    "recover_mixing",
    "refine_mixing",
    "retrieve",
    "same_source",
    "similarity",
    "synchronize",
]
