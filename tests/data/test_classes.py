import json
import os
import unicodedata

import pytest

from flowturbo.data import classes
from flowturbo.data.classes import (
    ClassNames,
    assign_classes,
    class_index,
    class_label,
    imagenet_names,
    read_class_map,
    sort_folders,
)

PETS = ClassNames(("cat", "Golden_Retriever", "tabby, tiger cat", "éclair", ""), (3, 4, 5, 6, 0))


@pytest.mark.parametrize(
    ("name", "index"),
    [
        *(("207", 207), (" 0 ", 0), ("999", 999), ("golden retriever", 207), ("Golden Retriever", 207)),
        *(("n02099601", 207), ("N02099601", 207), ("volcano", 980), ("macaw", 88), ("geyser", 974)),
        *(("valley, vale", 979), ("vale", 979), ("tench", 0), ("toilet tissue", 999)),
    ],
)
def test_an_imagenet_class_has_many_names(name, index):
    assert class_index(name, 1000) == index


def test_every_class_is_found_by_its_id_and_its_description(monkeypatch):
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    for index in range(1000):
        assert class_index(info.index_to_label_name(index), 1000) == index
    descriptions = [info.index_to_description(i, detailed=False).lower() for i in range(1000)]
    for index, description in enumerate(descriptions):
        if descriptions.count(description) == 1:
            assert class_index(description, 1000) == index
    assert len(imagenet_names()) > 2000
    from_files = classes._imagenet_classes()
    monkeypatch.setattr(classes, "find_spec", lambda name: None)  # another layout of timm's files
    assert classes._imagenet_classes() == from_files


def test_a_name_of_two_classes_names_neither():
    with pytest.raises(ValueError, match="'crane' names the ImageNet classes 134, 517"):
        class_index("crane", 1000)
    with pytest.raises(ValueError, match="'cat' names the classes 0, 1"):
        class_index("cat", 2, ClassNames(("cat", "Cat"), (1, 1)))


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("1000", 1000, "class 1000 is outside this model's classes 0 to 999"),
        ("-1", 1000, "class -1 is outside"),
        ("10", 10, "class 10 is outside this model's classes 0 to 9"),
        ("golden retriever", 10, "a model of 10 classes takes indices 0 to 9"),
        ("golden retriver", 1000, "did you mean .*'golden retriever'"),
        ("retriever", 1000, "did you mean .*retriever'"),
        ("xqzwvk", 1000, "^'xqzwvk' is no ImageNet class name or index$"),
        ("", 1000, "is no ImageNet class name"),
        ("²", 1000, "'²' is no ImageNet class name or index"),
        ("--5", 1000, "'--5' is no ImageNet class name or index"),
        ("9" * 5000, 1000, "is no ImageNet class name or index"),
    ],
)
def test_wrong_classes_are_refused_with_what_is_known(name, count, message):
    with pytest.raises(ValueError, match=message) as caught:
        class_index(name, count)
    assert "\n" not in str(caught.value)


# ---- the names that a model carries


@pytest.mark.parametrize(
    ("name", "index"),
    [
        *(("cat", 0), (" CAT ", 0), ("golden retriever", 1), ("golden_retriever", 1), ("3", 3)),
        *(("tabby, tiger cat", 2), ("tiger cat", 2), ("Tabby", 2)),
        *((unicodedata.normalize(form, "éclair"), 3) for form in ("NFC", "NFD")),
    ],
)
def test_own_classes_have_names(name, index):
    assert class_index(name, 5, PETS) == index


def test_unknown_names_of_own_classes_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"^'kat' is no class name or index; did you mean 'cat'\?$"):
        class_index("kat", 5, PETS)
    with pytest.raises(ValueError, match="class 5 is outside this model's classes 0 to 4"):
        class_index("5", 5, PETS)


def test_imagenets_names_stay_with_models_of_imagenet_and_with_them_alone():
    folders = ["n02099601", "volcano", "tench"]
    names = ClassNames.of(folders, [207, 980, 0], [207], 1000)
    assert class_index("golden retriever", 1000, names) == class_index("n02099601", 1000, names) == 207
    assert class_index("volcano", 1000, ClassNames(("",) * 1000, (0,) * 1000)) == 980
    mine = ClassNames.of(["volcano"], [7], [7], 1000)
    assert class_index("volcano", 1000, mine) == 7
    with pytest.raises(ValueError, match="'golden retriever' is no class name or index"):
        class_index("golden retriever", 1000, mine)


def test_names_go_into_a_config_and_come_back():
    config = json.loads(json.dumps({"model": {}, **PETS.config()}))
    assert config["class_counts"] == [3, 4, 5, 6, 0]
    assert ClassNames.from_config(config, 5) == PETS


@pytest.mark.parametrize(
    "config",
    [
        *(None, 3, [], {}, {"classes": None}, {"classes": "abcde"}, {"classes": ["a"] * 4}, {"classes": [1] * 5}),
        {"classes": {"a": 1}},
    ],
    ids=str,
)
def test_configs_without_fitting_names_have_none(config):
    assert ClassNames.from_config(config, 5) is None


def test_counts_that_make_no_sense_are_not_known():
    for counts in (None, [1], [True] * 5, ["1"] * 5):
        found = ClassNames.from_config({"classes": list("abcde"), "class_counts": counts}, 5)
        assert found == ClassNames(tuple("abcde"), (0,) * 5)


# ---- folders


