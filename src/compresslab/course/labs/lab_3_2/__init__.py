"""Lab 3.2: training with the rounding in place."""
