import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import download
import pipeline
from flowturbo.evaluation.extractors import INCEPTION_SHA256, INCEPTION_URL
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import ALIASES
from flowturbo.refiner import VelocityRefiner
from flowturbo.weights import fetch as mechanism
from flowturbo.weights.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint
from flowturbo.weights.fetch import Terms, fetch, hint, locate
from flowturbo.weights.registry import ASSETS, Asset, RemoteFile

ROOT = Path(__file__).parents[2]
BODY = bytes(range(7, 247)) * 1000
FAST = Terms(stall=5, attempts=3, delay=0.01, ranks=1.0, loopback=True)
HASTY = replace(FAST, stall=0.4)


@pytest.fixture(autouse=True)
def here_alone(monkeypatch, tmp_path):
    """No test leaves the machine or touches the user's cache."""
    resolve = mechanism.socket.getaddrinfo

    def only_loopback(host, *args, **kwargs):
        assert host == "127.0.0.1"
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr("socket.getaddrinfo", only_loopback)
    for name in ("RANK", "HF_HUB_OFFLINE", "FLOWTURBO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))


class Server(ThreadingHTTPServer):
    """Answers each path with the callables listed for it, one a request, the last again and again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.released = {}, [], threading.Event()

    def url(self, *answers, path="/file"):
        self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request, client_address):
        """Clients that leave are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        answers = self.server.answers[self.path.partition("?")[0]]
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)
        self.close_connection = True

    def log_message(self, *args):
        pass


