import gc
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._dynamo

import benchmark
from benchmarks import sampling, startup, variants
from benchmarks.measure import Timing, flops, interleave
from benchmarks.options import BenchmarkOptions, plan_of
from benchmarks.published import PlainSiT, ReleasedStyle
from benchmarks.report import Row, headline, plot, ratios, tables
from benchmarks.sampling import evaluation_seconds
from benchmarks.variants import FLOAT32, Error, variants_of
from benchmarks.work import Work, duration
from flowturbo.models import SIT_CONFIGS, SiT
from flowturbo.networks.precision import has_bf16, pick_precision
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.solvers import LearnedSolver, parse_schedule, write_solver
from flowturbo.transport import FlowTurbo, Schedule
from flowturbo.transport.solver import Solver

TINY = ["--model", "SiT-S/4", "--depth", "1", "--image-size", "64", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def no_graphs_left():
    """Graphs keep their networks, and these are large."""
    yield
    torch._dynamo.reset()


def row(variant, schedule, ms, **changes):
    values = {
        **{
            "batch_size": 8,
            "decode": True,
            "p10": ms,
            "p90": ms,
            "rounds": 3,
            "tflops": 1.0,
            "of_peak": 0.5,
            "of_kernels": 0.5,
        },
        **{"predictor_ms": ms / 2, "refiner_ms": ms / 8, "decode_ms": ms / 8, "memory": 1, "first_call": 1.0},
        **{"error": Error(0.0, 0.0), **changes},
    }
    return Row(variant=variant, schedule=schedule, ms=ms, **values)


def test_the_published_way_gives_the_same_latents(predictor, refiner, batch):
    """It is a baseline only if it computes the same; by the released code's own steps, with a doubled state."""
    z, y = batch(3)
    ours = FlowTurbo(predictor, refiner, "H1P2R2", 1.5).sample(z, y)
    for networks in ((predictor, refiner), (PlainSiT(predictor), PlainSiT(refiner))):
        released = ReleasedStyle(*networks, Schedule.parse("H1P2R2"), 1.5, torch.float32).sample(z, y)
        torch.testing.assert_close(released, ours, atol=1e-5, rtol=1e-5)


def test_a_solver_is_timed_as_a_schedule_is(predictor, batch, tmp_path):
    solver, path = Solver.of("A3"), str(tmp_path / "three.json")
    write_solver(path, LearnedSolver("three", solver.grid, solver.coefficients))
    assert plan_of(BenchmarkOptions(schedules=(path, "h2"), device="cpu")).schedules == (path, "H2")
    z, y = batch(2)
    released = ReleasedStyle(predictor, predictor, parse_schedule(path), 1.5, torch.float32).sample(z, y)
    torch.testing.assert_close(released, FlowTurbo(predictor, None, "A3", 1.5).sample(z, y), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="dopri5 is no schedule"):
        BenchmarkOptions(schedules=("dopri5",))


def test_work_of_one_image():
    """SiT-XL/2 237.2 GFLOP a row, the refiner 8.5, decoding an image 622; H1P5R3 with decode 4.05 TFLOP an image."""
    with torch.device("meta"):
        networks = variants.Networks.__new__(variants.Networks)
        networks.predictor = SiT(**SIT_CONFIGS["SiT-XL/2"])
        networks.refiner = VelocityRefiner(**{**SIT_CONFIGS["SiT-XL/2"], "depth": 1})
    work = Work.of(networks)
    assert [round(n / 1e9, 1) for n in (work.predictor, work.refiner, work.decode)] == [237.2, 8.5, 622.2]
    assert round(work.per_image("H1P5R3", 1.5, True) / 1e12, 2) == 4.05
    assert round(work.per_image("H8", 1.5, True) / 1e12, 2) == 8.21
    assert work.per_image("H8", 1.0, False) == 16 * work.predictor


def test_flops_of_a_product():
    assert flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


def test_ratios_compare_like_with_like():
    rows = [
        row("FlowTurbo", "H8", 90.0),
        row("FlowTurbo", "H2P4R2", 60.0),
        row("FlowTurbo compiled", "H8", 50.0),
        row("FlowTurbo compiled", "H2P4R2", 30.0),
        row("released compiled", "H2P4R2", 45.0),
        row("FlowTurbo", "H8", 1.0, batch_size=1),
    ]
    assert ratios(rows[1], rows) == {"heun": 1.5}
    slow = row(FLOAT32, "H2P4R2", 120.0)
    assert ratios(rows[1], [*rows, slow]) == {"heun": 1.5, "float32": 2.0}
    assert ratios(slow, [*rows, slow]) == {}
    assert headline(rows) == "H2P4R2: against the released code in the same precision 1.50 times its compiled speed"
    assert max(map(len, tables([*rows, slow]).splitlines())) <= 120
    assert ratios(rows[3], rows) == {"heun": 50 / 30, "mixed": 3.0, "released": 1.5}
    assert ratios(rows[0], rows) == {}


def test_quantiles_of_a_timing():
    timing = Timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.median, timing.quantile(0.1), timing.quantile(0.9)) == (3.0, 1.0, 5.0)


