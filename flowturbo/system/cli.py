"""What every script shares on the command line: flag spelling, help layout, and one-line errors."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NoReturn


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of descriptions and epilogues."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A default of None or False tells the reader nothing.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which names the flag that a mistyped one resembles."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            known = [flag for action in self._actions for flag in action.option_strings]
            typed = message[len(prefix) :].split()[0].split("=")[0]
            near = get_close_matches(typed, known, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def new_parser(description: str, epilog: str | None = None) -> Parser:
    """A parser that refuses abbreviations, so that a mistyped flag never passes for another."""
    return Parser(description=description, epilog=epilog, formatter_class=Formatter, allow_abbrev=False)


def seed(text: str) -> int:
    """An argument type: an integer in [0, 2^64), the keys of the random generator."""
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text} must lie in 0 to 2^64 - 1")
    return value


def hyphenate(argv: Sequence[str] | None) -> list[str]:
    """The arguments (default: the command line's) with `--any_flag` spelled `--any-flag`; values are kept."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    spelled = []
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            if value == "--":  # argparse would take it for the end of the flags, and give an empty list
                raise ValueError(f"{flag} takes no value '--'")
            argument = flag.replace("_", "-") + equals + value
        spelled.append(argument)
    return spelled


def run_script(main: Callable[[], object]) -> None:
    """Run a script's main; turn a user's mistake into one line on stderr and exit code 2.

    Errors that name a mistake are ValueError and OSError; FloatingPointError, a run that diverged, exits with 1;
    anything else is a defect of ours and keeps its traceback. Interrupting exits with 130.
    FLOWTURBO_TRACEBACK=1 shows the traceback of every error.
    """
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("FLOWTURBO_TRACEBACK"):
            raise
        rank = int(os.environ.get("RANK", "0"))
        # A mistake that every rank meets is told once: rank 0's exit makes torchrun end the others.
        time.sleep(4 if isinstance(error, Aftermath) else 2 if rank else 0)
        message = str(error) if isinstance(error, Advice) else one_line(error)
        who = f"[rank {rank}] " if rank else ""
        print(f"{who}{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        _exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        _exit(130)


def _exit(code: int) -> NoReturn:
    # Not sys.exit: with a process group open, the interpreter's shutdown could wait for ranks that will not come.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Advice(ValueError):
    """A user's mistake whose message is printed as it stands, on the lines it has."""


class Aftermath(OSError):
    """An error that comes of another rank's end: told after what that one has to say."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line; of one that crossed from a loader's worker, only what it said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "Original Traceback" in str(error):  # torch's DataLoader pastes the worker's traceback into the message
        return lines[-1].split(": ", 1)[-1]
    return " ".join(lines)
