"""Defenses by name: what is parsed, what a client with several does, and what its attacker may not know."""

import ast
import functools
import inspect
import itertools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gia_jax import Batch, ThreatModel, clients, defenses, labels, modalities, models, observe, run
from gia_jax.cli.names import ATTACKS, Generator, Target, make_attack
from gia_jax.defenses.mixing import as_probabilities
from gia_jax.defenses.protected import COMBINATIONS, DEFENSES, Part, encoded, live_shares, parse, promises, protect
from gia_jax.matching import adaptive
from gia_jax.matching.objectives import cosine, euclidean

MODULE = models.MLP((8, 8, 3), 4, hidden=(48,), activation=jax.nn.sigmoid, rngs=nnx.Rngs(0))
BATCH = Batch(jax.random.normal(jax.random.key(0), (4, 8, 8, 3)), jnp.array([1, 3, 0, 2]))
KEYS = jax.random.split(jax.random.key(1), 2)
RANDOM = ("gaussian", "laplace", "ternary", "quantize", "dpsgd", "precode")
ENCODINGS = ("mixup", "instahide", *COMBINATIONS)


@functools.cache
def protected_by(*texts):
    return protect([part for text in texts for part in parse(text)], MODULE, num_classes=4)


def update_of(protected, key, batch=BATCH):
    return protected.client_fn(key)(protected.params, batch)


@functools.cache
def undefended_update():
    return update_of(protected_by(), KEYS[0])


@jax.jit
def relative_distance(a, b):
    return optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b)


def distance(a, b):
    return float(relative_distance(a, b))


def test_a_name_has_defaults_and_settings():
    assert [str(part) for part in parse("prune")] == ["prune:ratio=0.9"]
    assert [str(part) for part in parse("prune:ratio=0.9999999")] == ["prune:ratio=0.9999999"]
    assert [str(part) for part in parse("dpsgd:norm=2")] == ["dpsgd:noise_multiplier=1,norm=2"]
    assert [str(part) for part in parse("prune_instahide")] == ["instahide:k=4", "prune:ratio=0.9"]
    assert parse("quantize:bits=3")[0].settings == {"bits": 3}
    assert parse("none") == ()
    for name in (*DEFENSES, *COMBINATIONS):
        assert parse(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shield", "defense must be one of none, prune, topk, .*prune_instahide, got 'shield'"),
        ("prune:share=0.9", "defense prune can be set ratio, got 'share=0.9'"),
        ("sign:scale=1", "defense sign can be set nothing, got 'scale=1'"),
        ("prune:ratio=much", "defense prune needs a number for ratio, got 'much'"),
        ("mixup:k=2.5", "defense mixup needs an integer for k, got '2.5'"),
        ("prune_mixup:k=2", "defense prune_mixup takes no settings, got 'k=2'"),
        ("prune:ratio=0.5,ratio=0.9", "defense prune must set ratio once, got 'ratio=0.5,ratio=0.9'"),
    ],
)
def test_what_cannot_be_parsed_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune:ratio=1", r"ratio must be in \[0, 1\), got 1\.0"),
        ("gaussian:scale=-1", r"scale must not be negative, got -1\.0"),
        ("clip:norm=0", r"norm must be positive, got 0\.0"),
        ("mixup:k=0", "k must be an integer from 1 to 10000, got 0"),
        ("quantize:bits=1", "bits must be an integer from 2 to 16, got 1"),
        ("soteria:ratio=2", r"ratio must be in \[0, 1\), got 2\.0"),
        ("soteria:num_probes=-1", "num_probes must be an integer of at least 0, got -1"),
        ("precode:size=0", "size must be an integer of at least 1, got 0"),
        ("dpsgd:noise_multiplier=-1", r"noise_multiplier must not be negative, got -1\.0"),
        ("dpsgd:noise_multiplier=inf", "noise_multiplier must be finite, got inf"),
    ],
)
def test_a_bad_setting_is_refused_when_the_client_is_built(text, message):
    with pytest.raises(ValueError, match=message):
        protected_by(text)


def test_what_does_not_go_together_is_named():
    with pytest.raises(ValueError, match="one encoding at most, got mixup and instahide"):
        protected_by("mixup", "instahide")
    with pytest.raises(ValueError, match="one pruning at most, got soteria and soteria"):
        protected_by("soteria:ratio=0.5", "soteria:ratio=0.8")

    def averaging(loss_fn):
        return clients.federated_averaging(loss_fn, learning_rate=0.1, local_epochs=2)

    for name in ("dpsgd", "precode"):
        with pytest.raises(ValueError, match=f"{name} is for one step"):
            protect(parse(name), MODULE, num_classes=4, make_client=averaging)


