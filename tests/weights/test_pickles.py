import argparse
import collections
import io
import pickle
import resource
import tarfile

import pytest
import torch

from flowturbo.weights.checkpoint import load_checkpoint
from flowturbo.weights.pickles import LONGEST, Refused, check_pickle, check_pickles


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def networks():
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": layer.state_dict(),
        "parameter": layer.weight,
        "half": {"w": layer.weight.detach().bfloat16()},
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-4, sizes=(1, 2), more={"a": [None, True, "x"]}),
        "order": collections.OrderedDict(a=1, b=collections.OrderedDict()),
    }


@pytest.mark.parametrize("new", [True, False])
def test_what_checkpoints_are_made_of_passes(tmp_path, new):
    torch.save(networks(), tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    check_pickles(str(tmp_path / "a.pt"), new)
    assert load_checkpoint(tmp_path / "a.pt")["args"].lr == 1e-4


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_a_few_bytes_take_no_gigabytes(tmp_path, form):
    """torch's weights-only loader would make the bytearray: 3.9 GB of a file of 53 bytes."""
    path, bomb = tmp_path / "a.pt", Call(bytearray, 3 << 30)
    if form == "pickle":
        path.write_bytes(pickle.dumps(bomb, 2))
    else:
        torch.save({"w": bomb}, path, _use_new_zipfile_serialization=form == "zip")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*a\.pt': it holds what is not loaded: .*bytearray"):
        load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def copies(code, count):
    """A table of 1000 entries in memo 1, then `code` so many times."""
    table = b"}q\1(" + b"".join(b"M" + k.to_bytes(2, "little") + b"K\0" for k in range(1000)) + b"u"
    return b"\x80\2ccollections\nOrderedDict\nq\0" + b"]" + table + b"a" + code * count + b"."


def passes(data):
    stream = io.BytesIO(data)
    check_pickle(stream)
    assert stream.read() == b""


def test_calls_with_arguments_and_many_copies_are_refused():
    passes(copies(b"h\0)R", 100))
    with pytest.raises(Refused, match=r"^a call of collections\.OrderedDict with arguments$"):
        passes(copies(b"h\0h\1\x85R", 1))
    passes(copies(b"h\0)Rh\1b", 8))  # objects beside a table that they share
    with pytest.raises(Refused, match="many copies of one table"):
        passes(copies(b"h\0)Rh\1b", 9))
    with pytest.raises(Refused, match="many copies"):
        passes(copies(b"h\0)Rh\1(ub", 9))  # hidden behind an update with nothing


@pytest.mark.parametrize("odd", [torch.ones(2).to_sparse(), torch.zeros(2, dtype=torch.float8_e5m2), {1, 2}, 1j])
def test_other_types_are_named(tmp_path, odd):
    torch.save({"w": odd}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"what is not loaded: \S+(rebuild|set|complex)\S*, expected tensors"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_long_pickle_is_refused(tmp_path):
    torch.save({"w": ["x" * 1000 + str(k) for k in range(LONGEST // 1000)]}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a pickle of .* bytes, expected at most"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_tar_archive_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "a.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    with pytest.raises(ValueError, match=r"a\.pt': it holds what is not loaded: a tar archive"):
        load_checkpoint(tmp_path / "a.pt")
