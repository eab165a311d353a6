"""What a visitor is told when something fails: what happened and what to do."""

import contextlib
import sys
import traceback

from machine import ran_out_of_memory

TOLD = {"UsageError", "SampleError", "PictureError"}  # their messages say what is wrong, where, and what to do


def explain(error: Exception) -> str:
    """The message for a visitor. A fault of the program goes to the log with its traceback as well."""
    name, text = type(error).__name__, str(error)
    if name in TOLD:  # by name: importing their classes would import torch, and the first visitor would wait for it
        return text
    with contextlib.suppress(OSError, ValueError):  # a log on a full disk, or closed, ends nothing
        traceback.print_exception(error, file=sys.stderr)
    if ran_out_of_memory(error):
        return "not enough memory. Ask again with fewer pictures or fewer new tokens, or clear the conversation."
    return f"{name}: {text.rstrip('.')}. The log of the page's server has the details; ask again, or clear the conversation."
