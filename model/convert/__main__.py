"""Converts a trained model into another form.

python -m model.convert mla --checkpoint runs/NAME/export --out DIR --kv_lora_rank 128 --qk_rope_head_dim 64
python -m model.convert loop --checkpoint runs/NAME/export --out DIR --core 4-7 --num_steps 2
python -m model.convert unit --checkpoint runs/NAME/export --out DIR --placement kv --num_steps 2
python -m model.convert moe --checkpoint DIR --out DIR --n_routed_experts 4 --num_experts_per_tok 2
"""

import argparse
from pathlib import Path
from typing import Protocol

from common.errors import user_errors
from model.convert import loop, mla, moe, ranks, unit


class Command(Protocol):
    """What a module in COMMANDS offers."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds its own options; --checkpoint and --out are there."""

    def convert(self, arguments: argparse.Namespace) -> None:
        """Runs the command.

        Raises:
            ValueError, OSError: the user's mistakes, one line each.
        """


COMMANDS: dict[str, Command] = {"mla": mla, "ranks": ranks, "loop": loop, "unit": unit, "moe": moe}


_OUT = {"ranks": "file of JSON to write"}


def main(argv: list[str] | None = None) -> None:
    """The command line; a user's mistake ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model.convert", description="Convert a trained model into another form."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.HELP, description=command.HELP)
        own.add_argument("--checkpoint", type=Path, required=True, help="export/ folder to read")
        own.add_argument("--out", type=Path, required=True, help=_OUT.get(name, "folder to write"))
        command.add_arguments(own)
    arguments = parser.parse_args(argv)
    with user_errors(ValueError, OSError):
        COMMANDS[arguments.command].convert(arguments)


if __name__ == "__main__":
    main()
