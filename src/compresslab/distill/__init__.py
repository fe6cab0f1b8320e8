"""Distillation: teaching a smaller network what a larger one knows."""
