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
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gia_jax import models
from gia_jax.base import Params

NUMBERS = (0, 2, 4, 10, 11, 12)  # columns of Adult's file: age, weight, years of education, gains, losses, hours
CATEGORIES = (1, 3, 5, 6, 7, 8, 9, 13)
TOLERANCE = 0.1  # standard deviations within which a number counts as right
NUM_WORDS, LEAST = 8, 10  # of a sentence at most, and how often a word occurs


class Rows(NamedTuple):
    """Examples by their fields: numbers in standard deviations, then the index of each category; shape (n, fields)."""

    fields: np.ndarray
    labels: np.ndarray


class Table(NamedTuple):
    """Rows for training and for tests, of how many entries each category is, and the network for them.

    A network takes numbers and one-hot categories, shape (b, entries). An attack searches free entries, of which
    `decode` makes probabilities.

    Attributes:
        name: Of the files of figures.
        title: Of the rows, in words.
        what: More words on them and on the network.
        train: Rows that networks learn from.
        test: Rows that they do not.
        sizes: Entries of each category.
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
    sizes: tuple[int, ...]
    num_classes: int
    make: Callable[[nnx.Rngs], nnx.Module]
    read: Callable[[Params, np.ndarray], np.ndarray] | None = None

    @property
    def num_numbers(self) -> int:
        """Fields before the categories."""
        return self.train.fields.shape[1] - len(self.sizes)

    @property
    def num_entries(self) -> int:
        """Inputs of the network."""
        return self.num_numbers + sum(self.sizes)

    @property
    def starts(self) -> np.ndarray:
        """The first entry of each category."""
        return self.num_numbers + np.cumsum([0, *self.sizes[:-1]])

    def parts(self, entries: Array | np.ndarray) -> list[Array | np.ndarray]:
        """The numbers, and the entries of each category."""
        ends = [*self.starts, self.num_entries]
        return [entries[..., start:end] for start, end in zip([0, *ends], ends)]

    def encode(self, fields: Float[Array, "*b fields"]) -> Float[Array, "*b entries"]:
        """What a network takes."""
        numbers, indices = fields[..., : self.num_numbers], fields[..., self.num_numbers :].astype(jnp.int32)
        one_hot = [jax.nn.one_hot(indices[..., i], size) for i, size in enumerate(self.sizes)]
        return jnp.concatenate([numbers, *one_hot], -1)

    def decode(self, free: Float[Array, "*b entries"]) -> Float[Array, "*b entries"]:
        """From free entries to rows: each category has probabilities."""
        numbers, *categories = self.parts(free)
        return jnp.concatenate([numbers, *(jax.nn.softmax(part) for part in categories)], -1)

    def free(self, fields: Float[Array, "*b fields"]) -> Float[Array, "*b entries"]:
        """Free entries that `decode` makes these rows of, categories to within 1e-9."""
        numbers, *categories = self.parts(self.encode(fields))
        return jnp.concatenate([numbers, *(30 * part for part in categories)], -1)

    def likeliest(self, entries: np.ndarray) -> np.ndarray:
        """The fields of rows of probabilities."""
        numbers, *categories = self.parts(entries)
        return np.concatenate([numbers, *(np.argmax(part, -1)[..., None] for part in categories)], -1)

    def right(self, fields: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """The share of fields that are right, shape (n,)."""
        near = np.abs(fields - truth)[:, : self.num_numbers] <= TOLERANCE
        return np.mean(np.concatenate([near, (fields == truth)[:, self.num_numbers :]], -1), -1)

    def distances(self, entries: np.ndarray, fields: np.ndarray) -> np.ndarray:
        """Squared, from rows of entries to rows by their fields, one-hot, shape (entries' rows, fields' rows)."""
        numbers, indices = fields[:, : self.num_numbers], fields[:, self.num_numbers :].astype(int) + self.starts
        squares = np.square(entries[:, None, : self.num_numbers] - numbers[None]).sum(-1)
        probabilities = entries[:, self.num_numbers :]
        shared = sum(entries[:, index] for index in indices.T)
        return squares + np.square(probabilities).sum(1)[:, None] - 2 * shared + len(self.sizes)

    def guesses(self, truth: Rows, known: Rows) -> dict[str, np.ndarray]:
        """Fields that use no gradient: medians and commonest categories of public rows, and the nearest of them."""

        def commonest(rows: np.ndarray) -> np.ndarray:
            counts = [np.bincount(column.astype(int)).argmax() for column in rows[:, self.num_numbers :].T]
            return np.concatenate([np.median(rows[:, : self.num_numbers], 0), counts])

        def nearest(rows: np.ndarray, fields: np.ndarray) -> np.ndarray:
            return rows[np.argmin(self.distances(np.asarray(self.encode(jnp.asarray(fields))), rows), 1)]

        classes = [known.fields[known.labels == c] for c in range(self.num_classes)]
        of_class = np.stack([commonest(rows) for rows in classes])
        return {
            "commonest values": np.broadcast_to(commonest(known.fields), truth.fields.shape),
            "of the class": of_class[truth.labels],
            "nearest row (chosen with the truth)": nearest(known.fields, truth.fields),
            "nearest of the class (so too)": np.concatenate(
                [nearest(classes[label], fields[None]) for label, fields in zip(truth.labels, truth.fields)]
            ),
        }


def folder() -> Path:
    """Where data sets are."""
    return Path(os.environ["GIA_JAX_DATA_DIR"])


def index_of(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Places of values in a sorted list that has them all."""
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    if np.any(known[places] != values):
        raise ValueError(f"values must be among {known}, got {values[known[places] != values][0]}")
    return places


