import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import NoAutoencoder
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.networks.load import load_network
from flowturbo.networks.precision import quantize
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling import picture
from flowturbo.system.advice import advice_for
from flowturbo.weights.fetch import MissingWeights


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


SIDE, GAP, LINE = 128, 4, int(12 * 1.6)  # of an image in the picture, beside it, and of a line of text


def cells(path, rows, columns, side=SIDE, gap=GAP):
    """The images of a grid without captions, shrunk back to 8x8: (rows, columns, 8, 8, 3)."""
    picture = pixels(path)
    assert picture.shape == (rows * (side + gap) + gap, columns * (side + gap) + gap, 3)
    at = [[(gap + r * (side + gap), gap + c * (side + gap)) for c in range(columns)] for r in range(rows)]
    return np.stack([np.stack([picture[t : t + side : 16, l : l + side : 16] for t, l in row]) for row in at])


@pytest.fixture
def draw(pixel_models, tmp_path, capsys):
    """draw(*flags) -> (path of the PNG, what was printed), with the tiny models."""

    def run(*flags, models=pixel_models):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        capsys.readouterr()
        sample.main([*models, "--device", "cpu", "--out", str(out), "--no-captions", *map(str, flags)])
        return out, capsys.readouterr().out

    return run


def test_without_weights_one_line_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingWeights) as caught:
        sample.main([])
    said = str(caught.value) + advice_for(caught.value)
    assert said == (
        "no such file: SiT-XL-2-256x256.pt (predictor_ckpt), SiT-XL-2-Refiner.pt (refiner_ckpt); get it with "
        "`python download.py sit-xl-2-256 sit-xl-2-refiner` (from huggingface.co, cloud.tsinghua.edu.cn), or pass a "
        "local path with --predictor-ckpt and --refiner-ckpt, or take --model colour, which comes with the package"
    )
    assert not (tmp_path / "cache").exists()


def test_only_what_the_schedule_needs_is_asked_for(pixel_models, tmp_path):
    with pytest.raises(MissingWeights) as caught:
        sample.main(["--schedule", "H2", "--predictor-ckpt", str(tmp_path / "gone.pt")])
    assert "gone.pt (predictor_ckpt)" in str(caught.value)
    assert caught.value.fields == ["predictor_ckpt"]
    with pytest.raises(MissingWeights) as caught:
        sample.main([*pixel_models, "--refiner-ckpt", str(tmp_path / "gone.pt")])
    assert caught.value.fields == ["refiner_ckpt"]
    said = "; pass a local path with --refiner-ckpt, or sample without one, by a schedule that has no R, such as M7"
    assert advice_for(caught.value) == said


def test_the_models_first_classes_are_drawn_four_in_a_row(draw):
    out, said = draw("--schedule", "H1P2R1")
    assert cells(out, 2, 4).std() > 10
    assert "H1P2R1   4 + 2 evaluations, 12 rows   cfg 4   " in said
    assert f"saved {out}" in said


