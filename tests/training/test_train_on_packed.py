"""Training on packed images: the runs, their resumption and their checks are those of a folder."""

import re
import shutil
import tarfile

import pytest
import runs

from flowturbo.data.packed import open_images
from flowturbo.data.parts import Split


def begun(folder):
    """The flags of a run that saves on its way."""
    return [*runs.PREDICTOR, "--steps", "4", "--ckpt-every", "2", "--data-path", folder]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_run_on_an_archive_ends_with_the_bits_of_one_on_the_folder(data, tmp_path, kind):
    """So does one that began on the folder and goes on with the archive: its images are the same."""
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))
    archive = tmp_path / f"x.{kind}"
    if kind == "zip":
        shutil.make_archive(tmp_path / "x", "zip", data.parent, data.name)
    else:
        with tarfile.open(archive, "w") as packed:
            for name in names:
                packed.add(data / name, name)
    plain = runs.run(tmp_path / "plain", *begun(data))
    alone = runs.run(tmp_path / "alone", *begun(archive), "--num-workers", "1")
    runs.assert_same_bits(runs.checkpoint(plain, 4), runs.checkpoint(alone, 4))
    shutil.copytree(plain, tmp_path / "again" / plain.name)
    (tmp_path / "again" / plain.name / "checkpoints" / "0000004.pt").unlink()
    resumed = runs.run(tmp_path / "again", *begun(archive), "--resume", "auto")
    runs.assert_same_bits(runs.checkpoint(plain, 4), runs.checkpoint(resumed, 4))


def test_packed_images_are_checked_before_there_is_a_run(data, tmp_path):
    shutil.copytree(data, tmp_path / "images")
    (tmp_path / "images" / "c1" / "3.png").write_bytes(b"no image")
    shutil.make_archive(tmp_path / "x", "zip", tmp_path / "images")
    with pytest.raises(ValueError, match=re.escape(f"cannot read image '{tmp_path / 'x.zip'}: c1/3.png'")):
        runs.run(tmp_path / "out", *begun(tmp_path / "x.zip"))
    assert not (tmp_path / "out").exists()


def test_a_share_is_held_out_of_an_archive_as_of_its_folder(data, tmp_path):
    shutil.make_archive(tmp_path / "x", "zip", data)
    names = []
    for source in (data, tmp_path / "x.zip"):
        kept = Split(open_images(source, 8, 1), 0.6)
        names.append(sorted(kept.held_out.name(index) for index in range(len(kept.held_out))))
    assert names[0] == names[1]
    folder = runs.run(tmp_path / "out", *begun(tmp_path / "x.zip"), "--holdout", "0.6")
    assert f"{len(names[0])} held out" in (folder / "log.txt").read_text()
