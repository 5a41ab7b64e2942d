"""What the network's layers give away: normalisation, a dense first layer, kinks, and what R-GAP and APRIL need."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core as jex_core
from jaxtyping import PRNGKeyArray

from gia_jax.attacks.april import LayersFn, condition_holds
from gia_jax.attacks.linear import NEGLIGIBLE
from gia_jax.attacks.rank_analysis import LayerRank, counted_ranks, rank_analysis
from gia_jax.base import ClientFn, Observation, Params, Updates
from gia_jax.labels import ClassifierFn
from gia_jax.metrics.diagnosis.arrays import Leaves, named_leaves, on_host, rounding_unit
from gia_jax.metrics.diagnosis.report import Diagnosis, FirstLayer, add_notes
from gia_jax.models.functional import ApplyFn, has_batch_norm
from gia_jax.models.network import Network

# Operations with a kink, or with a jump in their first derivative.
KINKED = frozenset(("max", "min", "abs", "sign", "clamp", "floor", "ceil", "round", "sort", "select_n"))
KINKED_OVER_AN_AXIS = frozenset(("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "cummax"))
# Functions without a kink that are computed by way of a maximum or a choice.
SMOOTH = frozenset(
    ("softplus", "logaddexp", "softmax", "log_softmax", "logsumexp", "silu", "swish", "gelu", "log_sigmoid")
)


def normalization_facts(
    facts: Diagnosis, observation: Observation, guesses: list[Updates], module: nnx.Module | None
) -> Diagnosis:
    """Adds which kernels are normalised by the statistics of their own outputs."""
    params = named_leaves(observation.params)
    seen = _orthogonal(named_leaves(observation.update), params)
    of_guesses = [set(_orthogonal(named_leaves(guess), params)) for guess in guesses]
    assumed = set.intersection(*of_guesses) if of_guesses else set()
    blurred = [found.name for found in facts.treatments if found.name not in ("clip", "half_precision")]
    has_layers = module is not None and has_batch_norm(module)
    facts = facts._replace(normalized=tuple(seen))
    if seen:
        text = "it is made with the statistics of the batch, and those of the assumed client are not"
        wrong = (text,) if guesses and not assumed else ()
        return facts._replace(normalization="batch", mismatches=facts.mismatches + wrong)
    if blurred:
        return add_notes(facts, [f"how batch normalisation works: hidden by {blurred[0]}"] if assumed else [])
    text = "it is not made with the statistics of the batch, and those of the assumed client are"
    normalization = "running" if has_layers or assumed else None if module is None else "none"
    return facts._replace(normalization=normalization, mismatches=facts.mismatches + ((text,) if assumed else ()))


def _orthogonal(update: Leaves, params: Leaves) -> list[str]:
    """Returns the names of the kernels that are orthogonal to their gradients, output by output."""
    found = []
    for name, leaf in update.items():
        if leaf.ndim < 2 or leaf.shape != params[name].shape:
            continue
        gradient, kernel = (array.reshape(-1, array.shape[-1]) for array in (leaf, params[name]))
        lengths = np.linalg.norm(gradient, axis=0) * np.linalg.norm(kernel, axis=0)
        live = lengths > 1e-6 * lengths.max()
        if np.sum(live) < 4 or len(kernel) < 4:
            continue
        cosines = np.abs(np.sum(gradient * kernel, 0)[live]) / lengths[live]
        # Of directions that have nothing to do with each other 1 in 60 is as orthogonal as this.
        if np.quantile(cosines, 0.8) < 0.02 / math.sqrt(len(kernel)):
            found.append(name)
    return found


def first_layer_facts(facts: Diagnosis, observation: Observation, first_layer_fn: ClassifierFn | None) -> Diagnosis:
    """Adds what the first dense layer gives away."""
    shape = facts.batch_shape
    if shape is None:
        return facts
    if first_layer_fn is None:
        size = math.prod(shape[1:])
        names = [
            name for name, leaf in named_leaves(observation.params).items() if leaf.ndim == 2 and len(leaf) == size
        ]
        note = f"the first layer: first_layer_fn is not given, and {', '.join(names)} may see the example"
        return add_notes(facts, [note if names else None])
    layer = on_host(first_layer_fn(observation.update))
    rows = layer.kernel.shape[1]
    if layer.bias is None or layer.kernel.shape[0] != math.prod(shape[1:]):
        return facts._replace(first_layer=FirstLayer(False, rows, 0, 0, 0))
    usable = np.abs(layer.bias) > NEGLIGIBLE * np.abs(layer.bias).max()
    quotients = (layer.kernel[:, usable] / layer.bias[usable]).T
    tolerance = max(1e-3, 4 * rounding_unit(observation.update, facts.treatments))
    agreeing, isolated = _agreement(quotients, tolerance)
    return facts._replace(first_layer=FirstLayer(True, rows, int(usable.sum()), agreeing, min(isolated, shape[0])))


def _agreement(rows: np.ndarray, tolerance: float) -> tuple[int, int]:
    """Returns how many rows agree with another one, and on how many different vectors; of 2,048 rows at most."""
    rows = rows[:2_048]
    squares = np.sum(np.square(rows), 1)
    distances = squares[:, None] + squares[None] - 2 * rows @ rows.T
    agree = (distances <= tolerance**2 * np.minimum(squares[:, None], squares[None])) & (squares > 0)
    left, agreeing, groups = np.ones(len(rows), bool), 0, 0
    while left.any():
        sizes = np.where(left, np.sum(agree & left, 1), 0)
        largest = int(np.argmax(sizes))
        if sizes[largest] < 2:
            break
        agreeing, groups = agreeing + int(sizes[largest]), groups + 1
        left &= ~agree[largest]
    return agreeing, groups


def constraint_ranks(
    network: Network, params: Params, input_shape: tuple[int, ...], key: PRNGKeyArray
) -> tuple[tuple[LayerRank, ...], str | None]:
    """Returns the ranks of R-GAP's constraints, or their bounds without float64, and what is wrong with the network."""
    try:
        if jnp.result_type(float) != jnp.float64:
            return tuple(counted_ranks(network, input_shape)), None
        return rank_analysis(network, params, input_shape, key=key), None
    except ValueError as error:
        return (), str(error)


