"""Which layer of one model is which of another: by names, else by shapes, else by numbers in names, else an error."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from gia_jax.interop.tensors import several

Names = Mapping[str, str] | Sequence[str] | Callable[[str], str | None]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Layer(NamedTuple):
    """A layer, which is what matching pairs.

    Attributes:
        name: Name of the layer, such as "layer1.0.conv1".
        shapes: Shapes of its arrays in PyTorch's layout, by their roles there, such as "weight".
        own: Names and shapes of its arrays as their owner has them, by the same roles.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    own: dict[str, str]

    @property
    def kind(self) -> Shapes:
        """The roles and shapes, in a form that can be compared."""
        return tuple(sorted(self.shapes.items()))


def paired(given: Sequence[Layer], wanted: Sequence[Layer], names: Names | None) -> dict[str, str]:
    """Pairs the layers of what was given with those of the model that it is for.

    First come the pairs of `names`. If the rest has the same names on both sides, names decide. If not, layers with
    the same arrays of the same shapes are paired: where there is one of them, or where they have the same names, or
    where their names differ in numbers only, in the order of these numbers.

    Args:
        given: Layers of what was given, in its order.
        wanted: Layers of the model.
        names: Names of the model's layers, for those of what was given: a mapping, a function, or a list in the order
            of `given`. None leaves all to names and shapes.

    Returns:
        The name of the given layer for the name of every layer of the model.

    Raises:
        ValueError: If layers do not fit, are missing or left over, or could be swapped.

    Examples:
        >>> from gia_jax.interop.layers import Layer, paired
        >>> given = [Layer("net.0", {"weight": (3, 2)}, {}), Layer("net.2", {"weight": (1, 3)}, {})]
        >>> wanted = [Layer("first", {"weight": (3, 2)}, {}), Layer("head", {"weight": (1, 3)}, {})]
        >>> paired(given, wanted, None)
        {'first': 'net.0', 'head': 'net.2'}
    """
    pairs = _asked_for(given, wanted, names)
    taken = set(pairs.values())
    rest_given = [layer for layer in given if layer.name not in taken]
    rest_wanted = [layer for layer in wanted if layer.name not in pairs]
    problems: list[str] = []
    if {layer.name for layer in rest_given} == {layer.name for layer in rest_wanted}:
        pairs |= {layer.name: layer.name for layer in rest_wanted}
    else:
        found, problems = _by_shapes(rest_given, rest_wanted)
        pairs |= found
    sources = {layer.name: layer for layer in given}
    for layer in wanted:
        source = sources.get(pairs.get(layer.name, ""))
        if layer.name in pairs and source is not None and source.kind != layer.kind:
            problems += _differences(source, layer)
    if problems:
        raise several("tensors", "like", problems)
    return {layer.name: pairs[layer.name] for layer in wanted}


def _asked_for(given: Sequence[Layer], wanted: Sequence[Layer], names: Names | None) -> dict[str, str]:
    """Returns the pairs of `names`, or raises ValueError for a name that is none."""
    if names is None:
        return {}
    known, targets = [layer.name for layer in given], [layer.name for layer in wanted]
    if isinstance(names, Mapping):
        pairs: dict[str, str | None] = dict(names)
    elif callable(names):
        pairs = {name: names(name) for name in known}
    else:
        if isinstance(names, str) or len(names) != len(known):
            raise ValueError(f"names must name {len(known)} layers, one for each of {known}, got {names!r}")
        pairs = dict(zip(known, names))
    asked: dict[str, str] = {}
    for source, target in pairs.items():
        if target is None:
            continue
        _known("names", source, known, "tensors")
        _known(f"names[{source!r}]", target, targets, "like")
        if target in asked:
            raise ValueError(f"names must be of different layers, got {target!r} for {asked[target]!r} and {source!r}")
        asked[target] = source
    return asked


