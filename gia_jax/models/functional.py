"""From a flax.nnx module to plain functions of a nested dict of parameters: the only form of model the library needs.

Models of other libraries (linen, haiku, equinox, hand-written) already are such functions, or become one by a lambda.
"""

import contextlib
import functools
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.interpreters import partial_eval
from jaxtyping import Array, PRNGKeyArray, PyTree, Shaped

from gia_jax import _check
from gia_jax.base import Params, Statistics
from gia_jax.precision import widened, widened_tree

ApplyFn = Callable[[Params, PyTree[Shaped[Array, "b ..."]]], PyTree[Array]]
BatchNormMode = Literal["evaluation", "training", "exact"]

# What a batch-normalisation layer does before it normalises: `(layer, inputs, mask) -> None`.
BeforeFn = Callable[[nnx.BatchNorm, Array, Array | None], None]

# The client whose loss on single examples is being checked, and whether it draws anew for each of them.
_APART: ContextVar[tuple[str, bool] | None] = ContextVar("apart", default=None)


@contextlib.contextmanager
def examples_apart(client: str, *, draws_anew: bool) -> Generator[None]:
    """Refuses, within the context, models that mix the examples of `client` or draw the same numbers for each of them.

    A forward pass of `functional` or `stochastic` raises ValueError inside the context, and the message names the
    client:

    * if it normalises by the statistics of its own batch, which mixes the examples;
    * if it draws random numbers while `draws_anew` is False, since all examples would share one draw.

    Args:
        client: Name of the client, for the error message.
        draws_anew: Whether the client gives every example a random key of its own.

    Yields:
        Nothing.
    """
    token = _APART.set((client, draws_anew))
    try:
        yield
    finally:
        _APART.reset(token)


def functional(
    module: nnx.Module, *, batch_norm: BatchNormMode = "evaluation", statistics: Statistics | None = None
) -> tuple[ApplyFn, Params]:
    """Splits a module into its forward pass, a pure function of the parameters, and the parameters themselves.

    Batch normalisation has three modes, and they are three threat models:

    * "evaluation": running statistics, the same for client and attacker. The usual setting of published attacks.
    * "training": each forward pass uses the statistics of its own batch; the running ones do not change.
    * "exact": `statistics` in place of the running ones, such as those of the client's own batch.

    The mode holds for every `nnx.BatchNorm`, whatever the module itself passes to it.

    Args:
        module: Any `flax.nnx` module. It is not changed. Dropout is off in every mode; for a module that is to draw,
            see `stochastic`.
        batch_norm: Mode of batch normalisation: "evaluation", "training" or "exact".
        statistics: Mean and biased variance for every call of a batch-normalisation layer in the order of the forward
            pass. They belong to the mode "exact", which needs them, and they may be traced.

    Returns:
        The pair of a function `apply_fn(params, inputs) -> outputs` and params, a nested dict of arrays. `apply_fn`
        raises ValueError, naming the entry, for parameters of another structure or of other shapes. It also raises
        ValueError if the forward pass draws random numbers from a state in the module, because victim and attacker
        would share them.

    Raises:
        ValueError: If the mode is unknown, or if `statistics` are given in another mode than "exact" or missing in it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> apply_fn, params = models.functional(models.MLP((4,), 3, hidden=(), rngs=nnx.Rngs(0)))
        >>> params["head"]["kernel"].shape
        (4, 3)
        >>> apply_fn(params, jnp.ones((2, 4))).shape
        (2, 3)
    """
    forward, params = _forward(module, batch_norm, statistics)
    return lambda params, inputs: forward(params, inputs, None), params


