import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample_ddp_feature as ddp
from flowturbo.evaluation import FeatureSet, GaussianStatistics, ImageArchive, extract, load_extractor
from flowturbo.networks.autoencoder import NoAutoencoder
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.networks.load import load_network
from flowturbo.sampling import generate, sample_set
from flowturbo.sampling.generate import ImageSampler, NotFinite
from flowturbo.sampling.options import NetworkOptions, SamplingOptions, SetOptions
from flowturbo.sampling.sample_folder import read_archive
from flowturbo.sampling.sample_set import class_of, make_sample_set
from flowturbo.system.claims import OtherSettings
from flowturbo.system.distributed import World
from flowturbo.system.files import exclusive

SETTINGS = ["--device", "cpu", "--schedule", "H1P2R1", "--per-proc-batch-size", "4"]
COUNT = 18  # not a multiple of 4: five micro-batches, the last half full


@pytest.fixture
def draw(pixel_models, tmp_path, capsys):
    """draw(*flags, count=18) -> its Summary, in this process and in tmp_path."""

    def run(*flags, count=COUNT, tag="a"):
        flags = [*pixel_models, *SETTINGS, "--num-fid-samples", count, "--sample-dir", tmp_path, "--tag", tag, *flags]
        return ddp.main(list(map(str, flags)))

    return run


@pytest.fixture(scope="module")
def reference(pixel_models, tmp_path_factory):
    """One uninterrupted run of one process with features and pictures: (folder of everything, its flags)."""
    folder = tmp_path_factory.mktemp("reference")
    flags = [*pixel_models, *SETTINGS, "--num-fid-samples", str(COUNT), "--features", "pixels", "--png", "--tag", "a"]
    ddp.main([*flags, "--sample-dir", str(folder)])
    return folder, flags


