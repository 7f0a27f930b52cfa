import socket
import threading

import pytest
from mirrors import Server

from flowturbo.networks.load import model_config
from flowturbo.weights.checkpoint import CheckpointFolder, save_checkpoint


@pytest.fixture(autouse=True)
def here_alone(monkeypatch, tmp_path):
    """No test leaves the machine or touches the user's cache."""
    resolve = socket.getaddrinfo

    def only_loopback(host, *args, **kwargs):
        assert host == "127.0.0.1"
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_loopback)
    for name in ("RANK", "HF_HUB_OFFLINE", "FLOWTURBO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(refiner, predictor, tmp_path):
    """A run's folder as train.py leaves it, with two checkpoints of a refiner."""
    folder = tmp_path / "results" / "000-refiner-[a]"
    config = {
        "model": model_config(refiner),
        "training": {"data_path": "/home/someone/photos", "lr": 5e-5, "vae_ckpt": "vae-ema", "note": None}
        | {"model_teacher_ckpt": "/home/someone/teacher.pt", "path_type": "gvp"},
    }
    for step in (5, 40):
        content = {"model": predictor.state_dict(), "ema": refiner.state_dict(), "opt": {}, "step": step}
        path = folder / "checkpoints" / f"{step:07d}.pt"
        CheckpointFolder(path.parent).record(path, save_checkpoint(path, {**content, "config": config}))
    return folder


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
