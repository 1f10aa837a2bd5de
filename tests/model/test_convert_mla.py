"""model/convert: plain attention to latent attention, against brute force over random inputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from model import ModelConfig, ZeroModel, load_pretrained
from model.convert.__main__ import main
from model.convert.calibration import Texts, perplexity
from model.convert.latent import (
    KEY_WEIGHT,
    affine,
    choose_pairs,
    latent_config,
    latent_weights,
    rotated_keys,
)
from model.convert.mla import check_ranks, converted, prepare
from model.convert.moments import Moments, attention_layers, measured
from model.layers import attention_scale, rotate, rotations

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 26,
    "num_hidden_layers": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "use_mla": False,
    "use_moe": False,
    "intermediate_size": 40,
    "n_routed_experts": 4,
    "moe_intermediate_size": 9,
}
WIDTH = 24  # of all keys
SOURCES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}
    },
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "yarn": {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn_temperatures": {
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
        }
    },
    "one_key_head": {"num_key_value_heads": 1, "head_dim": 24},
    "all_key_heads": {"num_attention_heads": 3},
    "experts_in_a_loop": {
        "use_moe": True,
        "qkv_bias": True,
        "recurrence": {"placement": "block", "ranges": [[1, 1]], "num_steps": 3},
    },
    "units": {"recurrence": {"placement": "post_attention", "num_steps": 2}},
    "norms_without_scale": {"rms_norm_affine": False, "hidden_act": "relu2"},
    "multi_token": {"use_moe": True, "num_nextn_predict_layers": 1},
}


def source(seed: int = 0, **changes: Any) -> ZeroModel:
    model = ZeroModel(ModelConfig.from_dict({**SMALL, **changes}), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for layer in attention_layers(model).values():  # biases start at 0
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
            if projection.bias is not None:
                projection.bias.data = torch.randn(projection.bias.shape, generator=generator)
    return model


def windows(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(0, 61, (rows, length + 1), generator=torch.Generator().manual_seed(1))


def change(model: ZeroModel, kv_lora_rank: int, qk_rope_head_dim: int, texts: Texts | None) -> ZeroModel:
    ranks = check_ranks(model.config, kv_lora_rank, qk_rope_head_dim)
    return converted(prepare(model, texts), ranks)[0]


def furthest(model: ZeroModel, new: ZeroModel) -> float:
    tokens = windows()
    with torch.no_grad():
        return float((model(tokens).logits - new(tokens).logits).abs().max())


@pytest.mark.parametrize("with_texts", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_full_rank_gives_the_same_logits(kind, with_texts):
    model = source(**SOURCES[kind])
    new = change(model, WIDTH, WIDTH, Texts(windows(), windows()) if with_texts else None)
    assert furthest(model, new) < 1e-4
    half = change(model, WIDTH // 2, WIDTH, None)
    assert furthest(model, half) > 1e-2  # the logits do depend on what was converted


def test_the_converted_model_decodes_and_drafts_as_the_original_does():
    model = source(**SOURCES["qwen2"])
    new = change(model, WIDTH, WIDTH, None)
    prompt = windows(2, 5)
    assert new.generate(prompt, 12).tolist() == model.generate(prompt, 12).tolist()
    model = source(**SOURCES["multi_token"])
    new, targets = change(model, WIDTH, WIDTH, None), windows()[:, 1:]
    mtp = [float(m(windows()[:, :-1], targets=targets).loss_sums["mtp"].detach()) for m in (model, new)]
    assert mtp[0] == pytest.approx(mtp[1], rel=1e-5)


def test_keys_that_are_turned_and_scaled_copies_need_one_pseudo_head():
    model = source(qkv_bias=True)
    for layer in attention_layers(model).values():
        first = torch.view_as_complex(affine(layer.k_proj)[:8].view(4, 2, -1).mT.contiguous())
        heads = [first * factor for factor in (1.0, 0.5 + 2.0j, -0.3j)]
        rows = torch.cat([torch.view_as_real(head).mT.flatten(0, 1) for head in heads]).float()
        layer.k_proj.weight.data, layer.k_proj.bias.data = rows[:, :-1].contiguous(), rows[:, -1].contiguous()
    new = change(model, WIDTH, 8, None)
    assert new.config.rope_pairs == [0, 1, 2, 3]
    assert furthest(model, new) < 1e-4


def test_values_of_low_rank_need_a_small_latent():
    model = source()
    for layer in attention_layers(model).values():
        narrow = torch.randn(WIDTH, 5, generator=torch.Generator().manual_seed(2)) @ torch.randn(5, 26)
        layer.v_proj.weight.data = 0.3 * narrow
    assert furthest(model, change(model, 5, WIDTH, None)) < 1e-4
    assert furthest(model, change(model, 4, WIDTH, None)) > 1e-2


def inputs(n: int) -> Tensor:
    """(n, D+1) random [x; 1] whose mean is not 0."""
    x = torch.randn(n, 26, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    return torch.cat((x, x.new_ones(n, 1)), 1)


def test_what_a_lost_rotation_costs_is_the_mean_square_over_all_distances():
    """Brute force: every pair of inputs as query and key at every distance, rotated and not."""
    model = source(qkv_bias=True, **SOURCES["yarn"])
    layer, T, rows = attention_layers(model)["model.layers.0.self_attn"], 5, inputs(30)
    distances = torch.arange(1.0, T + 1, dtype=torch.float64) / 15
    moment = rows.T @ rows / len(rows)
    keys = rotated_keys(layer, Moments(moment, moment, distances))
    turn = torch.view_as_complex(rotations(torch.arange(T)[None], model.config))[0].to(torch.complex128)
    query = torch.view_as_complex((rows @ affine(layer.q_proj).T).view(-1, 6, 4, 2))
    query = query[:, :, None] * keys.mixing.conj().permute(1, 2, 0).repeat_interleave(2, 0)  # (m, H, G, P)
    key = torch.einsum("pgc,nc->ngp", keys.keys, rows.to(torch.complex128))
    turned = torch.einsum("mhgp,ngp,tp->mnthgp", query.conj(), key, turn[0] * turn.conj())
    fixed = torch.einsum("mhgp,ngp,p->mnhgp", query.conj(), key, keys.mean_rotation)
    for found, product in ((keys.energy, turned), (keys.loss, turned - fixed[:, :, None])):
        squares = product.abs().square().mean((0, 1)).sum(1)
        expected = torch.einsum("tgp,t->pg", squares, distances)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-9)  # damping


def test_the_latent_is_the_best_of_its_width_for_scores_and_output():
    """Brute force over inputs: the errors' mean squares, and those of another approximation of equal rank."""
    model = source(qkv_bias=True)
    layer, rows, C, R = attention_layers(model)["model.layers.0.self_attn"], inputs(300), 9, 8
    moment = rows.T @ rows / len(rows)
    moments = Moments(moment, moment, torch.full((4,), 0.25, dtype=torch.float64))
    keys = rotated_keys(layer, moments)
    pairs = choose_pairs([keys.loss], R)
    query = (rows @ affine(layer.q_proj).T).view(-1, 6, 8)
    out = layer.o_proj.weight.detach().double().view(26, 6, 8)

    def key_value(width: int) -> tuple[Tensor, float]:
        config = latent_config(model.config, width, pairs)
        weights, kept = latent_weights(layer, keys, moments, config)
        down = torch.cat(
            (weights["kv_a_proj_with_mqa.weight"], weights["kv_a_proj_with_mqa.bias"][:, None]), 1
        )
        return weights["kv_b_proj.weight"] @ down[:width], kept

    def cost(error: Tensor) -> float:
        """Of errors in [k; v], as shares of the energy of all keys' scores and of the output."""
        both = torch.stack((error, plain)) @ rows.T  # (2, H 16, n)
        key, value = both.mT.unflatten(2, (6, 16)).split(8, -1)
        scores = torch.einsum("mhd,bnhd->bmnh", query, key).square().sum((1, 2, 3))
        output = torch.einsum("ohd,bnhd->bnho", out, value).square().sum((1, 2, 3))
        return float(KEY_WEIGHT * scores[0] / scores[1] + output[0] / output[1])

    plain_parts = (affine(p).view(3, 8, -1).repeat_interleave(2, 0) for p in (layer.k_proj, layer.v_proj))
    plain = torch.cat(tuple(plain_parts), 1).flatten(0, 1)
    whole, everything = key_value(27)
    assert everything == pytest.approx(1.0)
    near, kept = key_value(C)
    lost = cost(whole - near)
    assert lost / cost(whole) == pytest.approx(1 - kept, rel=0.02)
    assert 0.02 < 1 - kept < 0.5
    u, s, v = torch.linalg.svd(whole)
    assert cost(whole - (u[:, :C] * s[:C]) @ v[:C]) > 1.1 * lost