def digests(folder):
    """The digest of each file that a run leaves, but for the record of its own settings."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def images(folder, tag="a"):
    return read_archive(folder / f"{tag}.npz")


# ---- what a run leaves


def test_the_archive_has_the_form_of_the_field(reference):
    folder, _ = reference
    with np.load(folder / "a.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        stored = archive["arr_0"]
    assert (stored.shape, stored.dtype, stored.flags.c_contiguous) == ((COUNT, 8, 8, 3), np.uint8, True)
    assert stored.std() > 10
    assert len({image.tobytes() for image in stored}) == COUNT
    assert len(ImageArchive(folder / "a.npz")) == COUNT


def test_pictures_and_preview_show_the_archive(reference):
    folder, _ = reference
    names = sorted(path.name for path in (folder / "a" / "png").iterdir())
    assert names == [f"{i:06d}.png" for i in range(COUNT)]
    for number, image in enumerate(images(folder)):
        assert np.array_equal(np.asarray(Image.open(folder / "a" / "png" / f"{number:06d}.png")), image)
    assert Image.open(folder / "a-preview.png").size == (8 * 34 + 2, 3 * 34 + 2)


def test_features_are_those_of_the_archive(reference):
    folder, _ = reference
    ours = FeatureSet.load(folder / "a-features.npz")
    theirs = extract(load_extractor("pixels"), ImageArchive(folder / "a.npz"), keep=["pool"], progress=False)
    assert (ours.source, ours.count, ours.labels, ours.extractor) == ("a", COUNT, "random", "pixels")
    assert torch.equal(ours.pool, theirs.pool)
    for a, b in zip(ours.pool_statistics, theirs.pool_statistics):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    whole = theirs.pool.double()
    torch.testing.assert_close(ours.pool_statistics.mean, whole.mean(0), atol=1e-10, rtol=0)
    torch.testing.assert_close(ours.pool_statistics.covariance, whole.T.cov(), atol=1e-10, rtol=0)


def test_only_results_stay(reference):
    folder, _ = reference
    assert sorted(p.name for p in folder.iterdir()) == ["a", "a-features.npz", "a-preview.png", "a.npz"]
    assert not list(folder.rglob("*.tmp"))
    assert list((folder / "a" / "batches").iterdir()) == []


def test_the_evaluator_reads_both_files(reference, tmp_path):
    import evaluator

    folder, _ = reference
    report = tmp_path / "report.json"
    evaluator.main(
        [str(folder / "a.npz"), str(folder / "a-features.npz"), "--json", str(report), "--extractor", "pixels"]
    )
    assert json.loads(report.read_text())["metrics"]["FID"]["value"] == pytest.approx(0, abs=1e-6)


def test_sample_i_is_what_the_sampler_makes_of_seed_and_i(reference, pixel_models):
    """Its own batch of one; float rounding may tip a byte."""
    from flowturbo.data.pictures import to_uint8
    from flowturbo.data.randomness import keyed_generator, keyed_noise
    from flowturbo.models import SiT
    from flowturbo.refiner import VelocityRefiner
    from flowturbo.transport import FlowTurbo

    networks = load_network(SiT, pixel_models[1]), load_network(VelocityRefiner, pixel_models[3])
    sampler = FlowTurbo(*networks, "H1P2R1", 1.5)
    stored = images(reference[0])
    for number in (0, 3, 17):
        label = int(keyed_generator(0, number, 2**63).integers(10))
        latents = sampler.sample(keyed_noise(0, [number], (3, 8, 8)), torch.tensor([label]))
        image = to_uint8(latents)[0].permute(1, 2, 0).numpy()
        assert np.abs(image.astype(int) - stored[number]).max() <= 1


# ---- ranks


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_ranks_changes_no_byte(reference, python, tmp_path, ranks):
    folder, flags = reference
    done = python("sample_ddp_feature.py", *flags, "--sample-dir", tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr
    ours, theirs = digests(tmp_path), digests(folder)
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    assert done.stdout.count(f"{COUNT} images: ") == 1
    with pytest.raises(
        ValueError, match="was made with seed 0, not 1"
    ):  # in this process: the settings agree on all else
        ddp.main([*flags, "--sample-dir", str(tmp_path), "--seed", "1"])
    assert ddp.main([*flags, "--sample-dir", str(tmp_path)]).ms_per_image == 0


def test_each_rank_makes_its_share_and_no_more(draw, pixel_models, tmp_path, monkeypatch):
    """Three ranks one after the other, in this process."""
    whole = images_of(draw(tag="whole"))
    made = interrupt_after(monkeypatch, 99)
    monkeypatch.setattr(World, "barrier", lambda self: None)
    monkeypatch.setattr(World, "agree", lambda self, function: function())
    networks = NetworkOptions(pixel_models[1], pixel_models[3], "none", device="cpu")
    options = SetOptions("H1P2R1", COUNT, 4, sample_dir=str(tmp_path), tag="parts")
    shares = {}
    for rank in (2, 0, 1):
        made.clear()
        with suppress(OSError):  # the archive waits for the others
            make_sample_set(options, networks, SamplingOptions(1.5), World(rank, rank, 3, torch.device("cpu")))
        shares[rank] = list(made)
    assert shares == {0: [0, 12], 1: [4, 16], 2: [8]}
    assert np.array_equal(images(tmp_path, "parts"), whole)


def images_of(summary):
    return read_archive(summary.archive)


# ---- interruptions


def test_a_complete_run_says_so_and_does_nothing(reference, capsys):
    folder, flags = reference
    before = digests(folder)
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.*")}
    summary = ddp.main([*flags, "--sample-dir", str(folder)])
    assert capsys.readouterr().out == f"already complete: {folder / 'a.npz'}\n"
    assert summary == (folder / "a.npz", folder / "a-features.npz", 0.0)
    assert digests(folder) == before
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.*") if p.name != ".lock"}.items() <= times.items()


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, batches):
    """The run breaks off before the micro-batch after so many; returns the starts of those it made."""
    original, made = ImageSampler.__call__, []

    def limited(self, seed, numbers, classes):
        if len(made) == batches:
            raise Interrupted
        made.append(numbers.start)
        return original(self, seed, numbers, classes)

    monkeypatch.setattr(ImageSampler, "__call__", limited)
    return made


def test_only_what_is_missing_is_made_again(reference, draw, tmp_path, monkeypatch):
    features = ["--features", "pixels", "--png"]
    made = interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        draw(*features)
    assert made == [0, 4]
    assert not (tmp_path / "a.npz").exists()
    batches = tmp_path / "a" / "batches"
    assert sorted(p.name for p in batches.iterdir()) == ["000000.batch", "000001.batch"]
    broken = bytearray((batches / "000000.batch").read_bytes())
    broken[len(broken) // 2] ^= 1
    (batches / "000000.batch").write_bytes(broken)
    (batches / "000007.batch").write_bytes(b"of no run")  # neither counted nor read
    (batches / ".000003.batch.1.tmp").write_bytes(b"left by a kill")
    (tmp_path / "a" / "png" / "000099.png").write_bytes(b"nor this")
    (tmp_path / "a" / "png" / "000005.png").unlink()  # of the second micro-batch, whose arrays are there
    monkeypatch.undo()
    made = interrupt_after(monkeypatch, 99)
    draw(*features)
    assert made == [0, 8, 12, 16]
    theirs = digests(reference[0])
    assert {name: d for name, d in digests(tmp_path).items() if name in theirs and name != "a/settings.json"} == {
        name: d for name, d in theirs.items() if name != "a/settings.json"
    }


def test_a_finished_micro_batch_is_not_made_again(draw, monkeypatch):
    made = interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        draw()
    monkeypatch.undo()
    again = interrupt_after(monkeypatch, 99)
    draw()
    assert (made, again) == ([0, 4, 8], [12, 16])


@pytest.mark.parametrize("lost", ["a.npz", "a-features.npz", "a/png/000005.png", "a/png/000017.png"])
def test_an_output_that_was_lost_or_changed_is_made_again_without_sampling(
    reference, draw, tmp_path, lost, monkeypatch
):
    draw("--features", "pixels", "--png")
    before = digests(tmp_path)
    assert before.keys() == digests(reference[0]).keys()
    interrupt_after(monkeypatch, 0)
    (tmp_path / lost).write_bytes(b"changed")
    assert draw("--features", "pixels", "--png").ms_per_image == 0
    assert digests(tmp_path) == before
    (tmp_path / lost).unlink()
    draw("--features", "pixels", "--png")
    assert digests(tmp_path) == before


def test_what_is_lost_of_the_archive_and_the_pictures_is_sampled_again(draw, tmp_path, monkeypatch):
    draw("--png")
    before = digests(tmp_path)
    for lost in ("a.npz", "a/png/000005.png"):
        (tmp_path / lost).unlink()
    made = interrupt_after(monkeypatch, 99)
    draw("--png")
    assert made == [4]
    assert digests(tmp_path) == before


@pytest.mark.parametrize("more", [[], ["--png"]])
def test_a_set_grows_by_what_is_missing(reference, draw, tmp_path, monkeypatch, more):
    """From 6 images over 7, broken off, to 18: micro-batches of four that are whole are not sampled again."""
    flags = ["--features", "pixels", *more]
    draw(*flags, count=6)
    made = interrupt_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        draw(*flags, count=9)
    assert made == [4]
    monkeypatch.undo()
    made = interrupt_after(monkeypatch, 99)
    draw(*flags)
    assert made == [8, 12, 16]
    theirs = {name: digest for name, digest in digests(reference[0]).items() if more or "png/" not in name}
    ours = digests(tmp_path)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"a/settings.json"}:
        assert ours[name] == theirs[name], name
    with pytest.raises(OtherSettings, match="was made with num_fid_samples 18, not 6"):
        draw(*flags, count=6)


def test_what_one_code_has_begun_no_other_finishes(draw, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        draw()
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(sample_set, "made_by", lambda: {"torch": torch.__version__, "code": "0123"})
        with pytest.raises(OtherSettings, match=r"the first part of folder .*a' was made with code '.*', not '0123'$"):
            draw()
    draw()
    monkeypatch.setattr(sample_set, "made_by", lambda: {"torch": "9.9", "code": "0123"})
    assert draw().ms_per_image == 0  # complete, by one code alone
    with pytest.raises(OtherSettings, match=r"was made with torch '.*', not '9\.9'$|was made with code"):
        draw(count=COUNT + 2)


def test_an_image_that_is_not_finite_ends_a_set_unfinished(save_network, draw, tmp_path):
    path = save_network(tmp_path / "huge.pt", in_channels=3)
    content = torch.load(path)
    content["ema"] = {name: value * 1e37 for name, value in content["ema"].items()}
    torch.save(content, path)
    with pytest.raises(NotFinite, match=r"^sample 0, 1, 2, 3: not finite with schedule H1P2 in float32$"):
        draw("--predictor-ckpt", path, "--schedule", "H1P2")
    assert not (tmp_path / "a.npz").exists()
    content["ema"] = {name: value.double() * 1e300 for name, value in content["ema"].items()}
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"huge\.pt.*is not finite"):
        draw("--predictor-ckpt", path, "--schedule", "H1P2", tag="b")


def family(pid):
    """A process and its descendants: torchrun's workers have sessions of their own."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def kill_and_finish(flags, folder, kills, ranks):
    """Start the run so many times and kill it, all ranks at once, at random moments; then let it finish.

    Returns how many micro-batches were there after each kill that met a run at work.
    """
    moments = random.Random(0)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, ddp.__file__, *flags, "--sample-dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    batches, progress = folder / "a" / "batches", []

    def made():
        return len(list(batches.glob("[0-9]*.batch"))) if batches.exists() else 0

    for _ in range(kills):
        before = made()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
        while made() == before and process.poll() is None:  # the imports take seconds
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        for pid in family(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            progress.append(made())
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return progress


def long_flags(flags, count):
    """Enough micro-batches that a kill meets a run at work."""
    return [*flags, "--num-fid-samples", str(count), "--schedule", "H10", "--per-proc-batch-size", "2"]


@pytest.mark.slow  # the campaign in tests/reliability kills sampling too
@pytest.mark.parametrize(("kills", "ranks", "count"), [(1, 0, 101), (20, 2, 1001)])
def test_kills_at_random_moments_change_no_byte(reference, tmp_path, kills, ranks, count):
    flags = long_flags(reference[1], count)
    ddp.main([*flags, "--sample-dir", str(tmp_path / "whole")])
    progress = kill_and_finish(flags, tmp_path / "killed", kills, ranks)
    assert len(progress) == kills  # every one met a run at work
    assert 0 < progress[0] <= progress[-1] < count / 2
    ours, theirs = digests(tmp_path / "killed"), digests(tmp_path / "whole")
    names = [name for name in theirs if "settings" not in name and (ranks < 2 or "features" not in name)]
    assert len(names) > count
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


# ---- settings


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_exactly_as_many_images_as_asked_for(reference, draw, tmp_path, count):
    assert images_of(draw(count=count)).shape == (count, 8, 8, 3)
    assert np.array_equal(images(tmp_path), images(reference[0])[:count])


def test_labels_are_drawn_by_key_or_in_turn(draw, monkeypatch):
    classes = []
    original = ImageSampler.__call__
    monkeypatch.setattr(ImageSampler, "__call__", lambda *a: classes.extend(a[3]) or original(*a))
    draw("--labels", "balanced", tag="b")
    assert classes == [i % 10 for i in range(20)]
    classes.clear()
    draw(tag="c")
    assert classes == [class_of(0, i, 10, "random") for i in range(20)]
    many = torch.tensor([class_of(3, i, 10, "random") for i in range(2000)]).bincount()
    assert len(many) == 10
    assert 140 < many.min() <= many.max() < 260
    assert [class_of(3, i, 10, "random") for i in range(50)] != [class_of(4, i, 10, "random") for i in range(50)]


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--seed", "1"], "seed 0, not 1"),
        (["--schedule", "H1P2R2"], "schedule 'H1P2R1', not 'H1P2R2'"),
        (["--num-fid-samples", "17"], "num_fid_samples 18, not 17"),
        (["--per-proc-batch-size", "5"], "per_proc_batch_size 4, not 5"),
        (["--cfg-scale", "2"], "cfg_scale 1.5, not 2.0"),
        (["--cfg-interval", "0", "0.5"], "cfg_interval [0.0, 1.0], not [0.0, 0.5]"),
        (["--labels", "balanced"], "labels 'random', not 'balanced'"),
        (["--refiner-step", "single"], "refiner_step 'released', not 'single'"),
        (["--precision", "bf16"], "precision 'torch.float32', not 'torch.bfloat16'"),
        (["--features", "pixels"], "features None, not 'pixels'"),
        (["--png"], "png False, not True"),
        (["--compile"], "compile False, not True"),
        (["--quantize", "int8"], "quantize None, not 'int8'"),
        (["predictor"], "predictor_sha256 "),
        (["refiner"], "refiner_sha256 "),
    ],
    ids=str,
)
def test_a_folder_of_other_settings_is_refused_with_the_difference(
    draw, save_network, tmp_path_factory, monkeypatch, flags, difference
):
    from flowturbo.models import SiT
    from flowturbo.refiner import VelocityRefiner

    interrupt_after(monkeypatch, 1)
    monkeypatch.setattr(generate, "quantize", lambda *_: 0.0)  # which needs torchao
    with pytest.raises(Interrupted):
        draw()
    if len(flags) == 1 and not flags[0].startswith("-"):
        kind = SiT if flags == ["predictor"] else VelocityRefiner
        other = save_network(tmp_path_factory.mktemp("other") / "a.pt", kind, seed=9, in_channels=3)
        flags = [f"--{flags[0]}-ckpt", str(other)]
    with pytest.raises(OtherSettings, match="was made with ") as caught:
        draw(*flags)
    assert f"was made with {difference}" in str(caught.value)


