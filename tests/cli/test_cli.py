"""The command line: what it writes, and what it says when it is asked for something it cannot do."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, ThreatModel, data, models
from gia_jax.cli import demonstration, main
from gia_jax.cli.cases import load_case
from gia_jax.cli.names import ATTACKS, LABEL_RULES, SOLVERS
from gia_jax.cli.simulated import see
from gia_jax.defenses.protected import COMBINATIONS, DEFENSES, parse, promises
from gia_jax.sweep.study import Sign

pytest.importorskip("sklearn")

QUICK = ["attack", "--model", "linear", "--data", "digits", "--victims", "2", "--no-prior-only"]


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """`main` chooses the precision of its process."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be compiled: mistakes are found before."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled before the arguments were checked")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setattr("gia_jax.cli.outcomes.study", refuse)
    monkeypatch.setattr("gia_jax.cli.outcomes.study_analytic", refuse)


def _read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_list_names_everything_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    words = capsys.readouterr().out.split()
    for name in (
        *ATTACKS,
        *SOLVERS,
        *DEFENSES,
        *COMBINATIONS,
        *models.MODELS,
        "photos",
        "digits",
        "bias_counts",
        "ilrg",
    ):
        assert name in words


@pytest.mark.parametrize("protocol", ["plain", "secagg", "bfv"])
def test_aggregation_hides_a_client_and_not_the_sum(protocol: str, tmp_path: Path) -> None:
    options = ["--attack", "idlg", "--labels", "known", "--aggregation", protocol, "--clients", "2", "--steps", "40"]
    assert main([*QUICK, "--out", str(tmp_path), *options]) == 0
    read = _read(tmp_path)
    assert min(victim["psnr"] for victim in read["aggregate"]["victims"]) > 40
    if protocol == "bfv":
        assert read["client:0"] == "n/a: ciphertext"
        return
    psnr = [victim["psnr"] for victim in read["client:0"]["victims"]]
    assert min(psnr) > 40 if protocol == "plain" else max(psnr) < 12
    assert protocol in read["client:0"]["threat_model"]


def test_seeds_that_agree_are_one_restart(tmp_path: Path) -> None:
    options = ["--attack", "grad_inversion", "--batch-size", "2", "--steps", "20"]
    assert main([*QUICK, "--out", str(tmp_path), *options]) == 0
    read = _read(tmp_path)
    assert read["settings"]["statistics"] == "none"  # the linear model has none
    assert "statistics" not in read["threat_model"]
    assert len(read["victims"]) == 2


