"""APRIL is exact where nothing but the first attention reads the tokens, and refuses every other network."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import Batch, Observation, ThreatModel, attacks, clients, gradient_matching, models, observe, run
from gia_jax.attacks.april import with_position
from gia_jax.matching.initializations import near_grey
from gia_jax.matching.objectives import euclidean
from gia_jax.models.vit import patches

CLASSES = 3
SHAPE = (4, 6, 2)  # six patches of 2x2 pixels
NAMED = {"position": "position", "patch": "patch", "attention": "block0.attention", "class_token": "class_token"}

# Shape of the image and settings of the network.
NETWORKS = {
    "one head": (SHAPE, {"patch_size": 2, "width": 8, "heads": 1}),
    "four heads": (SHAPE, {"patch_size": 2, "width": 12, "heads": 4}),
    "three blocks": ((8, 8, 1), {"patch_size": 4, "width": 16, "heads": 2, "depth": 3}),
    "as many patches and pixels as features": ((4, 4, 1), {"patch_size": 2, "width": 4, "heads": 2}),
}


def vit(shape=SHAPE, **given: Any):
    """A network's forward pass and its parameters, in the widest type."""
    given = {"patch_size": 2, "width": 12, "heads": 2, "depth": 2, "mlp_ratio": 2, "first_block": "plain"} | given
    return wide(models.ViT(shape, CLASSES, **given, rngs=nnx.Rngs(0)))


def wide(module):
    apply_fn, params = models.functional(module)
    return apply_fn, jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)


def client(apply_fn):
    return clients.federated_sgd(clients.cross_entropy(apply_fn))


def drawn(seed, shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), (1, *shape))


def observed(client_fn, params, images):
    """What the server sees of an image of class 1."""
    return observe(jax.random.key(1), ThreatModel(labels=True), client_fn, params, Batch(images, jnp.array([1])))


def attacked(apply_fn, params, images, layers_fn=None, *, jitted=True):
    """The reconstruction of one image from its update."""
    layers_fn = attacks.TokenLayers.named(**NAMED) if layers_fn is None else layers_fn
    client_fn = jax.jit(client(apply_fn))
    attack = attacks.april(client_fn, layers_fn=layers_fn)
    return (jax.jit(attack) if jitted else attack)(jax.random.key(2), observed(client_fn, params, images))


def decibels(found, images):
    """Of images of the given spread."""
    wrong = np.mean(np.square(np.asarray(found) - np.asarray(images)))
    return 10 * np.log10(np.var(images) / max(wrong, 1e-300))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NETWORKS)
def test_images_come_back_exactly(name):
    shape, given = NETWORKS[name]
    images = drawn(3, shape)
    found = attacked(*vit(shape, **given), images)
    assert decibels(found.batch.inputs, images) > 100
    assert found.is_finite
    assert found.loss < 1e-9
    assert found.batch.labels.tolist() == [1]
    assert found.batch.inputs.dtype == jnp.float64


@functools.cache
def program():
    """From a seed, a spread and a class to the true and the found image, compiled once."""
    apply_fn, params = vit()
    client_fn = client(apply_fn)
    attack = attacks.april(client_fn, layers_fn=attacks.TokenLayers.named(**NAMED))

    @jax.jit
    def both(key, scale, label):
        keys = jax.random.split(key, 3)
        moved = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(keys[0], leaf.shape), params)
        images = scale * jax.random.normal(keys[1], (1, *SHAPE))
        update = client_fn(moved, Batch(images, label[None]))
        return images, attack(keys[2], Observation(moved, update, {"inputs_like": images * 0, "labels": label[None]}))

    return both


@given(st.integers(0, 2**31 - 1), st.floats(0.05, 3), st.integers(0, CLASSES - 1))
@settings(deadline=None, max_examples=40)
def test_any_image_and_any_weights_come_back(seed, scale, label):
    with jax.enable_x64(True):
        images, found = program()(jax.random.key(seed), scale, jnp.array(label))
        assert decibels(found.batch.inputs, images) > 100
        # What the attacker can compute bounds the error that it cannot.
        assert decibels(found.batch.inputs, images) > -20 * np.log10(100 * float(found.loss))