def stochastic(
    module: nnx.Module, *, batch_norm: BatchNormMode = "evaluation", statistics: Statistics | None = None
) -> tuple[Callable[[PRNGKeyArray], ApplyFn], Params]:
    """Turns a module that draws random numbers, such as one with dropout, into a pure function of a key.

    Every random state in the module (`nnx.Rngs`, `nnx.RngStream`, a key of its own) is replaced by one split off the
    key, and dropout is on. One key is for one forward pass: its owner gives the next one another key. A client's
    loss is then a function of a key as well, for the `loss_key` of the clients that call it several times.

    Args:
        module: A `flax.nnx` module that holds a random state. It is not changed.
        batch_norm: Mode of batch normalisation: "evaluation", "training" or "exact", which `functional` explains.
        statistics: Mean and biased variance for every call of a batch-normalisation layer, for the mode "exact" only.

    Returns:
        The pair of a function `apply_of(key) -> apply_fn` and params, a nested dict of arrays. Each `apply_fn` maps
        (params, inputs) to outputs, as the one of `functional` does.

    Raises:
        ValueError: If the mode is unknown, `statistics` do not belong to it, or the module holds no random state.

    Examples:
        Dropout is drawn from the key, and a loss of a key follows from it:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import clients, models
        >>> apply_of, params = models.stochastic(nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))
        >>> loss_of = lambda key: clients.cross_entropy(apply_of(key))
        >>> apply_of(jax.random.key(1))(params, jnp.ones((2, 3))).shape
        (2, 3)
    """
    forward, params = _forward(module, batch_norm, statistics)
    if not _keys(nnx.split(module, nnx.Param, ...)[2]):
        raise ValueError(f"module must hold a random state to draw from, got none in {type(module).__name__}")
    return lambda key: lambda params, inputs: forward(params, inputs, key), params


def headless(module: nnx.Module, name: str = "head") -> nnx.Module:
    """Copies a module without its last layer, so that the outputs of the copy are the features.

    Args:
        module: Any `flax.nnx` module whose forward pass ends in the layer `name`. It is not changed.
        name: Name of the last layer, an attribute of the module.

    Returns:
        The copy, whose layer `name` passes on its inputs.

    Raises:
        ValueError: If the module has no layer of this name.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = models.MLP((4,), 3, hidden=(5,), rngs=nnx.Rngs(0))
        >>> models.headless(module)(jnp.ones((2, 4))).shape
        (2, 5)
    """
    if not isinstance(getattr(module, name, None), nnx.Module):
        raise ValueError(f"name must be a layer of {type(module).__name__}, got {name!r}")
    body = nnx.clone(module)
    setattr(body, name, _Identity())
    return body


class _Identity(nnx.Module):
    """A layer that returns its inputs."""

    def __call__(self, x: Array) -> Array:
        return x


def has_batch_norm(module: nnx.Module) -> bool:
    """Tells whether a module has a layer of batch normalisation, `nnx.BatchNorm`, anywhere in it."""
    return any(isinstance(layer, nnx.BatchNorm) for _, layer in nnx.iter_modules(module))


def batch_norm_inputs(module: nnx.Module, *, batch_norm: Literal["evaluation", "training"] = "evaluation"):
    """Makes a function that returns the statistics of what enters the batch-normalisation layers of a module.

    Args:
        module: Any `flax.nnx` module with `nnx.BatchNorm` layers.
        batch_norm: Mode that the forward pass runs in, "evaluation" or "training", which `functional` explains.

    Returns:
        A function `statistics_fn(params, inputs) -> statistics`. Statistics are a list with the mean and the biased
        variance of every layer's input, in float32 or wider and in the order of the forward pass. They are taken over
        all axes but the features' and where the layer's mask is True. `statistics_fn` raises ValueError if the module
        has no such layer, if `functional` would refuse it or the parameters, or if a layer is called inside of a
        transform of flax, such as `nnx.scan`.

    Raises:
        ValueError: If the mode is none of the two.

    Examples:
        The values 1 and 3 have mean 2 and biased variance 1:

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = nnx.Sequential(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
        >>> _, params = models.functional(module)
        >>> ((mean, variance),) = models.batch_norm_inputs(module)(params, jnp.array([[1.0], [3.0]]))
        >>> mean.tolist(), variance.tolist()
        ([2.0], [1.0])
    """
    forward, _ = _forward(module, batch_norm)

    def statistics_fn(params: Params, inputs: PyTree[Shaped[Array, "b ..."]]) -> Statistics:
        recorded: Statistics = []
        forward(params, inputs, None, lambda *call: recorded.append(_statistics_of(*call)))
        _check_reached(recorded)
        if not recorded:
            raise ValueError(f"module must have nnx.BatchNorm layers, got none in {type(module).__name__}")
        return recorded

    return statistics_fn


