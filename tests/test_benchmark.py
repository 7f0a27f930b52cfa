import json

import pytest

import benchmark


def test_the_training_benchmark_compares_like_with_like(tmp_path, capsys):
    out = tmp_path / "train.json"
    tiny = ["--model", "SiT-S/4", "--depth", "1", "--image-size", "64", "--repeats", "2", "--device", "cpu"]
    benchmark.main(["--train", *tiny, "--json", str(out)])
    online, cached = json.loads(out.read_text())["rows"]
    assert [online["variant"], cached["variant"]] == ["online encoding", "cached latents"]
    assert cached["loss"] == pytest.approx(online["loss"], rel=1e-3)
    assert online["loss"] > 0
    assert cached["ratio"] == pytest.approx(online["seconds"] / cached["seconds"])
    assert "torch.float32; SiT-S/4 with 1 blocks, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--train", "--repeats", "0"], ["--train", "--image-size", "100"]])
def test_bad_flags_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
