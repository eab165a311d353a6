"""Conversations as Markdown: what the terminal's /save and the web page's download have in common."""


def escape(text: str) -> str:
    """Text as itself in Markdown: characters with a meaning there get a backslash."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~$" else c for c in text)
