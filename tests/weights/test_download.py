import re

import pytest
import torch

import download
import export
from flowturbo.system.advice import advice_for
from flowturbo.weights import checkpoint
from flowturbo.weights.registry import ASSETS


def test_the_list(tmp_path, capsys):
    cache = tmp_path / "elsewhere"
    cache.mkdir()
    (cache / "SiT-XL-2-256x256.pt").write_bytes(bytes(2_700_000))
    (cache / ".VIRTUAL_imagenet256_labeled.npz.part").write_bytes(bytes(12_345))
    download.main(["--cache_dir", str(cache)])
    text = capsys.readouterr().out
    assert str(cache) in text
    assert re.search(r"^sit-xl-2-256 +2\.7 MB +here$", text, re.MULTILINE)
    assert re.search(r"^sit-xl-2-refiner +about 119\.0 MB +not here$", text, re.MULTILINE)
    assert re.search(r"^adm-imagenet-256 +2\.04 GB +incomplete, 0\.0 MB so far$", text, re.MULTILINE)
    assert re.search(r"^inception +95\.6 MB +not here$", text, re.MULTILINE)
    for asset in ASSETS.values():
        assert f"{asset.path}; licence: {asset.licence}" in text
    for source in ("huggingface.co/nyu-visionx", "www.dl.dropboxusercontent.com", "cloud.tsinghua.edu.cn"):
        assert source in text


def test_the_script_downloads_what_it_can(tmp_path, capsys):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "SiT-XL-2-256x256.pt").write_bytes(b"weights")
    download.main(["sit-xl-2-256", "--offline"])
    assert capsys.readouterr().out == f"sit-xl-2-256: {cache / 'SiT-XL-2-256x256.pt'}\n"
    with pytest.raises(ValueError, match=r"5 of 6 not downloaded: sit-xl-2-refiner, vae-ema, "):
        download.main(["all", "--offline"])
    output = capsys.readouterr()
    assert output.out.startswith("sit-xl-2-256: ")
    assert output.err.count("downloads are off") == 5


def test_what_cannot_be_had_is_told_with_what_helps(tmp_path):
    with pytest.raises(ValueError, match=r"^SiT-XL-2-Refiner.pt is not in .*, and downloads are off$") as caught:
        download.main(["SiT-XL-2-Refiner.pt", "--cache-dir", str(tmp_path), "--offline"])
    assert "run `python download.py sit-xl-2-refiner` with a connection" in advice_for(caught.value)
    assert "--refiner-ckpt FILE" in advice_for(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vae-emma"], "nothing is called 'vae-emma': expected sit-xl-2-256, .*did you mean vae-ema"),
        (["--cache_dir", "{}/file/x", "vae-ema"], "cannot use the cache folder '.*file/x"),
        (["--ofline"], "did you mean --offline"),
        (["--cache-dir"], "expected one argument"),
        (["export", "--dtype", "fp8", "x", "-o", "y.pt"], r"invalid choice: 'fp8'.* \(see download.py export --help"),
        (["export"], "required: RUN, --out/-o"),
    ],
)
def test_wrong_command_lines_are_one_line(argv, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        download.main([argument.format(tmp_path) for argument in argv])
    text = capsys.readouterr().err or f"{caught.value}\n"
    assert re.search(message, text)
    assert text.count("\n") == 1


def test_export_is_known_by_its_earlier_name(monkeypatch):
    calls = []
    monkeypatch.setattr(export, "main", lambda *args, **names: calls.append((args, names)))
    download.main(["export", "run", "-o", "x.pt"])
    assert calls == [((["run", "-o", "x.pt"],), {"prog": "download.py export"})]


def test_find_model_is_importable_as_in_the_original_release(run):
    """from download import find_model"""
    path = run / "checkpoints" / "0000040.pt"
    weights, expected = download.find_model(path), checkpoint.find_model(path)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as done:
        download.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for word in ("python download.py export", "cache", "--offline", "find_model"):
        assert word in text
