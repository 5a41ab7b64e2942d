"""PyTorch's names and layouts, against models that compute in them: channels first, kernels (out, in, *window)."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from strangers import CASES, TOLERANCE, export, reproduce

from gia_jax import Batch, clients, interop, models

RNG = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def convolved(x: jax.Array, weight: jax.Array, groups: int = 1, stride: int = 1, padding: int = 0) -> jax.Array:
    """PyTorch's convolution: (b, in, *d) with (out, in / groups, *window)."""
    spatial = x.ndim - 2
    letters = "HWD"[:spatial]
    return lax.conv_general_dilated(
        x,
        weight,
        (stride,) * spatial,
        ((padding, padding),) * spatial,
        dimension_numbers=(f"NC{letters}", f"OI{letters}", f"NC{letters}"),
        feature_group_count=groups,
    )


def last(x: np.ndarray | jax.Array) -> jax.Array:
    """Channels last."""
    return jnp.moveaxis(x, 1, -1)


class Twin(nnx.Module):
    """Two convolutions, the second in groups, with batch normalisation and a dense layer behind a flattening."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 4, (3, 3), 2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.second = nnx.Conv(4, 4, (3, 3), padding=((1, 1), (1, 1)), feature_group_count=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 4, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.sigmoid(self.norm(self.second(jax.nn.sigmoid(self.first(x)))))
        return self.head(x.reshape(x.shape[0], -1))


def twin_state() -> dict[str, np.ndarray]:
    """The state dict of the same model in PyTorch."""
    return {
        "net.0.weight": drawn(4, 3, 3, 3),
        "net.0.bias": drawn(4),
        "net.2.weight": drawn(4, 2, 3, 3),
        "net.3.weight": drawn(4),
        "net.3.bias": drawn(4),
        "net.3.running_mean": drawn(4),
        "net.3.running_var": np.exp(drawn(4)),
        "net.3.num_batches_tracked": np.asarray(3),
        "net.6.weight": drawn(5, 64),
        "net.6.bias": drawn(5),
    }


def twin_loss(params: dict, statistics: dict, images: np.ndarray, labels: np.ndarray) -> jax.Array:
    """The cross entropy of the same model, as PyTorch computes it."""

    def over_channels(vector: jax.Array) -> jax.Array:
        return vector[:, None, None]

    x = convolved(images, params["net.0.weight"], stride=2, padding=1) + over_channels(params["net.0.bias"])
    x = convolved(jax.nn.sigmoid(x), params["net.2.weight"], groups=2, padding=1)
    mean, variance = (over_channels(statistics[f"net.3.running_{name}"]) for name in ("mean", "var"))
    x = (x - mean) / jnp.sqrt(variance + 1e-5)
    x = jax.nn.sigmoid(x * over_channels(params["net.3.weight"]) + over_channels(params["net.3.bias"]))
    logits = x.reshape(len(images), -1) @ params["net.6.weight"].T + params["net.6.bias"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


@pytest.mark.parametrize("is_list", [False, True])
def test_the_gradient_of_a_pytorch_model_is_that_of_its_twin(is_list: bool) -> None:
    state = twin_state()
    params = {name: value for name, value in state.items() if "running" not in name and "num_" not in name}
    images, labels = drawn(2, 3, 8, 8), np.array([1, 4])
    gradient = jax.jit(jax.grad(twin_loss))(params, state, images, labels)
    gradient = {name: gradient[name] for name in params}  # JAX sorts the names
    given = (list(state.values()), list(gradient.values())) if is_list else (state, gradient)

    module = interop.load_torch(Twin(nnx.Rngs(0)), given[0])
    apply_fn, jax_params = models.functional(module)
    update = interop.from_torch(given[1], jax_params)
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    found = client_fn(jax_params, Batch(last(images), jnp.asarray(labels)))
    assert jax.tree.structure(update) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # The parameters alone, without the statistics that a state dict has besides:
    again = interop.from_torch(given[0], jax_params)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(jax_params)))


@pytest.mark.parametrize(("axes", "groups"), [(1, 1), (1, 2), (2, 4), (3, 1)])
def test_kernels_of_any_number_of_axes_and_groups(axes: int, groups: int) -> None:
    x, weight = drawn(2, 4, *[5] * axes), drawn(8, 4 // groups, *[3, 2, 2][:axes])
    module = nnx.Conv(
        4, 8, weight.shape[2:], padding="VALID", feature_group_count=groups, use_bias=False, rngs=nnx.Rngs(0)
    )
    module = interop.load_torch(module, {"weight": weight})
    np.testing.assert_allclose(module(last(x)), last(convolved(x, weight, groups)), rtol=1e-4, atol=1e-5)


def test_a_transposed_convolution_is_the_derivative_of_a_convolution() -> None:
    x, weight = drawn(2, 3, 4, 4), drawn(3, 5, 3, 2)  # PyTorch: (in, out, *window)
    _, pull = jax.vjp(lambda y: convolved(y, weight, stride=2), jnp.zeros((2, 5, 9, 8)))
    module = nnx.ConvTranspose(3, 5, (3, 2), (2, 2), padding="VALID", use_bias=False, rngs=nnx.Rngs(0))
    module = interop.load_torch(nnx.Sequential(module), {"up.weight": weight}, transposed=["layers.0"])
    np.testing.assert_allclose(module(last(x)), last(pull(x)[0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"transposed must name convolutions of like, got 'layers.1'"):
        interop.load_torch(module, {"up.weight": weight}, transposed=["layers.1"])


def test_embeddings_and_normalisations_keep_their_layout() -> None:
    class Words(nnx.Module):
        def __init__(self) -> None:
            self.words, self.norm = nnx.Embed(7, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0))

    state = {"emb.weight": drawn(7, 3), "ln.weight": drawn(3), "ln.bias": drawn(3)}
    module = interop.load_torch(Words(), state)
    for found, name in (
        (module.words.embedding, "emb.weight"),
        (module.norm.scale, "ln.weight"),
        (module.norm.bias, "ln.bias"),
    ):
        np.testing.assert_array_equal(found[...], state[name])


def test_in_a_list_a_bias_is_not_taken_for_that_of_a_normalisation_without_one() -> None:
    module = nnx.Sequential(
        nnx.Conv(3, 4, (2, 2), rngs=nnx.Rngs(0)), nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))
    )
    weight, bias, mean, variance = drawn(4, 3, 2, 2), drawn(4), drawn(4), np.exp(drawn(4))
    module = interop.load_torch(module, [weight, bias, mean, variance, np.asarray(2)])
    convolution, norm = module.layers
    for found, expected in ((convolution.bias, bias), (norm.mean, mean), (norm.var, variance)):
        np.testing.assert_array_equal(found[...], expected)


def layers(names: list[str], shape: tuple[int, int] = (2, 2)) -> dict:
    """Dense layers of the JAX model, nested as their paths say, which are filled with nothing."""
    tree: dict = {}
    for path in names:
        node = tree
        for key in path.split("."):
            node = node.setdefault(key, {})
        node["kernel"] = jax.ShapeDtypeStruct(shape, np.float32)
    return tree


def numbered(names: list[str], shape: tuple[int, int] = (2, 2)) -> dict[str, np.ndarray]:
    """Weights of PyTorch, each filled with its place."""
    return {f"{name}.weight": np.full(shape[::-1], float(i)) for i, name in enumerate(names)}


def places(tree: dict) -> dict[str, int]:
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path[:-1], simple=True, separator="."): int(np.asarray(leaf).flat[0])
        for path, leaf in leaves
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["fc2", "fc1"], ["fc2", "fc1"]),  # the same names, whatever their order
        ([f"net.{2 * i}" for i in range(12)], [f"conv{i + 1}" for i in range(12)]),  # conv2 before conv10
        (["conv1", "conv2", "conv3"], ["conv0", "conv1", "conv2"]),  # two of the names are of other layers
        (
            ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2", "conv1"],
            ["stage0_block0.conv1", "stage0_block0.conv2", "stage0_block1.conv1", "stage0_block1.conv2", "stem"],
        ),
        (["a1", "a2", "b1", "b2"], ["a0", "a1", "b0", "b1"]),  # the same words
        (["a", "b"], ["c", "b"]),  # one name is the same
    ],
)
def test_layers_of_one_shape_are_paired_by_names_and_numbers(theirs: list[str], ours: list[str]) -> None:
    found = interop.from_torch(numbered(theirs), layers(ours))
    assert places(found) == {name: i for i, name in enumerate(ours)}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["a", "b"], ["x", "y"]),
        (["net.0", "net.1"], ["first", "last"]),
        (["enc1", "enc2", "dec1", "dec2"], ["up1", "up2", "down1", "down2"]),
    ],
)
def test_layers_that_could_be_swapped_are_refused_until_names_say_it(theirs: list[str], ours: list[str]) -> None:
    tensors, like = numbered(theirs), layers(ours)
    with pytest.raises(ValueError, match="tensors could be swapped") as caught:
        interop.from_torch(tensors, like)
    assert all(repr(name) in str(caught.value) for name in theirs + ours)
    assert "pass names={" in str(caught.value)
    assert "\n" not in str(caught.value)
    pairs = dict(zip(theirs, reversed(ours)))
    for names in (pairs, pairs.get, list(pairs.values())):
        found = places(interop.from_torch(tensors, like, names=names))
        assert found == {pairs[name]: i for i, name in enumerate(theirs)}
    first = theirs[0]
    rest = interop.from_torch(numbered(theirs[:1] + ["other"]), layers(["v", "w"]), names={first: "w"})
    assert places(rest) == {"w": 0, "v": 1}  # what names leave open is found


def test_random_models_under_random_names_come_out_right_or_not_at_all() -> None:
    rng = np.random.default_rng(1)
    outcomes = []
    for _ in range(40):
        sizes = rng.integers(2, 5, 5)
        shapes = list(itertools.pairwise(sizes.tolist()))
        like = {f"layer{i}": {"kernel": np.zeros(s, np.float32), "bias": np.zeros(s[1])} for i, s in enumerate(shapes)}
        truth = {name: {key: rng.normal(size=value.shape) for key, value in own.items()} for name, own in like.items()}
        words = rng.permutation(["alpha", "beta", "gamma", "delta"])
        tensors = {}
        for word, own in zip(words, truth.values()):
            tensors |= {f"{word}.weight": own["kernel"].T, f"{word}.bias": own["bias"]}
        outcomes.append(len(set(shapes)) == len(shapes))
        if not outcomes[-1]:
            with pytest.raises(ValueError, match="could be swapped"):
                interop.from_torch(tensors, like)
            continue
        found = interop.from_torch(tensors, like)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    assert 0 < sum(outcomes) < 40


def resnet_state(width: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes of a ResNet-18 in PyTorch, in its order and with its usual names, and the paths in the JAX model."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}

    def add(conv: str, norm: str, paths: tuple[str, str], *shape: int) -> None:
        found[f"{conv}.weight"] = (shape, f"{paths[0]}.kernel")
        for name, own in (("weight", "scale"), ("bias", "bias")):
            found[f"{norm}.{name}"] = ((shape[0],), f"{paths[1]}.{own}")

    add("conv1", "bn1", ("stem", "stem_norm"), width, 3, 3, 3)
    features = width
    for stage, block in itertools.product(range(4), range(2)):
        theirs, ours, out = f"layer{stage + 1}.{block}", f"stage{stage}_block{block}", width * 2**stage
        add(f"{theirs}.conv1", f"{theirs}.bn1", (f"{ours}.conv1", f"{ours}.norm1"), out, features, 3, 3)
        add(f"{theirs}.conv2", f"{theirs}.bn2", (f"{ours}.conv2", f"{ours}.norm2"), out, out, 3, 3)
        if features != out:
            paths = (f"{ours}.shortcut", f"{ours}.shortcut_norm")
            add(f"{theirs}.downsample.0", f"{theirs}.downsample.1", paths, out, features, 1, 1)
        features = out
    return found | {"fc.weight": ((10, features), "head.kernel"), "fc.bias": ((10,), "head.bias")}


def test_a_resnet_is_paired_without_help() -> None:
    shapes = resnet_state(4)
    module = nnx.eval_shape(lambda: models.ResNet(width=4, rngs=nnx.Rngs(0)))
    like = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    found = interop.from_torch(
        {name: np.full(shape, i, float) for i, (name, (shape, _)) in enumerate(shapes.items())}, like
    )
    leaves = jax.tree.leaves_with_path(found)
    got = {jax.tree_util.keystr(path, simple=True, separator="."): np.unique(leaf).tolist() for path, leaf in leaves}
    assert got == {path: [i] for i, (_, path) in enumerate(shapes.values())}


def channels_last(weight: np.ndarray, *shape: int) -> np.ndarray:
    """The dense kernel (in, out) with its inputs in the order of channels last, entry by entry."""
    kernel = np.zeros(weight.T.shape, weight.dtype)
    for place, (y, x, c) in enumerate(itertools.product(range(shape[1]), range(shape[2]), range(shape[0]))):
        kernel[place] = weight[:, (c * shape[1] + y) * shape[2] + x]
    return kernel


def flat_model(inputs: int, channels: tuple[int, ...] = (4,)) -> tuple[dict[str, np.ndarray], dict]:
    """Convolutions and two dense layers in both libraries' layouts."""
    tensors, like, features = {}, {}, 3
    for i, out in enumerate(channels):
        tensors |= {f"conv{i}.weight": drawn(out, features, 3, 3), f"conv{i}.bias": drawn(out)}
        like[f"conv{i}"] = {"kernel": np.zeros((3, 3, features, out), np.float32), "bias": np.zeros(out, np.float32)}
        features = out
    for name, size, out in (("fc1", inputs, 9), ("fc2", 9, 2)):
        tensors |= {f"{name}.weight": drawn(out, size), f"{name}.bias": drawn(out)}
        like[name] = {"kernel": np.zeros((size, out), np.float32), "bias": np.zeros(out, np.float32)}
    return tensors, like