def test_spelling_and_place_are_no_settings(draw, pixel_models, tmp_path, monkeypatch):
    draw()
    copies = []
    for k in (1, 3):
        copies.append(tmp_path / f"copy{k}.pt")
        copies[-1].write_bytes(Path(pixel_models[k]).read_bytes())
    flags = ["--predictor_ckpt", copies[0], "--refiner_ckpt", copies[1], "--schedule", "h1 p2 [R1]"]
    assert draw(*flags).ms_per_image == 0


def test_a_folder_in_use_is_left_alone(draw, tmp_path):
    draw(count=2)
    with exclusive(tmp_path / "a"), pytest.raises(ValueError, match="is in use by another run"):
        draw(count=2)


def test_samplers_of_sit_make_sets_too(draw, tmp_path):
    sets = [images_of(draw("--schedule", name, count=6, tag=name)) for name in ("dopri5", "sde5", "H1")]
    assert len({s.tobytes() for s in sets}) == 3
    smaller = images_of(draw("--schedule", "sde5", "--per-proc-batch-size", 2, count=6, tag="again"))
    assert np.abs(smaller.astype(int) - sets[1]).max() <= 1  # the SDE's noise is keyed by the sample too


def test_a_grey_model_makes_grey_images_and_their_features(save_network, draw, tmp_path):
    from flowturbo.models import SiT

    grey = save_network(tmp_path / "grey.pt", SiT, in_channels=1)
    flags = ["--predictor-ckpt", grey, "--schedule", "H2", "--features", "pixels", "--png"]
    assert images_of(draw(*flags)).shape == (COUNT, 8, 8, 1)
    ours = FeatureSet.load(tmp_path / "a-features.npz")
    theirs = extract(load_extractor("pixels"), ImageArchive(tmp_path / "a.npz"), keep=["pool"], progress=False)
    assert torch.equal(ours.pool, theirs.pool)
    assert Image.open(tmp_path / "a" / "png" / "000003.png").mode == "L"


