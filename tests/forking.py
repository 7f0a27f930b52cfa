"""Ranks of one process group, as forks of the tests' process."""

import os
import signal
import socket
import sys
from datetime import timedelta

from flowturbo.system import cli
from flowturbo.system.distributed import world


class Ranks:
    """What forked ranks have come to: exit codes, and the lines that they told, in order."""

    def __init__(self, folder, main, size, timeout=30.0):
        """Fork processes that run main(World) as a script does under torchrun."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = folder / "log"
        pids = [self._fork(rank, size, port, timeout, log, main) for rank in range(size)]
        self.codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        self.text = log.read_text()
        self.lines = self.text.splitlines()

    def _fork(self, rank, size, port, timeout, log, main):
        pid = os.fork()
        if pid:
            return pid
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
