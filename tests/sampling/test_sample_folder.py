import numpy as np
import pytest

from flowturbo.sampling.sample_folder import SampleFolder, read_archive
from flowturbo.system.claims import OtherSettings


@pytest.fixture
def samples(tmp_path):
    """Ten samples of 2x2 pixels in micro-batches of four, all written."""
    folder = SampleFolder(tmp_path / "set", 10, 4)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 2, 2, 3), dtype=np.uint8)
    for k in range(folder.batches):
        folder.write(k, {"images": pixels[4 * k : 4 * k + 4], "labels": np.arange(4 * k, 4 * k + 4)})
    folder.pixels = pixels
    return folder


def test_micro_batches_are_trimmed_to_the_count_and_make_one_archive(samples):
    assert [samples.kept(k) for k in range(3)] == [4, 4, 2]
    assert [list(samples.numbers(k)) for k in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert samples.read(2)["labels"].tolist() == [8, 9]
    samples.write_archive()
    with np.load(samples.archive) as archive:
        assert archive.files == ["arr_0"]
    stored = read_archive(samples.archive)
    assert (stored.dtype, stored.flags.c_contiguous) == (np.uint8, True)
    assert np.array_equal(stored, samples.pixels[:10])


def test_a_micro_batch_with_a_bit_flipped_is_missing(samples):
    whole = samples._path(0).read_bytes()
    for position in range(0, 8 * len(whole), 17):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        samples._path(0).write_bytes(broken)
        assert samples.read(0) is None, f"bit {position}"
    samples._path(0).write_bytes(whole)
    assert np.array_equal(samples.read(0)["images"], samples.pixels[:4])


def test_a_micro_batch_cut_short_is_missing(samples):
    whole = samples._path(1).read_bytes()
    for length in range(0, len(whole), 5):
        samples._path(1).write_bytes(whole[:length])
        assert samples.read(1) is None
    with pytest.raises(OSError, match=r"000001\.batch is missing or damaged; sampling again redoes it"):
        samples.expect(1)
    with pytest.raises(OSError, match=r"000001\.batch is missing or damaged"):
        samples.write_archive()
    assert not samples.archive.exists()


def test_a_folder_is_claimed_for_one_set_of_settings(tmp_path):
    folder, settings = SampleFolder(tmp_path / "set", 2, 2), {"seed": 0, "interval": (0, 1)}
    assert folder.claim(settings) is False
    assert folder.claim(settings) is False
    with pytest.raises(OtherSettings, match=r"was made with seed 0, not 1$"):
        folder.claim({**settings, "seed": 1})
    with pytest.raises(OtherSettings, match=r"was made with new None, not 1$"):
        folder.claim({**settings, "new": 1})
    folder.write(0, {"images": np.zeros((2, 1, 1, 3), np.uint8)})
    folder.write_archive()
    folder.complete(settings, [folder.archive])
    assert folder.claim(settings) is True
    assert not any((tmp_path / "set" / "batches").iterdir())
    folder.archive.write_bytes(b"changed")
    assert folder.claim(settings) is False
    for damage in ("{", "[]", "{}", '{"settings": 3}', "\udcff"):
        (tmp_path / "set" / "settings.json").write_text(damage, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"settings\.json"):
            folder.claim(settings)
