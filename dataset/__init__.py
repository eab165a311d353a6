"""Samples, from files to tensors."""
