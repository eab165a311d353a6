"""Samples, from files to tensors."""

import machine as machine  # sets what OpenMP reads once, when torch is loaded