def test_the_pairs_that_lose_most_stay_rotated():
    first, second = torch.tensor([[5.0, 1.0], [4.0, 2.0]]), torch.tensor([[0.5, 0.1], [0.1, 3.0]])
    assert choose_pairs([first, second], 4) == [0, 1]
    assert choose_pairs([first, second], 6) == [0, 1, 1]


def test_moments_are_those_of_what_a_layer_reads():
    """Every loop step counts; attention to the first token does not."""
    model = source(**SOURCES["experts_in_a_loop"])
    layer = attention_layers(model)["model.layers.1.self_attn"]
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    found = measured(model, windows())["model.layers.1.self_attn"]
    handle.remove()
    assert len(seen) == 3 * 3  # windows x steps
    distances, attended, everything = torch.zeros(17), torch.zeros(27, 27), torch.zeros(27, 27)
    turn = rotations(torch.arange(17)[None], model.config)
    for x in seen:
        rows = torch.cat((x[0], x.new_ones(17, 1)), 1)
        everything += rows.T @ rows
        query, key = (rotate(p(x).view(1, 17, -1, 8), turn)[0].detach() for p in (layer.q_proj, layer.k_proj))
        for head in range(6):
            for t in range(17):
                scores = key[: t + 1, head // 2] @ query[t, head] * attention_scale(model.config)
                for s, weight in enumerate(scores.softmax(0)):
                    distances[t - s] += weight if s else 0.0
                    attended += weight * rows[s, :, None] * rows[s]
    for got, expected in (
        (found.distances[:17], distances / distances.sum()),
        (found.inputs, everything / (9 * 17)),
        (found.attended, attended / (9 * 17 * 6)),
    ):
        torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5)


