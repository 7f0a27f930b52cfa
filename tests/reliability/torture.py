"""The reliability campaign: kills, signals, damaged and hostile files, full disks, dying ranks. Prints its figures.

Usage:
  python tests/reliability/torture.py                    # everything, some ten minutes; or: make torture
  python tests/reliability/torture.py --quick --only kills signals

Each trial is a fork of this process, which has imported everything and computed nothing: a new interpreter would
take seconds, and threads do not survive a fork. Seeded; exit code 1 where anything failed.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import handing_on  # noqa: E402
import hostile  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from PIL import Image  # noqa: E402

import cache_latents  # noqa: E402
import download  # noqa: E402
import evaluator  # noqa: E402
import flowturbo.system.files  # noqa: E402
import flowturbo.training.resume  # noqa: E402  # with all that train.py imports, so that forks need not
import sample  # noqa: E402
import sample_ddp_feature  # noqa: E402
import train  # noqa: E402
from flowturbo.data.folders import ClassFolder  # noqa: E402
from flowturbo.system import cli  # noqa: E402
from flowturbo.system.signals import STOPS  # noqa: E402
from flowturbo.training import run as training_run  # noqa: E402
from flowturbo.training.step import State  # noqa: E402
from flowturbo.training.stopping import EXIT_STOPPED  # noqa: E402
from flowturbo.weights.checkpoint import CheckpointFolder, load_checkpoint  # noqa: E402

TIMEOUT = 60  # seconds within which every run of this campaign must have ended by itself
STEPS, EVERY = 40, 3
WORLDS = [(1, 0), (1, 2), (2, 0), (2, 2), (4, 0), (4, 2)]  # ranks, loader workers
MOST_MEMORY = 600 << 20  # bytes that a malformed input may take beyond what a good checkpoint takes
TINY = [
    *("--target", "predictor", "--vae-ckpt", "none", "--image-size", "8", "--channels", "1", "--patch-size", "2"),
    *("--hidden-size", "32", "--depth", "1", "--num-heads", "4", "--no-learn-sigma", "--global-batch-size", "12"),
    *("--lr", "1e-3", "--sample-every", "0", "--device", "cpu", "--resume", "auto", "--ckpt-every", str(EVERY)),
    *("--keep-last", "0"),
]
SAMPLING = ["--vae-ckpt", "none", "--device", "cpu", "--schedule", "H4", "--cfg-scale", "1.5"]
SAMPLING += ["--num-fid-samples", "90", "--per-proc-batch-size", "2", "--tag", "set"]


class Run:
    """A script's main in forked ranks, which write to one log. `prepare(rank)` is called in each before it."""

    def __init__(
        self,
        main: Callable[[list[str]], object],
        argv: list[str],
        log: Path,
        ranks: int = 1,
        prepare: Callable[[int], object] = lambda rank: None,
    ):
        self.log, self.codes = log, {}
        self.peak = 0  # bytes that a rank held at once
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        name = sys.modules[main.__module__].__file__
        self.pids = []
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                try:
                    os.setpgrp()
                    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
                    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                    os.dup2(out, 1)
                    os.dup2(out, 2)
                    sys.argv = [str(name), *argv]
                    prepare(rank)
                    cli.run_script(lambda: main(argv))
                    sys.stdout.flush()
                    os._exit(0)
                except SystemExit as end:
                    os._exit(end.code if isinstance(end.code, int) else 1)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
            self.pids.append(pid)

    def signal(self, number: int, ranks: list[int] | None = None, group: bool = False) -> None:
        """To some ranks or all; with `group` to their process groups, as terminals and schedulers do."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (ranks is None or rank in ranks):
                with suppress(ProcessLookupError):
                    (os.killpg if group else os.kill)(pid, number)

    def poll(self) -> bool:
        """Whether all ranks have ended; `codes` has the exit codes, -N for signal N."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status, used = os.wait4(pid, os.WNOHANG)
                if ended:
                    self.peak = max(self.peak, used.ru_maxrss << 10)
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = TIMEOUT, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end, or for `until`; returns whether all have ended. Kills what hangs at TIMEOUT."""
        limit = time.monotonic() + seconds
        while not self.poll():
            if until() or time.monotonic() > limit:
                if seconds >= TIMEOUT and time.monotonic() > limit:
                    self.kill()
                    self.codes = dict.fromkeys(self.codes, 124)
                return False
            time.sleep(0.002)
        return True

    def kill(self, ranks: list[int] | None = None) -> None:
        self.signal(signal.SIGKILL, ranks)
        if ranks is None:
            while not self.poll():
                time.sleep(0.001)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Saboteur:
    """Counts the writes, fsyncs, renames and removals of a rank's checkpoint saves, and acts at number `at`.

    `act` is called in place of the operation; a write has been done by half by then.
    """

    def __init__(self, at: int = 0, act: Callable[[], object] | None = None):
        self.at, self.act, self.count, self.armed = (
            at,
            act or (lambda: os.kill(os.getpid(), signal.SIGKILL)),
            0,
            False,
        )
        self.names = ("fsync", "replace") if act else ("fsync", "replace", "unlink")  # a full disk lets one remove

    def tick(self) -> bool:
        self.count += self.armed
        return self.armed and self.count == self.at

    def install(self, rank: int = 0) -> None:
        if rank:
            return
        tick, act = self.tick, self.act

        class Raw(io.FileIO):
            def write(self, data: memoryview) -> int:
                if tick():
                    super().write(data[: len(data) // 2])
                    act()
                return super().write(data)

        def opened(path: object, mode: str = "r", *rest: object, **more: object) -> object:
            return io.BufferedWriter(Raw(path, "x")) if mode == "xb" else builtins.open(path, mode, *rest, **more)

        def guarded(operation: Callable) -> Callable:
            def call(*args: object, **more: object) -> object:
                if tick():
                    act()
                return operation(*args, **more)

            return call

        flowturbo.system.files.open = opened  # type: ignore[attr-defined]
        for name in self.names:
            setattr(os, name, guarded(getattr(os, name)))
        save, record = State.save, CheckpointFolder.record

        def armed_save(*args: object) -> str:
            self.armed = True
            return save(*args)

        def armed_record(*args: object) -> None:
            record(*args)
            self.armed = False

        State.save, CheckpointFolder.record = armed_save, armed_record

    def report(self, path: Path) -> Callable[[int], None]:
        """A `prepare` that installs and leaves the count of operations in a file at the end."""

        def prepare(rank: int) -> None:
            self.install(rank)
            record = CheckpointFolder.record

            def counted(*args: object) -> None:
                record(*args)
                path.write_text(str(self.count))

            CheckpointFolder.record = counted

        return prepare


class Lab:
    """A folder with tiny data and networks, the seeded dice, and the tally of failures and figures."""

    def __init__(self, root: Path, seed: int, quick: bool):
        self.root, self.dice, self.quick = root, random.Random(seed), quick
        os.environ["FLOWTURBO_CACHE"] = str(root / "cache")  # where runs remember the data that they have looked at
        self.report: dict[str, dict[str, list]] = {}  # campaign -> its figures and failures
        self.begin("laboratory")
        self.number = 0
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 8, 8), dtype=np.uint8)
        for k, image in enumerate(pixels):
            (root / "data" / f"c{k % 3}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / "data" / f"c{k % 3}" / f"{k:02d}.png")
        self.flags = [*TINY, "--data-path", str(root / "data"), "--steps", str(STEPS)]
        self.whole = self.folder()
        self.train(self.whole, [])
        self.predictor = self.checkpoints(self.whole).path(STEPS)
        self.bits = {}
        for world in WORLDS[::2]:
            self.bits[world[0]] = bits_of(self.uninterrupted(world[0]))

    def begin(self, campaign: str) -> None:
        self.figures: list[tuple[str, int, str]] = []
        self.failures: list[str] = []
        self.report[campaign] = {"figures": self.figures, "failures": self.failures}

    def folder(self) -> Path:
        self.number += 1
        path = self.root / f"{self.number:05d}"
        path.mkdir()
        return path

    def run(self, main: Callable[[list[str]], object], argv: list[str], log: Path) -> Run:
        return Run(main, argv, log)

    def start(self, folder: Path, more: list[str], ranks: int = 1, workers: int = 0, prepare=lambda rank: None) -> Run:
        argv = [*self.flags, "--results-dir", str(folder), "--num-workers", str(workers), *more]
        return Run(train.main, argv, folder / "out.txt", ranks, prepare)

    def train(self, folder: Path, more: list[str], ranks: int = 1, workers: int = 0, prepare=lambda rank: None) -> Run:
        run = self.start(folder, more, ranks, workers, prepare)
        run.wait()
        self.expect(set(run.codes.values()) == {0}, f"run in {folder} ended with {run.codes}: {run.text[-600:]}")
        return run

    def checkpoints(self, folder: Path) -> CheckpointFolder:
        """Those of the newest run: one that is killed before its first checkpoint leaves its folder empty."""
        runs = sorted(folder.glob("*-predictor-no-note")) or [folder / "000-predictor-no-note"]
        return CheckpointFolder(runs[-1] / "checkpoints")

    def newest(self, folder: Path) -> int:
        """The step of the newest whole checkpoint, 0 without one."""
        found = self.checkpoints(folder).newest(lambda text: self.expect(False, text))
        return int(found.stem) if found else 0

    def uninterrupted(self, ranks: int) -> CheckpointFolder:
        folder = self.folder()
        self.train(folder, [], ranks)
        return self.checkpoints(folder)

    def expect(self, good: bool, complaint: str) -> bool:
        if not good:
            self.failures.append(complaint)
            print(f"FAILED: {complaint}", flush=True)
        return good

    def figure(self, what: str, count: int, outcome: str) -> None:
        self.figures.append((what, count, outcome))
        print(f"  {what}: {count}, {outcome}", flush=True)

    def same_bits(self, folder: Path, ranks: int, steps: list[int] | None = None) -> bool:
        ours = bits_of(self.checkpoints(folder))
        theirs = self.bits[ranks]
        other = [step for step in set(steps or theirs) | set(ours) if ours.get(step) != theirs.get(step)]
        return self.expect(not other, f"{folder}: other bits than {ranks} uninterrupted ranks at steps {other}")


def bits_of(checkpoints: CheckpointFolder) -> dict[int, str]:
    """The digest of weights, EMA, optimizer and step of each checkpoint, by its step."""
    found = {}
    for name in checkpoints.digests():
        digest = hashlib.sha256()

        def walk(value: object, digest=digest) -> None:
            if isinstance(value, dict):
                for key, each in value.items():
                    digest.update(repr(key).encode())
                    walk(each)
            elif isinstance(value, (list, tuple)):
                walk(dict(enumerate(value)))
            elif isinstance(value, torch.Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
            else:
                digest.update(repr(value).encode())

        content = load_checkpoint(checkpoints.folder / name)
        walk({key: value for key, value in content.items() if key != "config"})
        found[int(Path(name).stem)] = digest.hexdigest()
    return found


def kills(lab: Lab) -> None:
    """SIGKILL at random moments, and inside saves, until each run has ended by itself all the same."""
    total = inside = lost = runs = 0
    for ranks, workers in WORLDS[:4] if lab.quick else WORLDS:
        began = time.monotonic()
        count = lab.root / "count"
        lab.train(lab.folder(), [], ranks, workers, Saboteur().report(count))
        whole, operations = time.monotonic() - began, int(count.read_text())
        quota = 3 if lab.quick else 40
        while quota > 0:
            folder, reached, ended = lab.folder(), 0, False
            while not ended:
                aimed = quota > 0 and lab.dice.random() < 0.4
                prepare = Saboteur(1 + lab.dice.randrange(operations // 4)).install if aimed else lambda rank: None
                run = lab.start(folder, [], ranks, workers, prepare)
                if aimed:
                    run.wait(until=lambda run=run: 0 in run.codes)
                else:
                    run.wait(lab.dice.uniform(0, 1.1 * whole) if quota > 0 else TIMEOUT)
                ended = run.codes.get(0) == 0
                if not ended:
                    lab.expect(set(run.codes.values()) <= {-9}, f"{folder}: ended by itself: {run.text[-600:]}")
                    run.kill()
                    total, inside, quota = total + 1, inside + aimed, quota - 1
                elif not run.poll():
                    run.wait()
                before, reached = reached, lab.newest(folder)
                lost += not lab.expect(reached >= before, f"{folder}: {reached} after {before}")
            runs += 1
            lost += not lab.same_bits(folder, ranks)
    lab.figure("SIGKILLs of training", total, f"{inside} of them inside a save, {runs} runs, {lost} lost or different")


def saves(lab: Lab) -> None:
    """A kill, and a full disk, at every operation of a save: the old or the new checkpoint is there, whole."""
    start, count = lab.folder(), lab.root / "count"
    lab.train(start, ["--steps", "6", "--keep-last", "1"])
    more = ["--steps", "9", "--keep-last", "1"]

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for what, act in (("kill", None), ("full disk", fail)):
        wrong, copy = 0, Path(shutil.copytree(start, lab.folder() / "all"))
        lab.train(copy, more, prepare=Saboteur(0, act).report(count))
        operations = int(count.read_text())
        numbers = range(1, operations + 1, operations // 5 if lab.quick else 1)
        for at in numbers:
            folder = lab.folder()
            shutil.rmtree(folder)
            shutil.copytree(start, folder)
            (folder / "out.txt").unlink()
            run = lab.start(folder, more, prepare=Saboteur(at, act).install)
            run.wait()
            good = lab.expect(run.codes == {0: 2 if act else -9}, f"{what} {at}: {run.codes} {run.text[-600:]}")
            if act:
                line = [text for text in run.text.splitlines() if "error:" in text]
                good &= lab.expect(
                    len(line) == 1 and "checkpoints" in line[0] and "Traceback" not in run.text, f"{at}: {run.text}"
                )
                good &= lab.expect(not list(folder.rglob("*.tmp")), f"{what} {at}: a temporary file is left")
            good &= lab.expect(lab.newest(folder) in (6, 9), f"{what} {at}: no checkpoint")
            lab.train(folder, [*more, "--steps", "12"])
            good &= lab.same_bits(folder, 1, [12])
            left = sorted(path.name for path in lab.checkpoints(folder).folder.iterdir())
            good &= lab.expect(left == ["0000012.pt", "manifest.json"], f"{what} {at}: {left} are left")
            wrong += not good
        lab.figure(f"saves with a {what} at each write, fsync and rename", len(numbers), f"{wrong} wrong")


def signals(lab: Lab) -> None:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1: saved at the next step, exit code 75, the same bits in the end."""
    total = saved = second = 0
    worlds = WORLDS[:4]
    for index, (ranks, workers) in enumerate(worlds):
        quota = (2 if lab.quick else 13) if index < 3 else (2 if lab.quick else 14)
        folder = lab.folder()
        while quota > 0:
            reached = lab.newest(folder)
            if reached > STEPS - 4:
                steps = [step for step in range(EVERY, STEPS, EVERY)] + [STEPS]
                lab.train(folder, [], ranks, workers)
                ours = bits_of(lab.checkpoints(folder))
                lab.expect(all(ours.get(step) == lab.bits[ranks][step] for step in steps), f"{folder}: other bits")
                folder = lab.folder()
                continue
            number = lab.dice.choice(STOPS)
            run = lab.start(folder, [], ranks, workers, slow_steps)
            starts = (folder / "out.txt").read_text().count("writing to") if reached else 0
            run.wait(until=lambda run=run, starts=starts: run.text.count("writing to") > starts)
            run.wait(lab.dice.uniform(0, 0.15))
            group = lab.dice.random() < 0.5
            run.signal(number, None if group else [lab.dice.randrange(ranks)], group)
            run.wait()
            total, quota = total + 1, quota - 1
            last = (lab.checkpoints(folder).folder.parent / "log.txt").read_text().splitlines()[-1]
            saved += lab.expect(
                set(run.codes.values()) == {EXIT_STOPPED} and f"after step {lab.newest(folder)};" in last,
                f"signal {number} in {folder}: {run.codes}, {last}, {run.text[-600:]}",
            )
    folder = lab.folder()
    for _ in range(1 if lab.quick else 4):
        reached = lab.newest(folder)
        run = lab.start(folder, [], prepare=slow_saves)
        run.wait(until=lambda run=run: any(folder.rglob(f".0*.{run.pids[0]}.tmp")))
        run.signal(signal.SIGTERM)
        run.wait(1.2)
        began = time.monotonic()
        run.signal(signal.SIGTERM)
        run.wait()
        good = run.codes == {0: 128 + signal.SIGTERM} and time.monotonic() - began < 2
        second += lab.expect(good and lab.newest(folder) >= reached, f"second signal: {run.codes} {run.text[-600:]}")
        lab.train(folder, ["--steps", str(reached + EVERY)])
    lab.train(folder, [])
    lab.same_bits(folder, 1)
    lab.figure("SIGTERMs, SIGINTs, SIGHUPs and SIGUSR1s", total, f"{saved} saved with exit code {EXIT_STOPPED}")
    lab.figure("second signals during a save", second, "ended at once, nothing lost")


