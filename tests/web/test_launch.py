"""Where the page is served, what it starts with, and what is told where it cannot be."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import gradio
import pytest
import torch

from flowturbo.system.advice import advice_for
from flowturbo.web import launch
from flowturbo.web.parts import told
from flowturbo.weights.fetch import MissingWeights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def taken():
    """A port that another program serves at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def opened(monkeypatch):
    """main(*flags) -> the options that the studio is opened with; nothing is served."""

    class Opened(Exception):
        pass

    def run(*flags):
        def note(networks, sampling, options, say):
            raise Opened(networks, sampling, options)

        monkeypatch.setattr("flowturbo.web.studio.Studio.open", note)
        monkeypatch.setattr(launch, "check_free", lambda host, port: None)
        with pytest.raises(Opened) as found:
            launch.main(list(flags))
        return found.value.args

    return run


def test_it_starts_on_the_colour_model_at_this_machine_alone(opened):
    networks, sampling, page = opened()
    assert networks.predictor_ckpt == "colour-predictor.safetensors"
    assert (sampling.cfg_scale, page.schedule) == (3.0, "M11")
    assert (page.host, page.port, page.share) == ("127.0.0.1", 7860, False)
    assert page.classes[0] == "flag"


def test_other_networks_come_with_their_own_defaults(opened):
    networks, sampling, page = opened("--predictor_ckpt=mine.pt", "--vae-ckpt", "none", "--cfg-scale", "1.5")
    assert (networks.predictor_ckpt, networks.refiner_ckpt) == ("mine.pt", "SiT-XL-2-Refiner.pt")
    assert (sampling.cfg_scale, page.schedule, page.classes) == (1.5, "H1P5R3", None)
    networks, _, page = opened("--model", "digits")
    assert (networks.predictor_ckpt, page.schedule) == ("digits-predictor.pt", "H1P5R2")


def test_a_port_in_use_is_told_before_anything_is_loaded(taken):
    with pytest.raises(OSError, match=rf"cannot serve at 127\.0\.0\.1, port {taken}: Address already in use"):
        launch.main(["--port", str(taken)])
    with pytest.raises(OSError, match=r"cannot serve at no-such-host\.invalid, port 7860: "):
        launch.check_free("no-such-host.invalid", 7860)


def test_a_port_in_use_ends_with_one_line(taken):
    done = subprocess.run(
        [sys.executable, "-m", "flowturbo.web", "--port", str(taken)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "Address already in use" in done.stderr


def test_help_names_the_module_as_it_was_called():
    done = subprocess.run([sys.executable, "-m", "flowturbo.web", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m flowturbo.web ")


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(launch.GradioMissing) as found:
        launch.main([])
    said = str(found.value) + advice_for(found.value)
    assert said == (
        "the page needs gradio, which is not installed; the extra web brings it: "
        '`pip install ".[web]"` in the repository, or `pip install gradio`'
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "0"], "port 0 must lie in 1 to 65535"),
        (["--port", "65536"], "port 65536 must lie in"),
        (["--host="], "host is empty"),
        (["--schedule", "X9"], "cannot read schedule"),
    ],
)
def test_impossible_options_are_told(flags, message):
    with pytest.raises(ValueError, match=message):
        launch.main(flags)


def test_a_missing_checkpoint_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "check_free", lambda host, port: None)
    with pytest.raises(MissingWeights, match="gone"):
        launch.main(["--predictor-ckpt", str(tmp_path / "gone"), "--vae-ckpt", "none"])


@pytest.mark.parametrize("kind", [ValueError, OSError, FloatingPointError, torch.OutOfMemoryError])
def test_a_mistake_is_one_line_on_the_page(kind):
    @told
    def handler():
        yield 1
        raise kind("no such\n  class <b>")

    run = handler()
    assert next(run) == 1
    with pytest.raises(gradio.Error) as found:
        next(run)
    assert found.value.message == "no such class &lt;b&gt;"
    assert not found.value.print_exception


def test_a_defect_of_ours_is_not_hidden():
    @told
    def handler():
        yield {}["missing"]

    with pytest.raises(KeyError):
        next(handler())
