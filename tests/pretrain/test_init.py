"""Runs that start from given weights: what fits, what is trained how, and how such a run resumes."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.build import build
from data_pipeline.loading.loader import Loader
from data_pipeline.recipe import load_recipe
from data_pipeline.tokenization.tokenizer import Tokenizer
from model import ModelConfig, ZeroModel, load_pretrained
from model.export_files import TOKENIZER_NAME, WEIGHTS_NAME, save_weights
from model.hf.deepseek import import_folder
from pretrain.checkpoint import check_compatible
from pretrain.config import InitConfig, OptimizerConfig
from pretrain.dry_run import describe
from pretrain.export import export_run
from pretrain.init import BASE, RECORD, Start, find, fit
from pretrain.optim import parameter_groups
from pretrain.setup import Run, prepare

from ..conftest import ROOT
from ..model.hf_folders import llama_folder
from .conftest import finish, unlink_buffer
from .test_resume import metrics
from .test_stopping import wait_for_step

CONFIG, WORKER = ROOT / "pretrain/configs/continue.yaml", Path(__file__).with_name("init_worker.py")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 32}
SIZES |= {"n_routed_experts": 4, "max_position_embeddings": 128, "initializer_range": 0.1}
LOOP = ["model.recurrence.placement=block", "model.recurrence.ranges=[[1,1]]", "model.recurrence.num_steps=2"]
EXPERTS, HALF = ["model.layers.1.mlp.experts.*"], ["model.embed_tokens.*", "model.layers.0.*", "*.q_proj.*"]
SMALL = ["data.sequence_length=64", "global_batch_size=4", "micro_batch_size=2", "optimizer.warmup_steps=1"]


@pytest.fixture(scope="module")
def start_folder(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of untrained weights in the tokens of the data; its router's bias is not zero."""
    folder = tmp_path_factory.mktemp("init") / "start"
    tokenizer = Loader(data_folder, 64, 4, 0, 0, 1, "train").tokenizer_path
    config = ModelConfig.from_dict({**SIZES, "vocab_size": Tokenizer(tokenizer).vocab_size})
    model = ZeroModel(config, seed=7)
    model.moe_layers()[0].gate.e_score_correction_bias.copy_(torch.tensor([0.1, -0.2, 0.05, 0.05]))
    save_weights(folder, config, dict(model.state_dict()))
    shutil.copyfile(tokenizer, folder / TOKENIZER_NAME)
    return folder


@pytest.fixture
def started(start_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch) -> Callable[..., Run]:
    """prepare() of a run on one rank that starts from the folder."""
    monkeypatch.chdir(ROOT)

    def run(*overrides: str, init: Path | None = start_folder, data: Path = data_folder, **more: Any) -> Run:
        given = [f"data.path={data}", f"output_dir={tmp_path / 'run'}", *SMALL, "eval_every=0", *overrides]
        prepared = prepare(str(CONFIG), "ds_configs/zero3_ep.json", given, init=init, **more)
        assert isinstance(prepared, Run)
        return prepared

    return run


def frozen(globs: list[str]) -> str:
    return f"init.frozen={json.dumps(globs)}"


# What a run is


def test_sizes_come_from_the_folder_and_keys_of_the_config_override_them(started, start_folder):
    run = started()
    assert run.start.origin == run.state.origin
    assert (run.start.missing, run.start.unused, run.start.frozen) == ((), (), ())
    own = run.model_config
    assert {name: getattr(own, name) for name in SIZES} == SIZES
    changed = started("model.mtp_loss_weight=0.5", "model.balance_loss_weight=0.02").model_config
    assert changed == replace(own, mtp_loss_weight=0.5, balance_loss_weight=0.02)


def test_new_parameters_are_named_and_old_ones_frozen_by_pattern(started, start_folder):
    run = started(*LOOP, "init.missing=allow", frozen([*EXPERTS, "model.embed_tokens.*"]))
    start: Start = run.start
    old = load_file(start_folder / WEIGHTS_NAME)
    with torch.device("meta"):
        own = ZeroModel(run.model_config).state_dict()
    assert set(start.missing) == own.keys() - old.keys()
    assert all(name.startswith("model.recurrence.0.") for name in start.missing)
    held = ["model.embed_tokens.weight", *(f"model.layers.1.mlp.experts.w{i}" for i in (1, 2, 3))]
    assert sorted(start.frozen) == sorted(held)
    lines = start.notes()
    assert [line.split()[1] for line in lines[1:]] == list(start.missing)
    frozen_numbers = sum(old[name].numel() for name in held)
    new_numbers = sum(own[name].numel() for name in start.missing)
    assert f"{frozen_numbers:,} frozen, {new_numbers:,} new ones" in lines[0]
    everything = started(*LOOP, "init.missing=allow", 'init.frozen=["*"]').start
    assert set(everything.frozen) == {n for n in old if not n.endswith("e_score_correction_bias")}


