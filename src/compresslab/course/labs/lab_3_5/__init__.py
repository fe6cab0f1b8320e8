"""Lab 3.5: what a weight's size tells, and what it misses."""
