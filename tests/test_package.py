"""What pip installs, and under which names it is imported."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import transport.schedule

import flowturbo
import flowturbo.models
import flowturbo.refiner
import flowturbo.transport.schedule
import models
import refiner
import transport
from flowturbo.weights.registry import MODELS

ROOT = Path(__file__).parents[1]


def test_the_wheel_installs_flowturbo_and_no_other_name(tmp_path):
    source = tmp_path / "source"  # a build leaves files beside its sources
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", source], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"flowturbo"}
    assert "flowturbo/py.typed" in names
    for model in MODELS.values():
        assert {f"flowturbo/assets/{file}" for file in (model.predictor_ckpt, model.refiner_ckpt)} <= set(names)
    assert {f"flowturbo/{room}/__init__.py" for room in ("transport", "sampling", "training", "web")} <= set(names)
    assert wheel.name.split("-")[1] == flowturbo.__version__


def test_the_package_is_imported_from_any_folder(tmp_path):
    code = (
        "import flowturbo\n"
        "assert flowturbo.__version__\n"
        "for name in ('SiT', 'VelocityRefiner', 'Schedule', 'FlowTurbo'):\n"
        "    assert getattr(flowturbo, name).__name__ == name and name in dir(flowturbo)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_the_originals_names_are_faces_of_the_package():
    """One identity of each class, whichever name it is imported by."""
    assert models.SiT is flowturbo.models.SiT is flowturbo.SiT
    assert models.SIT_CONFIGS is flowturbo.SIT_CONFIGS
    assert refiner.VelocityRefiner is flowturbo.VelocityRefiner
    assert transport.FlowTurbo is flowturbo.FlowTurbo
    assert transport.schedule is flowturbo.transport.schedule
    assert transport.schedule.Schedule is transport.Schedule is flowturbo.Schedule
    assert {"refiner_loss", "flow_matching_loss"} <= set(dir(transport))


def test_unknown_names_are_attribute_errors():
    for module in (flowturbo, flowturbo.transport):
        assert not hasattr(module, "Nonsense")
