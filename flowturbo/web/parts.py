"""What the tabs of the page share: the settings beside them, a place for a picture, and how mistakes are shown."""

from __future__ import annotations

import html
import random
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import gradio as gr
import torch

from flowturbo.sampling.picture import Picture
from flowturbo.system import cli
from flowturbo.web.studio import Studio

MISTAKES = (*cli.MISTAKES, torch.OutOfMemoryError)  # too many images at once is a visitor's mistake too
DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}  # others wait, so that times stay true


def told(handler: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """A handler whose mistakes are shown on the page, each in one line."""

    @wraps(handler)
    def run(*values: Any) -> Iterator:
        try:
            yield from handler(*values)
        except MISTAKES as error:
            raise gr.Error(html.escape(cli.one_line(error)), print_exception=False) from None

    return run


def warn(text: str) -> None:
    """Tell the visitor what to know although the work goes on."""
    gr.Warning(html.escape(text))


class Settings:
    """What all tabs take: classes, guidance and seed."""

    def __init__(self, studio: Studio):
        self.classes = gr.Dropdown(
            studio.classes,
            value=studio.first_classes,
            multiselect=True,
            label="Classes",
            info="Type to search.",
            elem_id="classes",
        )
        self.guidance = gr.Slider(
            1, 10, studio.sampling.cfg_scale, step=0.1, label="Guidance", info="1 is none, at half the cost."
        )
        with gr.Row(equal_height=True):
            self.seed = gr.Number(studio.sampling.seed, precision=0, label="Seed", min_width=100, elem_id="seed")
            another = gr.Button("Another", min_width=80)
        another.click(lambda: random.randrange(10**6), None, self.seed, show_progress="hidden")
        self.inputs = [self.classes, self.guidance, self.seed]


class Shown:
    """Where a picture is shown, with its figures, the command that makes it and its file."""

    def __init__(self, name: str, height: int):
        self.picture = gr.Image(
            label="Picture",
            interactive=False,
            elem_id=name,
            elem_classes="drawn",
            buttons=["fullscreen"],
            height=height,
        )
        self.words = gr.Markdown(elem_id=f"{name}-words")
        with gr.Row(equal_height=True):
            self.command = gr.Textbox(
                label="The same on the command line",
                interactive=False,
                buttons=["copy"],
                lines=2,
                scale=4,
                elem_id=f"{name}-command",
                elem_classes="command",
            )
            self.file = gr.DownloadButton(
                "Download PNG", interactive=False, scale=1, min_width=140, elem_id=f"{name}-file"
            )
        self.outputs = [self.picture, self.words, self.command, self.file]


def words(picture: Picture) -> str:
    """What is known of a picture's rows, as Markdown."""
    lines = [" · ".join(row.caption().split("   ")) for row in picture.rows]
    note = "*The times include a picture of each step.*" if picture.rows[0].steps else ""
    return "\n\n".join([*lines, note])
