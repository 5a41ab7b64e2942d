"""The type checker of the tests, in the form that `--jaxtyping-packages` takes."""

from collections.abc import Callable
from typing import Any

import beartype

_known: dict[Any, Callable[..., Any]] = {}


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype.beartype`, which generates the check of a signature once and not at every definition of a closure.

    jaxtyping hands over functions that do nothing but have the signature. Of two with the same code, annotations and
    defaults, which read nothing from outside, one stands for both.
    """
    key = (fn.__module__, fn.__qualname__, fn.__code__, tuple(fn.__annotations__.items()), fn.__defaults__)
    key += (tuple((fn.__kwdefaults__ or {}).items()),)
    try:
        known = _known.get(key)
    except TypeError:  # a default is an array, say
        return beartype.beartype(fn)
    if fn.__closure__ or fn.__code__.co_names:
        return beartype.beartype(fn)
    if known is None:
        known = _known[key] = beartype.beartype(fn)
    return known
