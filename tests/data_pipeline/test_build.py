import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline import build as build_module
from data_pipeline.build import build, main, summary
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
from data_pipeline.recipe import OWN_KEYS, load_recipe
from data_pipeline.shards.manifest import open_manifest
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.sources.registry import read_documents
from data_pipeline.sources.text import read_wiki
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.verify import verify

RECIPES = Path(build_module.__file__).parent / "recipes"
DEMO = RECIPES / "demo.yaml"
RECIPE = {
    "name": "test",
    "seed": 1,
    "validation_fraction": 0.1,
    "tokenizer": {"vocab_size": 400, "train_bytes": 30_000},
    "sources": [
        {
            "name": "loops",
            "kind": "causal_loop",
            "weight": 2,
            "num_samples": 120,
            "levels": [1, 3],
            "mask_prompt": True,
        },
        {"name": "prose", "kind": "text", "weight": 1, "files": ["prose.txt"]},
    ],
}


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "raw").mkdir()
    text = "".join(
        f"Chapter {i}. " + "Il était une fois ▁ 東京 \u2028 \t x.\n" * 60 + "\n" for i in range(40)
    )
    (tmp_path / "raw" / "prose.txt").write_text(text)
    return tmp_path / "raw"


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path / "recipe.yaml"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_come_back_shuffled_and_split(tmp_path, root, recipe_file):
    recipe = load_recipe(recipe_file)
    manifest = build(recipe, root, tmp_path / "out")
    assert verify(tmp_path / "out") == (manifest, 0)
    tokenizer = Tokenizer(manifest.tokenizer_path)
    for source in recipe.sources:
        options = {k: v for k, v in source.items() if k not in OWN_KEYS}
        documents = list(read_documents(source["kind"], root, options))
        published = [document.text for document in documents]
        found: dict[str, list[str]] = {}
        for split, value in manifest.sources[source["name"]].splits.items():
            stream = TokenStream(manifest, source["name"], split)
            starts = stream.document_starts.tolist()
            ids = [stream.read(a, b).tolist() for a, b in zip(starts, starts[1:], strict=False)]
            assert all((i[0], i[-1]) == (2, 3) and 2 not in i[1:] and 3 not in i[:-1] for i in ids)
            found[split] = [tokenizer.decode(i) for i in ids]
            assert value.documents == len(ids)
            if source.get("mask_prompt"):
                prompts = [d[:n] for d, n in zip(ids, stream.prompt_ends - starts[:-1], strict=True)]
                assert {tokenizer.decode(p) for p in prompts} <= {d.prompt for d in documents}
            else:
                assert stream.prompt_ends.tolist() == starts[:-1]
            assert value.text_bytes == sum(len(text.encode()) for text in found[split])
        assert sorted(found["train"] + found["validation"]) == sorted(published)
        assert 0 < len(found["validation"]) < 0.35 * len(published)
        assert not set(found["train"]) & set(found["validation"])
        assert found["train"] != [text for text in published if text in set(found["train"])]
    assert "prose                validation" in summary(manifest)
    assert Loader(tmp_path / "out", 32, 4, 0).batch(0).tokens.max() < tokenizer.vocab_size