def test_compiled_sets_equal_eager_ones(reference, draw, compiler, tmp_path, monkeypatch):
    """Every micro-batch is full, the last by padding, so that one set of graphs serves all."""
    rows, original = [], StaticGraphs.sample
    monkeypatch.setattr(StaticGraphs, "sample", lambda self, z, y: rows.append(len(z)) or original(self, z, y))
    with compiler("eager"):
        draw("--compile")
    assert rows == [4] * 6  # one of them before the folder was claimed
    assert np.abs(images(tmp_path).astype(int) - images(reference[0])).max() <= 1
    with pytest.raises(ValueError, match="was made with compile True, not False"):
        draw()
    assert draw("--compile").ms_per_image == 0


def test_what_cannot_be_compiled_leaves_no_folder_behind(draw, tmp_path):
    with pytest.raises(ValueError, match="only schedules of blocks can be compiled, not dopri5"):
        draw("--compile", "--schedule", "dopri5")
    assert not (tmp_path / "a").exists()


def test_a_machine_that_cannot_compile_leaves_no_folder_behind(draw, compiler, tmp_path):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    torch._dynamo.reset()
    with compiler(broken), pytest.raises(ValueError, match="this machine cannot compile"):
        draw("--compile")
    assert not (tmp_path / "a").exists()


