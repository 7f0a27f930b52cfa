"""How long a user waits before anything happens: CPU seconds of --help and of imports, beside `import torch`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import Keep

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = ("import flowturbo", "import flowturbo.models", "import flowturbo.transport.samplers")


@dataclass
class Row:
    """The least CPU seconds of some runs of a command, and their ratio to those of `import torch`."""

    command: str
    seconds: float
    ratio: float


def scripts() -> list[str]:
    """The scripts in the repository's root."""
    return sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def measure(keep: Keep, repeats: int = 3) -> list[Row]:
    """Measure all, printing each row as it comes."""
    commands = {text: ["-c", text] for text in ("import torch", *IMPORTS)}
    commands |= {f"{name} --help": [name, "--help"] for name in scripts()}
    width = max(map(len, commands))
    print(f"{'':{width}}{'CPU s':>8}{'ratio':>8}")
    rows: list[Row] = []
    for text, arguments in commands.items():
        seconds = min(cpu_seconds(arguments) for _ in range(repeats))
        rows.append(Row(text, seconds, seconds / rows[0].seconds if rows else 1.0))
        print(f"{text:{width}}{seconds:>8.2f}{rows[-1].ratio:>8.2f}", flush=True)
        keep([asdict(row) for row in rows])
    return rows


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds, of user and system, of a Python process. Raises RuntimeError where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