def test_a_new_buffer_is_named_too(started, tmp_path, start_folder):
    """Experts in a dense model: their router's bias is a buffer."""
    dense = tmp_path / "dense"
    config = replace(load_pretrained(start_folder).config, use_moe=False)
    save_weights(dense, config, dict(ZeroModel(config).state_dict()))
    shutil.copyfile(start_folder / TOKENIZER_NAME, dense / TOKENIZER_NAME)
    more = ("model.use_moe=true", "model.first_k_dense_replace=2", "model.num_nextn_predict_layers=1")
    start = started(*more, "init.missing=allow", init=dense).start
    assert "model.mtp.0.layer.mlp.gate.e_score_correction_bias" in start.missing


def test_modules_that_next_tokens_do_not_need_may_be_left_out(started, tmp_path, start_folder):
    more = tmp_path / "more"
    config = replace(load_pretrained(start_folder).config, num_nextn_predict_layers=1)
    model = ZeroModel(replace(config, latent_cot=replace(config.latent_cot, num_latents=2)))
    save_weights(more, model.config, dict(model.state_dict()))
    shutil.copyfile(start_folder / TOKENIZER_NAME, more / TOKENIZER_NAME)
    start = started("model.num_nextn_predict_layers=0", init=more).start
    assert {name.split(".")[0] for name in start.unused} == {"latent_thoughts", "model"}
    assert len(start.notes()) == 1 + len(start.unused)
    with pytest.raises(ValueError, match=r"layers\.1\..* expected no such tensor; leave the model's sizes"):
        started("model.num_nextn_predict_layers=0", "model.num_hidden_layers=1", init=more)


def test_an_imported_llama_and_data_in_its_tokens(started, tmp_path, data_folder):
    """The documented way; a folder without a tokenizer is taken if its vocabulary has the data's size."""
    hf, start, data = tmp_path / "hf", tmp_path / "start", tmp_path / "data"
    llama_folder(hf, max_position_embeddings=128, tie_word_embeddings=True)
    import_folder(hf, start)
    overrides = ["sources.0.num_samples=40", "sources.0.levels=[1]", "validation_fraction=0.1"]
    overrides += [f"tokenizer.file={start / TOKENIZER_NAME}", "tokenizer.vocab_size=null"]
    build(load_recipe(ROOT / "data_pipeline/recipes/demo.yaml", overrides), ROOT, data)
    run = started(init=start, data=data)
    assert run.model_config.vocab_size == Tokenizer(start / TOKENIZER_NAME).vocab_size
    assert run.model_config.tie_word_embeddings
    with pytest.raises(ValueError, match="has another tokenizer .* build the data with its tokenizer"):
        started(init=start)
    with pytest.raises(ValueError, match="convert it first: python -m model.hf import --hf"):
        started(init=hf, data=data)
    (start / TOKENIZER_NAME).unlink()
    assert "has no tokenizer" in started(init=start, data=data).start.notes()[-1]
    with pytest.raises(
        ValueError, match=r"has no tokenizer and vocab_size=\d+, but the data's tokenizer has"
    ):
        started(init=start)


