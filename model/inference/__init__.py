"""The fast way to answer."""
