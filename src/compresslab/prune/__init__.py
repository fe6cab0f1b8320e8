"""Methods that set weights to zero, one paper in one file."""