def running_statistics(module: nnx.Module, params: Params, inputs: PyTree[Shaped[Array, "b ..."]]) -> Statistics:
    """Returns the running statistics of a module's batch-normalisation layers, in the order of the forward pass.

    Args:
        module: Any `flax.nnx` module.
        params: Parameters of the module, as `functional` returns them.
        inputs: Any inputs of the right shape: they only show the order of the layers.

    Returns:
        The mean and the variance of every layer, in float32 or wider. The variance is biased, as flax keeps it. The
        list is empty if the module has no such layer.

    Raises:
        ValueError: If the parameters do not fit the module, its forward pass draws random numbers, or a layer is called
            inside of a transform of flax, such as `nnx.scan`.

    Examples:
        A new layer starts with mean 0 and variance 1:

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = nnx.Sequential(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
        >>> _, params = models.functional(module)
        >>> ((mean, variance),) = models.running_statistics(module, params, jnp.zeros((2, 1)))
        >>> mean.tolist(), variance.tolist()
        ([0.0], [1.0])
    """
    forward, _ = _forward(module, "evaluation")
    found: Statistics = []
    forward(params, inputs, None, lambda norm, *_: found.append((widened(norm.mean[...]), widened(norm.var[...]))))
    _check_reached(found)
    return found


def inferred_statistics(before: Statistics, after: Statistics, *, momentum: float) -> Statistics:
    """Computes the statistics of the one batch between two consecutive running states.

    They are (after - momentum * before) / (1 - momentum). This is exact up to rounding, which the division makes
    1 / (1 - momentum) times larger.

    flax keeps the biased variance, so the result is the biased variance of the batch. PyTorch keeps the unbiased one:
    multiply its inferred variances by (n - 1) / n, with n the number of values that a feature has in the batch.

    Threat model: a server that is sent the running statistics after a client's one step, and knows those before it.

    Args:
        before: Running statistics before the step, as `running_statistics` returns them.
        after: Running statistics after the step.
        momentum: Share of the old state that is kept, as flax counts it (0.9 in the models here), in [0, 1).

    Returns:
        The mean and the variance of every layer's inputs, in float32 or wider.

    Raises:
        ValueError: If `momentum` is out of range, or the two states do not fit each other.

    Examples:
        A batch of mean 2 moved the running mean from 0 to 0.5:

        >>> import jax.numpy as jnp
        >>> from gia_jax import models
        >>> before = [(jnp.array([0.0]), jnp.array([1.0]))]
        >>> after = [(jnp.array([0.5]), jnp.array([1.75]))]
        >>> ((mean, variance),) = models.inferred_statistics(before, after, momentum=0.75)
        >>> mean.tolist(), variance.tolist()
        ([2.0], [4.0])
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    _check.same_structure("after", after, "before", before)
    before, after = widened_tree(before), widened_tree(after)
    return jax.tree.map(lambda old, new: (new - momentum * old) / (1 - momentum), before, after)


def _forward(
    module: nnx.Module, batch_norm: str, statistics: Statistics | None = None
) -> tuple[Callable[..., PyTree[Array]], Params]:
    """Returns `forward(params, inputs, key, before=None)` and params.

    `forward` draws from the key or, where it is None, draws nothing. `before` sees every call of a batch-normalisation
    layer.
    """
    if batch_norm not in ("evaluation", "training", "exact"):
        raise ValueError(f"batch_norm must be 'evaluation', 'training' or 'exact', got {batch_norm!r}")
    if (statistics is None) == (batch_norm == "exact"):
        raise ValueError(
            f"statistics are for batch_norm='exact' and needed there, got {statistics is not None} with {batch_norm!r}"
        )
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    like = jax.eval_shape(lambda: nnx.to_pure_dict(params))
    keys = _keys(rest)

    def run(
        params: Params, inputs: PyTree[Array], state: PyTree, draws: bool, before: BeforeFn | None
    ) -> PyTree[Array]:
        model = nnx.merge(graph, params, state, copy=True)
        model.set_attributes(use_running_average=batch_norm != "training", raise_if_not_found=False)
        model.set_attributes(deterministic=not draws, raise_if_not_found=False)
        if statistics is None:
            _watch(model, before)
            return model(inputs)
        take = functools.partial(next, iter(statistics), None)
        _watch(model, lambda norm, *_: _set_statistics(norm, take()))
        outputs = model(inputs)
        if take() is not None:
            raise ValueError("statistics must have one entry for every batch-normalisation layer, got more")
        return outputs

    def forward(
        params: Params, inputs: PyTree[Array], key: PRNGKeyArray | None, before: BeforeFn | None = None
    ) -> PyTree[Array]:
        _check.same_structure("params", params, "the module", like)
        if key is not None:
            apart = _APART.get()
            if apart is not None and not apart[1]:
                raise ValueError(
                    f"loss_key must be given to {apart[0]} for a module that draws, got None: its examples would share "
                    "one draw"
                )
            return run(params, inputs, _reseeded(rest, key), True, before)
        if keys:
            draws = _drawn(lambda state: run(params, inputs, state, False, None), rest, keys)
            if draws:
                raise ValueError(
                    f"module must not draw in its forward pass, got draws from module{draws[0]}: "
                    "victim and attacker would share them, take models.stochastic and a key for each"
                )
        return run(params, inputs, rest, False, before)

    return forward, nnx.to_pure_dict(params)


def _is_key(leaf: Array) -> bool:
    """Tells whether a leaf is a random key, typed or raw."""
    is_raw = leaf.dtype == jnp.uint32 and leaf.shape[-1:] == (2,)
    return is_raw or _check.is_key(leaf)


def _is_variable(node: Any) -> bool:
    """Tells whether a node of a module's state is a variable of flax."""
    return isinstance(node, nnx.Variable)


