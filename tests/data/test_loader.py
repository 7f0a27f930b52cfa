"""Training samples by number, and how ranks and workers share them."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from flowturbo.data.folders import ClassFolder
from flowturbo.data.loader import MICRO_BATCHES, Batch, TrainingSamples, micro_batch, training_loader
from flowturbo.data.randomness import Stream, keyed_generator
from flowturbo.system import cli
from flowturbo.system.distributed import World

CPU = torch.device("cpu")


class Drawn(NamedTuple):
    """What the tests' objective draws: the number itself, and some noise."""

    number: torch.Tensor
    noise: torch.Tensor


def draw(numbers):
    noise = [keyed_generator(5, number).standard_normal(4) for number in numbers]
    return Drawn(torch.tensor(numbers), torch.from_numpy(np.stack(noise)))


def one(rank=0, size=1):
    return World(rank, rank, size, CPU)


@pytest.fixture(scope="module")
def data(class_folder, tmp_path_factory):
    """Seven images in two classes, whose first pixel is their number."""
    root = class_folder(tmp_path_factory.mktemp("data") / "d", images=4)
    (root / "c1" / "3.png").unlink()
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, 0] = pixels[0, -1] = number
        Image.fromarray(pixels).save(path)
    return ClassFolder(root, 8)


def samples_of(data, seed=0, **options):
    return TrainingSamples(data, seed, draw, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip((*a[:3], *a.draws), (*b[:3], *b.draws), strict=True))


def joined(batches):
    drawn = Drawn(*map(torch.cat, zip(*(batch.draws for batch in batches))))
    return Batch(*map(torch.cat, zip(*(batch[:3] for batch in batches))), drawn)


def test_every_pass_takes_each_image_once_in_an_order_of_its_own(data):
    passes = [samples_of(data).__getitems__(range(7 * e, 7 * e + 7)).images[:, 0, 0, 0].tolist() for e in range(6)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len(set(map(tuple, passes))) == 6
    assert passes[0] != samples_of(data, seed=1).__getitems__(range(7)).images[:, 0, 0, 0].tolist()


def test_a_sample_depends_on_seed_and_number_alone(data):
    whole = samples_of(data).__getitems__(range(30))
    assert [tuple(value.shape) for value in whole[:3]] == [(30, 3, 8, 8), (30,), (30,)]
    assert [value.dtype for value in whole[:3]] == [torch.uint8, torch.int64, torch.int64]
    assert whole.numbers.tolist() == whole.draws.number.tolist() == list(range(30))
    assert whole.labels.tolist() == [int(k >= 4) for k in whole.images[:, 0, 0, 0].tolist()]
    for number in (0, 13, 29):
        alone = samples_of(data).__getitems__([number])
        assert same(alone, whole.rows(number, number + 1))


def test_flips_are_of_half_the_samples_and_change_nothing_else(data):
    flipped, plain = samples_of(data).__getitems__(range(400)), samples_of(data, flip=False).__getitems__(range(400))
    kept = (flipped.images == plain.images).flatten(1).all(1)
    turned = (flipped.images == plain.images.flip(3)).flatten(1).all(1)
    assert (kept ^ turned).all()
    assert 150 < turned.sum() < 250
    assert same(flipped._replace(images=plain.images), plain)
    first = {int(i): {bool(t) for t in turned[plain.images[:, 0, 0, 0] == i]} for i in range(7)}
    assert all(seen == {True, False} for seen in first.values())  # of the sample, not of the image
    drawn = [keyed_generator(0, number, Stream.TRAINING).random() < 0.5 for number in range(400)]
    assert turned.tolist() == drawn


def batches(data, size, rank=0, ranks=1, first=0, last=3, **more):
    settings = {"workers": 0, **more}
    loader = training_loader(samples_of(data), size, one(rank, ranks), first=first, last=last, **settings)
    assert len(loader) == last - first
    return list(loader)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_ranks_share_each_global_batch(data, ranks, exact):
    whole = samples_of(data)
    per_rank = [batches(data, 18, rank, ranks, exact=exact) for rank in range(ranks)]
    for step in range(3):
        together = joined([per_rank[rank][step] for rank in range(ranks)])
        assert same(together, whole.__getitems__(range(18 * step, 18 * step + 18)))


@pytest.mark.parametrize("size", [12, 13, 23, 256])
def test_micro_batches_are_a_partition_of_the_batch(size):
    parts = [micro_batch(micro, size) for micro in range(MICRO_BATCHES)]
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_batches_know_neither_workers_nor_where_the_run_started(data):
    reference = batches(data, 5, last=4)
    for other in (
        batches(data, 5, last=4, workers=2),
        batches(data, 5, first=0, last=2) + batches(data, 5, 0, 1, 2, 4),
    ):
        assert len(other) == 4
        assert all(same(a, b) for a, b in zip(other, reference))


@pytest.mark.parametrize(
    ("size", "ranks", "exact", "message"),
    [
        (2, 3, False, "global batch size 2 over 3 ranks: needs at least 3 samples$"),
        (11, 1, True, "global batch size 11 over 1 ranks: needs at least 12 samples and at most 12 ranks in exact"),
        (99, 13, True, "global batch size 99 over 13 ranks"),
    ],
)
def test_more_ranks_than_samples_are_refused(data, size, ranks, exact, message):
    with pytest.raises(ValueError, match=message):
        batches(data, size, 0, ranks, exact=exact)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_in_a_loader_is_told_in_one_line(class_folder, tmp_path, workers):
    root = class_folder(tmp_path / "d", images=4)
    (root / "c1" / "2.png").write_bytes((root / "c1" / "2.png").read_bytes()[:40])
    line = None
    try:  # not pytest.raises, which would keep the loader and its worker alive until the interpreter's end
        batches(ClassFolder(root, 8), 4, last=2, workers=workers)
    except ValueError as error:
        line = cli.one_line(error)
    assert line is not None
    assert line.startswith(f"cannot read image '{root / 'c1' / '2.png'}': ")
    assert "Traceback" not in line
    assert "\n" not in line


def test_what_is_done_to_a_batch_is_done_to_all_of_it(data):
    batch = samples_of(data).__getitems__(range(5))
    moved = batch.to(torch.device("meta"))
    assert all(value.is_meta for value in (*moved[:3], *moved.draws))
    assert isinstance(moved.draws, Drawn)
    assert same(joined([batch.rows(0, 2), batch.rows(2, 9)]), batch)
