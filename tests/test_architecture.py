"""Who may import whom (DESIGN.md): read from the source, not from a run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("transport", "evaluation", "runtime", "benchmarks")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"models", "refiner"}
PROJECT = {*PACKAGES, "models", "refiner", *SCRIPTS}
MAY_IMPORT = {  # of the project
    "transport": {"transport"},
    "evaluation": {"evaluation"},
    "runtime": {"runtime"},
    "models": set(),
    "refiner": {"models"},
    "benchmarks": {"benchmarks", "transport", "runtime", "models", "refiner", "pipeline", "train"},
}


def sources(part):
    return sorted((ROOT / part).rglob("*.py")) if part in PACKAGES else [ROOT / f"{part}.py"]


def imported(path):
    """The top-level packages that a source file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.parent.name if node.level else node.module.split(".")[0])
    return names


FILES = [pytest.param(part, path, id=str(path.relative_to(ROOT))) for part in MAY_IMPORT for path in sources(part)]


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_every_part_has_sources(part):
    assert sources(part)


@pytest.mark.parametrize(("part", "path"), FILES)
def test_arrows_between_the_parts(part, path):
    assert imported(path) & PROJECT <= MAY_IMPORT[part]


@pytest.mark.parametrize("path", sources("transport"), ids=lambda path: path.name)
def test_transport_is_pure(path):
    assert imported(path) <= {"torch", "torchdiffeq", "transport"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(("part", "path"), FILES)
def test_nothing_is_called_at_import_that_has_an_effect(part, path):
    """Printing, seeding, flags and logging set-up belong into functions."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"line {node.lineno}"
        if isinstance(node, ast.Assign):
            assert not any(isinstance(t, ast.Attribute) for t in node.targets), f"line {node.lineno}"


def test_importing_the_core_is_silent_and_light():
    code = (
        "import sys, logging, torch\n"
        "state, flags = torch.get_rng_state(), torch.backends.cuda.matmul.allow_tf32\n"
        "import transport, models, refiner\n"
        "assert 'diffusers' not in sys.modules, 'diffusers'\n"
        "assert torch.equal(state, torch.get_rng_state()), 'seeded'\n"
        "assert flags == torch.backends.cuda.matmul.allow_tf32, 'flags'\n"
        "assert torch.is_grad_enabled(), 'gradients'\n"
        "assert not torch.cuda.is_initialized(), 'CUDA'\n"
        "assert not logging.getLogger().handlers, 'logging'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_importing_every_module_prints_nothing():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for part in MAY_IMPORT for p in sources(part)]
    code = "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in modules)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