def test_a_dry_run_names_the_start_and_frozen_weights_cost_no_optimizer_state(started, start_folder):
    more = (*LOOP, "init.missing=allow", frozen([*HALF, *EXPERTS]), "init.old_lr_scale=0.1")
    run = started(*more, dry_run=True)
    said = describe(run)
    assert f"weights          {run.start.summary()}" in said
    assert said.count("it gets its initial values") == len(run.start.missing)
    assert "learning rate of its parameters x 0.1" in said
    with torch.device("meta"):
        own = dict(ZeroModel(run.model_config).named_parameters())
    trained = sum(p.numel() for name, p in own.items() if name not in run.start.frozen)
    assert run.start.counts["old"] + run.start.counts["new"] == trained
    parts = dict(re.findall(r"^  ([a-z]+) +([0-9,.]+) MB$", said, re.MULTILINE))
    assert float(parts["optimizer"]) == pytest.approx(12 * trained / 1e6, abs=0.051)
    assert float(parts["parameters"]) == pytest.approx(
        4 * sum(p.numel() for p in own.values()) / 1e6, abs=0.051
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_of_old_parameters_have_their_own_learning_rate(started, kind):
    run = started(*LOOP, "init.missing=allow", "init.old_lr_scale=0.25", frozen(["lm_head.*"]))
    model = ZeroModel(run.model_config)
    model.lm_head.weight.requires_grad_(False)
    optimizer = OptimizerConfig(kind=kind, lr=1.0, muon_lr=0.5, weight_decay=0.2)
    groups = parameter_groups(model, optimizer, run.start)
    plain = {id(p): g for g in parameter_groups(model, optimizer) for p in g["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(n for g in groups for p in g["params"] for n in [names[id(p)]]) == sorted(
        name for name in names.values() if name != "lm_head.weight"
    )
    for group in groups:
        for parameter in group["params"]:
            old = not names[id(parameter)].startswith("model.recurrence.0.")
            before = plain[id(parameter)]
            assert group.get("lr_scale", 1.0) == (0.25 if old else 1.0)
            assert group["lr"] == before["lr"] * group.get("lr_scale", 1.0)
            assert {k: v for k, v in before.items() if k not in ("name", "lr", "params")} == {
                k: v for k, v in group.items() if k not in ("name", "lr", "params", "lr_scale")
            }


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_size=48"], r"is \(.*32.*\), expected \(.*48.*\); leave the model's sizes to --init"),
        (["model.tie_word_embeddings=true"], r"lm_head.weight is \(.*\), expected no such tensor; leave the"),
        (LOOP, r"model\.recurrence\.0\..* is missing, expected \(.*init.missing=allow"),
        (["model.preset=nano"], "model.preset=nano and --init both give sizes"),
        (["init.missing=maybe"], "init.missing='maybe' is unknown; choose one of error, allow"),
        (["init.freeze=[a]"], "init.freeze is not a known key; did you mean 'frozen'"),
        (["init.frozen=lm_head"], "init.frozen='lm_head' is not a list"),
        (["init.old_lr_scale=0"], "init.old_lr_scale=0 must be above 0"),
        (
            ["init.frozen=[model.layer.*]"],
            r"'model\.layer\.\*' matches no parameter; the nearest are model\.lay",
        ),
        (
            ['init.frozen=["*"]'],
            r"init.frozen=\['\*'\] freezes all \d+ parameters, so that nothing is trained",
        ),
        (
            [*LOOP, "init.missing=allow", "init.frozen=[model.recurrence.*]"],
            "matches only parameters that --init lacks, which have to be trained",
        ),
        (["lora={}", "init.frozen=[lm_head.*]"], "do not go with lora, which freezes all weights of --init"),
        (["lora={}", "init.old_lr_scale=0.5"], "do not go with lora, which freezes all weights of --init"),
        (["init.frozen=[*.q_proj.*]"], "cannot be read: while scanning an alias; put quotes around"),
        (["model.vocab_size=77"], "model.vocab_size=77 is not the tokenizer's"),
    ],
)
def test_mistakes_are_one_line(started, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        started(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["missing=allow", "frozen=[a]", "old_lr_scale=0.5"])
def test_the_section_without_init_is_refused(started, key):
    with pytest.raises(ValueError, match=f"init.{key.split('=')[0]}=.* is about the weights of --init; give"):
        started(f"init.{key}", init=None)
    with pytest.raises(
        ValueError, match="lora freezes the weights .* give them with --init, or leave lora out"
    ):
        started("lora={}", init=None)


def test_experts_frozen_in_part_need_one_expert_parallel_rank(start_folder):
    found = find(start_folder, start_folder)
    config = load_pretrained(start_folder).config
    init = InitConfig(frozen=["*.experts.w1"])
    assert fit(*found, config, init, ep_size=1).frozen == ("model.layers.1.mlp.experts.w1",)
    with pytest.raises(
        ValueError, match=r"freezes .*\.w1 but not all of .*experts\.\*, which ep_size=2 cannot"
    ):
        fit(*found, config, init, ep_size=2)


def test_a_checkpoint_that_began_otherwise_is_refused(started, start_folder, tmp_path):
    state, folder = started().state, tmp_path / "step-1"
    other = replace(state.origin, sha256="0" * 64)
    for found, wanted, message in (
        (state, replace(state, origin=None), "began with given weights, but this run has no --init"),
        (replace(state, origin=None), state, "began with initial weights; leave --init out"),
        (replace(state, origin=other), state, "began with other weights .sha256 0000"),
        (
            replace(state, origin=replace(state.origin, old_lr_scale=0.5)),
            state,
            "init.old_lr_scale=0.5, this run has 1.0",
        ),
        (
            replace(state, origin=replace(state.origin, frozen=("lm_head.weight",))),
            state,
            "lm_head.weight is frozen in checkpoint .*use the same init.frozen",
        ),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            check_compatible(folder, found, wanted)
        assert "\n" not in str(caught.value)
    check_compatible(folder, state, state)


# How it trains


def check_reports(output: str, cases: list[dict[str, Any]]) -> None:
    reports = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("REPORT ")]
    assert [report["case"] for report in reports] == cases
    for report in reports:
        assert report["loss"] < 1e-5, report
        assert report["norm"] < 1e-5 or report["case"].get("kind") == "muon", report
        assert report["weights"] < 1e-4, report
        assert report["moved"] > 0.01, report
        assert report["frozen_unchanged"], report
        assert report["resumed"] < 1e-5, report  # under another layout
        assert report["resumed_weights"] < 1e-5, report
        assert report["resumed_averages"] < 1e-5, report


def case(
    stage: int, ep_size: int, globs: list[str], scale: float, resumed: dict[str, int], **more: Any
) -> Any:
    """`frozen_regex` says independently of patterns what is frozen."""
    parts = {EXPERTS[0]: r"layers\.1\.mlp\.experts", "*.experts.w1": r"experts\.w1$", "*": r"^(?!model\.rec)"}
    parts |= dict(zip(HALF, ("embed_tokens", r"layers\.0\.", "q_proj"), strict=True))
    regex = "|".join(parts[glob] for glob in globs)
    layout = {"stage": stage, "ep_size": ep_size, "resumed": resumed}
    return {**layout, "frozen": globs, "frozen_regex": regex, "scale": scale, **more}


def run_cases(launch, folder: Path, cases: list[dict[str, Any]]) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    check_reports(launch(2, WORKER, folder / "cases.json", folder).stdout, cases)


def test_two_ranks_train_as_one_plain_process_and_resume_under_another_layout(launch, tmp_path):
    cases = [
        case(3, 2, [*HALF, *EXPERTS], 0.1, {"stage": 1, "ep_size": 1}),
        case(2, 1, [], 0.2, {"stage": 3, "ep_size": 2}, kind="muon"),
    ]
    run_cases(launch, tmp_path, cases)


@pytest.mark.slow
def test_every_stage_and_ep_size(launch, tmp_path):
    cases = []
    for stage in (1, 2, 3):
        for ep_size in (1, 2):
            for number, globs in enumerate(([], EXPERTS, HALF, [*HALF, *EXPERTS], ["*"])):
                other = {"stage": 1 + (stage + number) % 3, "ep_size": 1 + (ep_size + number) % 2}
                cases.append(case(stage, ep_size, globs, (1.0, 0.1)[number % 2], other))
            muon = [*HALF, *EXPERTS] if ep_size == 2 else []
            cases.append(case(stage, ep_size, muon, 0.2, {"stage": 4 - stage}, kind="muon"))
        cases.append(case(stage, 1, ["*.experts.w1"], 0.2, {"stage": 4 - stage}))
    run_cases(launch, tmp_path, cases)


def command(init: Path, data: Path, run: Path, *overrides: str, ds_config: str = "zero2") -> list[str]:
    """With new, frozen and slower parameters, and their average."""
    return [
        *("pretrain/main.py", "--ds_config", f"ds_configs/{ds_config}.json", "--config", str(CONFIG)),
        *("--init", str(init), f"data.path={data}", f"output_dir={run}", *SMALL, *LOOP, "init.missing=allow"),
        *(frozen([*HALF, *EXPERTS]), "init.old_lr_scale=0.1", "optimizer.ema_decay=0.5", "save_every=1"),
        *("eval_every=0", "max_steps=6", *overrides),
    ]


def kill(begin, run: Path, call: list[str], step: int) -> str:
    launcher = begin(2, *call)
    wait_for_step(run, step, launcher)
    for process in [launcher.rank(number) for number in (0, 1)]:
        process.send_signal(signal.SIGKILL)
    said = finish(launcher, check=False).stdout
    unlink_buffer(launcher)
    assert not (run / "DONE").exists()
    return said


def test_a_killed_run_resumes_without_its_folder(
    begin, launch, start_folder, data_folder, tmp_path, monkeypatch
):
    """On one rank, after two: frozen weights and the folder's config are in the run's folder."""
    init, run = tmp_path / "init", tmp_path / "run"
    shutil.copytree(start_folder, init)
    said = kill(begin, run, command(init, data_folder, run, "ep_size=2", "max_steps=1000"), 3)
    assert said.count("it gets its initial values") > 3
    assert " of its parameters trained, " in said
    shutil.rmtree(init)
    assert json.loads((run / RECORD).read_text())["folder"] == str(init)
    steps = max(int(path.name[5:]) for path in run.glob("checkpoints/step-*")) + 3
    call = command(init, data_folder, run, f"max_steps={steps}", ds_config="zero3_ep")
    resumed = launch(1, *call).stdout
    assert "converted: world_size 2 -> 1, ep_size 2 -> 1, zero_stage 2 -> 3" in resumed
    assert "it gets its initial values" not in resumed
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert all(record["lr_old"] == pytest.approx(0.1 * record["lr"]) for record in records)
    loader = Loader(data_folder, 64, 4, 0, 0, 1, "train").batch(0)
    plain = ZeroModel(load_pretrained(run / "export").config)
    plain.load_state_dict(load_file(start_folder / WEIGHTS_NAME), strict=False)
    parts = (torch.from_numpy(part) for part in (loader.tokens, loader.targets, loader.cu_seqlens))
    tokens, targets, cu_seqlens = parts
    loss = plain(tokens.long(), targets=targets.long(), cu_seqlens=cu_seqlens).loss_sums["cross_entropy"]
    assert records[0]["loss"] == pytest.approx(loss.item() / records[0]["target_tokens"], rel=1e-5)
    start = load_file(start_folder / WEIGHTS_NAME)
    held = re.compile(r"embed_tokens|layers\.0\.|q_proj|layers\.1\.mlp\.experts")
    export_run(run, steps, tmp_path / "offline")
    for name in ("", "_ema"):
        ours = load_file(run / f"export{name}" / WEIGHTS_NAME)
        offline = load_file(tmp_path / f"offline{name}" / WEIGHTS_NAME)
        assert all(torch.equal(ours[n], offline[n]) for n in ours)
        for tensor, value in start.items():
            assert torch.equal(ours[tensor], value) == bool(held.search(tensor)), tensor
    shutil.move(run / BASE, run / "elsewhere")
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        FileNotFoundError, match=f"{init} is missing, and so is {run / BASE}, the copy of what"
    ):
        prepare(str(CONFIG), "ds_configs/zero3_ep.json", call[call.index("--init") + 2 :], init=init)


