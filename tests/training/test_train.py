import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
import train
from flowturbo.models import SiT
from flowturbo.refiner import VelocityRefiner
from flowturbo.system import cli

COMMON = [
    "--vae-ckpt",
    "none",
    "--num-workers",
    "0",
    "--sample-every",
    "0",
    "--device",
    "cpu",
    "--global-batch-size",
    "5",
]
TINY = ["--image-size", "8", "--channels", "1", "--patch-size", "2", "--hidden-size", "32", "--depth", "1"]
PREDICTOR = [*COMMON, *TINY, "--target", "predictor", "--num-heads", "4", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen grey images of 8x8: the classes are a dark and a bright half."""
    root = tmp_path_factory.mktemp("data") / "images"
    random = np.random.default_rng(0)
    for label in range(2):
        (root / f"c{label}").mkdir(parents=True)
        for i in range(8):
            pixels = np.full((8, 8), 128 + (80 if label else -80)) + random.integers(-20, 20, (8, 8))
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"c{label}" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """The checkpoint of a predictor trained on the data for a moment."""
    results = tmp_path_factory.mktemp("teacher")
    more = ["--steps", "300", "--lr", "3e-3", "--global-batch-size", "16"]
    train.main([*PREDICTOR, "--data-path", str(data), "--results-dir", str(results), *more])
    return results / "000-predictor-no-note" / "checkpoints" / "0000300.pt"


@pytest.fixture
def flags(request, data, teacher):
    """flags(target) -> what trains it on the data."""
    refiner = [*COMMON, "--model-teacher-ckpt", str(teacher), "--lr", "1e-3"]
    by_target = {"predictor": PREDICTOR, "refiner": refiner}
    return lambda target: [*by_target[target], "--data-path", str(data)]


def run(results, *arguments, number=0):
    """Train in this process; returns the run's folder."""
    train.main([*map(str, arguments), "--results-dir", str(results)])
    return next(Path(results).glob(f"{number:03d}-*"))


def checkpoint(folder, step):
    return torch.load(folder / "checkpoints" / f"{step:07d}.pt")


def figures(folder, name):
    """The figures of one name in a run's log."""
    return [float(x) for x in re.findall(rf" {name}=(\S+)", (folder / "log.txt").read_text())]


def flat(content):
    """Every tensor and number of a checkpoint but its config, by path."""
    found = {}

    def walk(value, path):
        if isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{path}/{key}")
        elif isinstance(value, (list, tuple)):
            walk(dict(enumerate(value)), path)
        else:
            found[path] = value

    walk({k: v for k, v in content.items() if k != "config"}, "")
    return found


def assert_same_bits(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path, value in a.items():
        assert torch.equal(value, b[path]) if isinstance(value, torch.Tensor) else value == b[path], path


def assert_close(a, b):
    """The same training up to rounding: Adam's moments, which are sums of gradients, and the weights."""
    for key, moments in a["opt"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            scale = max(moments[name].abs().max().item(), 1e-12)
            torch.testing.assert_close(
                moments[name], b["opt"]["state"][key][name], atol=1e-4 * scale + 1e-10, rtol=1e-3
            )
    for name, value in a["model"].items():
        if not name.endswith("attn.qkv.bias"):  # the keys' has no gradient but rounding errors, which Adam enlarges
            torch.testing.assert_close(value, b["model"][name], atol=2e-5, rtol=1e-4)


# ---- runs


@pytest.mark.parametrize("target", ["predictor", "refiner"])
def test_both_targets_learn_and_leave_what_a_run_leaves(flags, target, tmp_path):
    more = ["--steps", 120, "--log-every", 10, "--ckpt-every", 50, "--sample-every", 100, "--lr", "3e-3"]
    folder = run(tmp_path, *flags(target), *more, "--global-batch-size", 16, "--note", "first")
    assert folder.name == f"000-{target}-first"
    losses = figures(folder, "loss")
    assert len(losses) == 12
    assert sum(losses[-4:]) < (0.7 if target == "predictor" else 0.9) * sum(losses[:4])
    assert all(rate > 0 for rate in figures(folder, "images/s"))
    assert len(figures(folder, "gradient")) == 12
    assert sorted(p.stem for p in (folder / "checkpoints").glob("*.pt")) == ["0000050", "0000100", "0000120"]
    grids = [Image.open(p) for p in sorted((folder / "samples").iterdir())]
    assert len(grids) == 2
    assert grids[0].size[1] > 1.5 * 32 * (1 if target == "predictor" else 2)

    config = json.loads((folder / "config.json").read_text())
    kind = SiT if target == "predictor" else VelocityRefiner
    assert config["model"]["class"] == kind.__name__
    assert config["training"]["steps"] == 120
    content = checkpoint(folder, 120)
    assert content["config"] == config
    assert content["step"] == 120
    network = pipeline.load_network(kind, str(folder / "checkpoints" / "0000120.pt"))
    for name, value in network.state_dict().items():
        assert torch.equal(value, content["ema"][name])
        assert "embed" in name or "bias" in name or not torch.equal(value, content["model"][name])
    again = run(tmp_path, *flags(target), "--steps", 1, number=1)
    assert again.name == f"001-{target}-no-note"


def test_a_trained_predictor_has_learned_the_classes(teacher):
    """The grey of the samples follows the label asked for."""
    predictor = pipeline.load_network(SiT, str(teacher))
    content = torch.load(teacher)
    predictor.load_state_dict(content["model"])
    z = torch.randn(16, 1, 8, 8)
    sampler = train.FlowTurbo(predictor, None, "H8", 1.0)
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


def test_a_finished_run_resumed_does_nothing(flags, tmp_path):
    folder = run(tmp_path, *flags("predictor"), "--steps", 2)
    before = (folder / "checkpoints" / "0000002.pt").read_bytes()
    run(tmp_path, *flags("predictor"), "--steps", 2, "--resume", "auto")
    assert (folder / "checkpoints" / "0000002.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_auto_resumes_the_same_target_and_note_only(flags, tmp_path):
    for target, note in (("predictor", "a"), ("refiner", "refiner-a"), ("refiner", "b")):
        run(tmp_path, *flags(target), "--steps", 1, "--note", note)
    run(tmp_path, *flags("refiner"), "--steps", 1, "--note", "a", "--resume", "auto")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000-predictor-a",
        "001-refiner-refiner-a",
        "002-refiner-b",
        "003-refiner-a",
    ]


@pytest.mark.parametrize("target", ["predictor", "refiner"])
def test_accumulating_changes_nothing(flags, target, tmp_path):
    plain = run(tmp_path / "plain", *flags(target), "--steps", 4)
    parts = run(tmp_path / "parts", *flags(target), "--steps", 4, "--accumulate", 3)
    assert_close(checkpoint(plain, 4), checkpoint(parts, 4))
    assert figures(plain, "loss") == pytest.approx(figures(parts, "loss"), rel=1e-4)


@pytest.mark.parametrize("target", ["predictor", "refiner"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train(flags, target, precision, tmp_path):
    half = run(tmp_path / "half", *flags(target), "--steps", 4, "--sample-every", 4, "--precision", precision)
    full = run(tmp_path / "full", *flags(target), "--steps", 4, "--sample-every", 4, "--precision", "fp32")
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teachers_blocks_are_held_in_the_precision(flags, precision, tmp_path, monkeypatch):
    """Autocast would cast all weights anew in every evaluation; it is for the refiner, which has them in float32."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    loss, seen = train.refiner_loss, []

    def watched(refiner, teacher, *args, **more):
        weights = [(name.startswith("blocks."), p.dtype) for name, p in teacher.named_parameters()]
        assert set(weights) == {(True, dtype), (False, torch.float32)}

        def noted(name, network):
            def call(*inputs):
                output = network(*inputs)
                seen.append((name, output.dtype))
                return output

            return call

        return loss(noted("refiner", refiner), noted("teacher", teacher), *args, **more)

    monkeypatch.setattr(train, "refiner_loss", watched)
    run(tmp_path, *flags("refiner"), "--steps", 1, "--precision", precision)
    assert seen == [("teacher", torch.float32), ("teacher", torch.float32), ("refiner", dtype)]


def test_the_learning_rate_warms_up(flags, tmp_path):
    folder = run(tmp_path, *flags("predictor"), "--steps", 6, "--ckpt-every", 1, "--warmup", 4, "--lr", "1e-3")
    rates = [checkpoint(folder, step)["opt"]["param_groups"][0]["lr"] for step in range(1, 7)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_gradients_are_clipped_and_their_norm_is_that_before(flags, tmp_path):
    def norm(folder):  # Adam's first moment after one step is a tenth of the gradient
        states = checkpoint(folder, 1)["opt"]["state"].values()
        return 10 * torch.cat([s["exp_avg"].flatten() for s in states]).norm().item()

    free = run(tmp_path / "free", *flags("predictor"), "--steps", 1)
    clipped = run(tmp_path / "clipped", *flags("predictor"), "--steps", 1, "--clip-grad", 0.01)
    assert figures(free, "gradient") == figures(clipped, "gradient") == pytest.approx([norm(free)], rel=1e-3)
    assert norm(free) > 0.1
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)


def test_the_moving_average_follows_the_weights(flags, tmp_path):
    folder = run(tmp_path, *flags("predictor"), "--steps", 3, "--ckpt-every", 1, "--ema-decay", 0.15)
    contents = [checkpoint(folder, step) for step in (1, 2, 3)]
    for step in (2, 3):  # the decay is step / (step + 9) until it reaches its own
        decay = min(0.15, step / (step + 9))
        for name, value in contents[step - 1]["model"].items():
            expected = decay * contents[step - 2]["ema"][name] + (1 - decay) * value
            torch.testing.assert_close(contents[step - 1]["ema"][name], expected)


def test_epochs_are_passes_over_the_data(flags, tmp_path):
    folder = run(tmp_path, *flags("predictor"), "--epochs", 2)
    assert checkpoint(folder, 7)["step"] == 7  # 2 * 16 images in batches of 5


def test_a_model_without_null_class_trains_and_is_sampled_without_guidance(flags, tmp_path):
    folder = run(tmp_path, *flags("predictor"), "--steps", 2, "--class-dropout", 0, "--sample-every", 2)
    content = checkpoint(folder, 2)
    assert content["model"]["y_embedder.embedding_table.weight"].shape[0] == 2
    assert (folder / "samples" / "0000002.png").is_file()


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_the_recipes_differ(flags, recipe, tmp_path):
    folder = run(tmp_path, *flags("refiner"), "--steps", 2, "--recipe", recipe, "--max-dt", "0.3")
    other = run(tmp_path / "other", *flags("refiner"), "--steps", 2, "--max-dt", "0.2")
    assert figures(folder, "loss") != figures(other, "loss")


# ---- compiled


@pytest.mark.parametrize(
    ("target", "more", "backend"),
    [("refiner", [], "inductor"), ("predictor", ["--depth", 2, "--precision", "bf16"], "aot_eager")],
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
    with pytest.raises(ValueError, match="trained otherwise: --compile was True, is False"):
        train.main(list(map(str, flags)))
    with compiler(backend):
        train.main(list(map(str, [*flags, "--compile"])))
    assert_same_bits(checkpoint(compiled, 4), whole)


def test_a_machine_without_a_compiler_is_told_in_one_line(flags, python, tmp_path):
    flags = [*flags("refiner"), "--compile", "--steps", 1, "--results-dir", tmp_path]
    done = python("train.py", *flags, CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert "train.py: error: this machine cannot compile" in done.stderr
    assert "Traceback" not in done.stderr


# ---- runs that stop


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("every", [1, 2, 3, 100])
@pytest.mark.parametrize("target", ["predictor", "refiner"])
def test_a_loss_that_is_not_finite_stops_before_the_update(flags, target, every, precision, tmp_path, monkeypatch):
    """Where nothing is saved at that step, fp32 and bf16 learn of it when the next one is under way."""
    flags = [*flags(target), "--precision", precision]
    good = run(tmp_path / "good", *flags, "--steps", 2)
    name = "flow_matching_loss" if target == "predictor" else "refiner_loss"
    original, calls, states, update = getattr(train, name), [], [], train.update

    def poisoned(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(train, name, poisoned)
    monkeypatch.setattr(
        train, "update", lambda state, *args, **more: states.append(state) or update(state, *args, **more)
    )
    with pytest.raises(FloatingPointError, match=r"^step 3: the loss is nan"):
        run(tmp_path, *flags, "--steps", 5, "--ckpt-every", every, "--sample-every", every)
    assert len(calls) == (3 if precision == "fp16" or every in (1, 3) else 4)
    saved = [f"{step:07d}" for step in (1, 2) if step % every == 0]
    assert sorted(p.stem for p in tmp_path.glob("0*/checkpoints/*.pt")) == saved
    assert sorted(p.stem for p in tmp_path.glob("0*/samples/*.png")) == saved
    left, before = states[0], checkpoint(good, 2)
    assert_same_bits(left.model.state_dict(), before["model"])
    assert_same_bits(left.optimizer.state_dict()["state"], before["opt"]["state"])


def test_a_run_that_diverges_ends_with_one_line_and_exit_1(flags, python, tmp_path):
    done = python(
        "train.py", *flags("predictor"), "--results-dir", tmp_path, "--steps", 9, "--lr", "1e30", "--ckpt-every", 1
    )
    assert done.returncode == 1
    step = int(re.search(r"^train\.py: error: step (\d+): the loss is", done.stderr, re.MULTILINE)[1])
    assert "Traceback" not in done.stderr
    stored = sorted(int(p.stem) for p in tmp_path.glob("*/checkpoints/*.pt"))
    assert stored == list(range(1, step))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "x"], "--target refiner needs the trained predictor: --model-teacher-ckpt FILE"),
        (["--target", "predictor"], "the following arguments are required: --data-path"),
        (["--data-path", "x", "--data_pth", "y"], "unrecognized arguments: --data-pth y; did you mean --data-path?"),
        (["--data-path", "x", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--data-path", "x", "--target", "both"], "invalid choice: 'both'"),
        *(
            (["--data-path", "x", "--target", "predictor", flag, value], flag)
            for flag, value in [
                *(("--steps", "0"), ("--epochs", "0"), ("--global-batch-size", "-1"), ("--accumulate", "0")),
                *(("--log-every", "0"), ("--ckpt-every", "0"), ("--image-size", "0"), ("--num-workers", "-1")),
                *(("--warmup", "-1"), ("--sample-every", "-1"), ("--seed", "-1"), ("--class-dropout", "1")),
                *(("--class-dropout", "nan"), ("--ema-decay", "1"), ("--ema-decay", "-0.1"), ("--lr", "0")),
                *(("--lr", "nan"), ("--wd", "-1"), ("--clip-grad", "0"), ("--note", "a/b"), ("--note", "..")),
                *(("--channels", "2"), ("--model", "SiT-M/2"), ("--precision", "fp8"), ("--path-type", "cosine")),
                *(("--max-hours", "0"), ("--max-hours", "nan")),
            ]
        ),
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse_args(flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--patch-size", 0), ("--depth", -1), ("--hidden-size", 0), ("--num-heads", 0), ("--num-classes", 0)),
        *(("--lr", "inf"), ("--wd", "inf"), ("--cfg-scale", "nan"), ("--cfg-scale", -1), ("--seed", 2**64)),
        *(("--max-dt", 1.5), ("--max-dt", 0), ("--subset", 0), ("--subset", 1.5), ("--seed", -1)),
    ],
)
def test_impossible_numbers_are_refused_before_training(flags, flag, value, tmp_path, capsys):
    """By whom does not matter, but as a user's mistake: a run must not stop at its first sample grid."""
    with pytest.raises((ValueError, SystemExit)):
        run(tmp_path, *flags("predictor"), "--steps", 2, "--sample-every", 1, flag, value)
    assert not list(tmp_path.rglob("log.txt"))


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
        ("refiner", ["--model-teacher-ckpt", "{}/missing.pt"], "missing.pt' does not exist"),
        ("refiner", ["--model-teacher-ckpt", "{}/garbage.pt"], "cannot read checkpoint '{}/garbage.pt'"),
        ("refiner", ["--model-teacher-ckpt", "{}/refiner.pt"], "holds a VelocityRefiner, expected a SiT"),
        ("refiner", ["--model-teacher-ckpt", "{}/latent.pt"], "--vae-ckpt none is for models of 1 or 3 channels"),
        ("refiner", ["--model-teacher-ckpt", "{}/wide.pt"], "works on 8x16 latents"),
        ("refiner", ["--model-teacher-ckpt", "{}/many.pt"], "2 class folders, the model 10 classes"),
        ("refiner", ["--image-size", "16"], "works on 8x8 latents, that is --image-size 8"),
        ("predictor", ["--vae-ckpt", "vae"], "is neither a folder, an alias"),
        ("predictor", ["--image-size", "9"], "input_size 9x9 is not a multiple of patch_size 2"),
        ("predictor", ["--num-heads", "5"], "hidden_size 32 must be a multiple of num_heads 5"),
        ("predictor", ["--num-classes", "1"], "2 class folders, the model 1 classes"),
        ("predictor", ["--class-map", "{}/map.json"], "7"),
        ("predictor", ["--data-path", "{}/missing"], "does not exist: expected one folder of images per class"),
        ("predictor", ["--resume", "{}/missing.pt"], "missing.pt' does not exist"),
        ("predictor", ["--resume", "{}/refiner.pt"], "holds weights only: --resume needs one written by train.py"),
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


# ---- torchrun


def test_two_ranks_train_a_predictor_as_one_process_does(flags, python, tmp_path):
    """Five samples over two ranks, two passes each: three on one, two on the other."""
    flags = [*flags("predictor"), "--steps", 4, "--accumulate", 2, "--log-every", 1]
    done = python("train.py", *flags, "--results-dir", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = run(tmp_path / "one", *flags), tmp_path / "two" / "000-predictor-no-note"
    assert [p.name for p in (tmp_path / "two").iterdir()] == [two.name]
    assert_close(checkpoint(one, 4), checkpoint(two, 4))
    assert figures(one, "loss") == pytest.approx(figures(two, "loss"), rel=1e-4)
    assert figures(one, "gradient") == pytest.approx(figures(two, "gradient"), rel=1e-3)


def test_the_originals_command_trains_a_latent_refiner(vae_folder, class_folder, save_network, python, tmp_path):
    """With both spellings and on two ranks, and the same from one process."""
    images = class_folder(tmp_path / "images", classes=2, images=4, size=(20, 17))
    save_network(tmp_path / "predictor.ckpt", SiT, num_classes=2, depth=1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    original = (
        f"--data-path {images} --global-batch-size 5 --note debug --ckpt-every 5000 --lr 5e-5 "
        f"--vae_ckpt {vae_folder} --model_teacher_ckpt predictor.ckpt --steps 3 --num_workers 1 --sample_every 3"
    ).split()
    torchrun = f"-m torch.distributed.run --nnodes=1 --nproc_per_node=2 --master_port {port}".split()
    done = python(*torchrun, train.__file__, *original, "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "results" / "000-refiner-debug"
    assert Image.open(two / "samples" / "0000003.png").size[0] > 64
    original[original.index("predictor.ckpt")] = str(tmp_path / "predictor.ckpt")
    one = run(tmp_path / "one", *original, "--device", "cpu")
    assert_close(checkpoint(one, 3), checkpoint(two, 3))
    assert checkpoint(two, 3)["config"]["model"]["in_channels"] == 4
    assert checkpoint(one, 3)["model"]["final_layer.linear.weight"].any()


def test_a_batch_smaller_than_the_ranks_is_told_once(flags, python, tmp_path):
    flags = [*flags("predictor"), "--steps", 1, "--global-batch-size", 1]
    done = python("train.py", *flags, "--results-dir", tmp_path, ranks=2)
    assert done.returncode != 0
    line = "train.py: error: global batch size 1 over 2 ranks: needs at least 2 samples"
    assert [text for text in done.stderr.splitlines() if "train.py: error" in text] == [line]
