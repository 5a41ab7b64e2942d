"""The data that the command line knows by name: examples of a modality, and public ones of the same kind."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gia_jax import _check, data, modalities, models
from gia_jax.base import Batch
from gia_jax.data import FeatureBlock, ImageData
from gia_jax.modalities import Modality
from gia_jax.models.layers import symmetric_uniform

NUM_OTHERS = 16  # examples of a client beside those of its batch, for defenses that mix examples
NUM_PUBLIC = 2_000  # examples of the training split that guesses without a gradient may use
PHOTO_SIZE = 32  # pixels, unless another size is asked for
MAX_NODES, NUM_PUBLIC_GRAPHS = 30, 100  # of a graph; graphs that guesses may use
GRAPH_BIAS = 0.3  # biases of graph networks are drawn from U(-0.3, 0.3)


class Examples(NamedTuple):
    """Examples of one kind.

    Attributes:
        name: Name of the set and its split.
        modality: What an example is.
        batch: Labelled examples in the model's space, in the order of the set.
        public: Examples in the model's space, none of them a victim's, without labels. There may be none.
        num_classes: Number of classes.
        images: The set of images, where the examples are images.
        blocks: What the features of nodes are, where the examples are graphs.
        grants: Parts of the inputs that the threat model grants, for `ThreatModel.inputs`.
    """

    name: str
    modality: Modality
    batch: Batch
    public: Batch
    num_classes: int
    images: ImageData | None = None
    blocks: tuple[FeatureBlock, ...] = ()
    grants: tuple[str, ...] = ()

    @property
    def bounds(self) -> tuple | None:
        """Darkest and brightest pixel in the model's space; None for data that are no images."""
        if self.images is None:
            return None
        return tuple(bound.astype(self.batch.inputs.dtype) for bound in self.images.bounds())


class Kind(NamedTuple):
    """What the command line says of data, and how they are read.

    Attributes:
        name: What the examples are: "images", "rows" or "graphs".
        load: Function `(name, count) -> Examples` that reads at least the first `count` examples, and up to
            `NUM_OTHERS` more. It raises ValueError if there are fewer than `count`, before it reads other data. That
            of images also takes the `size` of photographs.
        models: Models that take such examples, by name, each a function that `build` calls.
        build: Function `(make, examples, rngs) -> module` that makes a model for such examples.
        model: Name of the model that is attacked by default. None takes that of the attack.
    """

    name: str
    load: Callable[..., Examples]
    models: Mapping[str, Callable[..., nnx.Module]]
    build: Callable[[Callable[..., nnx.Module], Examples, nnx.Rngs], nnx.Module]
    model: str | None = None


