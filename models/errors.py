"""The one exception that means: the fault is in what was given, not in the code."""


class InputError(ValueError):
    """A value, file or checkpoint given by the user cannot work.

    The message is one line that names the offending value, what was expected and what to do. Scripts print it
    without a traceback and exit with status 1.
    """
