"""Diagrams (svg) and plots (programs) of the README: `python -m docs.figures --help`."""
