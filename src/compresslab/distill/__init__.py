"""Distillation: a smaller network taught by a larger one. One loss a file; what puts them to work is compresslab/distilling.py."""
