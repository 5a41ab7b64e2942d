"""Modalities: what an example is, be it an image, a row of a table, a graph or any array, apart from who attacks it.

A modality says how unknowns become a batch, which unknowns are possible, how a reconstruction is scored against the
truth, what one would guess without a gradient, and how a reconstruction is shown. An attack takes the first part of it:
`gradient_matching(client_fn, **modality.matching())`.

Every modality is one file of this folder, and no other file knows of it. The file defines a function that returns a
`Modality`, with

* `init_fn`, `(key, observation) -> z`: the first unknowns, a tree of floating-point arrays;
* `decode_fn`, `(z, labels) -> Batch`: a batch as the client's model sees it, differentiable in z. What is discrete,
  such as a category, a token or an edge, is relaxed here, and the model must take the relaxed inputs;
* `project_fn`, `z -> z`: the nearest unknowns that are possible, or None where all are;
* `prior_fn`, `(batch, observation) -> ` scalar: what is implausible, or None;
* `like`: the shapes and types of one example as the model sees it, without the axis of the batch, an array or a tree;
* `score_fn`, `(found, truth) -> Scored`: reconstructions assigned to the true examples, and named scores of these;
* `shown`: how a table writes these scores;
* `guess_fn`, `(truth, public) -> ` the first of these scores for guesses that use no gradient;
* `draw_fn`, `(columns, path, captions=, title=)`, and `suffix`: a file in which a person sees the examples;
* `pixels_fn`, `batch -> (pixels, note)`: the examples as images, where they are images.

The first four are pure functions that JAX can trace. The scores, guesses and drawings are made on the host.
"""

from gia_jax.modalities.array import array
from gia_jax.modalities.base import Modality, Scored, Shown
from gia_jax.modalities.graph import graph
from gia_jax.modalities.image import image
from gia_jax.modalities.row import row
from gia_jax.modalities.schema import Field, Schema, fit_schema

__all__ = ["Field", "Modality", "Schema", "Scored", "Shown", "array", "fit_schema", "graph", "image", "row"]
