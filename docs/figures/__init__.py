"""The pictures of the README, each by its command: `python -m docs.figures --help`."""