class Own(nnx.Module):
    """A network of a user's: a convolution for patches, flax's attention as it is, and no class token."""

    def __init__(self, rngs, *, frozen=False):
        self.stem = nnx.Conv(2, 12, (2, 3), (2, 3), padding="VALID", rngs=rngs)
        self.positions = nnx.Embed(4, 12, rngs=rngs)
        self.blocks = nnx.List([nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)])
        self.body, self.head = nnx.Linear(12, 20, rngs=rngs), nnx.Linear(20, CLASSES, rngs=rngs)
        self.frozen = frozen

    def __call__(self, x):
        x = self.stem(x)
        position = self.positions(jnp.arange(4))
        x = x.reshape(len(x), -1, 12) + (jax.lax.stop_gradient(position) if self.frozen else position)
        return self.head(nnx.gelu(self.body(self.blocks[0](x))).mean(1))


OWN = {"position": "positions", "patch": "stem", "attention": "blocks.0"}


@pytest.mark.usefixtures("x64")
def test_a_network_of_ones_own_is_attacked_by_the_names_of_its_layers():
    images = drawn(4, SHAPE)
    found = attacked(*wide(Own(nnx.Rngs(0))), images, attacks.TokenLayers.named(**OWN))
    assert decibels(found.batch.inputs, images) > 100


def pytorchs(params, images, *, residual=False, order=(0, 1, 2, 3)):
    """A network with PyTorch's weights and one matrix for query, key and value; the classifier reads all tokens."""
    stem, qkv = params["stem"]["weight"], params["block.0"][1]["weight"]
    cut = patches(images[..., ::-1] if order is None else images, (2, 3))
    x = cut @ jnp.moveaxis(stem, 1, -1).reshape(len(stem), -1).T + params["position"][0]
    parts = jnp.split(x @ qkv.T, 3, -1)
    mixed = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", parts[0], parts[1])) @ parts[2]
    mixed = jnp.tanh(mixed + x if residual else mixed)
    return mixed.reshape(len(images), -1) @ params["head"]["weight"].T