def test_dp_sgd_gives_every_example_of_precode_a_draw_of_its_own():
    both = protected_by("precode:size=8", "dpsgd:noise_multiplier=0,norm=1e6")
    alone = protected_by("precode:size=8")

    @functools.partial(jax.jit, static_argnums=0)
    def spread(protected_update):
        """Variance over the client's keys, of all entries together."""
        updates = jax.vmap(protected_update)(jax.random.split(jax.random.key(3), 400))
        return optax.tree.sum(jax.tree.map(lambda leaf: jnp.var(leaf, 0), updates))

    def of(protected, size):
        same = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], size, 0), BATCH)
        return float(spread(lambda key: protected.client_fn(key)(protected.params, same)))

    assert of(both, 1) == pytest.approx(of(alone, 1), rel=0.2)
    assert of(both, 4) == pytest.approx(of(both, 1) / 4, rel=0.2)
    # Without the noise of both it is the client that the attacker assumes.
    assumed, assumed_alone = (jax.jit(one.assumed_fn)(one.params, BATCH) for one in (both, alone))
    assert distance(assumed, assumed_alone) < 1e-5
    private = protected_by("precode:size=8", "dpsgd:noise_multiplier=1,norm=0.1")
    assert private.modelled
    update = jax.jit(lambda key: update_of(private, key))(KEYS[0])
    assert distance(update, jax.jit(private.assumed_fn)(private.params, BATCH)) > 1


def test_shares_of_live_features_are_those_of_each_victim():
    module = models.MLP((8, 8, 3), 4, hidden=(48,), rngs=nnx.Rngs(0))  # it has features that are 0
    apply_fn, params = models.functional(module)
    inputs = jnp.stack([BATCH.inputs[1:2], BATCH.inputs[2:3]])
    shares = live_shares(parse("soteria:ratio=0.9"), apply_fn, params, inputs)
    assert abs(shares[0] - shares[1]) > 1e-3
    for share, one in zip(shares, inputs, strict=True):
        expected = defenses.live_share_pruned(apply_fn, labels.dense("head"), params, one, ratio=0.9)
        assert share == pytest.approx(float(expected), abs=1e-6)
        assert 0 < share < 1
    with pytest.raises(ValueError, match=r"parts must have soteria, got \['prune'\]"):
        live_shares(parse("prune"), apply_fn, params, inputs)


def test_parts_act_in_their_order():
    both = protected_by("clip:norm=0.5", "prune:ratio=0.5")
    apply_fn, params = models.functional(MODULE)
    chain = optax.chain(defenses.clip(0.5), defenses.prune(0.5))
    expected = defenses.defended(clients.federated_sgd(clients.cross_entropy(apply_fn)), chain)(params, BATCH)
    assert distance(update_of(both, KEYS[0]), expected) < 1e-5
    other = update_of(protected_by("prune:ratio=0.5", "clip:norm=0.5"), KEYS[0])
    assert distance(other, expected) > 1e-2


@pytest.mark.parametrize("name", [*DEFENSES, *COMBINATIONS])
def test_every_defense_is_a_client_that_may_be_compiled_mapped_and_differentiated(name):
    """One contract for defenses of the update, of examples, of images and of the model; a new name is one more case."""
    protected = protected_by(name)

    def share(key, batch):
        key_encode, key_client = jax.random.split(key)
        return protected.client_fn(key_client)(protected.params, protected.encode_fn(key_encode, batch))

    together = jax.jit(jax.vmap(share))
    two = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), BATCH)
    updates = together(KEYS, two)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], updates) for i in range(2))
    chex.assert_trees_all_equal_shapes_and_dtypes(first, protected.params)
    chex.assert_trees_all_close(second, share(KEYS[1], BATCH), rtol=1e-3, atol=1e-5)
    # Randomness is the client's own: another key another update, the same key the same.
    assert (distance(first, second) > 1e-5) == (name in (*RANDOM, *ENCODINGS))
    again = together(KEYS, two._replace(inputs=np.stack([BATCH.inputs, np.full_like(BATCH.inputs, np.nan)])))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], again), first)
    # The attacker's client: what it assumes has a derivative in the inputs.
    soft = as_probabilities(BATCH, 4)

    def objective(inputs):
        return protected.adapt_fn(cosine)(protected.assumed_fn(protected.params, Batch(inputs, soft)), first)

    gradient = jax.jit(jax.grad(objective))(0.5 * BATCH.inputs)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("name", [*DEFENSES, *COMBINATIONS])
