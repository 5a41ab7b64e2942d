"""The command line on an update that was recorded: what it reads, what it says, and what it refuses."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, ThreatModel, clients, data, interop, models
from gia_jax.cli import main
from gia_jax.cli.files import registered_model

pytest.importorskip("sklearn")

OWN_MODEL = """
import jax
import jax.numpy as jnp


def apply(params, inputs):
    hidden = inputs.reshape(len(inputs), -1) @ params["net"]["0"]["weight"].T + params["net"]["0"]["bias"]
    hidden = jnp.tanh(hidden - params["shift"])
    return hidden @ params["net"]["2"]["weight"].T + params["net"]["2"]["bias"]


def no_logits(params, inputs):
    return apply(params, inputs).sum()


def broken(params, inputs):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((len(inputs), 10), inputs.dtype), apply(params, inputs))


constant = 3
"""


class Recorded:
    """An update of a linear model for one digit, in a folder; every file can be written again in another way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = data.load("digits")
        self.batch = Batch(jnp.asarray(self.images.normalize(self.images.images[:1])), jnp.asarray([0]))
        self.apply_fn, self.params = models.functional(models.MODELS["linear"]((8, 8, 1), 10, rngs=nnx.Rngs(0)))
        self.update = self.gradient(self.params)
        self.save("params.npz", self.params)
        self.save("update.npz", self.update)
        self.save("truth.npz", {"inputs": self.batch.inputs, "labels": self.batch.labels})

    def gradient(self, params: Any) -> Any:
        return jax.jit(clients.federated_sgd(clients.cross_entropy(self.apply_fn)))(params, self.batch)

    def save(self, name: str, tree: Any) -> str:
        interop.save_tensors(self.folder / name, tree)
        return str(self.folder / name)

    def arguments(self, *options: str, **files: str) -> list[str]:
        """The command on these files."""
        chosen = {"update": "update.npz", "params": "params.npz"} | files
        paths = [part for name, file in chosen.items() for part in (f"--{name}", str(self.folder / file))]
        fixed = ["--model", "linear", "--input-shape", "8,8,1", "--out", str(self.folder / "out")]
        return ["attack", *paths, *fixed, *options]

    def scale(self) -> list[str]:
        return ["--mean", str(self.images.mean[0]), "--std", str(self.images.std[0])]

    def read(self) -> dict[str, Any]:
        return json.loads((self.folder / "out" / "results.json").read_text())

    def found(self) -> np.ndarray:
        with np.load(self.folder / "out" / "reconstruction.npz") as arrays:
            return arrays["inputs"]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """`main` chooses the precision of its process."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_an_update_gives_its_image_away_without_a_truth(
    recorded: Recorded, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    recorded.save(f"p{suffix}", recorded.params)
    recorded.save(f"u{suffix}", recorded.update)
    assert main(recorded.arguments("--attack", "linear", params=f"p{suffix}", update=f"u{suffix}")) == 0
    printed, read = capsys.readouterr().out, recorded.read()
    assert "PSNR" not in printed
    assert "100%" in printed
    assert "the range of the pixels is not known" in printed
    assert read["threat_model"] == ThreatModel().describe()
    (victim,) = read["victims"]
    assert victim["explained"]["share"] > 0.999
    assert "psnr" not in victim
    assert read["prior_only_explained"][0] < 0.9
    assert "prior_only_psnr" not in read
    np.testing.assert_allclose(recorded.found(), recorded.batch.inputs, atol=1e-4)
    assert (recorded.folder / "out" / "reconstructions.png").read_bytes().startswith(b"\x89PNG")


def test_with_a_truth_there_are_scores(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = recorded.arguments("--attack", "linear", *recorded.scale(), "--diagnose", truth="truth.npz")
    assert main(arguments) == 0
    printed, read = capsys.readouterr().out, recorded.read()
    assert read["victims"][0]["psnr"] > 60  # float32
    assert read["victims"][0]["label_correct"] == 1
    assert set(read["baselines_psnr"]) == {"grey"}
    assert "the first victim's update:\n" in printed
    assert read["threat_model"] == ThreatModel().describe()  # the truth is for the scores


@pytest.mark.parametrize("layout", ["state dict", "list"])
def test_pytorch_flattens_channels_first(recorded: Recorded, layout: str) -> None:
    """A model of two channels: what PyTorch calls the first input of its dense layer is not JAX's."""
    rng = np.random.default_rng(0)
    weight, image = rng.normal(size=(3, 8)).astype(np.float32) / 9, rng.uniform(size=(2, 2, 2)).astype(np.float32)
    error = np.array([0.3, -0.5, 0.2], np.float32)
    sent = {"fc.weight": weight, "fc.bias": np.zeros(3, np.float32)}
    moved = {"fc.weight": np.outer(error, image.ravel()), "fc.bias": error}
    for name, tensors in (("params.npz", sent), ("update.npz", moved)):
        if layout == "list":
            np.savez(recorded.folder / name, *tensors.values())
        else:
            recorded.save(name, tensors)
    options = ("--attack", "linear", "--no-prior-only", "--input-shape", "2,2,2")
    assert main(recorded.arguments(*options)) == 0
    np.testing.assert_allclose(recorded.found()[0], image.transpose(1, 2, 0), atol=1e-5)


