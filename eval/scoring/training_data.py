"""What a checkpoint says about the data it was trained on: was that text cleaned of the test problems?

`training_data.json` is next to config.json; pretrain/export.py writes it from the manifest of the build.
"""

import json
from pathlib import Path
from typing import Any

from common.schema import as_type
from model.export_files import TRAINING_DATA_NAME


def read_training_data(checkpoint: Path) -> dict[str, Any] | None:
    """The file's content; None for a checkpoint without one. Raises ValueError if it is damaged."""
    path = checkpoint / TRAINING_DATA_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        against, sources, sha256 = (
            found[key] for key in ("decontaminated_against", "sources", "manifest_sha256")
        )
        as_type(list[str], against, "decontaminated_against")
        as_type(str, sha256, "manifest_sha256")
        for name, source in as_type(dict[str, dict[str, Any]], sources, "sources").items():
            as_type(bool, source["decontaminated"], f"sources.{name}.decontaminated")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): export the checkpoint again") from None
    return dict(found)


def decontamination(found: dict[str, Any] | None) -> str:
    """One line: which sources of the training data were cleaned, of which files' problems."""
    if found is None:
        return "unknown: the checkpoint names no training data"
    done = {True: [], False: []}  # type: dict[bool, list[str]]
    for name, source in found["sources"].items():
        done[bool(source["decontaminated"])].append(name)
    if not done[True]:
        return f"none: {', '.join(done[False])} not cleaned of test problems"
    against = ", ".join(found["decontaminated_against"])
    line = f"{', '.join(done[True])} cleaned of the problems of {against}"
    return f"all: {line}" if not done[False] else f"in part: {line}; not {', '.join(done[False])}"
