"""What an attack achieved, measured with the truth that the attack never saw."""

from gia_jax.metrics.images import ImageScores, image_scores, nearest, retrieval_rank, ssim, success_share
from gia_jax.metrics.labels import label_overlap

__all__ = ["ImageScores", "image_scores", "label_overlap", "nearest", "retrieval_rank", "ssim", "success_share"]
