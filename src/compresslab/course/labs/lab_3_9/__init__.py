"""Lab 3.9: what a student learns from its teacher's answers."""
