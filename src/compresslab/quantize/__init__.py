"""Quantisation: one paper, one file."""