def test_a_network_of_pytorch_is_the_registered_one() -> None:
    """The gradient that PyTorch computed for four images is the one that the model computes for them."""
    golden = Path(__file__).parent.parent / "interop"
    files = {"params": str(golden / "lenet_body_state.npz"), "update": str(golden / "lenet_body_gradient.npz")}
    made = registered_model(
        Namespace(model="lenet", input_shape=(16, 16, 3), classes=None, batch_norm="evaluation", **files)
    )
    truth = interop.load_tensors(golden / "lenet_body_truth.npz")
    batch = Batch(jnp.asarray(truth["inputs"]), jnp.asarray(truth["labels"], jnp.int32))
    found = jax.jit(clients.federated_sgd(clients.cross_entropy(made.apply_fn)))(made.params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, made.update)


def test_a_negated_update_is_not_explained(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    """The analytic attack divides it by itself and finds the image; its update points the other way."""
    recorded.save("update.npz", jax.tree.map(jnp.negative, recorded.update))
    options = ("--attack", "linear", "--labels", "known", "--no-prior-only", *recorded.scale())
    assert main(recorded.arguments(*options, truth="truth.npz")) == 0
    assert "0% at scale -1" in capsys.readouterr().out
    read = recorded.read()
    assert read["victims"][0]["psnr"] > 60
    assert read["victims"][0]["explained"]["share"] == 0
    assert read["threat_model"] == ThreatModel(labels=True).describe()


def test_local_steps_are_a_pseudo_gradient(recorded: Recorded) -> None:
    client_fn = clients.federated_averaging(clients.cross_entropy(recorded.apply_fn), learning_rate=0.5, local_epochs=3)
    change = jax.jit(client_fn)(recorded.params, recorded.batch)
    after = jax.tree.map(lambda old, step: old - 1.5 * step, recorded.params, change)
    recorded.save("update.npz", interop.pseudo_gradient(recorded.params, after, learning_rate=0.5, local_steps=3))
    options = ("--attack", "linear", "--labels", "known", "--no-prior-only", *recorded.scale())
    shares = []
    for steps in ([], ["--local-steps", "3", "--local-learning-rate", "0.5"]):
        assert main(recorded.arguments(*options, *steps, truth="truth.npz")) == 0
        shares.append(recorded.read()["victims"][0]["explained"])
    assert abs(shares[1]["scale"] - 1) < 1e-3 < abs(shares[0]["scale"] - 1)


def test_an_attacker_that_knows_the_defense(recorded: Recorded) -> None:
    pruned = jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) > jnp.median(jnp.abs(leaf)), leaf, 0), recorded.update)
    recorded.save("update.npz", pruned)
    options = ("--steps", "5", "--no-prior-only", "--defense", "prune:ratio=0.5", "--adaptive", "--label-rule", "llg")
    assert main(recorded.arguments(*options)) == 0
    read = recorded.read()
    assert read["threat_model"] == f"{ThreatModel().describe()}; knows the defense prune:ratio=0.5"
    assert read["settings"]["label_rule"] == "llg"
    assert len(read["victims"]) == 1


