"""Whose mistake it is: a UsageError is the user's, a SampleError one sample's. Scripts end with exit code 2 for both."""


class UsageError(Exception):
    """The user asked for something that cannot be; the message says what, where and what to do instead."""


def first_line(error: Exception) -> str:
    """An error in one line; its kind where it has no words."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class SampleError(ValueError):
    """A sample that cannot be trained on as it stands.

    `problem` says what is wrong with which value; `where` is "file:line" (or a file); the text has both.
    """

    def __init__(self, problem: str, where: str = ""):
        super().__init__(f"{where}: {problem}" if where else problem)
        self.problem, self.where = problem, where
