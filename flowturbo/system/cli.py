"""What every script shares on the command line: flag spelling, help layout, and one-line errors."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from flowturbo.system.advice import advice_for
from flowturbo.system.options import add_flags, read_flags
from flowturbo.system.streams import keep_streams, lost
from flowturbo.system.values import plain

MISTAKES = (ValueError, OSError, FloatingPointError)  # what run_script tells in one line
SPELLING = "Every flag may be spelled with - or _."


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of descriptions and epilogues."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == ():  # it tells the reader nothing
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

    def group(self, title: str) -> argparse._ArgumentGroup:
        """A titled group of flags in the help."""
        return self.add_argument_group(title)


def new_parser(description: str | None, epilog: str | None = SPELLING) -> Parser:
    """A parser that refuses abbreviations, so that a mistyped flag never passes for another."""
    return Parser(description=(description or "").strip(), epilog=epilog, formatter_class=Formatter, allow_abbrev=False)


@dataclass(frozen=True)
class Presets:
    """A flag whose value sets the defaults of other fields: `values` of the fields by what the flag may say."""

    name: str  # of the flag, without its hyphens
    help: str
    values: Mapping[str, Mapping[str, Any]]

    def add_to(self, parser: Parser, argv: Sequence[str]) -> None:
        """Add the flag to a parser that has the others, and set the defaults that the arguments ask for."""
        action = parser.add_argument(f"--{self.name}", choices=tuple(self.values), help=self.help)
        chosen = getattr(parser.parse_args(argv), action.dest)
        declared = {each.dest for each in parser._actions}
        values = self.values.get(chosen, {})
        parser.set_defaults(**{name: value for name, value in values.items() if name in declared})


def parse(
    parser: Parser,
    argv: Sequence[str] | None,
    kinds: Mapping[str, type],
    presets: Presets | None = None,
    **defaults: Any,
) -> list[Any]:
    """Parse a command line, once, into options dataclasses: one for each group of flags, by its title in the help.

    `defaults` replace those of fields, and `presets`, if any, both. Raises what the dataclasses raise.
    """
    for title, kind in kinds.items():
        add_flags(parser.group(title), kind, **defaults)
    spelled = hyphenate(argv)
    if presets is not None:
        presets.add_to(parser, spelled)
    arguments = parser.parse_args(spelled)
    return [read_flags(kind, arguments) for kind in kinds.values()]


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


def warn(text: str) -> None:
    """Tell in one line, on stderr, what a user should know although the work goes on."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class EndedEarly(OSError):
    """Work that began well could not go on. What was done until then is kept."""


def run_script(main: Callable[[], object], prints_result: bool = False) -> None:
    """Run a script's main; turn a user's mistake into one line on stderr and exit code 2.

    Errors that name a mistake are ValueError and OSError; FloatingPointError, a run that diverged, and EndedEarly exit
    with 1; anything else is a defect of ours and keeps its traceback. Interrupting exits with 130. A reader of stdout
    or stderr that has gone, or a terminal that was closed, ends nothing. Where stdout fails otherwise, as on a full
    disk, stderr says so in the end, and the exit code is 1 if a script prints its result there.
    FLOWTURBO_TRACEBACK=1 shows the traceback of every error.
    """
    keep_streams()
    print_anything()
    try:
        main()
        sys.stdout.flush()
        if "stdout" in lost:
            word = "error" if prints_result else "warning"
            print(f"{os.path.basename(sys.argv[0])}: {word}: cannot write stdout: {lost['stdout']}", file=sys.stderr)
            if prints_result:
                _exit(1)
    except Exception as error:
        if not isinstance(error, MISTAKES) or os.environ.get("FLOWTURBO_TRACEBACK"):
            sys.excepthook(*sys.exc_info())
            _exit(1)
        message = one_line(error) + advice_for(error)
        with first_to_tell(message) as first:
            if first:
                print(f"{_who()}{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
        _exit(1 if isinstance(error, (FloatingPointError, EndedEarly)) else 2)
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        _exit(130)


def print_anything() -> None:
    """Have stdout and stderr escape what their encoding does not know: latin-1 or ascii must not end a script."""
    for stream in (sys.stdout, sys.stderr):
        # Not where something else has taken its place, nor where it fails since another file has.
        with suppress(OSError, ValueError):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")


def _who() -> str:
    rank = int(os.environ.get("RANK", "0"))
    return f"[rank {rank}] " if rank else ""


@contextmanager
def first_to_tell(message: str) -> Iterator[bool]:
    """Whether no other rank of this machine has told the same: a mistake that every rank meets is told once.

    It counts as told when the block ends. torchrun gives its ranks a folder for their errors, and removes it at the
    end; without torchrun there is one rank.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        yield True
        return
    told = Path(file).parent.parent / f"told-{hashlib.sha256(message.encode()).hexdigest()[:16]}"
    with ExitStack() as held:
        record = None
        with suppress(OSError):  # told twice is better than not at all
            record = held.enter_context(open(told, "a"))
            # Others wait here until it is told. torchrun may end this rank before that: then its lock falls, and the
            # next rank tells.
            fcntl.flock(record, fcntl.LOCK_EX)
        first = record is None or os.fstat(record.fileno()).st_size == 0
        yield first
        if first and record is not None:
            record.write("told")


def _exit(code: int) -> NoReturn:
    # Not sys.exit: with a process group open, the interpreter's shutdown could wait for ranks that will not come.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, without control characters, which may come from a file's name or content.

    Of an error that crossed from a loader's worker, only what it said.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "Original Traceback" in str(error):  # torch's DataLoader pastes the worker's traceback into the message
        return plain(lines[-1].split(": ", 1)[-1])
    return plain(" ".join(lines))
