"""Conversion to and from Hugging Face's formats: every model of ours both ways, other kinds for import.

python -m model.hf export --checkpoint runs/NAME/export --out DIR [--scores DIR] [--max_shard_size 5GB]
python -m model.hf import --hf DIR --out DIR
"""

import argparse
from pathlib import Path

from common.errors import user_errors
from model.hf.deepseek import export_folder, import_folder
from model.hf.shards import DEFAULT_SIZE, size_in_bytes


def main() -> None:
    """The command line, export and import; a user's mistake ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model.hf", description="Convert to and from Hugging Face's formats."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a folder that transformers loads")
    export.add_argument("--checkpoint", type=Path, required=True, help="export/ folder of a run")
    export.add_argument(
        "--scores",
        type=Path,
        help="folder of results_*.json for the model card; default: eval/ beside the checkpoint",
    )
    export.add_argument("--max_shard_size", default=DEFAULT_SIZE, help="weights in a file: 500MB, 5GB")
    read = commands.add_parser("import", help="read such a folder, or one of another kind")
    read.add_argument("--hf", type=Path, required=True, help="folder in the Hugging Face format")
    for command in (export, read):
        command.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    with user_errors(ValueError, OSError):
        if arguments.command == "export":
            limit = size_in_bytes(arguments.max_shard_size)
            form = f" {export_folder(arguments.checkpoint, arguments.out, limit, arguments.scores)}"
        else:
            import_folder(arguments.hf, arguments.out)
            form = ""
    print(f"wrote {arguments.out}{form}")


if __name__ == "__main__":
    main()
