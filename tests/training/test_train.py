"""Whole runs of train.py: what they leave, and what may interrupt, split or change them without a trace."""

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_close, assert_same_bits, checkpoint, figures, metrics, run

import train
from flowturbo.data.folders import ClassFolder
from flowturbo.data.workers import LoaderFailed
from flowturbo.models import SiT
from flowturbo.networks.compiled import CannotCompile
from flowturbo.networks.load import load_network
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.generate import ImageSampler, NotFinite
from flowturbo.system import cli
from flowturbo.system.advice import advice_for
from flowturbo.training import objective, step, stopping
from flowturbo.training.stopping import EXIT_STOPPED
from flowturbo.transport import FlowTurbo
from flowturbo.weights.info import without_folders

# ---- runs


@pytest.mark.parametrize("target", ["predictor", "refiner"])
def test_both_targets_learn_and_leave_what_a_run_leaves(flags, target, tmp_path):
    more = ["--steps", 120, "--log-every", 10, "--ckpt-every", 50, "--sample-every", 100, "--lr", "3e-3"]
    folder = run(tmp_path, *flags(target), *more, "--global-batch-size", 16, "--note", "first")
    assert folder.name == f"000-{target}-first"
    logged = [record for record in metrics(folder) if "loss" in record]
    assert [record["step"] for record in logged] == list(range(10, 121, 10))
    losses = [record["loss"] for record in logged]
    assert figures(folder, "loss") == pytest.approx(losses, rel=1e-4)
    assert figures(folder, "gradient") == pytest.approx([record["gradient"] for record in logged], rel=1e-4)
    assert sum(losses[-4:]) < (0.7 if target == "predictor" else 0.9) * sum(losses[:4])
    assert all(record["images/s"] > 0 and record["lr"] == 3e-3 for record in logged)
    assert sorted(p.stem for p in (folder / "checkpoints").glob("*.pt")) == ["0000050", "0000100", "0000120"]
    grids = [Image.open(p) for p in sorted((folder / "samples").iterdir())]
    assert len(grids) == 3  # at the first checkpoint, at its turn, at the end
    assert grids[0].size[1] > 1.5 * 32 * (1 if target == "predictor" else 2)

    record = json.loads((folder / "config.json").read_text())
    kind = SiT if target == "predictor" else VelocityRefiner
    assert record["model"]["class"] == kind.__name__
    assert record["training"]["steps"] == 120
    assert (record["classes"], record["class_counts"]) == (["c0", "c1"], [8, 8])
    assert bool(record["teacher"]) == (target == "refiner")
    content = checkpoint(folder, 120)
    assert content["config"] == without_folders(record)
    assert content["step"] == 120
    network = load_network(kind, str(folder / "checkpoints" / "0000120.pt"))
    for name, value in network.state_dict().items():
        assert torch.equal(value, content["ema"][name])
        assert "embed" in name or "bias" in name or not torch.equal(value, content["model"][name])
    again = run(tmp_path, *flags(target), "--steps", 1, number=1)
    assert again.name == f"001-{target}-no-note"


def test_a_refiner_may_be_narrower_than_its_predictor(flags, teacher, tmp_path):
    folder = run(tmp_path, *flags("refiner"), "--steps", 1, "--hidden-size", 16, "--num-heads", 2)
    refiner = load_network(VelocityRefiner, str(folder / "checkpoints" / "0000001.pt"))
    predictor = load_network(SiT, str(teacher))
    assert (refiner.config["hidden_size"], refiner.config["depth"]) == (16, 1)
    assert predictor.config["hidden_size"] > 16
    z, y = torch.randn(2, *predictor.input_shape), torch.tensor([0, 1])
    assert FlowTurbo(predictor, refiner, "H1P1R1").sample(z, y).shape == z.shape


