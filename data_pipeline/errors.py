"""The one error of this package."""


class DataError(ValueError):
    """Bad data, or a user's mistake about data: one line that names the value, the limit and the fix."""
