"""Measuring: every number of a report, lab or benchmark comes from here, and from an artifact reloaded from disk."""
