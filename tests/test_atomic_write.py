"""A file is written whole or not at all, whenever the process dies."""

import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest

from spre_fx.atomic_write import write_atomically

KILLED = -signal.SIGKILL


def run(code: str, path: object) -> subprocess.Popen[bytes]:
    header = "import os, signal\nfrom spre_fx.atomic_write import write_atomically\n"
    return subprocess.Popen([sys.executable, "-c", header + code, str(path)])


def test_new_content_in_place_of_old(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"one")
    write_atomically(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "theirs").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "theirs")}
    assert len(modes) == 1


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "file", b"")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_before_the_end_the_old_file_stands(call, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    die = f"os.{call} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
    process = run(
        f"import sys\n{die}write_atomically(sys.argv[1], b'new' * 1000)", tmp_path / "file"
    )
    assert process.wait() == KILLED
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2  # the unfinished one is there under a name of its own


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    path, size, random_ = tmp_path / "file", 3_000_000, random.Random(0)
    path.write_bytes(b"x" * size)
    write = f"write_atomically(sys.argv[1], bytes([letter]) * {size})"
    code = f"import sys\nwhile True:\n for letter in b'ab': {write}"
    for _ in range(8):
        process = run(code, path)
        time.sleep(0.15 + 0.1 * random_.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == KILLED
        content = path.read_bytes()
        assert len(content) == size
        assert len(set(content)) == 1
    assert content[:1] in (b"a", b"b")
