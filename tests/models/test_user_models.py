"""Models and losses that users bring: the client's gradient is that of a plain reference, or the reason is named."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, ThreatModel, clients, defenses, models, observe

KEY = jax.random.key(7)
INPUTS = jax.random.normal(jax.random.key(0), (6, 4)) * 2 + 0.5
LABELS = jnp.array([0, 1, 2, 0, 1, 2])
BATCH = Batch(INPUTS, LABELS)


def close(found, expected, tolerance=2e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, rtol=tolerance, atol=tolerance * (1e-3 + np.max(np.abs(e))))


def far(found, other):
    return any(not np.allclose(f, o, atol=1e-3) for f, o in zip(jax.tree.leaves(found), jax.tree.leaves(other)))


def seen(loss_fn, params, batch=BATCH, **settings):
    """What the server sees of one step, through the library's own client."""
    client_fn = jax.jit(clients.federated_sgd(loss_fn))
    return observe(jax.random.key(1), ThreatModel(labels=True), client_fn, params, batch, **settings)


def mean_nll(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


# Modules that draw.


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.first, self.drop = nnx.Linear(4, 16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.norm, self.head = nnx.BatchNorm(16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(jnp.tanh(self.norm(self.first(x)))))


class StochasticDepth(nnx.Module):
    """It makes one draw for the batch from a stream of `nnx.Rngs`, unless it is told to be deterministic."""

    def __init__(self, rngs):
        self.first, self.head = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.rngs, self.deterministic = nnx.Rngs(depth=5), False

    def __call__(self, x):
        keep = 1.0 if self.deterministic else jax.random.bernoulli(self.rngs.depth())
        return self.head(x + keep * jnp.tanh(self.first(x)))


class Noisy(nnx.Module):
    """It adds noise that no switch turns off, from keys of its own, one typed and one raw."""

    def __init__(self, rngs):
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.typed, self.raw = nnx.Variable(jax.random.key(5)), nnx.Variable(jax.random.PRNGKey(5))

    def __call__(self, x):
        noise = jax.random.normal(self.typed[...], x.shape) + jax.random.normal(self.raw[...], x.shape)
        return self.head(x + noise)


def test_dropout_is_off_in_every_mode_of_batch_normalisation():
    module = Dropped(nnx.Rngs(0))
    for mode in ("evaluation", "training"):
        apply_fn, params = models.functional(module, batch_norm=mode)
        x = INPUTS @ params["first"]["kernel"] + params["first"]["bias"]
        x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) if mode == "training" else x / jnp.sqrt(1 + 1e-5)
        expected = jnp.tanh(x) @ params["head"]["kernel"] + params["head"]["bias"]
        np.testing.assert_allclose(apply_fn(params, INPUTS), expected, rtol=1e-4, atol=1e-5)


def test_a_module_that_draws_is_refused_by_the_name_of_what_holds_the_key():
    for module, name in (
        (Noisy(nnx.Rngs(0)), r"module\['raw'\]"),
        (nnx.Sequential(jnp.tanh, Noisy(nnx.Rngs(0))), r"module\['layers'\]\[1\]\['raw'\]"),
    ):
        apply_fn, params = models.functional(module)
        with pytest.raises(ValueError, match=f"module must not draw in its forward pass, got draws from {name}: "):
            jax.eval_shape(apply_fn, params, INPUTS)


def test_a_module_that_turns_its_own_dropout_on_is_refused():
    class Forced(Dropped):
        def __call__(self, x):
            return self.head(self.drop(self.first(x), deterministic=False))

    apply_fn, params = models.functional(Forced(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"got draws from module\['drop'\]\['rngs'\]\['key'\]: victim and attacker"):
        apply_fn(params, INPUTS)
    with pytest.raises(ValueError, match="got draws from"):
        models.batch_norm_inputs(Forced(nnx.Rngs(0)))(params, INPUTS)


def test_a_module_without_random_state_cannot_draw():
    with pytest.raises(ValueError, match="module must hold a random state to draw from, got none in MLP"):
        models.stochastic(models.MLP((4,), 3, hidden=(), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind", [Dropped, StochasticDepth, Noisy])
def test_all_that_a_stochastic_module_draws_comes_from_the_key(kind):
    """Neither the seeds of its streams nor how far they are matter; for another key it draws anew."""
    module, other = kind(nnx.Rngs(0)), kind(nnx.Rngs(0))
    if hasattr(other, "drop"):
        other.drop.rngs = nnx.Rngs(99).dropout.fork()
        other.drop(INPUTS)
    elif hasattr(other, "rngs"):
        other.rngs.depth()
    else:
        other.typed[...], other.raw[...] = jax.random.key(6), jax.random.PRNGKey(6)
    apply_of, params = models.stochastic(module, batch_norm="training")
    other_of, _ = models.stochastic(other, batch_norm="training")
    outputs = [apply_of(jax.random.key(i))(params, INPUTS) for i in range(8)]
    np.testing.assert_array_equal(outputs[3], other_of(jax.random.key(3))(params, INPUTS))
    within = jax.jit(lambda key: apply_of(key)(params, INPUTS))(jax.random.key(3))
    np.testing.assert_allclose(outputs[3], within, rtol=1e-4, atol=1e-5)
    assert len({np.asarray(found).tobytes() for found in outputs}) > 1


def test_the_mask_of_dropout_is_that_of_the_key():
    apply_of, params = models.stochastic(nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))
    ones = jnp.ones((400, 2))
    first, second = (np.asarray(apply_of(key)(params, ones)) for key in jax.random.split(KEY))
    for mask in (first, second):
        assert set(np.unique(mask)) == {0.0, 2.0}
        assert 0.8 < mask.mean() < 1.2
    assert 0.35 < np.mean(first == second) < 0.65
    half = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    apply_of, params = models.stochastic(half)
    assert 0.15 < np.mean(np.asarray(apply_of(KEY)(params, ones)) > 0) < 0.35  # two layers have two masks


def test_victim_and_attacker_share_a_mask_only_where_its_key_is_granted():
    apply_of, params = models.stochastic(Dropped(nnx.Rngs(0)))

    def client_of(key):
        return jax.jit(clients.federated_sgd(clients.cross_entropy(apply_of(key))))

    threat = ThreatModel(draws=True)
    observation = observe(jax.random.key(1), threat, client_of(KEY), params, BATCH, draws=KEY)
    close(observation.update, client_of(observation.extra["draws"])(params, BATCH))
    assert far(observation.update, client_of(jax.random.key(8))(params, BATCH))
    assert "draws" not in observe(jax.random.key(1), ThreatModel(), client_of(KEY), params, BATCH, draws=KEY).extra


def loss_of_noise(key):
    """A loss whose gradient is the mean of the draws that the calls made."""
    noise = jax.random.normal(key)
    return lambda params, batch: params["w"] * noise + 0 * jnp.sum(batch.inputs)


def test_every_example_and_every_local_step_draws_its_own():
    params = {"w": jnp.ones(())}
    rows = clients.per_example(loss_of_noise, loss_key=KEY)(params, BATCH)["w"]
    np.testing.assert_allclose(rows, jax.vmap(jax.random.normal)(jax.random.split(KEY, 6)), rtol=1e-6)
    averaged = clients.federated_averaging(
        loss_of_noise, learning_rate=0.5, local_epochs=2, minibatch_size=3, loss_key=KEY
    )(params, BATCH)["w"]
    draws = jax.vmap(jax.random.normal)(jax.random.split(KEY, 4))
    np.testing.assert_allclose(averaged, draws.mean(), rtol=1e-5)


def test_every_example_has_a_mask_of_its_own():
    apply_of, params = models.stochastic(Dropped(nnx.Rngs(0)))
    same = Batch(jnp.ones((6, 4)), jnp.zeros(6, jnp.int32))
    rows_fn = clients.per_example(lambda key: clients.cross_entropy(apply_of(key)), loss_key=KEY)
    rows = jax.jit(rows_fn)(params, same)
    assert len(np.unique(np.asarray(rows["head"]["bias"]), axis=0)) == 6


# Batch normalisation as users have it.


class Odd(nnx.Module):
    """It has features on axis 1, a mask, a subclass, a layer used twice, layers in containers, and a scale read out."""

    class Doubled(nnx.BatchNorm):
        def __call__(self, x):
            return super().__call__(2 * x)

    def __init__(self, rngs):
        self.first = nnx.BatchNorm(4, axis=1, rngs=rngs)
        self.twice = nnx.BatchNorm(4, axis=-2, rngs=rngs)
        self.doubled = self.Doubled(5, rngs=rngs)
        self.held = nnx.data({"a": [nnx.BatchNorm(5, rngs=rngs)]})
        self.chain = nnx.Sequential(nnx.BatchNorm(5, rngs=rngs), jnp.tanh)
        for i, (_, layer) in enumerate(nnx.iter_modules(self)):
            if isinstance(layer, nnx.BatchNorm):
                layer.scale[...] += jnp.arange(layer.num_features) / 4
                layer.mean[...], layer.var[...] = layer.mean[...] + i / 8, layer.var[...] + i / 5

    def __call__(self, x):
        mask = jnp.arange(x.shape[-1]) < 3
        x = self.first(x, use_running_average=False, mask=mask) * self.first.scale[0]
        x = self.twice(self.twice(x) + 1)
        return self.chain(self.held["a"][0](self.doubled(x)))


IMAGES = jax.random.normal(jax.random.key(3), (6, 4, 5)) * 2 + 1


def plain_odd(params, x, statistics=None):
    """`Odd` written out, in training mode or with given statistics, and the statistics of the inputs of its layers."""
    found, given = [], iter(statistics or [])

    def norm(layer, x, axis, where=True):
        x = jnp.moveaxis(x, axis, -1)
        where = jnp.moveaxis(jnp.broadcast_to(where, IMAGES.shape), axis, -1)[..., :1]
        where = jnp.broadcast_to(where, x.shape)
        axes = tuple(range(x.ndim - 1))
        mean = jnp.mean(x, axes, where=where)
        variance = jnp.mean(jnp.square(x - mean), axes, where=where)
        found.append((mean, variance))
        mean, variance = next(given, (mean, variance))
        return jnp.moveaxis((x - mean) / jnp.sqrt(variance + 1e-5) * layer["scale"] + layer["bias"], -1, axis)

    x = norm(params["first"], x, 1, jnp.arange(5) < 3) * params["first"]["scale"][0]
    x = norm(params["twice"], norm(params["twice"], x, 1) + 1, 1)
    x = norm(params["held"]["a"][0], norm(params["doubled"], 2 * x, 2), 2)
    return jnp.tanh(norm(params["chain"]["layers"][0], x, 2)), found


@pytest.fixture(scope="module")
def odd():
    return Odd(nnx.Rngs(0))


def test_statistics_are_those_of_the_features_and_of_the_mask(odd):
    train, params = models.functional(odd, batch_norm="training")
    outputs, statistics = plain_odd(params, IMAGES)
    np.testing.assert_allclose(train(params, IMAGES), outputs, rtol=1e-3, atol=1e-4)
    found = models.batch_norm_inputs(odd, batch_norm="training")(params, IMAGES)
    assert len(found) == 6
    for own, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_allclose(own, wanted, rtol=1e-3, atol=1e-4)


def test_exact_statistics_hold_whatever_the_module_asks_for(odd):
    _, params = models.functional(odd)
    statistics = [(mean + 0.1, variance + 0.2) for mean, variance in plain_odd(params, IMAGES)[1]]
    exact, _ = models.functional(odd, batch_norm="exact", statistics=statistics)
    np.testing.assert_allclose(exact(params, IMAGES), plain_odd(params, IMAGES, statistics)[0], rtol=1e-3, atol=1e-4)
    running = models.running_statistics(odd, params, IMAGES)
    evaluate, _ = models.functional(odd)
    np.testing.assert_allclose(evaluate(params, IMAGES), plain_odd(params, IMAGES, running)[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"statistics of this layer must have shape \(4,\), got \(1,\)"):
        models.functional(odd, batch_norm="exact", statistics=[(jnp.ones(1), jnp.ones(1))] * 6)[0](params, IMAGES)


def test_examples_that_are_to_stay_apart_are_not_mixed():
    loss_fn, params = models.functional(Dropped(nnx.Rngs(0)), batch_norm="training")
    loss_fn = clients.cross_entropy(loss_fn)
    for name, client_fn in (
        ("dp_sgd", defenses.dp_sgd(loss_fn, KEY, norm=1.0, noise_multiplier=0.0)),
        ("per_example", clients.per_example(loss_fn)),
    ):
        message = f"batch_norm must not be 'training' where {name} takes examples apart, as it mixes them: use "
        for call in (client_fn, jax.jit(client_fn)):
            with pytest.raises(ValueError, match=message):
                call(params, BATCH)
    jax.eval_shape(clients.federated_sgd(loss_fn), params, BATCH)  # the mode is refused only within those clients
    evaluated = clients.cross_entropy(models.functional(Dropped(nnx.Rngs(0)))[0])
    rows = jax.jit(clients.per_example(evaluated))(params, BATCH)
    close(jax.tree.map(lambda leaf: leaf.mean(0), rows), jax.jit(jax.grad(evaluated))(params, BATCH))


# Parameters in several places, outputs and targets of several kinds.


class Tied(nnx.Module):
    """A model of token ids that uses one layer twice, and its embedding as the head as well."""

    def __init__(self, rngs):
        self.embedding, self.layer = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = self.layer(jnp.tanh(self.layer(self.embedding(x))))
        return self.embedding.attend(x)


def test_tied_weights_integer_inputs_and_a_label_for_each_token():
    apply_fn, params = models.functional(Tied(nnx.Rngs(0)))
    assert set(params) == {"embedding", "layer"}
    tokens = jax.random.randint(KEY, (3, 5), 0, 7)
    batch = Batch(tokens, (tokens + 1) % 7)

    def plain(params, batch):
        table, layer = params["embedding"]["embedding"], params["layer"]
        x = table[batch.inputs]
        for activation in (jnp.tanh, lambda z: z):
            x = activation(x @ layer["kernel"] + layer["bias"])
        return mean_nll(x @ table.T, batch.labels)

    observation = seen(clients.cross_entropy(apply_fn), params, batch, num_classes=7)
    close(observation.update, jax.jit(jax.grad(plain))(params, batch))
    assert observation.extra["inputs_like"].dtype == tokens.dtype
    rows = np.asarray(observation.extra["labels"])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, np.asarray(batch.labels)))
    soft = batch._replace(labels=jax.nn.one_hot(batch.labels, 7))
    close(seen(clients.cross_entropy(apply_fn), params, soft, num_classes=7).update, observation.update)


class TwoHeads(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(4, 5, rngs=rngs)
        self.kind, self.place = nnx.Linear(5, 3, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.body(x))
        return {"kind": self.kind(x), "place": (self.place(x),)}


def test_several_heads_with_a_loss_of_ones_own_and_targets_in_a_dictionary():
    apply_fn, params = models.functional(TwoHeads(nnx.Rngs(0)))
    targets = {"kind": LABELS, "place": INPUTS[:, :2] - 3}

    def loss(outputs, labels):
        return mean_nll(outputs["kind"], labels["kind"]) + jnp.mean((outputs["place"][0] - labels["place"]) ** 2)

    def plain(params, batch):
        x = jnp.tanh(batch.inputs @ params["body"]["kernel"] + params["body"]["bias"])
        kind, place = (x @ params[name]["kernel"] + params[name]["bias"] for name in ("kind", "place"))
        return loss({"kind": kind, "place": (place,)}, batch.labels)

    batch = Batch(INPUTS, targets)
    observation = seen(lambda params, batch: loss(apply_fn(params, batch.inputs), batch.labels), params, batch)
    close(observation.update, jax.jit(jax.grad(plain))(params, batch))
    # One permutation is for all targets, so that those of one example stay together.
    granted = observation.extra["labels"]
    order = [int(np.argmin(np.abs(INPUTS[:, 0] - 3 - place))) for place in granted["place"][:, 0]]
    assert sorted(order) == list(range(6))
    assert order != list(range(6))
    np.testing.assert_array_equal(granted["kind"], LABELS[np.asarray(order)])


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression(outputs):
    apply_fn, params = models.functional(models.MLP((4,), outputs, hidden=(3,), rngs=nnx.Rngs(0)))
    batch = Batch(INPUTS, 5 * INPUTS[:, :outputs] - 4)

    def plain(params, batch):
        x = jax.nn.relu(batch.inputs @ params["dense0"]["kernel"] + params["dense0"]["bias"])
        return jnp.mean((x @ params["head"]["kernel"] + params["head"]["bias"] - batch.labels) ** 2)

    close(seen(clients.squared_error(apply_fn), params, batch).update, jax.jit(jax.grad(plain))(params, batch))
    with pytest.raises(ValueError, match=rf"must have the outputs' shape \(6, {outputs}\), got \(6,\)"):
        seen(clients.squared_error(apply_fn), params, batch._replace(labels=batch.labels[:, 0]))
    with pytest.raises(ValueError, match=r"batch\.labels of shape \(6,\) must be integers, got float32"):
        seen(clients.cross_entropy(apply_fn), params, batch._replace(labels=batch.labels[:, 0]))


class LinenDropped(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.tanh(nn.Dense(5)(x))))


def test_linen_with_a_key_for_its_dropout():
    module = LinenDropped()
    params = module.init(jax.random.key(0), INPUTS)

    def loss_of(key):
        return clients.cross_entropy(lambda params, x: module.apply(params, x, train=True, rngs={"dropout": key}))

    def plain(params, batch):
        return mean_nll(module.apply(params, batch.inputs, train=True, rngs={"dropout": KEY}), batch.labels)

    close(seen(loss_of(KEY), params).update, jax.jit(jax.grad(plain))(params, BATCH))
    assert far(seen(loss_of(KEY), params).update, seen(loss_of(jax.random.key(8)), params).update)


# Types of parameters.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float64])
@pytest.mark.usefixtures("x64")
def test_parameters_of_other_types(dtype):
    rngs = nnx.Rngs(0)
    conv, norm, head = nnx.Conv(1, 2, (3, 3), rngs=rngs), nnx.BatchNorm(2, rngs=rngs), nnx.Linear(32, 5, rngs=rngs)
    module = nnx.Sequential(conv, norm, jnp.tanh, lambda x: x.reshape(len(x), -1), head)
    apply_fn, params = models.functional(module)
    loss_fn = clients.cross_entropy(apply_fn)
    inputs = jax.random.normal(KEY, (3, 4, 4, 1), jnp.float32)
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, inputs))
    wide_params, wide_inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, inputs))
    labels = jnp.array([0, 3, 4])
    update = jax.jit(clients.federated_sgd(loss_fn))(params, Batch(inputs, labels))
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype(dtype)}
    exact = jax.jit(jax.grad(loss_fn))(wide_params, Batch(wide_inputs, labels))
    pairs = list(zip(*map(jax.tree.leaves, (update, exact)), strict=True))
    error = np.sqrt(sum(np.sum((np.asarray(u, np.float64) - e) ** 2) for u, e in pairs))
    norm = np.sqrt(sum(np.sum(e**2) for _, e in pairs))
    assert error < {jnp.float16: 0.01, jnp.bfloat16: 0.06, jnp.float64: 1e-12}[dtype] * norm


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_statistics_of_half_precision_are_computed_in_float32(dtype):
    """In half precision the squares of such values overflow, or the mean of so many is off by a tenth."""
    module = jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0))))
    _, params = models.functional(module)
    inputs = (300 + 100 * jax.random.normal(KEY, (2000, 2))).astype(dtype)
    ((mean, variance),) = models.batch_norm_inputs(module)(params, inputs)
    assert (mean.dtype, variance.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(mean, np.asarray(inputs, np.float64).mean(0), rtol=1e-4)
    np.testing.assert_allclose(variance, np.asarray(inputs, np.float64).var(0), rtol=1e-3)
    assert jax.tree.leaves(models.running_statistics(module, params, inputs))[0].dtype == jnp.float32
    before, after = [(jnp.full(2, 1.0, dtype),) * 2], [(jnp.full(2, 1.5, dtype),) * 2]
    inferred = models.inferred_statistics(before, after, momentum=0.99)
    np.testing.assert_allclose(jax.tree.leaves(inferred)[0], (1.5 - 0.99) / 0.01, rtol=1e-5)


# What hides from a check that looks at one call.


@pytest.mark.parametrize("client", ["dp_sgd", "per_example"])
def test_examples_stay_apart_behind_a_jitted_loss_too(client):
    """The cache of `jax.jit` would skip a refusal that is made while tracing."""
    apply_fn, params = models.functional(Dropped(nnx.Rngs(0)), batch_norm="training")
    loss_fn = jax.jit(clients.cross_entropy(apply_fn))
    loss_fn(params, jax.tree.map(lambda leaf: leaf[:1], BATCH))
    made = {
        "dp_sgd": lambda: defenses.dp_sgd(loss_fn, KEY, norm=1.0, noise_multiplier=0.0),
        "per_example": lambda: clients.per_example(loss_fn),
    }[client]()
    for call in (made, jax.jit(made)):
        with pytest.raises(ValueError, match=f"batch_norm must not be 'training' where {client} takes examples apart"):
            call(params, BATCH)


@pytest.mark.parametrize("client", ["dp_sgd", "per_example"])
def test_examples_do_not_share_one_draw(client):
    apply_of, params = models.stochastic(Dropped(nnx.Rngs(0)))
    loss_fn = clients.cross_entropy(apply_of(KEY))
    made = {
        "dp_sgd": lambda: defenses.dp_sgd(loss_fn, jax.random.key(1), norm=1.0, noise_multiplier=0.0),
        "per_example": lambda: clients.per_example(loss_fn),
    }[client]()
    with pytest.raises(ValueError, match=f"loss_key must be given to {client} for a module that draws, got None"):
        made(params, BATCH)


class Keys(nnx.Module):
    """It holds several raw keys, or a constant that looks like one."""

    def __init__(self, rngs, draws):
        self.head, self.draws = nnx.Linear(4, 3, rngs=rngs), draws
        self.pair = nnx.Variable(jax.random.split(jax.random.PRNGKey(5), 3) if draws else jnp.array([2, 3], jnp.uint32))

    def __call__(self, x):
        pair = self.pair[...]
        return self.head(x + jax.random.normal(pair[1], x.shape) if self.draws else x * pair.sum())


def test_raw_keys_are_found_and_constants_are_left_alone():
    apply_fn, params = models.functional(Keys(nnx.Rngs(0), draws=False))
    np.testing.assert_allclose(apply_fn(params, INPUTS), 5 * INPUTS @ params["head"]["kernel"], rtol=1e-5, atol=1e-6)
    drawing = Keys(nnx.Rngs(0), draws=True)
    with pytest.raises(ValueError, match=r"module must not draw in its forward pass, got draws from module.*pair"):
        models.functional(drawing)[0](params, INPUTS)
    apply_of, params = models.stochastic(drawing)
    assert far(apply_of(KEY)(params, INPUTS), apply_of(jax.random.key(8))(params, INPUTS))


class Stacked(nnx.Module):
    """Its three batch-normalisation layers are one stack, over which `nnx.scan` runs."""

    def __init__(self, rngs):
        self.norms = nnx.vmap(lambda key: nnx.BatchNorm(4, rngs=nnx.Rngs(key)))(jax.random.split(rngs(), 3))

    def __call__(self, x):
        return nnx.scan(lambda x, norm: norm(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.norms)


class Remat(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.remat(lambda norm, x: norm(x))(self.norm, x)


def test_layers_inside_of_transforms_are_right_or_refused():
    for module in (Stacked(nnx.Rngs(0)), Remat(nnx.Rngs(0))):
        apply_fn, params = models.functional(module)
        np.testing.assert_allclose(apply_fn(params, INPUTS), INPUTS, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"module must .* batch-normalisation layers"):
            models.batch_norm_inputs(module)(params, INPUTS)
    apply_fn, params = models.functional(
        Stacked(nnx.Rngs(0)), batch_norm="exact", statistics=[(jnp.zeros(4), jnp.ones(4))]
    )
    with pytest.raises(ValueError, match=r"got a stack of shape \(3, 4\), as in nnx.scan"):
        apply_fn(params, INPUTS)


@pytest.mark.parametrize("rows", [-1.0, 2.0])
def test_traced_rows_that_are_no_probabilities_are_seen(rows):
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(lambda params, x: x @ params)))
    update = client_fn(jnp.ones((4, 3)), Batch(INPUTS, jnp.full((6, 3), rows)))
    assert np.isnan(update).all()


def test_traced_classes_that_do_not_exist_are_seen_when_mixed():
    encode = jax.jit(defenses.mixup(3, k=2, high=1.0))
    assert np.isfinite(encode(KEY, BATCH).labels).all()
    assert np.isnan(encode(KEY, Batch(INPUTS, LABELS + 10)).labels).all()


def test_an_empty_batch_is_refused_by_local_steps():
    client_fn = clients.federated_averaging(clients.cross_entropy(lambda params, x: x @ params), learning_rate=0.1)
    with pytest.raises(ValueError, match=r"batch.inputs must have shape .* got \(0, 4\)"):
        client_fn(jnp.ones((4, 3)), Batch(INPUTS[:0], LABELS[:0]))
