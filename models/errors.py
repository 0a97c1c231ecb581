"""The project's own exceptions. Scripts print them in one line, without a traceback, and exit with status 1."""


class InputError(Exception):
    """A value, file or checkpoint given by the user cannot work: the fault is in what was given, not in the code.

    The message is one line that names the offending value, what was expected and what to do. Fields and parameters
    stand in backticks (`width`): where a command line set them, `utils.cli` writes the flag in their place.

    No ValueError: a parser of command lines would take that for a fault in how a value is written, and dress it up.

    Args:
      of: The class of the configuration whose field is meant, where it is part of a larger one (`TokenizerConfig`).
    """

    def __init__(self, message: str, of: type | None = None):
        super().__init__(message)
        self.of = of


class DamagedCheckpointError(InputError):
    """Of a checkpoint, files are missing, truncated or changed."""


class DivergenceError(ArithmeticError):
    """A training ran into numbers that are not finite.

    step: After which it was seen.
    name, value: Of the metric that showed it.
    """

    def __init__(self, message: str, step: int, name: str, value: float):
        super().__init__(message)
        self.step, self.name, self.value = step, name, value


def check_patch_size(patch_size: int, frame_shape: tuple[int, int, int], of: type) -> None:
    """Refuses patches that are larger than frames (H, W, C), as a field of the configuration `of`."""
    side = min(frame_shape[:2])
    if not 1 <= patch_size <= side:
        raise InputError(f"`patch_size` {patch_size}: must be from 1 to the frames' shorter side, {side}", of=of)
