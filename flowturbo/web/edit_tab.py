"""The tab that edits: a picture to draw over, what is wanted of it, and the results."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from flowturbo.web.edits import CHANGE, INPAINT, LEAST_SIDE, REMOVE, TASKS, drawn_mask, edit_options, enlarged
from flowturbo.web.parts import DEVICE, Settings, told, warn
from flowturbo.web.studio import Studio, named_schedule


def edit_tab(studio: Studio, settings: Settings, folder: Path, first: gr.State) -> None:
    """Have a picture changed; `first` holds an image that was drawn."""
    with gr.Row():
        with gr.Column():
            editor = picture_editor(studio.example())
            take = gr.Button("Take the first generated image")
        with gr.Column():
            task = gr.Radio(list(TASKS), value=INPAINT, label="What to do", info=TASKS[INPAINT].about, elem_id="task")
            old = gr.Dropdown(studio.classes, value=studio.first_classes[0], label="It shows", visible=False)
            new = gr.Dropdown(
                studio.classes, value=studio.first_classes[:2][-1], label="Class to draw", elem_id="class-to-draw"
            )
            strength = gr.Slider(
                0.05,
                1,
                TASKS[INPAINT].strength,
                step=0.05,
                label="Strength",
                info="1 keeps nothing of what is drawn anew.",
            )
            with gr.Row():
                schedule = gr.Textbox(studio.start.schedule, label="Schedule", min_width=90)
                count = gr.Number(3, precision=0, label="Results", min_width=90)
                feather = gr.Number(0, precision=0, label="Feather", min_width=90)
            edit = gr.Button("Edit", variant="primary", elem_id="edit")
    outputs = result_parts()

    def adapt(name: str) -> tuple:
        about = gr.Radio(info=TASKS[name].about)
        return about, gr.Dropdown(visible=name == CHANGE), gr.Dropdown(visible=name != REMOVE), TASKS[name].strength

    def taken(image: Image.Image | None) -> Any:
        return gr.skip() if image is None else content(image)

    @told
    def run(drawing: dict[str, Any] | None, name: str, old: str, new: str, *numbers: Any) -> Iterator:
        share, text, results, pixels, guidance, seed = numbers
        if not drawing or drawing["background"] is None:
            raise ValueError("no picture: expected one to edit")
        sampling = studio.settings(seed, guidance)
        values = {"strength": share, "num_images": int(results or 0), "feather": int(pixels or 0)}
        options = edit_options(name, named_schedule(text), new, old, **values)
        background = drawing["background"]
        mask = drawn_mask(drawing["layers"], background.size, TASKS[name].needs_mask)
        made = studio.edit(background, mask, options, sampling, Path(tempfile.mkdtemp(dir=folder)), warn)
        line = studio.command("edit.py", *made.flags, options=(options, sampling))
        yield made.picture, made.words, line, list(map(str, made.files))

    task.change(adapt, task, [task, old, new, strength], show_progress="hidden")
    take.click(taken, first, editor, show_progress="hidden")
    inputs = [editor, task, old, new, strength, schedule, count, feather, settings.guidance, settings.seed]
    edit.click(run, inputs, outputs, show_progress="minimal", **DEVICE)


def result_parts() -> list[gr.Component]:
    """Where an edit shows: the picture, words about it, its command and its files."""
    picture = gr.Image(
        label="Original and results",
        interactive=False,
        elem_id="edited",
        elem_classes="drawn",
        buttons=["fullscreen"],
        height=280,
    )
    said = gr.Markdown(elem_id="edited-words")
    command = gr.Textbox(
        label="The same on the command line, in a folder with these files",
        interactive=False,
        buttons=["copy"],
        elem_id="edited-command",
        elem_classes="command",
    )
    files = gr.Files(label="Files", interactive=False, height=160, elem_id="edited-files")
    return [picture, said, command, files]


def picture_editor(example: Image.Image | None) -> gr.ImageEditor:
    """A picture, to be drawn over with one colour."""
    return gr.ImageEditor(
        None if example is None else content(example),
        type="pil",
        format="png",  # the default loses bytes
        image_mode="RGBA",
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        canvas_size=(LEAST_SIDE, LEAST_SIDE),
        brush=gr.Brush(default_size=24, colors=["#6366f1"], color_mode="fixed"),
        label="Picture",
        height=480,
        elem_id="editor",
    )


def content(picture: Image.Image) -> Any:
    """What the editor takes: a picture that nothing is drawn over."""
    shown = enlarged(picture)
    return {"background": shown, "layers": [], "composite": shown}
