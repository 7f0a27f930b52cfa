"""The options of a picture of samples, shared by the command line, Python and the web page, and the name that options
give the file of a picture. No torch is imported."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any

from flowturbo.sampling.options import NetworkOptions, SamplingOptions
from flowturbo.sampling.solvers import parse_sampler
from flowturbo.system.options import option, seed, spelled
from flowturbo.transport.blocks import BLOCKS
from flowturbo.transport.spec import SamplerSpec
from flowturbo.weights.registry import MODELS


@dataclass(frozen=True)
class PictureOptions:
    """What to sample. Raises ValueError for impossible values and combinations."""

    schedule: str = option(
        "H1P5R3",
        "blocks with counts, groups as [H1P1R1]x2, on a grid as H8@shift2; the file or the name of a solver; dopri5; "
        "sdeN for an SDE of N steps. "
        f"Blocks: {', '.join(f'{letter} ({block.name})' for letter, block in BLOCKS.items())}",
    )
    compare: tuple[str, ...] | None = option(
        None, "one row for each of these, all from the same noise", metavar="SCHEDULE"
    )
    classes: tuple[str, ...] | None = option(
        None,
        "indices, or names: the model's own, or ImageNet's and WordNet ids (default: the original's eight, or the "
        "model's first eight)",
        metavar="CLASS",
    )
    num_images: int | None = option(
        None,
        "how many, going round the classes (default: eight of each where the model's classes have names, else one; "
        "one of each to compare or to interpolate)",
    )
    interpolate: tuple[int, int] | None = option(
        None,
        "a row for each image, from its noise of the first seed to that of the second on a great circle",
        metavar=("SEED1", "SEED2"),
        type=seed,
    )
    frames: int = option(8, "pictures of an interpolation, both ends among them")
    captions: bool = option(True, "names of classes below the images, and what made them above the rows to compare")
    batch_size: int = option(16, "images sampled at once")

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_images is not None and self.num_images < 1):
            raise ValueError("batch_size and num_images must be at least 1")
        if self.frames < 2:
            raise ValueError(f"frames {self.frames} must be at least 2: both ends of an interpolation")
        if self.interpolate and self.compare:
            raise ValueError("interpolate and compare each want the rows: expected one of them")
        for spec in self.samplers:
            if self.interpolate and spec.sde_steps is not None:
                raise ValueError(f"interpolate is for samplers whose noise is all at the start, not {spec}")

    @property
    def samplers(self) -> list[SamplerSpec]:
        """What the schedules name."""
        return [parse_sampler(text) for text in self.compare or [self.schedule]]


SHORT = {  # what stands before a value in a file's name, where it is not the option's own name
    **{"cfg_scale": "cfg", "cfg_every": "every", "cfg_interval": "interval", "cfg_channels": "channels"},
    **{"refiner_ckpt": "refiner", "vae_ckpt": "vae", "num_images": "images", "refiner_step": "form"},
    **{"path_type": "path", "batch_size": "batch", "classes": "of", "to_class": "to", "from_class": "from"},
}
ALWAYS = ("cfg_scale", "seed")
ELSEWHERE = ("schedule", "compare", "predictor_ckpt", "strict")  # the name begins with these; strict changes nothing
LONGEST = 150


def picture_name(
    picture: PictureOptions, networks: NetworkOptions = NetworkOptions(), sampling: SamplingOptions = SamplingOptions()
) -> str:
    """MODEL-SCHEDULE-cfgSCALE-seedSEED and every other setting that is not the default, as `settings_name`."""
    return settings_name((picture, networks, sampling))


def settings_name(options: Sequence[Any], before: str = "", told: Sequence[str] = ()) -> str:
    """BEFORE-MODEL-SCHEDULE-cfgSCALE-seedSEED and every other setting that is not the default: other settings, other
    name.

    The options have the fields of networks, of sampling, `schedule` and `compare`; `told` are those that `before`
    tells. Where the settings cannot be read off the name, as with a path or a long list, a digest of all of them ends
    it.
    """
    given, usual = _settings(*options)
    begins = [before] if before else []
    model = next((name for name, each in MODELS.items() if each.predictor_ckpt == given["predictor_ckpt"]), None)
    if model is not None:
        begins.append(model)
        usual |= {name: value for name, value in MODELS[model].options().items() if name not in ALWAYS}
    elif given["predictor_ckpt"] != usual["predictor_ckpt"]:
        begins.append(_text(given["predictor_ckpt"]))
    texts = given["compare"] or (given["schedule"],)
    alone = "vs-" if given["compare"] and len(texts) == 1 else ""  # one row to compare has a caption
    begins.append(alone + "-vs-".join(str(parse_sampler(text)) for text in texts))
    changed = [name for name in given if given[name] != usual[name] and name not in (*ALWAYS, *ELSEWHERE, *told)]
    words = [_word(name, given[name]) for name in (*ALWAYS, *changed)]
    name = "-".join([*begins, *words])
    safe = re.sub(r"[^\w.+@-]", "_", name)[:LONGEST]
    solvers = any("/" in text or text.lower().endswith(".json") for text in texts)
    keys = "|".join(["no-", *map(_key, given)])
    plain = all(_is_plain(given[each], keys) for each in ("predictor_ckpt", *told, *changed))
    if safe == name and plain and not solvers:
        return name
    return f"{safe}-{hashlib.sha256(repr(sorted(given.items())).encode()).hexdigest()[:8]}"


def _settings(*options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of all fields, and their defaults."""
    given: dict[str, Any] = {}
    usual: dict[str, Any] = {}
    for each in options:
        given |= asdict(each)
        usual |= {field.name: field.default for field in fields(each)}
    return given, usual


def _key(name: str) -> str:
    """A setting's own name in a file's name."""
    return SHORT.get(name, name.replace("_", "-"))


def _word(name: str, value: Any) -> str:
    """A setting in a file's name, such as "cfg4" or "no-captions"."""
    name = _key(name)
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    values = value if isinstance(value, tuple) else (value,)
    return name + ("-" if isinstance(values[0], str) else "") + "+".join(map(_text, values))


def _text(value: Any) -> str:
    return PurePath(value).name if isinstance(value, str) else spelled(value)


def _is_plain(value: Any, keys: str) -> bool:
    """Whether a value can be read off a name: a text without a folder, and nothing in it that joins words or values."""
    if isinstance(value, tuple):
        return all(_is_plain(each, keys) for each in value) and not any("+" in str(each) for each in value)
    return not isinstance(value, str) or (PurePath(value).name == value and not re.search(f"-({keys})", value))
