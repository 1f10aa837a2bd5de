import gzip
import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.sources.registry import local_files, read_documents, read_unit, unit_files, within_limits


def test_units_in_any_order_are_the_source(data_root, tmp_path):
    """Every kind; the units are read last to first, as by different workers."""
    (tmp_path / "arc").symlink_to(data_root / "arc")
    (tmp_path / "Train.txt").symlink_to(data_root / "logiqa" / "Eval.txt")  # the same format
    for i in range(3):
        (tmp_path / f"part-{i}.jsonl.gz").write_bytes(
            gzip.compress(f'{{"q": "{i}?", "a": " {i}"}}\n'.encode())
        )
    rows = {"prompt": "q", "completion": "a"}
    for kind, options, files, documents in (
        ("arc", {}, ["ARC-Easy-Train.jsonl", "ARC-Challenge-Train.jsonl"], 2251 + 1119),
        ("logiqa", {"files": ["Train.txt"]}, ["Train.txt"], 651),
        ("jsonl", {"files": ["part-*.gz"], **rows}, [f"part-{i}.jsonl.gz" for i in range(3)], 3),
        ("jsonl", {"files": ["part-2*", "part-[01]*"], **rows}, [f"part-{i}.jsonl.gz" for i in (2, 0, 1)], 3),
        ("p_hop", {"num_samples": 9}, [None], 9),
    ):  # fmt: skip
        paths = unit_files(kind, options, tmp_path)
        assert [path and path.name for path in paths] == files
        assert local_files(kind, options, tmp_path) == [path for path in paths if path]
        units = {i: list(read_unit(kind, options, paths, i)) for i in reversed(range(len(paths)))}
        together = list(read_documents(kind, tmp_path, options))
        assert [document for i in range(len(paths)) for document in units[i]] == together
        assert len(together) == documents
    assert [tuple(d) for d in read_documents("jsonl", tmp_path, {"files": ["part-*"], **rows})] == [
        ("0?", " 0"), ("1?", " 1"), ("2?", " 2"),
    ]  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    units=st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4),
    max_documents=st.none() | st.integers(0, 12),
    max_bytes=st.none() | st.integers(0, 60),
)
def test_limits_hold_over_the_whole_source(tmp_path, units, max_documents, max_bytes):
    """Against the plain definition: the longest beginning of the source within both limits."""
    texts = [["é" * size for size in unit] for unit in units]
    for i, unit in enumerate(texts):
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in unit))
    everything = [text for unit in texts for text in unit]
    kept = max(
        count
        for count in range(len(everything) + 1)
        if (max_documents is None or count <= max_documents)
        and (max_bytes is None or sum(2 * len(text) for text in everything[:count]) <= max_bytes)
    )
    options = {
        "files": [f"{i}.jsonl" for i in range(len(units))],
        "max_documents": max_documents,
        "max_bytes": max_bytes,
    }
    assert [d.text for d in read_documents("jsonl", tmp_path, options)] == everything[:kept]
    paths = unit_files("jsonl", options, tmp_path)
    read = [d.text for i in range(len(paths)) for d in read_unit("jsonl", options, paths, i)]
    assert within_limits("jsonl", options, (len(text.encode()) for text in read)) == kept
    assert read[:kept] == everything[:kept]


def test_eval_reads_problems_without_the_readers_of_corpora():
    """A process that imports them has neither omegaconf nor a reader of formats that eval does not need."""
    code = "import sys, data_pipeline.sources.problems; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"omegaconf", "yaml", "pyarrow", "zstandard", "fsspec", "torch"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gsm9k", {}, "did you mean 'gsm8k'"),
        ("gsm8k", {"max_document": 3}, "did you mean 'max_documents'"),
        ("gsm8k", {"files": ["gsm8k/test.jsonl"]}, "files is not a known key"),
        ("gsm8k", {"max_documents": "many"}, "many"),
        ("text", {}, "files is missing; add it"),
        ("text", {"files": ["absent.txt"]}, "absent.txt does not exist"),
        ("text", {"files": ["a*.txt"]}, "a*.txt matches no file"),
        ("text", {"files": ["pipe:echo x"]}, "commands and chained protocols are refused"),
        ("text", {"files": ["here.txt", "h*.txt"]}, "here.txt is named 2 times"),
        ("text", {"files": ["here.txt"], "text": "body"}, "text is not a known key"),
        ("jsonl", {"files": ["x"], "prompt": "q"}, "name either the field `text` or both"),
        ("jsonl", {"files": ["x"], "completion": "q"}, "name either the field `text` or both"),
        ("parquet", {"files": ["x"], "text": "t", "prompt": "q", "completion": "a"}, "name either the field"),
        ("causal_loop", {}, "num_samples is missing; add it"),
        ("causal_loop", {"num_samples": 1, "levels": [7]}, "[7]"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, kind, options, message):
    (tmp_path / "here.txt").write_text("text")
    with pytest.raises(DataError) as error:
        list(read_documents(kind, tmp_path, options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
