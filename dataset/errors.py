"""What bad data raises: a SampleError for one sample, a DataError for a data set."""


class SampleError(ValueError):
    """A sample that cannot be trained on as it stands.

    `problem` says what is wrong with which value; `where` is "file:line" (or a file); the text has both.
    """

    def __init__(self, problem: str, where: str = ""):
        super().__init__(f"{where}: {problem}" if where else problem)
        self.problem, self.where = problem, where


class DataError(Exception):
    """A data set as a whole is missing or unusable; the message says what to do."""
