"""Ranks of one process group, as forks of the tests' process or of one that has computed nothing."""

import multiprocessing
import os
import signal
import socket
import sys
from datetime import timedelta

from flowturbo.system import cli
from flowturbo.system.distributed import world

CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["flowturbo.training.step"])


class Ranks:
    """What forked ranks have come to: exit codes, and the lines that they told, in order."""

    def __init__(self, folder, main, size, timeout=30.0, clean=False):
        """Fork processes that run main(World) as a script does under torchrun.

        `clean`: of a process that has computed nothing, since torch may refuse gradients to forks of one that has
        computed some; `main` is pickled then.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = folder / "log"
        orders = [(rank, size, port, timeout, log, main) for rank in range(size)]
        if clean:
            processes = [CLEAN.Process(target=run_rank, args=order) for order in orders]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            self.codes = [process.exitcode for process in processes]
        else:
            pids = [os.fork() or run_rank(*order) for order in orders]
            self.codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        self.text = log.read_text()
        self.lines = self.text.splitlines()


def run_rank(rank, size, port, timeout, log, main):
    """Be a rank until the end of this process."""
    try:
        place = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(log.parent / str(rank) / "error.json")
        signal.alarm(60)
        sys.argv = ["script.py"]
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)

        def script():
            with world("cpu", timeout=timedelta(seconds=timeout)) as ranks:
                main(ranks)

        cli.run_script(script)
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    finally:
        os._exit(70)
