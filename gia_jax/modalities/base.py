"""What every modality consists of."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from gia_jax import _check
from gia_jax.base import Batch, DecodeFn, InitFn, PriorFn, ProjectFn


class Scored(NamedTuple):
    """Reconstructions that were assigned to the true examples, and their scores.

    Attributes:
        scores: Scores of every true example by name, each of shape (b,) or (v, b). The first one is what an attack is
            judged by, and higher is better for it.
        batch: Reconstructions in the order of the true examples, with the axes of the truth.
    """

    scores: dict[str, np.ndarray]
    batch: Batch

    def of(self, victims: int | slice) -> "Scored":
        """Returns the scores and reconstructions of some victims, of one without its axis.

        Args:
            victims: Index of a victim, or a slice of several.
        """
        # Not by `jax.tree.map`, which sorts the names: the first score is the one that counts.
        scores = {name: values[victims] for name, values in self.scores.items()}
        return Scored(scores, jax.tree.map(lambda leaf: leaf[victims], self.batch))


class Shown(NamedTuple):
    """How a table or a caption writes a score.

    Attributes:
        heading: Heading of the column.
        form: Format of a number, such as ".1f".
        unit: What stands behind the number in a caption, such as " dB".
        average: How several examples are summed up: by their "median", or by their "mean" where scores are 0 or 1.
    """

    heading: str
    form: str
    unit: str = ""
    average: Literal["median", "mean"] = "median"

    def text(self, score: float) -> str:
        """Writes a score without its unit."""
        return format(score, self.form)

    def summary(self, scores: np.ndarray) -> str:
        """Writes the median or mean of several scores."""
        return self.text(float(np.mean(scores) if self.average == "mean" else np.median(scores)))


class DrawFn(Protocol):
    """Function that writes a file in which a person sees examples."""

    def __call__(
        self,
        columns: Mapping[str, Batch],
        path: Path,
        *,
        captions: Mapping[str, Sequence[str]] | None = None,
        title: str = "",
    ) -> None:
        """Writes the file.

        Args:
            columns: Batches under their headings, of as many examples each.
            path: Path of the file, whose folder must exist.
            captions: Lines of text beside the examples of a column, one for each, by the column's heading.
            title: Text above all.
        """
        ...


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
        score_fn: Function `(found, truth) -> Scored`. The order of the reconstructions plays no part: they are assigned
            to the true examples such that the sum of squared distances is least.
        shown: How the scores of `score_fn` that people read are written, by their names, the first score first.
        guess_fn: Function `(truth, public) -> ` the first of these scores by the name of a guess. The guesses use
            public examples of the same kind and no gradient. A reconstruction says something of the gradient only as
            far as it is better.
        draw_fn: Function `(columns, path, captions=, title=)` that writes a file, in which batches are shown beside
            each other under their headings. None where there is nothing for a person to see.
        suffix: Ending of the name of such a file, such as ".png".
        pixels_fn: Function `batch -> (pixels, note)` that returns the examples as images in [0, 1], shape (n, h, w, c),
            and a note on how the pixels were changed to fit that range, "" if they were not. None if examples are not
            images.

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
    score_fn: Callable[[Batch, Batch], Scored]
    shown: Mapping[str, Shown]
    guess_fn: Callable[[Batch, Batch], dict[str, np.ndarray]]
    draw_fn: DrawFn | None = None
    suffix: str = ".png"
    pixels_fn: Callable[[Batch], tuple[np.ndarray, str]] | None = None

    @property
    def main(self) -> str:
        """Name of the score that an attack is judged by."""
        return next(iter(self.shown))

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


def filled(name: str, shape: Sequence[int]) -> None:
    """Checks that there are examples to be scored.

    Args:
        name: Name of the batch, for the message.
        shape: Shape of its inputs.

    Raises:
        ValueError: If one of the axes is empty.
    """
    if 0 in shape:
        raise ValueError(f"{name}.inputs must hold at least one example, got the shape {tuple(shape)}")


def reordered(batch: Batch, assignment: Int[np.ndarray, "v b"]) -> Batch:
    """Brings reconstructions into the order of the true examples.

    Args:
        batch: Reconstructions of v victims, a tree of arrays with the axes v and b.
        assignment: Index of the reconstruction that is assigned to each true example.

    Returns:
        The reconstructions on the host, in the order of the truth.
    """
    victims = np.arange(len(assignment))[:, None]
    return jax.tree.map(lambda leaf: np.asarray(leaf)[victims, assignment], batch)