def _known(argument: str, name: str, names: list[str], owner: str) -> None:
    """Raises ValueError for a name that is none of the layers'."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0)
        hint = f", the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"{argument} must be a layer of {owner}, got {name!r}{hint}")


def _by_shapes(given: Sequence[Layer], wanted: Sequence[Layer]) -> tuple[dict[str, str], list[str]]:
    """Returns the pairs of layers with the same arrays, and what has none; raises ValueError where two could swap."""
    pairs: dict[str, str] = {}
    lone_given, lone_wanted, problems = [], [], []
    for kind in dict.fromkeys(layer.kind for layer in (*given, *wanted)):
        sources = [layer.name for layer in given if layer.kind == kind]
        targets = [layer.name for layer in wanted if layer.kind == kind]
        if not targets:
            lone_given += [layer for layer in given if layer.kind == kind]
        elif not sources:
            lone_wanted += [layer for layer in wanted if layer.kind == kind]
        elif len(sources) != len(targets):
            problems.append(f"of {_words(kind)} tensors has {_list(sources)} and like has {_list(targets)}")
        else:
            pairs |= _of_one_kind(sources, targets, kind)
    return pairs, problems + _without(lone_given, lone_wanted)


def _of_one_kind(sources: list[str], targets: list[str], kind: Shapes) -> dict[str, str]:
    """Returns the pairs of layers that all have the same shapes."""
    ours, theirs = _by_words(sources), _by_words(targets)
    pairs: dict[str, str] = {}
    for words in set(ours) & set(theirs):
        if len(ours[words]) == len(theirs[words]):
            pairs |= dict(zip(theirs.pop(words), ours.pop(words)))
    sizes, other_sizes = ([len(group) for group in groups.values()] for groups in (ours, theirs))
    if sorted(sizes) != sorted(other_sizes) or len(set(sizes)) != len(sizes):
        left = [name for group in ours.values() for name in group]
        open_targets = [name for group in theirs.values() for name in group]
        example = ", ".join(f"{source!r}: {target!r}" for source, target in zip(left, open_targets))
        raise ValueError(
            f"tensors could be swapped, and their names do not tell which of {_list(left)} is which of "
            f"{_list(open_targets)}, each with {_words(kind)}: pass names={{{example}}} if that is right"
        )
    by_size = {len(group): group for group in ours.values()}
    for group in theirs.values():
        pairs |= dict(zip(group, by_size[len(group)]))
    return pairs


def _by_words(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names that differ in numbers only, each group in the order of its numbers."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: [int(number) for number in re.findall(r"[0-9]+", name)]):
        groups.setdefault(re.sub(r"[0-9]+", "#", name), []).append(name)
    return groups


def _words(kind: Shapes) -> str:
    return " and ".join(f"{role} {shape}" for role, shape in kind)


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _without(given: list[Layer], wanted: list[Layer]) -> list[str]:
    """Returns a line for every layer that has no partner, with the nearest one where there is one."""
    problems, left = [], list(given)
    for layer in wanted:
        if not left:
            problems += [f"{name} is missing" for name in layer.own.values()]
            continue
        nearest = min(left, key=lambda other: _distance(layer, other))
        left.remove(nearest)
        problems += _differences(nearest, layer)
    return problems + [f"{name} is left over" for layer in left for name in layer.own.values()]


def _differences(source: Layer, target: Layer) -> list[str]:
    """Returns a line for every array in which a layer differs from its partner, or from the nearest."""
    lines = []
    for role, shape in target.shapes.items():
        if role not in source.shapes:
            lines.append(f"{target.own[role]} is missing beside the nearest layer, {source.name!r}")
        elif source.shapes[role] != shape:
            lines.append(f"{target.own[role]} is {shape} in PyTorch's layout, the nearest is {source.own[role]}")
    return lines + [f"{name} is left over" for role, name in source.own.items() if role not in target.shapes]


def _distance(one: Layer, other: Layer) -> tuple[int, int, float, float]:
    """Returns how unlike two layers are: in their arrays, their numbers of axes, their names and their sizes."""
    roles = set(one.shapes) ^ set(other.shapes)
    common = [(one.shapes[role], other.shapes[role]) for role in set(one.shapes) & set(other.shapes)]
    axes = sum(abs(len(a) - len(b)) for a, b in common)
    sizes = math.fsum(abs(math.log((1 + math.prod(a)) / (1 + math.prod(b)))) for a, b in common)
    return len(roles), axes, sizes, 1 - difflib.SequenceMatcher(None, one.name, other.name).ratio()