def test_the_default_tag_names_the_settings():
    assert SetOptions("[H1R1]x2").folder(SamplingOptions(1.5, seed=3)) == Path("samples/H1R1H1R1-cfg1.5-seed3")


def test_the_originals_flags_are_known(monkeypatch):
    seen = []
    monkeypatch.setattr(sample_set, "make_sample_set", lambda *options: seen.append(options))
    flags = "--vae_ckpt vae-ema --predictor_ckpt a --refiner_ckpt b --num_fid_samples 9 --per_proc_batch_size 3"
    ddp.main([*flags.split(), "--cfg_scale", "1.25", "--tag", "t", "--sample-dir", "d", "--no-png"])
    ddp.main([])
    (options, networks, sampling, _), (defaults, _, default_sampling, _) = seen
    assert (networks.predictor_ckpt, options.num_fid_samples, options.per_proc_batch_size) == ("a", 9, 3)
    assert sampling.cfg_scale == 1.25
    assert (defaults.num_fid_samples, defaults.schedule, default_sampling.cfg_scale) == (50_000, "H1P5R3", 1.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "-1"], "must lie in 0 to 2^64"),
        (["--labels", "sorted"], "invalid choice"),
        (["--num-fid-sample", "9"], "did you mean --num-fid-samples?"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        ddp.main(flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule", "R1"], "cannot start with R"),
        (["--cfg-scale", "inf"], "must be a finite number"),
        (["--features", "pixels", "--features-weights", "x"], "x: no such file"),
        (["--predictor-ckpt", "gone.pt"], "no such file: gone.pt (predictor_ckpt)"),
        (["--num-fid-samples", "0"], "num_fid_samples 0 must be at least 1"),
        (["--per-proc-batch-size", "0"], "per_proc_batch_size 0 must be at least 1"),
        (["--num-fid-samples", "1", "--features", "pixels"], "features need at least 2 images"),
        (["--tag", "a/b"], "must be a word"),
        (["--tag", ""], "must be a word"),
        (["--tag", ".."], "must be a word"),
        (["--features", "vgg"], "features 'vgg': expected inception, pixels, dinov2 or a TorchScript file"),
    ],
    ids=str,
)
def test_wrong_values_are_explained(draw, flags, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        draw(*flags)
    assert message in str(caught.value)
    assert not (tmp_path / "a.npz").exists()


def test_wrong_values_leave_no_folder_behind(draw, tmp_path):
    """Else the corrected command would be refused for its settings."""
    with pytest.raises(SystemExit):
        draw("--seed", 2**64)
    draw("--seed", 1)
    assert images(tmp_path).shape == (COUNT, 8, 8, 3)


def test_statistics_of_parts_merge_to_those_of_the_whole(reference):
    pool = FeatureSet.load(reference[0] / "a-features.npz").pool
    parts = [GaussianStatistics(192) for _ in range(2)]
    parts[0].update(pool[:5])
    parts[1].update(pool[5:])
    parts[0].merge(parts[1])
    torch.testing.assert_close(parts[0].gaussian().covariance, pool.double().T.cov(), atol=1e-10, rtol=0)


def test_the_threads_of_the_machine_change_no_byte(reference, draw, tmp_path, monkeypatch):
    """A sum split over threads has other bits: the run itself says how many compute."""
    archives, computing = [], []
    original = ImageSampler.__call__
    monkeypatch.setattr(ImageSampler, "__call__", lambda *a: computing.append(torch.get_num_threads()) or original(*a))
    for count in (1, 2):
        torch.set_num_threads(count)
        draw("--tag", f"t{count}", "--per-proc-batch-size", 5, "--schedule", "H2")
        assert torch.get_num_threads() == count
        archives.append((tmp_path / f"t{count}.npz").read_bytes())
    assert archives[0] == archives[1]
    assert set(computing) == {1}
    with pytest.raises(ValueError, match="was made with threads 1, not 2"):
        draw("--tag", "t1", "--per-proc-batch-size", 5, "--schedule", "H2", "--threads", 2)


def test_files_that_are_not_of_the_run_are_not_overwritten(draw, tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"mine\.npz is there and not of this run"):
        draw("--tag", "mine")
    assert (tmp_path / "mine.npz").read_bytes() == b"precious"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"notes\.txt is there and not of this run"):
        draw("--tag", "other")


