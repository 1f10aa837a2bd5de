"""Every group is a model at every shape: also with layers before and after the loop."""

import pytest

from experiments.groups import GROUPS, PAIRS, Shape, measured, merged, unequal
from model import ModelConfig

SIZES = {
    **{"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 2, "kv_lora_rank": 32, "v_head_dim": 32},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "use_moe": False, "intermediate_size": 176},
}
WHOLE = Shape(SIZES, layers=2, steps=4, sequence_length=50)  # the loop is the whole stack
MIDDLE = Shape(SIZES, layers=2, steps=4, sequence_length=50, prelude=1, coda=2)
LOOPED = (
    "loop",
    "adaptive",
    "threshold",
    "fixed",
    "random",
    "ut",
    "ut_act",
    "moe_core",
    "gated",
    "gated_act",
)


def config(shape: Shape, name: str) -> ModelConfig:
    return shape.config(GROUPS[name].build(shape))


def runs(model: ModelConfig) -> list[int]:
    return [model.runs_of_layer(i, model.recurrence.num_steps) for i in range(model.num_hidden_layers)]


@pytest.mark.parametrize("name", LOOPED)
def test_the_layers_of_the_loop_alone_are_looped(name):
    assert runs(config(WHOLE, name)) == [4, 4]
    assert runs(config(MIDDLE, name)) == [1, 4, 4, 1, 1]


@pytest.mark.parametrize("name", sorted(set(GROUPS) - {"dense_narrow"}))
def test_a_group_has_the_layers_of_its_shape(name):
    unrolled = name in ("dense_flops", "gated_dense_flops", "cot", "no_cot")
    assert config(MIDDLE, name).num_hidden_layers == (11 if unrolled else 5)


# Not training_flops, which holds at a budget: test_matrix.py.
OF_SIZES = [pair for pair in PAIRS if pair.equal != "training_flops"]


@pytest.mark.parametrize("pair", OF_SIZES, ids=lambda pair: f"{pair.a}-{pair.b}-{pair.equal}")
@pytest.mark.parametrize("shape", [WHOLE, MIDDLE], ids=["whole", "middle"])
def test_pairs_are_equal_where_the_loop_is_part_of_the_stack_too(shape, pair):
    values = [
        measured(pair.equal, config(shape, name), shape.sequence_length, tokens=1)
        for name in (pair.a, pair.b)
    ]
    assert unequal(pair, *values) is None


def test_pauses_and_memory_fit_the_shape():
    assert config(WHOLE, "pause").num_pause_tokens == 3
    assert config(MIDDLE, "pause").num_pause_tokens == 1  # 11 runs of 5 layers
    memory = config(WHOLE, "rmt")
    assert (memory.num_memory_tokens, memory.segment_length) == (4, 13)


def test_changes_of_a_section_keep_its_other_keys():
    base = {"a": 1, "recurrence": {"placement": "none", "halting": {"kind": "fixed", "threshold": 0.5}}}
    changes = {"b": 2, "recurrence": {"num_steps": 3, "halting": {"kind": "act"}}}
    whole = {"placement": "none", "num_steps": 3, "halting": {"kind": "act", "threshold": 0.5}}
    assert merged(base, changes) == {"a": 1, "b": 2, "recurrence": whole}
    assert base["recurrence"] == {"placement": "none", "halting": {"kind": "fixed", "threshold": 0.5}}
