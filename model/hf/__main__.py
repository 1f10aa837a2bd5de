"""Conversion to and from Hugging Face's formats: DeepseekV3 both ways, GPT-2 and Llama for import.

python -m model.hf export --checkpoint runs/NAME/export --out DIR
python -m model.hf import --hf DIR --out DIR
"""

import argparse
from pathlib import Path

from common.errors import user_errors
from model.hf.deepseek import export_folder, import_folder


def main() -> None:
    """The command line, export and import; a user's mistake ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Convert to and from Hugging Face's DeepseekV3 format.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a folder that transformers and vLLM read")
    export.add_argument("--checkpoint", type=Path, required=True, help="export/ folder of a run")
    read = commands.add_parser("import", help="read such a folder, or one of GPT-2 or Llama")
    read.add_argument("--hf", type=Path, required=True, help="folder in the Hugging Face format")
    for command in (export, read):
        command.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    with user_errors(ValueError, OSError):
        if arguments.command == "export":
            export_folder(arguments.checkpoint, arguments.out)
        else:
            import_folder(arguments.hf, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
