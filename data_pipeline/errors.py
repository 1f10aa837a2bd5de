"""The one error of this package, and how every command of the project shows a user's mistake."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """Bad data, or a user's mistake about data: one line that names the value, the limit and the mend."""


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns these errors into `error: LINE` on stderr (from rank 0 only) and exit code 2.

    ZEROMODEL_TRACEBACK=1 shows the traceback instead, for whoever debugs the project itself.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get("ZEROMODEL_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
