"""The page: what it says, how it looks, and where its tabs are. No file but this, parts and the tabs knows gradio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from flowturbo.web.edit_tab import edit_tab
from flowturbo.web.parts import Settings
from flowturbo.web.studio import Studio
from flowturbo.web.tabs import compare_tab, generate_tab

INTRODUCTION = """
# FlowTurbo
A flow model draws a picture from noise in a few steps. The **schedule** says which: each letter is a kind of step, each
number how many. `M` and `A` evaluate the network once a step, `H` (Heun) twice, and `R` a small refiner in its place.
"""
CSS = """
.command textarea {font-family: monospace; font-size: .85em}
.drawn img {image-rendering: pixelated}
.toast-wrap {top: auto !important; bottom: var(--size-4) !important}  /* not over the buttons */
"""
LOOK: dict[str, Any] = {  # fonts of the machine: others would be fetched
    "theme": gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    "css": CSS,
}


def build(studio: Studio, folder: Path) -> gr.Blocks:
    """The page of a studio, whose pictures are written into a folder."""
    with gr.Blocks(title="FlowTurbo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        gr.Markdown(f"*{studio.about}*")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                settings = Settings(studio)
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Generate"):
                    first = generate_tab(studio, settings, folder)
                with gr.Tab("Compare"):
                    compare_tab(studio, settings, folder)
                with gr.Tab("Edit"):
                    edit_tab(studio, settings, folder, first)
    return page
