"""From PyTorch's tensors to the trees of JAX models: names, layouts of kernels, and the order of flattening.

A gradient and the parameters that it belongs to are converted alike, since all of it is a renaming and a permutation of
entries. PyTorch is not needed: tensors are arrays, or objects that behave as a `torch.Tensor` does.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from gia_jax.interop.layers import Layer, Names, paired
from gia_jax.interop.tensors import Struct, Tensor, as_numpy, fitted, joined, natural, several

Tensors = Mapping[str, Tensor] | Sequence[Tensor]
Flatten = Literal["auto"] | Mapping[str, tuple[int, ...]] | None
Layout = Literal["auto", "flax", "torch"]

# What a leaf of a JAX model is called in PyTorch.
ROLES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "weight": "weight",
    "w": "weight",
    "bias": "bias",
    "b": "bias",
    "offset": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"


class _Leaf(NamedTuple):
    """A leaf of the JAX model: its layer, its role in PyTorch, and what has to be done to PyTorch's array for it."""

    name: str
    layer: str
    role: str
    kind: Literal["convolution", "transposed", "dense", "plain"]
    struct: Struct

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in PyTorch's layout."""
        *spatial, features_in, features = self.struct.shape if self.kind != "plain" else (0, 0)
        if self.kind == "plain":
            return tuple(self.struct.shape)
        return (features_in, features, *spatial) if self.kind == "transposed" else (features, features_in, *spatial)


class _Given(NamedTuple):
    """What was given: arrays by layer and role, what messages call them, and whether their order is that of PyTorch."""

    arrays: dict[str, dict[str, np.ndarray]]
    labels: dict[tuple[str, str], str]
    is_ordered: bool

    def layers(self) -> list[Layer]:
        """The layers, for matching."""
        return [
            Layer(
                name,
                {role: array.shape for role, array in arrays.items()},
                {role: f"{self.labels[name, role]} of shape {array.shape}" for role, array in arrays.items()},
            )
            for name, arrays in self.arrays.items()
        ]


def from_torch(
    tensors: Tensors,
    like: PyTree[Struct],
    *,
    names: Names | None = None,
    flatten: Flatten = "auto",
    transposed: Collection[str] = (),
    layout: Layout = "auto",
) -> PyTree[Array]:
    """Puts the parameters of a PyTorch model, or an update of them, into the tree of a JAX model's parameters.

    Kernels change their layout: convolutions, grouped ones too, from (out, in, *window) to (*window, in, out), dense
    layers from (out, in) to (in, out). The inputs of a dense layer behind a flattened image change their order from
    channels first to channels last. The weight of a normalisation becomes its scale. Running statistics and
    `num_batches_tracked` are no parameters and are left out; `load_torch` puts statistics into a module.

    Layers are paired by `names`, else by their names if all of them agree, else by the shapes of all of their arrays.
    Layers of the same shapes are paired by names that differ in numbers only, in the order of these numbers: net.0,
    net.2, net.10 with conv1, conv2, conv3. Where nothing tells which is which, the call raises.

    Args:
        tensors: A state dict, gradients by the names of their parameters, or a list of arrays in the order of the state
            dict, as Flower sends them. A list has no names: give it as `dict(zip(state_dict, arrays))` if you can.
        like: Parameters of the JAX model as `models.functional` returns them, or their shapes and types. A list or
            tuple is filled by position.
        names: Path of the JAX model's layer, such as "block1.conv", for the prefix of PyTorch's, such as "net.3": a
            mapping, a function of the prefix (None leaves it to names and shapes), or a list of the paths in the order
            of `tensors`.
        flatten: "auto" finds the shape that is flattened before a dense layer, where its inputs are the channels of the
            convolution before it times a square number of pixels. A mapping from the dense layer's path to (channels,
            height, width), or to that with other axes of space, says it, and None says that no order changes. Say it
            for a dense layer right behind the image, for features that were joined, and for images that are no square.
        transposed: Paths of the layers that are transposed convolutions, without groups and in the form of
            `nnx.ConvTranspose(transpose_kernel=False)`. Shapes do not tell them from others.
        layout: Layout of `like`. In "flax" every leaf called kernel or w has channels last, and where no leaf has a
            name of this kind, every leaf of two axes or more. "torch" changes nothing. "auto" is "flax" for leaves
            called kernel and "torch" for all others, so that a model in PyTorch's own layout is left alone.

    Returns:
        A tree of the structure, shapes and types of `like`.

    Raises:
        ValueError: If arrays are missing, left over, not finite, no floating-point numbers or of other shapes, if two
            of them could be swapped, if it is not clear what a dense layer flattens, or an argument names no layer.

    Examples:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from gia_jax import interop, models
        >>> apply_fn, params = models.functional(models.MLP((4,), 3, hidden=(), rngs=nnx.Rngs(0)))
        >>> state_dict = {"fc.weight": np.arange(12.0).reshape(3, 4), "fc.bias": np.zeros(3)}
        >>> interop.from_torch(state_dict, params)["head"]["kernel"][0].tolist()
        [0.0, 4.0, 8.0]
    """
    leaves = _leaves(like, layout, transposed)
    with_statistics = any(leaf.role in STATISTICS for leaf in leaves)
    is_layered = any(leaf.role != "" for leaf in leaves)
    given = _given(tensors, with_statistics, is_layered)
    sources = _by_position(given, leaves, like, names) or _by_layer(given, leaves, names)
    shapes = _flattened(given, sources, leaves, flatten)
    made = []
    for leaf, (layer, role) in zip(leaves, sources, strict=True):
        array = _laid_out(given.arrays[layer][role], leaf.kind, shapes.get(leaf.layer))
        made.append(fitted(given.labels[layer, role], array, leaf.struct))
    return jax.tree.unflatten(jax.tree.structure(like), made)