def serve(body=BODY, *, etag='"1"', ranges=True, cut=None, claim=None, kind="application/octet-stream", then=None):
    """An answer with `body`: in ranges or not, ending after `cut` bytes, with a false length `claim`."""

    def answer(handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if ranges else None
        start = int(asked[1]) if asked else 0
        length = len(body) if claim is None else claim
        if asked and start >= length:
            return status(416)(handler)
        handler.send_response(206 if asked else 200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(length - start))
        if etag:
            handler.send_header("ETag", etag)
        if asked:
            handler.send_header("Content-Range", f"bytes {start}-{length - 1}/{length}")
        handler.end_headers()
        handler.wfile.write(body[start:] if cut is None else body[start : max(start, cut)])
        handler.wfile.flush()
        if then:
            then(handler)

    return answer


def chunked(body):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(body), 50_000):
            piece = body[start : start + 50_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    return answer


def status(code, **headers):
    def answer(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def wait_for_release(handler):
    handler.server.released.wait(10)


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def sha(body):
    return hashlib.sha256(body).hexdigest()


def assets(*urls, size=None, sha256=None, path="weights.pt"):
    return {"weights": Asset("some weights", "unknown", "--weights FILE", (RemoteFile(path, urls, size, sha256),))}


def get(*urls, terms=FAST, offline=False, verify=False, **known):
    return fetch("weights", assets=assets(*urls, **known), terms=terms, offline=offline, verify=verify)


def failure(*urls, **known):
    with pytest.raises(OSError) as caught:
        get(*urls, **known)
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot download weights.pt" in message
    assert "python download.py weights" in message
    assert "--weights FILE" in message
    assert not (mechanism.cache_folder() / "weights.pt").exists()
    return message


def leftovers():
    return sorted(path.name for path in mechanism.cache_folder().glob(".*") if not path.name.endswith(".lock"))


def test_a_file_arrives_once_and_is_recorded(server, capsys):
    url = server.url(serve())
    path = get(url)
    assert path == mechanism.cache_folder() / "weights.pt"
    assert path.read_bytes() == BODY
    assert "weights.pt: 100%" in capsys.readouterr().err
    assert leftovers() == [".weights.pt.json"]
    record = json.loads(path.with_name(".weights.pt.json").read_text())
    assert (record["sha256"], record["size"], record["url"]) == (sha(BODY), len(BODY), url)
    assert get(url) == get(url, verify=True) == path
    assert len(server.requests) == 1


@pytest.mark.parametrize("known", [{}, {"size": len(BODY), "sha256": sha(BODY)}])
def test_a_cut_continues_where_it_was(server, known):
    path = get(server.url(serve(cut=100_000), serve(cut=150_000), serve()), **known)
    assert path.read_bytes() == BODY
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=150000-"]


def test_progress_gives_new_attempts(server):
    body = BODY * 30
    cuts = [serve(body, cut=(k + 1) << 20) for k in range(5)]
    assert get(server.url(*cuts, serve(body))).read_bytes() == body
    assert len(server.requests) == 6 > FAST.attempts


def test_a_length_longer_than_the_file_is_a_cut(server):
    message = failure(server.url(serve(claim=len(BODY) + 10)))
    assert "cut off after 240,000 of 240,010 bytes (3 attempts)" in message
    assert "what has arrived is kept" in message


def test_a_mirror_with_another_size_is_passed_over(server):
    wrong, right = server.url(serve(BODY + b"x"), path="/wrong"), server.url(serve(), path="/right")
    assert get(wrong, right, size=len(BODY)).read_bytes() == BODY
    assert "offers 240,001 bytes, expected 240,000" in failure_after_clearing(wrong, size=len(BODY))


def failure_after_clearing(*urls, **known):
    for path in mechanism.cache_folder().iterdir():
        path.unlink()
    return failure(*urls, **known)


def test_a_body_without_a_length(server):
    assert get(server.url(chunked(BODY))).read_bytes() == BODY
    message = failure_after_clearing(server.url(chunked(BODY * 50)), size=len(BODY))
    assert "sends more than the 240,000 bytes expected" in message
    assert mechanism.progress(RemoteFile("weights.pt", ()), mechanism.cache_folder()) in (None, 0)


def test_a_body_of_unknown_end_is_refused(server):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(BODY)

    assert "does not say how long the file is" in failure(server.url(answer))
    assert get(server.url(answer), size=len(BODY)).read_bytes() == BODY


def test_an_empty_file_is_refused(server):
    assert "cut off after 0 of 1 bytes" in failure(server.url(serve(b"")))


def test_an_archive_without_its_end_is_refused(server):
    """A mirror that lies about a length nobody knows: the file would be recorded as the right one."""
    assert "archive without its end" in failure(server.url(serve(b"PK\3\4" + BODY, claim=100_000)))


def test_a_stall_times_out_and_continues(server):
    url = server.url(serve(cut=1000, then=wait_for_release), serve())
    assert get(url, terms=HASTY).read_bytes() == BODY
    assert server.requests[1] == ("/file", "bytes=1000-")


def test_no_answer_times_out(server):
    started = time.monotonic()
    assert "no answer in 0.4 s (3 attempts)" in failure(server.url(wait_for_release), terms=HASTY)
    assert time.monotonic() - started < 5


def test_a_closed_port_is_told(server):
    url = server.url(serve())
    server.shutdown()
    server.server_close()
    assert "Connection refused" in failure(url)


@pytest.mark.parametrize(
    "answer",
    [
        serve(b"<p>sign in</p>", kind="text/html; charset=utf-8"),
        serve(b"\n <!DOCTYPE html><html>not found</html>"),
        serve(b"\xef\xbb\xbf<HTML>" + BODY),
        serve(b'<?xml version="1.0"?><Error/>'),
    ],
)
def test_a_web_page_is_not_a_file(server, answer):
    assert "sent a web page in place of the file" in failure(server.url(answer))
    assert len(server.requests) == 1


def test_mirrors_are_tried_in_order_and_each_is_told(server):
    gone, page = server.url(status(404), path="/gone"), server.url(serve(b"<html>"), path="/page")
    message = failure(gone + "?key=secret", page)
    assert f"tried {gone}: HTTP 404 Not Found; {page}: sent a web page" in message
    assert "secret" not in message
    good = server.url(serve(), path="/good")
    server.requests.clear()
    assert get(gone, good, page).read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["/gone", "/good"]


def test_what_one_mirror_left_is_not_continued_from_another(server):
    first = server.url(serve(cut=5000), path="/first")
    second = server.url(serve(BODY[::-1]), path="/second")
    assert get(first, second).read_bytes() == BODY[::-1]
    assert server.requests[-1] == ("/second", None)


@pytest.mark.parametrize("code", [500, 503, 429])
def test_passing_troubles_are_waited_out(server, code):
    assert get(server.url(status(code), status(code), serve())).read_bytes() == BODY
    assert f"HTTP {code}" in failure_after_clearing(server.url(status(code)))


def test_back_off_doubles(server, monkeypatch):
    waits = []
    monkeypatch.setattr(mechanism.time, "sleep", waits.append)
    with pytest.raises(OSError, match="HTTP 500"):
        get(server.url(status(500)), terms=Terms(attempts=8, delay=1.0, loopback=True))
    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_a_server_that_ignores_ranges_starts_over(server):
    assert get(server.url(serve(cut=100_000), serve(ranges=False))).read_bytes() == BODY
    assert server.requests[1] == ("/file", "bytes=100000-")


@pytest.mark.parametrize("etag", ['"2"', None])
def test_a_file_that_changed_starts_over(server, etag):
    new = BODY[::-1] if etag else BODY[::-1] + b"longer"
    old = '"1"' if etag else None
    assert get(server.url(serve(etag=old, cut=100_000), serve(new, etag=etag))).read_bytes() == new
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", None]


def test_a_file_that_shrank_starts_over(server):
    new = BODY[:5000]
    assert get(server.url(serve(cut=100_000), serve(new))).read_bytes() == new
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", None]


def test_another_file_of_the_same_size_is_refused(server):
    other = server.url(serve(BODY[::-1]), path="/other")
    message = failure(other, size=len(BODY), sha256=sha(BODY))
    assert f"sent a file of sha256 {sha(BODY[::-1])}, expected {sha(BODY)}" in message
    assert len(server.requests) == 1
    assert ".weights.pt.part" not in leftovers()
    assert get(other, server.url(serve()), sha256=sha(BODY)).read_bytes() == BODY


def test_a_bad_remainder_of_an_earlier_run_is_dropped_once(server):
    url = server.url(serve(cut=100_000))
    failure(url, sha256=sha(BODY))
    part = mechanism.cache_folder() / ".weights.pt.part"
    part.write_bytes(bytes(100_000))
    assert get(server.url(serve()), sha256=sha(BODY)).read_bytes() == BODY


def test_only_https(server):
    url = server.url(serve())
    message = failure(url, terms=Terms())
    assert "leads to http://127.0.0.1, which is not https" in message
    assert not server.requests
    away = server.url(status(302, Location="http://example.com/file"), path="/away")
    assert "leads to http://example.com, which is not https" in failure(away)
    assert "leads to ftp://127.0.0.1" in failure(server.url(status(302, Location="ftp://127.0.0.1/x"), path="/ftp"))
    assert get(server.url(status(302, Location=url), path="/moved")).read_bytes() == BODY


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
    stamp = path.stat()
    path.write_bytes(BODY[:-1] + b"?")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(ValueError, match="expected"):  # as damage on the disk would look: only hashing tells
        get(url, verify=True)
    assert len(server.requests) == 1


def test_a_file_put_there_by_hand_is_taken_if_it_fits():
    path = mechanism.cache_folder() / "weights.pt"
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
    with pytest.raises(ValueError, match=r"downloads are off .*python download.py weights.*--weights FILE"):
        get(url, offline=name is None)
    assert not server.requests
    monkeypatch.delenv(name or "RANK", raising=False)
    path = get(url)
    assert get(url, offline=True) == path


def test_a_disk_that_is_too_small(server, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 5, 1000)
    monkeypatch.setattr(mechanism.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        OSError, match=r"no space for weights.pt: 240,000 bytes are missing, .* has 1,000 free.*--cache"
    ):
        get(server.url(serve()))
    assert leftovers() == []


def test_a_cache_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot make the cache folder .*--cache-dir or FLOWTURBO_CACHE"):
        get("https://nowhere.invalid/file")


def test_the_other_ranks_wait_for_the_file(server, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    url = server.url(serve())
    with pytest.raises(OSError, match=r"rank 1 saw no progress of .*weights.pt in 1 s, and rank 0 alone downloads"):
        get(url)
    path = mechanism.cache_folder() / "weights.pt"
    path.parent.mkdir()

    def rank_0():
        for size in range(5):  # longer than a rank waits, but growing
            path.with_name(".weights.pt.part").write_bytes(bytes(size))
            time.sleep(0.3)
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
asset = Asset("", "", "--weights FILE", (RemoteFile("weights.pt", (sys.argv[1],)),))
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
    part = mechanism.cache_folder() / ".weights.pt.part"
    wait_until(lambda: part.is_file() and part.stat().st_size >= half - (1 << 16))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    have = part.stat().st_size
    assert get(url).read_bytes() == body
    assert server.requests[1:] == [("/file", f"bytes={have}-")]


def test_several_files_of_one_name(server):
    urls = [server.url(serve(text.encode()), path=f"/{text}") for text in ("config", "weights")]
    files = tuple(RemoteFile(f"vae/{url[-6:]}", (url,)) for url in urls)
    both = {"vae": Asset("", "", "--vae-ckpt FOLDER", files)}
    folder = fetch("vae", assets=both, terms=FAST)
    assert folder == mechanism.cache_folder() / "vae" == locate("vae", assets=both)
    assert sorted(path.name for path in folder.glob("[!.]*")) == sorted(url[-6:] for url in urls)
    (folder / urls[0][-6:]).unlink()
    assert locate("vae", assets=both) is None


def test_locate_and_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "SiT-XL-2-256x256.pt"
    assert locate(name) is None
    cached = mechanism.cache_folder() / name
    cached.parent.mkdir()
    cached.touch()
    assert locate(name) == locate("sit-xl-2-256") == cached
    assert locate(f"elsewhere/{name}") is None
    Path(name).touch()
    assert locate(name) == Path(name)
    assert locate("unknown.pt") is None
    assert hint(name) == hint(f"/some/where/{name}") == "`python download.py sit-xl-2-256` (from huggingface.co)"
    assert hint("vae-ema") == hint("sd-vae-ft-ema") == "`python download.py vae-ema` (from huggingface.co)"
    both = hint(name, "mine.pt", "SiT-XL-2-Refiner.pt")
    assert both.startswith("`python download.py sit-xl-2-256 sit-xl-2-refiner` (from huggingface.co, cloud.")
    assert hint("mine.pt") is None


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
    assert (inception.urls, inception.sha256) == ((INCEPTION_URL,), INCEPTION_SHA256)
    assert inception.path == INCEPTION_URL.rsplit("/", 1)[1]
    for alias, repository in ALIASES.items():
        assert all(f"/{repository}/" in file.urls[0] for file in ASSETS[alias].files)


def test_what_sample_py_wants_is_registered():
    parser = download.cli.new_parser("")
    pipeline.add_network_flags(parser)
    wanted = [parser.get_default(name) for name in ("predictor_ckpt", "refiner_ckpt", "vae_ckpt")]
    assert [mechanism.find_asset(name) for name in wanted] == ["sit-xl-2-256", "sit-xl-2-refiner", "vae-ema"]


def test_the_list(tmp_path, capsys):
    cache = tmp_path / "elsewhere"
    cache.mkdir()
    (cache / "SiT-XL-2-256x256.pt").write_bytes(bytes(2_700_000))
    (cache / ".VIRTUAL_imagenet256_labeled.npz.part").write_bytes(bytes(12_345))
    download.main(["--cache_dir", str(cache)])
    text = capsys.readouterr().out
    assert str(cache) in text
    assert re.search(r"^sit-xl-2-256 +2\.7 MB +here$", text, re.MULTILINE)
    assert re.search(r"^sit-xl-2-refiner +about 119\.0 MB +not here$", text, re.MULTILINE)
    assert re.search(r"^adm-imagenet-256 +2\.04 GB +incomplete, 0\.0 MB so far$", text, re.MULTILINE)
    assert re.search(r"^inception +95\.6 MB +not here$", text, re.MULTILINE)
    for asset in ASSETS.values():
        assert f"{asset.path}; licence: {asset.licence}" in text
    for source in ("huggingface.co/nyu-visionx", "www.dl.dropboxusercontent.com", "cloud.tsinghua.edu.cn"):
        assert source in text


def test_the_script_downloads_what_it_can(tmp_path, capsys):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "SiT-XL-2-256x256.pt").write_bytes(BODY)
    download.main(["sit-xl-2-256", "--offline"])
    assert capsys.readouterr().out == f"sit-xl-2-256: {cache / 'SiT-XL-2-256x256.pt'}\n"
    with pytest.raises(ValueError, match=r"5 of 6 not downloaded: sit-xl-2-refiner, vae-ema, "):
        download.main(["all", "--offline"])
    output = capsys.readouterr()
    assert output.out.startswith("sit-xl-2-256: ")
    assert output.err.count("downloads are off") == 5


def test_the_command_line_fails_in_one_line(tmp_path):
    environment = {**os.environ, "FLOWTURBO_OFFLINE": "1"}
    command = [sys.executable, "download.py", "SiT-XL-2-Refiner.pt", "--cache-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("download.py: error: SiT-XL-2-Refiner.pt is not in ")
    assert "--refiner-ckpt FILE" in result.stderr


@pytest.fixture
def run(refiner, predictor, tmp_path):
    """A run's folder as train.py leaves it, with two checkpoints of a refiner."""
    folder = tmp_path / "results" / "000-refiner-[a]"
    config = {
        "model": pipeline.model_config(refiner),
        "training": {"data_path": "/home/someone/photos", "lr": 5e-5, "vae_ckpt": "vae-ema", "note": None}
        | {"model_teacher_ckpt": "/home/someone/teacher.pt"},
    }
    for step in (5, 40):
        content = {"model": predictor.state_dict(), "ema": refiner.state_dict(), "opt": {}, "step": step}
        path = folder / "checkpoints" / f"{step:07d}.pt"
        CheckpointFolder(path.parent).record(path, save_checkpoint(path, {**content, "config": config}))
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_export_loads_as_it_is(run, refiner, tmp_path, batch, suffix, capsys):
    out = tmp_path / "new" / f"mine{suffix}"
    download.main(["export", str(run), "-o", str(out)])
    assert str(out) in capsys.readouterr().out
    loaded = pipeline.load_network(VelocityRefiner, str(out))
    assert loaded.config == refiner.config
    x, y = batch(3)
    t = torch.full((3,), 0.5)
    assert torch.equal(loaded(x, t, -x, y), refiner(x, t, -x, y))
    content = load_checkpoint(out)
    assert content.keys() == {"ema", "config"}
    assert content["config"]["step"] == 40
    assert content["config"]["training"]["data_path"] == "photos"
    assert b"someone" not in out.read_bytes()
    with pytest.raises(ValueError, match="holds a VelocityRefiner, expected a SiT"):
        pipeline.load_network(SiT, str(out))
    again = tmp_path / "again.safetensors"  # an export can be exported
    download.main(["export", str(out), "-o", str(again)])
    assert load_checkpoint(again)["config"] == content["config"]


def test_a_model_card(run, tmp_path):
    out = tmp_path / "mine.safetensors"
    download.main(["export", str(run / "checkpoints" / "0000005.pt"), "-o", str(out), "--dtype", "fp16"])
    text = out.with_suffix(".md").read_text()
    assert "FlowTurbo velocity refiner: averaged (EMA) weights after 5 steps, float16" in text
    assert "--predictor-ckpt PREDICTOR --refiner-ckpt mine.safetensors --schedule H1P5R3 --vae-ckpt vae-ema" in text
    assert sha(out.read_bytes()) in text
    assert "| hidden_size | 32 |" in text
    assert "| lr | 5e-05 |" in text
    assert "someone" not in text
    assert "| note |" not in text
    weights = load_checkpoint(out)["ema"]
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_a_predictor_is_exported_too(predictor, tmp_path):
    config = {"model": pipeline.model_config(predictor), "training": {}}
    save_checkpoint(tmp_path / "run.pt", {"ema": predictor.state_dict(), "step": 7, "config": config})
    download.main(["export", str(tmp_path / "run.pt"), "-o", str(tmp_path / "p.safetensors")])
    assert pipeline.load_network(SiT, str(tmp_path / "p.safetensors")).config == predictor.config
    assert "python sample.py --predictor-ckpt p.safetensors --schedule H8" in (tmp_path / "p.md").read_text()


def test_what_cannot_be_exported(run, refiner, tmp_path):
    newest = run / "checkpoints" / "0000040.pt"
    cases = {
        "must end in .safetensors or .pt": [run, tmp_path / "refiner.bin"],
        "has no checkpoint; expected": [tmp_path, tmp_path / "x.pt"],
        "does not exist": [tmp_path / "nothing", tmp_path / "x.pt"],
        "holds no config": [tmp_path / "plain.pt", tmp_path / "x.pt"],
        "leave the range of torch.float16: take --dtype bf16 or fp32": [
            tmp_path / "huge.pt",
            tmp_path / "x.pt",
            "--dtype",
            "fp16",
        ],
    }
    save_checkpoint(tmp_path / "plain.pt", refiner.state_dict())
    content = load_checkpoint(newest)
    huge = {name: value * 1e6 for name, value in content["ema"].items()}
    save_checkpoint(tmp_path / "huge.pt", {**content, "ema": huge})
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            download.main(["export", str(arguments[0]), "-o", *map(str, arguments[1:])])
        assert not (tmp_path / "x.pt").exists(), message


class Hub:
    """What stands in for huggingface_hub.HfApi."""

    calls = ()

    def create_repo(self, repository, private, exist_ok):
        Hub.calls = [("create", repository, private, exist_ok)]

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        Hub.calls.append((Path(path_or_fileobj).name, path_in_repo, repo_id))


def test_push_to_hub(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    out = tmp_path / "mine.safetensors"
    download.main(["export", str(run), "-o", str(out), "--push-to-hub", "me/mine", "--private"])
    assert Hub.calls == [
        ("create", "me/mine", True, True),
        ("mine.safetensors", "mine.safetensors", "me/mine"),
        ("mine.md", "README.md", "me/mine"),
    ]
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out

    def refuse(*args, **kwargs):
        raise RuntimeError("401\nunauthorized")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"cannot upload .*401 unauthorized; it needs a token"):
        download.main(["export", str(run), "-o", str(out), "--push-to-hub", "me/mine"])
    with pytest.raises(ValueError, match="must be OWNER/NAME"):
        download.main(["export", str(run), "-o", str(out), "--push-to-hub", "mine"])


def test_find_model(run, refiner):
    """As the original's: weights by the name of a public file, or of a local one."""
    weights = download.find_model(run / "checkpoints" / "0000040.pt")
    assert all(torch.equal(weights[name], value) for name, value in refiner.state_dict().items())
    cached = mechanism.cache_folder() / "SiT-XL-2-Refiner.pt"
    save_checkpoint(cached, {"model": {}, "ema": refiner.state_dict()})
    assert download.find_model("SiT-XL-2-Refiner.pt").keys() == weights.keys()
    with pytest.raises(ValueError, match=r"nothing is called 'nothing\.pt'"):
        download.find_model("nothing.pt")


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"]])
def test_help_teaches(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        download.main(arguments)
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "python download.py export" in text
    assert "cache" in text or "--push-to-hub" in text