def test_a_trained_predictor_has_learned_the_classes(teacher):
    """The grey of the samples follows the label asked for."""
    predictor = load_network(SiT, str(teacher), prefer_ema=False)
    z = torch.randn(16, 1, 8, 8)
    sampler = FlowTurbo(predictor, None, "H8", 1.0)
    dark, bright = (sampler.sample(z, torch.full((16,), label)).mean() for label in (0, 1))
    assert bright - dark > 0.3


@pytest.mark.parametrize("target", ["predictor", "refiner"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(flags, target, tmp_path):
    flags = [*flags(target), "--steps", 7, "--ckpt-every", 3, "--warmup", 5, "--clip-grad", 1]
    whole = run(tmp_path / "whole", *flags)
    parts = tmp_path / "parts"
    run(parts, *flags, "--resume", "auto", "--steps", 3)  # nothing to resume from: starts
    folder = run(parts, *flags, "--resume", "auto")
    assert [p.name for p in parts.iterdir()] == [folder.name]
    assert_same_bits(checkpoint(whole, 7), checkpoint(folder, 7))
    assert "steps 3 to 7" in (folder / "log.txt").read_text()
    again = tmp_path / "again" / "run"
    shutil.copytree(whole, again)
    (again / "checkpoints" / "0000007.pt").unlink()
    train.main([*map(str, flags), "--resume", str(again / "checkpoints" / "0000006.pt"), "--results-dir", str(parts)])
    assert_same_bits(checkpoint(whole, 7), checkpoint(again, 7))
    before = (again / "checkpoints" / "0000007.pt").read_bytes()
    train.main([*map(str, flags), "--resume", str(again / "checkpoints" / "0000007.pt"), "--results-dir", str(parts)])
    assert (again / "checkpoints" / "0000007.pt").read_bytes() == before  # nothing was left to do


def test_a_cosine_falls_to_nothing_at_the_end_and_a_resumed_run_goes_on_along_it(flags, tmp_path):
    flags = [
        *flags("predictor"),
        "--lr-schedule",
        "cosine",
        "--warmup",
        2,
        "--steps",
        6,
        "--ckpt-every",
        1,
        "--keep-last",
        0,
    ]
    whole = run(tmp_path / "whole", *flags)
    rates = [checkpoint(whole, step)["opt"]["param_groups"][0]["lr"] for step in range(1, 7)]
    assert rates == pytest.approx([0.5e-3, 1e-3, 0.853553e-3, 0.5e-3, 0.146447e-3, 0], abs=1e-8)
    for name, value in checkpoint(whole, 5)["model"].items():
        assert torch.equal(value, checkpoint(whole, 6)["model"][name])
    flags += ["--resume", whole / "checkpoints" / "0000003.pt"]
    assert_same_bits(checkpoint(run(tmp_path / "parts", *flags), 6), checkpoint(whole, 6))
    with pytest.raises(ValueError, match="trained otherwise: steps 6, not 9"):
        run(tmp_path / "longer", *flags, "--steps", 9)


@pytest.mark.parametrize("target", ["predictor", "refiner"])
def test_accumulating_changes_nothing(flags, target, tmp_path):
    plain = run(tmp_path / "plain", *flags(target), "--steps", 4)
    parts = run(tmp_path / "parts", *flags(target), "--steps", 4, "--accumulate", 3)
    assert_close(checkpoint(plain, 4), checkpoint(parts, 4))
    assert figures(plain, "loss") == pytest.approx(figures(parts, "loss"), rel=1e-4)


@pytest.fixture(scope="module")
def full_precision(flags, tmp_path_factory):
    """full_precision(target) -> the folder of a run of four steps in float32, made once."""
    made = {}

    def of(target):
        if target not in made:
            more = ["--steps", 4, "--ckpt-every", 2, "--log-every", 4, "--sample-every", 4, "--precision", "fp32"]
            made[target] = run(tmp_path_factory.mktemp("full"), *flags(target), *more)
        return made[target]

    return of


@pytest.mark.parametrize("target", ["predictor", "refiner"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train(flags, target, precision, tmp_path, full_precision):
    half = run(tmp_path, *flags(target), "--steps", 4, "--sample-every", 4, "--precision", precision)
    full = full_precision(target)
    ours, theirs = checkpoint(half, 4), checkpoint(full, 4)
    assert {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision] in (half / "log.txt").read_text()
    assert bool(ours["scaler"]) == (precision == "fp16")
    moved = 0.0
    for name, value in ours["model"].items():
        assert value.dtype == torch.float32
        moved = max(moved, (value - theirs["model"][name]).abs().max().item())
    assert 0 < moved <= 2 * 4 * 1e-3 * 1.01  # Adam moves a weight by at most about lr a step
    assert figures(half, "loss") == pytest.approx(figures(full, "loss"), rel=0.25)
    ours, theirs = (np.asarray(Image.open(p / "samples" / "0000004.png"), float) for p in (half, full))
    assert abs(ours - theirs).mean() < 0.5  # of 255


def test_epochs_are_passes_over_the_data(flags, tmp_path):
    folder = run(tmp_path, *flags("predictor"), "--epochs", 2)
    assert checkpoint(folder, 7)["step"] == 7  # 2 * 16 images in batches of 5


def test_a_model_without_null_class_trains_and_is_sampled_without_guidance(flags, tmp_path):
    folder = run(tmp_path, *flags("predictor"), "--steps", 2, "--class-dropout", 0, "--sample-every", 2)
    content = checkpoint(folder, 2)
    assert content["model"]["y_embedder.embedding_table.weight"].shape[0] == 2
    assert (folder / "samples" / "0000002.png").is_file()


# ---- compiled


@pytest.mark.parametrize(
    ("target", "more", "backend"),
    [
        ("refiner", [], "aot_eager"),
        ("predictor", ["--depth", 2, "--precision", "bf16"], "aot_eager"),
        pytest.param("refiner", [], "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_run_trains_as_an_eager_one_and_is_resumed(flags, target, more, backend, tmp_path, compiler):
    """Without a graph break: each would be an error."""
    flags = [*flags(target), *more, "--log-every", 1, "--ckpt-every", 2, "--steps", 4]
    eager = run(tmp_path / "eager", *flags)
    with compiler(backend):
        compiled = run(tmp_path / "compiled", *flags, "--compile", "--sample-every", 4)
    assert figures(compiled, "loss") == pytest.approx(figures(eager, "loss"), rel=1e-5)
    assert figures(compiled, "gradient") == pytest.approx(figures(eager, "gradient"), rel=1e-4)
    whole = checkpoint(compiled, 4)
    assert_close(whole, checkpoint(eager, 4))
    assert (compiled / "samples" / "0000004.png").is_file()
    (compiled / "checkpoints" / "0000004.pt").unlink()
    flags += ["--resume", compiled / "checkpoints" / "0000002.pt", "--results-dir", tmp_path]
    with pytest.raises(ValueError, match="trained otherwise: compile True, not False"):
        train.main(list(map(str, flags)))
    with compiler(backend):
        train.main(list(map(str, [*flags, "--compile"])))
    assert_same_bits(checkpoint(compiled, 4), whole)


def test_a_machine_without_a_compiler_is_told_before_anything_is_saved(flags, tmp_path, compiler):
    def broken(*_):
        raise RuntimeError("no compiler")

    with compiler(broken), pytest.raises(CannotCompile, match=r"this machine cannot compile .*no compiler"):
        run(tmp_path, *flags("refiner"), "--compile", "--steps", 1)
    assert not list(tmp_path.glob("[0-9]*-*"))  # no folder either


# ---- runs that stop


@pytest.mark.parametrize("every", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("target", "precision"), [("predictor", "fp32"), ("predictor", "fp16"), ("refiner", "fp32"), ("refiner", "bf16")]
)
def test_a_loss_that_is_not_finite_stops_before_the_update(
    flags, target, every, precision, tmp_path, monkeypatch, full_precision
):
    """Where nothing is saved at that step, fp32 and bf16 learn of it when the next one is under way."""
    name = "flow_matching_loss" if target == "predictor" else "refiner_loss"
    original, calls, states, new = getattr(objective, name), [], [], step.State.new

    def poisoned(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(objective, name, poisoned)
    monkeypatch.setattr(step.State, "new", lambda *args, **more: states.append(new(*args, **more)) or states[-1])
    with pytest.raises(FloatingPointError, match=r"^step 3: the loss is nan"):
        run(
            tmp_path,
            *(*flags(target), "--precision", precision, "--steps", 5, "--ckpt-every", every, "--sample-every", every),
        )
    assert len(calls) == (3 if precision == "fp16" or every in (1, 3) else 4)
    saved = [f"{step:07d}" for step in (1, 2) if step % every == 0]
    assert sorted(p.stem for p in tmp_path.glob("0*/checkpoints/*.pt")) == saved
    assert sorted(p.stem for p in tmp_path.glob("0*/samples/*.png")) == saved
    if precision == "fp32":
        left, before = states[0], checkpoint(full_precision(target), 2)
        assert_same_bits(left.model.state_dict(), before["model"])
        assert_same_bits(left.optimizer.state_dict()["state"], before["opt"]["state"])


def test_a_run_that_diverges_ends_with_one_line_and_exit_1(flags, forks, tmp_path):
    flags = [*flags("predictor"), "--results-dir", tmp_path, "--steps", 9, "--lr", "1e30", "--ckpt-every", 1]
    done = forks(tmp_path / "out", *flags)
    assert done.codes == [1]
    (line,) = done.errors
    stopped = int(re.search(r"train\.py: error: step (\d+): the loss is", line)[1])
    assert line.endswith("; lower --lr, set --clip-grad or --warmup, or take --precision fp32")
    assert "Traceback" not in done.text
    stored = sorted(int(p.stem) for p in tmp_path.glob("*/checkpoints/*.pt"))
    assert stored == list(range(1, stopped))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_from_there(flags, forks, tmp_path, number):
    flags = [*flags("predictor"), "--results-dir", tmp_path, "--num-workers", 1, "--resume", "auto"]
    done = forks(tmp_path / "out", *flags, "--steps", 100_000, ranks=2, signal_at=(number, "writing to"))
    assert done.codes == [EXIT_STOPPED] * 2
    folder = tmp_path / "000-predictor-no-note"
    (saved,) = (folder / "checkpoints").glob("*.pt")
    line = (folder / "log.txt").read_text().splitlines()[-1]
    assert f"stopped by {signal.Signals(number).name} after step {int(saved.stem)}; go on with" in line
    done = forks(tmp_path / "again", *flags, "--steps", int(saved.stem) + 1, ranks=2)
    assert done.codes == [0, 0]
    assert checkpoint(folder, int(saved.stem) + 1)["step"] == int(saved.stem) + 1


@pytest.mark.parametrize("output", ["gone", "closed", "full"])
def test_what_happens_to_the_output_ends_no_run(flags, forks, tmp_path, output):
    more = ["--results-dir", tmp_path, "--num-workers", 1, "--steps", 9, "--log-every", 1]
    assert forks(tmp_path / "out", *flags("predictor"), *more, output=output).codes == [0]
    folder = tmp_path / "000-predictor-no-note"
    assert [record["step"] for record in metrics(folder)] == list(range(1, 10))
    assert checkpoint(folder, 9)["step"] == 9
    assert "done: " in (folder / "log.txt").read_text()


def test_a_run_under_nohup_goes_on_without_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wanted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_loader_without_descriptors_tells_it_in_one_line(flags, forks, tmp_path):
    more = ["--results-dir", tmp_path, "--num-workers", 2, "--steps", 100_000]
    done = forks(tmp_path / "out", *flags("predictor"), *more, descriptors=44)
    assert done.codes == [1]
    (line,) = done.errors
    assert re.search(
        r"error: the loader has run out of file descriptors(; the run stopped after step \d+, saved)?; "
        r"allow more with `ulimit -n 65536`, or lower --num-workers$",
        line,
    )
    assert "Traceback" not in done.text


def break_loader(monkeypatch, number, act):
    """`act` in place of reading a batch, once `number` samples have been read by one process."""
    read, count = ClassFolder.read, iter(range(10**9))

    def broken(self, *arguments):
        return act() if next(count) >= number else read(self, *arguments)

    monkeypatch.setattr(ClassFolder, "read", broken)


def unreadable():
    raise ValueError("cannot read image 'a.png': truncated")


def no_shared_memory(*_):
    raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (0, r"cannot read image 'a\.png': truncated"),
        (2, r"cannot read image 'a\.png': truncated"),
        (2, "a loader worker was killed, as machines do that run out of memory"),
    ],
)
def test_what_a_loader_cannot_read_on_ends_a_run_saved(flags, tmp_path, monkeypatch, workers, message):
    act = unreadable if "image" in message else lambda: os.kill(os.getpid(), signal.SIGKILL)
    more = [*flags("predictor"), "--num-workers", workers, "--steps", 40]
    with monkeypatch.context() as patch:
        break_loader(patch, 16 + 28, act)  # the report on the data has read each of the 16 images
        with pytest.raises(LoaderFailed, match=rf"^{message}; the run stopped after step (\d+), saved$") as caught:
            run(tmp_path, *more)
    step = int(re.search(r"step (\d+)", str(caught.value))[1])
    assert step >= 4  # with two workers each reads every other batch
    folder = tmp_path / "000-predictor-no-note"
    assert [int(path.stem) for path in (folder / "checkpoints").glob("*.pt")] == [step]
    more = [*flags("predictor"), "--steps", step + 2]
    again = run(tmp_path, *more, "--resume", "auto")
    assert_same_bits(checkpoint(again, step + 2), checkpoint(run(tmp_path / "whole", *more), step + 2))


def test_a_loader_without_shared_memory_tells_it(flags, tmp_path, monkeypatch):
    """Its batch would be dropped, and waited for for ever."""
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_shared_memory)
    with pytest.raises(LoaderFailed, match=r"^the loader has run out of shared memory \(/dev/shm\)$") as caught:
        run(tmp_path, *flags("predictor"), "--num-workers", 1, "--steps", 9)
    assert "--shm-size" in advice_for(caught.value)


# ---- wrong input


@pytest.fixture(scope="module")
def others(tmp_path_factory, save_network):
    """A file for each way to be no teacher."""
    folder = tmp_path_factory.mktemp("others")
    save_network(folder / "refiner.pt", VelocityRefiner, in_channels=1, num_classes=2)
    save_network(folder / "latent.pt", SiT, in_channels=4, num_classes=2)
    save_network(folder / "wide.pt", SiT, in_channels=1, num_classes=2, input_size=[8, 16])
    save_network(folder / "many.pt", SiT, in_channels=1, num_classes=10)
    (folder / "garbage.pt").write_bytes(b"garbage")
    (folder / "map.json").write_text('{"c0": 0, "c1": 7}')
    return folder


@pytest.mark.parametrize(
    ("target", "more", "message"),
    [
        ("refiner", ["--model-teacher-ckpt", "{}/missing.pt"], "missing.pt' (model_teacher_ckpt) does not exist"),
        ("refiner", ["--model-teacher-ckpt", "{}/garbage.pt"], "cannot read checkpoint '{}/garbage.pt'"),
        ("refiner", ["--model-teacher-ckpt", "{}/refiner.pt"], "holds a VelocityRefiner, expected a SiT"),
        ("refiner", ["--model-teacher-ckpt", "{}/latent.pt"], "vae_ckpt 'none' is for models of 1 or 3 channels"),
        ("refiner", ["--model-teacher-ckpt", "{}/wide.pt"], "works on 8x16 latents"),
        ("refiner", ["--model-teacher-ckpt", "{}/many.pt"], "2 class folders, the model 10 classes"),
        ("refiner", ["--image-size", "16"], "works on 8x8 latents: expected image_size 8"),
        ("predictor", ["--vae-ckpt", "vae"], "is neither a folder, an alias"),
        ("predictor", ["--image-size", "9"], "input_size 9x9 is not a multiple of patch_size 2"),
        ("predictor", ["--num-heads", "5"], "hidden_size 32 must be a multiple of num_heads 5"),
        ("predictor", ["--num-classes", "1"], "2 class folders, the model 1 classes"),
        ("predictor", ["--class-map", "{}/map.json"], "7"),
        ("predictor", ["--data-path", "{}/missing"], "does not exist: expected one folder of images per class"),
        ("predictor", ["--resume", "{}/missing.pt"], "missing.pt' (resume) does not exist"),
        ("predictor", ["--resume", "{}/refiner.pt"], "holds weights only: expected one of a training run"),
        ("predictor", ["--device", "cuda:77"], "is not there: this machine has"),
        ("predictor", ["--results-dir", "{}/garbage.pt/x"], "garbage.pt"),
    ],
)
def test_wrong_input_is_named_before_anything_is_made(flags, others, target, more, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(others.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        train.main([*flags(target), "--steps", "2", *(word.replace("{}", str(others)) for word in more)])
    line = cli.one_line(caught.value)
    assert message.replace("{}", str(others)) in line
    assert not list(tmp_path.rglob("*.pt"))
    assert sorted(others.rglob("*")) == before


def test_a_checkpoint_of_another_size_is_not_resumed(flags, tmp_path):
    folder = run(tmp_path, *flags("predictor"), "--steps", 1)
    with pytest.raises(ValueError, match="does not fit this SiT: "):
        run(tmp_path, *flags("predictor"), "--steps", 2, "--depth", 2, "--resume", "auto")
    assert json.loads((folder / "config.json").read_text())["model"]["depth"] == 1


# ---- several ranks


def test_two_ranks_train_a_predictor_as_one_process_does(flags, forks, tmp_path):
    """Five samples over two ranks, two passes each: three on one, two on the other."""
    flags = [*flags("predictor"), "--steps", 4, "--accumulate", 2, "--log-every", 1]
    done = forks(tmp_path / "out", *flags, "--results-dir", tmp_path / "two", ranks=2)
    assert done.codes == [0, 0], done.text
    one, two = run(tmp_path / "one", *flags), tmp_path / "two" / "000-predictor-no-note"
    assert [p.name for p in (tmp_path / "two").iterdir()] == [two.name]
    assert_close(checkpoint(one, 4), checkpoint(two, 4))
    assert figures(one, "loss") == pytest.approx(figures(two, "loss"), rel=1e-4)
    assert figures(one, "gradient") == pytest.approx(figures(two, "gradient"), rel=1e-3)


def test_in_exact_mode_the_bits_do_not_depend_on_the_ranks(flags, forks, tmp_path):
    flags = [*flags("predictor"), "--exact", "--global-batch-size", 13, "--resume", "auto"]
    whole = run(tmp_path / "whole", *flags, "--steps", 8)
    for turn, ranks in enumerate((1, 2, 4, 3), 1):
        mixed = [*flags, "--results-dir", tmp_path / "mixed", "--steps", 2 * turn]
        done = forks(tmp_path / f"out{ranks}", *mixed, ranks=ranks)
        assert done.codes == [0] * ranks, done.text
    assert_same_bits(checkpoint(tmp_path / "mixed" / "000-predictor-no-note", 8), checkpoint(whole, 8))


def test_the_originals_command_trains_a_latent_refiner(vae_folder, class_folder, save_network, python, forks, tmp_path):
    """With both spellings: under torchrun, and the same over two ranks."""
    images = class_folder(tmp_path / "images", classes=2, images=4, size=(20, 17))
    save_network(tmp_path / "predictor.ckpt", SiT, num_classes=2, depth=1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = f"-m torch.distributed.run --nnodes=1 --nproc_per_node=1 --master_port {port}"
    original = (
        f"--data-path {images} --global-batch-size 5 --note debug --ckpt-every 5000 --lr 5e-5 "
        f"--vae_ckpt {vae_folder} --model_teacher_ckpt predictor.ckpt --steps 3 --num_workers 1 --sample_every 3"
    ).split()
    done = python(*torchrun.split(), train.__file__, *original, "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one = tmp_path / "results" / "000-refiner-debug"
    assert Image.open(one / "samples" / "0000003.png").size[0] > 64
    assert checkpoint(one, 3)["config"]["model"]["in_channels"] == 4
    assert checkpoint(one, 3)["model"]["final_layer.linear.weight"].any()
    original[original.index("predictor.ckpt")] = str(tmp_path / "predictor.ckpt")
    done = forks(tmp_path / "out", *original, "--device=cpu", "--results-dir", tmp_path / "two", ranks=2)
    assert done.codes == [0, 0], done.text
    assert_close(checkpoint(one, 3), checkpoint(tmp_path / "two" / "000-refiner-debug", 3))


def test_a_batch_smaller_than_the_ranks_is_told_once(flags, forks, tmp_path):
    flags = [*flags("predictor"), "--steps", 1, "--global-batch-size", 1]
    done = forks(tmp_path / "out", *flags, "--results-dir", tmp_path / "results", ranks=2)
    assert done.codes == [2, 2]
    (line,) = done.errors
    assert line.endswith("train.py: error: global batch size 1 over 2 ranks: needs at least 2 samples")


def test_a_time_limit_stops_with_a_checkpoint(flags, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *flags("predictor"), "--steps", 100_000, "--max-hours", "0.0001")
    assert ended.value.code == EXIT_STOPPED
    folder = tmp_path / "000-predictor-no-note"
    (saved,) = (folder / "checkpoints").glob("*.pt")
    assert f"stopped by the time limit after step {int(saved.stem)}" in (folder / "log.txt").read_text()
    assert Path(saved).stat().st_size > 0


# ---- the data report


def test_an_unreadable_image_is_found_before_there_is_a_run(flags, data, tmp_path):
    shutil.copytree(data, tmp_path / "images")
    (tmp_path / "images" / "c1" / "3.png").write_bytes((data / "c1" / "3.png").read_bytes()[:60])
    more = ["--data-path", tmp_path / "images", "--steps", 1]
    with pytest.raises(ValueError, match=r"cannot read image '.*c1/3\.png'"):
        run(tmp_path / "results", *flags("predictor"), *more)
    assert not (tmp_path / "results").exists()


def test_check_data_reports_and_trains_nothing(data, tmp_path, capsys):
    """For a refiner too, without its teacher."""
    train.main(["--data-path", str(data), "--check-data", "--image-size", "8", "--results-dir", str(tmp_path)])
    told = capsys.readouterr().out
    assert "data: 16 images in 2 classes of 8 to 8: c0 (8), c1 (8)\n" in told
    assert told.endswith(f"crops: {tmp_path / 'data.png'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["data.png"]


def test_a_run_begins_with_the_report_and_a_sheet_of_crops(flags, tmp_path):
    folder = run(tmp_path, *flags("predictor"), "--steps", 1)
    assert "data: 16 images in 2 classes of 8 to 8: c0 (8), c1 (8)" in (folder / "log.txt").read_text()
    assert Image.open(folder / "data.png").size == (8 * 34 + 2, 2 * 34 + 2)


def test_a_grid_that_is_not_finite_ends_a_run_saved(flags, tmp_path, monkeypatch):
    def broken(self, *given):
        raise NotFinite("sample 0: not finite with schedule H8 in float16")

    monkeypatch.setattr(ImageSampler, "__call__", broken)
    message = r"^step 2: sample 0: not finite with schedule H8 in float16; the run is saved in .*0000002\.pt$"
    with pytest.raises(NotFinite, match=message):
        run(tmp_path, *flags("predictor"), "--steps", 9, "--sample-every", 2)
    assert checkpoint(tmp_path / "000-predictor-no-note", 2)["step"] == 2
