import pytest

from flowturbo.data.classes import class_index, class_indices, imagenet_names


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


def test_every_class_is_found_by_its_id_and_its_description():
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    for index in range(1000):
        assert class_index(info.index_to_label_name(index), 1000) == index
    descriptions = [info.index_to_description(i, detailed=False).lower() for i in range(1000)]
    for index, description in enumerate(descriptions):
        if descriptions.count(description) == 1:
            assert class_index(description, 1000) == index
    assert len(imagenet_names()) > 2000


def test_a_name_of_two_classes_names_neither():
    with pytest.raises(ValueError, match="'crane' names the ImageNet classes 134, 517"):
        class_index("crane", 1000)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
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
    ],
)
def test_wrong_classes_are_refused_with_what_is_known(name, classes, message):
    with pytest.raises(ValueError, match=message) as caught:
        class_index(name, classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folders", "classes", "indices"),
    [
        (["a", "b"], None, [0, 1]),
        (["a", "b", "c"], 3, [0, 1, 2]),
        (["n02099601", "volcano"], 1000, [207, 980]),
        (["golden_retriever", "Macaw"], 1000, [207, 88]),
    ],
)
def test_folders_become_the_models_classes(folders, classes, indices):
    assert class_indices(folders, classes) == indices


@pytest.mark.parametrize(
    ("folders", "classes", "message"),
    [
        (["a", "b"], 1, "2 class folders, the model 1 classes"),
        (["a", "b"], 10, "2 class folders, the model 10 classes.*--target predictor"),
        (["volcano", "my cat"], 1000, "'my cat' is no WordNet id or ImageNet class name.*--target predictor"),
    ],
)
def test_folders_that_fit_no_classes_are_refused(folders, classes, message):
    with pytest.raises(ValueError, match=message):
        class_indices(folders, classes)


def test_numbered_folders_mean_their_numbers():
    names = sorted(str(i) for i in range(12))
    assert class_indices(names, None) == [int(name) for name in names]
    assert class_indices(["0", "7"], 10) == [0, 7]
    with pytest.raises(ValueError, match="nothing says which"):
        class_indices(["0", "70"], 10)
