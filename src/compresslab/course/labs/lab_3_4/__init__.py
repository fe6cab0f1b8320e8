"""Lab 3.4: which layers deserve the bits of a budget."""