def test_what_is_flattened_is_found_or_said() -> None:
    tensors, like = flat_model(4 * 9)
    weight = tensors["fc1.weight"]
    found = interop.from_torch(tensors, like)
    np.testing.assert_array_equal(found["fc1"]["kernel"], channels_last(weight, 4, 3, 3))
    np.testing.assert_array_equal(found["fc2"]["kernel"], tensors["fc2.weight"].T)
    np.testing.assert_array_equal(interop.from_torch(tensors, like, flatten=None)["fc1"]["kernel"], weight.T)
    wide = interop.from_torch(tensors, like, flatten={"fc1": (2, 9, 2)})
    np.testing.assert_array_equal(wide["fc1"]["kernel"], channels_last(weight, 2, 9, 2))
    pooled, pooled_like = flat_model(4)  # an average over all pixels flattens nothing
    found = interop.from_torch(pooled, pooled_like)
    np.testing.assert_array_equal(found["fc1"]["kernel"], pooled["fc1.weight"].T)


def test_it_is_refused_where_it_is_not_clear() -> None:
    for inputs in (4 * 6, 4 * 9 + 1):
        tensors, like = flat_model(inputs)
        with pytest.raises(ValueError, match=r"flatten must say what 'fc1' takes, .* pass flatten=\{'fc1': \(channels"):
            interop.from_torch(tensors, like)
    tensors, like = flat_model(4 * 9)
    for flatten, match in (
        ({"fc1": (4, 3, 4)}, r"flatten\['fc1'\] must be of 36 values, got \(4, 3, 4\)"),
        ({"conv0": (4, 3, 3)}, r"flatten must name dense layers of like, \['fc1', 'fc2'\], got 'conv0'"),
    ):
        with pytest.raises(ValueError, match=match):
            interop.from_torch(tensors, like, flatten=flatten)
    # A normalisation of as many features as the dense layer takes may be one of joined channels, or of what is flat.
    names = ["conv0.weight", "conv0.bias", "bn.weight", "bn.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    tensors |= {"bn.weight": drawn(36), "bn.bias": drawn(36)}
    like["bn"] = {"scale": np.zeros(36, np.float32), "bias": np.zeros(36, np.float32)}
    with pytest.raises(ValueError, match="flatten must say what 'fc1' takes"):
        interop.from_torch({name: tensors[name] for name in names}, like)


def test_sorted_names_do_not_tell_the_order_of_layers() -> None:
    tensors, like = flat_model(4 * 9)
    found = interop.from_torch(dict(sorted(tensors.items())), like)  # the only convolution there is
    np.testing.assert_array_equal(found["fc1"]["kernel"], channels_last(tensors["fc1.weight"], 4, 3, 3))
    tensors, like = flat_model(9 * 4, (4, 9))  # 9 x 2 x 2 or 4 x 3 x 3
    found = interop.from_torch(tensors, like)
    np.testing.assert_array_equal(found["fc1"]["kernel"], channels_last(tensors["fc1.weight"], 9, 2, 2))
    with pytest.raises(ValueError, match="flatten must say what 'fc1' takes"):
        interop.from_torch(dict(sorted(tensors.items())), like)
    tensors, like = flat_model(4 * 9)  # the dense layer comes first in the alphabet
    renamed = {name.replace("fc", "afc"): value for name, value in sorted(tensors.items())}
    with pytest.raises(ValueError, match="flatten must say what 'fc1' takes"):
        interop.from_torch(dict(sorted(renamed.items())), like)


def test_a_model_in_pytorchs_own_layout_is_left_alone() -> None:
    arrays = [drawn(4, 3, 3, 3), drawn(4), drawn(5, 16), drawn(5)]
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    named = dict(zip(names, arrays))
    w1, b1, w2, b2 = arrays
    for like in (list(arrays), tuple(arrays), [(w1, b1), (w2, b2)], named, {"w1": w1, "b1": b1, "w2": w2, "b2": b2}):
        for tensors in (arrays, named):
            if isinstance(like, dict) and "w1" not in like and tensors is arrays:
                continue
            found = interop.from_torch(tensors, like)
            assert jax.tree.structure(found) == jax.tree.structure(like)
            assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(like)))
    with pytest.raises(ValueError, match="tensors must hold 3 parameters as like does, got 4"):
        interop.from_torch(arrays, arrays[:3])
    with pytest.raises(
        ValueError, match=r"like\[0\] is \(4,\) in PyTorch's layout, got tensors\[0\] of shape \(4, 3, 3, 3\)"
    ):
        interop.from_torch(arrays, [b1, w1, w2, b2])
    with pytest.raises(ValueError, match="names must be None where like is filled by position"):
        interop.from_torch(arrays, arrays, names={"0": "0"})