def test_the_pictures_are_what_the_sampler_computes(draw, pixel_models, batch):
    from flowturbo.data.pictures import to_uint8
    from flowturbo.data.randomness import keyed_noise
    from flowturbo.transport import FlowTurbo

    out, _ = draw("--schedule", "H1P2R1", "--classes", 3, 7, "--seed", 5, "--cfg-scale", 2, "--refiner-step", "single")
    networks = load_network(SiT, pixel_models[1]), load_network(VelocityRefiner, pixel_models[3])
    sampler = FlowTurbo(*networks, "H1P2R1", 2.0, "single")
    images = to_uint8(sampler.sample(keyed_noise(5, range(2), (3, 8, 8)), torch.tensor([3, 7])))
    shown = cells(out, 1, 2)[0]
    assert np.abs(shown - images.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_compare_draws_one_captioned_row_per_sampler(draw):
    flags = ["--classes", 1, 2, 3, "--captions"]
    out, said = draw("--compare", "H2", "h1p2", "[H1R1]x2", "E3", "dopri5", "sde5", *flags)
    counts = dict(re.findall(r"^(\S+)   (.+?) evaluations(?:, \d+ rows)?   cfg 4   \S+ ms/image$", said, re.MULTILINE))
    dopri5 = counts.pop("dopri5")
    assert counts == {"H2": "4", "H1P2": "4", "H1R1H1R1": "4 + 4", "E3": "3", "sde5": "5"}
    assert int(dopri5) > 12
    assert Image.open(out).height == 6 * (SIDE + GAP + LINE) + GAP + LINE  # names below the last row alone
    rows = pixels(draw("--compare", "H2", "H2", *flags)[0])
    first, second = (rows[GAP + LINE + k * (SIDE + GAP + LINE) :][:SIDE] for k in range(2))
    assert np.array_equal(first, second)  # from the same noise


def test_every_sampler_lands_near_the_exact_solution(draw):
    """On a field as smooth as that of one random network they differ by their steps alone."""
    exact = cells(draw("--schedule", "dopri5", "--rtol", "1e-6", "--cfg-scale", "1")[0], 2, 4)
    for schedule in ("H32", "H1P60", "E200"):
        other = cells(draw("--schedule", schedule, "--cfg-scale", "1")[0], 2, 4)
        assert np.abs(exact - other).mean() < 4, schedule


def test_an_image_is_the_same_in_any_batch(draw):
    reference = cells(draw("--num-images", 11, "--schedule", "H1P2R1")[0], 2, 8)
    for size in (1, 4, 11):
        other = cells(draw("--num-images", 11, "--schedule", "H1P2R1", "--batch-size", size)[0], 2, 8)
        assert np.abs(reference - other).max() <= 1
    fewer = cells(draw("--num-images", 5, "--schedule", "H1P2R1")[0], 2, 4)
    assert np.abs(fewer.reshape(8, 8, 8, 3)[:5] - reference.reshape(16, 8, 8, 3)[:5]).max() <= 1


def test_classes_are_taken_in_turn_and_matter(draw):
    images = cells(draw("--num-images", 4, "--classes", 2, 9, "--schedule", "H2")[0], 1, 4)[0]
    swapped = cells(draw("--num-images", 4, "--classes", 9, 2, "--schedule", "H2")[0], 1, 4)[0]
    same = cells(draw("--num-images", 4, "--classes", 2, "--schedule", "H2")[0], 1, 4)[0]
    assert np.abs(images[::2] - same[::2]).max() <= 1
    assert np.abs(swapped[1::2] - same[1::2]).max() <= 1
    assert np.abs(images[1] - same[1]).mean() > 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", 1],
        ["--cfg-scale", 1],
        ["--cfg-channels", "all"],
        ["--cfg-interval", 0.5, 1],
        ["--schedule", "H1P2R2", "--refiner-step", "consistent"],
        ["--precision", "bf16"],
    ],
    ids=str,
)
def test_every_flag_changes_the_picture(draw, flags):
    if flags[0] == "--cfg-channels":  # of three channels 2 are guided, or all
        base = pixels(draw("--schedule", "H2", "--cfg-channels", 2)[0])
    else:
        base = pixels(draw("--schedule", "H1P2R2" if "--refiner-step" in flags else "H2")[0])
    changed = pixels(draw(*([] if "--schedule" in flags else ["--schedule", "H2"]), *flags)[0])
    assert (base != changed).any()
    assert base.shape == changed.shape


def test_sde_noise_is_keyed_by_the_image(draw):
    flags = ["--schedule", "sde6", "--cfg-scale", "1", "--num-images", 4]
    base = cells(draw(*flags, "--batch-size", 4)[0], 1, 4)
    assert np.abs(cells(draw(*flags, "--batch-size", 3)[0], 1, 4) - base).max() <= 1
    assert np.abs(cells(draw(*flags, "--diffusion", "constant")[0], 1, 4) - base).mean() > 1


def test_imagenet_classes_have_names_and_the_originals_are_the_default(save_network, draw, tmp_path):
    predictor = save_network(tmp_path / "p", SiT, in_channels=3, num_classes=1000)
    models = ["--predictor-ckpt", str(predictor), "--vae-ckpt", "none", "--schedule", "H2"]
    named, _ = draw("--classes", "golden retriever", "n09472597", "88", models=models)
    indexed, _ = draw("--classes", 207, 980, 88, models=models)
    assert np.array_equal(pixels(named), pixels(indexed))
    eight, _ = draw(models=models)
    listed, _ = draw("--classes", 207, 980, 387, 974, 88, 972, 928, 279, models=models)
    assert np.array_equal(pixels(eight), pixels(listed))
    with pytest.raises(ValueError, match=r"did you mean .*'golden retriever'"):
        draw("--classes", "golden retriver", models=models)