def test_an_evaluation_lost_in_the_noise_has_no_time():
    few, many = Timing([1.0, 1.0, 1.0]), Timing([1.4, 1.6, 1.5])
    assert evaluation_seconds("predictor", few, many) == pytest.approx(0.5 / 4)
    assert evaluation_seconds("refiner", few, many) == pytest.approx(0.5 / 6)
    assert evaluation_seconds("predictor", few, Timing([1.4, 0.9, 1.5])) is None
    assert " - " in tables([row("FlowTurbo", "H8", 90.0, predictor_ms=None)])


def test_garbage_is_collected_between_the_rounds_alone():
    seen = []
    told = interleave(
        {"a": lambda: seen.append(gc.isenabled())}, torch.device("cpu"), repeats=2, warm_up=1, on_round=len
    )
    assert seen == [False] * 3
    assert len(told["a"].seconds) == 2
    assert gc.isenabled()


def test_durations():
    assert [duration(s) for s in (0.2, 99, 101, 7000)] == ["1 s", "99 s", "2 min", "1.9 h"]


def test_the_papers_figures_stand_beside_its_own_model_alone():
    small = BenchmarkOptions(device="cpu")
    assert not plan_of(small).is_papers  # three blocks
    assert plan_of(replace(small, depth=28)).is_papers
    assert not plan_of(replace(small, depth=28, image_size=512)).is_papers
    assert not plan_of(BenchmarkOptions(device="cpu", model="SiT-B/2", depth=12)).is_papers
    assert plan_of(small).dtype == pick_precision("auto", torch.device("cpu"))  # as sample.py takes it


def test_the_plot_has_bars_as_long_as_the_times():
    picture = plot([row("FlowTurbo", "H8", 40.0), row("FlowTurbo compiled", "H8", 10.0)])
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(picture.height, picture.width, 3)

    def longest(color):
        wanted = torch.tensor(tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)), dtype=torch.uint8)
        return int((pixels[66:140] == wanted).all(-1).sum(1).max())

    assert longest("#f3c19a") == pytest.approx(4 * longest("#d9661f"), rel=0.02)


NO_BF16 = pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this CPU emulates bfloat16, 100 times slower")


@pytest.mark.parametrize(
    ("precision", "generated"),
    [
        ("fp32", False),
        pytest.param("bf16", False, marks=NO_BF16),
        pytest.param("fp32", True, marks=pytest.mark.slow),
    ],
)
def test_the_table_of_schedules(tmp_path, capsys, precision, generated, request):
    """With generated code too, in the slow tests."""
    if not generated:
        request.getfixturevalue("quick_compiler")
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    flags = ["--schedules", "H2", "H1R1", "--batch-sizes", "2", "--no-decode", "--precision", precision]
    benchmark.main([*TINY, *flags, "--json", str(out), "--plot", str(picture)])
    told = json.loads(out.read_text())
    rows, names = told["rows"], variants_of(plan_of(BenchmarkOptions(device="cpu", precision=precision)))
    assert told["complete"] is True
    assert [(r["variant"], r["schedule"]) for r in rows] == [(v, s) for v in names for s in ("H2", "H1R1")]
    assert all(r["rounds"] == 2 for r in rows)
    assert picture.stat().st_size > 0
    bound = 1e-5 if precision == "fp32" else 1e-2
    assert all(r["error"]["rms"] <= bound for r in rows)
    if precision == "bf16":  # half precision is really in use, and blocks alone in half err less than autocast
        error = {r["variant"]: r["error"]["rms"] for r in rows if r["schedule"] == "H2"}
        assert 0 < error["FlowTurbo"] < error["released"] / 2
        assert 0 < error["FlowTurbo compiled"] < error["released compiled"] / 2
    assert all(r["p10"] <= r["ms"] <= r["p90"] and r["tflops"] > 0 for r in rows)
    assert all(r["of_kernels"] > 0 for r in rows if r["variant"] != FLOAT32)
    printed = capsys.readouterr().out
    assert printed.count("matrix products here: float32") == 2  # at the top, and with the table
    assert "not a fair ratio" in printed
    assert "acceleration in %" not in printed  # this is no model of the paper's
    assert printed.index("H2       first call") < printed.index("x Heun")  # rows as they come
    assert max(map(len, printed.splitlines())) <= 120