def load_torch(
    module: nnx.Module,
    tensors: Tensors,
    *,
    names: Names | None = None,
    flatten: Flatten = "auto",
    transposed: Collection[str] = (),
) -> nnx.Module:
    """Copies a module with the parameters and the running statistics of a PyTorch model in it.

    Then `models.functional(module)` evaluates with PyTorch's running statistics. They mean the same in both libraries,
    except that PyTorch's running variance is of unbiased variances, which matters only to `models.inferred_statistics`.
    The constants of a module are its own: flax adds 1e-6 to the variance in `nnx.GroupNorm` and `nnx.LayerNorm` where
    PyTorch adds 1e-5, so give `epsilon=1e-5` there.

    Args:
        module: A `flax.nnx` module. It is not changed.
        tensors: State dict of the PyTorch model, or its arrays in order, with the running statistics.
        names: Path of the module's layer, such as "block1.conv", for the prefix of PyTorch's, such as "net.3". It is a
            mapping, a function, or a list in the order of `tensors`. None pairs layers by their names and shapes.
        flatten: Shape that is flattened before a dense layer: "auto" finds it, a mapping from the layer's path to
            (channels, height, width) says it, and None says that no order changes. `from_torch` explains it further.
        transposed: Paths of the layers that are transposed convolutions.

    Returns:
        The copy.

    Raises:
        ValueError: If `from_torch` refuses the arrays, or running statistics are missing.

    Examples:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from gia_jax import interop
        >>> state_dict = {"bn.weight": np.ones(2), "bn.bias": np.zeros(2), "bn.num_batches_tracked": np.array(7)}
        >>> state_dict |= {"bn.running_mean": np.full(2, 3.0), "bn.running_var": np.ones(2)}
        >>> interop.load_torch(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), state_dict).mean[...].tolist()
        [3.0, 3.0]
    """
    copy = nnx.clone(module)
    state = nnx.state(copy, nnx.Any(nnx.Param, nnx.BatchStat))
    like = nnx.to_pure_dict(state)
    made = from_torch(tensors, like, names=names, flatten=flatten, transposed=transposed, layout="flax")
    nnx.replace_by_pure_dict(state, made)
    nnx.update(copy, state)
    return copy


