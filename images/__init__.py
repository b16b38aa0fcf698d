"""What an image is to LIFT: its two scales, and the built-in set of drawn animals."""