def test_two_builds_are_byte_identical(tmp_path, root, recipe_file):
    for out in ("a", "b"):
        build(load_recipe(recipe_file), root, tmp_path / out)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    build(load_recipe(recipe_file, ["seed=2"]), root, tmp_path / "c")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_second_build_into_the_same_folder(tmp_path, root, recipe_file, capsys):
    out = tmp_path / "out"
    recipe = load_recipe(recipe_file)
    build(recipe, root, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    build(recipe, root, out)
    assert "already holds this build" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(DataError, match="another recipe or data"):
        build(load_recipe(recipe_file, ["tokenizer.vocab_size=401"]), root, out)
    with (root / "prose.txt").open("a") as file:
        file.write("one more line\n")
    with pytest.raises(DataError, match="another recipe or data"):
        build(recipe, root, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_interrupted_build_goes_on_and_takes_nothing_else(tmp_path, root, recipe_file, monkeypatch):
    out, recipe = tmp_path / "out", load_recipe(recipe_file)
    whole = contents(build(recipe, root, tmp_path / "whole").path)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, root, out)
    with pytest.raises(DataError, match="its build never finished"):
        open_manifest(out)
    (out / "work/loops-train-00007.tar.tmp").write_bytes(b"half")
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds 'thesis.txt' and no finished build: .* move it away"):
        build(recipe, root, out)
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "thesis.txt").unlink()
    build(recipe, root, out)
    assert contents(out) == whole


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def many_files(root: Path) -> list[str]:
    """Overrides under which the prose comes from five files."""
    for number in range(5):
        text = "".join(
            f"File {number}, part {i}: " + "water under the bridge. " * 90 for i in range(9 - number)
        )
        (root / f"part-{number}.txt").write_text(text.replace("part 3", "\n\npart 3"))
    return ["sources.1.files=[part-*.txt, prose.txt]", "sources.1.max_bytes=80000"]


def test_neither_workers_nor_tasks_change_a_byte(tmp_path, root, recipe_file, monkeypatch):
    monkeypatch.setattr("data_pipeline.staging.build_plan.SHARD_TEXT_BYTES", 20_000)
    recipe = load_recipe(recipe_file, many_files(root))
    build(recipe, root, tmp_path / "one")
    assert len(open_manifest(tmp_path / "one").sources["prose"].splits["train"].shards) > 2
    out = tmp_path / "tasks"
    for number in (2, 0, 1):
        assert build(recipe, root, out, task=(number, 3)) is None
    assert build(recipe, root, out, plan_only=True) is None
    for number in (1, 0):  # task 2 is lost
        assert build(recipe, root, out, task=(number, 3)) is None
    build(recipe, root, out)
    assert contents(out) == contents(tmp_path / "one")


def test_processes_do_not_change_a_byte(tmp_path, root, recipe_file):
    recipe = load_recipe(recipe_file, many_files(root))
    build(recipe, root, tmp_path / "one")
    build(recipe, root, tmp_path / "three", workers=3)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def count_files(folder: Path) -> int:
    """Of a folder that changes meanwhile."""
    return sum(len(names) for _, _, names in os.walk(folder))


def test_killed_at_any_instant_it_goes_on(tmp_path, root, recipe_file):
    """SIGKILL after one more file has appeared, again and again."""
    command = [
        sys.executable,
        build_module.__file__,
        "--recipe",
        recipe_file,
        "--data",
        root,
        *many_files(root),
    ]
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([*command, "--out", whole], check=True, capture_output=True)
    kills, seen = 0, 0
    while not (out / "manifest.json").is_file():
        process = subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and count_files(out) <= seen + 12:
            pass
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        seen = count_files(out)
        assert kills < 20
    assert kills > 1
    subprocess.run([*command, "--out", out], check=True, capture_output=True)
    assert contents(out) == contents(whole)


