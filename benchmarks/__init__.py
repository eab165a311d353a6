"""Figures: how fast training, answering and reading data are. Nothing imports this room."""

import machine as machine  # sets what OpenMP reads once, when torch is loaded
