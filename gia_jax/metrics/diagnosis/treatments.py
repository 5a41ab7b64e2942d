"""What was done to an update before it was shared: pruning, signs, rounding, noise, weight decay, clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gia_jax.base import Observation, Updates
from gia_jax.labels import ClassifierFn
from gia_jax.matching.adaptive import zeroed_features
from gia_jax.metrics.diagnosis.arrays import Layer, Leaves, l2_norm, named_leaves, on_host, rounding_unit
from gia_jax.metrics.diagnosis.report import Diagnosis, Treatment

LEAST_ENTRIES = 8  # a tensor, or a set of levels, with fewer proves nothing
MAX_BITS = 16
MAX_STEPS = 512  # of one rounding step: float32 cannot tell more of them apart
ROUND = 2e-5  # how near a norm must be to a number of two digits


def treatment_facts(
    facts: Diagnosis, observation: Observation, guesses: list[Updates], classifier_fn: ClassifierFn | None
) -> Diagnosis:
    """Adds the treatments, and how large the noise is."""
    leaves, simulated = named_leaves(observation.update), [named_leaves(guess) for guess in guesses]
    natural = {name: max((float(np.mean(guess[name] == 0)) for guess in simulated), default=0.0) for name in leaves}
    head = None if classifier_fn is None else on_host(classifier_fn(observation.update))
    guess_norms = tuple(l2_norm(guess.values()) for guess in simulated)
    found = _levels(leaves, natural) or _half(leaves, observation.update)
    found = [*found, *_sparsity(leaves, natural, head, guesses, classifier_fn, is_rounded=bool(found))]
    equations = 1
    if all(treatment.name == "half_precision" for treatment in found):
        rounding = rounding_unit(observation.update, found)
        if head is not None and classifier_fn is not None and simulated:
            assumed = [on_host(classifier_fn(guess)) for guess in guesses]
            weights = on_host(classifier_fn(observation.params))
            found += _imbalance_treatments(head, assumed, weights, rounding)
            equations = len(head.kernel)
        elif simulated:
            found += _filled_zeros(leaves, simulated)
    found += _clipping(facts.norm, guess_norms)
    noise = next((treatment.value for treatment in found if treatment.name == "noise"), 0.0)
    ratio = _noise_ratio(noise, facts.num_parameters, facts.norm, guess_norms, equations)
    return facts._replace(treatments=tuple(found), noise_ratio=ratio, guess_norms=guess_norms)


def _levels(leaves: Leaves, natural: dict[str, float]) -> list[Treatment]:
    """Finds updates of few different magnitudes: signs, ternary values, evenly spaced levels."""
    magnitudes = {name: np.unique(np.abs(leaf[leaf != 0])) for name, leaf in leaves.items()}
    shown = {name: np.count_nonzero(leaf) for name, leaf in leaves.items()}
    if max(shown.values()) >= LEAST_ENTRIES and all(found.size <= 1 for found in magnitudes.values()):
        size = sum(leaf.size for leaf in leaves.values())
        zeros = 1 - sum(shown.values()) / size
        usual = sum(natural[name] * leaf.size for name, leaf in leaves.items()) / size
        if zeros - usual > 0.05 and _tensor_ratio(leaves, natural) is None:
            return [Treatment("ternary", 2, f"one magnitude a tensor, and {zeros:.0%} zeros")]
        return [Treatment("sign", 0, "one magnitude a tensor")]
    tests = sum(max(found.size - 1, 0) for found in magnitudes.values())
    if tests < LEAST_ENTRIES:
        return []
    for bits in range(3, MAX_BITS + 1):
        levels = 2 ** (bits - 1) - 1
        if all(_are_whole(found / found[-1] * levels, 0.02) for found in magnitudes.values() if found.size):
            return [Treatment("quantize", bits, f"every entry is one of {2 * levels + 1} evenly spaced levels")]
    every = np.unique(np.concatenate(list(magnitudes.values())))
    gaps = np.diff(every, prepend=0)
    step = float(gaps[gaps > 1e-5 * every[-1]].min())
    if every[-1] / step <= MAX_STEPS and every.size <= sum(shown.values()) / 2 and _are_whole(every / step, 0.1):
        return [Treatment("rounded", step, f"every entry is a multiple of {step:.3g}")]
    return []


def _are_whole(values: np.ndarray, tolerance: float) -> bool:
    """Tells whether all values are integers up to the tolerance."""
    return bool(np.all(np.abs(values - np.round(values)) <= tolerance))


def _half(leaves: Leaves, update: Updates) -> list[Treatment]:
    """Finds an update whose values all are of a type of half precision; its value is the type's unit of rounding."""
    if sum(np.count_nonzero(leaf) for leaf in leaves.values()) < LEAST_ENTRIES:
        return []
    types = {leaf.dtype for leaf in jax.tree.leaves(update)}
    for dtype in (jnp.bfloat16, jnp.float16):  # float16 holds most values of bfloat16 as well
        with np.errstate(over="ignore"):
            fits = all(np.array_equal(leaf.astype(dtype).astype(np.float64), leaf) for leaf in leaves.values())
        if fits:
            name, unit = jnp.dtype(dtype).name, float(jnp.finfo(dtype).eps)
            how = "is" if types == {jnp.dtype(dtype)} else "can be written"
            return [Treatment("half_precision", unit, f"every value {how} in {name}")]
    return []


