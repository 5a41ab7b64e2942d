"""A graph from the gradient of a graph convolutional network of two layers, exactly, by spans and counting.

GRAIN (Drencheva et al., GRAIN: Exact Graph Reconstruction from Gradients, ICLR 2025) tests neighbourhoods for
membership in the spans of the layers' gradients, and glues those that pass to a graph by a depth-first search. This
attack takes the tests from it, and counts where GRAIN searches:

1. **Types.** A node's features and its degree. The features lie in the span of the first layer's gradient. The degree
   need not be among them: all degrees are tried.
2. **Stars.** A node's type with those of its neighbours gives its features after the first layer. They lie in the span
   of the second layer's gradient. Where that lacks a dimension, those stars are kept that complete it in one line.
3. **Trees.** A star with a star for each of its neighbours. A network of two layers tells nodes apart by their trees
   alone.
4. **Counts.** A graph's gradient is the sum of what its nodes add to it, and a tree decides that. So the numbers of
   nodes with each tree solve linear equations: those of the pooled features and of the second layer's gradient, and
   those that say that an edge has two ends. They are solved by non-negative least squares, and by an integer programme
   where there are several solutions.
5. **Graphs.** Half-edges are joined until every node has its tree. A graph is accepted if the client's gradient for it
   is the update, to rounding.

Departures from GRAIN: the degree is no feature, thresholds follow from the noise, labels are read from the last layer,
and counts take the place of its search. Graphs with the same counts have the same gradient for all parameters, so the
attack returns them all. Under a mean, so do a graph and two copies of it.

The attack needs wide layers: with labels and degrees as features, it finds the trees of 93 to 100 % of the molecules
with at most 30 nodes at width 128, and of 21 to 64 % at width 32 (`benchmarks/graph_spans.py`). It refuses the mean
gradient of several graphs. The spans of such a gradient still keep 97 to 100 % of the true stars of two and four graphs
at width 300.

`graph_spans` is the attack, and its parts are in the modules named after the stages.
"""

from gia_jax.attacks.graph_spans.attack import graph_spans
from gia_jax.attacks.graph_spans.candidates import Stars, Trees, Types
from gia_jax.attacks.graph_spans.found import FoundGraph, GraphSpans, Limits, as_reconstruction

__all__ = ["FoundGraph", "GraphSpans", "Limits", "Stars", "Trees", "Types", "as_reconstruction", "graph_spans"]
