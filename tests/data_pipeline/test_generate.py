"""data_pipeline/generate.py writes its file whole, alone, and over nothing when the disk is full."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.locks import FolderLock
from data_pipeline import generate
from data_pipeline.generate import main

COMMAND = ["p_hop", "--num_samples", "5"]


def test_the_file_is_replaced_as_a_whole(tmp_path, capsys, monkeypatch):
    out = tmp_path / "samples.jsonl"
    main([*COMMAND, "--out", str(out)])
    first = out.read_bytes()
    assert len([json.loads(line) for line in first.splitlines()]) == 5

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(SystemExit, match="2"):
            main([*COMMAND, "--seed", "1", "--out", str(out)])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}: No space left on device (")
    assert error.endswith("bytes free); nothing was replaced\n")
    assert out.read_bytes() == first
    main([*COMMAND, "--seed", "1", "--out", str(out)])
    assert out.read_bytes() != first
    assert os.listdir(tmp_path) == ["samples.jsonl"]


def test_one_process_writes_a_file(tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    with FolderLock(tmp_path, "generate.py", "-", name=".samples.jsonl.lock"):
        with pytest.raises(SystemExit, match="2"):
            main([*COMMAND, "--out", str(out)])
        assert "is in use by generate.py, process" in capsys.readouterr().err
        assert not out.exists()
        main([*COMMAND, "--out", str(tmp_path / "other.jsonl")])


def test_standard_output_stays_what_it_is(tmp_path):
    command = [sys.executable, generate.__file__, *COMMAND, "--out", "/dev/stdout"]
    with (tmp_path / "redirected").open("w") as file:
        subprocess.run(command, stdout=file, check=True)
    assert (tmp_path / "redirected").read_text().count('"text"') == 5
    assert Path("/dev/stdout").is_symlink()