def test_statistics_of_the_client_are_named_where_they_are_granted() -> None:
    case = load_case("resnet20_4", "digits", victims=1, batch_size=2)
    seen = see(case, {"none": case.protect(())}, jax.random.key(0), known=[True], statistics=True)[True]["none"]
    mean, variance = seen.extra["statistics"][0]
    inputs = case.truth.inputs[0]
    kernel = case.protect(()).params["stem"]["kernel"]
    features = jax.lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(mean[0], features.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(variance[0], features.var((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_gias_uses_the_generator_that_it_names(tmp_path: Path) -> None:
    """A trained one that makes white images only: three steps of its weights leave them white."""
    quick = [*QUICK, "--attack", "gias", "--steps", "3", "--out", str(tmp_path)]
    assert main(quick) == 0
    untrained = _read(tmp_path)
    assert untrained["threat_model"] == f"{ThreatModel(labels=True).describe()}; has a generator, untrained"
    assert untrained["settings"]["generator"] == "untrained"
    assert untrained["settings"]["latent_steps"] == 0

    decoder, file = models.Decoder((8, 8, 1), 2, width=2, rngs=nnx.Rngs(0)), tmp_path / "white.npz"
    decoder.up2.bias[...] = decoder.up2.bias[...] + 20
    models.save_decoder(file, decoder)
    assert main([*quick, "--generator", str(file), "--latent-steps", "2"]) == 0
    read = _read(tmp_path)
    assert read["threat_model"].endswith(f"; has a generator, trained: {file}")
    assert read["settings"]["generator"] == str(file)
    assert read["settings"]["latent_steps"] == 2
    white = -10 * np.log10(np.mean((1 - data.load("digits").images[:2]) ** 2, (1, 2, 3)))
    np.testing.assert_allclose([victim["psnr"] for victim in read["victims"]], white, atol=1e-3)
    assert abs(untrained["victims"][0]["psnr"] - white[0]) > 1

    models.save_decoder(file, models.Decoder((12, 8, 1), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"generator must make images of 8x8x1 for digits, got .*, of 12x8x1"):
        load_case("linear", "digits", victims=1).generator(file, jax.random.key(0))


def test_cafe_reads_a_federation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--records", "24", "--rounds", "40", "--batch-size", "6"]
    assert main(["federation", "--data", "digits", "--out", str(tmp_path), *size]) == 0
    read = _read(tmp_path)
    assert len(read["victims"]) == 24
    assert min(victim["psnr"] for victim in read["victims"]) > 60  # float32
    assert all(victim["label_correct"] == 1 for victim in read["victims"])
    assert "batch indices" in read["threat_model"]
    assert (tmp_path / "reconstructions.png").exists()
    size[3] = "20"  # fewer rounds than records
    assert main(["federation", "--data", "digits", "--out", str(tmp_path), *size]) == 2
    output = capsys.readouterr()
    assert "the batches identify every record: rank 24, condition number" in output.out
    assert "batch_indices cannot identify the records" in output.err
    assert main(["federation", "--rounds", "0", "--out", str(tmp_path)]) == 2
    assert "--rounds must be at least 1 and below 2^31, got 0" in capsys.readouterr().err
    large = ["--records", "24", "--batch-size", "1000000000"]
    assert main(["federation", "--data", "no_such_set", *large, "--out", str(tmp_path)]) == 2  # before data are read
    assert "--batch-size must be at most --records, 24, got 1000000000" in capsys.readouterr().err


def test_mixed_labels_are_not_read_by_a_rule_of_one_who_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--attack", "idlg", "--data", "digits", "--defense", "mixup:k=2", "--adaptive", "--out", str(tmp_path)]
    assert main(["attack", *options]) == 2
    needed = "--adaptive with mixup needs --labels known, or --label-rule soft_labels for one example"
    assert f"{needed}: idlg finds no mixed labels" in capsys.readouterr().err


def test_one_label_is_read_as_probabilities_mixed_or_not(tmp_path: Path) -> None:
    options = [*QUICK, "--out", str(tmp_path), "--label-rule", "soft_labels", "--steps", "3"]
    assert main([*options, "--defense", "mixup:k=2", "--adaptive"]) == 0
    assert all(np.isfinite(victim["psnr"]) for victim in _read(tmp_path)["victims"])
    assert main(options) == 0
    read = _read(tmp_path)
    assert read["settings"]["label_rule"] == "soft_labels"
    assert [victim["label_correct"] for victim in read["victims"]] == [1.0, 1.0]


def test_what_noise_promises_is_said_beside_it() -> None:
    assert promises(parse("gaussian:scale=0.1")) == ["no epsilon: the sensitivity is unbounded"]
    assert promises(parse("gaussian:scale=0")) == []
    unbounded = promises(parse("gaussian:scale=0.1"))
    clip, noise = parse("clip:norm=1"), parse("gaussian:scale=0.1")
    assert promises((*clip, *noise)) == []
    assert promises((*noise, *clip)) == unbounded
    assert promises((*noise, *parse("laplace"))) == unbounded
    assert promises((*noise, *clip, *noise)) == []
    assert promises((*parse("dpsgd:noise_multiplier=0"), *noise)) == []
    assert promises((*parse("soteria"), *parse("dpsgd"))) == [
        "no epsilon is computed: Soteria chooses the features it leaves out by the examples"
    ]
    pytest.importorskip("dp_accounting")
    alone = promises(parse("dpsgd"))
    assert promises((*parse("dpsgd"), *noise)) == alone
    mixed, *rest = promises((*parse("mixup:k=3"), *parse("dpsgd")))
    assert mixed == "what follows is of one encoding, and an image may be part of every one of the batch"
    assert rest == promises((*parse("instahide:k=1"), *parse("dpsgd"))) == alone
    assert promises((*parse("soteria:ratio=0"), *parse("dpsgd"))) == alone
    epsilon, gamma = promises(parse("dpsgd:noise_multiplier=1,norm=1"))
    assert epsilon.startswith("epsilon 9.997 at delta 1e-05 (replace_one, pld")
    assert gamma == "gamma 0.3891: the largest chance of a reconstruction, 0.1 without the release"


@pytest.mark.parametrize("later", [(), ("sign",)])
def test_the_bounds_beside_an_epsilon_are_those_of_the_first_victim(later: tuple[str, ...]) -> None:
    parts = tuple(part for text in ("dpsgd:noise_multiplier=2,norm=0.5", *later) for part in parse(text))
    case = load_case("linear", "digits", victims=2)
    bounds = case.bounds_of(parts)
    protected = case.protect(parts[:1])
    images = case.data.images
    assert images is not None
    pixels, label = images.images[0], case.truth.labels[0]

    def update_of(pixels: jax.Array) -> jax.Array:
        inputs = (pixels.reshape(1, 8, 8, 1) - images.mean[0]) / images.std[0]
        update = protected.assumed_fn(protected.params, Batch(inputs, label))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(update)])

    jacobian = np.asarray(jax.jacfwd(update_of)(jnp.asarray(pixels.ravel())))
    np.testing.assert_allclose(bounds["information"], jacobian.T @ jacobian, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(bounds["covariance"], np.cov(images.images[2:].reshape(-1, 64).T), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("texts", [(), ("gaussian:scale=1",), ("dpsgd:noise_multiplier=0",), ("mixup", "dpsgd")])
def test_no_bounds_without_noise_of_dp_sgd_or_with_mixed_images(texts: tuple[str, ...]) -> None:
    parts = tuple(part for text in texts for part in parse(text))
    case = load_case("linear", "digits", victims=1)
    assert case.bounds_of(parts) == {}


def test_no_van_trees_bound_without_public_images() -> None:
    case = load_case("linear", "digits", victims=1)
    one = case.data._replace(public=case.data.public._replace(inputs=case.data.public.inputs[:1]))
    bounds = case._replace(data=one).bounds_of(parse("dpsgd"))
    assert set(bounds) == {"information"}
    assert np.isfinite(bounds["information"]).all()


def test_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "gia_jax", "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "inverting_gradients" in done.stdout
    assert done.stderr == ""


def test_the_demonstration_writes_every_attack_under_every_defense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but the number of steps."""
    pytest.importorskip("skimage")
    few = {name: (2, restarts) for name, (_, restarts) in demonstration.PLAN.items()}
    monkeypatch.setattr(demonstration, "PLAN", few)
    assert main(["--out", str(tmp_path), "--seed", "1"]) == 0
    read, printed = _read(tmp_path), capsys.readouterr().out
    named = {f"{attack}, {shown}".removesuffix(", none") for attack in few for shown in demonstration.SHOWN}
    assert set(read) == named | {"baselines_psnr"}
    for name in named:
        assert read[name]["settings"]["steps"] == 2
        assert len(read[name]["victims"]) == 3
        assert all(np.isfinite(victim["psnr"]) for victim in read[name]["victims"])
    assert len(read["idlg"]["victims"][0]["restart_losses"]) == 3
    # Each client sent something else.
    assert len({read[name]["victims"][0]["loss"] for name in named if name.startswith("idlg")}) == len(
        demonstration.SHOWN
    )
    for picture in ("reconstructions", "defenses_idlg", "defenses_inverting_gradients"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "gaussian:scale=0.01: no epsilon: the sensitivity is unbounded" in printed
    for line in ("norm=1: epsilon", "van Trees, every estimator", "Fisher, unbiased estimators only"):
        assert printed.count(line) == (find_spec("dp_accounting") is not None)
    for known in (False, True):
        assert printed.count(f": {ThreatModel(labels=known).describe()}\n") == 1


def test_an_attack_writes_results_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    steps = ["--steps", "20", "--restarts", "2", "--seed", "3", "--lanes", "3", "--solver", "adam", "--labels", "known"]
    assert main(["attack", "--model", "linear", "--data", "digits", "--victims", "2", "--out", str(out), *steps]) == 0
    assert not {"clients", "clip", "generator", "local_learning_rate", "statistics"} & set(_read(out)["settings"])
    assert sorted(path.name for path in out.iterdir()) == ["reconstructions.png", "results.json", "results.npz"]
    assert (out / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    read = _read(out)
    known = {"attack": "inverting_gradients", "model": "linear", "data": "digits", "solver": "adam", "seed": 3}
    assert known.items() <= read["settings"].items()
    assert read["settings"]["steps"] == 20
    assert read["threat_model"] == ThreatModel(labels=True).describe()
    assert read["versions"]["jax"] == jax.__version__
    assert read["compile_seconds"] > 0
    assert read["run_seconds"] > 0
    assert read["ms_per_step_per_restart"] > 0
    assert set(read["baselines_psnr"]) == {"grey", "data mean", "nearest image"}
    assert len(read["prior_only_psnr"]) == 2
    assert len(read["victims"]) == 2
    for victim in read["victims"]:
        assert victim["is_finite"]
        assert victim["label_correct"] == 1
        assert len(victim["restart_losses"]) == 2
        assert victim["loss"] == min(victim["restart_losses"])
    printed = capsys.readouterr()
    assert read["threat_model"] in printed.out
    assert str(out / "results.json") in printed.out


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    victims = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([*QUICK, "--attack", "linear", "--seed", seed, "--out", str(tmp_path / name)]) == 0
        victims.append(_read(tmp_path / name)["victims"])
    assert victims[0] == victims[1] != victims[2]


def test_a_label_rule_by_its_name_infers_the_labels(tmp_path: Path) -> None:
    """Inverting Gradients takes labels as known: with a rule it does not."""
    assert main([*QUICK, "--batch-size", "2", "--steps", "3", "--label-rule", "ilrg", "--out", str(tmp_path)]) == 0
    read = _read(tmp_path)
    assert read["threat_model"] == ThreatModel().describe()
    assert (read["settings"]["labels"], read["settings"]["label_rule"]) == ("inferred", "ilrg")
    assert main([*QUICK, "--batch-size", "2", "--attack", "linear", "--out", str(tmp_path)]) == 0
    assert _read(tmp_path)["settings"]["label_rule"] == "bias_counts"


def test_april_is_exact_and_finds_its_own_model(tmp_path: Path) -> None:
    command = ["attack", "--attack", "april", "--data", "digits", "--victims", "1", "--no-prior-only"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    read = _read(tmp_path)
    assert read["settings"]["model"] == "vit_april"
    assert all(victim["psnr"] > 100 and victim["label_correct"] == 1 for victim in read["victims"])


def test_the_linear_attack_is_exact_and_says_what_it_knew(tmp_path: Path) -> None:
    assert main([*QUICK, "--attack", "linear", "--out", str(tmp_path)]) == 0
    read = _read(tmp_path)
    assert all(victim["psnr"] > 60 and victim["label_correct"] == 1 for victim in read["victims"])
    assert read["threat_model"] == ThreatModel().describe()
    assert "prior_only_psnr" not in read


def test_a_diagnosis_comes_before_the_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--attack", "linear", "--diagnose", "--defense", "prune:ratio=0.5", "--out", str(tmp_path)]
    assert main([*QUICK, *options]) == 0
    before, said, after = capsys.readouterr().out.partition("the first victim's update:\n")
    assert said
    assert "threat model:" in before
    assert "prune" in after.split("wrote")[0]
    assert "diagnose" not in _read(tmp_path)["settings"]


def test_defenses_act_in_order_and_the_threat_model_names_them(tmp_path: Path) -> None:
    defenses = ["--defense", "clip:norm=0.5", "--defense", "prune:ratio=0.5"]
    quick = [*QUICK, "--steps", "20", "--solver", "adam"]
    for name, adaptive in (("blind", []), ("adaptive", ["--adaptive"])):
        assert main([*quick, *defenses, *adaptive, "--out", str(tmp_path / name)]) == 0
    blind, adaptive = _read(tmp_path / "blind"), _read(tmp_path / "adaptive")
    card = ThreatModel(labels=True).describe()
    assert blind["threat_model"] == f"{card}; does not know the defense clip:norm=0.5 prune:ratio=0.5"
    assert adaptive["threat_model"] == f"{card}; knows the defense clip:norm=0.5 prune:ratio=0.5"
    assert blind["settings"]["defense"] == ["clip:norm=0.5", "prune:ratio=0.5"]
    assert blind["victims"] != adaptive["victims"]


def test_mixed_images_have_soft_labels_all_the_way(tmp_path: Path) -> None:
    assert main([*QUICK, "--steps", "20", "--defense", "prune_mixup", "--out", str(tmp_path)]) == 0
    for victim in _read(tmp_path)["victims"]:
        assert victim["is_finite"]


def test_photographs_have_the_size_that_is_asked_for(tmp_path: Path) -> None:
    arguments = [*QUICK, "--attack", "linear", "--data", "photos", "--image-size", "48", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert _read(tmp_path)["settings"]["image_size"] == 48
    assert np.load(tmp_path / "results.npz")["/original"].shape == (2, 48, 48, 3)


@pytest.mark.parametrize("name", ["--out", "--seed"])
def test_options_before_the_command_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([name, "7", *QUICK, "--attack", "linear"]) == 0
    read = _read(tmp_path / ("7" if name == "--out" else "gia_jax_out"))
    assert read["settings"]["seed"] == (7 if name == "--seed" else 0)


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "magic"], f"--attack must be one of {', '.join(ATTACKS)}, got 'magic'"),
        (["--model", "magic"], f"--model must be one of {', '.join(models.MODELS)}, got 'magic'"),
        (["--image-size", "64", "--data", "digits"], "--image-size needs --data photos, got 64 with --data digits"),
        (["--image-size", "0", "--data", "photos"], "--image-size must be at least 1 and below 2^31, got 0"),
        (
            ["--aggregation", "magic"],
            "--aggregation must be one of plain, secagg, lightsecagg",
        ),
        (["--aggregation", "plain", "--clients", "0"], "--clients must be at least 1 and below 2^31, got 0"),
        (["--attack", "r_gap", "--model", "lenet"], "--attack r_gap needs one of the models cnn6, got 'lenet'"),
        (
            ["--attack", "r_gap", "--model", "cnn6", "--batch-size", "2"],
            "--attack r_gap needs a batch of one example, got 2",
        ),
        (["--attack", "april", "--model", "vit"], "--attack april needs one of the models vit_april, got 'vit'"),
        (["--attack", "cafe"], f"--attack must be one of {', '.join(ATTACKS)}, got 'cafe'"),
        (["--label-rule", "magic"], f"--label-rule must be one of {', '.join(LABEL_RULES)}, got 'magic'"),
        (["--label-rule", "llg", "--labels", "known"], "--label-rule infers labels, got 'llg' with --labels known"),
        (["--attack", "dlg", "--label-rule", "llg"], "--label-rule is not for --attack dlg, got 'llg'"),
        (["--label-rule", "idlg", "--batch-size", "2"], "--label-rule idlg infers the label of one example, got 2"),
        (["--params", "p.npz"], "--params needs --update, got 'p.npz'"),
        (["--head", "fc"], "--head needs --update, got 'fc'"),
        (["--attack", "linear", "--restarts", "7"], "--restarts is not for --attack linear, got 7"),
        (["--attack", "linear", "--steps", "5"], "--steps is not for --attack linear, got 5"),
        (["--attack", "linear", "--solver", "lbfgs"], "--solver is not for --attack linear, got 'lbfgs'"),
        (["--attack", "linear", "--lanes", "2"], "--lanes is not for --attack linear, got 2"),
        (["--attack", "linear", "--defense", "clip", "--adaptive"], "--adaptive is not for --attack linear, got True"),
        (["--attack", "r_gap", "--labels", "known"], "--labels is not for --attack r_gap, got 'known'"),
        (["--statistics", "running"], "--statistics is not for --attack inverting_gradients, got 'running'"),
        (
            ["--attack", "grad_inversion", "--statistics", "running"],
            "--statistics running needs a model with batch normalisation, got --model linear",
        ),
        (
            ["--attack", "grad_inversion", "--solver", "levenberg_marquardt"],
            "--solver of --attack grad_inversion must be one of paper, adam, fixed_step_lbfgs, lbfgs, got 'levenberg_",
        ),
        (["--clip", "nan"], "--clip needs --aggregation, got nan"),
        (["--clients", "7"], "--clients needs --aggregation, got 7"),
        (["--aggregation", "plain", "--clip", "nan"], "clip must be positive and finite, got nan"),
        (["--local-learning-rate", "nan"], "--local-learning-rate needs --local-steps above 1, got nan"),
        (["--data", ""], "or a prepared TFDS set of images such as mnist, cifar10, cifar100, got ''"),
        (["--model", ""], f"--model must be one of {', '.join(models.MODELS)}, got ''"),
        (["--out", ""], "--out must name a folder, got ''"),
        (["--steps", "99999999999"], "--steps must be at least 1 and below 2^31, got 99999999999"),
        (["--restarts", "999999999", "--victims", "90"], "--restarts must fit into memory: it needs "),
        (
            ["--defense", "mixup:k=99"],
            "--defense mixup:k=99 must mix at most the 17 examples that a client has",
        ),
        (
            ["--attack", "gias", "--generator", "nowhere.npz"],
            "save_decoder wrote, got 'nowhere.npz': [Errno 2] No such",
        ),
        (["--attack", "gias", "--generator", __file__], f"save_decoder wrote, got {__file__!r}: "),
        (["--attack", "gias", "--solver", "adam"], "--solver is not for --attack gias, got 'adam'"),
        (["--attack", "gias", "--latent-steps", "-1"], "--latent-steps must be at least 0, got -1"),
        (["--attack", "idlg", "--generator", "x.npz"], "--generator is not for --attack idlg, got 'x.npz'"),
        (["--solver", "magic"], f"--solver must be one of {', '.join(SOLVERS)}, got 'magic'"),
        (["--victims", "0"], "--victims must be at least 1 and below 2^31, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1 and below 2^31, got -1"),
        (["--restarts", "0"], "--restarts must be at least 1 and below 2^31, got 0"),
        (["--steps", "0"], "--steps must be at least 1 and below 2^31, got 0"),
        (["--local-steps", "0"], "--local-steps must be at least 1 and below 2^31, got 0"),
        (["--lanes", "0"], "--lanes must be at least 1 and below 2^31, got 0"),
        (["--victims", "9999"], "--victims times --batch-size must be at most 1797 for digits, got 9999"),
        (["--local-steps", "2", "--local-learning-rate", "nan"], "learning-rate must be positive and finite, got nan"),
        (["--local-steps", "2", "--local-learning-rate", "-1"], "learning-rate must be positive and finite, got -1.0"),
        (["--attack", "linear", "--model", "lenet"], "--attack linear needs one of the models linear, mlp, got"),
        (["--attack", "idlg", "--batch-size", "2"], "--attack idlg infers the label of one example"),
        (
            ["--defense", "magic"],
            f"defense must be one of {', '.join(['none', *DEFENSES, *COMBINATIONS])}, got 'magic'",
        ),
        (["--defense", "prune:ratio=2"], "ratio must be in [0, 1), got 2.0"),
        (["--defense", "dpsgd", "--local-steps", "2"], "defense dpsgd is for one step on the whole batch"),
        (["--adaptive"], "--adaptive needs a --defense that the attacker could know, got none"),
        (
            ["--solver", "levenberg_marquardt", "--defense", "prune", "--adaptive"],
            "--solver levenberg_marquardt has an objective of its own, got --adaptive",
        ),
        (["--seed", "9" * 30], "--seed must be"),
        (["--seed", "-1"], "--seed must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    began = time.perf_counter()
    status = main([*QUICK, "--out", str(tmp_path / "out"), *arguments])
    assert time.perf_counter() - began < 20  # seconds, of which the import of a model's library is the most
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("gia_jax: error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.usefixtures("no_compile")
def test_an_unknown_data_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorflow_datasets")
    assert main([*QUICK, "--out", str(tmp_path), "--data", "no_such_set"]) == 2
    error = capsys.readouterr().err
    assert "--data must be photos, digits, adult, mutag" in error
    assert "cifar100, got 'no_such_set'" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize("command", [["attack"], []])
def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "results.json").mkdir()
    for out, message in (
        ("file/out", "a folder that can be written, got "),
        (".", "no folder where the file 'results"),
    ):
        assert main(["--out", str(tmp_path / out), *command]) == 2
        error = capsys.readouterr().err
        assert error.startswith("gia_jax: error: --out must")
        assert message in error
        assert error.count("\n") == 1


SHORT = [*QUICK, "--steps", "40", "--solver", "adam"]


def test_results_that_cannot_be_written_are_not_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr("gia_jax.cli.console.write_unclaimed", refuse)
        assert main([*SHORT, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "results.json' cannot be written: Permission denied; nothing is lost: the same command writes it" in error
    assert main([*SHORT, "--out", str(tmp_path)]) == 0
    assert "100 % of the steps" in capsys.readouterr().err.splitlines()[1]  # nothing is done again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reconstructions.png", "results.json", "results.npz"]


def test_on_a_full_disk_the_results_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gia_jax._files.os.fsync", full)
    assert main([*SHORT, "--out", str(tmp_path)]) == 2
    printed, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if line.startswith("gia_jax: ")]
    assert lines[0].startswith("gia_jax: warning: the run goes on, but its state cannot be kept in ")
    assert lines[1].endswith("No space left on device; its content was printed instead")
    assert len(json.loads(printed[printed.index("\n{") :])["victims"]) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_closed_output_does_not_lose_what_was_computed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gia_jax", *QUICK, "--attack", "linear", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        for _ in range(3):  # what is printed before the attack
            running.stdout.readline()
        running.stdout.close()
    assert len(_read(tmp_path)["victims"]) == 2


def test_two_runs_in_one_folder_both_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run writes its results while the second one computes."""
    content = (tmp_path / "results.json", "of another run")

    def another(*_: Any) -> dict[str, np.ndarray]:
        content[0].write_text(content[1])
        return {}

    monkeypatch.setattr(sys.modules["gia_jax.modalities.image"], "baselines", another)
    assert main([*SHORT, "--out", str(tmp_path)]) == 0
    assert content[0].read_text() == content[1]
    assert len(json.loads((tmp_path / "results_2.json").read_text())["victims"]) == 2


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_one_line_and_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: int, status: int
) -> None:
    def interrupt(sign: Sign) -> None:
        if 0 < sign.done < sign.total:
            os.kill(os.getpid(), kind)
            time.sleep(10)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr("gia_jax.report.progress", lambda name: interrupt)
            assert main([*SHORT, "--out", str(tmp_path)]) == status
    finally:
        signal.signal(signal.SIGINT, before)
    (state,) = (tmp_path / "states").iterdir()
    error = capsys.readouterr().err.strip()
    assert error == f"gia_jax: interrupted; the same command goes on from the states kept in {state.parent}"
    assert main([*SHORT, "--out", str(tmp_path)]) == 0
    first = capsys.readouterr().err.splitlines()[1]
    assert not first.startswith("inverting_gradients:   0 %")
    assert main([*SHORT, "--out", str(tmp_path / "whole")]) == 0
    assert _read(tmp_path)["victims"] == _read(tmp_path / "whole")["victims"]


@pytest.mark.parametrize("arguments", [["attack", "--labels", "guessed"], ["attack", "--steps", "x"], ["nonesuch"]])
def test_argparse_mistakes_have_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "invalid" in capsys.readouterr().err


def test_data_the_command_line_offers_can_be_loaded() -> None:
    assert len(data.load("digits", limit=3).images) == 3
