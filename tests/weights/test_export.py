import hashlib
from pathlib import Path

import pytest
import torch

import export
from flowturbo.models import SiT
from flowturbo.networks.load import load_network, load_with_info, model_config
from flowturbo.refiner import VelocityRefiner
from flowturbo.training.options import DataOptions, PredictorOptions, TrainingOptions
from flowturbo.weights.checkpoint import load_checkpoint, save_checkpoint
from flowturbo.weights.export import UploadFailed, export_weights
from flowturbo.weights.info import without_folders


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_export_loads_as_it_is(run, refiner, tmp_path, batch, suffix, capsys):
    out = tmp_path / "new" / f"mine{suffix}"
    export.main([str(run), "-o", str(out)])
    assert str(out) in capsys.readouterr().out
    loaded = load_network(VelocityRefiner, str(out))
    assert loaded.config == refiner.config
    x, y = batch(3)
    t = torch.full((3,), 0.5)
    assert torch.equal(loaded(x, t, -x, y), refiner(x, t, -x, y))
    content = load_checkpoint(out)
    assert content.keys() == {"ema", "config"}
    assert content["config"]["step"] == 40
    assert content["config"]["training"]["data_path"] == "photos"
    assert b"someone" not in out.read_bytes()
    with pytest.raises(ValueError, match="holds a VelocityRefiner, expected a SiT"):
        load_network(SiT, str(out))
    again = tmp_path / "again.safetensors"  # an export can be exported
    export.main([str(out), "-o", str(again)])
    assert load_checkpoint(again)["config"] == content["config"]


def test_a_model_card(run, tmp_path):
    out = tmp_path / "mine.safetensors"
    export.main([str(run / "checkpoints" / "0000005.pt"), "-o", str(out), "--dtype", "fp16"])
    text = out.with_suffix(".md").read_text()
    assert "FlowTurbo velocity refiner: averaged (EMA) weights after 5 steps, float16" in text
    assert "--predictor-ckpt PREDICTOR --refiner-ckpt mine.safetensors --schedule H1P5R3 --vae-ckpt vae-ema" in text
    assert hashlib.sha256(out.read_bytes()).hexdigest() in text
    assert "| hidden_size | 32 |" in text
    assert "| lr | 5e-05 |" in text
    assert "someone" not in text
    assert "| note |" not in text
    weights = load_checkpoint(out)["ema"]
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_a_predictor_is_exported_too(predictor, tmp_path):
    config = {"model": model_config(predictor), "training": {}}
    save_checkpoint(tmp_path / "run.pt", {"ema": predictor.state_dict(), "step": 7, "config": config})
    export.main([str(tmp_path / "run.pt"), "-o", str(tmp_path / "p.safetensors")])
    assert load_network(SiT, str(tmp_path / "p.safetensors")).config == predictor.config
    assert "python sample.py --predictor-ckpt p.safetensors --schedule H8" in (tmp_path / "p.md").read_text()


def card_of(predictor, tmp_path, training, **config):
    """The card of an exported predictor."""
    config = {"model": model_config(predictor), "training": {"target": "predictor", **training}, **config}
    save_checkpoint(tmp_path / "run.pt", {"ema": predictor.state_dict(), "step": 7, "config": config})
    export.main([str(tmp_path / "run.pt"), "-o", str(tmp_path / "p.safetensors")])
    return (tmp_path / "p.md").read_text()


@pytest.mark.parametrize("name", ["data_path", "class_map", "model_teacher_ckpt", "vae_ckpt", "resume"])
@pytest.mark.parametrize(
    "value", ["/home/me/secret/x", "../../secret/x", "secret/y/x", "~/secret/x/", r"C:\Users\secret\x", "./secret/x"]
)
def test_no_path_reaches_an_export(predictor, tmp_path, name, value):
    text = card_of(
        predictor, tmp_path, {name: value, "lr": 1e-4}, data={"roots": [value] if value[0] in "/.~C" else []}
    )
    assert "secret" not in text
    assert b"secret" not in (tmp_path / "p.safetensors").read_bytes()
    assert "lr" in text


def test_names_on_the_hub_and_of_models_are_no_paths():
    settings = {"vae_ckpt": "stabilityai/sd-vae-ft-mse", "model": "SiT-XL/2", "data_path": "a/b", "classes": ["a/b"]}
    assert without_folders(settings) == {**settings, "data_path": "b"}


def test_a_card_lists_the_settings_of_its_own_network(predictor, tmp_path):
    options = TrainingOptions("predictor", DataOptions("d"), predictor=PredictorOptions(hidden_size=32))
    text = card_of(predictor, tmp_path, options.settings())
    for foreign in ("max_dt", "recipe", "teacher", "SiT-XL/2", "results_dir", "resume"):
        assert foreign not in text
    for own in ("path_type", "time_distribution", "lr", "global_batch_size", "num_classes"):
        assert f"| {own} |" in text
    assert export.says_nothing()["VelocityRefiner"] >= {"time_distribution", "hidden_size"}
    assert export.says_nothing()["VelocityRefiner"].isdisjoint({"max_dt", "path_type", "lr"})


