import ast
import pickle
import re
from pathlib import Path

import pytest

from flowturbo.system.advice import ADVICE, TAKES, advice_for
from flowturbo.weights.cache import CacheUnusable, DownloadsOff, MissingWeights
from flowturbo.weights.export import OutOfRange, UploadFailed
from flowturbo.weights.fetch import DownloadFailed, NoProgress
from flowturbo.weights.registry import ASSETS

PACKAGE = Path(__file__).parents[2] / "flowturbo"
BOTH = {"predictor_ckpt": "SiT-XL-2-256x256.pt", "refiner_ckpt": "SiT-XL-2-Refiner.pt"}
CASES = [
    (
        MissingWeights(BOTH),
        "no such file: SiT-XL-2-256x256.pt (predictor_ckpt), SiT-XL-2-Refiner.pt (refiner_ckpt)",
        "get it with `python download.py sit-xl-2-256 sit-xl-2-refiner` (from huggingface.co, cloud.tsinghua.edu.cn), "
        "or pass a local path with --predictor-ckpt and --refiner-ckpt",
    ),
    (
        MissingWeights({"model_teacher_ckpt": "mine.pt"}),
        "no such file: mine.pt (model_teacher_ckpt)",
        "pass a local path with --model-teacher-ckpt",
    ),
    (
        MissingWeights({"": "/x/SiT-XL-2-256x256.pt"}, "checkpoint does not exist"),
        "checkpoint does not exist",
        "get it with `python download.py sit-xl-2-256` (from huggingface.co), or pass a local path with "
        "--predictor-ckpt FILE (train.py: --model-teacher-ckpt FILE)",
    ),
    (MissingWeights({"": "mine.pt"}), "no such file: mine.pt", ""),
    (
        DownloadsOff({"": "vae-ema"}, "downloads are off"),
        "downloads are off",
        "run `python download.py vae-ema` with a connection, or pass a local path with --vae-ckpt FOLDER",
    ),
    (
        DownloadFailed("cannot download x", "sit-xl-2-refiner", "/cache/x"),
        "cannot download x",
        "run `python download.py sit-xl-2-refiner` again later, or get it elsewhere and put it at /cache/x or pass it "
        "with --refiner-ckpt FILE",
    ),
    (NoProgress("waited", "vae-mse"), "waited", "where the nodes share no disk, run `python download.py vae-mse` on"),
    (CacheUnusable("no space"), "no space", "choose another folder with FLOWTURBO_CACHE (download.py: --cache-dir)"),
    (UploadFailed("cannot upload"), "cannot upload", "it needs a token that may write there"),
    (OutOfRange("too large"), "too large", "take --dtype bf16 or fp32"),
    (ValueError("plain"), "plain", ""),
]


@pytest.mark.parametrize(("error", "fact", "advice"), CASES, ids=lambda value: type(value).__name__)
def test_the_library_states_facts_and_scripts_add_advice(error, fact, advice):
    assert str(error) == fact
    assert advice_for(error).startswith(f"; {advice}" if advice else "")
    assert bool(advice_for(error)) == bool(advice)


@pytest.mark.parametrize("error", [case[0] for case in CASES], ids=lambda error: type(error).__name__)
def test_an_error_crosses_to_other_ranks_with_its_advice(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), advice_for(again)) == (type(error), str(error), advice_for(error))


def test_all_that_can_be_downloaded_has_a_flag():
    assert TAKES.keys() == ASSETS.keys()


def test_advice_is_for_errors_that_there_are():
    classes = {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert classes >= ADVICE.keys()


ROOMS = ("transport", "networks", "data", "evaluation", "sampling", "training", "weights", "system")
LIBRARY = [path for room in ROOMS for path in sorted((PACKAGE / room).glob("*.py")) if path.name != "advice.py"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_library_file_names_a_flag_or_a_command(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    declared = {  # further spellings of an option
        id(constant)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "flags"
        for constant in ast.walk(node.value)
    }
    found = [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | declared
        if re.search(r"(?<![\w-])--[a-z]|\bpython \S+\.py", node.value)
    ]
    assert [text for _, text in found if text != " --help)\n"] == []  # cli.py tells of --help itself
