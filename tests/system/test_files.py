import hashlib
import os
import threading
from contextlib import ExitStack

import pytest

from flowturbo.system import files
from flowturbo.system.files import (
    InUse,
    atomic_write,
    check_file,
    check_writable,
    exclusive,
    locked,
    remove_leftovers,
    sha256,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail():
        with atomic_write(path) as file:
            file.write(b"new")
            raise error("stop")

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("place", ["file/a.bin", "folder"])  # below a file; over a folder
def test_a_place_that_takes_no_file_is_named_before_and_after_the_work(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    message = f"^cannot write '{tmp_path / place}': "
    with pytest.raises(OSError, match=message):
        check_writable(tmp_path / place)
    with pytest.raises(OSError, match=message), atomic_write(tmp_path / place) as file:
        file.write(b"x")
    assert names(tmp_path) == ["file", "folder"]


def test_the_folder_of_an_output_is_made(tmp_path):
    check_writable(tmp_path / "a" / "b" / "c.npz")
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a" / "b") == []


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # root may write anywhere
    (tmp_path / "a.npz").touch()
    with pytest.raises(OSError, match=r"cannot write '.*a\.npz': no permission"):
        check_writable(tmp_path / "a.npz")


@pytest.mark.parametrize("place", ["/proc/a.npz", "/dev/null", "a" * 300])  # the first two also for root
def test_a_place_that_takes_no_file_is_found_by_trying(place):
    with pytest.raises(OSError, match=f"cannot write '{place}': "):
        check_writable(place)


def test_a_file_does_not_take_the_place_of_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(OSError, match=r"a\.json': it is no regular file"), atomic_write(tmp_path / "a.json"):
        pass
    assert (tmp_path / "a.json").is_fifo()
    with pytest.raises(ValueError, match=r"a\.json' is no file"):
        check_file(tmp_path / "a.json")


def test_trying_leaves_nothing(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"before")
    for name in ("a.npz", "b.npz"):
        check_writable(tmp_path / name)
    assert names(tmp_path) == ["a.npz"]
    assert (tmp_path / "a.npz").read_bytes() == b"before"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with (
        pytest.raises(OSError, match=f"cannot write '{tmp_path / 'a.pt'}': Permission denied"),
        atomic_write(tmp_path / "a.pt"),
    ):
        pass


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda _: exec("raise OSError(28, 'No space left on device')"))
    with (
        pytest.raises(OSError, match=r"^cannot write '.*a\.pt': No space left on device$"),
        atomic_write(tmp_path / "a.pt") as file,
    ):
        file.write(b"x")
    assert names(tmp_path) == []


def test_only_leftovers_are_removed(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/.x.npz.1.tmp", "a/x.tmp", ".lock", "x.npz"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "a", "x.npz", "x.tmp"]


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with exclusive(tmp_path), pytest.raises(InUse, match="is in use by another run"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_a_lock_is_waited_for_and_that_is_told_once(tmp_path):
    waits = []
    held = ExitStack()
    held.enter_context(locked(tmp_path / "lock", 0))
    threading.Timer(0.3, held.close).start()
    with locked(tmp_path / "lock", patience=20, on_wait=lambda: waits.append(1)):
        assert waits == [1]


def test_a_lock_that_cannot_be_is_told(tmp_path, monkeypatch):
    with (
        pytest.raises(OSError, match=r"^cannot lock '.*none/\.lock': No such file or directory$"),
        exclusive(tmp_path / "none"),
    ):
        pass
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: exec("raise OSError(37, 'No locks available')"))
    with pytest.raises(OSError, match=r"^cannot lock '.*\.lock': No locks available$"), exclusive(tmp_path):
        pass


@pytest.mark.parametrize("old_python", [False, True])
def test_sha256_is_that_of_the_bytes(tmp_path, monkeypatch, old_python):
    if old_python:
        monkeypatch.delattr(hashlib, "file_digest", raising=False)
    data = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
