"""Data whose examples are fields, numbers and categories: rows of Adult, and sentences of CoLA as rows of words.

They are read from $GIA_JAX_DATA_DIR: tabular/adult.data.gz and adult.test.gz, the files of the UCI repository (Becker
and Kohavi 1996), compressed; text/CoLA_train.tsv.gz, one sentence and label a line (Warstadt et al. 2019).
"""

import gzip
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gia_jax import data, models
from gia_jax.base import Params
from gia_jax.modalities import Field, Modality, Schema, row

GUESSES = {
    "commonest values": "commonest values",
    "commonest of the class": "of the class",
    "nearest row": "nearest row (chosen with the truth)",
    "nearest of the class": "nearest of the class (so too)",
}
TOLERANCE = 0.1  # standard deviations within which a number counts as right
NUM_WORDS, LEAST = 8, 10  # of a sentence at most, and how often a word occurs


class Rows(NamedTuple):
    """Examples by their fields: numbers in standard deviations, then the index of each category; shape (n, fields)."""

    fields: np.ndarray
    labels: np.ndarray


class Table(NamedTuple):
    """Rows for training and for tests, their schema, and the network for them.

    A network takes numbers and one-hot categories, shape (b, entries). An attack searches free entries, of which
    `decode` makes probabilities.

    Attributes:
        name: Of the files of figures.
        title: Of the rows, in words.
        what: More words on them and on the network.
        train: Rows that networks learn from.
        test: Rows that they do not.
        schema: Schema of the fields, with numbers before categories.
        num_classes: Of the labels.
        make: `(rngs) -> module`, the network.
        read: From updates with a leading axis of victims, and their fields, the share read off, shape (v,); None: this
            data has no such attack.
    """

    name: str
    title: str
    what: str
    train: Rows
    test: Rows
    schema: Schema
    num_classes: int
    make: Callable[[nnx.Rngs], nnx.Module]
    read: Callable[[Params, np.ndarray], np.ndarray] | None = None

    @property
    def modality(self) -> Modality:
        """The modality of the rows."""
        return row(self.schema, tolerance=TOLERANCE)

    def encode(self, fields: Float[Array, "*b fields"]) -> Float[Array, "*b entries"]:
        """What a network takes."""
        return self.schema.encode(fields)

    def right(self, fields: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """The share of fields that are right, shape (n,)."""
        return self.schema.right(fields, truth, tolerance=TOLERANCE).mean(-1)

    def guesses(self, truth: Rows, known: Rows) -> dict[str, np.ndarray]:
        """Fields that use no gradient: medians and commonest categories of public rows, and the nearest of them."""
        guesses = self.schema.guesses(truth.fields, known.fields, labels=truth.labels, public_labels=known.labels)
        return {shown: guesses[name] for name, shown in GUESSES.items()}


def folder() -> Path:
    """Where data sets are."""
    return Path(os.environ["GIA_JAX_DATA_DIR"])


def adult() -> Table:
    """Census data: is an income above 50,000 dollars?"""

    parts = {split: data.adult(split=split) for split in ("train", "test")}
    schema = Schema(
        tuple(
            # In float32, as the figures were computed.
            Field(name, float(column.mean()), float(column.std()))
            if column.dtype == np.float32
            else Field(name, categories=tuple(np.unique(column).tolist()))
            for name, column in parts["train"].columns.items()
        )
    )

    def rows(split: str) -> Rows:
        return Rows(schema.fields_of(parts[split].columns), parts[split].labels)

    return Table(
        "adult",
        "Adult",
        "MLP of two hidden layers of 100, ReLU",
        rows("train"),
        rows("test"),
        schema,
        2,
        lambda rngs: models.MLP((schema.num_entries,), 2, hidden=(100, 100), rngs=rngs),
    )


class SentenceNet(nnx.Module):
    """One block of attention over words, their mean, and a classifier.

    Args:
        num_places: Words of a sentence.
        num_words: That there are.
        num_classes: Outputs.
        width: Of a word's embedding.
        rngs: `nnx.Rngs`.
    """

    def __init__(self, num_places: int, num_words: int, num_classes: int, *, width: int = 32, rngs: nnx.Rngs) -> None:
        self.shape = (num_places, num_words)
        # A matrix product, as an attacker's words are probabilities.
        unit = nnx.initializers.normal(1.0)
        self.embedding = nnx.Linear(num_words, width, use_bias=False, kernel_init=unit, rngs=rngs)
        self.places = nnx.Param(unit(rngs.params(), (num_places, width)))
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, 2 * width, rngs=rngs)
        self.head = nnx.Linear(2 * width, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b entries"]) -> Float[Array, "b classes"]:
        """Logits of sentences, of each place the probabilities of the words."""
        words = self.embedding(x.reshape(len(x), *self.shape)) + self.places[...]
        words = self.norm(words + self.attention(words))
        return self.head(jax.nn.relu(self.hidden(words).mean(1)))


def words_read(update: Params, fields: np.ndarray) -> np.ndarray:
    """The share of each sentence's distinct words that the embedding's update gives away, shape (v,).

    A word that a sentence does not have leaves its row zero, so that without a defense the set of words is read off
    (Gupta et al., NeurIPS 2022): the words of the longest rows, as many as places. `update` has a leading axis v.
    """
    leaves = jax.tree.flatten_with_path(update)[0]
    (rows,) = (leaf for path, leaf in leaves if "embedding" in jax.tree_util.keystr(path))
    longest = np.argsort(-np.linalg.norm(rows, axis=-1), 1)[:, : fields.shape[1]]
    found = [np.isin(np.unique(own[own > 0]), rows).mean() for own, rows in zip(fields.astype(int), longest)]
    return np.asarray(found)


def cola() -> Table:
    """Sentences: does a linguist accept them?

    Those of at most `NUM_WORDS` words, each of which occurs `LEAST` times or more in the file, once each, without those
    that have both labels. The last fifth are test sentences: neighbours in the file often differ in one word. The blank
    behind a shorter sentence is a word too, the first.
    """
    with gzip.open(folder() / "text" / "CoLA_train.tsv.gz", "rt", encoding="utf8") as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    counts = Counter(word for sentence, _ in lines for word in sentence.split())
    words = ["", *sorted(word for word, number in counts.items() if number >= LEAST)]
    places = {word: i for i, word in enumerate(words)}
    accepted, refused = ({sentence for sentence, label in lines if label == one} for one in "10")
    kept = {
        sentence: int(label)
        for sentence, label in lines
        if len(sentence.split()) <= NUM_WORDS and all(word in places for word in sentence.split())
        if sentence not in accepted & refused
    }
    fields = np.zeros((len(kept), NUM_WORDS), np.float32)
    for places_of_one, sentence in zip(fields, kept):
        places_of_one[: len(sentence.split())] = [places[word] for word in sentence.split()]
    labels, num_train = np.asarray(list(kept.values()), np.int32), len(kept) - len(kept) // 5
    return Table(
        "text_cola",
        "sentences of CoLA",
        f"at most {NUM_WORDS} words of {len(words) - 1:,} that occur {LEAST} times or more, {np.mean(fields == 0):.0%} "
        "of the fields blank, which is a word too; the last fifth of the file are the test rows; one block of "
        "attention of width 32",
        Rows(fields[:num_train], labels[:num_train]),
        Rows(fields[num_train:], labels[num_train:]),
        Schema(tuple(Field(f"word {place}", categories=tuple(words)) for place in range(NUM_WORDS))),
        2,
        lambda rngs: SentenceNet(NUM_WORDS, len(words), 2, rngs=rngs),
        words_read,
    )


TABLES: dict[str, Callable[[], Table]] = {"adult": adult, "cola": cola}
