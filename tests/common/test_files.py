"""Whole-or-absent files on a disk that fails, and damaged JSON lines."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import json_object, read_json_lines, replacing, write_file


def test_failed_write_keeps_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


FULL = """
import resource, signal, sys
from pathlib import Path
from common.errors import user_errors
from common.files import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
with user_errors(OSError):
    write_file(Path(sys.argv[1]), b"x" * 2000)
"""


def test_full_disk_names_the_path_the_room_and_what_is_safe(tmp_path: Path) -> None:
    """A limit of the file's size fails as a full disk does: in the middle of a write."""
    path = tmp_path / "file"
    write_file(path, b"old")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: File too large (")
    assert done.stderr.endswith(" bytes free); nothing was replaced\n")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_error_about_another_file_keeps_its_own_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, replacing(tmp_path / "file"):
        (tmp_path / "absent").read_bytes()
    assert error.value.filename == str(tmp_path / "absent")


def test_damaged_lines_are_set_apart_from_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'{"step": 1}\n{"step": 2\n[3]\n\xff\xfe\n' + deep + b'\n\n{"step": 4}\n{"ste')
    found = read_json_lines(path)
    assert found.records == [{"step": 1}, {"step": 4}]
    assert found.damaged == [(2, b'{"step": 2'), (3, b"[3]"), (4, b"\xff\xfe"), (5, deep), (6, b"")]
    assert found.torn == b'{"ste'
    assert found.warnings()[0] == f"{path} line 2 is damaged and not used"


def test_a_line_is_an_object_or_nothing() -> None:
    assert json_object(b'{"a": [1]}') == {"a": [1]}
    for line in (b"", b"[1]", b'{"a": ', b"\xff", b"null", b"[" * 100_000, b"1" * 5000):
        assert json_object(line) is None
