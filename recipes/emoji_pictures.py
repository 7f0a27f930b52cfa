"""Noto Color Emoji, a font with a free licence (SIL OFL 1.1), as a folder of small pictures for each class.

Debian and Ubuntu have the font and Unicode's list of emoji: `apt install fonts-noto-color-emoji unicode-data`. The
classes are the list's subgroups.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
BITMAP_SIZE = 109  # of the font's bitmaps; it has no other
MARGIN = 4  # around a drawing, in pixels of that size

# Skin tones and signs of gender: sequences with them look nearly as those without.
LEFT_OUT = {*map(chr, range(0x1F3FB, 0x1F400)), "\N{FEMALE SIGN}", "\N{MALE SIGN}"}

# The subgroups of each class. Signs, letters, families, body parts, tools and household things belong to none: what
# there is here is enough for so small a model.
CLASSES: dict[str, tuple[str, ...]] = {
    "face-smiling": ("face-smiling", "face-affection", "face-tongue", "face-hand", "face-hat", "face-glasses"),
    "face-neutral": ("face-neutral-skeptical", "face-sleepy", "face-unwell"),
    "face-concerned": ("face-concerned", "face-negative"),
    "face-costume": ("face-costume", "cat-face", "monkey-face"),
    "heart": ("heart",),
    "hand": (
        *("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed"),
        *("hands", "hand-prop"),
    ),
    "person": ("person",),
    "person-gesture": ("person-gesture",),
    "person-role": ("person-role",),
    "person-fantasy": ("person-fantasy",),
    "person-activity": ("person-activity", "person-resting"),
    "person-sport": ("person-sport",),
    "animal-mammal": ("animal-mammal",),
    "animal-bird": ("animal-bird",),
    "animal-marine": ("animal-marine", "animal-amphibian", "animal-reptile"),
    "animal-bug": ("animal-bug",),
    "plant": ("plant-flower", "plant-other"),
    "food-fruit": ("food-fruit",),
    "food-vegetable": ("food-vegetable",),
    "food-prepared": ("food-prepared",),
    "food-asian": ("food-asian", "food-marine"),
    "food-sweet": ("food-sweet",),
    "drink": ("drink", "dishware"),
    "landscape": ("place-map", "place-geographic", "place-other"),
    "building": ("place-building", "place-religious", "hotel"),
    "vehicle": ("transport-ground",),
    "ship-plane": ("transport-water", "transport-air"),
    "clock": ("time",),
    "sky": ("sky & weather",),
    "party": ("event", "award-medal"),
    "sport": ("sport",),
    "game": ("game", "arts & crafts"),
    "clothing": ("clothing",),
    "music": ("sound", "music", "musical-instrument"),
    "flag": ("flag", "country-flag", "subdivision-flag"),
}


class Emoji(NamedTuple):
    """One of the list: the text that draws it, and the subgroup that it is in."""

    text: str
    subgroup: str


def check_installed(font: Path = FONT, emoji: Path = LIST) -> None:
    """Raises ValueError, with what helps, where the font, the list or what draws sequences of it is not here."""
    for path, package in ((font, "fonts-noto-color-emoji"), (emoji, "unicode-data")):
        if not path.is_file():
            raise ValueError(f"no such file: {path}; on Debian and Ubuntu: apt install {package}")
    if not features.check("raqm"):
        raise ValueError("this Pillow has no raqm, which draws flags as one picture: pip install --upgrade pillow")


def read_list(path: Path = LIST) -> Iterator[Emoji]:
    """The fully qualified emoji of Unicode's list, in its order."""
    subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif "; fully-qualified" in line:
            codes = line.partition(";")[0].split()
            yield Emoji("".join(chr(int(code, 16)) for code in codes), subgroup)


def draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """An emoji over white, cut to its outline and a margin, size x size pixels; None where the font lacks it."""
    if font.getlength(text) > 1.5 * font.getlength("\N{GRINNING FACE}"):
        return None  # a sequence without a picture of its own is drawn as those of its parts, side by side
    canvas = Image.new("RGB", (3 * BITMAP_SIZE,) * 2, "white")
    ImageDraw.Draw(canvas).text((1.5 * BITMAP_SIZE,) * 2, text, font=font, embedded_color=True, anchor="mm")
    outline = ImageChops.invert(canvas).getbbox()
    if outline is None:
        return None
    left, top, right, bottom = outline
    x, y, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2 + MARGIN
    square = canvas.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def render(folder: Path, size: int = 32, classes: Collection[str] = tuple(CLASSES)) -> int:
    """Write folder/CLASS/CODES.png afresh for all emoji of the classes; returns how many there are.

    Raises ValueError as `check_installed`.
    """
    check_installed()
    shutil.rmtree(folder, ignore_errors=True)
    font = ImageFont.truetype(str(FONT), BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
    class_of = {subgroup: name for name in classes for subgroup in CLASSES[name]}
    count = 0
    for emoji in read_list():
        if emoji.subgroup not in class_of or LEFT_OUT & set(emoji.text[1:]):
            continue
        picture = draw(emoji.text, font, size)
        if picture is not None:
            path = folder / class_of[emoji.subgroup] / ("-".join(f"{ord(c):x}" for c in emoji.text) + ".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            count += 1
    return count
