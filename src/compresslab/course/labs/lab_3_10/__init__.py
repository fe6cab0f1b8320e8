"""Lab 3.10: what a student learns from the inside of its teacher."""