def test_what_another_build_left_is_cleared_but_not_by_a_task(tmp_path, root, recipe_file):
    out, recipe = tmp_path / "out", load_recipe(recipe_file)
    build(load_recipe(recipe_file, ["seed=5"]), root, out, plan_only=True)
    with pytest.raises(DataError, match="holds a part of another build"):
        build(recipe, root, out, task=(0, 2))
    build(recipe, root, out)
    build(recipe, root, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "0"], "--task 0 --of None: give both"),
        (["--task", "2", "--of", "2"], "--task 2 --of 2"),
        (["--task", "0", "--of", "2", "--plan_only"], "--plan_only is for one process"),
        (["--workers", "0"], "--workers 0 is below 1"),
    ],
)
def test_options_that_do_not_fit(root, recipe_file, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        main([str(a) for a in ["--recipe", recipe_file, "--out", tmp_path / "out", "--data", root, *options]])
    assert message in capsys.readouterr().err


def test_cleaning_removes_what_is_planted_and_says_so(tmp_path, data_root):
    """Duplicates, near duplicates, junk and a test question inside a page, among real articles."""
    articles = list(itertools.islice(read_wiki(data_root / "text/enwiki2015-AA.tar.xz"), 300))
    pages = [text for text in articles if len(text) > 1500][:30]
    question = json.loads((data_root / "gsm8k/test.jsonl").read_text().splitlines()[7])["question"]
    leak = pages[3][:700] + "\n" + "  ".join(question.upper().split(" ")) + "\n" + pages[3][700:]
    near = pages[1].replace(pages[1].split()[40], "otherwise", 1)
    junk = "click here!!! " * 300
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("gsm8k", "arc", "logiqa", "babi"):
        (raw / name).symlink_to(data_root / name)
    first, second = [*pages[:3], leak, *pages[4:20]], [pages[0], near, junk, *pages[20:]]
    for name, texts in (("first", first), ("second", second)):
        lines = (json.dumps({"text": text}) for text in texts)
        (raw / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    steps = ["exact", "near", "quality", "decontaminate"]
    source = {"kind": "jsonl", "weight": 1, "cleaning": steps}
    sources = [source | {"name": name, "files": [f"{name}.jsonl"]} for name in ("first", "second")]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"sources": sources}))
    recipe = load_recipe(tmp_path / "r.yaml", ["tokenizer.vocab_size=600", "validation_fraction=0"])
    manifest = build(recipe, raw, tmp_path / "out")
    tokenizer, kept = Tokenizer(manifest.tokenizer_path), {}
    for name in ("first", "second"):
        stream = TokenStream(manifest, name, "train")
        bounds = itertools.pairwise(stream.document_starts.tolist())
        kept[name] = sorted(tokenizer.decode(stream.read(a, b).tolist()) for a, b in bounds)
    assert kept == {"first": sorted([*first[:3], *first[4:]]), "second": sorted(second[3:])}
    report = json.loads((tmp_path / "out/cleaning.json").read_text())
    removed = {
        (name, entry["step"], entry["reason"].split()[0]): entry["documents"]
        for name, values in report.items()
        for entry in values["removed"]
    }
    assert removed.pop(("first", "decontaminate", "gsm8k")) == 1
    assert removed.pop(("second", "exact", "duplicate")) == 1
    assert removed.pop(("second", "near", "duplicate")) == 1
    assert list(removed.values()) == [1]
    assert next(iter(removed))[:2] == ("second", "quality")
    assert question.split()[0].lower() in (tmp_path / "out/cleaning.txt").read_text()