def _keys(rest: PyTree) -> dict[int, str]:
    """Finds the places of the keys among the leaves of a module's state, and the names of what holds them."""
    found, place = {}, 0
    for path, node in jax.tree.leaves_with_path(rest, is_leaf=_is_variable):
        for leaf in jax.tree.leaves(node):
            if _is_key(leaf) and not isinstance(node, nnx.RngCount):
                found[place] = jax.tree_util.keystr(path)
            place += 1
    return found


def _drawn(outputs_fn: Callable[[PyTree], PyTree[Array]], rest: PyTree, keys: dict[int, str]) -> list[str]:
    """Returns the names of the keys that the outputs depend on."""
    leaves, tree = jax.tree.flatten(rest)

    def of_keys(values: list[Array]) -> PyTree[Array]:
        places = dict(zip(keys, values, strict=True))
        return outputs_fn(jax.tree.unflatten(tree, [places.get(i, leaf) for i, leaf in enumerate(leaves)]))

    traced = jax.make_jaxpr(of_keys)([leaves[place] for place in keys]).jaxpr
    if not any(name in str(traced) for name in ("random_bits", "threefry2x32")):
        return []  # a constant of two integers only looks like a key
    _, used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return [name for name, is_used in zip(keys.values(), used, strict=True) if is_used]


