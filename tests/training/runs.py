"""What the tests of training share: tiny runs in this process or in forked ranks, and how checkpoints are compared."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import train
from flowturbo.system import cli

ROOT = Path(train.__file__).parent
COMMON = [
    *("--vae-ckpt", "none", "--num-workers", "0", "--sample-every", "0", "--device", "cpu"),
    *("--global-batch-size", "5", "--lr", "1e-3"),
]
PREDICTOR = [
    *(*COMMON, "--target", "predictor", "--image-size", "8", "--channels", "1", "--patch-size", "2"),
    *("--hidden-size", "32", "--depth", "1", "--num-heads", "4"),
]


def run(results, *arguments, number=0):
    """Train in this process; returns the run's folder."""
    train.main([*map(str, arguments), "--results-dir", str(results)])
    return next(Path(results).glob(f"{number:03d}-*"))


def checkpoint(folder, step):
    return torch.load(folder / "checkpoints" / f"{step:07d}.pt")


def figures(folder, name):
    """The figures of one name in a run's log.txt."""
    return [float(x) for x in re.findall(rf" {name}=(\S+)", (folder / "log.txt").read_text())]


def metrics(folder):
    """The objects in a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flat(content):
    """Every tensor and number of a checkpoint but its config, by path."""
    found = {}

    def walk(value, path):
        if isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{path}/{key}")
        elif isinstance(value, (list, tuple)):
            walk(dict(enumerate(value)), path)
        else:
            found[path] = value

    walk({k: v for k, v in content.items() if k != "config"}, "")
    return found


def assert_same_bits(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path, value in a.items():
        assert torch.equal(value, b[path]) if isinstance(value, torch.Tensor) else value == b[path], path


def assert_close(a, b):
    """The same training up to rounding: Adam's moments, which are sums of gradients, and the weights."""
    for key, moments in a["opt"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            scale = max(moments[name].abs().max().item(), 1e-12)
            torch.testing.assert_close(
                moments[name], b["opt"]["state"][key][name], atol=1e-4 * scale + 1e-10, rtol=1e-3
            )
    for name, value in a["model"].items():
        if not name.endswith("attn.qkv.bias"):  # the keys' has no gradient but rounding errors, which Adam enlarges
            torch.testing.assert_close(value, b["model"][name], atol=2e-5, rtol=1e-4)


class Done(NamedTuple):
    """What the ranks of a run have come to: exit codes, -N for signal N, and all that they told."""

    codes: list[int]
    text: str

    @property
    def errors(self):
        return [line for line in self.text.splitlines() if "train.py: error" in line]


class Forks:
    """A process that has imported train.py and computed nothing, and forks the ranks of runs.

    A new interpreter would take seconds for each; and a process that has computed gradients cannot be forked.
    """

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import runs; runs.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def __call__(self, folder, *arguments, ranks=1, signal_at=None, output="", descriptors=0, **environment):
        """Run train.py as torchrun does, its output in `folder`, which is new. `signal_at` is a pair: a signal, and
        the text after which every rank gets it. `output` is a key of OUTPUTS, if not that file; `descriptors` limits
        how many files each may have open."""
        folder.mkdir(parents=True)
        order = {"argv": list(map(str, arguments)), "ranks": ranks, "folder": str(folder), "signal_at": signal_at}
        order |= {"output": output, "descriptors": descriptors}
        print(json.dumps({**order, "environment": environment}), file=self.process.stdin, flush=True)
        codes = json.loads(self.process.stdout.readline())
        return Done(codes, (folder / "out.txt").read_text())

    def close(self):
        print(file=self.process.stdin, flush=True)  # closing it would not do: loader workers may still hold it
        self.process.wait(20)


def serve():
    """Fork what is asked for on stdin, line by line, until an empty one."""
    from diffusers import AutoencoderKL  # noqa: F401

    import flowturbo.training.resume  # noqa: F401  # with all that train.py imports

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, here and in the forks
    while line := sys.stdin.readline().strip():
        order = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            order["port"] = free.getsockname()[1]
        pids = [fork(rank, **order) for rank in range(order["ranks"])]
        if order["signal_at"]:
            number, text = order["signal_at"]
            while text not in (Path(order["folder"]) / "out.txt").read_text():
                time.sleep(0.01)
            for pid in pids:
                os.kill(pid, number)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def gone():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


OUTPUTS = {  # what stdout and stderr are
    "gone": gone,
    "closed": lambda: None,
    "full": lambda: os.open("/dev/full", os.O_WRONLY),
}


def fork(rank, argv, ranks, folder, port, environment, output, descriptors, **_):
    """Start a rank; returns its process id."""
    log = os.open(Path(folder) / "out.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    pid = os.fork()
    if pid:
        os.close(log)
        return pid
    try:
        signal.alarm(90)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place["TORCHELASTIC_ERROR_FILE"] = Path(folder) / str(rank) / "error.json"
        os.environ.update({name: str(value) for name, value in (place | environment).items()})
        if output:
            log = OUTPUTS[output]()
        for stream in (1, 2):
            os.close(stream) if log is None else os.dup2(log, stream)
        if descriptors:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
        sys.argv = ["train.py", *argv]
        cli.run_script(lambda: train.main(argv))
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(99)
