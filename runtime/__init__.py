"""Devices, processes that share a run, and files written whole or not at all."""
