"""The examples and the README's snippet as a user runs them, on the models that come with the package."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowturbo.networks.load import load_network
from flowturbo.refiner import VelocityRefiner

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "colab.ipynb"


def assert_shows_something(path):
    """The picture has colours, light and dark, and more of them than noise of one mean has."""
    pixels = np.asarray(Image.open(path).convert("RGB"), float)
    assert min(pixels.shape[:2]) >= 128
    assert pixels.std() > 40
    assert np.abs(pixels[..., 0] - pixels[..., 2]).mean() > 5
    assert (pixels > 250).all(-1).mean() > 0.2  # the pictures of the colour model have a white ground


def test_the_smallest_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 20
    runpy.run_path(str(EXAMPLES / "minimal.py"), run_name="__main__")
    assert_shows_something(tmp_path / "minimal.png")


@pytest.mark.parametrize("page", ["README.md", "docs/colour-model.md", "docs/sampling.md"])
def test_python_of_the_pages_runs_as_it_stands(page, tmp_path, monkeypatch):
    """Where it loads the colour model: the others need public weights."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    mine = [block for block in blocks if '"colour"' in block]
    assert mine
    monkeypatch.chdir(tmp_path)
    for block in mine:
        exec(compile(block, page, "exec"), {"__name__": "__main__"})
    for path in tmp_path.glob("*.png"):
        assert_shows_something(path)
    assert page == "docs/colour-model.md" or list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_a_refiner_for_another_model(tmp_path, monkeypatch, capsys):
    """As the example, with less of everything: it beats the blocks before R, and is saved."""
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "refiner_for_your_model.py"))
    example["main"](["--trajectories", "64", "--steps", "60", "--batch-size", "16"])
    said = capsys.readouterr().out
    rows = re.findall(r"^(\S+) +([\d +]+?)  (\d\.\d{4}) ± \d\.\d{4}$", said, flags=re.M)
    assert [(name, count) for name, count, _ in rows] == [
        *(("H1P5", "7"), ("H1P5L1", "7"), ("H1P6", "8"), ("H1P5R1", "7 + 1")),
    ]
    without, _, _, refined = (float(error) for *_, error in rows)
    assert refined < without
    assert load_network(VelocityRefiner, "refiner.pt").input_shape == (1, 8, 8)


def test_the_notebook_is_committed_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    install = code[0].source
    assert '"google.colab" in sys.modules' in install
    assert "%pip install" in install


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Outside Colab its install cell does nothing."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output.data for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert any("image/gif" in output.get("data", {}) for output in shown)
    said = "".join(output.text for output in shown if output.output_type == "stream" and output.name == "stdout")
    errors = {name: float(value) for name, value in re.findall(r"^(\w+) +(0\.\d{3})$", said, flags=re.M)}
    assert errors.keys() == {"H3", "H1P4", "A6", "M5"}
    assert min(errors, key=errors.get) in ("A6", "M5")
    nbformat.write(notebook, tmp_path / "done.ipynb")
