"""What bad data raises: a SampleError for one sample, a DataError for a data set."""

from model.errors import SampleError

__all__ = ["DataError", "NoSamples", "SampleError", "reason", "shown"]


class DataError(Exception):
    """A data set as a whole is missing or unusable; the message says what to do."""


class NoSamples(DataError):
    """A file holds none, which is no harm where others do."""


def shown(value: object) -> str:
    """A value as messages show it: of a long one the beginning and the end."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-60:]}"


def reason(error: Exception) -> str:
    """What went wrong, in the system's words where it was the system's no: its whole message names the file once more."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".removesuffix(": ")