def _tensor_ratio(leaves: Leaves, natural: dict[str, float]) -> float | None:
    """Returns the ratio whose share of every tensor, rounded down, is its number of zeros; None if there is none.

    A tensor that has more zeros than that may owe them to the client, as at guesses.
    """
    zeros = {name: leaf.size - np.count_nonzero(leaf) for name, leaf in leaves.items()}
    shares = {name: zeros[name] / leaf.size for name, leaf in leaves.items()}
    high = min((zeros[name] + 1) / leaf.size for name, leaf in leaves.items())
    low = max((share for share in shares.values() if share < high), default=0.0)
    others = [name for name, share in shares.items() if share >= high]
    usual = all(natural[name] > 0 and shares[name] <= natural[name] + 0.1 for name in others)
    return _decimal(low, high) if low > 0 and usual else None


def _decimal(low: float, high: float) -> float:
    """Returns the number of fewest decimals in [low, high)."""
    for digits in range(1, 9):
        value = math.ceil(low * 10**digits - 1e-9) / 10**digits
        if value < high:
            return value
    return low


def _sparsity(
    leaves: Leaves,
    natural: dict[str, float],
    head: Layer | None,
    guesses: list[Updates],
    classifier_fn: ClassifierFn | None,
    *,
    is_rounded: bool,
) -> list[Treatment]:
    """Finds zeros that the assumed client does not have at guesses: pruning of tensors, of all, or of features."""
    zeros = {name: leaf.size - np.count_nonzero(leaf) for name, leaf in leaves.items()}
    size = sum(leaf.size for leaf in leaves.values())
    excess = {name: zeros[name] - natural[name] * leaf.size for name, leaf in leaves.items()}
    share = sum(zeros.values()) / size
    if head is not None and classifier_fn is not None:
        assumed = [np.mean(np.asarray(zeroed_features(classifier_fn(guess).kernel))) for guess in guesses]
        rows = float(np.mean(np.all(head.kernel == 0, 1)))
        elsewhere = sum(excess.values()) - (rows - max(assumed, default=0.0)) * head.kernel.size
        if rows - max(assumed, default=0.0) > 0.05 and elsewhere <= 0.05 * size:
            return [Treatment("soteria", rows, f"{rows:.0%} of the features have no row in the last kernel's gradient")]
    if sum(excess.values()) <= 0.05 * size:
        return []
    ratio = _tensor_ratio(leaves, natural)
    if ratio is not None:
        return [Treatment("prune", ratio, "every tensor has that share of zeros, rounded down")]
    if is_rounded:
        return []  # rounding makes zeros of its own
    least = {name: np.abs(leaf[leaf != 0]) for name, leaf in leaves.items() if np.any(leaf)}
    if not any(_starts_above(values, 0.0) for values in least.values()):
        return [Treatment("sparse", share, f"{share:.1%} of the entries are 0, not the smallest ones")]
    threshold = float(min(values.min() for values in least.values()))
    if any(_starts_above(values, threshold) for values in least.values()):
        return [Treatment("prune", share, f"{share:.1%} zeros, the smallest entries of each tensor")]
    exact = _decimal(share, share + 1 / size)
    return [Treatment("top_k", exact, f"{share:.1%} zeros, no entry of any tensor is below {threshold:.3g}")]


