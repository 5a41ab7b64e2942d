"""What the benchmarks' tables rest on: corrected p-values, means over rounds, random search, and where they are."""

import ast
import csv
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import record
import resnet20
import speed
import utility
from attackers import averaged, differs, redrawn
from flax import nnx
from holm import differences
from record import gains, holm, sign_test
from scipy import stats
from tables import Rows, SentenceNet, Table, words_read

from gia_jax import Batch, Observation, clients, defenses, gradient_matching, interop, keep_best, models, run
from gia_jax._compile import RUN_ONCE
from gia_jax.matching.initializations import normal
from gia_jax.matching.objectives import cosine
from gia_jax.modalities import Field, Schema

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("notebooks/*.ipynb")])


def _imported(path: Path) -> list[tuple[str, str]]:
    """The modules of the library that a script or a notebook imports from, and the names that it imports."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in statements if (node.module or "").split(".")[0] == "gia_jax"]
    return [(node.module or "", name.name) for node in ours for name in node.names]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_of_the_library_is_there(path: Path) -> None:
    for module, name in _imported(path):
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.import_module(f"{module}.{name}"), f"{module}.{name}"


def test_speed_measures_a_model_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    speed.child("one", "lenet", "1", "auto")
    measured = dict(pair.split("=", 1) for pair in capsys.readouterr().out.strip().splitlines()[-1].split("|"))
    assert measured["model"] == "lenet"
    for column in ("compile s", "ms a step", "peak RSS MB"):
        assert float(measured[column]) > 0


def test_holm_corrects_step_by_step_as_in_a_worked_example() -> None:
    # 4 x .005; 3 x .01; 2 x .03; and .04, which must not be below the one before it.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_array_equal(holm([0.6, 0.9]), [1, 1])
    assert len(holm([])) == 0


def test_turning_signs_at_random_agrees_with_all_turns_and_with_a_t_test() -> None:
    values = np.asarray([1.0, 2.0, 3.0, 4.0, 5.0])
    assert sign_test(values) == pytest.approx(2 / 32)  # only all signs as they are, or all turned, are as far from 0
    many = np.random.default_rng(0).normal(0.25, 1, 70)
    assert sign_test(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, rel=0.15)
    assert sign_test(np.zeros(5)) == 1


def test_of_noise_nothing_stays_after_the_correction_and_of_a_difference_it_does() -> None:
    rng = np.random.default_rng(1)
    noise = {f"noise {i}": rng.normal(0, 1, 70) for i in range(20)}
    assert min(sign_test(values) for values in noise.values()) < 0.05  # one in twenty would pass alone
    cells = gains(noise | {"true": rng.normal(1, 1, 70), "broken": np.asarray([1.0, np.inf, np.nan])})
    p_values = {name: float(cell.rpartition("p ")[2]) for name, cell in cells.items() if name != "broken"}
    assert {name for name, p in p_values.items() if p <= 0.05} == {"true"}
    assert cells["broken"] == "not finite for 2"


def test_the_mean_of_rounds_has_the_noise_of_one_divided_by_the_root_of_their_number() -> None:
    params = {"w": jnp.zeros(20_000)}

    def client_fn(key: jax.Array):
        noise = defenses.gaussian_noise(key, 1.0)
        return defenses.defended(lambda params, batch: jax.tree.map(jnp.ones_like, params), noise)

    batch = Batch(jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32))
    for rounds in (1, 16):
        update = averaged(client_fn, jax.random.key(0), rounds)(params, batch)["w"]
        assert float(update.mean()) == pytest.approx(1, abs=0.04)
        assert float(update.std()) == pytest.approx(rounds**-0.5, rel=0.03)


def test_random_search_keeps_the_draw_of_lowest_loss() -> None:
    target = jnp.asarray([[0.3, -0.7]])
    params = {"w": jnp.zeros((1, 2))}
    observation = Observation(params, {"w": target}, {"inputs_like": target, "labels": jnp.zeros(1, jnp.int32)})
    attack = gradient_matching(
        lambda params, batch: {"w": batch.inputs},
        init_fn=normal(),
        objective_fn=lambda a, b: jnp.sum(jnp.square(a["w"] - b["w"])),
        optimizer=redrawn(normal()),
    )
    found, info = run(keep_best(attack), jax.random.key(0), observation, num_steps=2_000)
    assert info.loss.min() == pytest.approx(float(found.loss), rel=1e-5)
    assert float(optax.tree.norm(found.batch.inputs - target)) < 0.1  # of 2,000 normal draws the nearest is this near
    # The draws do not walk: the mean loss is that of a standard normal, 2 + |target|^2.
    assert float(info.loss.mean()) == pytest.approx(2 + 0.58, rel=0.1)


def test_knowing_a_scale_an_expectation_or_an_encoding_is_no_other_attack() -> None:
    assert not any(map(differs, ("none", "clip:norm=1", "quantize:bits=4", "mixup:k=4", "dpsgd:noise_multiplier=0.1")))
    assert all(map(differs, ("sign", "prune_mixup", "soteria:ratio=0.8", "gaussian:scale=0.1", "precode")))


def test_guesses_bear_the_names_of_the_table_and_shares_count_its_fields() -> None:
    fields = np.asarray([[0.5, 2, 0], [0.45, 2, 1], [-1.0, 0, 1], [0.0, 0, 1]], np.float32)
    rows = Rows(fields, np.asarray([0, 0, 1, 1]))
    schema = Schema((Field("x"), Field("three", categories=("a", "b", "c")), Field("two", categories=("a", "b"))))
    table = Table("rows", "rows", "no network", rows, rows, schema, 2, lambda rngs: nnx.Linear(6, 2, rngs=rngs))
    np.testing.assert_allclose(table.right(fields[[0, 0, 0]], fields[[0, 1, 2]]), [1, 2 / 3, 0])
    known = Rows(fields[1:], table.train.labels[1:])
    guesses = table.guesses(Rows(fields[:1], table.train.labels[:1]), known)
    np.testing.assert_array_equal(guesses["nearest row (chosen with the truth)"], fields[[1]])
    np.testing.assert_array_equal(guesses["of the class"], fields[[1]])
    np.testing.assert_array_equal(guesses["commonest values"], np.asarray([[0, 0, 1]], np.float32))


@pytest.mark.parametrize("transformation", [None, defenses.prune(0.95, scope="global"), defenses.sign()])
def test_the_words_of_a_sentence_are_read_off_its_update_and_not_behind_noise(transformation) -> None:
    fields = np.asarray([[3, 7, 3, 0], [1, 2, 40, 9]], np.float32)
    words = 400
    apply_fn, params = models.functional(SentenceNet(4, words, 2, width=8, rngs=nnx.Rngs(0)))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    defended = client_fn if transformation is None else defenses.defended(client_fn, transformation)

    def update(row: jax.Array, key: jax.Array, noise: float, client=defended):
        noisy = defenses.defended(client, defenses.gaussian_noise(key, noise))
        inputs = jax.nn.one_hot(row.astype(int), words).reshape(1, -1)
        return noisy(params, Batch(inputs, jnp.zeros(1, jnp.int32)))

    def seen(noise: float, client=defended):
        keys = jax.random.split(jax.random.key(0), 2)
        return jax.vmap(lambda row, key: update(row, key, noise, client))(jnp.asarray(fields), keys)

    changed = [bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(seen(0.0)), jax.tree.leaves(seen(0.0, client_fn)))]
    assert any(changed) == (transformation is not None)
    np.testing.assert_array_equal(words_read(seen(0.0), fields), [1, 1])
    assert words_read(seen(100.0), fields).mean() < 0.5


@pytest.mark.parametrize(
    ("name", "attackers"),
    [
        ("none", ["blind"]),
        ("clip:norm=0.01", ["blind"]),  # a scale, which the cosine does not see
        ("mixup:k=2", ["blind"]),
        ("prune:ratio=0.5", ["blind", "adaptive"]),
        ("prune_instahide", ["blind", "adaptive"]),
        ("precode:size=8", ["blind", "adaptive"]),
    ],
)
def test_the_blind_attacker_of_utility_takes_every_client_for_an_undefended_one(name, attackers) -> None:
    task = utility.task_named("digits", 2)
    defense = task.defense(name, "groupnorm_net", 0)
    assert list(defense.attackers) == attackers
    blind = defense.attackers["blind"]
    assert blind.objective_fn is cosine
    assert not blind.magnitudes
    assert all(attacker.magnitudes == ("instahide" in name) for attacker in list(defense.attackers.values())[1:])
    # The gradient of the network's own loss; that of PRECODE without its noise, which is its mean code's.
    protected = defense.protected
    plain_fn = jax.grad(clients.cross_entropy(protected.apply_fn))
    if name.startswith("precode"):
        plain_fn = protected.assumed_fn
        assert set(protected.params) > {"encoder", "decoder"}
    both = jax.jit(lambda *seen: (blind.client_fn(*seen), plain_fn(*seen)), compiler_options=RUN_ONCE)
    found, expected = (jax.tree.leaves(each) for each in both(protected.params, task.victims))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_holm_asks_of_every_defense_and_attacker_once_and_of_no_control(tmp_path: Path) -> None:
    columns = ["none, blind", "class mean", "sign, blind", "sign, adaptive", "clip:norm=1, blind"]
    columns += ["clip:norm=1, adaptive", "prior only, blind", "random search, noise, blind", "sign, control"]
    rows = [["test", *range(10, 19)], ["test", *range(20, 29)], ["train", *range(30, 39)]]
    asked = {}
    for folder in ("defenses", "utility"):
        (tmp_path / folder).mkdir()
    for table in ("defenses/lenet", "defenses/lenet_likelihood", "utility/cifar10"):
        path = tmp_path / f"{table}_victims.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["victims", *columns], *rows])
        asked[table] = differences(path)
    found = asked["defenses/lenet"]
    assert {(split, name, what) for _, split, name, what in found} == {
        (split, *what)
        for split in ("test", "train")
        for what in [
            ("none", "blind - class"),
            ("sign", "blind - class"),
            ("sign", "adaptive - class"),
            ("sign", "adaptive - blind"),
            # Who knows of clipping alone makes the same attack: one question.
            ("clip:norm=1", "blind - class"),
        ]
    }
    np.testing.assert_array_equal(found["defenses/lenet", "test", "sign", "adaptive - class"], [2, 2])
    np.testing.assert_array_equal(found["defenses/lenet", "train", "sign", "adaptive - blind"], [1])
    # Where only other attacks have a column, all are asked.
    assert ("utility/cifar10", "test", "clip:norm=1", "adaptive - blind") in asked["utility/cifar10"]
    # Another objective for every defense is another attack.
    assert ("defenses/lenet_likelihood", "test", "clip:norm=1", "adaptive - blind") in asked[
        "defenses/lenet_likelihood"
    ]


def test_a_table_is_in_the_folder_of_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/defenses.py", "table", "--name", "defenses_bound"])
    # The name of a command on record leads to the same file as the script's own.
    record.write("defenses_bound", "A bound", [{"dB": "11.9"}], victims=[{"id": 0, "dB": 11.9}])
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert written == {"defenses/bound.csv", "defenses/bound.md", "defenses/bound_victims.csv"}
    (row,) = record.read("defenses/bound")
    assert row["dB"] == "11.9"
    assert row["command"] == "python benchmarks/defenses.py table --name defenses_bound"


@pytest.mark.parametrize("name", ["one_epoch", "converged"])
def test_a_trained_network_is_read_back_from_its_file(name: str) -> None:
    arrays = interop.load_tensors(resnet20.weights_file(name))
    module = resnet20.network(resnet20.weights_file(name))
    kernel = arrays["stage0_block0.conv1.kernel"]
    np.testing.assert_array_equal(module.stage0_block0.conv1.kernel[...], kernel)
    assert np.abs(kernel - resnet20.network().stage0_block0.conv1.kernel[...]).max() > 0.1
    # The running statistics are those of training, not 0 and 1.
    norm = module.stage0_block0.norm1
    assert np.abs(norm.mean[...]).max() > 0.1
    assert not np.allclose(norm.var[...], 1, atol=0.1)


def test_arrays_of_another_network_are_refused() -> None:
    arrays = interop.load_tensors(resnet20.weights_file("converged"))
    arrays["another"] = arrays.pop("head.bias")
    with pytest.raises(ValueError, match=r"others: \['another', 'head.bias'\]"):
        resnet20.restore(resnet20.network(), arrays)


def test_crops_are_windows_of_the_padded_image_and_some_are_mirrored() -> None:
    inputs = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32)
    crops = np.asarray(resnet20.augmented(jax.random.key(0), inputs, size=6))
    padded = np.pad(inputs, ((0, 0), (resnet20.PAD,) * 2, (resnet20.PAD,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded[..., 0], (6, 6), axis=(1, 2))
    mirrored = []
    for image, crop in zip(windows, crops[..., 0], strict=True):
        found = [(image == one).all((-2, -1)).any() for one in (crop, crop[:, ::-1])]
        assert any(found)
        mirrored.append(not found[0])
    assert 0 < sum(mirrored) < 16
