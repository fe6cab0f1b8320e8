"""Lab 3.1: how many bits can go without training, and what decides it."""
