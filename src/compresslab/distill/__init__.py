"""Distillation: a smaller network taught by a larger one. One loss a file; compresslab/distilling.py puts them to work."""
