"""The paper's rows and the fair table's on this device: FID, FD-DINOv2 and milliseconds, beside what was published.

Weights and reference are fetched, each row is sampled by sample_ddp_feature.py and evaluated by evaluator.py, and what
is known is written at once: the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import describe, interleave
from benchmarks.options import ReproduceOptions
from benchmarks.report import PAPER
from flowturbo.networks.compiled import CannotCompile
from flowturbo.sampling.generate import Files, ImageSampler, load_networks
from flowturbo.sampling.options import NetworkOptions, SamplingOptions
from flowturbo.sampling.solvers import parse_sampler
from flowturbo.system import cli
from flowturbo.system.claims import check_same, read_record, write_record
from flowturbo.system.distributed import pick_device
from flowturbo.system.files import exclusive, sha256
from flowturbo.weights.cache import find_asset, locate
from flowturbo.weights.fetch import Terms, fetch
from flowturbo.weights.registry import ASSETS, Asset

ROOT = Path(__file__).resolve().parent.parent
TIMED = 8  # images at once, as the paper times them

# FID of 50 000 images at cfg 1.5 on SiT-XL/2: FlowTurbo's tables 1 and 2; of A16 NeuralSolver (arXiv 2505.21114).
FID = {
    **{"H8": 3.68, "H11": 2.79, "H15": 2.42, "H24": 2.20, "A16": 2.42},
    **{"H1P5R3": 3.93, "H2P4R2": 3.63, "H2P8R2": 2.69, "H5P7R3": 2.22, "H8P9R5": 2.12},
}
FAIR = ("H4", "H1P6", "A8", "M7", "H1P14", "A16", "M15")  # 8 and 16 evaluations each, H8 of the paper's rows beside
ROWS = tuple(dict.fromkeys([*PAPER, *FAIR]))

LEGEND = """published: SiT-XL/2, cfg 1.5, FID of 50 000 images; ms an image at batch 8 on an A800, Heun not compiled,
FlowTurbo compiled. Here: {count} images, batch {batch}; distances at different numbers of images cannot be compared."""


@dataclass
class Results:
    """What has been measured so far, by schedule, in a file that a later run goes on from."""

    path: Path
    settings: Mapping[str, Any]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any]) -> Results:
        """Raises OtherSettings where the file is of other settings, ValueError where it is damaged."""
        found = read_record(path) or {}
        if found:
            check_same(f"{path}", found.get("settings", {}), json.loads(json.dumps(settings)))
        return cls(path, settings, dict(found.get("rows", {})))

    def add(self, schedule: str, **figures: float) -> None:
        """Figures of one row, written at once."""
        self.rows[schedule] = {**self.rows.get(schedule, {}), **figures}
        write_record(self.path, {"settings": self.settings, "rows": self.rows})


def run(options: ReproduceOptions, assets: Mapping[str, Asset] = ASSETS, terms: Terms = Terms()) -> Results:
    """Measure every row that is not yet measured, and print the table.

    Raises OtherSettings where the folder holds figures of other settings, EndedEarly where a script has failed.
    """
    folder = Path(options.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    schedules = tuple(str(parse_sampler(text)) for text in options.schedules or ROWS)
    with exclusive(folder):
        files = fetch_all(options, assets, terms)
        device = pick_device(options.device)
        results = Results.open(folder / "reproduced.json", settings_of(options, files, device))
        for line in describe(device):
            print(line)
        print(f"{len(schedules)} rows of {options.num_samples} images, cfg {options.cfg_scale:g}, to {results.path}")
        for number, schedule in enumerate(schedules, 1):
            for extractor in options.extractors:
                if extractor not in results.rows.get(schedule, {}):
                    print(f"row {number} of {len(schedules)}: {schedule}, {extractor}", flush=True)
                    results.add(schedule, **{extractor: frechet_distance(schedule, extractor, options, files)})
            if not options.keep_samples:
                remove_samples(folder, schedule)
        untimed = [schedule for schedule in schedules if "ms" not in results.rows.get(schedule, {})]
        for schedule, figures in milliseconds(untimed, options, files, device).items():
            results.add(schedule, **figures)
    print(table(results, schedules, options.extractors))
    return results


def fetch_all(options: ReproduceOptions, assets: Mapping[str, Asset], terms: Terms) -> dict[str, str]:
    """The local paths of networks and reference: files as they are named, registered ones downloaded."""

    def path(name: str) -> str:
        if name == "none" or (find_asset(name, assets) is None and locate(name) is None):
            return name  # what takes it says whether it can
        return str(locate(name, assets=assets) or fetch(name, assets=assets, terms=terms))

    names = ("predictor_ckpt", "refiner_ckpt", "vae_ckpt", "reference")
    files = {name: path(getattr(options, name)) for name in names}
    if "inception" in options.extractors:
        files["inception"] = path("inception")
    return files


def settings_of(options: ReproduceOptions, files: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """What the figures depend on, as JSON types."""
    shaping = ("num_samples", "cfg_scale", "precision", "compile")
    networks = {name: sha256(files[name]) for name in ("predictor_ckpt", "refiner_ckpt")}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**{name: getattr(options, name) for name in shaping}, **networks, "device": device_name}


def frechet_distance(schedule: str, extractor: str, options: ReproduceOptions, files: Mapping[str, str]) -> float:
    """Of a row's samples, made first where they are not there, from the reference."""
    folder = Path(options.results_dir)
    device = ["--device", options.device]
    weights = ["--weights", files["inception"]] if extractor == "inception" else []
    reference = folder / f"reference-{extractor}.npz"
    if not reference.is_file():
        source = [files["reference"], "-o", str(reference), "--features", "--extractor", extractor]
        script("evaluator.py", "stats", *source, *weights, *device)
    archive = folder / "samples" / f"{word(schedule)}.npz"
    script("sample_ddp_feature.py", *sampling_flags(schedule, options, files), ranks=ranks_of(options))
    told = folder / f"{word(schedule)}-{extractor}.json"
    flags = ["--extractor", extractor, *weights, *device, "--json", str(told)]
    script("evaluator.py", str(reference), str(archive), *flags)
    metrics = (read_record(told) or {})["metrics"]
    return float(metrics["FID"]["value"])


