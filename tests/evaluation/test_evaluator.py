import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import evaluator
from flowturbo.evaluation import METRICS, Features, FeatureSet, sides
from flowturbo.evaluation.extractors import INCEPTION_IDENTITY
from flowturbo.system.cli import run_script

DIGITS = "0.282"  # the pixel Fréchet distance between the even and the odd rows of scikit-learn's digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Even rows as grey PNGs and as RGB, odd rows as grey and as RGB archives."""
    folder = tmp_path_factory.mktemp("digits")
    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    (folder / "even").mkdir()
    for index, image in enumerate(images[::2]):
        Image.fromarray(image).save(folder / "even" / f"{index:06d}.png")
    for name, half in (("even", images[::2]), ("odd", images[1::2])):
        np.savez(folder / f"{name}-grey.npz", arr_0=half[..., None])
        np.savez(folder / f"{name}-rgb.npz", arr_0=half[..., None].repeat(3, axis=3))
    return folder


def measure(*arguments, folder):
    report = folder / "report.json"
    evaluator.main([*map(str, arguments), "--json", str(report)])
    return json.loads(report.read_text())


@pytest.mark.parametrize(
    ("reference", "samples"), [("even", "odd-grey.npz"), ("even", "odd-rgb.npz"), ("odd-rgb.npz", "even-grey.npz")]
)
def test_digits(digits, tmp_path, reference, samples, capsys):
    report = measure(digits / reference, digits / samples, "--extractor", "pixels", "--bootstrap", 5, folder=tmp_path)
    metrics = report["metrics"]
    assert f"{metrics['FID']['value']:.3f}" == DIGITS
    assert tuple(metrics) == METRICS
    for name in ("FID", "Precision", "Recall", "KID"):
        assert metrics[name]["standard_error"] > 0
        assert metrics[name]["reason"] is None
    for name in ("sFID", "Inception Score"):
        assert metrics[name]["value"] is None
    assert report["extractor"] == "pixels"
    assert report["samples"]["N"] == (899 if samples.startswith("even") else 898)
    output = capsys.readouterr()
    assert f"{metrics['FID']['value']:.6g}" in output.out
    assert "no logits on the sample side" in output.out
    assert "samples: below 50000" in output.err


def test_statistics_stand_for_images(digits, tmp_path, capsys):
    statistics, features = tmp_path / "stats.npz", tmp_path / "features.npz"
    evaluator.main(["stats", str(digits / "even"), "-o", str(statistics), "--extractor", "pixels"])
    odd = ["stats", str(digits / "odd-rgb.npz"), "--output", str(features), "--extractor=pixels"]
    evaluator.main([*odd, "--features", "--labels", "balanced"])
    assert sorted(np.load(statistics).files) == ["count", "extractor", "mu", "sigma", "source"]
    from_images = measure(digits / "even", digits / "odd-rgb.npz", "--extractor", "pixels", folder=tmp_path)
    from_files = measure(statistics, features, folder=tmp_path)  # the extractor is that of the files
    mixed = measure(features, digits / "even", folder=tmp_path)
    value = from_images["metrics"]["FID"]["value"]
    assert from_files["metrics"]["FID"]["value"] == pytest.approx(value, rel=1e-9)
    assert mixed["metrics"]["FID"]["value"] == pytest.approx(value, rel=1e-6)
    assert mixed["metrics"]["Recall"]["value"] == from_images["metrics"]["Precision"]["value"]
    assert from_files["metrics"]["Precision"]["reason"] == "no features on the reference side"
    assert from_files["samples"]["labels"] == "balanced"
    assert "labels balanced" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with labels 'balanced', not 'random'"):
        evaluator.main([str(statistics), str(features), "--labels", "random"])
    with pytest.raises(ValueError, match="holds statistics only"):
        evaluator.main(["stats", str(statistics), "-o", str(features), "--features"])