def test_a_models_own_classes_have_names(save_network, draw, tmp_path):
    predictor = save_network(tmp_path / "p", SiT, classes=["cat", "dog", "horse"], in_channels=3, num_classes=3)
    models = ["--predictor-ckpt", str(predictor), "--vae-ckpt", "none", "--schedule", "H2"]
    named, _ = draw("--classes", "Dog", "cat", 2, models=models)
    indexed, _ = draw("--classes", 1, 0, 2, models=models)
    assert np.array_equal(pixels(named), pixels(indexed))
    with pytest.raises(ValueError, match="'hors' is no class name or index; did you mean 'horse'"):
        draw("--classes", "hors", models=models)


def test_classes_with_names_have_their_rows_and_labels(save_network, draw, tmp_path):
    """Nine images of class 2 in two rows under its name, eight of class 0 in one."""
    predictor = save_network(tmp_path / "p", SiT, classes=["cat", "dog", "horse"], in_channels=3, num_classes=3)
    models = ["--predictor-ckpt", str(predictor), "--vae-ckpt", "none", "--schedule", "E1"]
    flags = ["--classes", "horse", "cat", "--num-images", 17, "--captions"]
    out, _ = draw(*flags, models=models)
    assert Image.open(out).size == (8 * (SIDE + GAP) + GAP, 3 * (SIDE + GAP + LINE) + GAP)
    lines = [pixels(out)[GAP + SIDE + r * (SIDE + GAP + LINE) :][:LINE] for r in range(3)]
    written = [[bool(line[:, c * (SIDE + GAP) :][:, :SIDE].min() < 128) for c in range(8)] for line in lines]
    assert written == [[True] * 8, [True] + [False] * 7, [True] * 8]
    bare, _ = draw(*flags[:-1], models=models)
    assert Image.open(bare).size == (8 * (SIDE + GAP) + GAP, 3 * (SIDE + GAP) + GAP)
    few, _ = draw("--classes", "horse", "cat", "--num-images", 2, models=models)
    assert Image.open(few).size == (2 * (SIDE + GAP) + GAP, SIDE + 2 * GAP)  # one of each: no row of its own


def test_a_model_of_the_package_is_drawn_by_its_name(tmp_path, capsys):
    out = tmp_path / "digits.png"
    flags = ["--model", "digits", "--device", "cpu", "--out", str(out)]
    sample.main([*flags, "--schedule", "H1P1", "--classes", "3", "8", "--num-images", "4"])
    assert "H1P1   3 evaluations, 3 rows   cfg 1 " in capsys.readouterr().out
    sample.main([*flags, "--schedule", "A4", "--cfg-scale", "1.5", "--cfg-every", "2", "--classes", "3"])
    assert "A4   4 evaluations, 6 rows   cfg 1.5 every 2   " in capsys.readouterr().out
    with pytest.raises(MissingWeights) as caught:
        sample.main([*flags, "--refiner-ckpt", str(tmp_path / "mine.pt")])
    assert caught.value.fields == ["refiner_ckpt"]


def test_public_checkpoints_and_a_latent_model_make_images(randomise, vae_folder, draw, tmp_path):
    """Bare state dicts of a SiT-S's width, one layer deep, with an autoencoder."""
    config = {"input_size": 8, "hidden_size": 384, "depth": 1, "num_heads": 6, "num_classes": 10}
    for name, kind in (("p", SiT), ("r", VelocityRefiner)):
        torch.save(randomise(kind(**config), 1, std=0.05).state_dict(), tmp_path / name)
    models = ["--predictor_ckpt", str(tmp_path / "p"), "--refiner_ckpt", str(tmp_path / "r")]
    out, said = draw("--classes", 1, 2, models=[*models, "--vae_ckpt", str(vae_folder)])
    assert "H1P5R3   7 + 6 evaluations" in said
    assert pixels(out).shape == (SIDE + 2 * GAP, 2 * (SIDE + GAP) + GAP, 3)