def tokens_problem(
    client_fn: ClientFn, observation: Observation, layers_fn: LayersFn | None, key: PRNGKeyArray
) -> str | None:
    """Returns why APRIL cannot invert the network, or None where it can."""
    if layers_fn is None:
        return "the layers of a vision transformer are not named"
    try:
        condition_holds(key, jax.jit(client_fn), layers_fn, observation)
    except ValueError as error:
        return str(error)
    return None


def find_kinks(apply_fn: ApplyFn, observation: Observation) -> tuple[str, ...]:
    """Returns the names of the operations of the forward pass that have a kink."""
    jaxpr = jax.make_jaxpr(apply_fn)(observation.params, observation.extra["inputs_like"]).jaxpr
    return tuple(sorted(_kinked_operations(jaxpr)))


def _kinked_operations(jaxpr: jex_core.Jaxpr) -> set[str]:
    """Returns the names of the operations with a kink, in the functions called inside as well."""
    found: set[str] = set()
    for equation in _differentiated(jaxpr):
        name = equation.primitive.name
        called = str(equation.params.get("name", "")).strip("_")
        dtype = getattr(equation.outvars[0].aval, "dtype", jnp.dtype(bool)) if equation.outvars else jnp.dtype(bool)
        if name in KINKED | KINKED_OVER_AN_AXIS and jnp.issubdtype(dtype, jnp.floating):
            found.add(name)
        elif called not in SMOOTH:
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    found |= _kinked_operations(getattr(inner, "jaxpr", inner))
    return found


def _differentiated(jaxpr: jex_core.Jaxpr) -> list[jex_core.JaxprEqn]:
    """Returns the operations that the outputs depend on otherwise than through a constant for all derivatives, such as
    the largest score that a softmax subtracts.
    """
    needed, kept = {var for var in jaxpr.outvars if not isinstance(var, jex_core.Literal)}, []
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars) or equation.primitive.name == "stop_gradient":
            continue
        kept.append(equation)
        needed.update(var for var in equation.invars if not isinstance(var, jex_core.Literal))
    return kept


def _is_jaxpr(value: Any) -> bool:
    """Tells whether the value is a function inside an operation."""
    return isinstance(value, jex_core.Jaxpr | jex_core.ClosedJaxpr)