def test_the_layout_of_other_libraries_is_asked_for() -> None:
    like, tensors = (
        {"linear": {"w": np.zeros((3, 3)), "b": np.zeros(3)}},
        {"fc.weight": drawn(3, 3), "fc.bias": drawn(3)},
    )
    with pytest.raises(ValueError, match="layout must be 'flax' or 'torch' where a kernel is called w, got 'auto'"):
        interop.from_torch(tensors, like)
    for layout, expected in (("flax", tensors["fc.weight"].T), ("torch", tensors["fc.weight"])):
        np.testing.assert_array_equal(interop.from_torch(tensors, like, layout=layout)["linear"]["w"], expected)


class FakeTensor:
    """What a tensor of PyTorch can do; NumPy gets it only from the host, without a history and in its own types."""

    def __init__(self, values: np.ndarray, todo: tuple[str, ...] = ("detach", "cpu"), dtype: str = "torch.float32"):
        self.values, self.todo, self.dtype = values, todo, dtype

    def _without(self, what: str) -> "FakeTensor":
        return FakeTensor(self.values, tuple(step for step in self.todo if step != what), self.dtype)

    def detach(self) -> "FakeTensor":
        return self._without("detach")

    def cpu(self) -> "FakeTensor":
        return self._without("cpu")

    def float(self) -> "FakeTensor":
        return FakeTensor(self.values, self.todo)

    def numpy(self) -> np.ndarray:
        if self.todo or self.dtype == "torch.bfloat16":
            raise TypeError(f"cannot convert, first {self.todo}")
        return self.values


