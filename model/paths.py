"""The repository's folder, and paths as people type them."""

import os
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def home_for_tilde(argv: list[str] | None = None) -> list[str]:
    """Command-line arguments (the process's own for None) with a home folder for each "~" that begins a path. A shell does so
    at the beginning of a word alone, not in --save_dir=~/x or a.jsonl,~/b.jsonl."""
    words = sys.argv[1:] if argv is None else argv
    return [re.sub(r"(?:^|(?<=[=,]))~[^/,]*", lambda match: os.path.expanduser(match[0]), word) for word in words]