def _leaves(like: PyTree[Struct], layout: Layout, transposed: Collection[str]) -> list[_Leaf]:
    """Returns the leaves of the JAX model in the order of its tree. A role of "" stands for a tree without layers."""
    if layout not in ("auto", "flax", "torch"):
        raise ValueError(f"layout must be 'auto', 'flax' or 'torch', got {layout!r}")
    named = [(joined(path), leaf) for path, leaf in jax.tree.leaves_with_path(like)]
    if not named:
        raise ValueError("like must hold at least one array, got none")
    has_layers = any(name.rpartition(".")[2] in ROLES for name, _ in named)
    leaves = []
    for name, struct in named:
        layer, _, own = name.rpartition(".") if has_layers else (name, "", "")
        role = ROLES.get(own, own)
        kind = _kind(own, len(struct.shape), layout, layer in transposed)
        if layout == "auto" and own == "w" and len(struct.shape) > 1:
            raise ValueError(
                f"layout must be 'flax' or 'torch' where a kernel is called w, got 'auto' for {name!r}; tensors with "
                "the names and shapes of like take interop.unflatten"
            )
        leaves.append(_Leaf(name, layer, role, kind, struct))
    for path in transposed:
        if not any(leaf.layer == path and leaf.kind == "transposed" for leaf in leaves):
            raise ValueError(f"transposed must name convolutions of like, got {path!r}")
    return leaves


def _kind(
    own: str, num_axes: int, layout: Layout, is_transposed: bool
) -> Literal["convolution", "transposed", "dense", "plain"]:
    """Returns what is to be done for a leaf of this name and number of axes."""
    is_kernel = own == "kernel" or (layout == "flax" and own in ("w", ""))
    if layout == "torch" or not is_kernel or num_axes < 2:
        return "plain"
    if num_axes == 2:
        return "dense"
    return "transposed" if is_transposed else "convolution"


