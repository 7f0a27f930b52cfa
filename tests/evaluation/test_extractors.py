import hashlib
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception

from flowturbo.evaluation import InceptionExtractor, extractors, load_extractor
from flowturbo.evaluation.extractors import (
    INCEPTION_FILE,
    DINOv2Extractor,
    MissingExtractorWeights,
    PixelExtractor,
    find_inception,
)
from flowturbo.system.advice import advice_for


def noise_images(count=2, size=40):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    """torch-fidelity's module with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        return inception.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def extractor(weights):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    made = InceptionExtractor(weights, expected_sha256=digest)
    assert made.identity == f"inception {digest[:8]}"
    return made


@torch.no_grad()
def test_inception_features_are_torch_fidelitys(network, extractor):
    images = noise_images()
    pool, logits = network(images)
    features = extractor(images)
    assert pool.std() > 0
    for found, expected in ((features.pool, pool), (features.logits, logits)):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())
    torch.testing.assert_close(features.logits, features.pool @ network.fc.weight.T)


@torch.no_grad()
def test_spatial_features_are_mixed_6d(network, extractor):
    images = noise_images()
    x = inception.interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    for name, layer in network.named_children():
        if name == "Mixed_6d":
            break
        x = layer(x)
    convolution = layer.branch1x1.conv(x)
    normal = layer.branch1x1.bn(convolution).relu()
    expected = normal.numpy()[:, :7].transpose(0, 2, 3, 1).reshape(2, 17 * 17 * 7)
    assert expected.std() > 0
    np.testing.assert_allclose(extractor(images).spatial.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_inception_refuses_floats_and_other_weights(weights, extractor):
    with pytest.raises(ValueError, match="expected uint8"):
        extractor(noise_images().float())
    with pytest.raises(ValueError, match=r"sha256 .* expected 6726825d"):
        InceptionExtractor(weights)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No Inception weights anywhere, and a download that says so; a folder for each place where they may be."""
    places = {name: tmp_path / name for name in ("here", "cache", "hub")}
    for place in places.values():
        place.mkdir()
    monkeypatch.chdir(places["here"])
    monkeypatch.setenv("FLOWTURBO_CACHE", str(places["cache"]))
    monkeypatch.setenv("TORCH_HOME", str(places["hub"]))
    monkeypatch.delenv("FLOWTURBO_INCEPTION_WEIGHTS", raising=False)

    def fetch(name):
        raise OSError(f"downloading {name}")

    monkeypatch.setattr(extractors, "fetch", fetch)
    return places


def test_inception_weights_are_downloaded_where_there_are_none(nowhere):
    for load in (find_inception, lambda: load_extractor("inception")):
        with pytest.raises(OSError, match="downloading inception"):
            load()


