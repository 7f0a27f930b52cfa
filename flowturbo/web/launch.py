"""A web page on this machine: draw classes by any schedule, compare two, edit a picture with a mask.

Usage:
  python web.py                                                   # the model that comes with the package
  python web.py --model digits
  python web.py --predictor-ckpt FILE --refiner-ckpt FILE --vae-ckpt vae-ema

It is served to this machine alone, at http://127.0.0.1:7860, and asks no other server for anything.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.system import cli
from flowturbo.web.options import DEFAULT_MODEL, PageOptions

if TYPE_CHECKING:
    import gradio

    from flowturbo.web.studio import Studio


class GradioMissing(ValueError):
    """The page cannot be made without gradio."""


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {"page": PageOptions, "networks": NetworkOptions, "sampling": SamplingOptions}
    words = cli.hyphenate(argv)
    if not any(word.partition("=")[0] in ("--model", "--predictor-ckpt") for word in words):
        words = ["--model", DEFAULT_MODEL, *words]
    options, network_options, sampling = cli.parse(new_parser(), words, kinds, MODEL_PRESETS)
    if find_spec("gradio") is None:
        raise GradioMissing("the page needs gradio, which is not installed")
    check_free(options.host, options.port)

    from flowturbo.web.studio import Studio

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the folder below is removed
    studio = Studio.open(network_options, sampling, options, print)
    with (
        tempfile.TemporaryDirectory(prefix="flowturbo-web-") as folder,
        closing(serve(studio, options, folder)) as page,
    ):
        print(f"serving {studio.about} at {page.local_url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def new_parser() -> cli.Parser:
    parser = cli.new_parser(__doc__)
    if parser.prog == "__main__.py":
        parser.prog = "python -m flowturbo.web"
    return parser


def check_free(host: str, port: int) -> None:
    """Raises OSError where nothing can be served at that address: it is another machine's, or taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that has just ended does no harm
            trial.bind(address)
    except OSError as error:
        raise OSError(f"cannot serve at {host}, port {port}: {error.strerror or error}") from None


def serve(studio: Studio, options: PageOptions, folder: str) -> gradio.Blocks:
    """Start serving, in threads of its own; what is drawn is kept in `folder`, which outlives the page."""
    # Read when gradio is imported. By default it reports to its makers, and keeps pictures in one folder for all users.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "shown")

    from flowturbo.web.page import LOOK, build

    page = build(studio, Path(folder))
    page.launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        **LOOK,
    )
    return page