TEXT = "the cat sat on the mat, and 0123456789 dogs ran. " * 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("convert") / "export"
    tokenizer = train_tokenizer([TEXT], 320)
    source(vocab_size=320).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "training_data.json").write_text("{}")
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def command(checkpoint: Path, out: Path, *options: str, C: int = 16, R: int = 12) -> list[str]:
    ranks = ["--kv_lora_rank", str(C), "--qk_rope_head_dim", str(R)]
    return ["mla", "--checkpoint", str(checkpoint), "--out", str(out), *ranks, *options]


def texts(checkpoint: Path, calibration: int = 200, evaluation: int = 150) -> list[str]:
    text = str(checkpoint.parent / "text.txt")
    amounts = ["--calibration_tokens", str(calibration), "--evaluation_tokens", str(evaluation)]
    return ["--text", text, *amounts]


def test_the_command_writes_an_export_and_what_it_measured(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    main(command(checkpoint, out, *texts(checkpoint)))
    model, new = load_pretrained(checkpoint), load_pretrained(out)
    assert new.config.use_mla
    assert (new.config.kv_lora_rank, new.config.qk_rope_head_dim) == (16, 12)
    for name in ("tokenizer.model", "training_data.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    (record,) = json.loads((out / "conversion.json").read_text())["conversions"]
    assert record["rope_pairs"] == new.config.rope_pairs
    assert (record["cached_before"], record["cached_after"], record["saving_percent"]) == (48, 28, 41.7)
    assert list(record["energy_kept"]) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert record["calibration_tokens"] == 4 * 48  # whole windows
    read = read_windows(checkpoint)
    for name, tested in (("before", model), ("after", new)):
        assert record[f"perplexity_{name}"] == perplexity(tested, read).to_dict()
        assert record[f"perplexity_{name}"]["tokens"] == 3 * 48
    assert "96 numbers per token before, 56 after, 41.7% saved" in capsys.readouterr().out


def read_windows(checkpoint: Path) -> Tensor:
    """The evaluation windows: after four for calibration, three of 48 tokens, each after <s>."""
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    ids = tokenizer.encode(TEXT)[4 * 48 : 7 * 48]
    return torch.tensor([[tokenizer.bos_id, *ids[i : i + 48]] for i in range(0, len(ids), 48)])


def test_perplexity_is_that_of_all_predictions(checkpoint):
    model, rows = load_pretrained(checkpoint), read_windows(checkpoint)
    with torch.no_grad():
        logs = model(rows[:, :-1]).logits.log_softmax(-1).gather(-1, rows[:, 1:, None])
    found = perplexity(model, rows)
    assert found.perplexity == pytest.approx(float((-logs.mean()).exp()), rel=1e-5)
    assert found.tokens == rows[:, 1:].numel()


def test_a_table_of_ranks_equals_the_conversions(checkpoint, tmp_path, capsys):
    file = tmp_path / "ranks.json"
    main(
        ["ranks", "--checkpoint", str(checkpoint), "--out", str(file), *texts(checkpoint)]
        + ["--kv_lora_rank", "16", "26", "--qk_rope_head_dim", "12", "24"]
    )
    rows = json.loads(file.read_text())["ranks"]
    tried = [(row["qk_rope_head_dim"], row["kv_lora_rank"]) for row in rows]
    assert tried == [(12, 16), (12, 26), (24, 16), (24, 24)]
    main(command(checkpoint, tmp_path / "out", *texts(checkpoint)))
    (record,) = json.loads((tmp_path / "out/conversion.json").read_text())["conversions"]
    assert record["perplexity_after"] == rows[0]["perplexity"]
    assert rows[3]["perplexity"]["perplexity"] == pytest.approx(
        record["perplexity_before"]["perplexity"], rel=1e-4
    )


def test_without_texts_the_weights_decide(checkpoint, tmp_path, capsys):
    (tmp_path / "earlier").mkdir()
    source(vocab_size=320).save_pretrained(tmp_path / "earlier")
    (tmp_path / "earlier/conversion.json").write_text('{"conversions": [{"command": "loop"}]}')
    main(command(tmp_path / "earlier", tmp_path / "out"))
    assert "note: without --text" in capsys.readouterr().err
    earlier, record = json.loads((tmp_path / "out/conversion.json").read_text())["conversions"]
    assert (earlier["command"], record["command"]) == ("loop", "mla")
    assert "perplexity_before" not in record
    assert not (tmp_path / "out/tokenizer.model").exists()
    assert load_pretrained(tmp_path / "out").config.use_mla


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"R": 7}, "--qk_rope_head_dim=7 must be even"),
        ({"R": 0}, "--qk_rope_head_dim=0 must be at least 1"),
        ({"R": 26}, "--qk_rope_head_dim=26 is above 24, the width of all keys"),
        ({"R": 24, "C": 25}, "--kv_lora_rank=25 is above 24"),
        ({"R": 4, "C": 27}, "--kv_lora_rank=27 is above 26"),
        ({"C": -1}, "--kv_lora_rank=-1 must be at least 1"),
    ],
)
def test_a_rank_that_does_not_exist_is_refused(checkpoint, tmp_path, capsys, ranks, message):
    assert message in refusal(capsys, command(checkpoint, tmp_path / "out", **ranks))
    assert not (tmp_path / "out").exists()


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mla": True, "num_key_value_heads": None, "head_dim": None}, "has latent attention already"),
        ({"qk_norm": True}, "qk_norm=true"),
        ({"position_embedding": "learned"}, "position_embedding=learned"),
        ({"norm": "layer_norm"}, "norm=layer_norm"),
        ({"use_bias": True, "hidden_act": "relu2"}, "use_bias=true"),
        (
            {"recurrence": {"placement": "post_attention", "query_conditioned": True}},
            "recurrence.query_conditioned=true",
        ),
    ],
)
def test_a_model_that_latent_attention_cannot_express_is_refused(tmp_path, capsys, changes, message):
    source(**changes).save_pretrained(tmp_path / "model")
    assert message in refusal(capsys, command(tmp_path / "model", tmp_path / "out"))


