"""From a flax.nnx module to plain functions of a nested dict of parameters: the only shape of model the library needs.

Models of other libraries (linen, haiku, equinox, hand-written) already are such functions, or become one by a lambda.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import Params, Statistics

ApplyFn = Callable[[Params, Float[Array, "b *d"]], Float[Array, "b c"]]
BatchNormMode = Literal["evaluation", "training", "exact"]


def functional(
    module: nnx.Module, *, batch_norm: BatchNormMode = "evaluation", statistics: Statistics | None = None
) -> tuple[ApplyFn, Params]:
    """The forward pass of a module as a pure function, and its parameters.

    Batch normalisation has three modes, and they are three threat models:

    * "evaluation": running statistics, the same for client and attacker. The usual setting of published attacks.
    * "training": each forward pass uses the statistics of its own batch; the running ones do not change.
    * "exact": `statistics` in place of the running ones, such as those of the client's own batch.

    Args:
        module: Any `flax.nnx` module. It is not changed; dropout is off except in "training" mode, which needs none.
        batch_norm: The mode.
        statistics: Mean and biased variance of every batch-normalisation layer in the order of the forward pass, for
            the mode "exact"; they may be traced.

    Returns:
        `apply_fn(params, inputs) -> ` outputs, and params as a nested dict of arrays. It raises ValueError, naming the
        entry, for parameters of another structure or of other shapes.

    Raises:
        ValueError: An unknown mode, or statistics given or missing against it.
    """
    if batch_norm not in ("evaluation", "training", "exact"):
        raise ValueError(f"batch_norm must be 'evaluation', 'training' or 'exact', got {batch_norm!r}")
    if (statistics is None) == (batch_norm == "exact"):
        raise ValueError(
            f"statistics are for batch_norm='exact' and needed there, got {statistics is not None} with {batch_norm!r}"
        )
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    like = jax.eval_shape(lambda: nnx.to_pure_dict(params))

    def apply_fn(params: Params, inputs: Float[Array, "b *d"]) -> Float[Array, "b *c"]:
        _check.same_structure("params", params, "the module", like)
        model = nnx.merge(graph, params, rest, copy=True)
        model.train() if batch_norm == "training" else model.eval()
        if statistics is None:
            return model(inputs)
        take = functools.partial(next, iter(statistics), None)
        _wrap_batch_norms(model, lambda norm: _WithStatistics(norm, take))
        outputs = model(inputs)
        if take() is not None:
            raise ValueError("statistics must have one entry for every batch-normalisation layer, got more")
        return outputs

    return apply_fn, nnx.to_pure_dict(params)


def headless(module: nnx.Module, name: str = "head") -> nnx.Module:
    """A copy of a module without its last layer: its outputs are the features.

    Args:
        module: Any `flax.nnx` module whose forward pass ends in the layer `name`.
        name: Of the layer, an attribute of the module.

    Returns:
        The copy.

    Raises:
        ValueError: If there is no such attribute.
    """
    if not hasattr(module, name):
        raise ValueError(f"name must be a layer of {type(module).__name__}, got {name!r}")
    body = nnx.clone(module)
    setattr(body, name, _Identity())
    return body


class _Identity(nnx.Module):
    def __call__(self, x: Array) -> Array:
        return x


def batch_norm_inputs(module: nnx.Module, *, batch_norm: Literal["evaluation", "training"] = "evaluation"):
    """The statistics of what enters the batch-normalisation layers of a module.

    Args:
        module: Any `flax.nnx` module with `nnx.BatchNorm` layers.
        batch_norm: The mode the forward pass runs in.

    Returns:
        `statistics_fn(params, inputs) -> ` mean and biased variance over all axes but the last of every layer's input,
        in the order of the forward pass. It raises ValueError if there is no such layer.
    """
    graph, _, rest = nnx.split(module, nnx.Param, ...)

    def statistics_fn(params: Params, inputs: Float[Array, "b *d"]) -> Statistics:
        model = nnx.merge(graph, params, rest, copy=True)
        model.train() if batch_norm == "training" else model.eval()
        recorded: Statistics = []
        _wrap_batch_norms(model, lambda norm: _Recorder(norm, recorded))
        model(inputs)
        if not recorded:
            raise ValueError(f"module must have nnx.BatchNorm layers, got none in {type(module).__name__}")
        return recorded

    return statistics_fn


def running_statistics(module: nnx.Module, params: Params, inputs: Float[Array, "b *d"]) -> Statistics:
    """The running statistics of a module's batch-normalisation layers, in the order of the forward pass.

    Args:
        module: The module.
        params: Its parameters, as `functional` returns them.
        inputs: Any inputs of the right shape: they only show the order of the layers.

    Returns:
        Mean and (biased: flax keeps it so) variance of every layer.
    """
    graph, _, rest = nnx.split(module, nnx.Param, ...)
    model = nnx.merge(graph, params, rest, copy=True)
    model.eval()
    found: Statistics = []
    _wrap_batch_norms(model, lambda norm: _RunningReader(norm, found))
    model(inputs)
    return found


def inferred_statistics(before: Statistics, after: Statistics, *, momentum: float) -> Statistics:
    """The statistics of the one batch between two consecutive running states, (after - momentum * before) / (1 -
    momentum): exact up to rounding, which the division makes 1 / (1 - momentum) times larger.

    flax keeps the biased variance, so the result is the biased variance of the batch. PyTorch keeps the unbiased one:
    multiply its inferred variances by (n - 1) / n, n the number of values a feature has in the batch.

    Threat model: a server that is sent the running statistics after a client's one step, and knows those before it.

    Args:
        before: Running statistics before the step, as `running_statistics` returns them.
        after: Those after it.
        momentum: Share of the old state that is kept, as flax counts it (0.9 in the models here), in [0, 1).

    Returns:
        Mean and variance of every layer's inputs.

    Raises:
        ValueError: A momentum out of range, or two states that do not fit each other.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    _check.same_structure("after", after, "before", before)
    return jax.tree.map(lambda old, new: (new - momentum * old) / (1 - momentum), before, after)


class _Wrapper(nnx.Module):
    """A batch-normalisation layer that does something else on the side."""

    def __init__(self, norm: nnx.BatchNorm, side: Any) -> None:
        self.norm = norm
        self.side = nnx.static(side)


class _Recorder(_Wrapper):
    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        axes = tuple(range(x.ndim - 1))
        mean = jnp.mean(x, axes)
        self.side.append((mean, jnp.mean(jnp.square(x - mean), axes)))
        return self.norm(x, *args, **kwargs)


class _RunningReader(_Wrapper):
    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        self.side.append((self.norm.mean[...], self.norm.var[...]))
        return self.norm(x, *args, **kwargs)


class _WithStatistics(_Wrapper):
    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        own = self.side()
        if own is None:
            raise ValueError("statistics must have one entry for every batch-normalisation layer, got fewer")
        self.norm.mean[...], self.norm.var[...] = own
        return self.norm(x, *args, **kwargs)


def _wrap_batch_norms(model: nnx.Module, wrap: Callable[[nnx.BatchNorm], nnx.Module]) -> None:
    for _, parent in list(nnx.iter_modules(model)):
        for name, child in list(vars(parent).items()):
            if isinstance(child, nnx.BatchNorm):
                setattr(parent, name, wrap(child))
