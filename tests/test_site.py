"""The site of the documentation: built without a warning, every page in its menu, nothing from other machines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTER = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, timeout=300, env={"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_built_and_in_the_menu(site):
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r": ([\w-]+\.md)$", menu, flags=re.M)
    pages = {"index.md", *OUTER[1:], *(path.name for path in (ROOT / "docs").glob("*.md"))}
    assert sorted(listed) == sorted(pages)
    for name in pages - {"index.md"}:
        assert (site / name.removesuffix(".md") / "index.html").is_file(), name


def test_links_out_of_docs_lead_somewhere(site):
    assert 'src="assets/colour.png"' in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "assets" / "colour.png").read_bytes() == (ROOT / "assets" / "colour.png").read_bytes()
    assert 'href="which-sampler/"' in (site / "index.html").read_text(encoding="utf-8")
    assert 'href="../glossary/"' in (site / "CONTRIBUTING" / "index.html").read_text(encoding="utf-8")
    assert "../assets/comparison.png" in (site / "demo" / "index.html").read_text(encoding="utf-8")
    # A file without a page is named, without a link.
    assert "LICENSE.txt" not in (site / "index.html").read_text(encoding="utf-8")
    assert "MIT licence" in (site / "index.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_other_machines(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//[^>]*>", text), page
        loaded = [link for link in re.findall(r"<link[^>]*>", text) if 'rel="canonical"' not in link]
        assert not [link for link in loaded if re.search(r"href=\"?(?:https?:)?//", link)], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style
