"""Choosing what each layer gets: how much it suffers from fewer bits, and how to share a budget out."""
