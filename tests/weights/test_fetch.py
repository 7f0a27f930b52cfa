import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mirrors import BODY, FAST, assets, failure, get, leftovers, serve, sha, wait_for_release

from flowturbo.networks.autoencoder import ALIASES
from flowturbo.sampling.options import NetworkOptions
from flowturbo.weights import cache
from flowturbo.weights.cache import CacheUnusable, DownloadsOff, MissingWeights, locate
from flowturbo.weights.fetch import NoProgress, fetch, find
from flowturbo.weights.registry import ASSETS, Asset, RemoteFile

ROOT = Path(__file__).parents[2]


def test_a_file_arrives_once_and_is_recorded(server, capsys):
    url = server.url(serve())
    path = get(url)
    assert path == cache.cache_folder() / "weights.pt"
    assert path.read_bytes() == BODY
    assert "weights.pt: 100%" in capsys.readouterr().err
    assert leftovers() == [".weights.pt.json"]
    record = json.loads(path.with_name(".weights.pt.json").read_text())
    assert (record["sha256"], record["size"], record["url"]) == (sha(BODY), len(BODY), url)
    assert get(url) == get(url, verify=True) == path
    assert len(server.requests) == 1


def test_the_recorded_hash_is_enforced(server):
    url = server.url(serve())
    path = get(url)
    path.unlink()
    server.url(serve(BODY[::-1]))
    message = failure(url)
    assert f"expected {sha(BODY)}" in message
    record = path.with_name(".weights.pt.json")
    assert f"delete the record of the old one: {record}" in message
    record.unlink()
    assert get(url).read_bytes() == BODY[::-1]


def test_a_file_that_changed_on_disk_is_told(server):
    url = server.url(serve())
    path = get(url)
    path.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(ValueError, match=f"sha256 .*, expected {sha(BODY)}: delete it to have it downloaded again"):
        get(url)
    path.write_bytes(BODY[:-1])
    with pytest.raises(ValueError, match=r"has 239,999 bytes, expected 240,000: delete it"):
        get(url)
    path.write_bytes(BODY)
    assert get(url) == path
    swap(path, BODY[:-1] + b"?")
    with pytest.raises(ValueError, match="expected"):  # as damage on the disk would look: only hashing tells
        get(url, verify=True)
    assert len(server.requests) == 1