def adult() -> Table:
    """Census data: is an income above 50,000 dollars?"""

    def lines(name: str) -> np.ndarray:
        with gzip.open(folder() / "tabular" / name, "rt") as file:
            split = (line.strip().rstrip(".").split(", ") for line in file)
            return np.asarray([fields for fields in split if len(fields) == 15])

    parts = {name: lines(f"adult.{name}.gz") for name in ("data", "test")}
    numbers = {name: part[:, NUMBERS].astype(np.float32) for name, part in parts.items()}
    mean, std = numbers["data"].mean(0), numbers["data"].std(0)
    values = [np.unique(parts["data"][:, column]) for column in CATEGORIES]

    def rows(name: str) -> Rows:
        indices = [index_of(known, parts[name][:, column])[:, None] for column, known in zip(CATEGORIES, values)]
        fields = np.concatenate([(numbers[name] - mean) / std, *indices], 1).astype(np.float32)
        return Rows(fields, (parts[name][:, 14] == ">50K").astype(np.int32))

    sizes = tuple(map(len, values))
    entries = len(NUMBERS) + sum(sizes)
    return Table(
        "adult",
        "Adult",
        "MLP of two hidden layers of 100, ReLU",
        rows("data"),
        rows("test"),
        sizes,
        2,
        lambda rngs: models.MLP((entries,), 2, hidden=(100, 100), rngs=rngs),
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
    for row, sentence in zip(fields, kept):
        row[: len(sentence.split())] = [places[word] for word in sentence.split()]
    labels, num_train = np.asarray(list(kept.values()), np.int32), len(kept) - len(kept) // 5
    return Table(
        "text_cola",
        "sentences of CoLA",
        f"at most {NUM_WORDS} words of {len(words) - 1:,} that occur {LEAST} times or more, {np.mean(fields == 0):.0%} "
        "of the fields blank, which is a word too; the last fifth of the file are the test rows; one block of "
        "attention of width 32",
        Rows(fields[:num_train], labels[:num_train]),
        Rows(fields[num_train:], labels[num_train:]),
        (len(words),) * NUM_WORDS,
        2,
        lambda rngs: SentenceNet(NUM_WORDS, len(words), 2, rngs=rngs),
        words_read,
    )


TABLES: dict[str, Callable[[], Table]] = {"adult": adult, "cola": cola}
