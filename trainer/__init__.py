"""The training loop and what it stands on."""

import machine as machine  # sets what OpenMP reads once, when torch is loaded
