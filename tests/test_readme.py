"""The README's examples are tests, its results those of the tables, and what it links to is there."""

import re
import sys
from pathlib import Path

import figures
import numpy as np
import pytest

from gia_jax import interop

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def in_torch(params: dict) -> dict[str, np.ndarray]:
    """LeNet's parameters as PyTorch has them: (out, in) first, and flattened in the order C, H, W."""
    named = {}
    for layer, values in params.items():
        kernel = np.asarray(values["kernel"], np.float32)
        dense = kernel.ndim == 2
        kernel = kernel.reshape(8, 8, 12, -1) if dense else kernel
        kernel = kernel.transpose(3, 2, 0, 1)
        named[f"{layer}.weight"] = kernel.reshape(len(kernel), -1) if dense else kernel
        named[f"{layer}.bias"] = np.asarray(values["bias"], np.float32)
    return named


def test_example_leaks_the_photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, own, defended = blocks("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    scores = names["metrics"].image_scores(names["image"], names["photos"].images)
    assert float(scores.psnr[0]) > 18
    assert int(names["found"].batch.labels[0]) == int(names["photos"].labels[0])
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    # The others go on from the first: what PyTorch recorded gives the same image away.
    monkeypatch.chdir(tmp_path)
    weights, gradient = in_torch(names["params"]), in_torch(names["observation"].update)
    interop.save_tensors("sent.safetensors", weights)
    interop.save_tensors("returned.safetensors", {name: weights[name] - 0.1 * gradient[name] for name in weights})
    exec(compile(own, "README.md", "exec"), names)
    pixels = names["photos"].denormalize(np.asarray(names["found"].batch.inputs))
    assert float(names["metrics"].image_scores(pixels, names["photos"].images).psnr[0]) > 18
    exec(compile(defended, "README.md", "exec"), names)
    pixels = names["photos"].denormalize(np.asarray(names["found"].batch.inputs))
    leaked = names["metrics"].image_scores(pixels, names["photos"].images)
    assert float(leaked.psnr[0]) > 12.5  # grey has 11.1


def test_an_update_of_noise_leaks_nothing() -> None:
    example = blocks("python")[0]
    noise = """
def noise(u):
    return jax.random.normal(jax.random.key(5), u.shape)
observation = observation._replace(update=jax.tree.map(noise, observation.update))
"""
    names: dict = {}
    exec(compile(example.replace("\nattack = ", noise + "attack = ", 1), "README.md", "exec"), names)
    assert float(names["metrics"].image_scores(names["image"], names["photos"].images).psnr[0]) < 15


def test_results_are_those_of_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    figures.main()
    changed = tmp_path / "README.md"
    changed.write_text(README.read_text().replace("18.7 dB", "18.8 dB"))
    monkeypatch.setattr(figures, "README", changed)
    with pytest.raises(SystemExit, match="differ"):
        figures.main()
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    assert changed.read_text() == README.read_text()


def test_two_commands() -> None:
    start, check = (block.strip() for block in blocks("bash"))
    assert start.endswith("python -m gia_jax")
    assert " && pytest" in check


@pytest.mark.parametrize("page", [README, ROOT / "benchmarks" / "README.md"], ids=["README", "benchmarks"])
def test_what_pages_link_to_and_run_is_there(page: Path) -> None:
    text = page.read_text()
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    for path, _, heading in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles], heading
    scripts = re.findall(r"benchmarks/\w+\.py", text)
    assert scripts
    for script in scripts:
        assert (ROOT / script).exists(), script


def test_every_table_is_of_a_script_and_on_the_benchmarks_page() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    tables = sorted((ROOT / "benchmarks" / "results").rglob("*.md"))
    assert tables
    for table in tables:
        assert (ROOT / "benchmarks" / f"{table.parent.name}.py").exists(), table
        assert table.with_suffix(".csv").exists(), table
        assert f"({table.relative_to(ROOT / 'benchmarks')})" in page, table
