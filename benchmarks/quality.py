"""One fair table of samplers of a frozen model: equal evaluations, equal compilation, the same noise.

For every row: evaluations, rows (two for an evaluation with guidance), milliseconds an image, the error of the end
points against a fine solution, and with reference images the Fréchet distance. Beside the blocks stand multistep
schedulers of diffusers; beside each refiner the same schedule with the line L in its place, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Keep, interleave
from benchmarks.options import BenchmarkOptions, QualityOptions
from benchmarks.peers import PEERS, PeerSampler, is_peer
from flowturbo.data.pictures import to_uint8
from flowturbo.data.randomness import keyed_noise
from flowturbo.evaluation import evaluate, load_extractor
from flowturbo.evaluation.features import extract
from flowturbo.evaluation.sides import Side
from flowturbo.networks.compiled import StaticGraphs, static_graph
from flowturbo.networks.load import load_network
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.fidelity import Draws, Estimate, Fidelity, fine_end_points, pixels
from flowturbo.sampling.generate import Networks, find_files, load_networks
from flowturbo.sampling.options import NetworkOptions
from flowturbo.sampling.solvers import parse_sampler
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.samplers import FlowTurbo
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.spec import SamplerSettings

SEED = 1_000_003  # of the noise: no training, no search and no grid draws from it
TIMED = 64  # images in a timed call


@dataclass(frozen=True)
class Row:
    """What is measured of one sampler."""

    name: str
    evaluations: tuple[int, int]  # predictor, refiner
    rows: tuple[int, int]
    ms: float  # an image, from noise to latents
    rmse: Estimate
    psnr: Estimate
    against: Estimate | None  # its RMSE over that of H1P with as many predictor evaluations
    distance: Estimate | None  # Fréchet


class Candidate(NamedTuple):
    """A sampler of the table: `sample` from noise and labels to latents."""

    name: str
    evaluations: tuple[int, int]
    rows: tuple[int, int]
    sample: Callable[[Tensor, Tensor], Tensor]


def measure(options: QualityOptions, common: BenchmarkOptions, keep: Keep) -> list[Row]:
    """Measure every row, printing each as it comes. Raises ValueError for files that do not fit."""
    files = NetworkOptions(
        options.predictor_ckpt, vae_ckpt=options.vae_ckpt, device=common.device, precision=common.precision
    )
    networks = load_networks(files, find_files(files, refiner=False))
    guidance = Guidance(common.cfg_scale)
    settings = SamplerSettings(guidance, path_type=networks.path_type or "linear")
    draws = Draws.random(SEED, range(options.num_images), networks.predictor.num_classes)
    reference = Reference(options, networks) if options.reference else None
    candidates = unlike(candidates_of(options, common.schedules, networks, settings))
    space = "pixels" if networks.autoencoder.channels is None else "latents"
    print(f"{len(draws.numbers)} samples, {guidance}; errors in {space}")
    fine = fine_end_points(networks, settings, *draws)
    timings = time_all(candidates, networks, draws, common.repeats or 3)
    print(header(reference is not None))
    rows: list[Row] = []
    by_name = {candidate.name: candidate for candidate in candidates}
    ends: dict[str, Tensor] = {}

    def end_of(name: str) -> Tensor:
        if name not in ends:
            ends[name] = run(by_name[name], networks, draws)
        return ends[name]

    for candidate in candidates:
        points, rival = end_of(candidate.name), f"H1P{candidate.evaluations[0] - 2}"
        fidelity = Fidelity.of(points, fine)
        row = Row(
            candidate.name,
            candidate.evaluations,
            candidate.rows,
            timings[candidate.name],
            fidelity.rmse,
            fidelity.psnr,
            fidelity.ratio(Fidelity.of(end_of(rival), fine)) if rival in by_name else None,
            None if reference is None else reference.distance(points),
        )
        rows.append(row)
        print(line(row), flush=True)
        keep([asdict(row) for row in rows])
    return rows


def names_at(evaluations: int) -> list[str]:
    """Samplers of the table with so many evaluations of the predictor, an even number of at least 4."""
    n, half = evaluations, evaluations // 2
    blocks = [f"H1P{n - 2}", f"E{n}", f"H{half}", f"D{half}", f"A{n}", f"B{n - 1}", f"F{n - 1}", f"M{n - 1}"]
    return [*blocks, f"UniPC{n}", f"DPM++{n}"]


def candidates_of(
    options: QualityOptions, schedules: Sequence[str] | None, networks: Networks, settings: SamplerSettings
) -> Iterator[Candidate]:
    """The samplers in the table's order: the schedules asked for, or by evaluations; then each refiner beside L."""
    names = schedules or [name for n in options.evaluations for name in names_at(n)]
    for name in names:
        yield candidate(name, networks, settings, options.compile)
        if options.cfg_every > 1 and settings.guidance.scale != 1 and not is_peer(name):
            some = SamplerSettings(
                Guidance(settings.guidance.scale, settings.guidance.channels, every=options.cfg_every),
                path_type=settings.path_type,
            )
            yield candidate(name, networks, some, options.compile, f"{name} every {options.cfg_every}")
    free_rows: set[str] = set()
    for text in options.refiners:
        schedule, form, file = read_refiner(text)
        refiner = load_network(VelocityRefiner, file).to(networks.device)
        refined = Networks(networks.predictor, refiner, networks.autoencoder, networks.device, networks.path_type)
        shaped = SamplerSettings(settings.guidance, form, settings.path_type)
        free = str(Schedule.parse(schedule).without_refiner("L"))
        if free not in free_rows:
            yield candidate(free, networks, settings, options.compile)
        free_rows.add(free)
        yield candidate(schedule, refined, shaped, options.compile, f"{schedule} {form} {Path(file).stem}")


