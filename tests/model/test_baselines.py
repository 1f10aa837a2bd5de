"""Pause tokens and recurrent memory against their definitions, computed by hand."""

import torch

from model.cache import LatentCache


def test_pause_tokens_are_a_longer_row_read_at_every_last_pause(build, tokens):
    paused, plain = build("pause"), build("deepseek", vocab_size=63)
    weights = {k: v for k, v in paused.state_dict().items() if "pause" not in k}
    table = torch.cat((weights["model.embed_tokens.weight"], paused.model.pause_tokens.weight))
    weights["model.embed_tokens.weight"] = table
    weights["lm_head.weight"] = torch.cat((weights["lm_head.weight"], torch.zeros(2, 24)))
    plain.load_state_dict(weights)
    row = torch.stack((tokens, torch.full_like(tokens, 61), torch.full_like(tokens, 62)), -1).flatten(1)
    expected = plain(row).logits[:, 2::3, :61]
    torch.testing.assert_close(paused(tokens).logits, expected, rtol=0, atol=2e-5)


def literal_memory_pass(model, document: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one document, segment by segment; a segment is an ordinary row of the network."""
    net, length = model.model, model.config.segment_length
    memory, logits = net.memory.initial.weight[None], []
    for start in range(0, len(document), length):
        part = document[None, start : start + length]
        x = torch.cat((memory, net.embed_tokens(part), memory), 1)
        context = model.attention_context(torch.zeros(x.shape[:2], dtype=torch.long))
        hidden = net(x, context).hidden
        logits.append(model.lm_head(hidden[0, 2:-2]))
        memory = hidden[:, -2:]
    return torch.cat(logits)


def test_recurrent_memory_equals_its_segments_run_one_by_one(build, tokens):
    model = build("memory")
    for row, found in zip(tokens, model(tokens).logits, strict=True):
        torch.testing.assert_close(found, literal_memory_pass(model, row), rtol=0, atol=2e-5)


def test_only_memory_passes_between_segments(build, tokens):
    model = build("memory")
    changed = tokens.clone()
    changed[:, 2] = changed[:, 2] % 60 + 1  # in the first segment of 5
    moved = (model(changed).logits - model(tokens).logits).abs().amax((0, 2))
    assert moved[:2].max() == 0
    assert moved[5:].min() > 1e-6  # through the memory alone
    cut = model.model.memory._read

    def forgetful(tokens, lengths, memory, embed, run):
        states = [
            cut(part, (lengths - first).clamp(min=0), memory, embed, run)[0]
            for first, part in zip(range(0, 17, 5), tokens.split(5, 1), strict=True)
        ]
        return torch.cat(states, 1), memory

    model.model.memory._read = forgetful
    moved = (model(changed).logits - model(tokens).logits).abs().amax((0, 2))
    assert moved[5:].max() == 0


def test_training_reads_as_many_segments_whatever_the_documents(build, tokens):
    model, calls = build("memory").train(), []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    for starts in ([[0, 17, 17, 17]] * 3, [[0, 2, 4, 17]] * 3):
        calls.clear()
        model(tokens, targets=tokens, cu_seqlens=torch.tensor(starts, dtype=torch.int32))
        assert len(calls) == 4  # 17 tokens in segments of 5


def test_a_cache_holds_the_memory_and_the_open_segment_only(build, tokens):
    model, cache = build("memory"), LatentCache()
    model(tokens, cache=cache)
    assert cache.numel() == 0
    assert cache.memory.memory.shape == (3, 2, 24)
    assert torch.equal(cache.memory.tokens, tokens[:, 15:])
