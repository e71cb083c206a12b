"""Errors that are the user's to mend: one line that says what was done, what was expected and what was got.

The command line prints such a line without a traceback and exits with code 2.
"""


class InputError(ValueError):
    """What the user passed cannot be used: a text, a prompt, an option, a file."""


class TrainingError(RuntimeError):
    """Training cannot go on, although its input was well-formed (a loss that is not finite, say)."""
