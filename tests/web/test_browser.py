"""The page in a real Chromium, on the colour model: what a visitor clicks, sees and downloads."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edit
import sample
from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.system import cli
from flowturbo.web import launch
from flowturbo.web.options import PageOptions
from flowturbo.web.studio import Studio

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of pandas, which gradio's queue calls
]

ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def asked():
    """The addresses that this process has connected to."""
    found = set()
    connect = socket.socket.connect

    def note(own, address):
        found.add(address[0])
        return connect(own, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", note)
        yield found


@pytest.fixture(scope="module")
def address(asked, tmp_path_factory):
    """Where the page is served, as `python web.py --device cpu` does."""
    kinds = {"page": PageOptions, "networks": NetworkOptions, "sampling": SamplingOptions}
    flags = ["--model", "colour", "--device", "cpu", "--port", str(free_port())]
    options, network_options, sampling = cli.parse(launch.new_parser(), flags, kinds, MODEL_PRESETS)
    page = launch.serve(Studio.open(network_options, sampling, options), options, str(tmp_path_factory.mktemp("page")))
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(browser, address):
    """One tab with the page, for all tests: to open it takes seconds. No request of it may leave this machine."""
    tab = browser.new_page(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    tab.set_default_timeout(60_000)
    hosts = set()
    tab.on("request", lambda request: hosts.add(re.sub(r"^\w+://([^/:]*).*", r"\1", request.url)))
    tab.goto(address)
    button(tab, "Generate").wait_for()
    yield tab
    tab.close()
    assert {host for host in hosts if not host.startswith(("data:", "blob:"))} == {"127.0.0.1"}


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def fill(page, name, text):
    page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def count_images(page, text):
    """Fill in the number of images of the tab that is open."""
    page.get_by_label("Images", exact=True).locator("visible=true").fill(text)


def shown(page, name):
    """The picture that an element shows, when it is a file of ours."""
    image = page.locator(f"#{name} img")
    image.wait_for()
    return Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body()))


def command(page, name):
    """The words behind `python SCRIPT` of the command that is shown."""
    return shlex.split(page.locator(f"#{name}-command textarea").input_value())[2:]


def draw_over(page, canvas):
    """A line through the middle of a canvas; again while it shows nothing of it, as when it is not ready yet."""
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    before = canvas.screenshot()
    for _ in range(10):
        page.mouse.down()
        for k in range(1, 7):
            page.mouse.move(x - 60 + 20 * k, y)
        page.mouse.up()
        page.mouse.move(x - 60, y)
        page.wait_for_timeout(300)
        if canvas.screenshot() != before:
            return
    raise AssertionError("the editor cannot be drawn on")


def test_a_picture_is_drawn_step_after_step_and_downloaded(page, asked, tmp_path):
    count_images(page, "2")
    fill(page, "schedule", "M4R1")
    page.evaluate(
        """() => {
            window.pictures = new Set();
            const look = () => document.querySelectorAll("#generated img").forEach(e => window.pictures.add(e.src));
            new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
        }"""
    )
    button(page, "Generate").click()
    file = page.locator("#generated-file:not([disabled])")
    file.wait_for()
    assert "M4R1 · 5 + 1 evaluations, 12 rows · cfg 3 · " in page.locator("#generated-words").inner_text()
    with page.expect_download() as download:
        file.click()
    download.value.save_as(tmp_path / "downloaded.png")
    words = command(page, "generated")
    sample.main([*words, "--out", str(tmp_path / "by-command.png")])
    assert (tmp_path / "downloaded.png").read_bytes() == (tmp_path / "by-command.png").read_bytes()
    assert np.array_equal(shown(page, "generated"), Image.open(tmp_path / "by-command.png"))
    assert page.evaluate("window.pictures.size") >= 4  # of the noise, five steps, and the file
    assert asked <= {"127.0.0.1"}


def test_mistakes_are_shown_and_the_page_goes_on(page):
    page.get_by_role("tab", name="Generate").click()
    for schedule, count, said in (
        ("X9", "1", "cannot read schedule 'X9'"),
        ("M2", "1000000000", "1000000000 images: expected 1 to 64"),
    ):
        fill(page, "schedule", schedule)
        count_images(page, count)
        button(page, "Generate").click()
        page.get_by_text(said).wait_for()
    count_images(page, "1")
    button(page, "Generate").click()
    page.get_by_text("M2 · 3 evaluations, 6 rows · cfg 3").wait_for()
    assert "--schedule M2 --num-images 1 " in " ".join(command(page, "generated"))


def test_two_schedules_are_two_rows(page):
    page.get_by_role("tab", name="Compare").click()
    fill(page, "first", "A3")
    fill(page, "second", "H1")
    button(page, "Compare").click()
    page.locator("#compared-file:not([disabled])").wait_for()
    said = page.locator("#compared-words").inner_text()
    found = re.findall(r"(\S+) · (\d+) evaluations, (\d+) rows · cfg 3 · [\d.]+ ms/image", said)
    assert found == [("A3", "3", "6"), ("H1", "2", "4")]
    width, height = shown(page, "compared").size
    assert height > 2 * 128 + 3 * 12  # two rows, a line above each and one below
    assert width > 4 * 128


def test_what_is_drawn_over_is_drawn_anew(page, tmp_path, monkeypatch):
    page.get_by_role("tab", name="Edit").click()
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    button(page, "Edit").click()
    page.get_by_text("nothing is drawn over the picture").wait_for()
    draw_over(page, canvas)
    page.get_by_label("Schedule", exact=True).locator("visible=true").fill("M3")
    page.get_by_label("Results", exact=True).fill("2")
    button(page, "Edit").click()
    page.locator("#edited img").wait_for()
    assert "M3: 4 evaluations, strength 1" in page.locator("#edited-words").inner_text()
    links = page.locator("#edited-files a[download]").evaluate_all("all => all.map(each => [each.download, each.href])")
    files = {name: page.request.get(url).body() for name, url in dict(links).items()}
    assert set(files) == {"edited-0.png", "edited-1.png", "image.png", "mask.png"}
    for name in ("image.png", "mask.png"):
        (tmp_path / name).write_bytes(files[name])
    monkeypatch.chdir(tmp_path)
    edit.main(command(page, "edited"))
    for k in range(2):
        assert Path(f"edited-{k}.png").read_bytes() == files[f"edited-{k}.png"]
    drawn = np.asarray(Image.open("mask.png")).reshape(32, 8, 32, 8).max((1, 3)) > 0
    image = np.asarray(Image.open("image.png").convert("RGB"))[::8, ::8].astype(int)
    changed = (np.asarray(Image.open("edited-0.png")).astype(int) != image).any(-1)
    assert 0.02 < drawn.mean() < 0.5
    assert changed[drawn].mean() > 0.5
    assert not changed[~drawn].any()
