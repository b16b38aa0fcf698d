"""Denoisers that are known exactly, without training."""
