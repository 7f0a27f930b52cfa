import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowturbo.data import identity
from flowturbo.data.folders import ClassFolder
from flowturbo.data.identity import RULES_OF_0_1, data_changes, fingerprint_files, sample_of, sizes_of
from flowturbo.data.parts import Subset

OLD = Path(__file__).parents[1] / "compatibility" / "v0.1.0"


def record_of(data):
    """As a run keeps it: through JSON."""
    return json.loads(json.dumps(data.identity().record()))


def read(root, **settings):
    return ClassFolder(root, 8, **settings)


@pytest.fixture
def root(class_folder, tmp_path):
    return class_folder(tmp_path / "d")


def test_the_same_images_have_changed_in_nothing(root):
    before = read(root)
    assert data_changes(record_of(before), read(root)) == []
    assert data_changes(None, read(root)) == []
    root.rename(root.with_name("elsewhere"))
    assert data_changes(record_of(before), read(root.with_name("elsewhere"))) == []


def same_size(root):
    path = root / "c0" / "0.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


CHANGES = {
    "other content of the same size": same_size,
    "one more": lambda root: (root / "c0" / "new.png").write_bytes((root / "c0" / "0.png").read_bytes()),
    "one less": lambda root: (root / "c0" / "0.png").unlink(),
    "other name": lambda root: (root / "c0" / "0.png").rename(root / "c0" / "00.png"),
    "other class": lambda root: (root / "c0" / "0.png").rename(root / "c1" / "00.png"),
    "exchanged": lambda root: [
        (root / "c0" / "0.png").rename(root / "x"),
        (root / "c1" / "0.png").rename(root / "c0" / "0.png"),
        (root / "x").rename(root / "c1" / "0.png"),
    ],
}


@pytest.mark.parametrize("limit", ["all", "a sample"])
@pytest.mark.parametrize("change", CHANGES)
def test_other_images_are_noticed(root, change, limit, monkeypatch):
    if limit == "a sample":
        monkeypatch.setattr(identity, "CONTENT_FILES", 3)
    before = record_of(read(root))
    CHANGES[change](root)
    assert "the data have other images" in data_changes(before, read(root))


def test_a_fingerprint_is_made_once(root, monkeypatch):
    data = read(root)
    first = data.fingerprint()
    assert data.fingerprint_covers == "the content of all 6 files"
    monkeypatch.setattr(identity, "sha256", None)
    assert data.fingerprint() == first


@pytest.mark.parametrize("waiting", [identity.WAITING, 0.0], ids=["no disk", "a slow disk"])
def test_sizes_are_asked_for_in_threads_where_a_disk_is_waited_for(tmp_path, monkeypatch, waiting):
    monkeypatch.setattr(identity, "PROBED", 5)
    monkeypatch.setattr(identity, "WAITING", waiting)
    for k in range(23):
        (tmp_path / f"{k}.png").write_bytes(b"x" * k)
    files = [f"{k}.png" for k in range(23)]
    assert sizes_of(str(tmp_path), files) == list(range(23))
    (tmp_path / "21.png").unlink()
    (tmp_path / "22.png").unlink()
    os.mkfifo(tmp_path / "22.png")
    for last, said in (("21.png", "21.png': No such file"), ("22.png", "22.png': a folder, pipe")):
        with pytest.raises(ValueError, match=said):
            sizes_of(str(tmp_path), [*files[:20], last])


@pytest.mark.parametrize(("limit", "value"), [("CONTENT_FILES", 59), ("CONTENT_BYTES", 60 * 60 - 1)])
def test_beyond_the_limits_a_sample_of_files_stands_for_all(tmp_path, monkeypatch, limit, value):
    files = [f"{k:02d}.png" for k in range(60)]
    for name in files:
        (tmp_path / name).write_bytes(name.encode() * 10)

    def found():
        return fingerprint_files(str(tmp_path), files, sizes_of(str(tmp_path), files))

    whole = found()
    assert whole.covers == "the content of all 60 files"
    monkeypatch.setattr(identity, limit, value)
    monkeypatch.setattr(identity, "SAMPLED_FILES", 20)
    sampled = found()
    assert sampled.covers == "names and sizes of all 60 files, and the content of 20"
    assert sampled.digest != whole.digest
    noticed = 0
    for name in files:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[::-1])
        noticed += found() != sampled
        (tmp_path / name).write_bytes(content)
    assert noticed == 20
    monkeypatch.setattr(identity, "CONTENT_BYTES", 60 * 15)
    assert found().covers.endswith("the content of 15")
    monkeypatch.setattr(identity, "CONTENT_BYTES", 1)
    assert found().covers.endswith("the content of 1")


def test_the_sample_depends_on_the_lines_alone(monkeypatch):
    monkeypatch.setattr(identity, "SAMPLED_FILES", 50)
    lines = [f"{k}.png".encode() for k in range(1000)]
    chosen = {lines[i] for i in sample_of(lines)}
    assert len(chosen) == 50
    assert {lines[::-1][i] for i in sample_of(lines[::-1])} == chosen
    assert len({lines[i] for i in sample_of(lines[1:])} & chosen) < 50  # positions are those of the lines given
    assert len({lines[1:][i] for i in sample_of(lines[1:])} & chosen) >= 49