def _starts_above(values: np.ndarray, bound: float) -> bool:
    """Tells whether values start further above the bound than their number lets one expect."""
    spread = float(np.median(values)) - bound
    return values.size > 30 and float(values.min()) - bound > 30 * spread / values.size


def _stacked(layer: Layer) -> np.ndarray:
    """Returns the kernel with the bias, if there is one, as one more row."""
    return layer.kernel if layer.bias is None else np.vstack([layer.kernel, layer.bias[None]])


def _imbalance(layer: Layer) -> tuple[float, float]:
    """Returns the deviation of the noise that explains rows that do not add up to 0, and the size of an entry."""
    matrix = _stacked(layer)
    deviation = math.sqrt(np.mean(np.square(matrix.sum(1))) / matrix.shape[1])
    return deviation, math.sqrt(np.mean(np.square(matrix)))


def _imbalance_treatments(head: Layer, assumed: list[Layer], weights: Layer, rounding: float) -> list[Treatment]:
    """Finds noise, or a decay of weights, in rows of the last layer that do not add up to 0 as those at guesses do."""
    usual = max(deviation / size for deviation, size in map(_imbalance, assumed) if size)
    deviation, size = _imbalance(head)
    if usual > 0.01 or deviation <= max(30 * rounding, 10 * usual) * size:
        return []  # the loss is another one, or all is well
    sums, decayed = _stacked(head).sum(1), _stacked(weights).sum(1)
    factor = float(sums @ decayed) / max(float(decayed @ decayed), 1e-30)
    if np.sum(np.square(sums - factor * decayed)) < 0.01 * np.sum(np.square(sums)):
        return [Treatment("weight_decay", factor, "the rows of the last layer add up to multiples of the weights'")]
    return [
        Treatment("noise", deviation, f"the rows of the last layer do not add up to 0: {deviation / size:.2g} of it")
    ]


def _filled_zeros(leaves: Leaves, simulated: list[Leaves]) -> list[Treatment]:
    """Finds noise where zeros are gone that every guess has; a few of them may be live in the client's own update."""
    size = sum(leaf.size for leaf in leaves.values())
    of_guesses = [sum(leaf.size - np.count_nonzero(leaf) for leaf in guess.values()) / size for guess in simulated]
    left = 1 - sum(np.count_nonzero(leaf) for leaf in leaves.values()) / size
    if min(of_guesses) < 0.05 or left > 0.1 * min(of_guesses):
        return []
    zeros = [leaves[name][np.all([guess[name] == 0 for guess in simulated], 0)] for name in leaves]
    values = np.abs(np.concatenate(zeros))
    if values.size < LEAST_ENTRIES:
        return []
    deviation = float(np.quantile(values, 0.25)) / 0.3186  # of a normal distribution
    for _ in range(10):  # what is live is large, and leaves
        deviation = math.sqrt(np.mean(np.square(values[values <= 4 * deviation])))
    return [Treatment("noise", deviation, f"{min(of_guesses):.0%} zeros at every guess, and {left:.0%} here")]


def _clipping(norm: float, guess_norms: tuple[float, ...]) -> list[Treatment]:
    """Finds a norm that is a number of two digits, as clipping leaves it; this is no more than a hint."""
    rounded = float(f"{norm:.1e}")
    if abs(norm - rounded) > ROUND * norm or (guess_norms and max(guess_norms) < norm):
        return []
    return [Treatment("clip", rounded, f"a hint: the norm is {rounded:g}, a round number")]


def _noise_ratio(deviation: float, size: int, norm: float, guess_norms: tuple[float, ...], num_equations: int) -> float:
    """Returns the norm of the noise by that of the rest, which is not larger than what is left, or than at guesses."""
    noise = deviation * math.sqrt(size)
    if noise == 0:
        return 0.0
    # The noise is known up to its chance, and so is what is left.
    rest = math.sqrt(max(norm**2 - noise**2, 0) + 2 * math.sqrt(2 / num_equations) * noise**2)
    return noise / min([rest, *guess_norms])
