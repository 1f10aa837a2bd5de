"""How every command of the project reports a user's mistake."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def user_errors(*kinds: type[Exception], from_every_rank: bool = False) -> Iterator[None]:
    """Turn these errors into `error: LINE` on stderr and exit code 2.

    ZEROMODEL_TRACEBACK=1 shows the traceback instead, for debugging the project itself.

    Args:
        kinds: the exceptions that are a user's mistakes.
        from_every_rank: every rank prints, for errors that one rank alone may have, such as a damaged shard;
            otherwise only rank 0 does.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get("ZEROMODEL_TRACEBACK"):
            raise
        if from_every_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {error_line(error)}", file=sys.stderr)
        sys.exit(2)


def error_line(error: BaseException) -> str:
    """An error in one line.

    An OSError's own text begins with a number and ends with its path. What a terminal would obey, such as
    escape sequences in names from damaged files, is spelt out.
    """
    text = str(error) or repr(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
