"""What an attack achieved, measured with the truth that the attack never saw, and what noise promises against any."""

from gia_jax.metrics.cost import ExpectedCost, expected_cost
from gia_jax.metrics.diagnosis import diagnose
from gia_jax.metrics.explained import Explained, explained
from gia_jax.metrics.graphs import GraphScores, graph_scores, graph_similarity
from gia_jax.metrics.images import ImageScores, image_scores, nearest, retrieval_rank, ssim, success_share
from gia_jax.metrics.intervals import bootstrap_interval
from gia_jax.metrics.isomorphism import isomorphism, same_colors, wl_colors
from gia_jax.metrics.labels import label_overlap
from gia_jax.metrics.node_order import match_nodes
from gia_jax.metrics.privacy import (
    epsilon,
    fisher_bound,
    fisher_information,
    privacy_lines,
    reconstruction_robustness,
    van_trees_bound,
)
from gia_jax.metrics.scores import Scores, baselines, score

__all__ = [
    "ExpectedCost",
    "Explained",
    "GraphScores",
    "ImageScores",
    "Scores",
    "baselines",
    "bootstrap_interval",
    "diagnose",
    "epsilon",
    "expected_cost",
    "explained",
    "fisher_bound",
    "fisher_information",
    "graph_scores",
    "graph_similarity",
    "image_scores",
    "isomorphism",
    "label_overlap",
    "match_nodes",
    "nearest",
    "privacy_lines",
    "reconstruction_robustness",
    "retrieval_rank",
    "same_colors",
    "score",
    "ssim",
    "success_share",
    "van_trees_bound",
    "wl_colors",
]
