"""Lab 3.6: when a pruned network is really faster."""
