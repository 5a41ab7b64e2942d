"""The models, their functional form with three modes of batch normalisation, and models of other libraries."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, ThreatModel, clients, models, observe

# Published counts for 32x32x3 inputs and ten classes; None where nobody has published one.
PARAMETERS = {
    "cnn6": 154_266,
    "convnet": 2_904_970,
    "efficientnet_lite0": 4_652_008 - 990 * 1_281,  # 1,000 classes in the paper
    "groupnorm_net": None,
    "lenet": 15_826,
    "linear": 32 * 32 * 3 * 10 + 10,
    "mlp": 5_256_202,
    "resnet18": 11_173_962,
    "resnet18_imagenet": 11_689_512 - 990 * 513,  # 1,000 classes in torchvision
    "resnet20": 272_474,
    "resnet20_group": 272_474,  # a scale and a bias for every feature, as with batch normalisation
    "resnet20_4": 4_327_754,
    "resnet32_10": None,
    "vit": None,
    "vit_april": None,
}


def shapes(name, input_shape, classes, size=2):
    """Shapes of outputs and parameters, without computing either."""

    def build(inputs):
        apply_fn, params = models.functional(models.MODELS[name](input_shape, classes, rngs=nnx.Rngs(0)))
        return apply_fn(params, inputs), params

    return jax.eval_shape(build, jnp.zeros((size, *input_shape)))


def test_every_model_is_listed_here():
    assert set(models.MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_output_shape_and_parameter_count(name):
    outputs, params = shapes(name, (32, 32, 3), 10)
    assert outputs.shape == (2, 10)
    if PARAMETERS[name] is not None:
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    assert set(params["head"]) == {"kernel", "bias"}


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - {"resnet32_10"}))
def test_other_images_and_classes(name):
    outputs, _ = shapes(name, (28, 20, 1), 7, size=3)
    assert outputs.shape == (3, 7)


@pytest.mark.parametrize("name", ["cnn6", "convnet", "groupnorm_net", "lenet", "linear", "mlp"])
def test_images_of_another_size_are_refused(name):
    def features(size, headless):
        module = models.MODELS[name]((16, 16, 3), 10, rngs=nnx.Rngs(0))
        return (models.headless(module) if headless else module)(jnp.zeros((1, size, size, 3)))

    with pytest.raises(
        ValueError, match=r"inputs must have the size that the model was made for: its dense layer .*got"
    ):
        nnx.eval_shape(lambda: features(32, headless=False))
    assert nnx.eval_shape(lambda: features(16, headless=True)).ndim == 2


@pytest.mark.usefixtures("x64")
def test_group_normalisation_leaves_examples_independent():
    make = functools.partial(models.ResNet, (8, 8, 3), 4, blocks=(1, 1), width=8, norm="group")
    module = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), make(rngs=nnx.Rngs(0)))
    names = {type(node) for _, node in nnx.iter_graph(module)}
    assert nnx.GroupNorm in names
    assert nnx.BatchNorm not in names
    # Even in training mode, in which batch normalisation mixes them.
    apply_fn, params = models.functional(module, batch_norm="training")
    gradient = jax.jit(jax.grad(clients.cross_entropy(apply_fn)))
    batch = Batch(jnp.asarray(np.random.default_rng(0).normal(1, 2, (3, 8, 8, 3))), jnp.array([0, 2, 3]))
    each = [gradient(params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)) for i in range(3)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *each)
    whole = gradient(params, batch)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(whole))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12), whole, mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm must be 'batch' or 'group', got 'layer'"),
        ({"stem": "large"}, "stem must be 'cifar' or 'imagenet', got 'large'"),
        ({"norm": "group", "width": 12}, "width must be a positive multiple of 8 with norm='group', got 12"),
    ],
)
def test_a_residual_network_refuses_a_wrong_normalisation(options, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(models.ResNet.__init__)(object.__new__(models.ResNet), rngs=nnx.Rngs(0), **options)


def test_models_are_finite_and_depend_on_their_seed():
    outputs = []
    for seed in (0, 0, 1):
        apply_fn, params = models.functional(models.LeNet((8, 8, 1), 5, rngs=nnx.Rngs(seed)))
        outputs.append(np.asarray(apply_fn(params, jnp.ones((1, 8, 8, 1)))))
    assert np.isfinite(outputs).all()
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.allclose(outputs[0], outputs[2])


class Normed(nnx.Module):
    """Two batch normalisations, one of them out of sight in a list, whose running statistics are no defaults."""

    def __init__(self, *, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)])
        self.head = nnx.Linear(5, 3, rngs=rngs)
        for i, norm in enumerate(self.norms):
            norm.mean[...], norm.var[...] = jnp.arange(5.0) / 5 + i, 1 + jnp.arange(5.0) / 3

    def __call__(self, x):
        for norm in self.norms:
            x = jnp.tanh(norm(self.first(x) if x.shape[-1] == 4 else x))
        return self.head(x)


@pytest.fixture(scope="module")
def normed():
    return Normed(rngs=nnx.Rngs(0))


INPUTS = jax.random.normal(jax.random.key(0), (6, 4)) * 2 + 0.5
OTHERS = INPUTS.at[1:].add(1.5)


def test_evaluation_ignores_the_other_examples_of_the_batch_and_training_does_not(normed):
    evaluate, params = models.functional(normed)
    train, _ = models.functional(normed, batch_norm="training")
    np.testing.assert_allclose(evaluate(params, INPUTS)[0], evaluate(params, OTHERS)[0], rtol=1e-5)
    assert not np.allclose(train(params, INPUTS)[0], train(params, OTHERS)[0], atol=1e-2)
    assert not np.allclose(train(params, INPUTS), evaluate(params, INPUTS), atol=1e-2)


def test_evaluation_is_the_formula_with_running_statistics(normed):
    apply_fn, params = models.functional(normed)
    x = np.asarray(INPUTS @ params["first"]["kernel"] + params["first"]["bias"])
    for mean, variance in models.running_statistics(normed, params, INPUTS):
        x = np.tanh((x - mean) / np.sqrt(np.asarray(variance) + 1e-5))
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(apply_fn(params, INPUTS), expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_come_in_the_order_of_the_forward_pass(normed):
    _, params = models.functional(normed)
    (mean_first, variance), (mean_second, _) = models.running_statistics(normed, params, INPUTS)
    np.testing.assert_allclose(mean_first, np.arange(5) / 5)
    np.testing.assert_allclose(mean_second, np.arange(5) / 5 + 1)
    np.testing.assert_allclose(variance, 1 + np.arange(5) / 3, rtol=1e-6)


def test_recorded_statistics_are_the_inputs_own(normed):
    _, params = models.functional(normed)
    first = np.asarray(INPUTS @ params["first"]["kernel"] + params["first"]["bias"], np.float64)
    (mean, variance), second = models.batch_norm_inputs(normed, batch_norm="training")(params, INPUTS)
    np.testing.assert_allclose(mean, first.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, first.var(0), rtol=1e-4)  # biased
    normal = np.tanh((first - first.mean(0)) / np.sqrt(first.var(0) + 1e-5))
    np.testing.assert_allclose(second[0], normal.mean(0), rtol=1e-3, atol=1e-5)
    # What enters the second layer depends on the mode of the first.
    evaluated = models.batch_norm_inputs(normed)(params, INPUTS)
    np.testing.assert_allclose(evaluated[0][0], mean, rtol=1e-6)
    assert not np.allclose(evaluated[1][0], second[0], atol=1e-2)


def test_exact_with_the_batchs_own_statistics_is_training(normed):
    train, params = models.functional(normed, batch_norm="training")
    statistics = models.batch_norm_inputs(normed, batch_norm="training")(params, INPUTS)
    exact, _ = models.functional(normed, batch_norm="exact", statistics=statistics)
    np.testing.assert_allclose(exact(params, INPUTS), train(params, INPUTS), rtol=1e-4, atol=1e-5)
    # They are constants: another batch is normalised by them, not by its own.
    np.testing.assert_allclose(exact(params, INPUTS)[0], exact(params, OTHERS)[0], rtol=1e-4, atol=1e-5)


def test_exact_with_running_statistics_is_evaluation(normed):
    evaluate, params = models.functional(normed)
    running = models.running_statistics(normed, params, INPUTS)
    exact, _ = models.functional(normed, batch_norm="exact", statistics=running)
    np.testing.assert_allclose(exact(params, INPUTS), evaluate(params, INPUTS), rtol=1e-5, atol=1e-6)


def test_statistics_may_be_traced(normed):
    _, params = models.functional(normed)
    statistics = models.batch_norm_inputs(normed)(params, INPUTS)

    @jax.jit
    def outputs(given):
        apply_fn, _ = models.functional(normed, batch_norm="exact", statistics=given)
        return apply_fn(params, INPUTS)

    exact, _ = models.functional(normed, batch_norm="exact", statistics=statistics)
    np.testing.assert_allclose(outputs(statistics), exact(params, INPUTS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["evaluation", "training", "exact"])
def test_no_call_changes_the_module_or_its_parameters(mode):
    module = Normed(rngs=nnx.Rngs(1))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module)))
    statistics = [(jnp.ones(5), jnp.ones(5))] * 2 if mode == "exact" else None
    apply_fn, params = models.functional(module, batch_norm=mode, statistics=statistics)
    first = apply_fn(params, INPUTS)
    jax.grad(lambda p: jnp.sum(apply_fn(p, INPUTS)))(params)
    np.testing.assert_array_equal(apply_fn(params, INPUTS), first)
    after = nnx.to_pure_dict(nnx.state(module))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert set(params) == {"first", "norms", "head"}
    assert jax.tree.structure(params) == jax.tree.structure(jax.grad(lambda p: jnp.sum(apply_fn(p, INPUTS)))(params))


@pytest.mark.parametrize(
    ("mode", "count", "message"),
    [
        ("eval", None, "batch_norm must be 'evaluation', 'training' or 'exact', got 'eval'"),
        ("exact", None, "statistics are for batch_norm='exact' and needed there, got False with 'exact'"),
        ("training", 2, "needed there, got True with 'training'"),
        ("exact", 1, "one entry for every batch-normalisation layer, got fewer"),
        ("exact", 3, "one entry for every batch-normalisation layer, got more"),
    ],
)
def test_wrong_modes_and_statistics_are_refused(normed, mode, count, message):
    statistics = None if count is None else [(jnp.zeros(5), jnp.ones(5))] * count

    functional = inspect.unwrap(models.functional)  # beneath the type checker of the tests, which refuses modes first

    def use():
        apply_fn, params = functional(normed, batch_norm=mode, statistics=statistics)
        apply_fn(params, INPUTS)

    with pytest.raises(ValueError, match=message):
        use()


def test_a_module_without_batch_normalisation_has_no_statistics():
    module = models.MLP((4,), 3, hidden=(), rngs=nnx.Rngs(0))
    _, params = models.functional(module)
    with pytest.raises(ValueError, match=r"module must have nnx\.BatchNorm layers, got none in MLP"):
        models.batch_norm_inputs(module)(params, INPUTS)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(7, name="dense0")(x)))


class OwnNnx(nnx.Module):
    def __init__(self, rngs):
        self.dense0, self.head = nnx.Linear(4, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.dense0(x)))


def haiku_style(params, rng, x):
    """The form of `hk.transform(...).apply`."""
    del rng
    hidden = jax.nn.relu(x @ params["mlp/~/linear_0"]["w"] + params["mlp/~/linear_0"]["b"])
    return hidden @ params["mlp/~/linear_1"]["w"] + params["mlp/~/linear_1"]["b"]


def test_every_style_of_model_gives_the_same_gradients():
    apply_nnx, params = models.functional(models.MLP((4,), 3, hidden=(7,), rngs=nnx.Rngs(2)))
    batch = Batch(INPUTS, jnp.array([0, 1, 2, 0, 1, 2]))

    def apply_tuples(params, x):
        for kernel, bias in params[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        return x @ params[-1][0] + params[-1][1]

    tuples = tuple((params[name]["kernel"], params[name]["bias"]) for name in ("dense0", "head"))

    def gradient(apply_fn, params):
        return jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))(params, batch)

    ours = gradient(apply_nnx, params)
    linen = gradient(LinenMLP().apply, {"params": params})
    by_hand = gradient(apply_tuples, tuples)
    own = gradient(models.functional(OwnNnx(nnx.Rngs(0)))[0], params)
    names = {"dense0": "mlp/~/linear_0", "head": "mlp/~/linear_1"}
    modules = {names[name]: {"w": params[name]["kernel"], "b": params[name]["bias"]} for name in names}
    haiku = gradient(lambda params, x: haiku_style(params, None, x), modules)
    plain = jax.grad(clients.cross_entropy(apply_tuples))(tuples, batch)
    for i, name in enumerate(("dense0", "head")):
        for j, leaf in enumerate(("kernel", "bias")):
            others = (linen["params"][name][leaf], by_hand[i][j], plain[i][j], own[name][leaf])
            for other in (*others, haiku[names[name]][leaf[0].replace("k", "w")]):
                np.testing.assert_allclose(ours[name][leaf], other, rtol=1e-5, atol=1e-7)


def test_parameters_that_do_not_fit_the_module_are_named():
    apply_fn, params = models.functional(models.MLP((4,), 3, hidden=(7,), rngs=nnx.Rngs(2)))
    with pytest.raises(ValueError, match=r"params does not fit the module: params\['head'\] *.* is missing"):
        apply_fn({"dense0": params["dense0"]}, INPUTS)
    params["head"]["bias"] = jnp.zeros(4)
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    batch = Batch(INPUTS, jnp.zeros(len(INPUTS), jnp.int32))
    with pytest.raises(ValueError, match=r"params\['head'\]\['bias'\] has shape \(4,\), expected \(3,\)"):
        observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)


@pytest.mark.usefixtures("x64")
def test_two_running_states_give_the_statistics_of_the_batch_between_them():
    normed = models.ResNet((8, 8, 3), 4, blocks=(1,), width=4, rngs=nnx.Rngs(0))
    inputs = jnp.asarray(np.random.default_rng(0).normal(1, 2, (3, 8, 8, 3)))
    normed = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), normed)
    _, params = models.functional(normed)
    exact = models.batch_norm_inputs(normed, batch_norm="training")(params, inputs)
    before = models.running_statistics(normed, params, inputs)
    normed.train()
    normed(inputs)
    after = models.running_statistics(normed, params, inputs)
    inferred = models.inferred_statistics(before, after, momentum=0.9)
    for found, wanted in zip(jax.tree.leaves(inferred), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)
    # Biased: no factor n / (n - 1), which for the first layer is 192 / 191.
    first = np.asarray(normed.stem(inputs)).reshape(-1, 4)
    np.testing.assert_allclose(inferred[0][1], first.var(0), rtol=1e-12)
    # As PyTorch keeps it, the factor is there.
    kept = [(mean, 0.9 * old + 0.1 * first.var(0, ddof=1)) for (mean, _), (_, old) in zip(after[:1], before[:1])]
    unbiased = models.inferred_statistics(before[:1], kept, momentum=0.9)[0][1]
    np.testing.assert_allclose(unbiased * 191 / 192, first.var(0), rtol=1e-12)


def test_running_states_that_do_not_fit_are_refused():
    state = [(jnp.zeros(3), jnp.ones(3))]
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1\.0"):
        models.inferred_statistics(state, state, momentum=1.0)
    with pytest.raises(
        ValueError, match=r"after does not fit before: after\[0\]\[0\] has shape \(4,\), expected \(3,\)"
    ):
        models.inferred_statistics(state, [(jnp.zeros(4), jnp.ones(4))], momentum=0.9)