def swap(path, content):
    """Other content of the same size, with the times that the file had."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_swapped_content_is_not_handed_out(server):
    url = server.url(serve())
    path = get(url)
    swap(path, BODY[::-1])
    for find_it in (lambda: get(url), lambda: locate("weights", assets=assets(url))):
        with pytest.raises(ValueError, match=f"sha256 .*, expected {sha(BODY)}: delete it to have it downloaded again"):
            find_it()
    other = path.with_name("other")
    other.write_bytes(BODY)
    other.replace(path)
    assert locate("weights", assets=assets(url)) == path
    assert len(server.requests) == 1


def test_a_file_put_there_by_hand_is_taken_if_it_fits():
    path = cache.cache_folder() / "weights.pt"
    path.parent.mkdir()
    path.write_bytes(BODY)
    assert get("https://nowhere.invalid/file", sha256=sha(BODY)) == path
    assert json.loads(path.with_name(".weights.pt.json").read_text())["sha256"] == sha(BODY)
    with pytest.raises(ValueError, match="expected " + "0" * 64):
        get("https://nowhere.invalid/file", sha256="0" * 64)


@pytest.mark.parametrize("name", [None, "FLOWTURBO_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(server, monkeypatch, name):
    url = server.url(serve())
    if name:
        monkeypatch.setenv(name, "1")
    cause = rf" \({name} is set\)" if name else ""
    with pytest.raises(DownloadsOff, match=rf"^weights.pt is not in .*cache, and downloads are off{cause}$"):
        get(url, offline=name is None)
    assert not server.requests
    monkeypatch.delenv(name or "RANK", raising=False)
    path = get(url)
    assert get(url, offline=True) == path


def test_a_cache_folder_that_cannot_be_used(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheUnusable, match=r"^cannot use the cache folder '.*cache': Not a directory$"):
        get("https://nowhere.invalid/file")
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("flowturbo.system.files.fcntl.flock", lambda *_: exec("raise OSError(37, 'No locks')"))
    with pytest.raises(CacheUnusable, match=r"^cannot use the cache folder .*cannot lock '.*lock': No locks$"):
        get("https://nowhere.invalid/file")


def test_the_other_ranks_wait_for_the_file(server, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    url = server.url(serve())
    with pytest.raises(
        NoProgress, match=r"rank 1 saw no progress of .*weights.pt in 0.4 s, and rank 0 alone downloads"
    ):
        get(url)
    path = cache.cache_folder() / "weights.pt"
    path.parent.mkdir()

    def rank_0():
        for size in range(5):  # longer than a rank waits, but growing
            path.with_name(".weights.pt.part").write_bytes(bytes(size))
            time.sleep(0.15)
        path.with_name(".weights.pt.part").rename(path)

    thread = threading.Thread(target=rank_0)
    thread.start()
    assert get(url) == path
    thread.join()
    assert not server.requests


PROCESS = """
import sys
from flowturbo.weights.fetch import Terms, fetch
from flowturbo.weights.registry import Asset, RemoteFile
asset = Asset("", "", (RemoteFile("weights.pt", (sys.argv[1],)),))
print(fetch("weights", assets={"weights": asset}, terms=Terms(loopback=True)))
"""


def start(url):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, url], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for 10 s")


def test_two_processes_download_once(server):
    def slowly(handler):
        wait_for_release(handler)
        serve()(handler)

    url = server.url(slowly)
    first = start(url)
    wait_until(lambda: server.requests)
    second = start(url)
    assert "another process is downloading it; waiting" in second.stderr.readline()
    server.released.set()
    for process in (first, second):
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert Path(out.strip()).read_bytes() == BODY
    assert len(server.requests) == 1


def test_after_a_kill_only_the_rest_is_fetched(server):
    body, half = BODY * 20, 2 << 20
    url = server.url(serve(body, cut=half, then=wait_for_release), serve(body))
    process = start(url)
    part = cache.cache_folder() / ".weights.pt.part"
    wait_until(lambda: part.is_file() and part.stat().st_size >= half - (1 << 16))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    have = part.stat().st_size
    assert get(url).read_bytes() == body
    assert server.requests[1:] == [("/file", f"bytes={have}-")]


def test_several_files_of_one_name(server):
    urls = [server.url(serve(text.encode()), path=f"/{text}") for text in ("config", "weights")]
    files = tuple(RemoteFile(f"vae/{url[-6:]}", (url,)) for url in urls)
    both = {"vae": Asset("", "", files)}
    folder = fetch("vae", assets=both, terms=FAST)
    assert folder == cache.cache_folder() / "vae" == locate("vae", assets=both)
    assert sorted(path.name for path in folder.glob("[!.]*")) == sorted(url[-6:] for url in urls)
    (folder / urls[0][-6:]).unlink()
    assert locate("vae", assets=both) is None


def test_a_registered_file_is_found_by_its_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "SiT-XL-2-256x256.pt"
    assert locate(name) is None
    cached = cache.cache_folder() / name
    cached.parent.mkdir()
    cached.touch()
    assert locate(name) == locate("sit-xl-2-256") == find("sit-xl-2-256") == cached
    assert locate(f"elsewhere/{name}") is None
    Path(name).touch()
    assert locate(name) == find(name) == Path(name)
    assert locate("unknown.pt") is None


@pytest.mark.parametrize(
    ("names", "assets", "hosts"),
    [
        (["/some/where/SiT-XL-2-256x256.pt"], ["sit-xl-2-256"], ["huggingface.co"]),
        (["sd-vae-ft-ema"], ["vae-ema"], ["huggingface.co"]),
        (["mine.pt"], [], []),
        (
            ["SiT-XL-2-256x256.pt", "mine.pt", "SiT-XL-2-Refiner.pt"],
            ["sit-xl-2-256", "sit-xl-2-refiner"],
            ["huggingface.co", "cloud.tsinghua.edu.cn"],
        ),
    ],
)
def test_what_is_missing_knows_where_it_comes_from(names, assets, hosts):
    error = MissingWeights({f"option_{k}": name for k, name in enumerate(names)})
    assert (error.assets, error.hosts) == (assets, hosts)
    assert str(error) == "no such file: " + ", ".join(f"{name} (option_{k})" for k, name in enumerate(names))


def test_an_unknown_name_is_told():
    with pytest.raises(
        ValueError, match=r"nothing is called 'vae-emma': expected sit-xl-2-256, .*did you mean vae-ema"
    ):
        fetch("vae-emma")


def test_the_registry():
    for name, asset in ASSETS.items():
        assert len({str(Path(file.path).parent) for file in asset.files}) == 1, name
        for file in asset.files:
            assert file.urls
            assert all(url.startswith("https://") for url in file.urls)
            assert file.size is None or file.size > 0
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    paths = [file.path for asset in ASSETS.values() for file in asset.files]
    assert len(set(paths)) == len(paths)
    inception = ASSETS["inception"].files[0]
    assert (inception.path, inception.size) == ("weights-inception-2015-12-05-6726825d.pth", 95_628_359)
    assert inception.sha256.startswith("6726825d")
    assert inception.urls[0].endswith(f"/{inception.path}")
    for alias, repository in ALIASES.items():
        assert all(f"/{repository}/" in file.urls[0] for file in ASSETS[alias].files)


def test_what_sample_py_wants_is_registered():
    wanted = [getattr(NetworkOptions(), name) for name in ("predictor_ckpt", "refiner_ckpt", "vae_ckpt")]
    assert [cache.find_asset(name) for name in wanted] == ["sit-xl-2-256", "sit-xl-2-refiner", "vae-ema"]
