"""Who may import whom (DESIGN.md): read from the source, not from a run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flowturbo"
CORE = {"configurations", "models", "refiner", "transport"}
BELOW = {  # what each room may import, besides itself
    "configurations": set(),
    "models": {"configurations"},
    "refiner": {"models"},
    "transport": set(),
    "system": set(),
    "weights": {*CORE, "system"},
    "networks": {*CORE, "system", "weights"},
    "data": {*CORE, "system", "weights"},
    "evaluation": {"system", "weights", "networks", "data"},
    "sampling": {*CORE, "system", "weights", "networks", "data", "evaluation"},
    "training": {*CORE, "system", "weights", "networks", "data", "evaluation", "sampling"},
    "text_to_image": {*CORE, "system", "weights", "networks", "data", "evaluation", "sampling", "training"},
    "planning": {*CORE, "system", "weights", "networks", "data", "evaluation", "sampling", "training"},
    "web": {*CORE, "system", "weights", "networks", "data", "sampling", "planning"},
}
TORCH_FREE = (  # so that a command line is parsed before torch is imported
    *("configurations", "system.options", "system.cli", "system.advice", "system.files", "system.claims"),
    *("transport.blocks", "transport.grids", "transport.guidance", "transport.path", "transport.schedule"),
    *(
        "transport.losses",
        "transport.spec",
        "data.options",
        "sampling.options",
        "sampling.edit_options",
        "sampling.picture_options",
        "sampling.solvers",
        "training.options",
    ),
    "text_to_image.options",
    "web.options",
    "web.launch",
    "training.stopping",
)
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"models", "refiner"}


def sources(room):
    return sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


def imported(path):
    """The modules that a source file imports, wherever in the file, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path):
    """The rooms of the package that a source file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("flowturbo.")}


FILES = [pytest.param(room, path, id=str(path.relative_to(PACKAGE))) for room in BELOW for path in sources(room)]


@pytest.mark.parametrize("room", BELOW)
def test_every_room_has_sources(room):
    assert sources(room)


def test_no_room_is_forgotten():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} == set(BELOW)


@pytest.mark.parametrize(("room", "path"), FILES)
def test_arrows_between_the_rooms(room, path):
    assert rooms(path) <= BELOW[room] | {room}


@pytest.mark.parametrize("path", sources("transport"), ids=lambda path: path.name)
def test_transport_is_pure(path):
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "torchdiffeq", "flowturbo"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_no_script(path):
    assert not {name.split(".")[0] for name in imported(path)} & SCRIPTS


@pytest.mark.parametrize(("room", "path"), FILES)
def test_nothing_is_called_at_import_that_has_an_effect(room, path):
    """Printing, seeding, flags and logging set-up belong into functions."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"line {node.lineno}"
        if isinstance(node, ast.Assign):
            assert not any(isinstance(t, ast.Attribute) for t in node.targets), f"line {node.lineno}"


def test_options_need_no_torch():
    modules = "".join(f"import flowturbo.{name}\n" for name in TORCH_FREE)
    code = f"import sys, flowturbo\n{modules}assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_importing_the_core_is_silent_and_light():
    code = (
        "import sys, logging, torch\n"
        "state, flags = torch.get_rng_state(), torch.backends.cuda.matmul.allow_tf32\n"
        "import transport, models, refiner\n"
        "for heavy in ('diffusers', 'timm', 'torchvision', 'transformers', 'scipy', 'PIL'):\n"
        "    assert heavy not in sys.modules, heavy\n"
        "assert torch.equal(state, torch.get_rng_state()), 'seeded'\n"
        "assert flags == torch.backends.cuda.matmul.allow_tf32, 'flags'\n"
        "assert torch.is_grad_enabled(), 'gradients'\n"
        "assert not torch.cuda.is_initialized(), 'CUDA'\n"
        "assert not logging.getLogger().handlers, 'logging'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_importing_every_module_prints_nothing():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for room in BELOW for p in sources(room)]
    code = "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in modules)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