def test_a_report_goes_into_a_new_folder_and_is_there_before_the_table(digits, tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    monkeypatch.setattr(evaluator, "tell", lambda *_: None)
    with pytest.raises(BrokenPipeError):
        measure(digits / "even", digits / "even", "--extractor", "pixels", folder=tmp_path / "new" / "folder")
    report = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert report["metrics"]["FID"]["value"] == pytest.approx(0, abs=1e-6)


def test_how_a_folder_was_read_is_told(digits, tmp_path, capsys):
    folder = tmp_path / "samples"
    (folder / "__MACOSX").mkdir(parents=True)
    for index in range(5):
        (folder / f"{index}.png").write_bytes((digits / "even" / f"{index:06d}.png").read_bytes())
    Image.new("RGBA", (8, 8)).save(folder / "5.png")
    flags = ["--extractor", "pixels", "--background", "black"]
    report = measure(digits / "even", folder, *flags, folder=tmp_path)
    assert report["notes"] == [
        f"{folder}: passed over system entries: 1",
        f"{folder}: 1 of 6 images with transparent pixels, shown on black",
    ]
    assert f"note: {report['notes'][1]}" in capsys.readouterr().err
    evaluator.main(["stats", str(folder), "-o", str(tmp_path / "s.npz"), *flags])
    assert f"note: {report['notes'][1]}" in capsys.readouterr().err


def test_the_label_mode_is_that_of_the_settings_beside_an_archive(tmp_path, digits):
    archive = tmp_path / "a.npz"
    archive.write_bytes((digits / "odd-rgb.npz").read_bytes())
    (tmp_path / "a").mkdir()
    record = {"settings": {"labels": "balanced"}, "outputs": {"a.npz": ""}}
    (tmp_path / "a" / "settings.json").write_text(json.dumps(record))
    assert sides.recorded_labels(str(archive)) == "balanced"
    for broken in ("{", "[]", '{"settings": 3, "outputs": ["a.npz"]}', '{"outputs": {}}'):
        (tmp_path / "a" / "settings.json").write_text(broken)
        assert sides.recorded_labels(str(archive)) is None
    assert sides.recorded_labels(str(tmp_path / "b.npz")) is None


def test_unlike_extractors_are_refused(digits, tmp_path, monkeypatch):
    pixels, other = tmp_path / "pixels.npz", tmp_path / "other.npz"
    gaussian = (np.zeros(192), np.eye(192))
    np.savez(pixels, mu=gaussian[0], sigma=gaussian[1], extractor="pixels")
    np.savez(other, mu=gaussian[0], sigma=gaussian[1], extractor="torchscript 12345678")

    def no_work(*_, **__):
        raise AssertionError("images were read before the refusal")

    monkeypatch.setattr(sides, "extract", no_work)
    for arguments in (
        [pixels, other],
        [pixels, other, "--extractor", "pixels"],
        [pixels, pixels, "--extractor", "inception"],
        [digits / "even", other, "--extractor", "pixels"],
        [other, digits / "even", "--extractor", "pixels"],
    ):
        with pytest.raises(ValueError, match=r"unlike extractors: .* was made with '.*"):
            evaluator.main([*map(str, arguments)])


class FakeInception:
    """Three features, logits and spatial features, under the name of the real one."""

    identity = INCEPTION_IDENTITY

    def __call__(self, images):
        x = images.float().flatten(1)[:, :12] / 255
        return Features(x[:, :3], x[:, 3:5], 5 * x[:, 5:])


def test_stored_statistics_take_precedence(tmp_path, monkeypatch):
    monkeypatch.setattr(sides, "load_extractor", lambda *_: FakeInception())
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    stored = {"mu": np.full(3, 9.0), "sigma": np.eye(3), "mu_s": np.full(2, 5.0), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "reference.npz", arr_0=images[:20], **stored)
    np.savez(tmp_path / "samples.npz", arr_0=images[20:])
    report = measure(tmp_path / "reference.npz", tmp_path / "samples.npz", "--bootstrap", 3, folder=tmp_path)
    assert report["metrics"]["FID"]["value"] > 100  # far from the images, whose features lie in [0, 1]
    assert report["metrics"]["sFID"]["value"] > 20
    assert report["metrics"]["Inception Score"]["value"] > 1
    assert all(metric["standard_error"] is not None for metric in report["metrics"].values())
    assert report["reference"] == {"name": "reference.npz", "N": None, "N_features": 20, "labels": None}
    evaluator.main(["stats", str(tmp_path / "reference.npz"), "-o", str(tmp_path / "small.npz")])
    small = np.load(tmp_path / "small.npz")
    assert all(np.array_equal(small[name], array) for name, array in stored.items())
    evaluator.main(["stats", str(tmp_path / "reference.npz"), "-o", str(tmp_path / "small.npz"), "--features"])
    assert FeatureSet.load(tmp_path / "small.npz").pool.shape == (20, 3)


def bad_inputs(folder):
    """(name, arguments, what the line must say) of everything a user may hand over by mistake."""
    good = folder / "good.npz"
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    np.savez(good, arr_0=images)

    def made(name, **arrays):
        np.savez(folder / name, **arrays)
        return folder / name

    truncated = folder / "truncated.npz"
    truncated.write_bytes(good.read_bytes()[:-100])
    (folder / "text.npz").write_text("not an archive")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    for name in ("a.png", "b.png"):
        (folder / "broken" / name).write_text("not an image")
    (folder / "sizes").mkdir()
    for name, height in (("a.png", 4), ("b.png", 6)):
        Image.new("RGB", (4, height)).save(folder / "sizes" / name)
    pixels = {"mu": np.zeros(48), "sigma": np.eye(48), "extractor": "pixels"}
    cases = {
        "no-arr_0": (made("a.npz", images=images), r"a\.npz: no array arr_0; it holds images"),
        "float": (made("b.npz", arr_0=images / 255), r"b\.npz: arr_0 is float64 .* expected uint8 \(N, H, W, 3\)"),
        "channels-first": (
            made("c.npz", arr_0=images.transpose(0, 3, 1, 2)),
            r"c\.npz: .*(expected uint8|images of)",
        ),
        "two-dimensional": (made("d.npz", arr_0=images[0, 0]), r"d\.npz: arr_0 is uint8 \(4, 3\), expected"),
        "object": (made("e.npz", arr_0=np.array([{}, images], dtype=object)), r"e\.npz: arr_0: an object array"),
        "one-image": (made("f.npz", arr_0=images[:1]), r"f\.npz: 1 images in arr_0, expected at least 2"),
        "truncated": (truncated, r"truncated\.npz: not an \.npz archive"),
        "text": (folder / "text.npz", r"text\.npz: not an \.npz archive"),
        "missing": (folder / "missing.npz", r"missing\.npz: no such file"),
        "empty-folder": (folder / "empty", r"empty: 0 images in this folder"),
        "not-images": (folder / "broken", r"cannot read image '.*a\.png': cannot identify"),
        "sizes": (folder / "sizes", r"b\.png: 4×6 pixels, but a\.png has 4×4.*; --image-size N crops them"),
        "not-here": ("VIRTUAL_imagenet256_labeled.npz", r"no such file.*python download\.py adm-imagenet-256"),
        "nan-statistics": (made("g.npz", **pixels | {"mu": np.full(48, np.nan)}), r"g\.npz: mu contains NaN"),
        "nan-features": (
            made("h.npz", **pixels, count=6, pool=np.full((6, 48), np.nan)),
            r"h\.npz: pool contains NaN",
        ),
        "other-size": (made("i.npz", arr_0=images[:, :2]), r"unlike features: i\.npz has 24, good\.npz has 48"),
        "large": (made("j.npz", arr_0=np.zeros((2, 65, 64, 3), np.uint8)), "at most 64×64"),
    }
    return [(name, [path, good, "--extractor", "pixels"], says) for name, (path, says) in cases.items()] + [
        ("json-a-folder", [good, good, "--extractor", "pixels", "--json", folder / "empty"], "it is a folder"),
        ("extractor", [good, good, "--extractor", "vgg"], "extractor vgg: expected inception, pixels"),
        ("stats-a-folder", ["stats", good, "-o", folder / "empty"], "it is a folder"),
        (
            "weights",
            [good, good, "--weights", folder / "no.pth"],
            r"no\.pth: no such file; run `python download\.py inception`.*--weights",
        ),
        ("other-weights", [good, good, "--weights", good], r"good\.npz: sha256 .* expected 6726825d"),
        ("weights-of-pixels", [good, good, "--extractor", "pixels", "--weights", good], "weights are for inception"),
    ]


def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", ["evaluator.py"])
    for name, arguments, says in bad_inputs(tmp_path):
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda arguments=arguments: evaluator.main([*map(str, arguments)]))
        assert stopped.value.code == 2, name
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, (name, lines)
        assert lines[0].startswith("evaluator.py: error: "), name
        assert re.search(says, lines[0]), (name, lines[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--batch-size", "0"], "batch_size 0 must be at least 1"),
        (["a", "b", "--image_size", "0"], "image_size 0 must be at least 1"),
        (["a", "b", "--bootstrap", "1"], "a standard error needs at least 2 resamples"),
        (["a", "b", "--bootstrap", "-2"], "bootstrap -2 must be at least 0"),
        (["a", "b", "--background", "red"], "background 'red': expected"),
        (["benchmark", "--repeats", "0"], "repeats 0 must be at least 1"),
    ],
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluator.main(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["a", "b", "--extractr", "x"], ["a", "b", "--labels", "even"], ["a", "b", "--seed", str(2**64)]),
        *(["a"], ["stats", "a"], ["stats", "a", "b", "-o", "c"], ["benchmark", "a"]),
    ],
    ids=" ".join,
)
def test_mistyped_flags_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluator.main(arguments)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_devices_are_those_of_every_script(digits):
    with pytest.raises(ValueError, match="device 'tpu9'"):
        evaluator.main([str(digits / "even"), str(digits / "even"), "--extractor", "pixels", "--device", "tpu9"])


