"""The one error type that stands for a user's mistake."""


class UserError(ValueError):
    """What the user gave cannot work.

    The message names the field or file, the value and the fix. The command line prints it without a traceback and
    exits with code 2; a library user catches it as a `ValueError`.
    """
