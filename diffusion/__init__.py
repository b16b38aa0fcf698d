"""The walk along a path by DDIM, and what is done with it."""