def test_a_card_says_which_classes_there_are(predictor, tmp_path):
    names = ["cat", *(f"c{k}" for k in range(8)), "<script>|`\x1b[2J"]
    text = card_of(predictor, tmp_path, {}, classes=names, class_counts=list(range(10)))
    assert "unconditional" not in text
    assert "tags: [flowturbo, flow-matching, class-conditional-image-generation]" in text
    assert "It makes images of 10 classes." in text
    assert "| 0: cat | 0 images |" in text
    assert r"| 9: \<script\>\|\`\\x1b\[2J | 9 images |" in text


def test_a_model_of_one_class_is_unconditional(tmp_path):
    alone = SiT(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=4, num_classes=1)
    assert "pipeline_tag: unconditional-image-generation" in card_of(alone, tmp_path, {})


def test_settings_that_print_for_ever_are_refused(predictor, tmp_path):
    laughs = (0,)
    for _ in range(60):
        laughs = (laughs, laughs)
    with pytest.raises(ValueError, match=r"its config holds more than"):
        card_of(predictor, tmp_path, {"lr": laughs})
    with pytest.raises(ValueError, match=r"its config holds more than"):
        card_of(predictor, tmp_path, {}, note=laughs)


def damaged(name, tmp_path, newest, refiner):
    """A checkpoint that cannot be exported."""
    content = load_checkpoint(newest)
    content = {
        "plain": refiner.state_dict(),
        "huge": {**content, "ema": {name: value * 1e6 for name, value in content["ema"].items()}},
        "nan": {**content, "ema": {name: value * torch.nan for name, value in content["ema"].items()}},
        "other": {**content, "config": {"model": {**content["config"]["model"], "depth": 2}}},
        "unknown": {**content, "config": {"model": {"class": "DiT"}}},
        "broken": {**content, "config": [1]},
    }[name]
    save_checkpoint(tmp_path / f"{name}.pt", content)
    return tmp_path / f"{name}.pt"


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("run", "x.bin", r"x\.bin' must end in \.safetensors or \.pt"),
        ("empty", "x.pt", r"holds no checkpoint: expected .*/checkpoints/NUMBER\.pt"),
        ("nothing", "x.pt", "nothing' does not exist"),
        ("plain", "x.pt", "plain.pt' holds no config"),
        ("unknown", "x.pt", "unknown.pt' holds no config"),
        ("broken", "x.pt", "broken.pt' is damaged: its config is no table"),
        ("other", "x.pt", "other.pt' does not fit this VelocityRefiner: no blocks.1"),
        ("nan", "x.pt", "nan.pt' does not fit this VelocityRefiner: .* is not finite"),
        ("huge", "x.pt", r"weights of .*huge.pt' leave the range of torch.float16"),
        ("run", "file/x.pt", "cannot write '.*file/x.pt'"),
        ("run", "x.pt --push-to-hub mine", "push_to_hub 'mine' must be OWNER/NAME"),
    ],
)
def test_what_cannot_be_exported(run, refiner, tmp_path, source, out, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    if source in ("plain", "unknown", "broken", "other", "nan", "huge"):
        path = damaged(source, tmp_path, run / "checkpoints" / "0000040.pt", refiner)
    else:
        path = run if source == "run" else tmp_path / source
    out, *flags = out.split()
    with pytest.raises((ValueError, OSError), match=message):
        export.main([str(path), "-o", str(tmp_path / out), "--dtype", "fp16", *flags])
    assert not list(tmp_path.glob("x*"))


class Hub:
    """What stands in for huggingface_hub.HfApi."""

    calls = ()

    def create_repo(self, repository, private, exist_ok):
        Hub.calls = [("create", repository, private, exist_ok)]

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        Hub.calls.append((Path(path_or_fileobj).name, path_in_repo, repo_id))


def test_push_to_hub(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    out = tmp_path / "mine.safetensors"
    export.main([str(run), "-o", str(out), "--push-to-hub", "me/mine", "--private"])
    assert Hub.calls == [
        ("create", "me/mine", True, True),
        ("mine.safetensors", "mine.safetensors", "me/mine"),
        ("mine.md", "README.md", "me/mine"),
    ]
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out

    def refuse(*args, **kwargs):
        raise RuntimeError("401\nunauthorized")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(UploadFailed, match=r"^cannot upload .*mine.safetensors to me/mine: 401 unauthorized$"):
        export.main([str(run), "-o", str(out), "--push-to-hub", "me/mine"])


def test_an_export_keeps_what_the_settings_say_of_sampling(run, tmp_path):
    info = export_weights(run, tmp_path / "mine.safetensors")
    assert (info.path, info.step, info.path_type) == (tmp_path / "mine.safetensors", 40, "gvp")
    assert load_with_info(VelocityRefiner, str(tmp_path / "mine.safetensors"))[1] == info


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as done:
        export.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for word in ("python export.py", "--push-to-hub", "python sample.py --refiner-ckpt refiner.safetensors"):
        assert word in text