def _given(tensors: Tensors, with_statistics: bool, has_layers: bool) -> _Given:
    """Sorts what was given into layers."""
    if not isinstance(tensors, Mapping) and (isinstance(tensors, str) or not isinstance(tensors, Sequence)):
        raise ValueError(f"tensors must be a mapping or a list of arrays, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError("tensors must hold at least one array, got none")
    by_name = isinstance(tensors, Mapping)
    items = list(tensors.items()) if by_name else [(str(place), value) for place, value in enumerate(tensors)]
    labels = {name: f"tensors[{name!r}]" if by_name else f"tensors[{name}]" for name, _ in items}
    arrays = {name: as_numpy(labels[name], value) for name, value in items}
    is_ordered = not by_name or list(arrays) not in (sorted(arrays), sorted(arrays, key=natural))
    places = _places_by_name(arrays) if by_name else _places_by_order(list(arrays.values()))
    if not is_ordered:
        places = dict(sorted(places.items(), key=lambda item: natural(item[0])))
    given = _Given({}, {}, is_ordered)
    for name, (layer, role) in places.items():
        if role == COUNTER or (role in STATISTICS and not with_statistics):
            continue
        layer, role = (layer, role) if has_layers else (name, "")
        given.arrays.setdefault(layer, {})[role] = arrays[name]
        given.labels[layer, role] = labels[name]
    return given


def _places_by_name(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """Returns layer and role of every array, as its name says them."""
    return {name: (name.rpartition(".")[0], name.rpartition(".")[2]) for name in arrays}


def _places_by_order(arrays: list[np.ndarray]) -> dict[str, tuple[str, str]]:
    """Returns layer and role of every array in the order of a state dict, as shapes say them.

    A counter ends the block of a batch normalisation. An array of several axes begins a layer, and the first of an odd
    number of vectors behind it is its bias. All other vectors come in pairs, the weight and bias of a normalisation.
    """
    roles = _normalisations(arrays)
    layers = {place: first for place, (first, _) in roles.items()}
    place = 0
    while place < len(arrays):
        if place in roles:
            place += 1
            continue
        start = place
        if arrays[place].ndim >= 2:
            roles[place], layers[place] = (start, "weight"), start
            place += 1
        end = place
        while end < len(arrays) and end not in roles and arrays[end].ndim == 1:
            end += 1
        if (end - place) % 2 and place > start:
            roles[place] = (start, "bias")
            place += 1
        pairs = range(place, end - 1, 2)
        if end == start or (end - place) % 2 or any(arrays[i].shape != arrays[i + 1].shape for i in pairs):
            raise ValueError(
                f"tensors must come in the order of a state dict, got one of no layer at tensors[{place}] of shape "
                f"{arrays[min(place, len(arrays) - 1)].shape}: give them by name, as dict(zip(names, arrays))"
            )
        for i in pairs:
            roles[i], roles[i + 1] = (i, "weight"), (i, "bias")
        place = end
    starts = sorted({first for first, _ in roles.values()})
    return {str(i): (str(starts.index(roles[i][0])), roles[i][1]) for i in sorted(roles)}


def _normalisations(arrays: list[np.ndarray]) -> dict[int, tuple[int, str]]:
    """Returns first place and role of every array of a batch normalisation: those before an integer without axes."""
    roles: dict[int, tuple[int, str]] = {}
    for end, counter in enumerate(arrays):
        if counter.ndim or counter.dtype.kind not in "iu" or end < 2:
            continue
        shape = arrays[end - 1].shape
        affine = end >= 4 and all(array.shape == shape and array.ndim == 1 for array in arrays[end - 4 : end])
        block = ("weight", "bias", *STATISTICS, COUNTER) if affine else (*STATISTICS, COUNTER)
        first = end + 1 - len(block)
        roles |= {first + i: (first, role) for i, role in enumerate(block)}
    return roles


def _by_position(
    given: _Given, leaves: list[_Leaf], like: PyTree[Struct], names: Names | None
) -> list[tuple[str, str]] | None:
    """Returns layer and role for every leaf of a list or tuple, or None where `like` has names."""
    keys = [key for path, _ in jax.tree.leaves_with_path(like) for key in path]
    if not keys or not all(isinstance(key, jax.tree_util.SequenceKey) for key in keys):
        return None
    if names is not None:
        raise ValueError(f"names must be None where like is filled by position, got {names!r}")
    places = list(given.labels)
    if len(places) != len(leaves):
        raise ValueError(f"tensors must hold {len(leaves)} parameters as like does, got {len(places)}")
    problems = [
        f"like[{leaf.name}] is {leaf.shape} in PyTorch's layout, got {given.labels[place]} of shape "
        f"{given.arrays[place[0]][place[1]].shape}"
        for leaf, place in zip(leaves, places)
        if given.arrays[place[0]][place[1]].shape != leaf.shape
    ]
    if problems:
        raise several("tensors", "like", problems)
    return places


def _by_layer(given: _Given, leaves: list[_Leaf], names: Names | None) -> list[tuple[str, str]]:
    """Returns layer and role of what was given for every leaf."""
    wanted: dict[str, Layer] = {}
    for leaf in leaves:
        layer = wanted.setdefault(leaf.layer, Layer(leaf.layer, {}, {}))
        layer.shapes[leaf.role] = leaf.shape
        layer.own[leaf.role] = f"{leaf.name!r} of shape {tuple(leaf.struct.shape)}"
    pairs = paired(given.layers(), list(wanted.values()), names)
    return [(pairs[leaf.layer], leaf.role) for leaf in leaves]


def _laid_out(array: np.ndarray, kind: str, flattened: tuple[int, ...] | None) -> np.ndarray:
    """Returns PyTorch's array in the layout of the JAX model."""
    spatial = tuple(range(2, array.ndim))
    if kind == "convolution":
        return np.transpose(array, (*spatial, 1, 0))
    if kind == "transposed":  # PyTorch slides the mirrored window
        return np.flip(np.transpose(array, (*spatial, 0, 1)), tuple(range(len(spatial))))
    if kind == "dense":
        if flattened is not None:
            array = np.moveaxis(array.reshape(-1, *flattened), 1, -1).reshape(array.shape)
        return array.T
    return array


class _Step(NamedTuple):
    """The weight of a layer, on the way from the inputs to the outputs."""

    layer: str
    kind: str
    shape: tuple[int, ...]


def _flattened(
    given: _Given, sources: list[tuple[str, str]], leaves: list[_Leaf], flatten: Flatten
) -> dict[str, tuple[int, ...]]:
    """Returns the shape, channels first, that is flattened before each dense layer where one is."""
    inputs = {leaf.layer: leaf.shape[1] for leaf in leaves if leaf.kind == "dense"}
    if isinstance(flatten, Mapping):
        for layer, shape in flatten.items():
            if layer not in inputs:
                raise ValueError(f"flatten must name dense layers of like, {list(inputs)}, got {layer!r}")
            if math.prod(shape) != inputs[layer]:
                raise ValueError(f"flatten[{layer!r}] must be of {inputs[layer]} values, got {shape}")
        return dict(flatten)
    if flatten not in ("auto", None):
        raise ValueError(f"flatten must be 'auto', None or a mapping, got {flatten!r}")
    if flatten is None or not inputs:
        return {}
    place = {layer: i for i, layer in enumerate(given.arrays)}
    weights = [(place[layer], leaf) for leaf, (layer, role) in zip(leaves, sources) if role in ("weight", "")]
    steps = [_Step(leaf.layer, leaf.kind, leaf.shape) for _, leaf in sorted(weights, key=lambda pair: pair[0])]
    return _in_order(steps) if given.is_ordered else _in_any_order(steps)


def _in_order(steps: list[_Step]) -> dict[str, tuple[int, ...]]:
    """Returns what is flattened, for layers in PyTorch's own order."""
    found: dict[str, tuple[int, ...]] = {}
    last: _Step | None = None
    normalised = 0
    for step in steps:
        if step.kind in ("convolution", "transposed"):
            last, normalised = step, _channels(step)
        elif step.kind == "plain" and len(step.shape) == 1:
            normalised = step.shape[0]
        elif step.kind == "dense" and last is not None:
            shape = _square(step, last)
            if shape is None or (normalised == step.shape[1] != _channels(last)):
                raise _unclear(step, [last])
            found[step.layer], last = shape, None
    return found


def _in_any_order(steps: list[_Step]) -> dict[str, tuple[int, ...]]:
    """Returns what is flattened, for layers in the order of their names: all convolutions must say the same."""
    convolutions = [step for step in steps if step.kind in ("convolution", "transposed")]
    found: dict[str, tuple[int, ...]] = {}
    is_behind, left = False, len(convolutions)
    for step in steps:
        if step.kind in ("convolution", "transposed"):
            is_behind, left = True, left - 1
        elif step.kind == "dense" and (is_behind or left):
            shapes = {shape for one in convolutions if (shape := _square(step, one)) is not None}
            could_be = any(step.shape[1] % _channels(one) == 0 for one in convolutions)
            if len(shapes) > 1 or (left and could_be) or (is_behind and not shapes):
                raise _unclear(step, convolutions)
            if shapes:
                (found[step.layer],) = shapes
            is_behind = False
    return found


def _channels(step: _Step) -> int:
    """Returns the number of channels that a convolution has as outputs."""
    return step.shape[1] if step.kind == "transposed" else step.shape[0]


def _square(dense: _Step, convolution: _Step) -> tuple[int, ...] | None:
    """Returns the shape, channels first, that a dense layer takes if it is square, or None."""
    channels, axes = _channels(convolution), len(convolution.shape) - 2
    pixels, rest = divmod(dense.shape[1], channels)
    side = round(pixels ** (1 / axes))
    return None if rest or side**axes != pixels else (channels, *[side] * axes)


def _unclear(dense: _Step, convolutions: list[_Step]) -> ValueError:
    """Returns the error for a dense layer of which it is not known what it flattens."""
    behind = ", ".join(f"{one.layer!r} of {_channels(one)} channels" for one in convolutions[-3:])
    return ValueError(
        f"flatten must say what {dense.layer!r} takes, as its {dense.shape[1]} inputs behind {behind} do not tell: "
        f"pass flatten={{{dense.layer!r}: (channels, height, width)}}, or flatten=None where nothing is flattened"
    )
