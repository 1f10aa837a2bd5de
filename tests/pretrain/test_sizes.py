"""The sizes that are shipped: equal to their generator, true to their names, and trained as slices."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from pyarrow import parquet

from data_pipeline.build import build
from data_pipeline.recipe import load_recipe
from data_pipeline.verify import verify
from model import ModelConfig
from model.counts import flops_per_token, num_parameters
from pretrain.dry_run import describe
from pretrain.plan import main
from pretrain.planning import sizes
from pretrain.planning.size_files import FOLDER, PAGE, SHIPPED, TABLES, files, in_page, shipped
from pretrain.planning.sizes import sized
from pretrain.run_config import load_run_config
from pretrain.setup import prepare

from ..conftest import ROOT

WORKER = Path(__file__).with_name("sizes_worker.py")
FORMS = [(size, looped) for size in SHIPPED for looped in (False, True)]
# Two layers, the second one looped; experts, routing and attention as shipped.
SLICE = ["num_hidden_layers=2", "hidden_size=64", "num_attention_heads=2", "kv_lora_rank=32"]
SLICE += ["qk_nope_head_dim=16", "qk_rope_head_dim=16", "v_head_dim=16", "intermediate_size=64"]
SHORT = ["max_steps=2", "global_batch_size=4", "micro_batch_size=2", "ep_size=1", "eval_every=0"]
SHORT += ["data.sequence_length=64", "optimizer.warmup_steps=1", "log_every=1"]


def configs(size: str, looped: bool) -> list[str]:
    name = shipped(size).name
    return [f"{FOLDER}/{name}.yaml", *([f"{FOLDER}/{name}_looped.yaml"] if looped else [])]


def header(size: str, looped: bool) -> str:
    """Of the last file of a form, its lines as one."""
    lines = (ROOT / configs(size, looped)[-1]).read_text().splitlines()
    return " ".join(line.strip("# \\") for line in lines if line.startswith("#"))


def ds_config(size: str, looped: bool) -> str:
    """That of the header's sbatch line."""
    found = re.search(r"--ds_config (\S+)", header(size, looped))
    assert found
    return found[1]


def test_the_files_are_what_their_generator_writes():
    made = dict(files())
    folder = ROOT / FOLDER
    assert {path.name for path in folder.iterdir()} == set(made)
    for name, text in made.items():
        assert (folder / name).read_text() == text, f"{name}: python -m pretrain.planning.size_files"


def test_the_page_has_the_tables():
    page = PAGE.read_text()
    for name, table in TABLES.items():
        assert in_page(page, name, table()) == page, f"{name}: python -m pretrain.planning.size_files"