def test_running_statistics_come_from_the_file(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    module = models.MODELS["resnet20_4"]((8, 8, 1), 10, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))
    state = jax.tree.map_with_path(lambda path, leaf: leaf + 3 if path[-1].key == "mean" else leaf, state)
    _, params = models.functional(module)
    files = {
        "params": recorded.save("params.npz", state),
        "update": recorded.save("update.npz", jax.tree.map(jnp.ones_like, params)),
    }
    made = registered_model(
        Namespace(model="resnet20_4", input_shape=(8, 8, 1), classes=None, batch_norm="evaluation", **files)
    )
    assert made.has_statistics
    assert made.module is not None
    statistics = models.running_statistics(made.module, made.params, jnp.zeros((1, 8, 8, 1)))
    assert all(jnp.all(mean == 3) and jnp.all(variance == 1) for mean, variance in statistics)

    recorded.save("params.npz", params)
    arguments = recorded.arguments("--model", "resnet20_4", "--attack", "grad_inversion", "--statistics", "exact")
    assert "--statistics exact is not for --update" in _message(arguments, capsys)
    arguments[-1] = "running"
    assert "--params must hold the running statistics of resnet20_4's batch" in _message(arguments, capsys)
    arguments += ["--batch-norm", "training"]
    assert "--statistics running needs a --model by its name and its running" in _message(arguments, capsys)


