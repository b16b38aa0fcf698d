"""What a step costs where, and which path and training pairs follow from it."""
