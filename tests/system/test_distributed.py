import os
import signal
import time

import pytest
import torch

from flowturbo.system.advice import advice_for
from flowturbo.system.distributed import World, pick_device, world
from flowturbo.weights.cache import MissingWeights

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


# ---- devices


def has(monkeypatch, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("device", "local_rank", "cuda", "expected"),
    [
        ("auto", None, 0, "cpu"),
        ("auto", None, 3, "cuda:0"),
        ("auto", 2, 3, "cuda:2"),
        ("auto", 2, 0, "cpu"),
        ("cpu", 3, 3, "cpu"),
        ("cuda", None, 3, "cuda:0"),
        ("cuda:2", None, 3, "cuda:2"),
        ("cuda", 1, 3, "cuda:1"),
        ("mps", None, 0, "mps"),
    ],
)
def test_a_device_is_what_the_machine_has(monkeypatch, device, local_rank, cuda, expected):
    has(monkeypatch, cuda, mps=True)
    assert pick_device(device, local_rank) == torch.device(expected)


@pytest.mark.parametrize(
    "device", ["xpu", "meta", "hpu", "vulkan", "gpu", "cuda:x", "cuda:-1", "cuda:", "cuda:0:1", "cpu:0", "CPU", ""]
)
def test_an_unknown_device_is_refused(device):
    message = f"^device '{device}' is unknown; expected auto, cpu, cuda, cuda:K or mps$"
    with pytest.raises(ValueError, match=message):
        pick_device(device)


@pytest.mark.parametrize(
    ("device", "local_rank", "message"),
    [
        ("cuda:99", None, r"\(index 99\) is not there: this machine has 2 CUDA devices"),
        ("cuda", 99, r"\(index 99\) is not there: this machine has 2 CUDA devices"),
        ("cuda:0", 99, r"\(index 99\) is not there"),
        ("cuda:99999999999999999999", None, "is not there: this machine has 2"),
        ("mps", None, "device 'mps' is not there"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, local_rank, message):
    has(monkeypatch, cuda=2)
    with pytest.raises(ValueError, match=message):
        pick_device(device, local_rank)


def test_without_cuda_its_devices_are_not_there(monkeypatch):
    has(monkeypatch)
    with pytest.raises(ValueError, match="this machine has 0 CUDA devices"):
        pick_device("cuda")


# ---- several ranks


def test_ranks_agree_and_add_up(forked):
    def main(ranks):
        value = ranks.agree(lambda: {"rank": ranks.rank + 41})
        total = ranks.sum(torch.tensor([ranks.rank + 1.0])).item()
        ranks.barrier()
        print(f"rank {ranks.rank} of {ranks.size}: {value['rank']} {total}")

    done = forked(main, 3)
    assert done.codes == [0, 0, 0]
    assert sorted(done.lines) == [f"rank {rank} of 3: 41 6.0" for rank in range(3)]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("seed x is no number"), 2),
        (OSError("cannot write 'x'"), 2),
        (FloatingPointError("step 3: nan"), 1),
        (MissingWeights({"predictor_ckpt": "SiT-XL-2-256x256.pt"}), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_rank_0_meets_ends_every_rank_and_is_told_once(forked, error, code, size):
    def fail():
        raise error

    done = forked(lambda ranks: ranks.agree(fail), size)
    assert done.codes == [code] * size
    assert len(done.lines) == 1
    assert done.lines[0].endswith(f"script.py: error: {error}{advice_for(error)}")


def test_a_mistake_that_cannot_be_sent_keeps_its_message(forked):
    class Local(ValueError):
        """Of no module, so that it cannot be pickled."""

    def fail():
        raise Local("seed x is no number")

    done = forked(lambda ranks: ranks.agree(fail), 2)
    assert done.codes == [2, 2]
    assert len(done.lines) == 1


def test_a_defect_of_rank_0_shows_one_traceback(forked):
    done = forked(lambda ranks: ranks.agree(lambda: {}["missing"]), 3)
    assert done.codes == [1, 2, 2]
    assert done.text.count("Traceback") == done.text.count("KeyError: 'missing'") == 1
    assert done.text.count("script.py: error: rank 0 failed: KeyError") == 1


@pytest.mark.parametrize("error", [ValueError("the cause"), KeyError("the cause")])
@pytest.mark.parametrize("rank", [0, 2])
def test_who_loses_a_rank_tells_so_once_and_after_the_cause(forked, rank, error):
    def main(ranks):
        ranks.barrier()
        if ranks.rank == rank:
            raise error
        ranks.sum(torch.ones(1))

    done = forked(main, 3)
    last = "script.py: error: lost the other ranks: one has ended; its own message, or torchrun's report, tells why"
    assert done.text.count("lost the other ranks") == 1
    assert done.lines[-1].endswith(last)
    assert "the cause" in done.lines[-2]
    assert sorted(done.codes) == ([1, 2, 2] if isinstance(error, KeyError) else [2, 2, 2])


def test_a_killed_rank_is_missed(forked):
    def main(ranks):
        ranks.barrier()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.barrier()

    done = forked(main, 3)
    assert done.codes == [2, -signal.SIGKILL, 2]
    assert len(done.lines) == 1
    assert "lost the other ranks: one has ended" in done.lines[0]


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_agreed(forked):
    def main(ranks):
        if ranks.rank == 1:
            time.sleep(2)
        ranks.barrier()

    done = forked(main, 2, timeout=0.5)
    assert done.codes == [2, 2]
    assert "lost the other ranks: " in done.lines[0]
    assert "imed out" in done.lines[0]


RANKS = """
import sys
from flowturbo.system import cli
from flowturbo.system.distributed import world

def main():
    with world("cpu") as ranks:
        print(f"rank {ranks.rank} of {ranks.size}", flush=True)
        ranks.barrier()
        ranks.agree(lambda: int(sys.argv[1]))

cli.run_script(main)
"""


def test_under_torchrun_a_mistake_is_told_once(python, tmp_path):
    (tmp_path / "script.py").write_text(RANKS)
    done = python(tmp_path / "script.py", "wrong", ranks=2)
    assert [done.stdout.count(f"rank {rank} of 2") for rank in range(2)] == [1, 1]
    assert done.returncode != 0
    assert done.stderr.count("script.py: error: invalid literal") == 1
    assert done.stderr.count("exitcode  : 2") == 2
    assert "lost the other ranks" not in done.stderr
