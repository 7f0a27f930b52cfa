"""Malformed and malicious inputs for the reliability campaign: what damage, mistakes and attackers make."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

QUOTAS = {
    "checkpoints": 420,
    "archives": 240,
    "exports": 120,
    "images": 200,
    "configs": 180,
    "schedules": 48,
    "flags": 120,
}
DEEP = "[" * 100_000
JUNK: list[Any] = [None, True, -1, 10**9, 10**30, 1e300, float("nan"), "", "x", [], [[]], {}, {"a": 1}, {1: 2}]


@dataclass(frozen=True)
class Case:
    """One input: what it is, which script reads it, what the complaint must name, and whether it may be harmless."""

    what: str
    reader: str
    path: Path
    name: str
    may_pass: bool = False
    flags: tuple[str, ...] = ()


class Evil:
    """A pickle that runs a command when it is loaded carelessly."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class Corpus:
    """Cases of every kind, drawn with the dice; `content` and `whole` are a checkpoint, `marker` what evil makes."""

    def __init__(self, folder: Path, dice: random.Random, content: dict[str, Any], whole: bytes, marker: Path):
        self.folder, self.dice, self.content, self.whole, self.marker = folder, dice, content, whole, marker
        self.number = 0

    def cases(self, kind: str, count: int) -> Iterator[Case]:
        """`count` cases, going round the makers of the kind."""
        makers = cycle(getattr(self, f"_{kind}")())
        return (make() for make in islice(makers, count))

    def _file(self, suffix: str, data: bytes = b"") -> Path:
        self.number += 1
        path = self.folder / f"bad-{self.number:04d}{suffix}"
        path.write_bytes(data)
        return path

    def _damaged(self, data: bytes) -> bytes:
        """Cut short, a stretch overwritten, or a stretch removed."""
        start = self.dice.randrange(len(data))
        length = self.dice.randrange(1, 200)
        middle = self.dice.choice([self.dice.randbytes(length), bytes(length), b""])
        return data[:start] if self.dice.random() < 0.4 else data[:start] + middle + data[start + length :]

    # ---- checkpoints

    def _exports(self) -> list[Callable[[], Case]]:
        """Those that are read for an export."""

        def exported(make: Callable[[], Case]) -> Callable[[], Case]:
            def case() -> Case:
                made = make()
                return replace(made, what=f"{made.what}, exported", reader="export")

            return case

        return [exported(make) for make in self._checkpoints() if make != self._odd_optimizer]

    def _checkpoints(self) -> list[Callable[[], Case]]:
        return [
            self._hungry_pickle,
            self._laughing_config,
            self._damaged_checkpoint,
            self._evil_checkpoint,
            self._odd_key,
            self._odd_config,
            self._odd_tensor,
            self._odd_optimizer,
            self._no_checkpoint,
            self._bomb_checkpoint,
            self._safetensors,
        ]

    def _checkpoint(
        self, what: str, data: bytes, may_pass: bool = False, suffix: str = ".pt", readers: str = ""
    ) -> Case:
        reader = self.dice.choice(readers.split() or ["resume", "teacher", "predictor"])
        path = self._file(suffix, data)
        return Case(f"{what} as {reader}", reader, path, str(path), may_pass)

    def _saved(self, content: object, **more: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer, **more)
        return buffer.getvalue()

    def _copy(self) -> dict[str, Any]:
        return copy.deepcopy(self.content)

    def _damaged_checkpoint(self) -> Case:
        return self._checkpoint("a damaged checkpoint", self._damaged(self.whole), may_pass=True)

    def _hungry_pickle(self) -> Case:
        """A few bytes that ask for gigabytes of what torch's loader knows."""
        name = self.dice.choice(["builtins bytearray", "collections Counter", "torch FloatTensor", "builtins set"])
        table = b"}q\1(" + b"".join(b"M" + k.to_bytes(2, "little") + b"K\0" for k in range(60_000)) + b"u"
        order = b"\x80\2ccollections\nOrderedDict\nq\0]" + table + b"a"
        data = self.dice.choice(
            [
                b"\x80\2c" + name.replace(" ", "\n").encode() + b"\nJ\xff\xff\xff\x7f\x85R.",
                order + b"h\0h\1\x85R" * 2000 + b"a.",
                order + b"h\0)Rh\1ba" * 2000 + b".",
                b"\x80\2" + b"]" * (20 << 20) + b".",
            ]
        )
        if self.dice.random() < 0.5:
            buffer = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(self.whole)) as old, zipfile.ZipFile(buffer, "w") as new:
                for info in old.infolist():
                    new.writestr(info.filename, data if info.filename.endswith("data.pkl") else old.read(info))
            data = buffer.getvalue()
        return self._checkpoint(f"a hungry pickle {data[:40]!r}", data)

    def _laughing_config(self) -> Case:
        """What prints for ever, or moves the cursor of a terminal."""
        content = self._copy()
        laughs: Any = [0]
        kind = self.dice.choice([tuple, list])
        for _ in range(60):
            laughs = kind([laughs, laughs])
        odd = self.dice.choice([laughs, "\x1b[2J\x07" * 50, {"\x1b[2J": laughs}, "x" * 10**6])
        place = self.dice.choice([content["config"]["model"], content["config"]["training"], content["config"]])
        place[self.dice.choice([*place, "class", "\x1b[2J"])] = odd
        return self._checkpoint("a config that prints for ever", self._saved(content), may_pass=True)

    def _evil_checkpoint(self) -> Case:
        mark = str(self.marker)
        evil = self.dice.choice(
            [
                Evil(open, mark, "w"),
                Evil(os.system, f"touch {mark}"),
                Evil(eval, f"open({mark!r}, 'w')"),
                Evil(exec, f"open({mark!r}, 'w')"),
                Evil(os.mkdir, mark),
            ]
        )
        content = self._copy()
        place = self.dice.choice([content, content["model"], content["opt"], content["config"]])
        place[self.dice.choice(["evil", *list(place)[:3]])] = evil
        form = self.dice.randrange(3)
        if form == 2:
            return self._checkpoint("a pickle that runs code", pickle.dumps(content, self.dice.randrange(2, 6)))
        return self._checkpoint(
            "a checkpoint that runs code", self._saved(content, _use_new_zipfile_serialization=form == 0)
        )

    def _odd_key(self) -> Case:
        content = self._copy()
        key = self.dice.choice(["model", "ema", "opt", "step", "config"])
        content[key] = value = self.dice.choice([*JUNK, torch.ones(3), (1, 2), torch.tensor(float("nan"))])
        return self._checkpoint(f"{key} = {value!r}"[:60], self._saved(content), may_pass=True)

    def _odd_config(self) -> Case:
        content = self._copy()
        part = content["config"][self.dice.choice(["model", "training"])]
        key = self.dice.choice(list(part))
        part[key] = value = self.dice.choice([*JUNK, 10**6, -8, 0, 7, "SiT", torch.ones(2), [10**5, 10**5]])
        return self._checkpoint(f"config {key} = {value!r}"[:60], self._saved(content), may_pass=True)

    def _odd_tensor(self) -> Case:
        content = self._copy()
        for part in ("model", "ema"):
            weights = content[part]
            key = self.dice.choice(list(weights))
            value = weights[key]
            weights[key] = self.dice.choice(
                [
                    lambda value: value * torch.nan,
                    lambda value: value[..., :1],
                    lambda value: torch.zeros(1).expand(10**6, 10**6),
                    lambda value: value.to_sparse(),
                    lambda value: value.bool(),
                    lambda value: value.to(torch.complex64),
                    lambda value: value.to("meta"),
                    lambda value: value[None],
                    lambda value: 3,
                    lambda value: torch.empty(0),
                ]
            )(value)
        return self._checkpoint(f"odd tensors {key}", self._saved(content), may_pass=True)

    def _odd_optimizer(self) -> Case:
        content = self._copy()
        opt = content["opt"]
        laughs: list = [0]
        for _ in range(60):
            laughs = [laughs, laughs]
        change = self.dice.randrange(8)
        junk = self.dice.choice([*JUNK, laughs, torch.ones(10**4, 1)])
        if change == 0:
            opt["state"] = junk
        elif change == 1:
            opt["param_groups"] = junk
        elif change == 2:
            opt["state"][0] = junk
        elif change == 3:
            opt["state"][1]["exp_avg"] = torch.ones(3)
        elif change == 4:
            opt["param_groups"][0]["params"] = junk
        elif change == 5:
            opt["state"][2]["step"] = junk
        elif change == 6:
            opt["state"][2]["exp_avg_sq"] = opt["state"][2]["exp_avg_sq"] * torch.nan
        else:
            opt["param_groups"][0][self.dice.choice(["betas", "eps", "amsgrad", "lr"])] = junk
        what = f"optimizer change {change}" + (" billion laughs" if junk is laughs else f" {junk!r}"[:40])
        return self._checkpoint(what, self._saved(content), may_pass=True, readers="resume")

    def _no_checkpoint(self) -> Case:
        data = self.dice.choice(
            [
                b"",
                b"\0" * 5000,
                b"<!DOCTYPE html><html>404</html>",
                self.dice.randbytes(3000),
                b"\x80\x02" + self.dice.randbytes(100),
                b"\x80\x02" + b"(" * 10**6,
                b"\x80\x04\x95" + b"\xff" * 8,
                b"PK\3\4" + self.dice.randbytes(500),
                pickle.dumps([1, 2], 2),
                self._saved([torch.ones(2)]),
                self._saved({}),
                self._saved({"model": {"a": torch.ones(2)}}),
                self._saved(self.content)[:-30],
            ]
        )
        return self._checkpoint(f"no checkpoint {data[:12]!r}", data)

    def _bomb_checkpoint(self) -> Case:
        """Zip archives: members that inflate a thousandfold, absurd sizes, and names that lead elsewhere."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.whole)) as old, zipfile.ZipFile(buffer, "w") as new:
            kind = self.dice.randrange(3)
            for info in old.infolist():
                data = old.read(info)
                if kind == 0 and info.filename.endswith(("data.pkl", "/0")):
                    data, method = data + bytes(300 << 20), zipfile.ZIP_DEFLATED
                else:
                    method = zipfile.ZIP_STORED
                name = info.filename if kind != 1 else f"../../../../tmp/{self.marker.name}/{info.filename}"
                new.writestr(name, data, method, compresslevel=1)
        data = buffer.getvalue()
        if kind == 2:  # the directory at the end announces 4 GB members
            at = data.rindex(b"PK\1\2")
            data = data[: at + 20] + struct.pack("<II", 2**32 - 2, 2**32 - 2) + data[at + 28 :]
        return self._checkpoint(f"a zip bomb {kind}", data, may_pass=kind == 1)

    def _safetensors(self) -> Case:
        good = safetensors_bytes(self.content["ema"])
        length = struct.unpack("<Q", good[:8])[0]
        header = json.loads(good[8 : 8 + length])
        name = self.dice.choice([key for key in header if key != "__metadata__"])
        choice = self.dice.randrange(6)
        if choice == 0:
            data = struct.pack("<Q", 2**60) + good[8:]
        elif choice == 1:
            data = self._damaged(good)
        elif choice == 2:
            data = struct.pack("<Q", len(DEEP)) + DEEP.encode() + good[8 + length :]
        else:
            if choice == 3:
                header[name]["shape"] = [10**12]
            elif choice == 4:
                header[name]["data_offsets"] = [0, 2**62]
            else:
                header["__metadata__"] = {"config": self.dice.choice([DEEP, "{", '{"model": 3}', "[1]"])}
            text = json.dumps(header).encode()
            data = struct.pack("<Q", len(text)) + text + good[8 + length :]
        return self._checkpoint(f"safetensors {choice}", data, choice == 1, ".safetensors", readers="predictor teacher")

    # ---- archives of arrays

    def _archives(self) -> list[Callable[[], Case]]:
        return [
            self._packed_archive,
            self._damaged_archive,
            self._lying_header,
            self._evil_archive,
            self._odd_arrays,
            self._feature_file,
        ]

    def _archive(self, what: str, data: bytes, may_pass: bool = False) -> Case:
        path = self._file(".npz", data)
        return Case(what, "evaluator", path, path.name, may_pass)

    def _npz(self, method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in members.items():
                archive.writestr(f"{name}.npy", data)
        return buffer.getvalue()

    def _npy(self, array: np.ndarray, **pickled: bool) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, **pickled)
        return buffer.getvalue()

    def _pixels(self) -> np.ndarray:
        return np.frombuffer(self.dice.randbytes(4 * 64 * 3), np.uint8).reshape(4, 8, 8, 3)

    def _damaged_archive(self) -> Case:
        data = self._npz(self.dice.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]), arr_0=self._npy(self._pixels()))
        return self._archive("a damaged archive", self._damaged(data), may_pass=True)

    def _packed_archive(self) -> Case:
        """Megabytes that unpack to gigabytes, and what is no file."""
        path = self._file(".npz")
        if self.dice.random() < 0.2:
            path.unlink()
            os.mkfifo(path)
            return Case("a pipe as an archive", "evaluator", path, path.name)
        block = bytes(1 << 20)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            name, shape = self.dice.choice([("arr_0", (1200, 512, 512, 1)), ("mu", (300 << 17,)), ("extractor", ())])
            with archive.open(f"{name}.npy", "w") as member:
                descr = {"arr_0": "|u1", "mu": "<f8", "extractor": f"<U{300 << 18}"}[name]
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for _ in range(300):
                    member.write(block)
        return Case(f"a packed archive of {name}", "evaluator", path, path.name)

    def _lying_header(self) -> Case:
        shape = self.dice.choice([(10**12, 8, 8, 3), (2**62, 2**62, 1, 3), (-4, 8, 8, 3), (5, 8, 8, 3), (3, 8, 8, 3)])
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        text = self.dice.choice([text, text.replace("|u1", "|O"), text.replace("8,", "8 ** 99,"), "(" * 100_000])
        size = struct.pack("<H" if len(text) < 65536 else "<I", len(text))
        magic = b"\x93NUMPY" + (b"\1\0" if len(size) == 2 else b"\2\0")
        return self._archive(f"header {text[:60]}", self._npz(arr_0=magic + size + text.encode() + bytes(4 * 192)))

    def _evil_archive(self) -> Case:
        array = np.array([Evil(os.system, f"touch {self.marker}")] * 4, dtype=object)
        name = self.dice.choice(["arr_0", "mu", "sigma", "pool", "extractor"])
        good = {"mu": self._npy(np.zeros(192)), "sigma": self._npy(np.eye(192))}
        return self._archive(
            f"objects in {name}", self._npz(**{**(good if name != "arr_0" else {}), name: self._npy(array)})
        )

    def _odd_arrays(self) -> Case:
        pixels = self._pixels()
        arrays = self.dice.choice(
            [
                {"arr_1": pixels},
                {"arr_0": pixels.astype(np.float64)},
                {"arr_0": pixels[..., 0]},
                {"arr_0": pixels[:1]},
                {"arr_0": pixels[:, :0]},
                {"arr_0": np.array("text")},
                {"arr_0": pixels.view("V3")},
                {"arr_0": np.asfortranarray(pixels)},
                {"arr_0": np.zeros((2, 2**13 + 1, 2**13, 1), np.uint8)},
                {},
            ]
        )
        data = self._npz(zipfile.ZIP_DEFLATED, **{name: self._npy(array) for name, array in arrays.items()})
        return self._archive(f"arrays {list(arrays)}", data)

    def _feature_file(self) -> Case:
        good: dict[str, Any] = {"mu": np.zeros(192), "sigma": np.eye(192)}
        good[self.dice.choice(["mu", "sigma", "pool", "count", "extractor", "labels", "logits", "mu_s"])] = (
            self.dice.choice([np.full(192, np.nan), np.zeros((3, 3)), np.array(-5), np.array("x" * 99), np.zeros(0)])
        )
        data = self._npz(**{name: self._npy(value) for name, value in good.items()})
        return self._archive("odd features", data, may_pass=True)

    # ---- images

    def _images(self) -> list[Callable[[], Case]]:
        return [self._damaged_image, self._huge_image, self._strip, self._no_image, self._special_file]

    def _image(self, what: str, suffix: str, data: bytes | None, may_pass: bool = False) -> Case:
        self.number += 1
        root = self.folder / f"images-{self.number}"
        path = root / "b" / f"bad{suffix}"
        (root / "a").mkdir(parents=True)
        (root / "b").mkdir()
        for k in range(3):
            Image.new("L", (8, 8), 40 * k).save(root / "a" / f"{k}.png")
        if data is not None:
            path.write_bytes(data)
        return Case(what, "images", root, str(path), may_pass)

    def _encoded(self, form: str, size: tuple[int, int] = (23, 17)) -> bytes:
        buffer = io.BytesIO()
        pixels = np.frombuffer(self.dice.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3)
        Image.fromarray(pixels).save(buffer, form)
        return buffer.getvalue()

    def _damaged_image(self) -> Case:
        form = self.dice.choice(["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
        return self._image(f"a damaged {form}", f".{form.lower()}", self._damaged(self._encoded(form)), may_pass=True)

    def _huge_image(self) -> Case:
        """A few bytes that announce billions of pixels."""
        form, side = self.dice.randrange(3), self.dice.choice([30_000, 60_000, 2**31 - 1])
        if form == 0:
            head = struct.pack(">II", side, side) + b"\x08\x00\x00\x00\x00"
            chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
            data = b"\x89PNG\r\n\x1a\n" + b"".join(
                struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
                for name, body in chunks
            )
            return self._image(f"a PNG of {side}", ".png", data)
        if form == 1:
            return self._image(f"a PGM of {side}", ".pgm", f"P5 {side} {side} 255\n".encode() + bytes(100))
        header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
        return self._image(f"a BMP of {side}", ".bmp", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)

    def _strip(self) -> Case:
        """Allowed as it is, but enormous once its short side is that of the crop."""
        long = self.dice.choice([2_000_000, 40_000_000])
        size = (long, 1) if self.dice.random() < 0.5 else (1, long)
        buffer = io.BytesIO()
        Image.new("L", size).save(buffer, "PNG")
        return self._image(f"a strip of {size}", ".png", buffer.getvalue())

    def _no_image(self) -> Case:
        mark = f"({self.marker})"
        data, suffix = self.dice.choice(
            [
                (b"", ".png"),
                (b"<html>404</html>", ".jpg"),
                (self.dice.randbytes(2000), self.dice.choice([".png", ".tif", ".webp", ".ppm", ".bmp", ".jpeg"])),
                (
                    f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{mark} (w) file\n".encode(),
                    ".png",
                ),
                (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ".webp"),
                (pickle.dumps(Evil(os.system, f"touch {self.marker}")), ".png"),
                (self._encoded("PNG")[:8], ".png"),
                (b"II*\0" + self.dice.randbytes(300), ".tiff"),
                (b"RIFF\xff\xff\xff\xffWEBPVP8 " + self.dice.randbytes(200), ".webp"),
                (b"P6 -8 8 255\n" + bytes(300), ".ppm"),
                (b"P7 8 8", ".pgm"),
                (self._encoded("ICNS", (16, 16)), ".png"),
            ]
        )
        return self._image(f"no image {data[:12]!r}", suffix, data)

    def _special_file(self) -> Case:
        case = self._image("a link to nothing, to itself, to zeros, or a pipe", ".png", None)
        kind = self.dice.randrange(4)
        if kind == 3:
            os.mkfifo(case.name)
        else:
            os.symlink(["/nowhere/at/all", case.name, "/dev/zero"][kind], case.name)
        return case

    # ---- manifests, settings, class maps

    def _configs(self) -> list[Callable[[], Case]]:
        return [self._class_map, self._manifest, self._settings]

    def _text(self, good: dict[str, Any]) -> tuple[str, bytes]:
        """A JSON text that is none, or is something else than `good`."""
        text = json.dumps(good).encode()
        key = self.dice.choice(list(good))
        odd = self.dice.choice([value for value in JUNK if value != {}])
        return self.dice.choice(
            [
                ("empty", b""),
                ("a bracket", b"{"),
                ("deep", DEEP.encode()),
                ("deep inside", b'{"a": ' + DEEP.encode()),
                ("no object", json.dumps(self.dice.choice([1, "x", [1], None, True])).encode()),
                ("no text", b"\xff\xfe" + self.dice.randbytes(50)),
                ("cut", text[: self.dice.randrange(1, len(text) - 1)]),
                ("odd value", json.dumps({**good, key: odd}).encode()),
                ("only odd", json.dumps({"../../../../tmp/evil.pt": odd}).encode()),
                ("long number", b'{"%s": %s}' % (key.encode(), b"9" * 10_000)),
            ]
        )

    def _class_map(self) -> Case:
        what, data = self._text({"c0": 0, "c1": 1, "c2": 2})
        path = self._file(".json", data)
        return Case(f"class map, {what}", "class map", path, "class map", may_pass=what == "odd value")

    def _manifest(self) -> Case:
        self.number += 1
        root = self.folder / f"runs-{self.number}"
        checkpoints = root / "000-predictor-no-note" / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "0000040.pt").write_bytes(self.whole)
        what, data = self._text({"0000040.pt": "0" * 64, "0000039.pt": "1" * 64})
        (checkpoints / "manifest.json").write_bytes(data)
        return Case(f"manifest, {what}", "auto", root, str(checkpoints / "manifest.json"))

    def _settings(self) -> Case:
        self.number += 1
        root = self.folder / f"sets-{self.number}"
        (root / "set").mkdir(parents=True)
        what, data = self._text({"settings": {"seed": 0}, "outputs": {"../../etc/passwd": "0" * 64}})
        (root / "set" / "settings.json").write_bytes(data)
        return Case(f"settings, {what}", "set", root, str(root / "set"))

    # ---- words

    def _schedules(self) -> list[Callable[[], Case]]:
        def make() -> Case:
            odd = [
                "",
                "R1",
                "H",
                "H-1",
                "H0",
                "H1P5R",
                "Q3",
                "[H1",
                "H1]",
                "[" * 5000,
                "H99999999999999",
                "[H9]x9999999",
            ]
            odd += ["sde0", "sde-1", "sde1e9", "dopri", "H1;P2", "../H1", "h1" * 20_000, "[]x5"]
            text = self.dice.choice(odd)
            name = "sde" if text.startswith("sde") else "schedule"
            return Case(f"schedule {text[:20]!r}", "schedule", self.folder, name, flags=(text,))

        return [make]

    def _flags(self) -> list[Callable[[], Case]]:
        known = {
            "train.py": [
                "--global-batch-size",
                "--steps",
                "--lr",
                "--wd",
                "--seed",
                "--keep-last",
                "--max-dt",
                "--depth",
            ],
            "sample.py": ["--seed", "--cfg-scale", "--num-images", "--batch-size", "--atol", "--cfg-channels"],
            "sample_ddp_feature.py": ["--num-fid-samples", "--per-proc-batch-size", "--seed", "--cfg-scale"],
            "evaluator.py": ["--batch-size", "--bootstrap", "--seed"],
            "cache_latents.py": ["--image-size", "--batch-size", "--shard-size", "--num-workers"],
        }
        choices = {
            "train.py": [
                "--target",
                "--model",
                "--precision",
                "--recipe",
                "--path-type",
                "--channels",
                "--device",
                "--note",
            ],
            "sample.py": ["--refiner-step", "--precision", "--diffusion", "--path-type", "--device"],
            "sample_ddp_feature.py": ["--labels", "--refiner-step", "--tag", "--device", "--features"],
            "evaluator.py": ["--labels", "--device"],
            "cache_latents.py": ["--precision", "--device"],
        }

        def mistyped() -> Case:
            script = self.dice.choice(list(known))
            flag = self.dice.choice(known[script])
            at = self.dice.randrange(3, len(flag))
            typed = flag[:at] + self.dice.choice("qxz") + flag[at:]
            return Case(f"{script} {typed}", script, self.folder, typed, flags=(typed, "1"))

        def odd_number() -> Case:
            script = self.dice.choice(list(known))
            flag = self.dice.choice(known[script])
            value = self.dice.choice(
                ["", "x", "-1", "nan", "inf", "1e999", "9" * 5000, "0x10", "1,5", "--", "½", "-0.5"]
            )
            return Case(f"{script} {flag} {value[:9]}", script, self.folder, flag, flags=(f"{flag}={value}",))

        def odd_choice() -> Case:
            script = self.dice.choice(list(choices))
            flag = self.dice.choice(choices[script])
            value = self.dice.choice(["..", "../../x", "no/such", "/etc/passwd"])
            return Case(f"{script} {flag} {value[:9]}", script, self.folder, flag, flags=(f"{flag}={value}",))

        def missing_value() -> Case:
            script = self.dice.choice(list(known))
            flag = self.dice.choice(known[script])
            return Case(f"{script} {flag} without", script, self.folder, flag, flags=(flag,))

        return [mistyped, odd_number, odd_choice, missing_value]