def test_a_set_of_another_autoencoder_is_refused(draw, monkeypatch):
    """By its weights, not by its name: those under a path may have changed."""
    draw("--tag", "decoded")
    monkeypatch.setattr(NoAutoencoder, "fingerprint", lambda self: "other")
    with pytest.raises(ValueError, match="was made with autoencoder_sha256 None, not 'other'"):
        draw("--tag", "decoded")


# ---- folders of earlier versions


@pytest.fixture
def earlier(tmp_path):
    """(a copy of what version 0.1.0 has written, the flags of its sample sets)."""
    folder = tmp_path / "earlier"
    shutil.copytree(Path(__file__).parents[1] / "compatibility" / "v0.1.0", folder)
    flags = [*("--vae-ckpt", "none", "--device", "cpu", "--schedule", "H1P2R1", "--cfg-scale", "1.5")]
    flags += ["--predictor-ckpt", folder / "predictor.safetensors", "--refiner-ckpt", folder / "refiner.safetensors"]
    flags += ["--num-fid-samples", 6, "--per-proc-batch-size", 4, "--sample-dir", folder / "samples"]
    return folder / "samples", list(map(str, flags))


def test_a_complete_set_of_an_earlier_version_is_complete(earlier, capsys):
    _, flags = earlier
    ddp.main([*flags, "--tag", "whole", "--png"])
    assert capsys.readouterr().out.startswith("already complete")
    with pytest.raises(OtherSettings, match="seed 0, not 1"):
        ddp.main([*flags, "--tag", "whole", "--png", "--seed", "1"])


def test_a_set_that_an_earlier_version_began_is_finished(earlier, monkeypatch):
    folder, flags = earlier
    made = interrupt_after(monkeypatch, 99)
    ddp.main([*flags, "--tag", "half"])
    assert made == [4]
    whole, half = images(folder, "whole").astype(int), images(folder, "half")
    assert np.array_equal(whole[:4], half[:4])
    assert np.abs(whole - half).max() <= 1
