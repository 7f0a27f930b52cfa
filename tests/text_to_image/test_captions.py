from __future__ import annotations

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from flowturbo.text_to_image.captions import read_folder, read_picture


def png(value, size=(12, 8)):
    data = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(data, "PNG")
    return data.getvalue()


def as_metadata(folder):
    lines = []
    for k in range(3):
        (folder / f"{k}.png").write_bytes(png(k))
        lines.append(json.dumps({"file_name": f"{k}.png", "text": f"grey {k}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def as_text_files(folder):
    for k in range(3):
        (folder / f"{k}.png").write_bytes(png(k))
        (folder / f"{k}.txt").write_text(f"grey {k}\n")


def as_tar(folder):
    with tarfile.open(folder / "shard-0.tar", "w") as archive:
        for k in range(3):
            for name, data in ((f"{k}.png", png(k)), (f"{k}.txt", f"grey {k}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def as_parquet(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": png(k), "path": f"{k}.png"}, "text": f"grey {k}"} for k in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


@pytest.mark.parametrize("write", [as_metadata, as_text_files, as_tar, as_parquet])
def test_every_layout_reads_alike(write, tmp_path):
    write(tmp_path)
    items = read_folder(tmp_path)
    assert [item.caption for item in items] == ["grey 0", "grey 1", "grey 2"]
    for k, item in enumerate(items):
        picture = read_picture(item, 4, 4, 3)  # the centre, halved
        assert picture.shape == (3, 4, 4)
        assert (picture == k).all()
        assert read_picture(item, 8, 12, 1).shape == (1, 8, 12)


def test_the_centre_is_kept(tmp_path):
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    assert (read_picture(read_folder(tmp_path)[0], 4, 4, 1) == 200).all()


def test_what_holds_no_captions_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="holds no captioned images: expected"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_folder(tmp_path / "nowhere")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png(0))
    with pytest.raises(ValueError, match="beside its images: expected txt, text or caption"):
        read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected an object with file_name and text"):
        read_folder(tmp_path)