def test_every_defense_goes_before_another_of_the_update(name):
    name = "clip:norm=0.1" if name == "clip" else name
    alone, bounded = protected_by(name), protected_by(name, "clip:norm=0.01")
    batch = alone.encode_fn(KEYS[1], BATCH)
    once, _ = defenses.clip(0.01).update(update_of(alone, KEYS[0], batch), optax.EmptyState())
    chex.assert_trees_all_close(update_of(bounded, KEYS[0], batch), once, rtol=1e-3, atol=1e-7)
    if name != "precode":  # another model
        undefended, _ = defenses.clip(0.01).update(undefended_update(), optax.EmptyState())
        plain_clip = name == "clip:norm=0.1"
        assert (distance(once, undefended) < 1e-4) == plain_clip


@pytest.mark.parametrize("name", [name for name in DEFENSES if name != "precode"])
def test_the_attacker_s_client_is_the_undefended_one_or_clips_examples(name):
    private = name == "dpsgd"
    protected = protected_by("dpsgd:noise_multiplier=1,norm=0.1" if private else name)
    assumed, plain = protected.assumed_fn(protected.params, BATCH), undefended_update()
    if private:
        noiseless = update_of(protected_by("dpsgd:noise_multiplier=0,norm=0.1"), KEYS[0])
        assert distance(noiseless, assumed) < 1e-5
    assert (distance(assumed, plain) < 1e-5) != private


@pytest.mark.parametrize(
    "text", ["prune:ratio=0", "topk:ratio=0", "gaussian:scale=0", "laplace:scale=0", "soteria:ratio=0"]
)
def test_strength_nothing_is_the_undefended_client_and_attacker(text):
    """Bit for bit, so that every figure of theirs is that of the undefended client."""
    weakest = protected_by(text)
    jax.tree.map(np.testing.assert_array_equal, update_of(weakest, KEYS[0]), undefended_update())
    assert weakest.adapt_fn(cosine) is cosine


@pytest.mark.parametrize(
    "text", ["clip:norm=1e9", "dpsgd:noise_multiplier=0,norm=1e9", "mixup:k=1", "quantize:bits=16"]
)
def test_the_weakest_of_the_rest_leaves_the_update_to_rounding(text):
    weakest = protected_by(text)
    batch = weakest.encode_fn(KEYS[1], BATCH)
    assert distance(update_of(weakest, KEYS[0], batch), undefended_update()) < 1e-3


@pytest.mark.parametrize("name", ["gaussian", "ternary", "quantize"])
def test_what_the_attacker_assumes_is_the_expectation(name):
    protected = protected_by(name)
    draw = jax.jit(jax.vmap(lambda key: update_of(protected, key)))
    mean = jax.tree.map(lambda leaf: leaf.mean(0), draw(jax.random.split(jax.random.key(2), 256)))
    assumed, one = protected.assumed_fn(protected.params, BATCH), update_of(protected, KEYS[0])
    # The mean of 256 is nearer by a factor of 16, within a third.
    assert distance(mean, assumed) < 1.33 * distance(one, assumed) / 16


def test_encodings_mix_the_whole_data_set_and_only_those_asked_for_are_used():
    protected = protected_by("mixup:k=3")
    one, rest = (jax.tree.map(lambda leaf, part=part: leaf[part], BATCH) for part in (slice(0, 1), slice(1, 4)))
    encoding = encoded(protected.encode_fn, KEYS[0], one, rest)
    assert encoding.inputs.shape == (1, 8, 8, 3)
    assert encoding.labels.shape == (1, 4)
    assert encoding.labels.sum() == pytest.approx(1, abs=1e-5)
    whole = protected.encode_fn(KEYS[0], BATCH)
    np.testing.assert_allclose(encoding.inputs, whole.inputs[:1], rtol=1e-6)
    plain = encoded(protected_by("prune").encode_fn, KEYS[0], one, rest)
    np.testing.assert_array_equal(plain.inputs, one.inputs)
    np.testing.assert_array_equal(plain.labels, one.labels)


def test_the_paper_s_combinations_encode_and_prune():
    for name in COMBINATIONS:
        protected = protected_by(name)
        encoding = protected.encode_fn(KEYS[0], BATCH)
        assert encoding.labels.shape == (4, 4)
        kernel = update_of(protected, KEYS[0], encoding)["head"]["kernel"]
        assert int(np.sum(kernel != 0)) == kernel.size - int(0.9 * kernel.size)