def sampling_flags(schedule: str, options: ReproduceOptions, files: Mapping[str, str]) -> list[str]:
    """What sample_ddp_feature.py is told."""
    flags = {
        "schedule": schedule,
        "tag": word(schedule),
        "sample-dir": Path(options.results_dir) / "samples",
        "num-fid-samples": options.num_samples,
        "per-proc-batch-size": options.batch_size,
        "cfg-scale": options.cfg_scale,
        "precision": options.precision,
        "device": options.device,
        **{name.replace("_", "-"): files[name] for name in ("predictor_ckpt", "refiner_ckpt", "vae_ckpt")},
    }
    return [*(f"--{name}={value}" for name, value in flags.items()), *(["--compile"] if options.compile else [])]


def ranks_of(options: ReproduceOptions) -> int:
    """As many processes as were asked for, or one for each GPU."""
    return options.ranks or max(1, torch.cuda.device_count())


def script(name: str, *arguments: str, ranks: int = 1) -> None:
    """Run a script of the repository, under torchrun with several ranks. Raises EndedEarly where it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / name), *arguments]
    code = subprocess.run(command).returncode
    if code:
        raise cli.EndedEarly(f"{name} ended with exit code {code}; what is done is kept, the same command goes on")


def word(schedule: str) -> str:
    """A schedule as a file's name."""
    return re.sub(r"[^\w.+@-]", "_", schedule)


def remove_samples(folder: Path, schedule: str) -> None:
    """Remove a row's images, 10 GB at 50 000 of 256 pixels; its figures and its preview stay."""
    place = folder / "samples" / word(schedule)
    shutil.rmtree(place, ignore_errors=True)
    place.with_name(f"{place.name}.npz").unlink(missing_ok=True)


@torch.no_grad()
def milliseconds(
    schedules: Iterable[str], options: ReproduceOptions, files: Mapping[str, str], device: torch.device
) -> dict[str, dict[str, float]]:
    """Of an image, from noise to bytes, in batches of TIMED: "ms", and "ms_compiled" where asked for and possible."""
    specs = {schedule: parse_sampler(schedule) for schedule in schedules}
    if not specs:
        return {}
    held = NetworkOptions(
        files["predictor_ckpt"],
        files["refiner_ckpt"],
        files["vae_ckpt"],
        options.device,
        options.precision,
        compile=options.compile,
    )
    networks = load_networks(held, Files(files["predictor_ckpt"], files["refiner_ckpt"]), device)
    settings = SamplingOptions(cfg_scale=options.cfg_scale).settings(networks.path_type, networks.refiner_step)
    classes = [k % networks.predictor.num_classes for k in range(TIMED)]
    found: dict[str, dict[str, float]] = {schedule: {} for schedule in specs}
    for name in ("ms", *(["ms_compiled"] if options.compile else [])):
        samplers = {s: ImageSampler(networks, spec, settings, name != "ms") for s, spec in specs.items()}
        calls = {s: (lambda sampler=sampler: sampler(0, range(TIMED), classes)) for s, sampler in samplers.items()}
        try:
            timings = interleave(calls, device, repeats=options.repeats, warm_up=2, title=name)
        except CannotCompile as reason:
            print(f"{name}: left out: {cli.one_line(reason)}")
            continue
        for schedule, timing in timings.items():
            found[schedule][name] = 1000 * timing.median / TIMED
    return found


def table(results: Results, schedules: Iterable[str], extractors: Iterable[str]) -> str:
    """Published beside measured."""
    distances = list(extractors)
    names = {"inception": "FID", "dinov2": "FD-DINOv2", "pixels": "FD pixels"}
    head = f"{'schedule':<10}{'FID, published':>15}" + "".join(f"{names.get(e, e) + ', here':>16}" for e in distances)
    head += f"{'ms, published':>15}{'ms, here':>10}{'compiled':>10}"
    lines = [head, "-" * len(head)]

    def cell(value: float | None, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.2f}"

    for schedule in schedules:
        row = results.rows.get(schedule, {})
        line = f"{schedule:<10}{cell(FID.get(schedule), 15)}" + "".join(cell(row.get(e), 16) for e in distances)
        line += f"{cell(PAPER.get(schedule), 15)}{cell(row.get('ms'), 10)}{cell(row.get('ms_compiled'), 10)}"
        lines.append(line)
    return "\n".join([*lines, LEGEND.format(count=results.settings["num_samples"], batch=TIMED)])
