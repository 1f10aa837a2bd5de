"""Peak memory of what reads and writes weights, in fresh processes, for a model of 300 million parameters."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model import ModelConfig
from model.export_files import saving_weights
from model.pretrained import shapes
from model.weight_files import Stored
from model.weight_writer import num_bytes

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "max_position_embeddings": 64,
    "intermediate_size": 2816,
    "use_mla": False,
    "use_moe": False,
}
MIXTURE = {
    "use_mla": True,
    "use_moe": True,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
    "first_k_dense_replace": 1,
}
CONSTANT = 150 * 10**6  # bytes beside the interpreter, the modules and the tensors
PEAK = """
import sys
from pathlib import Path
def high_water():
    [line] = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
import torch, model
from model.hf.__main__ import main as hf
from model.convert.__main__ import main as convert
before = high_water()
what, *arguments = sys.argv[1:]
if what == "load":
    model.load_pretrained(arguments[0])
elif what == "hf":
    sys.argv[1:] = arguments
    hf()
else:
    sys.argv[1:] = arguments
    convert()
print("\\n", before, high_water(), flush=True)
"""


def write_export(folder: Path, values: dict[str, object]) -> tuple[int, int]:
    """An export with weights of one value; bytes of all of them and of the largest."""
    config = ModelConfig.from_dict(values)
    stored = {name: Stored(shape, "F32") for name, shape in shapes(config).items()}
    with saving_weights(folder, config, stored) as writer:
        for name, tensor in stored.items():
            writer.write(name, torch.full((1,), 0.01).expand(tensor.shape))
    sizes = [num_bytes(tensor) for tensor in stored.values()]
    return sum(sizes), max(sizes)


def added(*arguments: object) -> int:
    """Bytes by which a command's peak exceeds what its modules take."""
    given: Sequence[str] = list(map(str, arguments))
    done = subprocess.run([sys.executable, "-c", PEAK, *given], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split("\n")[-2].split())
    return peak - before


@pytest.mark.slow
def test_commands_need_room_for_the_largest_tensor(tmp_path):
    total, largest = write_export(tmp_path / "dense", SIZES)
    write_export(tmp_path / "moe", SIZES | MIXTURE)
    assert total > 0.8 * 10**9
    found = {
        "load": added("load", tmp_path / "dense") - total,
        "export own": added("hf", "export", "--checkpoint", tmp_path / "dense", "--out", tmp_path / "own"),
        "import own": added("hf", "import", "--hf", tmp_path / "own", "--out", tmp_path / "back"),
        "export": added("hf", "export", "--checkpoint", tmp_path / "moe", "--out", tmp_path / "deepseek"),
        "import": added("hf", "import", "--hf", tmp_path / "deepseek", "--out", tmp_path / "back"),
        "loop": added(
            *("convert", "loop", "--core", "3-5", "--num_steps", 2),
            *("--checkpoint", tmp_path / "dense", "--out", tmp_path / "back"),
        ),
    }
    print(json.dumps(found, indent=1))
    for what, most in found.items():
        assert most <= largest + CONSTANT, what