CHAINED = {
    "prune": "prune:ratio=0.95",
    "topk": "topk:ratio=0.9",
    "clip": "clip:norm=0.1",
    "gaussian": "gaussian:scale=1e-3",
    "laplace": "laplace:scale=1e-3",
    "sign": "sign",
    "ternary": "ternary",
    "quantize": "quantize",
}
NOISE, ROUNDING, CUTS = {"gaussian", "laplace"}, {"ternary", "quantize"}, {"prune", "topk"}
# The true update: much longer than the norm of clipping, its sizes spread as a gradient's.
LONG = {
    name: jnp.square(jax.random.normal(KEYS[0], (n,))) * (-1) ** jnp.arange(n) for name, n in (("a", 900), ("b", 60))
}


def chained(*texts):
    parts = [part for text in texts for part in parse(text)]
    return protect(parts, MODULE, num_classes=4, make_client=lambda loss_fn: lambda params, batch: LONG)


@functools.cache
def directions():
    return jax.vmap(lambda key: optax.tree.random_like(key, LONG))(KEYS)


def not_modelled(first, second):
    unbiased = NOISE | ROUNDING
    signs_lost = {first, second} & NOISE and "sign" in (first, second)
    return bool(signs_lost or (first in unbiased and second in CUTS | {"clip"}))


@pytest.mark.parametrize("second", CHAINED)
@pytest.mark.parametrize("first", CHAINED)
def test_no_pair_of_defenses_drives_the_attacker_that_knows_it_from_the_truth(first, second):
    both = chained(CHAINED[first], CHAINED[second])
    assert both.modelled != not_modelled(first, second)
    # An attacker that does not know the chain has no more than directions.
    objectives = (cosine, euclidean) if both.modelled else (cosine,)

    @jax.vmap  # not compiled: the pairs have most of their operations in common
    def losses(key, direction):
        """Of each objective at the truth, at no update and at a tiny one."""
        update, truth = both.client_fn(key)(LONG, BATCH), both.assumed_fn(LONG, BATCH)
        points = jax.tree.map(lambda t, d: jnp.stack([t, 0 * d, 1e-6 * d]), truth, direction)
        return jnp.stack([jax.vmap(both.adapt_fn(fn), (0, None))(points, update) for fn in objectives])

    at_truth, *elsewhere = np.moveaxis(losses(KEYS, directions()), -1, 0)
    for loss in elsewhere:
        assert (at_truth < loss).all()
    if not both.modelled:
        assert both.adapt_fn(cosine) is cosine
        assert both.assumed_fn(LONG, BATCH) is LONG


@pytest.mark.parametrize("rest", [("prune",), ("topk",), ("sign",), ("prune", "sign")])
def test_the_attacker_does_not_know_the_norm_of_clipping(rest):
    """Of one update it makes the same under every norm, and of the truth as little as without clipping."""
    texts = [CHAINED[name] for name in rest]
    narrow, wide, without = (chained(*clip, *texts) for clip in (["clip:norm=0.1"], ["clip:norm=7"], []))

    def loss(assumed, update):
        return float(assumed.adapt_fn(euclidean)(assumed.assumed_fn(LONG, BATCH), update))

    short, long = (client.client_fn(KEYS[0])(LONG, BATCH) for client in (narrow, without))
    assert loss(narrow, short) == loss(wide, short)
    assert loss(narrow, short) == pytest.approx(loss(without, long), rel=1e-4, abs=1e-6)
    assert loss(narrow, optax.tree.scale(-1, short)) > 2 * loss(narrow, short)


@pytest.mark.parametrize("objective_fn", [cosine, euclidean])
@pytest.mark.parametrize("name", ["prune", "topk"])
def test_what_pruning_costs_does_not_depend_on_the_length_of_an_update(name, objective_fn):
    pruned = chained(CHAINED[name])
    update = pruned.client_fn(KEYS[0])(LONG, BATCH)
    other = jax.tree.map(lambda leaf, noise: leaf + noise, LONG, optax.tree.random_like(KEYS[1], LONG))
    losses = [float(pruned.adapt_fn(objective_fn)(optax.tree.scale(c, other), update)) for c in (1e-3, 1.0, 1e3)]
    assert losses == pytest.approx([losses[1]] * 3, rel=1e-4)
    assert losses[1] > 100 * abs(pruned.adapt_fn(objective_fn)(LONG, update))
    # Without one length the penalty alone decides.
    assert adaptive.pruned(objective_fn)(optax.tree.scale(1e3, other), update) > 1e4 * losses[1]


