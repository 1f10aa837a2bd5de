"""Any causal language model from a Hugging Face folder, with what a Scorer asks of a model.

transformers is imported only where such a folder is loaded: scores of our own exports do not need it. Weights
are read from safetensors only, and code of the folder is run with --trust_remote_code alone.

Shapes: B rows, T tokens of the longest row, V vocabulary.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.schema import as_type
from eval.scoring.hf_checks import check_folder, check_loaded, check_parameters, check_tokenizer, probe
from eval.scoring.inference import Depth, Engine, GenerateJob, ScoreJob, choose, pad, score_value
from model import ModelConfig, RecurrenceConfig
from model.hf.files import open_folder
from model.hf.remote.section import MODEL_TYPE, SECTION
from model.weight_files import unchanged

# lm-eval's names for the number of positions, and its default for a model without any of these.
LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
DEFAULT_LENGTH = 2048
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece")
UNBOUNDED = 10**9  # transformers writes a huge number for "no limit"


@dataclass(frozen=True)
class HFConfig:
    """The part of a ModelConfig that evaluation reads."""

    vocab_size: int
    max_position_embeddings: int
    recurrence: RecurrenceConfig = RecurrenceConfig()
    positions_per_token: int = 1
    num_memory_tokens: int = 0

    def decodes_exactly(self, num_steps: int) -> bool:
        """See ModelConfig.decodes_exactly: every row is read whole here."""
        return True


class HFTokenizer:
    """A tokenizer of transformers with the methods of data_pipeline.tokenization.tokenizer.Tokenizer.

    A context begins with `bos` where the tokenizer adds one by itself, as in lm-eval; `bos_id` is what a text
    without context follows: `bos`, or `eos` for a tokenizer without.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, folder: Path) -> None:
        """Raises ValueError if the tokenizer has ids outside the model's vocabulary, or no special token."""
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model vocab_size {vocab_size}: use the"
                " tokenizer that the model was trained with"
            )
        ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        if ids[:2] == [None, None]:
            raise ValueError(f"the tokenizer of {folder} has neither bos nor eos: name one in its files")
        self._tokenizer, self.vocab_size = tokenizer, vocab_size
        self.bos_id, self.eos_id = (next(i for i in order if i is not None) for order in (ids, ids[1::-1]))
        self.pad_id = self.eos_id if ids[2] is None else ids[2]
        self._adds_bos = ids[0] is not None and tokenizer("a")["input_ids"][:1] == ids[:1]
        digest = hashlib.sha256()
        for path in _tokenizer_files(folder):
            digest.update(path.name.encode() + path.read_bytes())
        self.sha256 = digest.hexdigest()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids; a text that begins with the spelled `bos` gets no second one."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        adds = bos and self._adds_bos and not text.startswith(self._tokenizer.bos_token)
        return [self.bos_id, *ids] if adds else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class HFModel(nn.Module):
    """The network of transformers, and the config that a Scorer reads.

    Raises:
        ValueError: the ends of a text are no ids.
    """

    def __init__(self, network: nn.Module, config: HFConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.accepts = set(inspect.signature(network.forward).parameters)
        ends = getattr(network.generation_config, "eos_token_id", None)
        ends = as_type(int | list[int] | None, ends, "generation_config.json: eos_token_id")
        self.eos_ids = set(ends if isinstance(ends, list) else [ends])

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int = 0,
        past_key_values: Any = None,
        depth: Depth = None,
    ) -> Any:
        """Tokens (B, T) and the mask of all tokens so far to the output of transformers, logits (B, T, V).

        Positions are counted as transformers' own generation does; a network that takes none counts itself.

        Args:
            depth: of a loop that this project exported, see Scorer.set_depth.
        """
        arguments: dict[str, Any] = {"logits_to_keep": logits_to_keep, **self._loop_arguments(depth)}
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        arguments["position_ids"] = positions[:, -tokens.shape[1] :]
        known = {name: value for name, value in arguments.items() if name in self.accepts}
        return self.network(
            input_ids=tokens,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **known,
        )

    def _loop_arguments(self, depth: Depth) -> dict[str, Any]:
        """Raises ValueError for a depth that the exported class has no argument for."""
        r = self.config.recurrence
        if r.placement == "none" or depth is None:
            return {}
        if isinstance(depth, int) and r.halting.kind == "threshold":
            raise ValueError(
                f"num_steps is {depth}, but this folder's loop halts by a threshold, which its class cannot "
                "switch off: score the export that it was made from, or leave num_steps out"
            )
        if isinstance(depth, int):
            return {"num_steps": depth}
        measure = "kl" if r.placement == "block" else "cosine"
        return {"exit_measure": measure} if r.halting.kind == "fixed" else {}