@pytest.mark.parametrize(
    ("parts", "methods"),
    [
        (["frechet", "kid", "kid-subsets", "precision-recall"], 10),
        pytest.param(["images"], 4, marks=pytest.mark.slow),
    ],
    ids=["features", "images"],
)
def test_benchmark(parts, methods, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.evaluation._in_new_process", lambda function, *arguments: function(*arguments))
    sizes = ["--count", "300", "--references", "200", "--dimensions", "16", "--images", "2"]
    evaluator.main(["benchmark", "--parts", *parts, *sizes, "--repeats", "1"])
    output = capsys.readouterr().out
    rows = [
        line.split() for line in output.splitlines() if line.startswith(("ours", "torch-fidelity", "scipy", "the same"))
    ]
    assert len(rows) == methods
    assert all(float(row[-1]) < 1e-2 for row in rows)  # differences; a KID of so few is near 0
    assert all(float(error.split()[-1]) < 1e-3 for error in re.findall(r"(?:KID|precision|recall) [0-9.e+-]+", output))


@pytest.mark.parametrize("arguments", [["--help"], ["stats", "--help"], ["a", "b", "--extractr", "x"]], ids=" ".join)
def test_help_and_mistyped_flags_answer_without_torch(arguments):
    code = (
        "import sys, evaluator\n"
        f"try:\n    evaluator.main({arguments!r})\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    root = Path(evaluator.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, timeout=60)


def test_the_result_is_written_before_the_table_is_printed(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("flowturbo.evaluation.report.table", lambda *_: exec("raise OSError('stdout is closed')"))
    both = [str(digits / "odd-grey.npz"), str(digits / "even-grey.npz")]
    with pytest.raises(OSError, match="stdout is closed"):
        evaluator.main([*both, "--extractor", "pixels", "--json", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text())["metrics"]["FID"]["value"] is not None


def statistics(path, **arrays):
    np.savez(path, **{"mu": np.zeros(4), "sigma": np.eye(4), "extractor": np.array("pixels"), **arrays})
    return str(path)


@pytest.mark.parametrize("sigma", [np.eye(4) * 1e308, np.ones((4, 4)) * 1e308, np.eye(4) * 5e-324, np.eye(4) * -0.0])
def test_statistics_at_the_ends_of_the_range_are_no_traceback(tmp_path, capsys, sigma):
    odd, plain = statistics(tmp_path / "a.npz", sigma=sigma), statistics(tmp_path / "b.npz", mu=np.ones(4) * 1e300)
    for both in ([odd, plain], [plain, odd], [odd, odd], [plain, plain]):
        evaluator.main([*both, "--json", str(tmp_path / "x.json")])
        json.loads((tmp_path / "x.json").read_text())
        assert "FID" in capsys.readouterr().out


def test_texts_of_files_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    evil = "\x1b[2J\x07" + "x" * 10_000
    side = statistics(tmp_path / "a.npz", source=np.array(evil), labels=np.array(evil), extractor=np.array(evil))
    evaluator.main([side, side])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"\x1b[2J\x07xxx" in shown
    assert len(shown) < 4000
    odd = statistics(tmp_path / "b.npz", source=np.array([evil]))
    with pytest.raises(ValueError, match=r"source is .*, expected text") as caught:
        evaluator.main([odd, odd])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64 - 1])
def test_seeds_up_to_2_64_draw_resamples(tmp_path, seed):
    side = str(tmp_path / "a.npz")
    np.savez(side, np.random.default_rng(0).integers(0, 255, (6, 4, 4, 3), dtype=np.uint8))
    evaluator.main([side, side, "--extractor", "pixels", "--bootstrap", "2", "--seed", str(seed)])