def test_the_file_is_named_after_the_settings(pixel_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ["--model", "digits", "--classes", "3"]
    sample.main([*models, "--schedule", "[h1]x2", "--cfg-scale", "1.5", "--seed", "3"])
    sample.main([*models, "--compare", "H1", "E1", "--num-images", "2"])
    sample.main([*pixel_models, "--schedule", "E1"])
    names = {p.name for p in (tmp_path / "samples").iterdir()}
    own = {name for name in names if name.startswith("predictor.pt-E1-cfg4-seed0-refiner-refiner.pt-vae-none-")}
    assert names == {"digits-H2-cfg1.5-seed3-of-3.png", "digits-H1-vs-E1-cfg1-seed0-of-3-images2.png", *own}
    assert len(own) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule", "R3"], "cannot start with R"),
        (["--schedule", "H1Q2"], "Examples:"),
        (["--compare", "H1", "X"], "Examples:"),
        (["--schedule", "sde1"], "2 to 100000 steps"),
        (["--classes", "10"], "class 10 is outside this model's classes 0 to 9"),
        (["--classes", "golden retriever"], "a model of 10 classes takes indices"),
        (["--cfg-scale", "nan"], "cfg scale nan must be a finite number"),
        (["--cfg-scale", "-1"], "cfg scale -1.0 must be"),
        (["--cfg-channels", "some"], "cfg_channels 'some' must be 'all' or a number"),
        (["--cfg-channels", "²"], "cfg_channels '²' must be 'all' or a number"),
        (["--cfg-channels", "0"], "guidance channels 0 must be"),
        (["--cfg-interval", "0.8", "0.2"], "must lie in 0 to 1, in this order"),
        (["--schedule", "dopri5", "--rtol", "0"], "tolerances must be positive"),
        (["--num-images", "0"], "must be at least 1"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--out", "a.jpg"], "must end in .png"),
        (["--device", "cuda:77"], "is not there"),
        (["--vae-ckpt", "vae"], "not latents: expected vae_ckpt 'none'"),
    ],
    ids=str,
)
def test_wrong_values_are_explained(pixel_models, flags, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        sample.main([*pixel_models, "--device", "cpu", "--out", str(tmp_path / "a.png"), *flags])
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "-1"], "must lie in 0 to 2^64"),
        (["--shedule", "H8"], "did you mean --schedule?"),
        (["--precision", "fp8"], "invalid choice"),
        (["--refiner_step", "double"], "invalid choice"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_networks_that_do_not_fit_are_refused(save_network, pixel_models, vae_folder, tmp_path):
    def refused(message, *flags):
        with pytest.raises(ValueError, match=message):
            sample.main([*pixel_models, "--device", "cpu", *map(str, flags)])

    classes = save_network(tmp_path / "a", VelocityRefiner, in_channels=3, num_classes=5)
    refused(r"the refiner is made for inputs \(3, 8, 8\) and 5 classes, the predictor for", "--refiner-ckpt", classes)
    larger = save_network(tmp_path / "b", VelocityRefiner, in_channels=3, input_size=16)
    refused(r"the refiner is made for inputs \(3, 16, 16\)", "--refiner-ckpt", larger)
    refused("holds a SiT, expected a VelocityRefiner", "--refiner-ckpt", pixel_models[1])
    refused("holds a VelocityRefiner, expected a SiT", "--predictor-ckpt", pixel_models[3])
    refused("works on images of 3 channels, not latents: expected vae_ckpt 'none'", "--vae-ckpt", vae_folder)
    free = save_network(tmp_path / "c", SiT, in_channels=3, class_dropout_prob=0.0)
    refused("no null class to guide with: expected cfg_scale 1", "--predictor-ckpt", free)
    flags = ["--predictor-ckpt", free, "--cfg-scale", 1, "--schedule", "H1P1R1", "--out", tmp_path / "out.png"]
    sample.main([*pixel_models, "--device", "cpu", *map(str, flags)])


def test_a_place_that_takes_no_file_is_named(pixel_models, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write '.*a\.png'"):
        sample.main([*pixel_models, "--device", "cpu", "--schedule", "E1", "--out", str(tmp_path / "file" / "a.png")])


# Compilation and quantisation


@pytest.fixture
def untimed(monkeypatch, compiler):
    """Graphs without code generation, and the names of what was sampled with them."""
    sampled, original = [], picture.follow_row

    def counted(sampler, *rest, **named):
        compiled = isinstance(sampler.sampler.engine, StaticGraphs)
        sampled.append(str(sampler) if compiled else f"{sampler} eager")
        return original(sampler, *rest, **named)

    monkeypatch.setattr(picture, "follow_row", counted)
    with compiler("eager"):
        yield sampled


@pytest.mark.parametrize("flags", [["--cfg-scale", 1], ["--refiner-step", "single", "--num-images", 5]], ids=str)
def test_compiled_pictures_equal_eager_ones(draw, untimed, flags):
    """The second in batches of 4 and of 1."""
    flags = ["--schedule", "H1P2R2", "--batch-size", 4, *flags]
    compiled, said = draw("--compile", *flags)
    eager, said_eager = draw(*flags)
    assert np.abs(pixels(compiled) - pixels(eager)).max() <= 1
    assert untimed == ["H1P2R2", "H1P2R2 eager"]
    evaluations = re.search(r"H1P2R2   (4 \+ \d evaluations, \d+ rows)   ", said_eager)[1]
    scale = r"cfg 1" if 1 in flags else "cfg 4"
    assert re.match(
        rf"H1P2R2 compiled   {re.escape(evaluations)}   {scale}   \S+ ms/image, compilation included\n",
        said,
    )


def test_compared_samplers_are_timed_after_their_compilation(draw, untimed):
    flags = ["--compare", "H2", "P2R1", "--classes", 1, 2, 3, "--compile"]
    compiled, said = draw(*flags)
    assert untimed == ["H2", "P2R1", "H2", "P2R1"]
    h2, p2r1 = said.splitlines()[:2]
    assert re.match(r"H2 compiled   4 evaluations, 8 rows   .* ms/image$", h2)
    assert re.match(r"P2R1 compiled   3 \+ 2 evaluations, 10 rows   .* ms/image$", p2r1)
    eager, _ = draw(*flags[:-1])
    for row in (0, 1):
        place = slice(GAP + row * (SIDE + GAP), (row + 1) * (SIDE + GAP))
        assert pixels(eager)[place].std() > 10
        assert np.abs(pixels(compiled)[place] - pixels(eager)[place]).max() <= 1


def test_what_cannot_be_compiled_is_refused_before_anything_is_sampled(draw, untimed):
    with pytest.raises(ValueError, match="only schedules of blocks can be compiled, not dopri5"):
        draw("--compare", "H2", "dopri5", "--compile")
    assert untimed == []


def test_the_autoencoder_is_compiled_with_the_networks(draw, untimed, monkeypatch):
    calls = []
    monkeypatch.setattr(NoAutoencoder, "compile", lambda self: calls.append(self))
    draw("--schedule", "E1")
    assert calls == []
    draw("--schedule", "E1", "--compile")
    assert len(calls) == 1


def test_quantising_without_torchao_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"^quantization needs torchao: pip install torchao$"):
        draw("--schedule", "E1", "--quantize", "int8")


def test_a_kind_that_the_device_cannot_compute_is_one_line(draw, monkeypatch):
    def fail(*_):
        raise AssertionError("Float8 needs compute capability\n8.9")

    names = {name: lambda *_, **__: None for name in ("Int8DynamicActivationInt8WeightConfig", "PerRow")}
    fake = SimpleNamespace(**names, Float8DynamicActivationFloat8WeightConfig=lambda **_: None, quantize_=fail)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=fake))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    expected = "^quantization to float8 does not work on this device: Float8 needs compute capability 8.9$"
    with pytest.raises(ValueError, match=expected):
        draw("--schedule", "E1", "--quantize", "float8")


def test_quantised_networks_stay_near_and_tell_their_error(draw, untimed, predictor, refiner):
    pytest.importorskip("torchao")
    eager, said = draw("--schedule", "H1P1R1", "--quantize", "int8")
    errors = re.findall(r"^(\w+) in int8: relative rms error of its output (\S+)$", said, re.MULTILINE)
    assert [name for name, _ in errors] == ["SiT", "VelocityRefiner"]
    assert all(0 < float(error) < 0.05 for _, error in errors)
    exact, _ = draw("--schedule", "H1P1R1")
    assert 0 < np.abs(pixels(eager) - pixels(exact)).mean() < 5
    compiled, _ = draw("--schedule", "H1P1R1", "--quantize", "int8", "--compile")
    assert np.abs(pixels(compiled) - pixels(eager)).mean() < 0.1
    for network in (predictor, refiner):
        quantize(network, "int8")
        linear = {n: type(m.weight) for n, m in network.blocks.named_modules() if isinstance(m, torch.nn.Linear)}
        changed = {name.split(".", 1)[1] for name, kind in linear.items() if kind is not torch.nn.Parameter}
        assert changed == {"attn.qkv", "mlp.fc1", "mlp.fc2"}