def build_of_array(make: Callable[..., nnx.Module], examples: Examples, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a model of inputs that are one array, by their shape."""
    return make(examples.modality.like.shape, examples.num_classes, rngs=rngs)


def build_of_graphs(make: Callable[..., nnx.Module], examples: Examples, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a graph network, whose biases are not 0: without a bias many neighbourhoods look alike to ReLU."""
    features = sum(len(block.names) for block in examples.blocks)
    return make(features, examples.num_classes, bias_init=symmetric_uniform(GRAPH_BIAS), rngs=rngs)


def _check_enough(name: str, have: int, count: int) -> None:
    """Raises ValueError for a data set with fewer examples than needed."""
    if have < count:
        raise ValueError(f"--victims times --batch-size must be at most {have} for {name}, got {count}")


def load_images(name: str, count: int, *, size: int = PHOTO_SIZE) -> Examples:
    """Reads images: "photos" of `size` pixels, "digits", or a data set of TFDS. `Kind.load` says the rest."""
    small = name in ("photos", "digits")
    if name == "photos":
        images = data.photos(size=size)
    else:
        images = data.load(name) if small else data.load(name, limit=count + NUM_OTHERS)
    _check_enough(name, len(images.images), count)
    kept = np.arange(len(images.images)) >= count
    if name == "photos":  # parts of a victim's photograph are no public ones
        kept = ~np.isin(images.labels, images.labels[:count])
    public = images.images[kept] if small else data.load(name, split="train", limit=NUM_PUBLIC).images
    dtype = jnp.result_type(float)
    batch, others = (jnp.asarray(images.normalize(pixels.astype(dtype))) for pixels in (images.images, public))
    modality = modalities.image(images.images.shape[1:], mean=images.mean, std=images.std, dtype=dtype)
    labelled = Batch(batch, jnp.asarray(images.labels))
    return Examples(images.name, modality, labelled, Batch(others, ()), len(images.class_names), images)


def load_adult(name: str, count: int) -> Examples:
    """Reads rows of Adult, with the schema of its training split. `Kind.load` says the rest."""
    rows = data.adult(split="test", limit=count + NUM_OTHERS)
    _check_enough(name, len(rows.labels), count)
    known = data.adult(split="train")
    schema, dtype = modalities.fit_schema(known.columns), jnp.result_type(float)
    batch, public = (
        schema.encode(jnp.asarray(schema.fields_of(columns), dtype))
        for columns in (rows.columns, {name: column[:NUM_PUBLIC] for name, column in known.columns.items()})
    )
    labelled = Batch(batch, jnp.asarray(rows.labels))
    return Examples(rows.name, modalities.row(schema), labelled, Batch(public, ()), len(rows.class_names))


def load_molecules(name: str, count: int) -> Examples:
    """Reads graphs of at most `MAX_NODES` nodes, with one-hot labels and degrees. `Kind.load` says the rest."""
    found = data.load_graphs(name, max_nodes=MAX_NODES, limit=count + NUM_OTHERS + NUM_PUBLIC_GRAPHS)
    _check_enough(name, len(found.labels), count)
    dtype = jnp.result_type(float)
    arrays = {part: jnp.asarray(getattr(found, part), dtype) for part in _check.GRAPH_PARTS}
    modality = modalities.graph(found.blocks, MAX_NODES, grants=("mask",), dtype=dtype)
    return Examples(
        f"{found.name}, graphs of at most {MAX_NODES} nodes with one-hot labels and degrees",
        modality,
        Batch(arrays, jnp.asarray(found.labels)),
        Batch({part: array[count:] for part, array in arrays.items()}, ()),
        len(found.class_names),
        blocks=tuple(found.blocks),
        grants=("mask",),
    )


IMAGES = Kind("images", load_images, models.MODELS, build_of_array)
GRAPHS = Kind("graphs", load_molecules, models.GRAPH_MODELS, build_of_graphs, "gcn")
ROWS = Kind("rows", load_adult, {name: models.MODELS[name] for name in ("linear", "mlp")}, build_of_array, "mlp")
KINDS = {"adult": ROWS} | dict.fromkeys(("mutag", "ptc_mr", "aids", "enzymes"), GRAPHS)  # of data that are no images
DATA_SETS = {
    "photos": "scikit-image's photographs",
    "digits": "scikit-learn's digits",
    "adult": "rows of census records, numbers and categories, in $GIA_JAX_DATA_DIR/tabular",
    "mutag, ptc_mr, aids, enzymes": "graphs of TUDataset, molecules and proteins, in $GIA_JAX_DATA_DIR/graphs",
    "any TFDS set": "images that are prepared, such as mnist, cifar10, cifar100",
}
DATA = f"photos, digits, {', '.join(KINDS)}, or a prepared TFDS set of images such as mnist, cifar10, cifar100"


def kind_of(name: str) -> Kind:
    """Returns what kind of data a name stands for."""
    return KINDS.get(name, IMAGES)


def load_examples(name: str, count: int, *, image_size: int | None = None) -> Examples:
    """Reads data by their name.

    Args:
        name: Key of `KINDS`, or the name of a set of images, for `gia_jax.data.load`.
        count: Number of examples that are needed, at least 1.
        image_size: Height and width of photographs in pixels, at least 1. None is `PHOTO_SIZE` for photographs, and
            must be given for all other data, which have their own size.

    Returns:
        At least as many examples.

    Raises:
        ValueError: If the set is unknown, cannot be read, or has fewer examples.
    """
    try:
        options = {} if image_size is None else {"size": image_size}
        return kind_of(name).load(name, count, **options)
    except ValueError as error:
        if str(error).startswith("data must be"):  # of `data.load`, which knows images only
            raise ValueError(f"--data must be {DATA}, got {name!r}") from None
        raise