@pytest.mark.parametrize("place", ["here", "cache", "hub"])
def test_inception_weights_are_found_wherever_earlier_versions_put_them(nowhere, place):
    folder = nowhere[place] / ("hub/checkpoints" if place == "hub" else "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INCEPTION_FILE.path).write_text("weights")
    if place == "cache":  # where files are held to their registered size and hash
        with pytest.raises(ValueError, match=r"weights-inception.* has 7 bytes, expected 95,628,359: delete it"):
            find_inception()
        return
    assert os.path.samefile(find_inception(), folder / INCEPTION_FILE.path)
    with pytest.raises(MissingExtractorWeights, match=r"weights-inception.*: sha256 .* expected 6726825d"):
        load_extractor("inception")


def test_inception_weights_that_are_named_come_first(nowhere, tmp_path, monkeypatch):
    (nowhere["cache"] / INCEPTION_FILE.path).touch()
    monkeypatch.setenv("FLOWTURBO_INCEPTION_WEIGHTS", str(tmp_path / "mine.pth"))
    with pytest.raises(MissingExtractorWeights, match=r"mine\.pth, which FLOWTURBO_INCEPTION_WEIGHTS names") as caught:
        find_inception()
    assert "python download.py inception" in advice_for(caught.value)
    assert "--weights" in advice_for(caught.value)
    (tmp_path / "mine.pth").touch()
    assert find_inception() == tmp_path / "mine.pth"
    with pytest.raises(MissingExtractorWeights, match=r"other\.pth: no such file"):
        load_extractor("inception", weights=tmp_path / "other.pth")


def test_pixels_scale_and_grey():
    images = noise_images()
    features = PixelExtractor()(images).pool
    assert features.shape == (2, 3 * 40 * 40)
    distance = (images[0].double() / 127.5 - images[1].double() / 127.5).square().mean(dim=0).sum()
    assert (features[0] - features[1]).square().sum().item() == pytest.approx(distance.item(), rel=1e-5)
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    torch.testing.assert_close(PixelExtractor()(black_and_white).pool * 3**0.5, torch.tensor([[-1.0] * 3, [1.0] * 3]))
    with pytest.raises(ValueError, match="expected at most 64×64"):
        PixelExtractor()(noise_images(size=65))


class Flat(nn.Module):
    def forward(self, images):
        return images.float().mean(dim=(2, 3))


class Scalar(nn.Module):
    def forward(self, images):
        return images.float().mean()


class Broken(nn.Module):
    def forward(self, images):
        return images.float() @ torch.ones(3, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_extractor(tmp_path):
    def saved(module):
        path = tmp_path / f"{type(module).__name__}.pt"
        torch.jit.script(module).save(str(path))
        return str(path)

    images = noise_images()
    extractor = load_extractor(saved(Flat()))
    torch.testing.assert_close(extractor(images).pool, images.float().mean(dim=(2, 3)))
    assert extractor.identity.startswith("torchscript ")
    assert extractor.identity != load_extractor(saved(Scalar())).identity
    with pytest.raises(ValueError, match=r"Scalar\.pt: returns \(\) for 2 images, expected \(N, D\)"):
        load_extractor(saved(Scalar()))(images)
    with pytest.raises(ValueError, match=r"Broken\.pt: fails on uint8"):
        load_extractor(saved(Broken()))(images)
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ValueError, match=r"text\.pt: not a TorchScript module"):
        load_extractor(str(tmp_path / "text.pt"))


def test_unknown_extractors_are_refused():
    with pytest.raises(ValueError, match="extractor vgg: expected inception, pixels, dinov2 or a TorchScript file"):
        load_extractor("vgg")
    with pytest.raises(ValueError, match="weights are for inception and dinov2, not for pixels"):
        load_extractor("pixels", weights=__file__)


class FakeViT(nn.Module):
    pretrained_cfg = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.scale * x.mean(dim=(2, 3))


def test_dinov2_preprocessing_and_identity(monkeypatch, tmp_path):
    made, weights = [], tmp_path / "weights.pth"
    torch.save({"scale": torch.ones(3)}, weights)

    def create_model(name, **settings):
        made.append((name, settings))
        return FakeViT()

    monkeypatch.setattr("timm.create_model", create_model)
    extractor = DINOv2Extractor(weights)
    white = torch.full((2, 3, 40, 30), 255, dtype=torch.uint8)
    torch.testing.assert_close(extractor(white).pool, torch.tensor([[1.0, 3.0, 1.0]] * 2))
    assert made[0][0] == "vit_large_patch14_dinov2.lvd142m"
    assert made[0][1]["pretrained_cfg_overlay"] == {"file": str(weights)}
    weights.write_bytes(b"\x80\2c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R.")
    with pytest.raises(ValueError, match=r"weights\.pth': it holds what is not loaded: __builtin__\.bytearray"):
        DINOv2Extractor(weights)
    identity = extractor.identity
    monkeypatch.setattr(FakeViT, "__init__", lambda self: nn.Module.__init__(self))
    assert DINOv2Extractor().identity != identity

    def offline(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(ValueError, match=r"no weights for .*no route to host"):
        DINOv2Extractor()
