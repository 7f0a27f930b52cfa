"""Where a run goes on, what it may not change meanwhile, and runs of earlier versions."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch

import train
from flowturbo.data.folders import ClassFolder
from flowturbo.system.advice import advice_for
from flowturbo.system.files import InUse, exclusive
from flowturbo.training import resume
from flowturbo.training.options import DataOptions, Optimisation, OutputOptions, PredictorOptions, TrainingOptions
from flowturbo.training.resume import TrainedOtherwise, claimed, new_folder, refuse_changes
from flowturbo.weights.checkpoint import CheckpointFolder, load_checkpoint
from flowturbo.weights.info import without_folders

OLD = runs.ROOT / "tests" / "compatibility" / "v0.1.0"


def save(results, name, *steps):
    """Checkpoints of a run, which hold nothing."""
    folder = CheckpointFolder(results / name / "checkpoints")
    for step in steps:
        path = folder.path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        folder.record(path, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881")
    return folder


def chosen(results, target="predictor", note="a", resume=None):
    warnings = []
    output = OutputOptions(results_dir=str(results), note=note, resume=resume and str(resume))
    with claimed(output, target, warnings.append) as (folder, checkpoint):
        pass
    return folder.relative_to(results).as_posix(), checkpoint and checkpoint.name, warnings


def test_a_new_run_has_the_next_number(tmp_path):
    assert chosen(tmp_path) == ("000-predictor-a", None, [])
    for name in ("007-refiner-x", "notes-1", "12x-refiner", "2"):
        (tmp_path / name).mkdir()
    assert chosen(tmp_path) == ("008-predictor-a", None, [])


def test_auto_goes_on_with_the_newest_whole_checkpoint_of_target_and_note(tmp_path):
    assert chosen(tmp_path, resume="auto") == ("000-predictor-a", None, [])
    save(tmp_path, "000-predictor-a", 5)
    save(tmp_path, "001-predictor-a", 2, 3)
    save(tmp_path, "002-predictor-refiner-a", 9)
    save(tmp_path, "003-refiner-a", 9)
    assert chosen(tmp_path, resume="auto") == ("001-predictor-a", "0000003.pt", [])
    (tmp_path / "001-predictor-a" / "checkpoints" / "0000003.pt").write_bytes(b"other")
    folder, checkpoint, warnings = chosen(tmp_path, resume="auto")
    assert (folder, checkpoint) == ("001-predictor-a", "0000002.pt")
    assert "0000003.pt is missing or damaged" in warnings[0]
    assert chosen(tmp_path, "refiner", "refiner-a", resume="auto") == ("004-refiner-refiner-a", None, [])


def test_numbers_of_runs_are_no_texts_and_one_without_a_checkpoint_is_passed_over(tmp_path):
    save(tmp_path, "999-predictor-a", 900)
    save(tmp_path, "1000-predictor-a", 9, 10)
    (tmp_path / "1001-predictor-a" / "checkpoints").mkdir(parents=True)
    assert chosen(tmp_path, resume="auto") == ("1000-predictor-a", "0000010.pt", [])


def test_who_waits_for_a_run_goes_on_from_what_it_has_saved_meanwhile(tmp_path):
    """Of its first checkpoint too."""
    for name, steps in (("000-predictor-a", [1]), ("000-predictor-b", [])):
        save(tmp_path, name, *steps)
        (tmp_path / name).mkdir(exist_ok=True)
        held = ExitStack()
        held.enter_context(exclusive(tmp_path / name))

        def end(name=name, held=held):
            save(tmp_path, name, 2)
            held.close()

        threading.Timer(0.3, end).start()
        assert chosen(tmp_path, note=name[-1], resume="auto") == (name, "0000002.pt", [])


def test_a_named_checkpoint_that_was_the_latest_until_the_lock_fell_begins_a_new_run(tmp_path):
    folder = save(tmp_path, "000-predictor-a", 1)
    held = ExitStack()
    held.enter_context(exclusive(tmp_path / "000-predictor-a"))
    threading.Timer(0.3, lambda: (save(tmp_path, "000-predictor-a", 2), held.close())).start()
    assert chosen(tmp_path, resume=folder.path(1)) == ("001-predictor-a", "0000001.pt", [])


def test_runs_that_begin_at_once_take_other_numbers(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda k: new_folder(tmp_path, f"predictor-{k % 4}"), range(24)))
    numbers = [folder.name.partition("-")[0] for folder in folders]
    assert len(set(numbers)) == 24
    assert {path.name for path in tmp_path.iterdir()} == {folder.name for folder in folders}


def test_a_run_that_is_refused_writes_nothing(data, tmp_path, monkeypatch):
    flags = [*runs.PREDICTOR, "--data-path", data]
    folder = runs.run(tmp_path, *flags, "--steps", 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(resume, "PATIENCE", 0.1)
    with exclusive(folder), pytest.raises(InUse, match=r"000-predictor-no-note' is in use by another run"):
        runs.run(tmp_path, *flags, "--steps", 2, "--resume", "auto")
    for named in (
        "auto",
        folder / "checkpoints" / "0000001.pt",
        shutil.copy(folder / "checkpoints/0000001.pt", data.parent),
    ):
        with pytest.raises(TrainedOtherwise, match=r"lr 0\.001, not 1\.0"):
            runs.run(tmp_path, *flags, "--steps", 2, "--resume", named, "--lr", 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_named_checkpoint_goes_on_in_its_folder_if_nothing_came_after_it(tmp_path):
    folder = save(tmp_path, "000-predictor-a", 2, 3)
    assert chosen(tmp_path, note="b", resume=folder.path(3)) == ("000-predictor-a", "0000003.pt", [])
    assert chosen(tmp_path, note="b", resume=folder.path(2)) == ("001-predictor-b", "0000002.pt", [])
    assert chosen(tmp_path, note="b", resume=tmp_path / "000-predictor-a") == ("000-predictor-a", "0000003.pt", [])
    alone = shutil.copy(folder.path(3), tmp_path / "0000003.pt")
    assert chosen(tmp_path, note="b", resume=alone) == ("001-predictor-b", "0000003.pt", [])


# ---- changes


OPTIONS = TrainingOptions("predictor", DataOptions("d"), optimisation=Optimisation(warmup=5))


def record(options=OPTIONS, **more):
    content = {"data": None, "teacher": None, "autoencoder": None, "made_by": {"torch": "2.9", "code": "a"}}
    return {"model": {"depth": 1}, "training": options.settings(), **content, **more}


@pytest.fixture
def change(data):
    """change(now, before, **now's record): go on with other options; on the same images."""
    opened = ClassFolder(data, 8, 1)

    def refuse(now=OPTIONS, before=None, **more):
        same = record(data=opened.identity().record())
        refuse_changes(same if before is None else before, record(now, **more), now, opened, Path("c.pt"))

    return refuse


def without(*names):
    return record(training={name: value for name, value in OPTIONS.settings().items() if name not in names})


def test_what_does_not_shape_a_run_may_change(change):
    other = replace(OPTIONS, output=OutputOptions(note="other"), data=DataOptions("elsewhere", num_workers=0))
    change(replace(other, optimisation=replace(OPTIONS.optimisation, steps=9)))
    change(replace(OPTIONS, data=DataOptions("d", class_map="elsewhere.json", vae_ckpt="the-same")))
    change(before=record(made_by={"torch": "2.9", "code": "b"}))
    exact = replace(OPTIONS, optimisation=replace(OPTIONS.optimisation, exact=True, accumulate=2))
    change(exact, before=record(replace(exact, optimisation=replace(exact.optimisation, accumulate=1))))
    change(before={})
    change(before={"model": {"depth": 1}, "training": {}, "data": None})
    change(before=without("lr_schedule", "time_distribution", "compile", "background"))
    change(before=record(classes=["cat"], a_key_of_later=1))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (replace(OPTIONS, data=DataOptions("d", flip=False)), "flip True, not False"),
        (replace(OPTIONS, optimisation=replace(OPTIONS.optimisation, lr=2.0)), "lr 0.0001, not 2.0"),
        (
            replace(OPTIONS, optimisation=replace(OPTIONS.optimisation, warmup=0, seed=4)),
            "warmup 5, not 0; seed 0, not",
        ),
        (replace(OPTIONS, optimisation=replace(OPTIONS.optimisation, accumulate=2)), "accumulate 1, not 2"),
        (replace(OPTIONS, predictor=PredictorOptions(time_distribution="logit-normal")), "time_distribution 'uniform'"),
    ],
)
def test_what_shapes_a_run_may_not(change, now, message):
    with pytest.raises(TrainedOtherwise, match=rf"^checkpoint 'c\.pt' was trained otherwise: .*{message}") as caught:
        change(now)
    assert advice_for(caught.value) == "; --allow-changes goes on all the same"


