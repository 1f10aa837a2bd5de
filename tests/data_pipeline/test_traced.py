"""Documents with a chain of thought: their encoding, their sources, and real builds of them."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline import build as build_module
from data_pipeline.build import build, main
from data_pipeline.cleaning.cleaner import Cleaner
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
from data_pipeline.recipe import CleaningRecipe, Recipe, TokenizerRecipe, source_options
from data_pipeline.shards.format import IGNORE_INDEX
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.sources.documents import TracedDocument
from data_pipeline.sources.registry import read_documents
from data_pipeline.sources.traced import read_icot, read_prosqa, traced_gsm8k, traced_icot, traced_prosqa
from data_pipeline.staging.units import Unit, write_unit
from data_pipeline.tasks.causal_loop_v2 import execute, generate, split_of
from data_pipeline.tokenization.encode import encode_question, encode_traced, encoder
from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from data_pipeline.verify import verify

BOS, EOS, BOT, EOT, SEPARATOR = 2, 3, 4, 5, 38
LOOPS = {"name": "loops", "kind": "causal_loop_v2_traced", "weight": 1.0, "num_samples": 60,
         "depths": [1, 2], "statements": 4, "variables": 3}  # fmt: skip
TRAINED_ON = ["Every lempus is a yerpus. <<48/2=24>>\nAnswer: 24" * 5, "<bot> and <eot>\n" * 9]
# Texts that could be mistaken for what separates the parts.
tricky = st.lists(
    st.sampled_from([*" \n<>;|#a1é\u2581", "<bot>", "<eot>", "<0x20>", "\nAnswer: "]), max_size=9
).map("".join)
text = tricky | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
documents = st.builds(
    TracedDocument, text, st.lists(text.filter(bool), max_size=4).map(tuple), text.filter(bool)
)
FORGED = TracedDocument(
    "<bot> <eot>\nAnswer: 3", ("<bot>", " <0x20> ", "\nAnswer: 4", "<eot>"), " \nAnswer: 5"
)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TRAINED_ON, 330, request.param, thought_pieces=True))
    return Tokenizer(path)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(documents)
@example(FORGED)
@example(TracedDocument("", (), "x"))
def test_encoding_says_where_every_part_is(tokenizer, document):
    """Whatever the texts hold; decoding gives the text back."""
    tokens, prompt_length, labels = encode_traced(document, tokenizer)
    assert labels is None
    assert Counter(t for t in tokens if t in (BOS, EOS, BOT, EOT)) == {BOS: 1, EOS: 1, BOT: 1, EOT: 1}
    bot, eot = tokens.index(BOT), tokens.index(EOT)
    assert (tokens[0], tokens[-1], prompt_length) == (BOS, EOS, bot + 1)
    assert tokens[:prompt_length] == encode_question(document.question, tokenizer)
    assert tokenizer.decode(tokens[:bot]) == document.question
    answer = [*tokenizer.encode("\nAnswer:"), *tokenizer.encode(" " + document.answer)]
    assert tokens[eot + 1 : -1] == answer
    steps = _cut(tokens[bot + 1 : eot]) if document.steps else []
    assert tuple(map(tokenizer.decode, steps)) == document.steps
    assert tokenizer.decode(tokens[bot + 1 : eot]) == " ".join(document.steps)
    assert tokenizer.decode(tokens) == document.text


def _cut(chain: Sequence[int]) -> list[list[int]]:
    """The tokens of each step."""
    steps: list[list[int]] = [[]]
    for token in chain:
        if token == SEPARATOR:
            steps.append([])
        else:
            steps[-1].append(token)
    return steps


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(documents, min_size=1, max_size=5))
@example([FORGED, TracedDocument("q", (), "a"), FORGED])
def test_reading_keeps_every_document(tmp_path_factory, some):
    """Through the arrays of a unit, which know nothing of what the texts hold."""
    folder = tmp_path_factory.mktemp("unit") / "x-00000"
    write_unit(folder, some, {}, "0", 0.0, Cleaner((), CleaningRecipe(), Path()))
    unit = Unit(folder)
    assert [unit[i] for i in range(len(unit))] == some
    assert unit.documents["bytes"].tolist() == [len(document.text.encode()) for document in some]


def test_two_ways_to_ask_for_what_cannot_be(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"loops.*has mask_prompt.*remove it") as masked:
        encoder({**LOOPS, "mask_prompt": True}, False, tokenizer)(FORGED)
    with pytest.raises(DataError, match=r"no <bot> and <eot>.*tokenizer.thought_pieces: true") as without:
        build(Recipe("x", 0, 0.1, TokenizerRecipe(400, "bpe", 20_000), [LOOPS]), Path(), tmp_path / "out")
    assert "\n" not in f"{masked.value}{without.value}"


# ---- sources


def test_gsm8k_equations_are_those_of_icot(data_root, caplog):
    """The 500 problems of the published iCoT file are among GSM8K's, with the same equations and answers."""
    documents = list(traced_gsm8k(data_root / "gsm8k" / "train.jsonl"))
    assert len(documents) == 7378
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "95 of 7473 problems have no steps: left out"
    ]
    found = {_words(document.question): document for document in documents}
    published = list(traced_icot(data_root / "gsm8k_icot" / "valid.txt"))
    assert len(published) == 494
    for question, steps, answer in published:
        assert found[_words(question)][1:] == (steps, answer)


