import json
import subprocess
import sys
from dataclasses import fields

import pytest
import runs

import train
from flowturbo.training.options import (
    DEFAULTS,
    KINDS,
    DataOptions,
    Optimisation,
    PredictorOptions,
    RefinerOptions,
    TrainingOptions,
    lr_factor,
)
from flowturbo.training.recipe import ENDPOINT_DEFAULTS


def predictor(**more):
    return TrainingOptions("predictor", DataOptions("d"), **more)


def test_what_a_target_leaves_open_is_its_own():
    for target in DEFAULTS:
        options = train.parse(["--target", target, "--data-path", "d", "--model-teacher-ckpt", "t"])
        assert {name: getattr(options.optimisation, name) for name in DEFAULTS[target]} == DEFAULTS[target]
    made = predictor(optimisation=Optimisation(lr=3.0)).optimisation
    assert (made.lr, made.global_batch_size, made.steps) == (3.0, 256, 400_000)


def test_recipe_endpoint_has_defaults_of_its_own_and_its_trajectories_shape_it():
    endpoint = train.parse(["--recipe", "endpoint", "--model-teacher-ckpt", "t"])
    assert endpoint.by_end_points
    own = {name: getattr(endpoint.optimisation, name) for name in ENDPOINT_DEFAULTS}
    assert own == ENDPOINT_DEFAULTS
    shaping = {"schedule", "refiner_step", "trajectories", "reference", "cfg_scale", "cfg_interval", "cfg_every"}
    assert shaping <= endpoint.shaping().keys()
    paper = train.parse(["--data-path", "d", "--model-teacher-ckpt", "t"])
    assert not shaping & paper.shaping().keys()
    assert not predictor(refiner=RefinerOptions(recipe="endpoint")).by_end_points
    assert RefinerOptions(schedule="h1 p1p4 r1") == RefinerOptions(schedule="H1P5R1")


def test_flags_of_both_spellings_are_one_value():
    flags = "--data_path d --model-teacher-ckpt t --weight-decay 0.1 --global_seed 7 --no-flip --exact"
    assert train.parse(flags.split()) == TrainingOptions(
        "refiner",
        DataOptions("d", flip=False),
        RefinerOptions("t"),
        optimisation=Optimisation(wd=0.1, seed=7, exact=True),
    )


def test_the_settings_are_json_and_those_of_earlier_versions():
    """tests/compatibility has a config of version 0.1; what it holds is still there, under the same names."""
    old = json.loads((runs.ROOT / "tests/compatibility/v0.1.0/results/000-predictor-no-note/config.json").read_text())
    settings = predictor().settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings.keys() - old["training"].keys() == {
        *("lr_schedule", "time_distribution", "background", "schedule", "refiner_step", "trajectories", "reference"),
        *("cfg_channels", "cfg_interval", "cfg_every", "check_data", "holdout", "end_points", "wandb"),
    }
    assert old["training"].keys() <= settings.keys()
    assert settings.keys() == {"target"} | {each.name for kind in KINDS.values() for each in fields(kind)}


def test_what_shapes_a_run_has_its_default():
    shaping = predictor().shaping()
    assert shaping.items() >= {"seed": 0, "lr_schedule": "constant", "exact": False, "lr": None, "flip": True}.items()
    assert not shaping.keys() & {"steps", "device", "note", "results_dir", "num_workers", "data_path", "class_map"}
    assert {"steps", "epochs"} <= predictor(optimisation=Optimisation(lr_schedule="cosine")).shaping().keys()
    by_epochs = predictor(optimisation=Optimisation(lr_schedule="cosine", epochs=2)).shaping()
    assert "epochs" in by_epochs
    assert "steps" not in by_epochs


def test_epochs_are_passes_over_the_data():
    optimisation = predictor(optimisation=Optimisation(epochs=2, global_batch_size=5)).optimisation
    assert optimisation.over(16).steps == 7
    assert optimisation.over(5).steps == 2
    assert predictor(optimisation=Optimisation(steps=9)).optimisation.over(16).steps == 9


