"""The sizes of files of weights, as a user writes them."""

import re

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
DEFAULT_SIZE = "5GB"


def size_in_bytes(text: str) -> int:
    """`500MB` -> 500,000,000, in transformers' units.

    Raises:
        ValueError: another form.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})(KB|MB|GB)", text)
    if match is None:
        raise ValueError(f"--max_shard_size={text!r} is not a size; give a number and KB, MB or GB: 5GB")
    return int(match[1]) * UNITS[match[2]]
