import pytest
import torch

from flowturbo.system.distributed import World, pick_device, world

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [0, 1, 5, 18, 64])
def test_the_shares_of_the_ranks_are_a_partition(size, total):
    shares = [World(rank, rank, size, CPU).share(total) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_a_world_of_its_own(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with world("cpu") as ranks:
        assert (ranks.rank, ranks.size, ranks.device, ranks.is_main) == (0, 1, CPU, True)
        assert not torch.distributed.is_initialized()
        assert ranks.agree(lambda: {"a": 1}) == {"a": 1}
        with pytest.raises(KeyError):
            ranks.agree(lambda: {}["missing"])
        assert torch.equal(ranks.sum(torch.ones(2)), torch.ones(2))
        ranks.barrier()


def test_auto_is_what_the_machine_has():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu", local_rank=3) == CPU


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cpu:x"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match="is unknown; expected auto, cpu, cuda or cuda:K"):
        pick_device(device)


@pytest.mark.parametrize(
    ("device", "local_rank", "index"), [("cuda:99", None, 99), ("cuda", 99, 99), ("cuda:0", 99, 99)]
)
def test_a_device_that_is_not_there_is_refused(device, local_rank, index):
    with pytest.raises(ValueError, match=rf"\(index {index}\) is not there: this machine has \d+ CUDA devices"):
        pick_device(device, local_rank)


@pytest.mark.parametrize(("device", "local_rank", "index"), [("cuda", None, 0), ("cuda:2", None, 2), ("cuda", 1, 1)])
def test_the_device_is_the_local_rank(monkeypatch, device, local_rank, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert pick_device(device, local_rank) == torch.device("cuda", index)


RANKS = """
import sys, torch
from datetime import timedelta
from flowturbo.system import cli
from flowturbo.system.distributed import world

def main():
    with world("cpu", timeout=timedelta(seconds=30)) as ranks:
        value = ranks.agree(lambda: ranks.rank + 41)
        total = ranks.sum(torch.tensor([ranks.rank + 1.0])).item()
        print(f"rank {ranks.rank} of {ranks.size}: {value} {total}", flush=True)
        ranks.barrier()
        ranks.agree(lambda: int(sys.argv[1]))  # ValueError on rank 0

cli.run_script(main)
"""


def test_two_ranks_agree_and_a_mistake_is_told_once(python, tmp_path):
    (tmp_path / "script.py").write_text(RANKS)
    done = python(tmp_path / "script.py", "wrong", ranks=2)
    for rank in range(2):
        assert f"rank {rank} of 2: 41 3.0" in done.stdout
    assert done.returncode != 0
    assert done.stderr.count("script.py: error: invalid literal") == 1