def _reseeded(rest: PyTree, key: PRNGKeyArray) -> PyTree:
    """Returns the state of a module with every key split off `key`, and every count of draws at zero."""
    places, fresh = _keys(rest), []
    for node in jax.tree.leaves(rest, is_leaf=_is_variable):
        for leaf in jax.tree.leaves(node):
            if len(fresh) in places:
                own = jax.random.fold_in(key, len(fresh))
                is_raw = leaf.dtype == jnp.uint32
                shape = leaf.shape[:-1] if is_raw else leaf.shape
                own = jax.random.split(own, shape) if shape else own
                leaf = jax.random.key_data(own) if is_raw else own
            elif isinstance(node, nnx.RngCount):
                leaf = jnp.zeros_like(leaf)
            fresh.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(rest), fresh)


class _Watched(nnx.BatchNorm):
    """A batch-normalisation layer in the mode that was asked for, which does something before it normalises."""

    before: BeforeFn | None

    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        del use_running_average  # of the module's own choosing
        if not self.use_running_average and (apart := _APART.get()) is not None:
            raise ValueError(
                f"batch_norm must not be 'training' where {apart[0]} takes examples apart, as it mixes them: "
                "use 'evaluation' or group normalisation"
            )
        if self.before is not None:
            self.before(self, x, mask)
        return super().__call__(x, self.use_running_average, mask=mask)


@functools.lru_cache(maxsize=256)
def _watched(layer: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """Returns a layer's class with `_Watched` in the place of `nnx.BatchNorm`: what a subclass does around it stays."""
    return _Watched if layer is nnx.BatchNorm else type(layer.__name__, (layer, _Watched), {})


def _watch(model: nnx.Module, before: BeforeFn | None) -> None:
    """Makes every batch-normalisation layer of a model, which is changed, call `before`; it stays the layer it is."""
    for _, layer in list(nnx.iter_modules(model)):
        if isinstance(layer, nnx.BatchNorm):
            if before is not None and layer.mean.shape != (layer.num_features,):
                raise ValueError(
                    "module must have batch-normalisation layers of its own where their statistics are read or set, "
                    f"got a stack of shape {layer.mean.shape}, as in nnx.scan"
                )
            object.__setattr__(layer, "__class__", _watched(type(layer)))
            cast(_Watched, layer).before = nnx.static(before)


def _statistics_of(norm: nnx.BatchNorm, x: Array, mask: Array | None) -> tuple[Array, Array]:
    """Returns mean and biased variance of a layer's inputs, over all axes but the features', where the mask is True."""
    x = widened(x)
    axes = tuple(axis for axis in range(x.ndim) if axis != norm.axis % x.ndim)
    mean = jnp.mean(x, axes, keepdims=True, where=mask)
    return mean.reshape(-1), jnp.mean(jnp.square(x - mean), axes, where=mask)


def _check_reached(found: Statistics) -> None:
    """Raises ValueError for statistics that were traced in a transform inside of the module, and cannot leave it."""
    try:
        jax.tree.map(lambda leaf: leaf + 0, found)
    except jax.errors.UnexpectedTracerError:
        raise ValueError(
            "module must call its batch-normalisation layers outside of nnx.scan, nnx.vmap, nnx.remat and nnx.jit, or "
            "their statistics cannot be read; got one inside"
        ) from None


def _set_statistics(norm: nnx.BatchNorm, own: tuple[Array, Array] | None) -> None:
    """Sets the statistics that a batch-normalisation layer uses, or raises ValueError if they do not fit it."""
    if own is None:
        raise ValueError("statistics must have one entry for every batch-normalisation layer, got fewer")
    for variable, value in zip((norm.mean, norm.var), own, strict=True):
        if jnp.shape(value) != variable.shape:
            raise ValueError(f"statistics of this layer must have shape {variable.shape}, got {jnp.shape(value)}")
        variable.set_value(jnp.asarray(value))
