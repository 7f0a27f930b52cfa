"""The tabs that draw: one schedule step after step, and two beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from flowturbo.data.pictures import to_pil
from flowturbo.planning.menu import best_within
from flowturbo.planning.planner import Measured
from flowturbo.sampling.picture_options import PictureOptions
from flowturbo.system.values import plus
from flowturbo.web.parts import DEVICE, Settings, Shown, told, warn, words
from flowturbo.web.studio import MOST_IMAGES, Studio, named_schedule

SCHEDULES = ("M11", "A8", "M4R1", "H1P5R3", "H6", "E12", "dopri5")
PAIRS = (("A6", "H3"), ("M7", "E8"), ("M4R1", "M4"), ("H1P5", "A7"))
HEADS = ["schedule", "evaluations", "rows", "ms/image", "error (RMSE)"]


def generate_tab(studio: Studio, settings: Settings, folder: Path) -> gr.State:
    """Draw by one schedule; the state that it returns holds the first image."""
    with gr.Row(equal_height=True):
        schedule = gr.Textbox(studio.start.schedule, label="Schedule", scale=4, min_width=120, elem_id="schedule")
        count = images_field(4 * len(studio.first_classes) if studio.model else len(studio.first_classes))
        draw = gr.Button("Generate", variant="primary", scale=2, min_width=120)
        stop = gr.Button("Stop", scale=1, min_width=80)
    gr.Examples([[text] for text in SCHEDULES], schedule, label="Schedules to try")
    menu_box(studio, settings, schedule)
    shown, first = Shown("generated", 520), gr.State(None)

    @told
    def run(text: str, images: float | None, classes: list[str], guidance: float, seed: float) -> Iterator:
        sampling = studio.settings(seed, guidance)
        options = PictureOptions(named_schedule(text), **chosen(classes, images))
        command = studio.command("sample.py", options=(options, sampling))
        for picture in studio.draw(options, sampling, warn):
            yield picture.draw(), words(picture), command, gr.skip(), gr.skip()
        path = str(studio.save(picture, sampling, folder))
        file = gr.DownloadButton(value=path, interactive=True)
        yield path, words(picture), command, file, to_pil(picture.rows[0].images[0])

    started = gr.on(
        [draw.click, schedule.submit],
        run,
        [schedule, count, *settings.inputs],
        [*shown.outputs, first],
        show_progress="minimal",
        **DEVICE,
    )
    stop.click(None, cancels=[started])
    return first


def compare_tab(studio: Studio, settings: Settings, folder: Path) -> None:
    """Draw by two schedules from the same noise, a row of images each."""
    with gr.Row(equal_height=True):
        one = gr.Textbox(PAIRS[0][0], label="First schedule", scale=2, min_width=120, elem_id="first")
        other = gr.Textbox(PAIRS[0][1], label="Second schedule", scale=2, min_width=120, elem_id="second")
        count = images_field(len(studio.first_classes))
        draw = gr.Button("Compare", variant="primary", scale=2, min_width=120)
    pairs = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[[" and ".join(pair)] for pair in PAIRS],
        label="Pairs to try",
        type="index",
    )
    pairs.click(lambda k: PAIRS[k], pairs, [one, other], show_progress="hidden")
    shown = Shown("compared", 400)

    @told
    def run(
        first: str, second: str, images: float | None, classes: list[str], guidance: float, seed: float
    ) -> Iterator:
        sampling = studio.settings(seed, guidance)
        options = PictureOptions(compare=(named_schedule(first), named_schedule(second)), **chosen(classes, images))
        command = studio.command("sample.py", options=(options, sampling))
        for picture in studio.draw(options, sampling, warn):
            yield picture.draw(), words(picture), command, gr.skip()
        path = str(studio.save(picture, sampling, folder))
        yield path, words(picture), command, gr.DownloadButton(value=path, interactive=True)

    inputs = [one, other, count, *settings.inputs]
    starts = [draw.click, one.submit, other.submit]
    gr.on(starts, run, inputs, shown.outputs, show_progress="minimal", **DEVICE)


def images_field(value: int) -> gr.Number:
    """How many images to draw."""
    return gr.Number(value, precision=0, label="Images", scale=1, min_width=80)


def chosen(classes: list[str], count: float | None) -> dict[str, Any]:
    """The classes and the number of images as options. Raises ValueError where there are none."""
    if not classes:
        raise ValueError("no class is chosen: expected one or more")
    if count is None:
        raise ValueError(f"no number of images: expected 1 to {MOST_IMAGES}")
    return {"classes": tuple(classes), "num_images": int(count)}


def menu_box(studio: Studio, settings: Settings, schedule: gr.Textbox) -> None:
    """A schedule by what it may cost: a table that is measured on demand, and a budget."""
    with gr.Accordion("Choose by a budget", open=False):
        gr.Markdown(
            "Measured on this device and at this guidance: the time of an image, and how far it ends from a fine "
            "solution from the same noise. It takes half a minute with a small model. Click a row to take its schedule."
        )
        with gr.Row(equal_height=True):
            measure = gr.Button("Measure", min_width=100, elem_id="measure")
            budget = gr.Number(50, label="Budget, ms an image", min_width=120, elem_id="budget")
            take = gr.Button("Take the best within it", min_width=160, elem_id="take")
        table = gr.Dataframe(headers=HEADS, interactive=False, elem_id="menu", max_height=320)
        rows = gr.State([])

    @told
    def fill(guidance: float, seed: float) -> Iterator:
        measured: list[Measured] = []
        for row in studio.menu(studio.settings(seed, guidance)):
            measured.append(row)
            yield [menu_row(each) for each in measured], list(measured)

    @told
    def best(measured: list[Measured], ms: float | None) -> Iterator:
        yield str(best_within(measured, ms or 0).candidate)

    def pick(event: gr.SelectData) -> str:
        return event.row_value[0]

    measure.click(fill, [settings.guidance, settings.seed], [table, rows], show_progress="minimal", **DEVICE)
    take.click(best, [rows, budget], schedule, show_progress="hidden")
    table.select(pick, None, schedule, show_progress="hidden")


def menu_row(row: Measured) -> list[str]:
    """A row of the table of schedules."""
    return [str(row.candidate), plus(*row.evaluations), plus(*row.rows), f"{row.ms:.3g}", str(row.fidelity.rmse)]