@pytest.fixture
def own_model(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """A function of the user's, in the names and layout of PyTorch, with an array that has no update."""
    monkeypatch.chdir(recorded.folder)
    (recorded.folder / "my_own_model.py").write_text(OWN_MODEL)
    keys = jax.random.split(jax.random.key(0))
    sent = {
        "net.0.weight": jax.random.normal(keys[0], (128, 64)) / 8,
        "net.0.bias": jnp.zeros(128),
        "net.2.weight": jax.random.normal(keys[1], (10, 128)) / 12,
        "net.2.bias": jnp.zeros(10),
    }

    def apply_fn(flat: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
        hidden = jnp.tanh(inputs.reshape(1, -1) @ flat["net.0.weight"].T + flat["net.0.bias"] - 0.1)
        return hidden @ flat["net.2.weight"].T + flat["net.2.bias"]

    recorded.apply_fn = apply_fn
    recorded.save("update.npz", recorded.gradient(sent))
    recorded.save("params.npz", sent | {"shift": jnp.full(128, 0.1), "num_batches_tracked": np.array(7)})
    yield recorded
    sys.modules.pop("my_own_model", None)


def test_a_function_of_the_users_is_a_model(own_model: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "my_own_model:apply", "--attack", "idlg", "--head", "net.2", "--label-rule", "bias_counts")
    adam, scale = ["--solver", "adam", "--steps", "200"], own_model.scale()
    assert main(own_model.arguments(*options, *adam, *scale, "--no-prior-only", truth="truth.npz")) == 0
    read, printed = own_model.read(), capsys.readouterr().out
    assert "held as they are, because --update has none of them: shift, num_batches_tracked" in printed
    assert read["victims"][0]["label_correct"] == 1
    assert read["victims"][0]["explained"]["share"] > 0.99
    assert read["victims"][0]["psnr"] > 40


def test_a_row_has_no_picture(own_model: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "my_own_model:apply", "--attack", "idlg", "--head", "net.2", "--input-shape", "64")
    assert main(own_model.arguments(*options, "--steps", "2", "--no-prior-only")) == 0
    assert "no picture: inputs of shape (64,) are no images" in capsys.readouterr().out
    assert own_model.found().shape == (1, 64)
    assert not (own_model.folder / "out" / "reconstructions.png").exists()


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be attacked: mistakes are found before."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled before the arguments were checked")

    monkeypatch.setattr("gia_jax.cli.outcomes.study", refuse)
    monkeypatch.setattr("gia_jax.cli.outcomes.study_analytic", refuse)


def _message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("gia_jax: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits"], "--data is not for --update, got 'digits'"),
        (["--victims", "2"], "--victims is not for --update, got 2"),
        (["--aggregation", "plain"], "--aggregation is not for --update, got 'plain'"),
        (["--clients", "2"], "--clients is not for --update, got 2"),
        (["--clip", "1"], "--clip is not for --update, got 1.0"),
        (["--head", "fc"], "--head is not for --model linear, got 'fc'"),
        (["--model", "m:f", "--batch-norm", "training"], "--batch-norm is not for --model m:f, got 'training'"),
        (["--model", "magic"], f"--model must be MODULE:FUNCTION or one of {', '.join(models.MODELS)}, got 'magic'"),
        (["--model", "no_such_module:f"], "--model must name a module that can be imported, got 'no_such_module': "),
        (["--model", "json:nothing"], "--model must name a function of json, got 'nothing'"),
        (
            ["--model", "json:f", "--defense", "clip", "--adaptive"],
            "--defense of a recorded --update needs a --model by",
        ),
        (["--model", "m:f", "--attack", "linear"], "--attack linear needs one of the models linear, mlp, got 'm:f'"),
        (["--attack", "r_gap", "--model", "cnn6"], "--attack r_gap needs --mean and --std, for the range of pixels"),
        (["--attack", "gias"], "--attack gias needs --mean and --std, for the range of pixels, got none"),
        (["--input-shape", "8,x"], "--input-shape must be whole numbers with commas between them, got '8,x'"),
        (["--input-shape", ""], "--input-shape must be whole numbers with commas between them, got ''"),
        (["--input-shape", "8,0,1"], "--input-shape must be of sizes of at least 1, got (8, 0, 1)"),
        (["--input-shape", "99999999,99999999"], "--input-shape must fit into memory: it needs "),
        (["--batch-size", "1000000000"], "--batch-size must fit into memory: it needs 715 GiB of "),
        (["--input-shape", "4,4,1"], "'head.kernel' has shape (64, 10), expected (16, 10)"),
        (["--model", "lenet"], "update.npz"),
        (["--classes", "0"], "--classes must be at least 1 and below 2^31, got 0"),
        (["--classes", "9"], "'head.bias' has shape (10,), expected (9,)"),
        (["--mean", "0.5"], "--mean and --std must be given together, got only --mean"),
        (["--mean", "a", "--std", "1"], "--mean must be numbers with commas between them, got 'a'"),
        (["--mean", "nan", "--std", "1"], "--mean must be finite, got 'nan'"),
        (["--mean", "0,0,0", "--std", "1"], "--mean must be one number or 1, one for each channel, got 3"),
        (["--mean", "0", "--std", "0"], "--std must be above 0, got 0.0"),
        (["--labels", "known"], "--labels known needs a --truth with the labels, got none"),
        (["--defense", "clip"], "--defense clip:norm=1 of a recorded --update needs --adaptive: the client has acted"),
        (
            ["--defense", "mixup", "--adaptive"],
            "--defense mixup:k=4 is not for --update: it changes the client's input",
        ),
        (["--defense", "precode", "--adaptive"], "is not for --update: it changes the client's model"),
        (["--batch-size", "2", "--attack", "idlg"], "--attack idlg infers the label of one example, got 2: take"),
        (["--local-learning-rate", "0.1"], "--local-learning-rate needs --local-steps above 1, got 0.1"),
        (["--params", "nowhere.npz"], "path must be a file that can be read, got 'nowhere.npz'"),
        (["--update", "nowhere.npz"], "path must be a file that can be read, got 'nowhere.npz'"),
        (["--update", "u.pt"], "path must end in .safetensors or .npz, got 'u.pt'"),
        (["--truth", "nowhere.npz"], "path must be a file that can be read, got 'nowhere.npz'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_a_mistake_is_one_line(
    recorded: Recorded, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    error = _message(recorded.arguments(*arguments), capsys)
    if message != "update.npz":
        assert message in error


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize("missing", ["--params", "--model", "--input-shape"])
def test_what_an_update_needs_is_named(recorded: Recorded, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    arguments = recorded.arguments()
    place = arguments.index(missing)
    assert f"--update needs {missing}, got none" in _message(arguments[:place] + arguments[place + 2 :], capsys)


FILES: list[tuple[str, Callable[[Recorded], Any], str]] = [
    ("update.npz", lambda r: {"head": {"bias": jnp.ones(10)}}, "'head.kernel' of shape (64, 10) is missing"),
    ("update.npz", lambda r: jax.tree.map(jnp.zeros_like, r.update), "update must not be zero everywhere"),
    ("update.npz", lambda r: jax.tree.map(lambda leaf: leaf * jnp.nan, r.update), "must be finite, got nan"),
    ("update.npz", lambda r: jax.tree.map(lambda leaf: leaf.astype(int), r.update), "must be of type float32, got int"),
    ("params.npz", lambda r: jax.tree.map(lambda leaf: leaf / 0, r.params), "must be finite, got "),
    ("params.npz", lambda r: {"scale": jnp.ones(3)}, "--classes must be given, as the last layer in "),
    ("truth.npz", lambda r: {"images": r.batch.inputs}, "--truth must hold labels, and inputs for scores, got images"),
    ("truth.npz", lambda r: {"labels": jnp.zeros(2, int)}, "--truth must hold 1 labels as --batch-size says, got (2,)"),
    (
        "truth.npz",
        lambda r: {"labels": jnp.array([10])},
        "labels of --truth must be at least 0 and below 10, got 10",
    ),
    (
        "truth.npz",
        lambda r: {"inputs": r.batch.inputs[..., 0], "labels": r.batch.labels},
        "--truth must hold inputs of shape (1, 8, 8, 1), got (1, 8, 8)",
    ),
    (
        "truth.npz",
        lambda r: {"inputs": r.batch.inputs, "labels": r.batch.labels},
        "--truth must hold pixels in [0, 1] or come with --mean and --std, got -0.812 to 1.68",
    ),
]


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[f"{file[0]} {file[2][:30]}" for file in FILES])
def test_a_file_that_holds_something_else_is_one_line(
    recorded: Recorded,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: Callable[[Recorded], Any],
    message: str,
) -> None:
    recorded.save(name, content(recorded))
    options = ["--labels", "known"] if name == "truth.npz" else []
    files = {"truth": "truth.npz"} if options else {}
    assert message in _message(recorded.arguments(*options, **files), capsys)


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "my_own_model:constant"], "--model must name a function of my_own_model, got 'constant'"),
        (["--model", "my_own_model:no_logits"], "must return logits of shape (1, classes), got "),
        (["--model", "my_own_model:broken"], "--model my_own_model:broken must be differentiable by its parameters"),
        (
            ["--model", "my_own_model:apply", "--input-shape", "9"],
            "--input-shape must be inputs of the model, got",
        ),
        (["--model", "my_own_model:apply", "--classes", "3"], "--classes must be 10, as the model has logits, got 3"),
        (["--model", "my_own_model:apply"], "--head must lead to the last layer, got 'head': there is no 'head'"),
        (["--model", "my_own_model:apply", "--head", "shift"], "--head must lead to"),
        (
            [
                "--model",
                "my_own_model:apply",
                "--head",
                "net.2",
                "--attack",
                "grad_inversion",
                "--statistics",
                "running",
            ],
            "--statistics running needs a --model by its name and its running statistics in --params, got none",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)
def test_a_function_that_is_no_model_is_one_line(
    own_model: Recorded, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in _message(own_model.arguments(*arguments), capsys)
