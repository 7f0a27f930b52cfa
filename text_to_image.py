"""FlowTurbo for text-to-image pipelines of diffusers.

Usage:
  python text_to_image.py train --pipeline DIR --data-path CAPTIONED_IMAGES
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from flowturbo.system import cli
from flowturbo.text_to_image.options import KINDS, TextTrainingOptions
from flowturbo.training.stopping import EXIT_STOPPED, StopRequest


def train(argv: Sequence[str]) -> None:
    parser = cli.new_parser(train.__doc__)
    parser.prog += " train"
    options = TextTrainingOptions(*cli.parse(parser, argv, KINDS, sample_every=0))

    from flowturbo.text_to_image import training

    with StopRequest(options.optimisation.max_hours) as stop:
        _, done = training.train(options, stop)
    if not done and not stop.late:
        sys.exit(EXIT_STOPPED)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": train}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    parser = cli.new_parser(__doc__, None)
    parser.add_argument("command", choices=tuple(COMMANDS), help="see text_to_image.py COMMAND --help")
    parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run_script(main)