class HFEngine(Engine):
    """Computes batches with a network of transformers; every row is read whole."""

    model: Any
    tokenizer: Any

    def score(self, job: ScoreJob) -> list[tuple[Any, float | None]]:
        """See ScoreJob."""
        found: list[tuple[Any, float | None]] = []
        for start in range(0, len(job.rows), job.rows_at_once):
            members = job.rows[start : start + job.rows_at_once]
            rows = [[*job.prefix, *job.contexts[row.context], *row.tokens] for row in members]
            tokens, mask = pad(rows, self.device)
            starts = [len(row) - len(member.target) for row, member in zip(rows, members, strict=True)]
            kept = tokens.shape[1] - min(starts)  # the logits of whole prompts would fill the memory
            logits = self.model(tokens, mask, logits_to_keep=kept, depth=job.depth).logits[:, -kept:]
            for line, (first, member) in enumerate(zip(starts, members, strict=True)):
                at = first - min(starts)
                log_probs = logits[line, at : at + len(member.target)].float().log_softmax(-1)
                targets = torch.tensor(member.target, device=self.device)
                picked = log_probs.gather(-1, targets[:, None])[:, 0]
                found.append((score_value(picked, log_probs.argmax(-1) == targets), None))
        return found

    def generate(self, job: GenerateJob) -> list[tuple[Any, float | None]]:
        """See GenerateJob."""
        from transformers import DynamicCache

        draws, cache = self._draws(job), DynamicCache()
        tokens, mask = pad([[*job.prefix, *prompt] for prompt in job.prompts], self.device, left=True)
        new: list[list[int]] = [[] for _ in job.prompts]
        ended = set[int]()
        for n in range(job.max_new_tokens):
            out = self.model(tokens, mask, logits_to_keep=1, past_key_values=cache, depth=job.depth)
            logits = out.logits[:, -1]
            chosen = choose(logits, job.temperature, None if draws is None else draws[:, n])  # (B,)
            for row, token in enumerate(chosen.tolist()):
                if row not in ended:
                    new[row].append(token)
                    if self._ends(new[row], job.stop):
                        ended.add(row)
            if len(ended) == len(new):
                break
            tokens, mask = chosen[:, None], torch.cat((mask, mask.new_ones(len(new), 1)), 1)
        return [([ids, None], None) for ids in new]

    def _ends(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        return ids[-1] in self.model.eos_ids or super()._ends(ids, stop)


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.startswith(TOKENIZER_FILES) and p.is_file())


def is_hf_folder(folder: Path) -> bool:
    """Whether transformers wrote the folder's config.json; ours names no model_type."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # whatever it is, loading it as an export says what is wrong
    return isinstance(config, dict) and "model_type" in config


def load_hf_engine(folder: Path, device: torch.device, trust_remote_code: bool = False) -> HFEngine:
    """The folder's network, in the dtype of its weights as in lm-eval, and its tokenizer.

    On the meta device the network has no weights.

    Args:
        trust_remote_code: run the folder's own Python where it brings some; otherwise it is refused.

    Raises:
        ValueError, OSError: one line, without transformers and for a folder that transformers cannot load as
            a causal language model; whose weights are not all there, not all used, not finite or quantized;
            whose config.json describes a larger model; or whose tokenizer loses text.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"{folder} is a Hugging Face folder: pip install transformers ({error})") from None
    if not _tokenizer_files(folder):  # for some kinds transformers would make an empty one
        raise ValueError(f"{folder} has no tokenizer files: save the tokenizer there with save_pretrained")
    given = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with unchanged(*(path for path in folder.iterdir() if path.is_file())):
        stored = open_folder(folder).stored
        check_folder(folder, stored, trust_remote_code)
        with _one_line(folder, trust_remote_code):
            config = transformers.AutoConfig.from_pretrained(folder, **given)
            with torch.device("meta"):
                network = transformers.AutoModelForCausalLM.from_config(
                    config, trust_remote_code=trust_remote_code
                )
        check_parameters(folder, network, stored)
        with _one_line(folder, trust_remote_code):
            if device.type != "meta":
                # What does not fit is named by check_loaded, which refuses it.
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    folder,
                    use_safetensors=True,
                    dtype="auto",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **given,
                )
                network, info = loaded
        if device.type != "meta":
            check_loaded(folder, network, info)
        with _one_line(folder, trust_remote_code):
            if device.type != "meta":
                with torch.inference_mode():  # fails here if config.json contradicts itself
                    network(input_ids=torch.zeros(1, 2, dtype=torch.int64))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **given)
            back = probe(tokenizer)
            known = _hf_config(network.config.get_text_config(), tokenizer)
        check_tokenizer(folder, back)
    model = HFModel(network.to(device), known)
    return HFEngine(model, HFTokenizer(tokenizer, known.vocab_size, folder))  # type: ignore[arg-type]


@contextmanager
def _one_line(folder: Path, trust_remote_code: bool) -> Iterator[None]:
    """Turns the many kinds of errors of transformers and its parsers into a ValueError of one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust code under tokenizers is not an Exception
        reason = " ".join(str(error).split())
        fix = "save it there again with save_pretrained"
        if "trust_remote_code" in reason and not trust_remote_code:
            reason = "it needs Python code of its own, which is not run"
            fix = "if you have read that code and trust it, give --trust_remote_code"
        raise ValueError(
            f"{folder}: transformers cannot load it as a causal language model"
            f" ({type(error).__name__}: {reason[:300]}): {fix}"
        ) from error


def _hf_config(text: Any, tokenizer: Any) -> HFConfig:
    """From the config of the text model. Raises ValueError for impossible sizes."""
    lengths = [getattr(text, name) for name in LENGTHS if getattr(text, name, None)]
    if tokenizer.model_max_length < UNBOUNDED:
        lengths.append(tokenizer.model_max_length)
    sizes = {"vocab_size": text.vocab_size, "positions": (lengths or [DEFAULT_LENGTH])[0]}
    for name, size in sizes.items():
        if type(size) is not int or size < 2:
            raise ValueError(f"its {name} is {size!r}, not an integer of at least 2")
    return HFConfig(sizes["vocab_size"], sizes["positions"], _recurrence(text))


def _recurrence(text: Any) -> RecurrenceConfig:
    """The loop of a model that this project exported; other models have none."""
    if text.model_type != MODEL_TYPE:
        return RecurrenceConfig()
    return ModelConfig.from_stored(getattr(text, SECTION)).recurrence
