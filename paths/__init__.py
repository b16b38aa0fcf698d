"""Paths through the plane of timesteps: what they are, hand-made ones, exact optima, files. Numpy only."""
