"""What answers people: terminal, scoring, and the web page."""

import machine as machine  # sets what OpenMP reads once, when torch is loaded