def test_what_is_no_file_is_named_before_it_is_waited_for(root):
    os.mkfifo(root / "c0" / "pipe.png")
    with pytest.raises(ValueError, match=r"cannot read image '.*pipe\.png'.*not a file"):
        read(root).fingerprint()


def test_an_edited_class_map_is_noticed_and_its_path_does_not_matter(root):
    before = record_of(read(root, num_classes=5, class_map={"c0": 1, "c1": 2}))
    assert data_changes(before, read(root, num_classes=5, class_map={"c1": 2, "c0": 1, "more": 3})) == []
    assert data_changes(before, read(root, num_classes=5, class_map={"c0": 2, "c1": 1})) == [
        "the images have other classes"
    ]


def test_a_part_of_the_data_is_another_than_the_whole(root):
    data = read(root)
    half = Subset(data, 0.5, seed=0)
    assert data_changes(record_of(half), Subset(read(root), 0.5, seed=0)) == []
    assert "the data have other images" in data_changes(record_of(half), data)
    assert "the data have other images" in data_changes(record_of(half), Subset(data, 0.5, seed=1))
    assert half.fingerprint() != data.fingerprint()


@pytest.mark.parametrize("before", [3, [], {}, {"rules": 1}, {"fingerprint": "x"}])
def test_a_damaged_record_is_a_change(root, before):
    assert data_changes(before, read(root)) == ["the record of the data is damaged"]


def test_odd_values_in_a_record_are_cut_short(root):
    before = record_of(read(root))
    before["rules"] = {"order": "x" * 10_000}
    before["background"] = ["y"] * 10_000
    assert max(map(len, data_changes(before, read(root)))) < 300


# ---- runs of version 0.1, which recorded names and sizes, and read by older rules


def of_0_1(data):
    """What version 0.1 recorded of the same folder."""
    return data.fingerprint_of_0_1


def test_the_fingerprint_of_a_run_of_version_0_1_is_found_again():
    config = json.loads((OLD / "results" / "000-predictor-no-note" / "config.json").read_text())
    data = read(OLD / "images")
    assert of_0_1(data) == config["data"]
    assert data_changes(config["data"], data) == []
    assert data_changes("0" * 64, data) == ["the data have other images"]
    assert data_changes(of_0_1(Subset(data, 0.5, 0).data), Subset(data, 0.5, 0)) == ["the data have other images"]
    assert data_changes(Subset(data, 0.5, 0).identity().fingerprint_of_0_1, Subset(data, 0.5, 0)) == []


def test_version_0_1_saw_no_content(root):
    before = of_0_1(read(root))
    same_size(root)
    assert data_changes(before, read(root)) == []
    (root / "c0" / "0.png").unlink()
    assert data_changes(before, read(root)) == ["the data have other images"]


def hidden_class(root):
    (root / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(root / ".ipynb_checkpoints" / "a.png")


def hidden_image(root):
    Image.new("RGB", (8, 8)).save(root / "c0" / "._0.png")


def mixed(root):
    """0.1 took a folder's files before those of its folders: 0.png, 1.png, 2.png, 1/a.png."""
    (root / "c0" / "1").mkdir()
    Image.new("RGB", (8, 8)).save(root / "c0" / "1" / "a.png")


def numbers(root):
    for number in range(1, 13):
        (root / str(number)).mkdir()
        Image.new("RGB", (8, 8)).save(root / str(number) / "a.png")
    for name in ("c0", "c1"):
        for path in (root / name).iterdir():
            path.unlink()
        (root / name).rmdir()


def turned(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(root / "c0" / "a.jpg", exif=exif)


def veiled(root):
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(root / "c0" / "a.png")


def deep(root):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / "c0" / "a.png")


RULES = {
    "order": (hidden_class, hidden_image, mixed),
    "classes": (numbers,),
    "orientation": (turned,),
    "transparency": (veiled,),
    "depth": (deep,),
}


@pytest.mark.parametrize(
    ("rule", "change"),
    [pytest.param(rule, change, id=change.__name__) for rule, changes in RULES.items() for change in changes],
)
def test_a_rule_that_reads_the_images_otherwise_now_is_named(root, rule, change):
    change(root)
    data = read(root)
    (found,) = data_changes(of_0_1(data), data)
    assert found.startswith(f"the rule {rule!r} of reading images was of version 1, is of version 2 (")
    assert data.read_otherwise(rule) > 0
    older = {**record_of(data), "rules": RULES_OF_0_1}
    assert data_changes(older, read(root)) == [found]
    assert data_changes(record_of(data), read(root)) == []


def test_rules_of_versions_that_are_not_known_are_named(root):
    data = read(root)
    before = {**record_of(data), "rules": {**data.identity().rules, "order": 3}}
    assert data_changes(before, data) == ["the rule 'order' of reading images was of version 3, is of version 2"]


def test_another_background_matters_where_there_is_transparency(root):
    before = record_of(read(root))
    assert data_changes(before, read(root, background="black")) == []
    veiled(root)
    before = record_of(read(root))
    assert data_changes(before, read(root, background="black")) == ["the background was 'white', is 'black'"]