@pytest.mark.parametrize("rest", [("prune", "gaussian"), ("gaussian",), ("topk", "laplace"), ("quantize",)])
def test_behind_noise_the_attacker_clips_too(rest):
    """The clipped gradient under the same defenses, without clipping, is what the attacker takes it for."""
    texts = [CHAINED[name] for name in rest]
    with_clip = chained("clip:norm=0.1", *texts)
    short, _ = defenses.clip(0.1).update(LONG, optax.EmptyState())
    parts = [part for text in texts for part in parse(text)]
    without = protect(parts, MODULE, num_classes=4, make_client=lambda loss_fn: lambda params, batch: short)
    update = update_of(with_clip, KEYS[0])
    losses = [float(one.adapt_fn(euclidean)(one.assumed_fn(one.params, BATCH), update)) for one in (with_clip, without)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("others", [(), ("clip",), ("prune",), ("ternary",), ("soteria",)])
def test_a_zero_says_something_where_the_client_makes_none(others):
    """A gradient that is 0 is seen as 0 among signs; where the client makes zeros too, nobody knows which is which."""
    parts = [part for text in ("sign", *others) for part in parse(text)]
    adapted = protect(parts, MODULE, num_classes=4).adapt_fn(cosine)
    dead = LONG | {"a": LONG["a"].at[:300].set(0)}
    signs, _ = defenses.sign().update(dead, optax.EmptyState())
    alive = LONG | {"a": LONG["a"].at[300:].set(dead["a"][300:])}
    assert (adapted(alive, signs) > adapted(dead, signs) + 0.1) == (not set(others) - {"clip"})
    # Signs alone decide, and a random update has as many wrong whatever is left out.
    wrong = optax.tree.scale(-1, dead)
    assert adapted(wrong, signs) > 0.5


NOT_OF_THE_UPDATE = ("dpsgd", "precode:size=8", "soteria:ratio=0.5", "mixup:k=2")


@pytest.mark.parametrize(
    "names",
    [*itertools.combinations(NOT_OF_THE_UPDATE, 2), (*NOT_OF_THE_UPDATE, "clip", "prune:ratio=0.5", "quantize")],
)
def test_any_defenses_are_one_client(names):
    """None of them is lost, it compiles, and the attacker's objective has a derivative."""
    both = protected_by(*names)
    assert both.encode_fn(KEYS[1], BATCH).labels.ndim == 1 + any(name.startswith("mixup") for name in names)
    assert ("encoder" in both.params) == ("precode:size=8" in names)
    assert promises([part for name in names for part in parse(name)]) == promises(
        [part for name in names if not name.startswith("precode") for part in parse(name)]
    )
    batch = both.encode_fn(KEYS[1], BATCH)
    update = jax.jit(lambda key: update_of(both, key, batch))(KEYS[0])
    norm = optax.tree.norm(update)
    assert np.isfinite(norm)
    entries = sum(leaf.size for leaf in jax.tree.leaves(update))
    if "clip" not in names:  # noise is much longer than a gradient
        assert (norm > entries**0.5 / 8) == ("dpsgd" in names)
    kernel = update["head"]["kernel"]
    assert bool((kernel == 0).all(1).any()) == ("soteria:ratio=0.5" in names)

    def objective(inputs):
        return both.adapt_fn(cosine)(both.assumed_fn(both.params, batch._replace(inputs=inputs)), update)

    gradient = jax.jit(jax.grad(objective))(0.5 * batch.inputs)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("other", ["soteria:ratio=0.5", "precode:size=8", "mixup:k=2"])
def test_signs_go_with_defenses_that_are_not_of_the_update(other):
    both = protected_by(other, "sign")
    batch = both.encode_fn(KEYS[1], BATCH)
    truth, signs = both.assumed_fn(both.params, batch), update_of(both, KEYS[0], batch)
    loss = both.adapt_fn(cosine)
    if other.startswith("precode"):  # the code that was drawn is not known
        assert loss(truth, signs) < 0.5 * loss(optax.tree.scale(-1, truth), signs)
    else:
        assert loss(truth, signs) < 0.02
    assert loss(optax.tree.scale(-1, truth), signs) > 0.5


def test_dp_sgd_is_noise_before_the_rest():
    assert protected_by("dpsgd").modelled
    assert protected_by("quantize", "dpsgd").modelled
    for name in ("clip", "prune", "sign"):
        assert not protected_by("dpsgd", name).modelled
        assert protected_by("dpsgd", name).adapt_fn(cosine) is cosine


@pytest.mark.parametrize("other", ["prune:ratio=0.5", "sign", "clip"])
def test_dp_sgd_without_noise_is_a_clipping_of_a_known_norm(other):
    clipped, other = protected_by("dpsgd:noise_multiplier=0,norm=0.1", other), protected_by(other)
    assert clipped.modelled
    truth, update = clipped.assumed_fn(clipped.params, BATCH), update_of(clipped, KEYS[0])
    assert clipped.adapt_fn(cosine)(truth, update) == other.adapt_fn(cosine)(truth, update) < 0.02


@pytest.mark.parametrize("other", ["prune:ratio=0.5", "topk:ratio=0.5"])
def test_beside_soteria_pruning_is_charged_but_in_the_last_layer(other):
    both = protected_by("soteria:ratio=0.5", other)
    truth, update = both.assumed_fn(both.params, BATCH), update_of(both, KEYS[0])

    def loss(changed):
        """With the largest entry of the update where this one was seen to be zero."""
        largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(update))
        wrong = {
            name: jax.tree.map(lambda s, o, name=name: jnp.where((o == 0) & (name in changed), 10 * largest, s), *both)
            for name, both in {name: (truth[name], update[name]) for name in truth}.items()
        }
        return float(both.adapt_fn(cosine)(wrong, update))

    assert loss(()) == loss({"head"}) == pytest.approx(0, abs=1e-5)
    assert loss(set(truth) - {"head"}) > 1


