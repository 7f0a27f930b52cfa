"""What mkdocs does besides: README.md is the first page, and links to files outside docs/ lead somewhere.

Pages and pictures of the repository's root that the pages name become part of the site. Other files of the repository
have no page: their links become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the pictures that lie outside docs/."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in sorted((ROOT / "assets").glob("*.png")):
        files.append(File.generated(config, f"assets/{picture.name}", content=picture.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with its links as the site has them."""
    place = page.file.src_uri
    folder = "" if place in PAGES.values() else "docs"

    def moved(found: re.Match[str]) -> str:
        picture, text, link = found.groups()
        target, hash, anchor = link.partition("#")
        if not target or "://" in link:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))  # from the repository's root
        new = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(new) is None:
            return text if (ROOT / path).exists() else found[0]  # a link to nothing stays, and mkdocs warns of it
        return f"{picture}[{text}]({new}{hash}{anchor})"

    return LINK.sub(moved, markdown)
