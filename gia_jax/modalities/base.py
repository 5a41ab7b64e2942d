"""What every modality consists of."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from gia_jax import _check
from gia_jax.base import Batch, InitFn, PriorFn

DecodeFn = Callable[[PyTree[Array], Any], Batch]
ProjectFn = Callable[[PyTree[Array]], PyTree[Array]]
ScoreFn = Callable[[Batch, Batch], dict[str, np.ndarray]]
DrawFn = Callable[[Mapping[str, Batch], Path], None]


class Modality(NamedTuple):
    """What an example is.

    The batches of `score_fn`, `guess_fn` and `draw_fn` are those of one client, with a first axis b of examples, or of
    v victims, with the axes v and b.

    Attributes:
        init_fn: Function `(key, observation) -> z` that returns the first unknowns.
        decode_fn: Function `(z, labels) -> batch` that makes a batch as the model sees it from the unknowns.
        project_fn: Function `z -> z` that returns the nearest possible unknowns. None where all are possible.
        prior_fn: Prior `(batch, observation) -> ` scalar. None where no batch is less plausible than another one.
        like: Shapes and types of one example as the model sees it, without the axis of the batch.
        score_fn: Function `(found, truth) -> ` scores by name, each of shape (b,) or (v, b), higher is better for the
            first one. The order of the reconstructions plays no part: they are assigned to the true examples such that
            the sum of squared distances is least.
        guess_fn: Function `(truth, public) -> ` the first of these scores by the name of a guess. The guesses use
            public examples of the same kind and no gradient. A reconstruction says something of the gradient only as
            far as it is better.
        draw_fn: Function `(columns, path)` that writes a file, in which batches are shown beside each other under
            their headings.

    Examples:
        >>> from gia_jax import modalities
        >>> modality = modalities.image((8, 8, 1), mean=[0.3], std=[0.4])
        >>> sorted(modality.matching()), modality.inputs_like(2).shape
        (['decode_fn', 'init_fn', 'prior_fn', 'project_fn'], (2, 8, 8, 1))
    """

    init_fn: InitFn
    decode_fn: DecodeFn
    project_fn: ProjectFn | None
    prior_fn: PriorFn | None
    like: PyTree[jax.ShapeDtypeStruct]
    score_fn: ScoreFn
    guess_fn: ScoreFn
    draw_fn: DrawFn

    def matching(self) -> dict[str, Any]:
        """Returns what an attack needs of the modality, as arguments by name: `gradient_matching(client_fn, **them)`.

        Returns:
            The functions `init_fn`, `decode_fn`, `project_fn` and `prior_fn`.
        """
        names = ("init_fn", "decode_fn", "project_fn", "prior_fn")
        return {name: getattr(self, name) for name in names}

    def inputs_like(self, batch_size: int) -> PyTree[jax.ShapeDtypeStruct]:
        """Returns the shapes and types of a batch, for `observed` where an update is on record.

        Args:
            batch_size: Number of examples, at least 1.

        Returns:
            A tree like `like`, with a first axis of the examples.

        Raises:
            ValueError: If `batch_size` is no positive integer.
        """
        _check.integer(batch_size=batch_size)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype), self.like)


def class_labels(batch: Batch, shape: tuple[int, ...]) -> Int[np.ndarray, "..."] | None:
    """Reads the labels of a batch where they are class indices.

    Args:
        batch: Batch with labels of any kind.
        shape: Shape of the examples' axes, (b,) or (v, b).

    Returns:
        The labels on the host, or None where they are not one class index for each example.
    """
    labels = batch.labels
    if not isinstance(labels, jax.Array | np.ndarray) or labels.shape != shape:
        return None
    return np.asarray(labels) if jnp.issubdtype(labels.dtype, jnp.integer) else None