@pytest.mark.parametrize(("size", "looped"), FORMS)
def test_a_size_loads_with_its_json_and_without_data(monkeypatch, size, looped):
    """On as many ranks as its header says; counts are the model's own, and near the name."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", str(SHIPPED[size]))
    run = prepare(configs(size, looped), ds_config(size, looped), [], dry_run=True)
    plain, model = shipped(size).config, run.model_config
    assert model == (shipped(size).looped if looped else plain)
    assert run.ds_config["bf16"]["enabled"]
    total, active = num_parameters(model), num_parameters(model, active=True)
    assert total == pytest.approx(sizes.read_count(size, "--size"), rel=sizes.TOLERANCE)
    assert f"{total:,} parameters, {active:,} active per token" in header(size, looped)
    assert run.config.optimizer.lr == pytest.approx(shipped(size).learning_rate, rel=0.05)
    said = describe(run)
    assert f"IS NOT BUILT YET: a vocabulary of {model.vocab_size:,}, from model.vocab_size" in said
    assert "not checked      whether the tokenizer has that vocabulary" in said
    if looped:  # the same weights, a norm and an embedding more, and the middle half again
        assert total - num_parameters(plain) == 2 * model.hidden_size
        layers, (first, last) = model.num_hidden_layers, model.recurrence.ranges[0]
        assert first == layers - 1 - last
        assert (last - first + 1) / layers == pytest.approx(0.5, abs=0.06)
        length = run.config.data.sequence_length
        assert 1.3 < flops_per_token(model, length) / flops_per_token(plain, length) < 1.5


class Hub(MemoryFileSystem):
    """hf:// without a network."""

    protocol = "hf"  # type: ignore[assignment]
    store: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("hf://"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The shipped recipe over two files, with columns of FineWeb-Edu, where the hub has them."""
    root = tmp_path_factory.mktemp("fineweb_edu")
    fsspec.register_implementation("hf", Hub, clobber=True)
    for number in range(2):
        texts = [f"Lesson {number}.{i}: the {'very ' * (i % 7)}quick brown fox." * 9 for i in range(60)]
        rows = {"text": texts, "id": [f"<urn:uuid:{i}>" for i in range(60)], "score": [3.5] * 60}
        file = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table(rows), file)
        path = f"/datasets/HuggingFaceFW/fineweb-edu/sample/10BT/00{number}_00000.parquet"
        Hub().pipe(path, file.getvalue().to_pybytes())
    overrides = ["sources.0.cleaning=[]", "validation_fraction=0.1"]
    build(load_recipe(ROOT / "data_pipeline/recipes/fineweb_edu.yaml", overrides), root, root / "data")
    yield root / "data"
    _registry.pop("hf")


def test_the_recipe_reads_the_files_of_the_hub(built):
    manifest = verify(built).manifest
    assert sum(shard.documents for shard in manifest.shards()) == 120
    assert manifest.vocab_size <= 32768


@pytest.fixture(scope="module")
def trained(built, launch, tmp_path_factory) -> Callable[[str, bool], list[dict[str, Any]]]:
    """Trains slices of all forms in one process; returns the metrics of one."""
    folder, cases = tmp_path_factory.mktemp("slices"), {}
    vocabulary = verify(built).manifest.vocab_size
    for size, looped in FORMS:
        model = [*SLICE, f"vocab_size={vocabulary}"]
        model += ["moe_intermediate_size=32"] if shipped(size).config.use_moe else []
        model += ["recurrence.ranges=[[1,1]]"] if looped else []
        run = folder / f"{size}{looped}"
        overrides = [*SHORT, *(f"model.{key}" for key in model), f"data.path={built}", f"output_dir={run}"]
        cases[run.name] = [configs(size, looped), ds_config(size, looped), overrides]
    launch(1, WORKER, json.dumps(cases))
    return lambda size, looped: [
        json.loads(line) for line in (folder / f"{size}{looped}/metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(("size", "looped"), FORMS)
def test_a_slice_trains(trained, size, looped):
    steps = [record for record in trained(size, looped) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert steps[1]["loss"] < steps[0]["loss"]
    assert [record.get("recurrence_depth", 1) for record in steps] == [1 + looped] * 2


def test_the_rules_give_what_deepseek_published():
    """DeepSeek LLM 7B: 2T tokens, rows of 4096; 4.2e-4, 2304 rows (2401.02954, table 2). V2-Lite: 4.2e-4."""
    sizes_7b = {"num_hidden_layers": 30, "hidden_size": 4096, "intermediate_size": 11008}
    heads = {"num_attention_heads": 32, "use_mla": False, "use_moe": False, "vocab_size": 102400}
    per_token = sizes.compute_per_token(ModelConfig(**sizes_7b, **heads, max_position_embeddings=4096), 4096)
    assert per_token == pytest.approx(4.23e10, rel=0.01)  # M of section 3.2
    assert sizes.learning_rate(per_token * 2e12) == pytest.approx(4.2e-4, rel=0.02)
    assert sizes.batch_tokens(per_token * 2e12) == pytest.approx(2304 * 4096, rel=0.05)
    assert sized("16B", "5.7T").learning_rate == pytest.approx(4.2e-4, rel=0.02)


@pytest.fixture
def run_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    def run(arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments.split()])
        main()
        return capsys.readouterr().out

    return run


def test_the_dial_prints_a_run(run_plan, tmp_path):
    given = "--size 300M --tokens 6B --gpus 24"
    (tmp_path / "a.yaml").write_text(run_plan(given))
    (tmp_path / "b.yaml").write_text(run_plan(f"{given} --looped"))
    run = load_run_config([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], [])
    assert run.global_batch_size % 24 == 0
    assert run.max_steps * run.tokens_per_step == pytest.approx(6e9, rel=1e-3)
    assert ModelConfig.from_dict(run.model).recurrence.num_steps == 2
    wanted = sized("300M", "6B").batch_tokens
    assert 0.7 < run.tokens_per_step / wanted < 1.42
    assert run_plan("--size 130M --gpus 8 512").count("\n| ") == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--size 1Q --gpus 8", "--size 1Q is not a number from 1 to 1000T; write e.g. 130M, 1.5B or 20e9"),
        ("--size 1B --tokens 0.5 --gpus 8", "--tokens 0.5 is not a number from 1 to 1000T"),
        ("--size 3M --gpus 8", "--size 3M: no shape comes within 5% of it; choose 50M to 500B"),
        ("--size 16B --gpus 1", "nothing fits 72,000,000,000 usable bytes on 1 GPUs"),
        ("--size 1B --gpus 8 --global_batch_size 5", "--global_batch_size goes with --model alone"),
        ("--model large --gpus 8 --looped", "--looped goes with --size alone; leave it out"),
    ],
)
def test_mistakes_are_one_line(run_plan, capsys, arguments, line):
    with pytest.raises(SystemExit) as stopped:
        run_plan(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith(f"error: {line}")
    assert said.err.count("\n") == 1