@pytest.mark.parametrize(
    ("folders", "count", "indices"),
    [
        (["a", "b"], None, [0, 1]),
        (["a", "b", "c"], 3, [0, 1, 2]),
        (["n02099601", "volcano"], 1000, [207, 980]),
        (["golden_retriever", "Macaw"], 1000, [207, 88]),
    ],
)
def test_folders_become_the_models_classes(folders, count, indices):
    assert assign_classes(folders, count) == (indices, "", False)


@pytest.mark.parametrize(
    ("folders", "count", "message"),
    [
        (["a", "b"], 1, "2 class folders, the model 1 classes"),
        (["a", "b"], 10, "2 class folders, the model 10 classes, and nothing says which.* 0, 1, "),
        (["volcano", "my cat"], 1000, "'my cat' is no WordNet id or ImageNet class name"),
        (["0", "70"], 10, "nothing says which"),
        (["0", "00"], 10, "nothing says which"),
    ],
)
def test_folders_that_fit_no_classes_are_refused(folders, count, message):
    with pytest.raises(classes.UnknownClasses, match=message):
        assign_classes(folders, count)


def test_numbered_folders_mean_their_numbers():
    names = sorted(str(i) for i in range(12))
    assert assign_classes(names, None) == ([int(name) for name in names], "", False)
    assert assign_classes(["0", "7"], 10).indices == [0, 7]
    assert assign_classes(["007", "7x", "8"], 3).indices == [0, 1, 2]  # these are names


@pytest.mark.parametrize("count", [None, 12])
def test_numbers_that_are_no_indices_are_sorted_by_value_and_that_is_said(count):
    names = sorted(str(i) for i in range(1, 13))  # 1, 10, 11, 12, 2, ...
    indices, note, renumbered = assign_classes(names, count)
    assert dict(zip(names, indices)) == {str(i): i - 1 for i in range(1, 13)}
    assert "not those of the classes 0 to 11" in note
    assert "folder 1 is class 0, folder 12 is class 11" in note
    assert renumbered
    assert assign_classes(["1", "2", "3"], count and 3) == ([0, 1, 2], assign_classes(["3", "1", "2"], 3).note, False)


def test_the_order_of_folders():
    assert sort_folders(["10", "9", "02", "2"]) == ["02", "2", "9", "10"]
    assert sort_folders(["10", "9", "a"]) == ["10", "9", "a"]


# ---- class maps


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_a_class_map_says_what_the_folders_are(tmp_path):
    path = written(tmp_path / "map.json", '{"cat": "tabby", "dog": 207}')
    mapped = read_class_map(path)
    assert mapped == {"cat": 281, "dog": 207}
    assert assign_classes(["cat", "dog"], 1000, mapped).indices == [281, 207]
    assert assign_classes(["a", "b"], 5, {"a": 3, "b": 3}).indices == [3, 3]
    with pytest.raises(ValueError, match="'dog' is not in the class map, which has cat"):
        assign_classes(["cat", "dog"], 1000, {"cat": 1})
    with pytest.raises(ValueError, match="outside the model's classes 0 to 9"):
        assign_classes(["cat", "dog"], 10, mapped)


def test_a_class_map_may_name_the_models_own_classes(tmp_path):
    path = written(tmp_path / "map.json", '{"mieze": "cat", "wau": "golden retriever"}')
    assert read_class_map(path, 5, PETS) == {"mieze": 0, "wau": 1}


def test_a_byte_order_mark_is_no_part_of_a_class_map(tmp_path):
    assert read_class_map(written(tmp_path / "a.json", '{"cat": 1}', "utf-8-sig")) == {"cat": 1}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("other", ["NFC", "NFD"])
def test_letters_may_be_composed_or_not(tmp_path, form, other):
    text = json.dumps({unicodedata.normalize(form, "Bär"): 3}, ensure_ascii=False)
    mapped = read_class_map(written(tmp_path / "a.json", text))
    assert assign_classes([unicodedata.normalize(other, "Bär")], 5, mapped).indices == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be JSON like"),
        ("{}", "must be JSON like"),
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ('{"cat": -1}', "'cat' maps to '-1', not to a class index"),
        ('{"cat": true}', "'cat' maps to 'True'"),
        ('{"cat": 1.0}', "'cat' maps to '1.0'"),
        ('{"cat": "no such animal"}', "is no ImageNet class name"),
        ('{"cat": 1, "cat": 2}', "the folder 'cat' comes twice"),
        (f'{{"é": 1, "{unicodedata.normalize("NFD", "é")}": 1}}', "comes twice"),
    ],
)
def test_class_maps_that_make_no_sense_are_named(tmp_path, text, message):
    path = written(tmp_path / "map.json", text)
    with pytest.raises(ValueError, match=rf"class map '{path}'.*{message}" if "cannot" not in message else message):
        read_class_map(path)


def test_class_maps_that_are_no_files_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "gone", "."):
        with pytest.raises(ValueError, match="cannot read class map"):
            read_class_map(tmp_path / name)


def test_what_stands_under_a_picture():
    own = ClassNames(("cat", "", "tabby, tiger cat"), (1, 0, 2))
    assert [class_label(k, 3, own) for k in range(3)] == ["cat", "class 1", "tabby, tiger cat"]
    assert class_label(7, 10) == "class 7"
    assert [class_label(k, 1000) for k in (207, 980)] == ["golden retriever", "volcano"]