def test_a_setting_that_came_later_had_its_default(change):
    now = replace(OPTIONS, predictor=PredictorOptions(time_distribution="logit-normal"))
    with pytest.raises(TrainedOtherwise, match="time_distribution 'uniform', not 'logit-normal'"):
        change(now, before=without("time_distribution"))


def test_the_length_of_a_cosine_may_not_change(change):
    cosine = replace(OPTIONS, optimisation=replace(OPTIONS.optimisation, lr_schedule="cosine", steps=6))
    change(cosine, before=record(cosine))
    for other in (replace(cosine.optimisation, steps=9), replace(cosine.optimisation, steps=None, epochs=2)):
        with pytest.raises(TrainedOtherwise, match=r"trained otherwise: (steps 6, not 9|epochs None, not 2)$"):
            change(replace(cosine, optimisation=other), before=record(cosine))


def test_data_teacher_and_network_may_not_change(change):
    with pytest.raises(TrainedOtherwise, match="the data have other images; the teacher has other weights; the netw"):
        change(before=record(data="b", teacher="t"), model={"depth": 2, "patch_size": 2})
    with pytest.raises(TrainedOtherwise, match=r"the network has another depth, patch_size$"):
        change(model={"depth": 2, "patch_size": 2})


def test_the_autoencoder_and_torch_may_not_change(change):
    with pytest.raises(TrainedOtherwise, match=r"the autoencoder has other weights; torch was '2\.8', is '2\.9'"):
        change(before=record(autoencoder="other", made_by={"torch": "2.8", "code": "a"}))


