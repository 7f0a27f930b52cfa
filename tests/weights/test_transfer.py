import json
import os
import time
from collections import namedtuple
from urllib.request import Request

import pytest
from mirrors import (
    BODY,
    FAST,
    HASTY,
    chunked,
    drip,
    failure,
    failure_after_clearing,
    get,
    headers_of,
    leftovers,
    serve,
    sha,
    status,
    wait_for_release,
)

from flowturbo.weights import cache, http, transfer
from flowturbo.weights.cache import CacheUnusable, progress
from flowturbo.weights.fetch import Terms
from flowturbo.weights.http import Refusal
from flowturbo.weights.registry import ASSETS, RemoteFile


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


def test_a_body_without_a_length(server):
    assert get(server.url(chunked(BODY))).read_bytes() == BODY
    message = failure_after_clearing(server.url(chunked(BODY * 50)), size=len(BODY))
    assert "sends more than the 240,000 bytes expected" in message
    assert progress(RemoteFile("weights.pt", ()), cache.cache_folder()) in (None, 0)


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
    assert "no answer in 0.2 s (3 attempts)" in failure(server.url(wait_for_release), terms=HASTY)
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
    monkeypatch.setattr(transfer.time, "sleep", waits.append)
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
    part = cache.cache_folder() / ".weights.pt.part"
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


def test_a_disk_that_is_too_small(server, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 5, 1000)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CacheUnusable, match=r"no space for weights.pt: 240,000 bytes are missing, .* has 1,000 free$"):
        get(server.url(serve()))
    assert leftovers() == []


# ---- servers that lie


ERROR = b'{"error":"no such object"}'  # 26 bytes, with status 200
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2700000000\n"


@pytest.mark.parametrize("body", [ERROR, POINTER, BODY])
def test_a_file_of_another_size_than_expected_is_refused(server, body):
    message = failure(server.url(serve(body)), about=2_700_000_000)
    assert f"offers {len(body):,} bytes, expected about 2,700,000,000" in message
    message = failure_after_clearing(server.url(chunked(body)), about=2_700_000_000)  # known at its end
    assert f"offers {len(body):,} bytes" in message or body == POINTER
    assert leftovers() == []


@pytest.mark.parametrize(
    ("format", "good"),
    [
        ("torch", b"\x80\2" + BODY),
        ("safetensors", b"\1\2\0\0\0\0\0\0{" + BODY),
        ("json", b'\n{"act_fn": "silu"}'),
    ],
)
def test_a_file_of_another_format_is_refused(server, format, good):
    for body in (ERROR if format != "json" else b"[1]", b"not found", BODY):
        message = failure(server.url(serve(body)), format=format)
        assert f"sent no {format} file, it begins with b" in message
        assert leftovers() == []
    assert get(server.url(serve(good)), format=format).read_bytes() == good


def test_every_file_without_a_published_hash_has_a_size_and_a_format():
    for asset in ASSETS.values():
        assert all(file.sha256 or (file.about and file.format in transfer.FORMATS) for file in asset.files)


def test_a_pointer_is_not_a_file(server):
    assert "sent a pointer of git-lfs in place of the file" in failure(server.url(serve(POINTER)))
    assert len(server.requests) == 1


@pytest.mark.parametrize("encoding", ["gzip", "br", "x\x1b[2m"])
def test_a_packed_body_is_not_the_file(server, encoding):
    packed = server.url(headers_of(Content_Encoding=encoding, Content_Length="100"), path="/packed")
    assert "sent the file packed (" + encoding.replace("\x1b", r"\x1b") + ")" in failure(packed)
    assert get(packed, server.url(serve())).read_bytes() == BODY


@pytest.mark.parametrize("length", ["1000000000000000000", "9" * 4000, "-5", "abc"])
def test_an_absurd_length_does_not_end_the_search(server, length):
    absurd = server.url(headers_of(Content_Length=length), path="/absurd")
    assert get(absurd, server.url(serve())).read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["/absurd", "/file"]


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    drip(handler)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (headers_of(Content_Length="1000000"), "slower than 10,000 bytes a second (3 attempts)"),
        (headers_of(Transfer_Encoding="chunked"), "no byte for too long (3 attempts)"),
        (drip_headers, "no whole answer in 0.8 s (3 attempts)"),
    ],
)
def test_a_server_that_drips_is_given_up(server, answer, reason):
    started = time.monotonic()
    dripping = server.url(answer, path="/drip")
    assert get(dripping, server.url(serve()), terms=HASTY).read_bytes() == BODY
    assert time.monotonic() - started < 6
    assert reason in failure_after_clearing(dripping, terms=HASTY)


def test_a_slow_disk_is_no_slow_server(server, monkeypatch):
    write = transfer._write

    def slowly(blocks, *more):
        return write((block for block in blocks if time.sleep(0.3) is None), *more)

    monkeypatch.setattr(transfer, "_write", slowly)
    assert get(server.url(serve(BODY[:4000])), terms=HASTY).read_bytes() == BODY[:4000]


# ---- links that somebody has planted in a shared cache


@pytest.mark.parametrize("link", ["symbolic", "hard", "pipe"])
def test_a_planted_part_does_not_have_another_file_written_to(server, tmp_path, link):
    victim, part = tmp_path / "victim", cache.cache_folder() / ".weights.pt.part"
    part.parent.mkdir()
    victim.write_bytes(b"precious")
    if link == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to(victim) if link == "symbolic" else part.hardlink_to(victim)
    path = get(server.url(serve()))
    assert (victim.read_bytes(), path.read_bytes()) == (b"precious", BODY)
    assert not path.is_symlink()


def test_a_planted_lock_is_refused_and_its_target_kept(server, tmp_path):
    lock, victim = cache.cache_folder() / ".weights.pt.lock", tmp_path / "victim"
    lock.parent.mkdir()
    victim.write_bytes(b"precious")
    lock.symlink_to(victim)
    with pytest.raises(CacheUnusable, match=r"cannot lock '.*lock': Too many levels of symbolic links"):
        get(server.url(serve()))
    assert victim.read_bytes() == b"precious"


def test_a_planted_record_is_replaced_and_odd_ones_count_as_none(server, tmp_path):
    record, victim = cache.cache_folder() / ".weights.pt.json", tmp_path / "victim"
    record.parent.mkdir()
    victim.write_bytes(b"{}")
    record.symlink_to(victim)
    url = server.url(serve())
    path = get(url)
    assert victim.read_bytes() == b"{}"
    assert not record.is_symlink()
    for odd in ([1], "x", 1.5, True, None, {"a": 1}):
        record.write_text(json.dumps(dict.fromkeys(cache.NOTES, odd)))
        assert cache.read_notes(path).keys() <= {"sha256", "url", "mark"}
        if odd != "x":
            assert get(url) == path


# ---- redirects


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1"),
        *("fd00::1", "fe80::1", "::ffff:127.0.0.1"),
    ],
)
def test_redirects_into_private_networks_are_refused(monkeypatch, address):
    monkeypatch.setattr(http.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443))])
    redirects = http._Redirects(loopback=False)
    with pytest.raises(Refusal, match=r"^leads to mirror\.example, which is \S+, no public address$"):
        redirects.redirect_request(Request("https://a.example/"), None, 302, "", {}, "https://mirror.example/file")


def test_redirects_to_public_hosts_are_followed(monkeypatch):
    monkeypatch.setattr(http.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.215.14", 443))])
    redirects = http._Redirects(loopback=False)
    request = redirects.redirect_request(Request("https://a.example/"), None, 302, "", {}, "https://b.example/file")
    assert request.full_url == "https://b.example/file"