@pytest.mark.parametrize("other", ["gaussian:scale=1e-4", "quantize:bits=14"])
def test_noise_and_rounding_hide_what_soteria_left_out(other):
    both = protected_by("soteria:ratio=0.95", other)
    truth, update = both.assumed_fn(both.params, BATCH), update_of(both, KEYS[0])
    assert both.adapt_fn(cosine)(truth, update) < 0.01
    spoiled = truth | {"head": optax.tree.zeros_like(truth["head"])}
    assert both.adapt_fn(cosine)(spoiled, update) == both.adapt_fn(cosine)(truth, update)


def test_objectives_follow_the_defenses_of_the_update():
    assert protected_by("clip").adapt_fn(cosine) is cosine
    both = protected_by("prune", "sign")
    signs, plain = update_of(both, KEYS[0]), both.assumed_fn(both.params, BATCH)
    assert both.adapt_fn(cosine)(plain, signs) < 0.02
    assert both.adapt_fn(cosine)(optax.tree.scale(-1, plain), signs) > 0.5
    update = update_of(protected_by("soteria:ratio=0.5"), KEYS[0])
    plain = protected_by().assumed_fn(protected_by().params, BATCH)
    assert cosine(plain, update) > 1e-4
    assert protected_by("soteria").adapt_fn(cosine)(plain, update) == pytest.approx(0, abs=1e-5)
    precode = protected_by("precode:size=8")
    truth = precode.assumed_fn(precode.params, BATCH)
    spoiled = truth | {"encoder": optax.tree.zeros_like(truth["encoder"])}
    assert precode.adapt_fn(cosine)(truth, spoiled) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "text"),  # every attack, every kind of defense, and pruning, whose attacker changes most, with each attack
    [
        *[(name, "prune:ratio=0.5") for name, named in ATTACKS.items() if not named.models and named.data != "graphs"],
        ("dlg", "gaussian"),
        ("idlg", "soteria:ratio=0.5"),
        ("inverting_gradients", "dpsgd"),
        ("grad_inversion", "mixup:k=2"),
    ],
)
def test_every_attack_takes_the_defended_client(name, text):
    """With the client and the objective of an attacker that knows the defense; what it finds is of what it sees."""
    protected = protected_by(text)
    low, high = jnp.full(3, -3.0), jnp.full(3, 3.0)
    modality = modalities.image((8, 8, 3))
    target = Target(
        protected.assumed_fn, labels.dense("head"), 4, 4, modality, bounds=(low, high), apply_fn=protected.apply_fn
    )
    if name == "gias":
        decoder = {"kernel": jax.random.normal(KEYS[0], (5, 8 * 8 * 3))}
        target = target._replace(
            generator=Generator(lambda p, z: (z @ p["kernel"]).reshape(-1, 8, 8, 3), decoder, (5,), 1)
        )
    adapted = []
    target = target._replace(adapt_fn=lambda fn: adapted.append(fn) or protected.adapt_fn(fn))
    attack = make_attack(name, target, labels="known", solver="paper", num_steps=3)
    assert len(adapted) == 1

    @jax.jit
    def found(key):
        batch = protected.encode_fn(key, BATCH._replace(inputs=jax.random.normal(key, BATCH.inputs.shape)))
        seen = observe(key, ThreatModel(labels=True), protected.client_fn(key), protected.params, batch, num_classes=4)
        return run(attack, KEYS[0], seen, num_steps=3)[0]

    first, second = (found(key) for key in KEYS[:2])
    for one in (first, second):
        assert one.batch.inputs.shape == BATCH.inputs.shape
        assert np.isfinite(one.batch.inputs).all()
        assert one.is_finite
    assert distance(first.batch.inputs, second.batch.inputs) > 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip:norm=nan", "defense clip:norm=nan: norm must be positive, got nan"),
        ("prune:ratio=1e400", r"defense prune:ratio=inf: ratio must be in \[0, 1\), got inf"),
        ("prune:ratio=", "defense prune needs a number for ratio, got ''"),
        ("prune:ratio", "defense prune needs a number for ratio, got ''"),
        ("prune:ratio=0.9:x", "defense prune needs a number for ratio, got '0.9:x'"),
        ("prune:", "defense prune can be set ratio, got ''"),
        (" prune", "defense must be one of none, .*, got ' prune'"),
        ("clip:norm=1,,", "defense clip can be set norm, got ''"),
        ("quantize:bits=3.0", "defense quantize needs an integer for bits, got '3.0'"),
        ("none:x=1", "defense none takes no settings, got 'x=1'"),
        ("prune_mixup:", "defense prune_mixup takes no settings, got ''"),
        ("precode:size=100000000000", "defense precode:size=100000000000: size must fit into memory"),
    ],
)
def test_a_setting_is_refused_before_there_is_data_or_a_model(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_parts_that_parse_would_not_make_are_refused():
    with pytest.raises(ValueError, match="defense clip:norm=-1: norm must be positive, got -1"):
        protect([Part("clip", {"norm": -1.0})], MODULE, num_classes=4)
    with pytest.raises(ValueError, match="defense clip must set norm, got nothing"):
        protect([Part("clip", {})], MODULE, num_classes=4)
    with pytest.raises(ValueError, match=r"defense must be one of prune, .*, got 'shield'"):
        protect([Part("shield", {})], MODULE, num_classes=4)


@pytest.mark.parametrize("text", ["dpsgd:noise_multiplier=0,norm=0.1", "precode:size=4", "soteria"])
def test_an_option_of_federated_sgd_is_that_of_its_defenses(text):
    module = models.LeNet((8, 8, 3), 4, rngs=nnx.Rngs(0))
    for lowering in ("native", "matmul"):
        make_client = functools.partial(clients.federated_sgd, lowering=lowering)
        one = protect(parse(text), module, num_classes=4, make_client=make_client)
        program = str(jax.make_jaxpr(one.client_fn(KEYS[0]))(one.params, BATCH))
        assert ("conv_general_dilated" in program) == (lowering == "native")


def test_another_client_than_of_one_step_is_refused_beside_dp_sgd_and_precode():
    for name in ("dpsgd", "precode"):
        for make_client in (lambda loss_fn: clients.federated_sgd(loss_fn), clients.per_example):
            with pytest.raises(ValueError, match=f"defense {name} is for one step on the whole batch: make_client"):
                protect(parse(name), MODULE, num_classes=4, make_client=make_client)


def test_precode_s_weights_are_public_and_of_no_key_that_a_user_has():
    default, again = (protect(parse("precode:size=4"), MODULE, num_classes=4) for _ in range(2))
    assert distance(default.params["encoder"], again.params["encoder"]) == 0
    own = protect(parse("precode:size=4"), MODULE, num_classes=4, key=jax.random.key(0))
    assert distance(default.params["encoder"], own.params["encoder"]) > 0.1


def test_examples_that_do_not_fit_each_other_are_named():
    encode_fn, one = protected_by("mixup").encode_fn, jax.tree.map(lambda leaf: leaf[:1], BATCH)
    wrong = [
        (one, BATCH._replace(labels=jnp.eye(4)), r"others.labels must be int32 of shape \(m\) like batch.labels, got"),
        (one, BATCH._replace(labels=jnp.zeros(4)), r"others.labels must be int32 of shape \(m\) like batch.labels"),
        (one, BATCH._replace(inputs=BATCH.inputs[:, :4]), r"others.inputs must be float32 of shape \(m, 8, 8, 3\)"),
        (one, BATCH._replace(labels=BATCH.labels[:2]), r"others.labels must be 4, one for each example, got \(2,\)"),
        (one._replace(labels=BATCH.labels), BATCH, r"batch.labels must be 1, one for each example, got \(4,\)"),
    ]
    for batch, others, message in wrong:
        with pytest.raises(ValueError, match=message):
            encoded(encode_fn, KEYS[0], batch, others)


def test_bounds_without_the_noise_that_they_are_of_are_refused():
    for texts in (("prune",), ("dpsgd:noise_multiplier=0",), ("dpsgd", "soteria")):
        for name in ("information", "covariance"):
            with pytest.raises(ValueError, match=f"{name} must be None but for dpsgd with noise and without soteria"):
                promises([part for text in texts for part in parse(text)], **{name: jnp.eye(2)})


def test_batches_that_have_no_live_features_are_named():
    apply_fn, params = models.functional(MODULE)
    for inputs in (BATCH.inputs[:0, None], BATCH.inputs[None].astype(int)):
        with pytest.raises(ValueError, match=r"inputs must be floating \(v, b, \*d\), nothing of it 0, got"):
            inspect.unwrap(live_shares)(parse("soteria"), apply_fn, params, inputs)
    with pytest.raises(ValueError, match="inputs must be finite, got nan"):
        live_shares(parse("soteria"), apply_fn, params, jnp.nan * BATCH.inputs[None])


def test_dp_sgd_refuses_batch_normalisation_that_mixes_examples():
    module = models.ResNet((8, 8, 3), 4, blocks=(1,), width=4, rngs=nnx.Rngs(0))
    protected = protect(parse("dpsgd"), module, num_classes=4, batch_norm="training")
    with pytest.raises(ValueError, match="dp_sgd"):
        jax.eval_shape(protected.client_fn(KEYS[0]), protected.params, BATCH)


@pytest.mark.parametrize("text", ["mixup:k=2", "instahide:k=2", "prune_mixup"])
def test_a_client_is_never_observed_without_its_encoding(text):
    protected, threat = protected_by(text), ThreatModel(labels=True)
    with pytest.raises(ValueError, match=r"batch must be encoded by .* before the client sees it, got class indices"):
        observe(KEYS[0], threat, protected.client_fn(KEYS[1]), protected.params, BATCH)
    seen = protected.observe(KEYS[0], threat, BATCH)
    key_encode, key_client, _ = jax.random.split(KEYS[0], 3)
    encoding = protected.encode_fn(key_encode, BATCH)
    assert distance(seen.update, protected.client_fn(key_client)(protected.params, encoding)) < 1e-5
    np.testing.assert_allclose(np.sort(seen.extra["labels"], 0), np.sort(encoding.labels, 0))


def test_a_client_without_an_encoding_is_observed_as_it_is():
    protected = protected_by("prune:ratio=0.5")
    seen = protected.observe(KEYS[0], ThreatModel(labels=True), BATCH, num_classes=4)
    assert distance(seen.update, update_of(protected, KEYS[1])) < 1e-6
    assert sorted(seen.extra["labels"].tolist()) == sorted(BATCH.labels.tolist())


@pytest.mark.parametrize("texts", [("prune:ratio=0.5",), ("mixup:k=2",), ("instahide:k=2", "gaussian"), ("precode",)])
def test_what_is_observed_is_what_was_shared(texts):
    protected, others = protected_by(*texts), jax.tree.map(lambda leaf: leaf[:2], BATCH)
    key_encode, key_client, _ = jax.random.split(KEYS[0], 3)
    encoding, update = protected.share(key_encode, key_client, BATCH, others)
    seen = protected.observe(KEYS[0], ThreatModel(labels=True, label_order=True), BATCH, others)
    chex.assert_trees_all_equal(seen.update, update)
    np.testing.assert_array_equal(seen.extra["labels"], encoding.labels)
    soft, of_soft = protected.share(key_encode, key_client, BATCH, others, soft_classes=4)
    np.testing.assert_array_equal(soft.labels, as_probabilities(encoding, 4))
    assert distance(of_soft, update) < 1e-5


def test_an_empty_or_nan_batch_is_refused_before_the_client_runs():
    def refuses(key):
        raise AssertionError("the client ran")

    protected = protected_by("prune")._replace(client_fn=refuses)
    for batch in (jax.tree.map(lambda leaf: leaf[:0], BATCH), BATCH._replace(inputs=jnp.nan * BATCH.inputs)):
        with pytest.raises(ValueError, match="batch"):
            protected.share(*KEYS, batch)


def test_only_the_client_encodes_its_batch():
    """No other module can forget an encoding, or take another key for it: all go through `Protected.share`."""
    package = pathlib.Path(inspect.getfile(clients)).parents[1]
    paths = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    used = {
        name
        for name, text in paths.items()
        for node in ast.walk(ast.parse(text))
        if (isinstance(node, ast.Attribute) and node.attr == "encode_fn")
        or (isinstance(node, ast.ImportFrom) and "encoded" in [alias.name for alias in node.names])
    }
    assert used == {"defenses/protected/__init__.py", "defenses/protected/client.py"}
