"""Files are replaced whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from mlx_diffgemma.editing import files
from mlx_diffgemma.errors import UsageError

LOOP = """
import sys
from mlx_diffgemma.editing.files import replace_text
texts = ["old\\n" * 200_000, "new\\n" * 300_000]
print("ready", flush=True)
while True:
    for text in texts:
        replace_text(sys.argv[1], text)
"""


@pytest.mark.parametrize("after", [0.0, 0.003, 0.011, 0.04, 0.1])
def test_a_kill_leaves_the_old_text_or_the_new_one(tmp_path, after):
    path = tmp_path / "file.txt"
    path.write_text("old\n" * 200_000)
    writer = subprocess.Popen([sys.executable, "-c", LOOP, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    time.sleep(after)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert path.read_text() in ("old\n" * 200_000, "new\n" * 300_000)


def test_a_failing_write_leaves_the_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.FileError) as error:
        files.replace_text(path, "new")
    assert str(error.value) == (
        f"{path} cannot be written: No space left on device; it is as it was."
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_mode_bits_and_links_stay(tmp_path):
    path, link = tmp_path / "script.sh", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o751)
    link.symlink_to("script.sh")
    files.replace_text(link, "a\r\nb")
    assert link.is_symlink()
    assert path.read_bytes() == b"a\r\nb"
    assert path.stat().st_mode & 0o7777 == 0o751


def test_a_read_only_file_is_left_alone_unless_forced(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(files.FileError) as error:
        files.replace_text(path, "new")
    assert str(error.value) == f"{path} is read-only; --force writes it all the same."
    assert path.read_text() == "old"
    assert files.replace_text(path, "new", force=True) == []
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o7777 == 0o444


def test_what_cannot_be_kept_is_said(tmp_path, monkeypatch):
    path, other = tmp_path / "file.txt", tmp_path / "other.txt"
    path.write_text("old")
    other.hardlink_to(path)
    assert files.replace_text(path, "new") == [
        "file.txt had another name (hard links), under which the old text stays."
    ]
    assert (path.read_text(), other.read_text()) == ("new", "old")
    assert files.replace_text(path, "newer") == []
    known = {"user.a": b"1", "user.b": b"2"}
    kept: dict[str, bytes] = {}

    def refuse(handle, owner, group):
        raise PermissionError(1, "Operation not permitted")

    def take(handle, name, value):
        if name == "user.b":
            raise OSError(95, "Operation not supported")
        kept[name] = value

    monkeypatch.setattr(os, "listxattr", lambda target: list(known), raising=False)
    monkeypatch.setattr(os, "getxattr", lambda target, name: known[name], raising=False)
    monkeypatch.setattr(os, "setxattr", take, raising=False)
    assert files.replace_text(path, "newest") == [
        "Some extended attributes of file.txt could not be kept."
    ]
    assert kept == {"user.a": b"1"}
    if os.geteuid() == 0:
        os.chown(path, 1, 1)
        assert files.replace_text(path, "by root") == files.replace_text(path, "newest")
        assert (path.stat().st_uid, path.stat().st_gid) == (1, 1)
        monkeypatch.setattr(os, "fchown", refuse)
        lost = files.replace_text(path, "by another")
        assert lost[0] == "file.txt belongs to you now; its owner or group could not be kept."


def test_reading_says_what_is_wrong(tmp_path):
    path = tmp_path / "latin"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UsageError) as error:
        files.read_text(path)
    assert str(error.value) == f"{path} is not UTF-8 text (byte 3); re-encode it first."
    with pytest.raises(files.FileError) as missing:
        files.read_text(tmp_path / "none")
    path = tmp_path / "none"
    assert (
        str(missing.value) == f"{path} cannot be read: No such file or directory; check the path."
    )


def test_a_diff_applies(tmp_path):
    before = "a\r\nb\n\x0bc\u2028d\nlast"
    after = "a\r\nB\nC\n\x0bc\u2028d\nlast one"
    (tmp_path / "f").write_bytes(before.encode())
    diff = files.unified_diff(before, after, "f")
    assert diff.startswith("--- a/f\n+++ b/f\n@@ ")
    assert diff.count("\\ No newline at end of file\n") == 2
    subprocess.run(
        ["patch", "--binary", "-p1"], input=diff.encode(), cwd=tmp_path, check=True,
        capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "f").read_bytes() == after.encode()
    assert files.unified_diff(before, before, "f") == ""
