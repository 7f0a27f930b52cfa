import json

import pytest
import torch

import benchmark
from benchmarks.options import QualityOptions
from benchmarks.peers import PeerSampler
from benchmarks.quality import names_at, read_refiner
from flowturbo.refiner import VelocityRefiner
from flowturbo.transport import FlowTurbo, Guidance, SamplerSpec


@pytest.mark.parametrize("kind", ["UniPC", "DPM++"])
def test_peers_solve_the_same_equation(kind, predictor, batch, recorder):
    """They near the fine solution as fast as a method of second order does, with guidance too."""
    z, y = batch(4)
    fine = FlowTurbo(predictor, None, "D128", 2.0).sample(z, y)
    errors = []
    for n in (8, 16, 32):
        count = recorder(predictor)
        peer = PeerSampler(count, f"{kind}{n}", Guidance(2.0))
        errors.append(float((peer.sample(z, y) - fine).square().mean().sqrt()))
        assert len(count) == n == peer.evaluations()[0]
        assert peer.rows() == (2 * n, 0)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("name", ["UniPC", "UniPC0", "unipc6", "DPM6", "H8"])
def test_other_names_are_no_peers(name, predictor):
    with pytest.raises(ValueError, match="UniPC, DPM"):
        PeerSampler(predictor, name)


@pytest.mark.parametrize("n", [4, 6, 12])
def test_rows_of_a_group_have_equal_evaluations(n, predictor):
    for name in names_at(n):
        sampler = PeerSampler(predictor, name) if "PC" in name or "++" in name else SamplerSpec.parse(name)
        assert sampler.evaluations() == (n, 0)


def test_the_table(pixel_models, save_network, class_folder, tmp_path, capsys):
    """Evaluations, rows, errors and distances, of blocks, peers, sparse guidance, and a refiner beside its free row."""
    predictor = pixel_models[1]
    refiner = save_network(tmp_path / "refiner.pt", VelocityRefiner, 2, in_channels=3)
    reference, out = class_folder(tmp_path / "reference"), tmp_path / "table.json"
    flags = ["--quality", "--predictor-ckpt", predictor, "--schedules", "H1P2", "A4", "UniPC4", "--num-images", "6"]
    flags += ["--refiners", f"M3R1:midpoint:{refiner}", "--cfg-every", "2", "--cfg-scale", "1.5", "--repeats", "1"]
    benchmark.main([*flags, "--reference", str(reference), "--extractor", "pixels", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], *row["evaluations"], *row["rows"]) for row in rows] == [
        ("H1P2", 4, 0, 8, 0),
        ("H1P2 every 2", 4, 0, 6, 0),
        ("A4", 4, 0, 8, 0),
        ("A4 every 2", 4, 0, 6, 0),
        ("UniPC4", 4, 0, 8, 0),
        ("M3L1", 4, 0, 8, 0),
        ("M3R1 midpoint refiner", 4, 1, 8, 2),
    ]
    for row in rows:
        assert row["rmse"][0] > row["rmse"][1] > 0
        assert row["distance"][0] > 0
        assert row["ms"] > 0
    assert rows[0]["against"] == [1.0, 0.0]
    lines = [line for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert len(lines) == len(rows)
    assert max(map(len, lines)) <= 120


def test_the_error_of_a_fine_solution_is_none(pixel_models, tmp_path):
    out = tmp_path / "table.json"
    flags = ["--quality", "--predictor-ckpt", pixel_models[1], "--schedules", "A4", "D128", "--num-images", "3"]
    benchmark.main([*flags, "--cfg-scale", "1", "--repeats", "1", "--json", str(out)])
    coarse, fine = json.loads(out.read_text())["rows"]
    assert coarse["rmse"][0] > 1e-3
    assert fine["rmse"][0] < 1e-6


def test_rows_keep_their_order_and_their_rival_may_come_later(pixel_models, tmp_path):
    out = tmp_path / "table.json"
    flags = ["--quality", "--predictor-ckpt", pixel_models[1], "--schedules", "A4", "H1P2", "A4", "--num-images", "3"]
    benchmark.main([*flags, "--cfg-scale", "1", "--repeats", "1", "--json", str(out)])
    first, rival, again = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in (first, rival, again)] == ["A4", "H1P2", "A4 (2)"]
    assert first["against"] == again["against"]
    assert first["against"][0] == pytest.approx(first["rmse"][0] / rival["rmse"][0])


@pytest.mark.parametrize("text", ["M4R1", "M4R1:midpoint", "M4:midpoint:file.pt"])
def test_impossible_refiners_are_refused(text):
    with pytest.raises(ValueError, match="expected SCHEDULE:FORM:FILE"):
        read_refiner(text)


@pytest.mark.parametrize("change", [{"evaluations": (5,)}, {"evaluations": (2,)}, {"num_images": 1}, {"cfg_every": 0}])
def test_impossible_options_are_refused(change):
    with pytest.raises(ValueError, match=r"must be"):
        QualityOptions(**change)


def test_samplers_that_choose_their_evaluations_are_refused(pixel_models):
    with pytest.raises(ValueError, match="dopri5 chooses its own evaluations"):
        benchmark.main(["--quality", "--predictor-ckpt", pixel_models[1], "--schedules", "dopri5", "--num-images", "2"])


def test_peers_are_sampled_without_gradients(predictor, batch):
    z, y = batch(2)
    assert not PeerSampler(predictor, "UniPC4").sample(z, y).requires_grad
    assert torch.is_grad_enabled()
