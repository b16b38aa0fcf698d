"""What an image is to LIFT: the file that it is read from, its two scales, and the built-in set of drawn animals."""