def terminals(lab: Lab) -> None:
    """Outputs that nobody reads, that are closed, full, or vanish in the middle: the run is the same in the end."""
    ended = dict.fromkeys(("nobody reads", "closed", "full", "vanishing"), 0)
    for turn in range(8 if lab.quick else 40):
        how, folder, workers = list(ended)[turn % 4], lab.folder(), 2 * (turn % 8 > 3)

        def prepare(rank: int, how=how) -> None:
            if how == "closed":
                os.closerange(0, 3)
                return
            reading, writing = os.pipe()
            if how == "full":
                writing = os.open("/dev/full", os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(writing, stream)
            if how == "vanishing":  # when a checkpoint is saved
                save = State.save

                def closing(*args: object) -> str:
                    State.save = save
                    os.close(reading)
                    return save(*args)

                State.save = closing
            else:
                os.close(reading)

        run = lab.start(folder, ["--log-every", "1"], 1, workers, prepare)
        run.wait()
        good = lab.expect(run.codes == {0: 0}, f"output {how}: {run.codes} {run.text[-600:]}")
        good &= lab.expect(not run.text, f"output {how}: {run.text[-600:]}")
        ended[how] += good and lab.same_bits(folder, 1)
    for how, count in ended.items():
        lab.figure(f"runs whose output was {how}", count, "done, exit code 0, same bits")


def loaders(lab: Lab) -> None:
    """Few descriptors, killed workers, images that turn bad: one line with the cause, saved, the same bits later."""
    ended = dict.fromkeys(("few descriptors", "a killed worker", "a bad image"), 0)
    for turn in range(6 if lab.quick else 45):
        how, folder = list(ended)[turn % 3], lab.folder()
        # Not in the first batches: what cannot be read before the first step is a mistake of the user's, exit code 2.
        number, descriptors = lab.dice.randrange(40, 200), lab.dice.randrange(30, 60)
        cause = {"few descriptors": "file descriptors", "a killed worker": "was killed", "a bad image": "bad.png"}[how]

        def prepare(rank: int, how=how, number=number, descriptors=descriptors) -> None:
            if how == "few descriptors":
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
                return
            read, calls, parent = ClassFolder.read, iter(range(10**6)), os.getpid()

            def broken(self: ClassFolder, *args: object) -> object:
                if os.getpid() != parent and next(calls) == number:
                    if how == "a killed worker":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise ValueError("cannot read image 'bad.png'")
                return read(self, *args)

            ClassFolder.read = broken

        run = lab.start(folder, [], 1, 2, prepare)
        run.wait()
        if how == "few descriptors" and run.codes == {0: 0}:  # they were enough
            ended[how] += lab.same_bits(folder, 1)
            continue
        line = [text for text in run.text.splitlines() if "error:" in text]
        good = lab.expect(run.codes == {0: 1} and len(line) == 1 and cause in line[0], f"{how}: {run.codes} {run.text}")
        good &= lab.expect("Traceback" not in run.text, f"{how}: {run.text[-900:]}")
        reached = re.search(r"stopped after step (\d+), saved", line[0] if line else "")
        good &= lab.expect(lab.newest(folder) == (int(reached[1]) if reached else 0), f"{how}: {line}, not saved")
        lab.train(folder, [])
        bits = bits_of(lab.checkpoints(folder))
        ended[how] += good and lab.expect(bits[STEPS] == lab.bits[1][STEPS], f"{how}: other bits after it")
    for how, count in ended.items():
        lab.figure(f"runs with {how}", count, "one line with the cause, saved, same bits in the end")


def walkers(lab: Lab) -> None:
    """Hidden and system entries, links and loops beside the images: the same data, bit for bit."""
    ended = 0
    for turn in range(4 if lab.quick else 30):
        data, folder = lab.folder(), lab.folder()
        shutil.rmtree(data)
        shutil.copytree(lab.root / "data", data)
        image = (data / "c0" / "00.png").read_bytes()
        for _ in range(lab.dice.randrange(1, 9)):
            place = data / lab.dice.choice([".", "c0", "c1", "c2"])
            kind = lab.dice.choice(["hidden", "system", "macOS", "loop", "twice", "proc", "text"])
            name = f"{lab.dice.randrange(10**6)}"
            with suppress(FileExistsError):
                if kind in ("hidden", "system"):
                    inside = place / {"hidden": f".{name}", "system": "__MACOSX"}[kind]
                    inside.mkdir()
                    (inside / "a.png").write_bytes(image)
                elif kind == "macOS":
                    (place / f"._{name}.png").write_bytes(b"Mac OS X")
                elif kind == "text":
                    (place / f"{name}.txt").write_text("a note")
                elif place != data / ".":
                    target = {"loop": "..", "twice": str(place), "proc": "/proc/self"}[kind]
                    (place / name).symlink_to(target, target_is_directory=True)
        lab.train(folder, ["--data-path", str(data)], workers=2 * (turn % 2))
        ended += lab.same_bits(folder, 1)
    lab.figure("folders with strange entries", ended, "the same images, classes and bits")


def slow_steps(rank: int) -> None:
    update = training_run.update
    training_run.update = lambda *args, **more: time.sleep(0.03) or update(*args, **more)


def slow_saves(rank: int) -> None:
    fsync = os.fsync
    os.fsync = lambda file: fsync(file) or time.sleep(9 if "checkpoints" in os.readlink(f"/proc/self/fd/{file}") else 0)


def exact(lab: Lab) -> None:
    """--exact: one run over 1, 2, 4 and 3 ranks, with and without workers, has the bits of each alone."""
    whole, mixed = lab.folder(), lab.folder()
    lab.train(whole, ["--exact"])
    worlds = [(1, 0), (2, 2), (4, 0), (3, 2)]
    for index, (ranks, workers) in enumerate(worlds):
        lab.train(mixed, ["--exact", "--steps", str(STEPS * (index + 1) // 4)], ranks, workers)
    ours, theirs = bits_of(lab.checkpoints(mixed)), bits_of(lab.checkpoints(whole))
    lab.expect(all(ours[step] == theirs[step] for step in theirs), "--exact: the bits depend on the ranks")
    lab.figure("ranks of one --exact run: 1, 2, 4, 3", len(theirs), "checkpoints of the same bits as one rank's")


def ranks(lab: Lab) -> None:
    """One rank is killed, raises, or meets a loss that is not finite: all end, the cause told first."""
    slowest, ended = 0.0, dict.fromkeys(("killed", "raised", "not finite"), 0)
    for index in range(3 if lab.quick else 15):
        how, size = list(ended)[index % 3], lab.dice.choice([2, 4])
        rank, folder, number = lab.dice.randrange(size), lab.folder(), lab.dice.randrange(2, 30)

        def prepare(mine: int, how=how, rank=rank, number=number) -> None:
            if mine != rank:
                return
            if how == "raised":
                read, calls = ClassFolder.read, iter(range(10**6))

                def broken(self: ClassFolder, *args: object) -> object:
                    if next(calls) > 3 * number:
                        raise ValueError("cannot read image 'first-cause.png'")
                    return read(self, *args)

                ClassFolder.read = broken
            update = training_run.update

            def poisoned(state: State, world: object, batch: object, objective: Callable, *more: object) -> object:
                if state.step == number - 1 and how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                bad = torch.nan if state.step == number - 1 and how == "not finite" else 1
                return update(state, world, batch, lambda batch: objective(batch) * bad, *more)

            training_run.update = poisoned

        run = lab.start(folder, ["--ckpt-every", "1"], size, 0, prepare)
        run.wait(until=lambda run=run: bool(run.codes))
        began = time.monotonic()
        good = lab.expect(run.wait() and all(run.codes.values()), f"a rank {how}: {run.codes}, {run.text[-600:]}")
        slowest = max(slowest, time.monotonic() - began)
        told = [line for line in run.text.splitlines() if "error:" in line or "Traceback" in line]
        if how != "killed":
            cause = {"raised": "first-cause.png", "not finite": f"step {number}: the loss is nan"}[how]
            good &= lab.expect(bool(told) and cause in told[0], f"a rank {how}: told first {told[:2]}")
        good &= lab.expect("Traceback" not in run.text, f"a rank {how}: {run.text[-900:]}")
        if how == "not finite":
            good &= lab.expect(lab.newest(folder) == number - 1, f"updated at step {lab.newest(folder)}")
        lab.train(folder, [], size)
        bits = bits_of(lab.checkpoints(folder))
        good &= lab.expect(bits[STEPS] == lab.bits[size][STEPS], f"a rank {how}: other bits after it")
        ended[how] += good
    for how, count in ended.items():
        lab.figure(f"runs with a rank that was {how}", count, f"ended within {slowest:.1f} s, cause told first")


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of 600 kB at the folder; False where this machine lets nobody mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def disks(lab: Lab) -> None:
    """A disk that is really full, and one that is read-only."""
    folder = lab.folder()
    with small_disk(folder) as mounted:
        if not mounted:
            lab.figure("full and read-only disks", 0, "this machine mounts none")
            return
        log = lab.folder() / "out.txt"
        run = Run(train.main, [*lab.flags, "--results-dir", str(folder), "--num-workers", "0"], log)
        run.wait()
        line = [text for text in run.text.splitlines() if "error:" in text]
        lab.expect(run.codes == {0: 2} and len(line) == 1 and str(folder) in line[0], f"full disk: {run.text[-900:]}")
        lab.expect("Traceback" not in run.text, f"full disk: {run.text[-900:]}")
        reached = lab.newest(folder)
        lab.expect(reached > 0, "full disk: no checkpoint")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        log = lab.folder() / "out.txt"
        run = Run(train.main, [*lab.flags, "--results-dir", str(folder), "--num-workers", "0"], log)
        run.wait()
        line = [text for text in run.text.splitlines() if "error:" in text]
        lab.expect(run.codes == {0: 2} and len(line) == 1 and str(folder) in line[0], f"read-only: {run.text[-900:]}")
        subprocess.run(["mount", "-o", "remount,rw,size=100m", str(folder)], check=True)
        lab.expect(lab.newest(folder) == reached, "read-only: the checkpoint is another")
        lab.train(folder, [])
        lab.same_bits(folder, 1)
        lab.figure("disks, full at first and then read-only", 1, "one line each, the checkpoint stayed, same bits")


def flips(lab: Lab) -> None:
    """Bits flipped in a checkpoint are found when it is named, and the one before it is taken instead."""
    folder = lab.checkpoints(lab.whole)
    path, before = folder.path(STEPS), folder.path(STEPS - 1)
    whole = path.read_bytes()
    total, found = 60 if lab.quick else 1000, 0
    for _ in range(total):
        broken = bytearray(whole)
        bit = lab.dice.randrange(8 * len(whole))
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            load_checkpoint(path)
        except ValueError as error:
            found += str(path) in str(error) and folder.newest(lambda text: None) == before
    path.write_bytes(whole)
    lab.expect(found == total, f"{total - found} bit flips were not found")
    lab.figure("bit flips in checkpoints", total, f"{found} detected")


def samples(lab: Lab) -> None:
    """The archive's bytes over ranks, kills and damage."""
    argv = [*SAMPLING, "--predictor-ckpt", str(lab.predictor), "--png"]
    digests, total, damaged = {}, 0, 0
    quota = {1: 3, 2: 3} if lab.quick else {1: 20, 2: 20, 3: 20}
    for ranks, kills in [(1, 0), *quota.items()]:
        folder, whole, began = lab.folder(), 1.0, time.monotonic()
        flags = [*argv, "--sample-dir", str(folder)]
        while True:
            run = Run(sample_ddp_feature.main, flags, folder.with_suffix(".txt"), ranks)
            if run.wait(lab.dice.uniform(0, whole) if kills > 0 else TIMEOUT):
                lab.expect(set(run.codes.values()) == {0}, f"sampling: {run.codes} {run.text[-600:]}")
                if kills <= 0:
                    break
                shutil.rmtree(folder)
                continue
            run.kill()
            kills, total = kills - 1, total + 1
            files = [path for path in folder.rglob("*.*") if path.suffix in (".batch", ".png")]
            if files and lab.dice.random() < 0.5:
                path = lab.dice.choice(files)
                content = bytearray(path.read_bytes())
                content[lab.dice.randrange(len(content))] ^= 1 << lab.dice.randrange(8)
                path.write_bytes(content)
                damaged += 1
        whole = time.monotonic() - began
        digest = hashlib.sha256((folder / "set.npz").read_bytes())
        for path in sorted((folder / "set" / "png").iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
        digests[ranks, len(digests)] = digest.hexdigest()
    lab.expect(len(set(digests.values())) == 1, f"sample sets differ: {digests}")
    what = f"over {len(quota)} numbers of ranks, {damaged} files damaged between: {len(set(digests.values()))} archive"
    lab.figure("SIGKILLs of sampling", total, what)


def caching(lab: Lab) -> None:
    """The shards of cached latents over ranks and kills."""
    folder = lab.root / "vae"
    pid = os.fork()
    if not pid:
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            sample_size=16,
        ).save_pretrained(folder)
        os._exit(0)
    os.waitpid(pid, 0)
    flags = ["--vae-ckpt", str(folder), "--image-size", "16", "--shard-size", "2", "--batch-size", "2"]
    flags += ["--num-workers", "0", "--device", "cpu"]
    digests, total = set(), 0
    for ranks, kills in [(1, 0), (1, 2), (2, 2)] if lab.quick else [(1, 0), (1, 15), (2, 15)]:
        target = lab.folder() / "z"
        while True:
            run = Run(
                cache_latents.main, [str(lab.root / "data"), str(target), *flags], target.with_suffix(".txt"), ranks
            )
            if run.wait(lab.dice.uniform(0, 0.6) if kills > 0 else TIMEOUT):
                lab.expect(set(run.codes.values()) == {0}, f"latents: {run.codes} {run.text[-600:]}")
                if kills <= 0:
                    break
                shutil.rmtree(target)
                continue
            run.kill()
            kills, total = kills - 1, total + 1
        shards = sorted(target.glob("*.npy"))
        lab.expect(len(shards) == 15, f"{target}: {len(shards)} shards")
        digests.add(hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest())
    lab.expect(len(digests) == 1, "latents differ over ranks or kills")
    lab.figure("SIGKILLs of latent caching", total, f"{len(digests)} set of shards over 1 and 2 ranks")


def malformed(lab: Lab) -> None:
    """Files and flags made to break or to attack: refused in one line that names them, and nothing runs."""
    marker = lab.root / "executed"
    content = torch.load(lab.predictor, weights_only=True)
    corpus = hostile.Corpus(lab.folder(), lab.dice, content, lab.predictor.read_bytes(), marker)
    usual = Run(*command(lab, hostile.Case("", "predictor", lab.predictor, "")), lab.root / "usual.txt")
    lab.expect(usual.wait(), f"a good checkpoint: {usual.text[-600:]}")
    peak, greedy = usual.peak, "a good checkpoint"
    total = refused = 0
    for kind, quota in hostile.QUOTAS.items():
        count = accepted = 0
        for case in corpus.cases(kind, quota // 12 if lab.quick else quota):
            log = lab.root / "malformed.txt"
            log.unlink(missing_ok=True)
            main, argv = command(lab, case)
            run = Run(main, argv, log)
            run.wait(TIMEOUT)
            count += 1
            if run.peak > peak:
                peak, greedy = run.peak, case.what
            text, code = run.text, run.codes[0]
            lines = [line for line in text.splitlines() if "error:" in line]
            good = not marker.exists() and "Traceback" not in text
            if code == 0:
                good &= case.may_pass
                accepted += 1
            else:
                good &= code == 2 and len(lines) == 1 and words(case.name) in words(text)
                refused += good
            lab.expect(good, f"{kind}, {case.what}: exit {code}, {case.name} in: {text[-700:]}")
            marker.unlink(missing_ok=True)
        total += count
        lab.figure(f"malformed {kind}", count, f"{count - accepted} refused by name, {accepted} harmless")
    more = (peak - usual.peak) >> 20
    lab.expect(more < MOST_MEMORY >> 20, f"{greedy} took {more} MiB more than a good checkpoint")
    lab.figure("malformed inputs, MiB of memory beyond a good one's", more, f"at most, by {greedy}")
    lab.figure("malformed inputs", total, "0 tracebacks, 0 executions, 0 hangs" if not lab.failures else "see above")


def words(text: str) -> str:
    """A flag and the words of a message that mean it look alike."""
    return " ".join(re.sub("[-_]", " ", text).lower().split())


def command(lab: Lab, case: hostile.Case) -> tuple[Callable, list[str]]:
    """The script and flags that read a case."""
    out, path = lab.folder(), str(case.path)
    one_step = [*lab.flags, "--num-workers", "0", "--results-dir", str(out), "--steps", "1"]
    one_image = ["--schedule", "E1", "--vae-ckpt", "none", "--device", "cpu", "--cfg-scale", "1"]
    own = ["--predictor-ckpt", str(lab.predictor), *one_image]
    sampled = [*SAMPLING, "--schedule", "E1", "--num-fid-samples", "2"]
    reader = case.reader
    if reader == "resume":
        return train.main, [*one_step, "--steps", str(STEPS + 1), "--resume", path]
    if reader == "auto":
        return train.main, [*one_step, "--results-dir", path]
    if reader == "teacher":
        refiner = ["--target", "refiner", "--model-teacher-ckpt", path, "--max-dt", "0.5"]
        return train.main, [*one_step, *refiner]
    if reader == "predictor":
        return sample.main, ["--predictor-ckpt", path, *one_image, "--out", str(out / "a.png")]
    if reader == "set":
        return sample_ddp_feature.main, [*sampled, "--predictor-ckpt", str(lab.predictor), "--sample-dir", path]
    if reader == "export":
        return download.main, ["export", path, "-o", str(out / "x.safetensors")]
    if reader == "evaluator":
        return evaluator.main, [path, path, "--extractor", "pixels", "--device", "cpu"]
    if reader == "images":
        return train.main, [*one_step, "--data-path", path, "--global-batch-size", "4"]
    if reader == "class map":
        return train.main, [*one_step, "--class-map", path]
    if reader == "schedule":
        return sample.main, [*own, "--out", str(out / "a.png"), "--schedule", *case.flags]
    main, flags = {
        "train.py": (train.main, one_step),
        "sample.py": (sample.main, [*own, "--out", str(out / "a.png")]),
        "sample_ddp_feature.py": (sample_ddp_feature.main, [*sampled, "--predictor-ckpt", str(lab.predictor)]),
        "evaluator.py": (evaluator.main, ["a.npz", "b.npz"]),
        "cache_latents.py": (cache_latents.main, [str(lab.root / "data"), str(out / "z"), "--vae-ckpt", "gone"]),
    }[reader]
    return main, [*flags, *case.flags]


def torchrun(lab: Lab) -> None:
    """The whole stack, fresh interpreters under torchrun: a signal to the launcher, a kill of everything, ports."""
    folders = [lab.folder() for _ in range(2)]

    def launch(folder: Path, *more: str) -> subprocess.Popen:
        flags = [*lab.flags, "--results-dir", str(folder), "--num-workers", "2", *more]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        log = open(folder / "out.txt", "a")  # noqa: SIM115
        return subprocess.Popen([*launcher, str(ROOT / "train.py"), *flags], stdout=log, stderr=log, cwd=ROOT)

    def wait_for(process: subprocess.Popen, folder: Path, step: int) -> None:
        limit = time.monotonic() + 120
        while process.poll() is None and lab.newest(folder) < step and time.monotonic() < limit:
            time.sleep(0.05)

    long = ["--steps", "100000"]
    both = [launch(folder, *long) for folder in folders]  # at once: their ports must not collide
    for process, folder in zip(both, folders):
        wait_for(process, folder, EVERY)
    for process, number in zip(both, (signal.SIGTERM, signal.SIGKILL)):
        if number == signal.SIGKILL:
            for pid in family(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        else:
            process.send_signal(number)
        process.wait(TIMEOUT)
    last = (lab.checkpoints(folders[0]).folder.parent / "log.txt").read_text().splitlines()[-1]
    lab.expect(f"stopped by SIGTERM after step {lab.newest(folders[0])};" in last, f"torchrun: {last}")
    for folder in folders:
        reached = lab.newest(folder)
        more = ["--steps", str(reached + 7)]
        done = launch(folder, *more).wait(2 * TIMEOUT)
        lab.expect(done == 0, f"torchrun after a stop: {(folder / 'out.txt').read_text()[-900:]}")
        whole = lab.folder()
        lab.train(whole, more, 2)
        steps = [reached + 7]
        ours, theirs = bits_of(lab.checkpoints(folder)), bits_of(lab.checkpoints(whole))
        lab.expect(all(ours[step] == theirs[step] for step in steps), "torchrun: other bits")
    lab.figure("runs under torchrun, at once, with workers", 2, "SIGTERM saved, SIGKILL resumed, same bits")


def family(pid: int) -> list[int]:
    """A process and its descendants: torchrun's ranks have sessions of their own."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


CAMPAIGNS = {
    c.__name__: c
    for c in (
        *(kills, saves, signals, terminals, loaders, walkers, exact, ranks),
        *(disks, flips, samples, caching, malformed),
    )
}
CAMPAIGNS |= {"sockets": handing_on.sockets, "exports": handing_on.exports}
CAMPAIGNS["torchrun"] = torchrun


def main(argv: list[str] | None = None) -> None:
    parser = cli.new_parser(__doc__.strip())
    parser.add_argument("--quick", action="store_true", help="a few trials of each")
    parser.add_argument("--seed", type=int, default=0, help="of the dice")
    parser.add_argument("--only", nargs="+", choices=tuple(CAMPAIGNS), default=list(CAMPAIGNS), help="some of it")
    parser.add_argument("--json", metavar="FILE", help="also write figures and failures here")
    args = parser.parse_args(cli.hyphenate(argv))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the runs would ignore it
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as root:
        lab = Lab(Path(root), args.seed, args.quick)
        for name in args.only:
            print(f"{name}: {CAMPAIGNS[name].__doc__}", flush=True)
            start = time.monotonic()
            lab.begin(name)
            try:
                CAMPAIGNS[name](lab)
            except Exception:  # what is so broken that the laboratory stumbles is a failure too
                lab.expect(False, f"{name}: {traceback.format_exc()}")
            print(f"  {time.monotonic() - start:.0f} s", flush=True)
    print(f"\nseed {args.seed}, {time.monotonic() - began:.0f} s")
    for part in lab.report.values():
        for what, count, outcome in part["figures"]:
            print(f"{count:6,}  {what}: {outcome}")
    failures = sum(len(part["failures"]) for part in lab.report.values())
    print(f"{failures:6,}  failures")
    if args.json:
        Path(args.json).write_text(json.dumps(lab.report))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