@pytest.mark.slow
@pytest.mark.parametrize("ds_config", ["zero1", "zero2", "zero3_ep"])
def test_a_killed_run_ends_like_an_undisturbed_one(
    begin, launch, start_folder, data_folder, tmp_path, ds_config
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = ("ep_size=2", "max_steps=8")
    launch(2, *command(start_folder, data_folder, whole, *options, ds_config=ds_config))
    call = command(start_folder, data_folder, run, *options, ds_config=ds_config)
    kill(begin, run, call, 3)
    assert "resuming from" in launch(2, *call).stdout
    for key in ("step", "loss", "grad_norm", "lr", "expert_load"):
        assert [r[key] for r in metrics(run)] == [r[key] for r in metrics(whole)], key
    for name in ("export", "export_ema"):
        ours, theirs = (load_file(folder / name / WEIGHTS_NAME) for folder in (run, whole))
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.slow
def test_lora_from_given_weights_in_plain_training(launch, start_folder, data_folder, tmp_path):
    """New parameters are trained in full, old ones adapted; the export is a plain model."""
    run = tmp_path / "run"
    call = ["pretrain/main.py", "--ds_config", "ds_configs/zero2.json", "--config", str(CONFIG)]
    call += ["--init", str(start_folder), f"data.path={data_folder}", f"output_dir={run}", *SMALL, *LOOP]
    call += ["init.missing=allow", "lora.r=4", "eval_every=0", "save_every=2", "optimizer.lr=1e-2"]
    launch(2, *call, "max_steps=2")
    assert "resuming from" in launch(2, *call, "max_steps=4").stdout
    ours, start = load_file(run / "export" / WEIGHTS_NAME), load_file(start_folder / WEIGHTS_NAME)
    model = load_pretrained(run / "export")
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    first = ZeroModel(model.config, seed=0).state_dict()
    for name in ours.keys() - start.keys():
        assert not torch.equal(ours[name], first[name]), name
    for name, value in start.items():
        if name in linears:
            assert 0 < torch.linalg.matrix_rank(ours[name] - value, atol=1e-4) <= 4, name
        elif not name.endswith("e_score_correction_bias"):
            assert torch.equal(ours[name], value), name