def no_tokenizer(checkpoint: Path, tmp_path: Path) -> list[str]:
    source(vocab_size=320).save_pretrained(tmp_path / "bare")
    return command(tmp_path / "bare", tmp_path / "out", *texts(checkpoint))


def wide_tokenizer(checkpoint: Path, tmp_path: Path) -> list[str]:
    source(vocab_size=270).save_pretrained(tmp_path / "narrow")
    (tmp_path / "narrow/tokenizer.model").write_bytes((checkpoint / "tokenizer.model").read_bytes())
    return command(tmp_path / "narrow", tmp_path / "out", *texts(checkpoint))


def other_kind(checkpoint: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "llama"}')
    return command(checkpoint, tmp_path / "hf")


def bad_bytes(checkpoint: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    return command(checkpoint, tmp_path / "out", "--text", str(tmp_path / "bytes"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda c, t: command(c, c), "is the checkpoint itself"),
        (lambda c, t: command(t / "nothing", t / "out"), "config.json is missing"),
        (lambda c, t: command(c, t / "out", "--text", str(t / "no.txt")), "no.txt: No such file"),
        (lambda c, t: command(c, t / "out", *texts(c, evaluation=10**6)), "are needed in windows of 48"),
        (lambda c, t: command(c, t / "out", *texts(c, calibration=0)), "--calibration_tokens=0 must be at"),
        (lambda c, t: command(c, t / "out", *texts(c, evaluation=0)), "--evaluation_tokens=0 must be at"),
        (no_tokenizer, "has no tokenizer.model"),
        (wide_tokenizer, "but the model only vocab_size=270"),
        (other_kind, "is a Hugging Face folder"),
        (bad_bytes, "is not UTF-8 text (byte 3)"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Callable[[Path, Path], list[str]],
    message: str,
) -> None:
    assert message in refusal(capsys, arguments(checkpoint, tmp_path))