def test_tensors_of_pytorch_are_read_without_pytorch() -> None:
    values = np.array([[1.0, 3.140625]], np.float32)
    like = {"head": {"kernel": jax.ShapeDtypeStruct((2, 1), jnp.bfloat16)}}
    for dtype in ("torch.float32", "torch.bfloat16"):
        found = interop.from_torch({"fc.weight": FakeTensor(values, dtype=dtype)}, like)["head"]["kernel"]
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.astype(np.float32), values.T)
    with pytest.raises(ValueError, match=r"tensors\['fc.weight'\] must be an array of numbers, got FakeTensor: cannot"):
        interop.from_torch({"fc.weight": FakeTensor(values, ("a meta tensor",))}, like)


GOOD = {"a.weight": np.ones((3, 2)), "a.bias": np.ones(3), "b.weight": np.ones((1, 3))}
LIKE = {"first": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "head": {"kernel": np.zeros((3, 1))}}


def without(name: str) -> dict[str, np.ndarray]:
    return {other: value for other, value in GOOD.items() if other != name}


@pytest.mark.parametrize(
    ("tensors", "settings", "match"),
    [
        ({}, {}, "tensors must hold at least one array, got none"),
        (without("b.weight"), {}, r"'head.kernel' of shape \(3, 1\) is missing"),
        (without("a.bias"), {}, r"'first.bias' of shape \(3,\) is missing beside the nearest layer, 'a'"),
        (GOOD | {"c.weight": np.ones(4)}, {}, r"tensors\['c.weight'\] of shape \(4,\) is left over"),
        (GOOD | {"b.bias": np.ones(1)}, {}, r"tensors\['b.bias'\] of shape \(1,\) is left over"),
        (
            GOOD | {"b.weight": np.ones((1, 4))},
            {},
            r"'head.kernel' of shape \(3, 1\) is \(1, 3\) in PyTorch's layout, .*'b.weight'\] of shape \(1, 4\)",
        ),
        (GOOD | {"c.weight": np.ones((1, 3))}, {}, r"of weight \(1, 3\) tensors has 'b', 'c' and like has 'head'"),
        (GOOD | {"a.bias": np.array([0, np.nan, 0])}, {}, r"tensors\['a.bias'\] must be finite, got nan"),
        (GOOD | {"a.bias": np.ones(3, int)}, {}, r"tensors\['a.bias'\] must be of type float32, got int64"),
        (GOOD | {"a.bias": np.full(3, 1e200)}, {}, r"tensors\['a.bias'\] must fit into float32, got 1e\+200"),
        (GOOD, {"names": {"aa": "first"}}, "names must be a layer of tensors, got 'aa', the nearest is 'a'"),
        (GOOD, {"names": {"a": "frist"}}, r"names\['a'\] must be a layer of like, got 'frist', the nearest is 'first'"),
        (GOOD, {"names": ["first"]}, "names must name 2 layers"),
        (GOOD, {"names": {"a": "head", "b": "head"}}, "names must be of different layers, got 'head' for 'a' and 'b'"),
        (GOOD, {"names": {"b": "first"}}, r"'first.kernel' of shape \(2, 3\) is \(3, 2\)"),
        (
            [np.ones(2), np.ones((3, 2))],
            {},
            r"must come in the order of a state dict, got one of no layer at tensors\[0\]",
        ),
        ([np.ones((3, 2)), np.float64(1)], {}, r"got one of no layer at tensors\[1\] of shape \(\)"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tensors: dict | list, settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        interop.from_torch(tensors, LIKE, **settings)
    assert "\n" not in str(caught.value)


def test_the_good_case_of_the_errors_is_good() -> None:
    assert interop.from_torch(GOOD, LIKE)["head"]["kernel"].tolist() == [[1.0]] * 3
    with pytest.raises(ValueError, match="like must hold at least one array"):
        interop.from_torch(GOOD, {})


def test_running_statistics_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"'mean' of shape \(2,\) is missing beside the nearest layer, 'bn'"):
        interop.load_torch(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), {"bn.weight": np.ones(2), "bn.bias": np.ones(2)})


def test_what_pytorch_exported_is_reproduced() -> None:
    row = reproduce("lenet_body", CASES["lenet_body"]._replace(side=16), Path(__file__).parent, ".npz")
    assert row.parameters == 10_066
    assert max(row.error, row.worst_error) < TOLERANCE


def test_a_model_of_pytorch_goes_the_whole_way(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    case = CASES["lenet"]._replace(side=16)
    export("lenet", case, tmp_path)
    assert reproduce("lenet", case, tmp_path).error < TOLERANCE