def unlike(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Them with names of their own, in their order: those of one name are numbered from the second on."""
    found: dict[str, Candidate] = {}
    for each in candidates:
        name, copies = each.name, 1
        while name in found:
            copies += 1
            name = f"{each.name} ({copies})"
        found[name] = each._replace(name=name)
    return list(found.values())


def read_refiner(text: str) -> tuple[str, str, str]:
    """(schedule, form of R, file) of "M4R1:midpoint:FILE". Raises ValueError for anything else."""
    parts = text.split(":", 2)
    if len(parts) != 3 or "R" not in parts[0].upper():
        raise ValueError(f"refiner {text!r}: expected SCHEDULE:FORM:FILE such as M4R1:midpoint:refiner.pt")
    return parts[0].upper(), parts[1], parts[2]


def candidate(
    name: str, networks: Networks, settings: SamplerSettings, compile: bool, label: str | None = None
) -> Candidate:
    """The sampler of a name: a schedule, a solver's file, or a peer such as "UniPC6"."""
    if is_peer(name):
        network = static_graph(networks.predictor) if compile else networks.predictor
        peer = PeerSampler(network, name, settings.guidance)
        return Candidate(label or name, peer.evaluations(), peer.rows(), peer.sample)
    try:
        spec = parse_sampler(name)
    except ValueError as error:
        raise ValueError(f"{error}; or a peer: {', '.join(f'{peer}6' for peer in PEERS)}") from None
    sampler = spec.build(networks.predictor, networks.refiner, settings, StaticGraphs if compile else None)
    if not isinstance(sampler, FlowTurbo):
        raise ValueError(f"{name} chooses its own evaluations: the table is of schedules")
    return Candidate(label or str(spec), sampler.evaluations(), sampler.rows(), sampler.sample)


def run(candidate: Candidate, networks: Networks, draws: Draws) -> Tensor:
    """The end points (N, C, H, W), float32 on the CPU."""
    parts = []
    for start in range(0, len(draws.numbers), TIMED):
        z, y = noise_and_labels(networks, draws, start)
        parts.append(candidate.sample(z, y).float().cpu())
    return torch.cat(parts)


def noise_and_labels(networks: Networks, draws: Draws, start: int) -> tuple[Tensor, Tensor]:
    """The noise and labels of one batch, on the device."""
    rows = slice(start, start + TIMED)
    z = keyed_noise(draws.seed, draws.numbers[rows], networks.predictor.input_shape)
    return z.to(networks.device), torch.tensor(draws.classes[rows], device=networks.device)


def time_all(candidates: Sequence[Candidate], networks: Networks, draws: Draws, repeats: int) -> Mapping[str, float]:
    """Milliseconds an image of each, in one batch; all in turn."""
    z, y = noise_and_labels(networks, draws, 0)
    calls = {c.name: (lambda c=c: c.sample(z, y)) for c in candidates}
    timings = interleave(calls, networks.device, repeats=repeats, warm_up=1, title="timing")
    return {name: 1000 * timing.median / len(z) for name, timing in timings.items()}


class Reference:
    """Images to measure the Fréchet distance of end points against."""

    def __init__(self, options: QualityOptions, networks: Networks):
        assert options.reference is not None
        self.networks = networks
        side = Side.open(options.reference)
        self.extractor = load_extractor(options.extractor, networks.device, None)
        self.features = side.features(self.extractor, (), TIMED, networks.device)

    def distance(self, points: Tensor) -> Estimate:
        """With the standard error of 50 resamples."""
        images = to_uint8(pixels(self.networks, points))
        features = extract(self.extractor, Images(images), keep={"pool"}, progress=False)
        found = dict(evaluate(self.features, features, bootstrap=50))["FID"]
        assert found.value is not None
        assert found.standard_error is not None
        return Estimate(found.value, found.standard_error)


class Images:
    """uint8 images (N, C, H, W) in memory, as a source of features."""

    path = Path("samples")

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3)."""
        for part in self.images.split(size):
            yield np.ascontiguousarray(part.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def header(with_distance: bool) -> str:
    """The names of the columns."""
    columns = f"{'sampler':<28}{'predictor':>10}{'refiner':>8}{'rows':>6}{'ms/image':>10}{'RMSE':>18}{'/ H1P':>15}"
    return columns + (f"{'FD':>17}" if with_distance else "")


def line(row: Row) -> str:
    """A row of the table."""
    rmse = f"{row.rmse.value:.4f} ± {row.rmse.standard_error:.4f}"
    against = "" if row.against is None else f"{row.against.value:.2f} ± {row.against.standard_error:.2f}"
    distance = "" if row.distance is None else f"{row.distance.value:.3f} ± {row.distance.standard_error:.3f}"
    cells = f"{row.name[:27]:<28}{row.evaluations[0]:>10}{row.evaluations[1]:>8}{sum(row.rows):>6}{row.ms:>10.3g}"
    return f"{cells}{rmse:>18}{against:>15}{distance:>17}".rstrip()
