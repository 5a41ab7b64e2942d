"""The gradient inversion attacks, with one paper in each module, for users who attack their own models.

What the gradient of a graph network gives away in closed form is in the module `graph_closed_form`.
"""

from gia_jax.attacks.april import TokenLayers, april, april_optimization
from gia_jax.attacks.cafe import cafe, cafe_descent
from gia_jax.attacks.dlg import dlg
from gia_jax.attacks.fedavg_leakage import fedavg_leakage
from gia_jax.attacks.fedleak import fedleak
from gia_jax.attacks.gias import gias, latent_search
from gia_jax.attacks.giml import giml
from gia_jax.attacks.glg import glg
from gia_jax.attacks.grad_inversion import grad_inversion
from gia_jax.attacks.graph_identifiability import GraphIdentifiability, graph_identifiability
from gia_jax.attacks.graph_known_structure import graph_known_structure
from gia_jax.attacks.graph_spans import GraphSpans, graph_spans
from gia_jax.attacks.idlg import idlg
from gia_jax.attacks.inverting_gradients import inverting_gradients
from gia_jax.attacks.linear import linear_inversion
from gia_jax.attacks.magia import magia
from gia_jax.attacks.nl_sme import nl_sme
from gia_jax.attacks.r_gap import Twins, r_gap, r_gap_twins
from gia_jax.attacks.rank_analysis import LayerRank, rank_analysis
from gia_jax.attacks.sme import sme

__all__ = [
    "GraphIdentifiability",
    "GraphSpans",
    "LayerRank",
    "TokenLayers",
    "Twins",
    "april",
    "april_optimization",
    "cafe",
    "cafe_descent",
    "dlg",
    "fedavg_leakage",
    "fedleak",
    "gias",
    "giml",
    "glg",
    "grad_inversion",
    "graph_identifiability",
    "graph_known_structure",
    "graph_spans",
    "idlg",
    "inverting_gradients",
    "latent_search",
    "linear_inversion",
    "magia",
    "nl_sme",
    "r_gap",
    "r_gap_twins",
    "rank_analysis",
    "sme",
]