def test_an_interrupted_measurement_leaves_what_it_has(tmp_path, monkeypatch, quick_compiler):
    out, run = tmp_path / "bench.json", sampling.interleave

    def stopped(calls, **rounds):
        def on_round(timings):
            rounds["on_round"](timings)
            raise KeyboardInterrupt

        return run(calls, **{**rounds, "on_round": on_round})

    monkeypatch.setattr(sampling, "interleave", stopped)
    flags = ["--schedules", "H1", "--no-decode", "--precision", "fp32", "--json", str(out)]
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*TINY, *flags])
    told = json.loads(out.read_text())
    assert told["complete"] is False
    assert [(r["variant"], r["rounds"]) for r in told["rows"]] == [
        (v, 1) for v in ("released", "FlowTurbo", "released compiled", "FlowTurbo compiled")
    ]
    assert all(r["ms"] > 0 and r["first_call"] > 0 for r in told["rows"])


def test_without_a_compiler_the_eager_rows_are_measured(tmp_path, monkeypatch, capsys):
    def no_compiler(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    out = tmp_path / "bench.json"
    flags = ["--schedules", "H1", "--no-decode", "--precision", "fp32", "--json", str(out)]
    benchmark.main([*TINY, *flags])
    told = json.loads(out.read_text())
    assert told["complete"]
    assert [r["variant"] for r in told["rows"]] == ["released", "FlowTurbo"]
    printed = capsys.readouterr().out
    for variant in ("released compiled", "FlowTurbo compiled"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{variant}: left out: this machine")]
        assert line.endswith("No working C++ compiler found")


@pytest.fixture
def quick_compiler(monkeypatch):
    """Graphs are captured, but no code is generated for them: that takes most of the time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_the_ablation_goes_one_step_at_a_time(tmp_path, quick_compiler):
    out = tmp_path / "ablation.json"
    flags = ["--ablate", "--schedules", "H1R1", "--batch-sizes", "1", "--no-decode", "--precision", "fp32"]
    benchmark.main([*TINY, *flags, "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [r["change"] for r in rows][:3] == [
        "released code, float32",
        "released code, compiled network by network",
        "state not doubled",
    ]
    assert "blocks compiled, one for all: --compile" in [r["change"] for r in rows]
    assert rows[-1]["ratio"] == pytest.approx(rows[0]["ms"] / rows[-1]["ms"])
    assert all(r["error"]["rms"] < 1e-5 for r in rows if "int8" not in r["change"])


def test_the_training_benchmark_compares_like_with_like(tmp_path, capsys, quick_compiler):
    out = tmp_path / "train.json"
    benchmark.main(["--train", *TINY, "--precision", "fp32", "--json", str(out)])
    *rows, encode, teacher, refiner, rest = json.loads(out.read_text())["rows"]
    assert [r["variant"] for r in rows[1:3]] == ["train.py, online encoding", "train.py, cached latents"]
    assert rows[1]["error"] < 1e-4  # the same step; the moments in the cache are in half precision
    assert all(r["loss"] > 0 and r["error"] < 1e-3 for r in rows)
    assert rows[2]["ratio"] == pytest.approx(rows[0]["seconds"] / rows[2]["seconds"])
    assert min(part["seconds"] for part in (encode, teacher, refiner)) > 0
    assert rest["part"] == "optimizer, EMA and the rest"
    assert "SiT-S/4 with 1 blocks" in capsys.readouterr().out


@pytest.mark.slow
def test_ways_to_sum_gradients_are_compared_over_ranks(tmp_path, capfd):
    out = tmp_path / "ranks.json"
    benchmark.main(["--train", "--ranks", "2", *TINY, "--precision", "fp32", "--json", str(out)])
    rows = {row["way"].split(":")[0]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 4
    assert rows["DistributedDataParallel"]["ratio"] == 1
    assert rows["train.py"]["resumes"]
    assert all(row["difference"] == 0 and row["memory"] > 0 for row in rows.values())
    assert "train.py: buckets while the backward pass runs" in capfd.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--ranks", "2"],
        ["--train", "--ranks", "0"],
        ["--repeats", "0"],
        ["--image-size", "100"],
        ["--schedules", "R3"],
        ["--train", "--ablate"],
        ["--plot", "x.jpg"],
        ["--train", "--plot", "x.png"],
        ["--cfg-scale", "-1"],
        ["--cfg-scale", "1"],
        ["--train", "--schedules", "H8"],
    ],
)
def test_bad_flags_are_refused(flags):
    with pytest.raises(ValueError):
        benchmark.main(flags)


def test_the_startup_table_covers_every_script(monkeypatch, capsys):
    monkeypatch.setattr(startup, "cpu_seconds", lambda arguments: 4.0 if "import torch" in arguments else 1.0)
    kept = []
    rows = {row.command: row.ratio for row in startup.measure(lambda rows: kept.append(len(rows)))}
    assert kept == list(range(1, len(rows) + 1))
    assert rows.pop("import torch") == 1.0
    assert {"sample.py --help", "train.py --help", "import flowturbo.models"} <= rows.keys()
    assert set(rows.values()) == {0.25}
    assert "sample.py --help" in capsys.readouterr().out
