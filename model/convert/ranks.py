"""Perplexity of a model after conversion to latent attention, by ranks: `python -m model.convert ranks`."""

import argparse
from dataclasses import asdict

from common.files import read_object, write_json
from common.locks import FolderLock
from model.convert.calibration import perplexity
from model.convert.mla import (
    add_calibration_arguments,
    calibration_texts,
    check_ranks,
    converted,
    full_latent,
    prepare,
    texts_record,
)
from model.pretrained import load_pretrained

FIX = "choose another --out"
HELP = "table of perplexity by the ranks that `mla` would be given; converts nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ranks`."""
    for name, what in (("kv_lora_rank", "latent's width"), ("qk_rope_head_dim", "rotated key's width")):
        parser.add_argument(f"--{name}", type=int, required=True, nargs="+", help=f"each {what} to try")
    add_calibration_arguments(parser)


def convert(arguments: argparse.Namespace) -> None:
    """Prints the table and writes it to the file --out.

    Each rotated width is tried with the full latent too, which shows what losing rotations costs alone.
    Latents above the full one are left out.

    Raises:
        ValueError, OSError: see model.convert.mla.convert.
    """
    checkpoint, out = arguments.checkpoint, arguments.out
    model = load_pretrained(checkpoint)
    if arguments.text is None:
        raise ValueError("ranks are compared by perplexity; give --text FILE")
    if out.suffix != ".json":
        raise ValueError(f"--out {out} must be the name of a .json file, for the table")
    if out.exists() and not (out.is_file() and "ranks" in read_object(out, FIX)):
        raise ValueError(f"--out {out} is not a table of ranks and would be overwritten; {FIX}")
    tried = []
    for R in arguments.qk_rope_head_dim:
        check_ranks(model.config, 1, R)
        full = full_latent(model.config, R)
        latents = sorted({width for width in arguments.kv_lora_rank if width < full} | {full})
        tried += [check_ranks(model.config, width, R) for width in latents]
    with FolderLock(out.parent, "a table of ranks", FIX, name=f".{out.name}.lock"):
        texts = calibration_texts(arguments, model)
        assert texts is not None
        before, prepared = perplexity(model, texts.evaluation), prepare(model, texts)
        print(f"perplexity on {before.tokens:,} tokens before conversion: {before}", flush=True)
        print(f"{'qk_rope_head_dim':>16}{'kv_lora_rank':>14}{'cache saved':>13}  perplexity")
        rows = []
        for ranks in tried:
            after = perplexity(converted(prepared, ranks)[0], texts.evaluation)
            rows.append({**asdict(ranks), "perplexity": after.to_dict()})
            print(
                f"{ranks.qk_rope_head_dim:>16}{ranks.kv_lora_rank:>14}{ranks.saving_percent:>12}%  {after}",
                flush=True,
            )
        record = {"source": str(checkpoint), **texts_record(arguments.text, texts)}
        write_json(out, {**record, "perplexity_before": before.to_dict(), "ranks": rows}, indent=2)
    print(f"wrote {out}")
