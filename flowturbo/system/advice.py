"""What scripts add to errors of the library: the flags and commands that help.

The library states facts, since it also serves notebooks and web pages. The names are those of its error classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowturbo.system.options import flag_of


def advice_for(error: Exception) -> str:
    """What helps against an error, to be put behind its message; empty where nothing is known."""
    names = [kind.__name__ for kind in type(error).__mro__]
    found = next((ADVICE[name] for name in names if name in ADVICE), "")
    text = found if isinstance(found, str) else found(error)
    return f"; {text}" if text else ""


# How scripts take a local file in place of what can be downloaded, by registered names.
TAKES = {
    "sit-xl-2-256": "--predictor-ckpt FILE (train.py: --model-teacher-ckpt FILE)",
    "sit-xl-2-refiner": "--refiner-ckpt FILE",
    "vae-ema": "--vae-ckpt FOLDER",
    "vae-mse": "--vae-ckpt FOLDER",
    "inception": "evaluator.py's --weights FILE",
    "adm-imagenet-256": "evaluator.py's first argument",
}


def _get_weights(error: Any) -> str:
    """For MissingWeights: `fields` are the options that named the files, `assets` what can be downloaded."""
    ways = []
    if error.assets:
        ways.append(f"get it with `python download.py {' '.join(error.assets)}` (from {', '.join(error.hosts)})")
    if error.fields:
        ways.append("pass a local path with " + " and ".join(map(flag_of, error.fields)))
    elif error.assets:
        ways.append("pass a local path with " + " and ".join(TAKES[asset] for asset in error.assets))
    if error.assets and "predictor_ckpt" in error.fields:
        ways.append("take --model colour, which comes with the package")
    elif error.fields == ["refiner_ckpt"]:
        ways.append("sample without one, by a schedule that has no R, such as M7")
    return ", or ".join(ways)


def _get_online(error: Any) -> str:
    """For DownloadsOff."""
    return "; ".join(
        f"run `python download.py {asset}` with a connection, or pass a local path with {TAKES[asset]}"
        for asset in error.assets
    )


def _get_later(error: Any) -> str:
    """For DownloadFailed: `asset` is the registered name, `place` where the file belongs."""
    again = f"run `python download.py {error.asset}` again later, or get it elsewhere and put it at {error.place}"
    return again + (f" or pass it with {TAKES[error.asset]}" if error.asset in TAKES else "")


def _get_before(error: Any) -> str:
    """For NoProgress: `asset` is the registered name."""
    return f"where the nodes share no disk, run `python download.py {error.asset}` on each before"


def _get_extractor_weights(error: Any) -> str:
    """For MissingExtractorWeights: `asset` is what can be downloaded, if anything."""
    download = f"run `python download.py {error.asset}`, or " if error.asset else ""
    return f"{download}name a local file with --weights (sample_ddp_feature.py: --features-weights)"


def _keep_loading(error: Any) -> str:
    """For LoaderFailed: `cause` is why."""
    return {
        "descriptors": "allow more with `ulimit -n 65536`, or lower --num-workers",
        "shared memory": "enlarge it (docker: --shm-size 8g), or lower --num-workers; 0 needs none",
        "killed": "lower --num-workers",
        "waiting": "see whether the disk of --data-path answers",
    }.get(error.cause, "")


ADVICE: dict[str, str | Callable[[Any], str]] = {
    "MissingWeights": _get_weights,
    "DownloadsOff": _get_online,
    "DownloadFailed": _get_later,
    "NoProgress": _get_before,
    "CacheUnusable": "choose another folder with FLOWTURBO_CACHE (download.py: --cache-dir)",
    "UploadFailed": "it needs a token that may write there (`hf auth login`, or HF_TOKEN)",
    "NotFinite": "take --precision fp32; where it was, the weights are none to sample from",
    "OutOfRange": "take --dtype bf16 or fp32",
    "GradioMissing": 'the extra web brings it: `pip install ".[web]"` in the repository, or `pip install gradio`',
    "CannotCompile": "go on without --compile",
    "MissingExtractorWeights": _get_extractor_weights,
    "OtherLatents": "make latents for these settings with `python cache_latents.py SRC DST`, in another folder",
    "MissingReader": "install it with `pip install 'flowturbo[shards]'`",
    "UnevenImages": "--image-size N crops them",
    "UnfinishedLatents": "run `python cache_latents.py SRC DST` again",
    "UnknownClasses": (
        'say which they are with --class-map (JSON like {"my_folder": 281}), or train a predictor on this folder first '
        "(--target predictor)"
    ),
    "Diverged": "lower --lr, set --clip-grad or --warmup, or take --precision fp32",
    "OtherSettings": "take another --tag, or remove what is there",
    "LoaderFailed": _keep_loading,
    "TrainedOtherwise": "--allow-changes goes on all the same",
}
