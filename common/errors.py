"""How every command of the project shows a user's mistake."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def user_errors(*kinds: type[Exception], from_every_rank: bool = False) -> Iterator[None]:
    """Turns these errors into `error: LINE` on stderr and exit code 2.

    Only rank 0 prints, unless one rank alone may have the error, as with a damaged shard.
    ZEROMODEL_TRACEBACK=1 shows the traceback instead, for whoever debugs the project itself.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get("ZEROMODEL_TRACEBACK"):
            raise
        if from_every_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