def test_what_a_record_of_an_earlier_version_does_not_hold_is_compared_by_its_path(change):
    now = replace(OPTIONS, data=DataOptions("d", class_map="b.json", vae_ckpt="other"))
    old = {name: value for name, value in record().items() if name not in ("autoencoder", "made_by")}
    with pytest.raises(TrainedOtherwise, match=r"vae_ckpt 'vae-ema', not 'other'; class_map None, not 'b\.json'"):
        change(now, before=old)


def test_an_edited_class_map_is_told_and_a_moved_one_is_not(data, tmp_path):
    flags = [*runs.PREDICTOR, "--data-path", data, "--num-classes", 3]
    for name, indices in (("a", (0, 1)), ("b", (0, 1)), ("c", (0, 2))):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(zip(("c0", "c1"), indices))))
    runs.run(tmp_path / "r", *flags, "--steps", 1, "--class-map", tmp_path / "a.json")
    runs.run(tmp_path / "r", *flags, "--steps", 2, "--class-map", tmp_path / "b.json", "--resume", "auto")
    with pytest.raises(TrainedOtherwise, match="the images have other classes"):
        runs.run(tmp_path / "r", *flags, "--steps", 3, "--class-map", tmp_path / "c.json", "--resume", "auto")


@pytest.mark.parametrize(
    "before",
    [
        *({"training": 3}, {"training": [1]}, {"training": {"lr": torch.ones(2)}}, {"model": 3}),
        *({"model": {"depth": torch.ones(2)}}, {"data": torch.ones(2)}, {"data": {"fingerprint": torch.ones(2)}}),
        {"data": {"rules": {"order": torch.ones(2)}}},
    ],
    ids=str,
)
def test_a_damaged_record_is_told(change, before):
    with pytest.raises(TrainedOtherwise, match=r"'c\.pt' is damaged: its config holds no settings$"):
        change(before=record() | before)


# ---- runs of earlier versions


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A run of version 0.1.0 that stopped at step 4 of 8, with its images beside it; and its flags."""
    for name in ("results", "images"):
        shutil.copytree(OLD / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    settings = json.loads((OLD / "results" / "000-predictor-no-note" / "config.json").read_text())["training"]
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags += [f"--{flag}"] if value else [f"--no-{flag}"]
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


def test_a_run_of_version_0_1_goes_on(old_run):
    """The release's own step 8 is there as an export of its EMA."""
    train.main([*old_run, "--resume", "auto"])
    (folder,) = Path("results").iterdir()
    assert "steps 4 to 8" in (folder / "log.txt").read_text()
    ours = load_checkpoint(folder / "checkpoints" / "0000008.pt")
    theirs = load_checkpoint(OLD / "predictor.safetensors")
    assert ours["step"] == 8
    assert ours["ema"].keys() == theirs["ema"].keys()
    for name, value in theirs["ema"].items():
        torch.testing.assert_close(ours["ema"][name], value, atol=1e-5, rtol=1e-5)
    with pytest.raises(TrainedOtherwise, match="lr_schedule 'constant', not 'cosine'"):
        train.main(
            [*old_run, "--resume", "results/000-predictor-no-note/checkpoints/0000004.pt", "--lr-schedule=cosine"]
        )


def test_other_images_are_told(old_run):
    Path("images/cat/0.png").unlink()
    with pytest.raises(TrainedOtherwise, match="the data have other images"):
        train.main([*old_run, "--resume", "auto"])
    train.main([*old_run, "--resume", "auto", "--allow-changes", "--steps", "5"])
    assert Path("results/000-predictor-no-note/checkpoints/0000005.pt").is_file()


def test_a_run_goes_on_from_a_checkpoint_that_holds_the_last_parts_of_paths(data, change):
    opened = ClassFolder(data, 8, 1)
    given = replace(OPTIONS.data, vae_ckpt="/home/me/vae", class_map="../maps/mine.json")
    now = replace(OPTIONS, data=given)
    before = without_folders(record(now, data=opened.identity().record()))
    del before["autoencoder"]  # as earlier versions left it: the name is all there is
    assert before["training"]["vae_ckpt"] == "vae"
    change(now, before)
    with pytest.raises(TrainedOtherwise, match="vae_ckpt 'vae', not 'other'"):
        change(replace(OPTIONS, data=replace(given, vae_ckpt="/home/me/other")), before)