def test_the_learning_rate_rises_then_stays_or_falls_to_nothing():
    constant = [lr_factor(step, 9, 4) for step in range(1, 10)]
    assert constant == [0.25, 0.5, 0.75] + [1.0] * 6
    cosine = [lr_factor(step, 8, 4, "cosine") for step in range(1, 9)]
    assert cosine[:4] == constant[:4]
    assert cosine[4:] == pytest.approx([0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert lr_factor(3, 3, schedule="cosine") == 0
    assert [lr_factor(step, 4, 4, "cosine") for step in (1, 4)] == [0.25, 1]  # a run that is all warm-up
    assert Optimisation(lr=2.0, steps=8, warmup=4, lr_schedule="cosine").rate(6) == pytest.approx(1.0)


def test_a_size_by_name_and_what_stands_in_its_place():
    named = {"patch_size": 4, "hidden_size": 384, "depth": 12, "num_heads": 6}
    assert PredictorOptions(model="SiT-S/4").size() == named
    assert PredictorOptions(model="SiT-S/4", depth=3).size() == {**named, "depth": 3}


HUGE = 2**64
PREDICTOR = ["--data-path", "x", "--target", "predictor"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "x"], "target refiner needs model_teacher_ckpt, the trained predictor"),
        (["--target", "predictor"], "target predictor needs data_path, the images; only recipe endpoint does without"),
        (["--data-path", "x", "--data_pth", "y"], "unrecognized arguments: --data-pth y; did you mean --data-path?"),
        (["--data-path", "x", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--data-path", "x", "--target", "both"], "invalid choice: 'both'"),
        (["--data-path", "x", "--model-teacher-ckpt", "y", "--path-type", "vp"], "expected path_type linear"),
        (
            ["--data-path", "x", "--model-teacher-ckpt", "y", "--time-distribution", "logit-normal"],
            "expected time_distribution uniform",
        ),
        ([*PREDICTOR, "--steps", "3", "--epochs", "3"], "steps and epochs are two ways to say one thing"),
        *(
            ([*PREDICTOR, flag, str(value)], flag[2:].replace("-", "_"))
            for flag, value in [
                *(("--steps", 0), ("--epochs", 0), ("--global-batch-size", -1), ("--accumulate", 0)),
                *(("--log-every", 0), ("--ckpt-every", 0), ("--image-size", 0), ("--num-workers", -1)),
                *(("--warmup", -1), ("--sample-every", -1), ("--class-dropout", 1), ("--class-dropout", "nan")),
                *(("--ema-decay", 1), ("--ema-decay", -0.1), ("--lr", 0), ("--lr", "nan"), ("--lr", "inf")),
                *(("--wd", -1), ("--wd", "inf"), ("--clip-grad", 0), ("--note", "a/b"), ("--note", "..")),
                *(("--max-hours", 0), ("--max-hours", "nan"), ("--keep-last", -1), ("--keep-every", -1)),
                *(("--patch-size", 0), ("--depth", -1), ("--hidden-size", 0), ("--num-heads", 0)),
                *(
                    ("--background", "blue"),
                    ("--num-classes", 0),
                    ("--max-dt", 1.5),
                    ("--max-dt", 0),
                    ("--subset", 0),
                    ("--subset", 1.5),
                ),
            ]
        ),
        *(
            ([*PREDICTOR, flag, str(value)], f"argument {flag}: ")
            for flag, value in [
                *(("--channels", 2), ("--model", "SiT-M/2"), ("--precision", "fp8"), ("--path-type", "cosine")),
                *(("--lr-schedule", "linear"), ("--time-distribution", "normal"), ("--recipe", "none")),
            ]
        ),
        ([*PREDICTOR, "--seed", "-1"], "argument --seed/--global-seed: -1 must lie in 0 to 2^64 - 1"),
        ([*PREDICTOR, "--seed", str(HUGE)], f"argument --seed/--global-seed: {HUGE} must lie in"),
        ([*PREDICTOR, "--cfg-scale", "nan"], "cfg scale nan must be a finite number"),
        ([*PREDICTOR, "--cfg-scale", "-1"], "cfg scale -1.0 must be"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_line_that_names_it(flags, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        train.parse(flags)
    error = str(caught.value)
    if isinstance(caught.value, SystemExit):
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.count("\n") == 1
    assert message in error


def test_values_from_python_are_checked_too():
    with pytest.raises(ValueError, match="model 'SiT-M/2' must be one of SiT-S/2, "):
        PredictorOptions(model="SiT-M/2")
    with pytest.raises(ValueError, match="target 'both' must be one of refiner, predictor"):
        TrainingOptions("both", DataOptions("d"))
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        Optimisation(steps=0)


def test_a_mistyped_flag_costs_no_import_of_torch():
    code = "import sys, train\ntry: train.parse(['--steps', 'x'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, check=True, timeout=60)