def test_no_validation_documents(tmp_path, root, recipe_file):
    manifest = build(load_recipe(recipe_file, ["validation_fraction=0"]), root, tmp_path / "out")
    assert manifest.sources["prose"].splits["validation"].shards == ()
    assert Loader(tmp_path / "out", 32, 4, 0).rows["prose"] > 0
    with pytest.raises(DataError, match="0 validation tokens"):
        Loader(tmp_path / "out", 32, 4, 0, split="validation")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizr.vocab_size=3"], "did you mean 'tokenizer'"),
        (["tokenizer.vocab_sise=3"], "vocab_size"),
        (["tokenizer.vocab_size=many"], "many"),
        (["tokenizer.vocab_size=100"], "100.*raise tokenizer.vocab_size"),
        (["tokenizer.train_bytes=0"], "train_bytes 0"),
        (["validation_fraction=1"], "validation_fraction 1"),
        (["seed"], "'seed' is not KEY=VALUE"),
        (["sources.0.kind=causal"], "did you mean 'causal_loop'"),
        (["sources.0.num_sample=3"], "did you mean 'num_samples'"),
        (["sources.0.weight=0"], "weight 0"),
        (["sources.0.weight=heavy"], "weight 'heavy'"),
        (["sources.0.weight=0.0000001"], "'loops' has weight"),
        (["sources.0.name=prose"], "two sources are named 'prose'"),
        (["sources.0.name=../x"], "'../x'"),
        (["sources=[]"], "no sources"),
        (["sources.0=5"], r"sources\[0\]=5 is not a mapping"),
        (["sources.1.files=[]"], "kind 'text': files is empty: name at least one"),
        (["sources.1.files=prose.txt"], "files='prose.txt' is not a list"),
        (["sources.1.files=[1]"], r"files\[0\]=1 is not text"),
        (["sources.0.num_samples=1.5"], "num_samples=1.5 is not an integer"),
        (["sources.0.levels=3"], "levels=3 is not a list"),
        (["sources.1.max_bytes=.nan"], "max_bytes=nan is not an integer"),
        (["tokenizer=5"], "tokenizer=5 is not a mapping"),
        (["validation_fraction=.nan"], "validation_fraction=nan is not a finite number"),
        (["seed=true"], "seed=True is not an integer"),
        (["cleaning.quality.min_words=few"], "cleaning.quality.min_words='few' is not an integer"),
        (["=3"], "'=3' is not KEY=VALUE"),
        (["sources.0.num_samples=0"], "no training documents"),
        (["sources.1.files=[absent.txt]"], "absent.txt does not exist"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(root, recipe_file, tmp_path, capsys, overrides, message):
    arguments = ["--recipe", recipe_file, "--out", tmp_path / "out", "--data", root, *overrides]
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_numbers_of_overrides_are_those_of_the_file(recipe_file):
    assert load_recipe(recipe_file, ["validation_fraction=1e-3"]).validation_fraction == 0.001
    assert load_recipe(recipe_file, ["validation_fraction=0"]).validation_fraction == 0
    assert load_recipe(recipe_file, ["sources.0.levels=[2]"]).sources[0]["levels"] == [2]


@pytest.mark.parametrize(
    "text", ["", "3", "- 3", "just text", "a: [", "name: x", "\udcff", "name: x\nsources: {a: {kind: p_hop}}"]
)
def test_recipe_files_that_are_none(tmp_path, text):
    (tmp_path / "r.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match="r.yaml") as error:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_command_lines_run_as_scripts(tmp_path):
    folder = Path(build_module.__file__).parent
    out = tmp_path / "demo"
    command = [
        sys.executable,
        folder / "build.py",
        "--recipe",
        DEMO,
        "--out",
        out,
        "sources.0.num_samples=60",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "causal_loop          train" in done.stdout
    done = subprocess.run(
        [sys.executable, folder / "verify.py", out], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (out / "causal_loop-train-00000.tar").unlink()
    done = subprocess.run(
        [sys.executable, folder / "verify.py", out], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_recipes_say_what_every_field_is():
    for path in RECIPES.glob("*.yaml"):
        recipe = load_recipe(path)
        assert recipe.name == path.stem
        lines = [line for line in path.read_text().splitlines() if ":" in line and not line.startswith("#")]
        explained = {line.split("#")[0].split(":")[0].strip(" -") for line in lines if "#" in line}
        fields = {line.split(":")[0].strip(" -") for line in lines}
        assert fields - {"name", "kind", "weight", "sources", "tokenizer"} <= explained


def test_real_recipe_on_a_slice_of_the_real_files(tmp_path, data_root):
    overrides = ["sources.0.max_bytes=300000", "tokenizer.vocab_size=1000", "tokenizer.train_bytes=200000"]
    overrides += [f"sources.{i}.max_documents=200" for i in range(4)]
    manifest = build(load_recipe(RECIPES / "real_cpu.yaml", overrides), data_root, tmp_path / "out")
    assert list(manifest.sources) == ["wiki", "gsm8k", "babi", "arc"]
    for name, source in manifest.sources.items():
        split = source.splits["train"]
        assert split.documents > 0
        assert 1.5 < split.text_bytes / split.tokens < 5, name
    batch = Loader(tmp_path / "out", 128, 64, 0).batch(0)
    assert {name for name, _ in batch.sample_ids} == set(manifest.sources)