def torch_params():
    keys = jax.random.split(jax.random.key(5), 4)
    shapes = {"stem": (12, 2, 2, 3), "position": (1, 4, 12), "qkv": (36, 12), "head": (CLASSES, 48)}
    made = {name: 0.3 * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {
        "stem": {"weight": made["stem"]},
        "position": made["position"],
        "block.0": [{}, {"weight": made["qkv"]}],
        "head": {"weight": made["head"]},
    }


def torch_layers(tree):
    layers = attacks.TokenLayers.named(position="position", patch="stem", attention="qkv")
    return layers(tree | {"qkv": tree["block.0"][1]})


@pytest.mark.usefixtures("x64")
def test_pytorchs_layout_and_one_kernel_of_all_three_are_read():
    images = drawn(6, SHAPE)
    found = attacked(pytorchs, torch_params(), images, torch_layers)
    assert decibels(found.batch.inputs, images) > 100


REFUSED = {
    "norm and residual": (lambda: vit(first_block="residual"), NAMED, "such as their LayerNorm"),
    "norm and residual, tokens that span everything": (
        lambda: vit((4, 4, 1), width=4, first_block="residual"),
        NAMED,
        "Either the attention .* LayerNorm .*, or something beside .* residual path",
    ),
    "residual": (lambda: (functools.partial(pytorchs, residual=True), torch_params()), None, "such as a residual path"),
    "pixels": (lambda: (functools.partial(pytorchs, order=None), torch_params()), None, "another order of pixels"),
    "frozen": (lambda: wide(Own(nnx.Rngs(0), frozen=True)), OWN, "position embedding has no gradient: it must be"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", REFUSED)
def test_a_network_without_the_condition_is_refused_by_name(name):
    build, names, reason = REFUSED[name]
    apply_fn, params = build()
    layers_fn = torch_layers if names is None else attacks.TokenLayers.named(**names)
    images = drawn(7, (4, 4, 1) if "everything" in name else SHAPE)
    with pytest.raises(ValueError, match=rf"reads the tokens as they are.* above 0.0001\. .*{reason}"):
        attacked(apply_fn, params, images, layers_fn, jitted=False)
    # Where an error comes too late, there is no image.
    found = attacked(apply_fn, params, images, layers_fn)
    assert not found.is_finite
    assert np.isnan(found.batch.inputs).all()
    assert np.isnan(found.loss)


def test_a_client_of_several_steps_is_refused(x64):
    apply_fn, params = vit()
    client_fn = clients.federated_averaging(clients.cross_entropy(apply_fn), learning_rate=0.5, local_epochs=3)
    client_fn = jax.jit(client_fn)
    seen = observed(client_fn, params, drawn(8, SHAPE))
    attack = attacks.april(client_fn, layers_fn=attacks.TokenLayers.named(**NAMED))
    with pytest.raises(ValueError, match=r"A\^T z = b fails by"):
        attack(jax.random.key(2), seen)


@pytest.mark.usefixtures("x64")
def test_the_loss_says_what_rounding_and_noise_leave():
    apply_fn, params = vit()
    client_fn, images = jax.jit(client(apply_fn)), drawn(10, SHAPE)
    seen = observed(client_fn, params, images)
    attack = jax.jit(attacks.april(client_fn, layers_fn=attacks.TokenLayers.named(**NAMED)))

    def found(change_fn):
        made = attack(jax.random.key(2), seen._replace(update=jax.tree.map(change_fn, seen.update)))
        return decibels(made.batch.inputs, images), float(made.loss)

    spread = 0.3 * jnp.abs(seen.update["position"]).max()
    exact, exact_loss = found(lambda leaf: leaf)
    single, single_loss = found(lambda leaf: leaf.astype(jnp.float32))
    half, half_loss = found(lambda leaf: leaf.astype(jnp.bfloat16))
    noisy, noisy_loss = found(lambda leaf: leaf + spread * jax.random.normal(jax.random.key(9), leaf.shape))
    assert exact > 200 > 140 > single > 60 > half
    assert exact_loss < 1e-12 < 1e-7 < single_loss < 1e-2 < half_loss <= 1
    assert noisy < 10
    assert noisy_loss > 1e-2


def test_half_precision_is_solved_in_wider_arithmetic():
    apply_fn, params = vit()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    images = drawn(14, SHAPE).astype(jnp.bfloat16)
    found = attacked(apply_fn, params, images)
    assert found.is_finite
    assert found.batch.inputs.dtype == jnp.bfloat16
    assert found.loss.dtype == jnp.float32
    assert 5 < decibels(found.batch.inputs.astype(float), images.astype(float)) < 40


@pytest.mark.usefixtures("x64")
def test_one_block_read_through_its_class_token_tells_too_little():
    shape = (8, 8, 1)
    images = drawn(11, shape)
    found = attacked(*vit(shape, depth=1, width=24, heads=2), images)  # 16 patches, and a rank of at most 5
    assert decibels(found.batch.inputs, images) < 10
    assert found.loss == 1


def unfit(shape=SHAPE, *, changed=None, size=1, **given):
    """What the closed form says of a network that was never run."""
    params = jax.eval_shape(lambda: vit(shape, **given)[1])
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    layers = attacks.TokenLayers.named(**NAMED)(params)._replace(**(changed or {}))
    attack = attacks.april(lambda params, batch: params, layers_fn=lambda tree: layers)
    attack(jax.random.key(0), Observation(params, params, {"inputs_like": jnp.zeros((size, *shape))}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 2}, "april needs a batch of one example, got 2"),
        ({"shape": (8, 8, 1), "width": 14}, "april needs no more patches than the width 14, got 16"),
        ({"width": 6}, "april needs no more pixels in a patch than the width 6, got 8"),
        ({"changed": {"class_token": None}}, "a row for each of 0 class tokens and 6 patches, got 7"),
        (
            {"changed": {"position": np.zeros((7, 10))}},
            r"in the width 10 of the position .*, got shape \(8, 12\)",
        ),
        ({"changed": {"patch_kernel": np.zeros((4, 2, 3, 12))}}, r"got shape \(4, 2, 3, 12\)"),
        ({"changed": {"patch_kernel": np.zeros((10, 12))}}, r"tile the image \(4, 6, 2\) .*, got shape \(10, 12\)"),
        ({"changed": {"attention": [np.zeros((3, 12))]}}, r"tokens of the width 12, got a kernel of shape \(3, 12\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused_by_name_and_value(given, message):
    with pytest.raises(ValueError, match=message):
        unfit(**given)


def test_inputs_that_are_no_image_are_refused():
    params = torch_params()
    attack = attacks.april(lambda params, batch: params, layers_fn=torch_layers)
    with pytest.raises(ValueError, match=r"april needs an image, shape \(1, h, w, c\), got \(1, 5\)"):
        attack(jax.random.key(0), Observation(params, params, {"inputs_like": jnp.zeros((1, 5))}))


def test_layers_that_are_not_there_are_named_together_with_what_is():
    _, params = vit(depth=1)
    wrong = {"position": "pos", "patch": "patch.kernel", "attention": ("block0.q", "head.bias"), "class_token": "norm"}
    with pytest.raises(ValueError, match="layers must be among the parameters") as caught:
        attacks.TokenLayers.named(**wrong)(params)
    message = str(caught.value)
    for part in (
        "position='pos': no 'pos' among block0, class_token, head, norm, patch, position",
        "patch='patch.kernel': no 'kernel', 'w' or 'weight' among the entries of an array",
        "attention='block0.q': no 'q' among attention, dense0, dense1, norm1",
        "attention='head.bias': no 'kernel'",
        "class_token='norm': no array and no 'embedding' among bias, scale",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (attacks.april, {"layers_fn": len, "tolerance": 0.0}, "tolerance must be positive, got 0.0"),
        (attacks.april, {"layers_fn": len, "tolerance": float("inf")}, "tolerance must be finite, got inf"),
        (attacks.april, {"layers_fn": "position"}, "layers_fn must be a function, got 'position'"),
        (attacks.april_optimization, {"position_fn": "position"}, "position_fn must be a function, got 'position'"),
        (attacks.april_optimization, {"position_fn": len, "position_weight": -1.0}, "position_weight must not be neg"),
        (attacks.april_optimization, {"position_fn": len, "bounds": (1.0, 0.0)}, "low must be below high=0.0, got 1.0"),
    ],
)
def test_arguments_are_refused_by_name_and_value(build, given, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(build)(len, **given)


@pytest.fixture
def steep(x64):
    """A published network of one block with a class token of the size of the others, and what is seen of an image."""
    apply_fn, params = vit((4, 4, 1), depth=1, width=32, heads=4, first_block="residual")
    params["class_token"] *= 50
    client_fn, images = jax.jit(client(apply_fn)), drawn(12, (4, 4, 1), 0.5)
    return client_fn, observed(client_fn, params, images), images


def position_fn(update):
    return update["position"]


def test_the_cosine_leads_every_start_to_the_image(steep):
    client_fn, seen, images = steep

    def quality(attack):
        def one(key):
            return run(attack, key, seen, num_steps=1_000)[0].batch.inputs

        keys = jax.random.split(jax.random.key(2), 4)
        return [decibels(found, images) for found in jax.jit(jax.vmap(one))(keys)]

    settings = {"init_fn": near_grey(), "optimizer": optax.adam(0.05)}
    assert min(quality(attacks.april_optimization(client_fn, position_fn=position_fn, **settings))) > 40
    assert min(quality(gradient_matching(client_fn, **settings))) < 10


def test_the_objective_is_both_distances(steep):
    client_fn, seen, _ = steep
    other = client_fn(seen.params, Batch(drawn(13, (4, 4, 1)), jnp.array([1])))
    one, two = (np.ravel(update["position"]) for update in (other, seen.update))
    angle = 1 - one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    squares = sum(np.sum(np.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (other, seen.update)), strict=True))
    assert with_position(euclidean, position_fn, 2.0)(other, seen.update) == pytest.approx(squares + 2 * angle)


def test_the_descent_keeps_to_the_bounds(steep):
    client_fn, seen, _ = steep
    attack = attacks.april_optimization(client_fn, position_fn=position_fn, bounds=(-0.1, 0.1))
    found, _ = jax.jit(lambda key: run(attack, key, seen, num_steps=1))(jax.random.key(2))
    assert float(jnp.abs(found.batch.inputs).max()) == pytest.approx(0.1)