def _words(text: str) -> str:
    return " ".join(text.split())


def test_problems_for_evaluation(data_root):
    """Against the files themselves, read in the plainest way; a problem without steps is a problem."""
    for name, count in (("valid", 500), ("test", 1319)):
        path = data_root / "gsm8k_icot" / f"{name}.txt"
        lines = [re.split(r"\|\||#### ", line.rstrip("\n")) for line in path.read_text().splitlines()]
        problems = list(read_icot(path))
        assert [(p.prompt, p.target) for p in problems] == [(q, f" {a}") for q, _, a in lines]
        assert len({p.id for p in problems}) == count
    for name, count in (("valid", 300), ("test", 500)):
        path = data_root / "prosqa" / f"prosqa_{name}.json"
        rows = json.loads(path.read_text())
        problems = list(read_prosqa(path))
        assert [(p.prompt, p.target) for p in problems] == [(r["question"], f" {r['answer']}") for r in rows]
        assert len({p.id for p in problems}) == count
        traced = list(traced_prosqa(path))
        assert traced == [(r["question"], tuple(r["steps"]), r["answer"]) for r in rows]


def test_limits_count_what_is_left(tmp_path, caplog):
    """A problem without steps does not use up max_documents; what was read so far is counted."""
    lines = [
        "no steps?|| #### 1",
        "a?||<<1+1=2>> #### 2",
        "b?||<<1+2=3>> <<3*3=9>> #### 9",
        "c?||<<1=1>>#### 1",
    ]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    found = list(read_documents("icot", tmp_path, {"files": ["x.txt"], "max_documents": 2}))
    assert found == [("a?", ("<<1+1=2>>",), "2"), ("b?", ("<<1+2=3>>", "<<3*3=9>>"), "9")]
    assert "1 of 4 problems have no steps" in caplog.text
    found = list(read_documents("icot", tmp_path, {"files": ["x.txt"], "keep_last_step": False}))
    assert found == [("b?", ("<<1+2=3>>",), "9")]
    assert "3 of 4 problems have no steps" in caplog.text


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (traced_icot, "a?||<<1+1=2>> #### 2\nb? <<1=1>> #### 1", "line 2: not `question||"),
        (traced_icot, "a?||<<1+1=2>> 2\n", "line 1: not `question||"),
        (traced_icot, "a?||<<1+1=2>> so <<2=2>> #### 2\n", "line 1: not `question||"),
        (traced_icot, "\na?||<<1+1=2>> ####\n", "line 2: an empty question, step or answer"),
        (read_icot, "||<<1+1=2>> #### 2\n", "line 1: an empty question"),
        (traced_gsm8k, '{"question": "a?", "answer": "<<1+1=2>> 2"}', "line 1: its answer has no `#### v"),
        (traced_gsm8k, '\n{"question": "a?"}', "line 2: no field 'answer'"),
        (traced_prosqa, '{"question": 1}', "holds dict, not a list"),
        (traced_prosqa, '[{"question": "a?", "answer": "b"}]', "entry 1 has no field 'steps'"),
        (traced_prosqa, '[{"question": "a?", "answer": "b", "steps": [1]}]', "entry 1: steps are not a list"),
        (traced_prosqa, '[{"question": "a?", "answer": "b", "steps": [" "]}]', "entry 1: an empty quest"),
        (read_prosqa, "[5]", "entry 1 is not a JSON object"),
        (read_prosqa, '[\n"', "line 2: not JSON"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named(tmp_path, read, content, message):
    (tmp_path / "x.txt").write_text(content)
    with pytest.raises(DataError) as error:
        list(read(tmp_path / "x.txt"))
    assert str(error.value).startswith(f"{tmp_path / 'x.txt'}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_causal_loop_steps_are_the_program_run(tmp_path):
    """Every step against the interpreter, which shares nothing with the generator."""
    options = {"num_samples": 120, "depths": [1, 3, 4], "modulus": 13, "seed": 5, "split": "test"}
    found = list(read_documents("causal_loop_v2_traced", tmp_path, options))
    samples = list(generate(120, [1, 3, 4], modulus=13, seed=5, split="test"))
    for (question, steps, answer), sample in zip(found, samples, strict=True):
        program, variable = question.split("?")
        assert (program, split_of(program)) == (sample.program, "test")
        assert int(answer) == execute(program, 13)[variable]
        statements = [step.split(":")[0] for step in steps]
        start = program.removesuffix("".join(statements))
        assert len(start) < len(program)
        for i, step in enumerate(steps):
            target, (read, result) = step[0], step.split(":")[1].split("=")
            before = execute(start + "".join(statements[:i]), 13)
            after = execute(start + "".join(statements[: i + 1]), 13)
            assert result == f"{target}{after[target]}"
            reads = re.findall("[A-Z]|[0-9]+", statements[i][2:])
            assert [int(value) for value in read.split(",")] == _values(reads, before, statements[i][1])


def _values(reads: Sequence[str], state: dict[str, int], operator: str) -> list[int]:
    """`n` and `e` read their last operand only. Two numbers never stand side by side, so they part well."""
    values = [state[name] if name.isalpha() else int(name) for name in reads]
    return values[-1:] if operator in "ne" else values


# ---- builds


@pytest.fixture(scope="module")
def built(tmp_path_factory, data_root) -> tuple[Path, list[dict]]:
    files = {"icot": ["gsm8k_icot/valid.txt"], "prosqa": ["prosqa/prosqa_valid.json"]}
    sources = [LOOPS]
    sources += [{"name": kind, "kind": kind, "weight": 1.0, "max_documents": 60, "files": names}
                for kind, names in files.items()]  # fmt: skip
    sources += [{"name": "gsm8k", "kind": "gsm8k_equations", "weight": 1.0, "max_documents": 60}]
    recipe = Recipe("traced", 1, 0.1, TokenizerRecipe(600, "bpe", 60_000, thought_pieces=True), sources)
    out = tmp_path_factory.mktemp("traced") / "out"
    build(recipe, data_root, out)
    return out, sources


def test_a_build_gives_every_document_back(built, data_root):
    out, sources = built
    manifest = verify(out).manifest
    assert manifest.recipe["tokenizer"]["thought_pieces"] is True
    tokenizer = Tokenizer(manifest.tokenizer_path)
    for source in sources:
        found = []
        for split in ("train", "validation"):
            stream = TokenStream(manifest, source["name"], split)
            starts = stream.document_starts.tolist()
            parts = [stream.read(a, b).tolist() for a, b in zip(starts, starts[1:], strict=False)]
            found += [_document(tokenizer, tokens) for tokens in parts]
        published = read_documents(source["kind"], data_root, source_options(source))
        assert sorted(found) == sorted(published)
        assert len(found) == 60


def _document(tokenizer: Tokenizer, tokens: list[int]) -> TracedDocument:
    """By plain cuts at the ids."""
    bot, eot = tokens.index(BOT), tokens.index(EOT)
    prefix, answer = tokenizer.decode(tokens[eot:]).split(": ", 1)
    assert prefix == "\nAnswer"
    return TracedDocument(
        tokenizer.decode(tokens[:bot]), tuple(map(tokenizer.decode, _cut(tokens[bot + 1 : eot]))), answer
    )


def test_the_loss_begins_behind_bot(built):
    """In the batches of the loader, token by token."""
    out, sources = built
    loader = Loader(out, 512, 8, 0, packing="best_fit")
    seen: Counter[str] = Counter()
    for step in range(3):
        batch = loader.batch(step)
        for row, (source, _) in enumerate(batch.sample_ids):
            starts = [s for s in batch.cu_seqlens[row].tolist() if s < batch.lengths[row]]
            for start, stop in zip(starts, [*starts[1:], int(batch.lengths[row])], strict=True):
                tokens, targets = batch.tokens[row, start:stop].tolist(), batch.targets[row, start:stop]
                bot = tokens.index(BOT)
                assert (tokens[0], tokens[-1]) == (BOS, EOS)
                assert targets.tolist() == [IGNORE_INDEX] * bot + tokens[bot + 1 :] + [IGNORE_INDEX]
                seen[source] += 1
    assert set(seen) == {source["name"] for source in sources}


def test_recipe_of_causal_loops(tmp_path, capsys):
    """One token a character in the question and the steps, every piece used, at most 69 tokens."""
    recipe = Path(build_module.__file__).parent / "recipes" / "distill_causal_loop.yaml"
    main(["--recipe", str(recipe), "--out", str(tmp_path / "out"), "sources.0.num_samples=800"])
    assert "vocabulary: 287 pieces" in capsys.readouterr().out
    manifest = verify(tmp_path / "out").manifest
    tokenizer = Tokenizer(manifest.tokenizer_path)
    stream = TokenStream(manifest, "causal_loop", "train")
    ids = set(stream.read(0, stream.tokens).tolist())
    assert ids == {BOS, EOS, BOT, EOT, SEPARATOR, *range(262, 287)}
    assert all(len(tokenizer.decode([token])) == 1 for token in ids - {BOS, EOS, BOT, EOT})
    assert np.diff(stream.document_starts).max() == 69


def test_recipe_of_gsm8k(tmp_path, data_root, caplog):
    recipe = Path(build_module.__file__).parent / "recipes" / "distill_gsm8k.yaml"
    overrides = ["sources.0.max_documents=150", "sources.0.cleaning=[]", "tokenizer.vocab_size=800"]
    main(["--recipe", str(recipe), "--data", str(data_root), "--out", str(tmp_path / "out"), *overrides])
    splits = verify(tmp_path / "out").manifest.sources["gsm8k"].splits
    assert sum(split.documents for split in splits.values()) == 150


def test_builds_without_the_switch_are_what_they_were(tmp_path):
    """The hash of recipe and input, the manifest and the tokenizer (sentencepiece 0.2.3), as of 509294f."""
    hops = {"name": "hops", "kind": "p_hop", "weight": 1.0, "num_samples": 50, "length": 9, "hops": 2}
    recipe = Recipe("labels", 1, 0.1, TokenizerRecipe(400, "bpe", 20_000), [hops])
    manifest = build(recipe, Path(), tmp_path / "out")
    assert manifest is not None
    assert manifest.build_hash == "e29413e8340dfeae9e6463037677be50350954c4694117fef4ec83b413d7f417"
    assert manifest.tokenizer_sha256 == "20874c6cbc9f0a3d0b62c25a47c0339ee83e218941f890cb83f72332a21a94f8"
    assert manifest.sha256 == "8db9ec244b8c22f0a299eb8164217e3ea47f040e70a06035847e0c057be5680f"
