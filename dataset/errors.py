"""What bad data raises: a SampleError for one sample, a DataError for a data set."""

from model.errors import SampleError

__all__ = ["DataError", "SampleError"]


class DataError(Exception):
    """A data set as a whole is missing or unusable; the message says what to do."""
