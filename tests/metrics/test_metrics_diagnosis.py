"""Updates whose history is known: the diagnosis must find it, and must find nothing where nothing was done."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, Observation, ThreatModel, attacks, clients, defenses, labels, metrics, models, observe
from gia_jax.cli.names import ATTACKS
from gia_jax.metrics import diagnosis
from gia_jax.metrics.diagnosis.layers import find_kinks

HEAD, FIRST = labels.dense("head"), labels.dense("dense0")
NUM_CLASSES = 10


def dense_apply(params, inputs, activation=jax.nn.sigmoid):
    return activation(hidden(params, inputs)) @ params["head"]["kernel"] + params["head"]["bias"]


def relu_apply(params, inputs):
    return dense_apply(params, inputs, jax.nn.relu)


def hidden(params, inputs):
    return inputs.reshape(len(inputs), -1) @ params["dense0"]["kernel"] + params["dense0"]["bias"]


@functools.cache
def dense_params(dtype=np.float32):
    rng = np.random.default_rng(3)
    shapes = {"dense0": (64, 32), "head": (32, NUM_CLASSES)}
    layers = {
        name: {"kernel": rng.normal(size=shape) / 4, "bias": rng.normal(size=shape[1]) / 9}
        for name, shape in shapes.items()
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), layers)


compiled = functools.cache(jax.jit)
relu_client = clients.federated_sgd(clients.cross_entropy(relu_apply))
dense_client = clients.federated_sgd(clients.cross_entropy(dense_apply))


def make_batch(classes, seed=5):
    inputs = np.random.default_rng(seed).normal(size=(len(classes), 8, 8, 1))
    return Batch(jnp.asarray(inputs, float), jnp.array(classes))


@functools.cache
def lenet():
    apply_fn, params = models.functional(models.LeNet((8, 8, 1), NUM_CLASSES, rngs=nnx.Rngs(0)))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn), lowering="native")
    return apply_fn, client_fn, see(client_fn, [6], params=params)


def diagnose_lenet(update=None):
    apply_fn, client_fn, seen = lenet()
    seen = seen if update is None else seen._replace(update=update)
    return diagnose(seen, client_fn, apply_fn=apply_fn, rank_budget=0)


def diagnose(seen, client_fn, **options):
    return metrics.diagnose(seen, client_fn, **{"key": jax.random.key(1), "classifier_fn": HEAD} | options)


def see(client_fn, classes, *, threat=None, params=None, seed=5):
    threat, params = ThreatModel() if threat is None else threat, dense_params() if params is None else params
    return observe(jax.random.key(0), threat, compiled(client_fn), params, make_batch(classes, seed))


def diagnose_dense(seen, client_fn=dense_client, **options):
    return diagnose(seen, client_fn, **{"apply_fn": dense_apply, "rank_budget": 0} | options)


def transformed(transformation, update):
    return jax.jit(lambda given: transformation.update(given, transformation.init(given), None)[0])(update)


def changed(fn, *trees):
    """`fn` of the leaves, on the host."""
    return jax.tree.map(lambda *leaves: jnp.asarray(fn(*map(np.asarray, leaves)), leaves[0].dtype), *trees)


def noisy(update, scale):
    rng = np.random.default_rng(8)
    return changed(lambda leaf: leaf + scale * rng.normal(size=leaf.shape), update)


def scaled(update, factor):
    return changed(lambda leaf: factor * leaf, update)


def verdict(found, attack):
    return next(judged for judged in found.attacks if judged.attack == attack)


def test_an_undefended_lenet_gives_everything_away():
    found = diagnose_lenet()
    assert (found.num_unknowns, found.num_label_unknowns) == (64, 1)
    assert found.treatments == found.mismatches == found.kinks == found.problems == ()
    assert (found.scale, found.is_flipped, found.num_gradients) == ("mean", False, 1)
    assert (found.labels, found.labels_certain) == ((6,), True)
    assert found.norm == pytest.approx(np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in leaves_of_lenet()])))
    assert [judged.attack for judged in found.attacks[:2]] == ["inverting_gradients", "idlg"]
    assert {judged.verdict for judged in found.attacks[:2]} == {"likely"}
    assert "float64" in verdict(found, "levenberg_marquardt").reason
    assert verdict(found, "linear").verdict == "impossible"


def leaves_of_lenet():
    return jax.tree.leaves(lenet()[2].update)


def test_every_attack_is_judged_in_the_report_best_first():
    found = diagnose_lenet()
    assert sorted(judged.attack for judged in found.attacks) == sorted(diagnosis.JUDGED)
    ranks = [diagnosis.VERDICTS.index(judged.verdict) for judged in found.attacks]
    assert ranks == sorted(ranks)
    report = str(found).splitlines()
    assert report[-len(found.attacks)].startswith("1. inverting_gradients: likely")
    assert report[0].endswith("for 64 unknowns and 1 label")


def test_the_attacks_of_the_command_line_and_one_solver_are_judged():
    of_arrays = [name for name, named in ATTACKS.items() if named.data != "graphs"]  # identifiability judges the others
    assert sorted(diagnosis.JUDGED) == sorted([*of_arrays, "levenberg_marquardt"])


@pytest.mark.parametrize(
    ("transformation", "name", "value"),
    [
        (defenses.prune(0.9), "prune", 0.9),
        (defenses.top_k(0.9), "top_k", 0.9),
        (defenses.sign(), "sign", 0),
        (defenses.ternary(jax.random.key(8)), "ternary", 2),
        (defenses.quantize(jax.random.key(8), 4), "quantize", 4),
        (defenses.clip(0.3), "clip", 0.3),
    ],
)
def test_a_defense_is_found_with_its_parameter(transformation, name, value):
    seen = see(dense_client, [1])
    found = diagnose_dense(seen._replace(update=transformed(transformation, seen.update)))
    assert [treatment.name for treatment in found.treatments] == [name]
    assert found.treatments[0].value == pytest.approx(value, abs=1e-3 if name == "top_k" else 1e-6)
    assert found.labels == (1,)
    if name == "clip":  # which a cosine does not see
        assert verdict(found, "inverting_gradients").verdict == "likely"
    else:
        assert "adaptive." in verdict(found, "inverting_gradients").reason
        assert verdict(found, "levenberg_marquardt").verdict == "unlikely"


def test_the_client_s_own_zeros_are_not_taken_for_pruned_ones():
    update = lenet()[2].update
    zeros = np.mean(np.asarray(update["conv3"]["kernel"]) == 0)
    assert zeros > 0.6
    (found,) = diagnose_lenet(transformed(defenses.prune(0.35), update)).treatments
    assert (found.name, found.value) == ("prune", pytest.approx(0.35))


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 10.0])
def test_noise_is_found_with_its_deviation(scale):
    found = diagnose_lenet(noisy(lenet()[2].update, scale))
    (noise,) = found.treatments
    assert noise.name == "noise"
    assert noise.value == pytest.approx(scale, rel=0.25)
    signal = float(metrics_norm(lenet()[2].update))
    if scale < 1:
        assert found.noise_ratio == pytest.approx(scale * np.sqrt(found.num_parameters) / signal, rel=0.3)
        assert verdict(found, "inverting_gradients").verdict == ("likely" if scale < 1e-3 else "possible")
    else:
        assert found.noise_ratio > 30
        assert {judged.verdict for judged in found.attacks} == {"impossible"}
        assert "norm of the gradient" in verdict(found, "inverting_gradients").reason


def metrics_norm(update):
    return np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(update)]))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_no_noise(dtype):
    found = diagnose_lenet(changed(lambda leaf: leaf.astype(dtype), lenet()[2].update))
    assert [(t.name, t.value) for t in found.treatments] == [("half_precision", float(jnp.finfo(dtype).eps))]
    assert found.num_gradients == 1


def test_rounding_weight_decay_and_masked_features_have_their_names():
    _, _, seen = lenet()
    step = metrics_norm(seen.update) / 500
    rounded = changed(lambda leaf: np.round(leaf / step) * step, seen.update)
    (found,) = diagnose_lenet(rounded).treatments
    assert (found.name, found.value) == ("rounded", pytest.approx(step, rel=1e-3))
    decayed = changed(lambda leaf, weight: leaf + 0.01 * weight, seen.update, seen.params)
    (found,) = diagnose_lenet(decayed).treatments
    assert (found.name, found.value) == ("weight_decay", pytest.approx(0.01, rel=1e-2))
    rows = np.arange(len(seen.params["head"]["kernel"]))[:, None]
    kernel = changed(lambda leaf: np.where(rows % 3 == 0, 0, leaf), seen.update["head"]["kernel"])
    masked = seen.update | {"head": seen.update["head"] | {"kernel": kernel}}
    (found,) = diagnose_lenet(masked).treatments
    assert (found.name, found.value) == ("soteria", pytest.approx(1 / 3))


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_found_where_nothing_was_done(seed):
    for classes in ([seed], [1, 2, 2, seed]):
        found = diagnose_dense(see(dense_client, classes, seed=seed))
        assert found.treatments == found.mismatches == ()
        assert (found.scale, found.is_flipped, found.num_gradients) == ("mean", False, 1)
        assert found.normalization is None


def test_a_flipped_sign_is_seen_and_labels_are_read_all_the_same():
    seen = see(dense_client, [4])
    found = diagnose_dense(seen._replace(update=scaled(seen.update, -1.0)), first_layer_fn=FIRST)
    assert found.is_flipped
    assert found.labels == (4,)
    assert "negate" in verdict(found, "inverting_gradients").reason
    assert verdict(found, "linear").verdict == "exact"  # a quotient has no sign


def test_a_sum_over_the_batch_is_divided_before_labels_are_read():
    seen = see(dense_client, [1, 1, 4, 7])
    found = diagnose_dense(seen._replace(update=scaled(seen.update, 4.0)))
    assert found.scale == "sum"
    assert found.labels == (1, 1, 4, 7)
    assert "scale" in verdict(found, "idlg").reason
    assert verdict(found, "inverting_gradients").verdict == "possible"


def test_a_factor_of_100_is_no_sum():
    seen = see(dense_client, [4])
    found = diagnose_dense(seen._replace(update=scaled(seen.update, 100.0)))
    assert (found.scale, found.labels) == ("other", (4,))
    assert (verdict(found, "idlg").verdict, verdict(found, "inverting_gradients").verdict) == ("unlikely", "likely")


def test_duplicate_labels_are_read_and_not_certain_and_distinct_ones_are():
    found = diagnose_dense(see(dense_client, [3, 3, 8, 0]))
    assert (found.labels, found.labels_certain) == ((0, 3, 3, 8), False)
    refused = next(reading for reading in found.readings if reading.rule == "column_minimum")
    assert refused.labels is None
    assert "distinct" in refused.reason
    found = diagnose_dense(see(dense_client, [4, 2, 3, 1]))
    assert (found.labels, found.labels_certain) == ((1, 2, 3, 4), True)


def test_granted_labels_are_taken():
    found = diagnose_dense(see(dense_client, [3], threat=ThreatModel(labels=True)), refusing)
    assert (found.labels, found.labels_certain, found.num_label_unknowns) == ((3,), True, 0)


def test_local_steps_show_in_the_rank_of_the_layers():
    loss = clients.cross_entropy(dense_apply)
    averaging = clients.federated_averaging(loss, learning_rate=0.5, local_epochs=3)
    seen = see(averaging, [2])
    found = diagnose_dense(seen, first_layer_fn=FIRST)
    assert 1 < found.num_gradients <= 3
    assert verdict(found, "inverting_gradients").verdict == "unlikely"
    assert verdict(found, "linear").verdict == "exact"  # all steps see the same example
    known = diagnose_dense(seen, averaging)
    assert known.mismatches == ()
    assert verdict(known, "inverting_gradients").verdict == "likely"


def normalized_apply(params, inputs, *, own):
    """A network with batch normalisation before the sigmoid, by its own statistics or by those of long ago."""
    outputs = hidden(params, inputs)
    mean, variance = (jnp.mean(outputs, 0), jnp.var(outputs, 0)) if own else (0.1, 1.2)
    features = jax.nn.sigmoid((outputs - mean) / jnp.sqrt(variance + 1e-5))
    return features @ params["head"]["kernel"] + params["head"]["bias"]


def normalized_client(mode):
    return clients.federated_sgd(clients.cross_entropy(functools.partial(normalized_apply, own=mode == "training")))


NORMALIZED = {mode: normalized_client(mode) for mode in ("training", "evaluation")}


@pytest.mark.parametrize("victim", ["training", "evaluation"])
@pytest.mark.parametrize("assumed", ["training", "evaluation"])
def test_the_mode_of_batch_normalisation_is_seen(victim, assumed):
    module = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    found = diagnose(see(NORMALIZED[victim], [0, 1, 3, 3]), NORMALIZED[assumed], module=module, rank_budget=0)
    assert found.normalization == {"training": "batch", "evaluation": "running"}[victim]
    assert found.normalized == (("['dense0']['kernel']",) if victim == "training" else ())
    assert len(found.mismatches) == (victim != assumed)
    assert (verdict(found, "inverting_gradients").verdict == "unlikely") == (victim != assumed)


def test_noise_hides_batch_normalisation():
    seen = see(NORMALIZED["training"], [0, 1, 3, 3])
    seen = seen._replace(update=noisy(seen.update, 1e-2))
    found = diagnose(seen, NORMALIZED["training"], rank_budget=0)
    assert found.normalization is None
    assert any("hidden by noise" in note for note in found.notes)


def test_a_module_without_batch_normalisation_has_none():
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert diagnose_dense(see(dense_client, [1]), module=module).normalization == "none"


def test_a_dense_first_layer_gives_one_example_away():
    seen = see(relu_client, [4])
    found = diagnose(seen, relu_client, apply_fn=relu_apply, first_layer_fn=FIRST)
    assert found.attacks[0][:2] == ("linear", "exact")
    active = int(np.sum(np.asarray(hidden(dense_params(), make_batch([4]).inputs)) > 0))
    assert found.first_layer == diagnosis.FirstLayer(True, 32, active, active, 1)
    assert (found.rank, found.kinks) == (64, ("max",))
    assert verdict(found, "levenberg_marquardt").verdict == "unlikely"
    assert "max" in verdict(found, "idlg").reason
    unknown = diagnose(seen, relu_client, rank_budget=0)
    assert any("['dense0']['kernel'] may see the example" in note for note in unknown.notes)


def shifted(shift):
    """The parameters with more or fewer features that are not active."""
    layer = dense_params()["dense0"]
    return dense_params() | {"dense0": layer | {"bias": changed(lambda bias: bias + shift, layer["bias"])}}


@pytest.mark.parametrize("shift", [0.0, -1.0, 9.0])
def test_examples_with_rows_of_their_own_are_counted(shift):
    params = shifted(shift)
    classes = [0, 1, 2, 3]
    active = np.asarray(hidden(params, make_batch(classes).inputs)) > 0
    alone = np.sum(active[:, active.sum(0) == 1], 1)
    seen = see(relu_client, classes, params=params)
    found = diagnose(seen, relu_client, apply_fn=relu_apply, first_layer_fn=FIRST, rank_budget=0)
    assert found.first_layer.num_isolated == np.sum(alone > 1)
    assert found.first_layer.num_agreeing == np.sum(alone[alone > 1])
    isolated = np.sum(alone > 1)
    assert verdict(found, "linear").verdict == ("exact" if isolated == 4 else "possible" if isolated else "unlikely")


@pytest.mark.parametrize("scale", [0.0, 1e-3])
def test_noise_shows_without_a_last_layer_in_zeros_that_are_gone(scale):
    seen = see(relu_client, [4], params=shifted(-1.0))
    seen = seen._replace(update=noisy(seen.update, scale))
    found = metrics.diagnose(seen, relu_client, key=jax.random.key(1), num_classes=NUM_CLASSES, rank_budget=0)
    assert [(t.name, t.value) for t in found.treatments] == (
        [("noise", pytest.approx(1e-3, rel=0.25))] if scale else []
    )
    assert found.readings == ()
    assert any("classifier_fn is not given" in note for note in found.notes)
    assert verdict(found, "inverting_gradients").verdict == "possible"  # labels that nobody looked for are no reason
    assert "that takes classifier_fn" in verdict(found, "inverting_gradients").reason


def test_the_rank_counts_what_the_network_lets_through():
    def paired(params, inputs):
        flat = inputs.reshape(len(inputs), -1)
        return dense_apply(params, jnp.concatenate([flat[:, ::2] + flat[:, 1::2]] * 2, 1))

    client_fn = clients.federated_sgd(clients.cross_entropy(paired))
    seen = see(dense_client, [4])
    found = diagnose(seen, client_fn)
    assert found.rank == 32
    assert "32 of 64" in verdict(found, "inverting_gradients").reason


def test_what_is_too_large_for_a_rank_is_said():
    found = diagnose_dense(see(dense_client, [4]), rank_budget=1_000)
    assert found.rank is None
    assert any("rank_budget=1,000" in note for note in found.notes)


def test_a_smooth_network_in_float64_is_for_levenberg_marquardt(x64):
    params, update = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), (dense_params(), see_in_float32().update))
    extra = {"inputs_like": jnp.zeros((1, 8, 8, 1)), "labels": jnp.array([4])}
    found = diagnose_dense(Observation(params, update, extra))
    assert found.treatments == ()  # rounding to float32 is no noise
    assert found.attacks[0][:2] == ("levenberg_marquardt", "likely")
    assert "64 unknowns" in found.attacks[0].reason


def see_in_float32():
    with jax.enable_x64(False):
        return see(dense_client, [4])


@pytest.mark.parametrize(
    ("activation", "kinks"),
    [
        (jax.nn.relu, ("max",)),
        (functools.partial(jax.nn.leaky_relu, negative_slope=0.2), ("select_n",)),
        (jnp.abs, ("abs",)),
        (jax.nn.sigmoid, ()),
        (jnp.tanh, ()),
        (jax.nn.gelu, ()),
        (jax.nn.silu, ()),
        (jax.nn.softplus, ()),
        (jax.nn.softmax, ()),
        (lambda x: jax.nn.softmax(x), ()),  # which then has another name
        (lambda x: jax.nn.relu(jax.nn.softmax(x) - 0.5), ("max",)),
        (lambda x: x - jnp.max(x), ("reduce_max",)),
    ],
)
def test_kinks_are_read_from_the_operations(activation, kinks):
    seen = Observation({"w": jnp.ones((4, 3))}, None, {"inputs_like": jnp.zeros((1, 4))})
    assert find_kinks(lambda params, x: jax.jit(activation)(x) @ params["w"], seen) == kinks


def judge_r_gap(network, of, size=1):
    """What is said of R-GAP on `network`, for an update of the shapes of `of`, and a client that cannot be called."""
    shapes, rng = jax.eval_shape(lambda: of.init(jax.random.key(0), (8, 8, 1))), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), float), shapes)
    update = scaled(params, 0.1) | {"head": params["head"] | {"bias": jnp.array([0.1, -0.3, 0.2])}}
    seen = Observation(params, update, {"inputs_like": jnp.zeros((size, 8, 8, 1))})
    return verdict(metrics.diagnose(seen, refusing, key=jax.random.key(1), network=network), "r_gap")


def refusing(params, batch):
    raise ValueError("no such batch")


HEAD_LAYER = models.FullyConnected("head", 3, True)
DENSE = models.Network((models.FullyConnected("hidden", 20),), HEAD_LAYER)
NARROW = models.Network((models.Convolution("conv", 1, 3, stride=2),), HEAD_LAYER)


def test_r_gap_needs_constraints_of_full_rank_and_one_example():
    assert "layer conv has constraints of rank" in judge_r_gap(NARROW, NARROW).reason
    assert "the batch has 2" in judge_r_gap(DENSE, DENSE, size=2).reason
    assert "needs float64" in judge_r_gap(DENSE, DENSE).reason


def test_r_gap_is_exact_in_float64_for_the_network_it_is_told(x64):
    assert judge_r_gap(DENSE, DENSE).verdict == "exact"
    wrong = judge_r_gap(DENSE, NARROW)
    assert (wrong.verdict, wrong.reason[:6]) == ("impossible", "params")


NAMED = {"position": "position", "patch": "patch", "attention": "block0.attention", "class_token": "class_token"}


def judge_april(first_block="plain", *, named=True, change=lambda update: update):
    """What is said of APRIL on a small vision transformer."""
    settings = {"patch_size": 2, "width": 6, "heads": 2, "depth": 2, "mlp_ratio": 1, "first_block": first_block}
    apply_fn, params = models.functional(models.ViT((4, 4, 1), 3, **settings, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf.astype(float), params)
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    batch = Batch(jax.random.normal(jax.random.key(1), (1, 4, 4, 1)), jnp.array([1]))
    seen = observe(jax.random.key(2), ThreatModel(labels=True), client_fn, params, batch)
    seen = seen._replace(update=change(seen.update))
    layers_fn = attacks.TokenLayers.named(**NAMED) if named else None
    found = metrics.diagnose(seen, client_fn, key=jax.random.key(3), token_layers_fn=layers_fn, rank_budget=0)
    return verdict(found, "april")


@pytest.mark.usefixtures("x64")
def test_april_is_exact_where_its_condition_holds_and_nothing_changed_the_gradient():
    assert judge_april().verdict == "exact"
    refused = judge_april("residual")
    assert refused.verdict == "impossible"
    assert "such as their LayerNorm" in refused.reason
    assert judge_april(named=False).reason == "the layers of a vision transformer are not named"
    pruned = judge_april(change=lambda update: jax.tree.map(lambda u: jnp.where(jnp.abs(u) > 1e-2, u, 0), update))
    assert pruned.verdict == "unlikely"
    assert "is changed by" in pruned.reason


def test_april_needs_float64():
    assert judge_april().verdict == "possible"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda update: scaled(update, 0.0), "zero in every entry"),
        (lambda update: update | {"head": scaled(update["head"], jnp.nan)}, "got nan at update['head']['bias']"),
        (lambda update: {"head": update["head"]}, "update['dense0']['bias'] is missing"),
        (lambda update: jax.tree.map(lambda leaf: leaf[None], update), "has shape (1, "),
    ],
)
def test_an_update_that_cannot_be_read_is_said_to_be_one(change, text):
    seen = see(dense_client, [4])
    found = diagnose_dense(seen._replace(update=change(seen.update)))
    assert len(found.problems) == 1
    assert text in found.problems[0]
    assert {judged.verdict for judged in found.attacks} == {"impossible"}
    assert text in str(found)


def test_without_the_shape_of_the_batch_nothing_is_guessed():
    found = diagnose_dense(see(dense_client, [4], threat=ThreatModel(batch_size=False)), first_layer_fn=FIRST)
    assert found.guess_norms == found.readings == ()
    assert any("the shape of the batch is not granted" in note for note in found.notes)
    assert {judged.reason for judged in found.attacks} == {"the shape of the batch is not granted"}


def test_integer_inputs_are_for_no_descent():
    def embedded(params, tokens):
        return jnp.mean(params["table"][tokens], 1) @ params["head"]["kernel"]

    params = {"table": jnp.ones((7, 5)), "head": {"kernel": jnp.eye(5, 3)}}
    seen = Observation(params, params, {"inputs_like": jnp.zeros((1, 3), jnp.int32)})
    found = metrics.diagnose(seen, refusing, key=jax.random.key(1), apply_fn=embedded)
    assert "embeddings" in verdict(found, "inverting_gradients").reason


def test_an_assumed_client_that_fails_is_said_to():
    found = diagnose(see(dense_client, [4]), refusing)
    assert found.labels == (4,)
    assert any("no such batch" in note for note in found.notes)
    assert found.rank is None


def test_misuse_is_refused():
    seen = see(dense_client, [4])
    with pytest.raises(ValueError, match="path"):
        diagnose_dense(seen, classifier_fn=labels.dense("nothing"))
    with pytest.raises(ValueError, match="rank_budget"):
        diagnose_dense(seen, rank_budget=-1)
    with pytest.raises(ValueError, match="num_classes"):
        diagnose_dense(seen, num_classes=0)
    with pytest.raises(ValueError, match="concrete"):
        jax.jit(lambda seen: diagnose_dense(seen).norm)(seen)
