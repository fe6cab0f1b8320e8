"""The report: data first (schema), then pure functions of it (render)."""
