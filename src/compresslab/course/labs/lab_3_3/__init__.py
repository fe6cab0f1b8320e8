"""Lab 3.3: second-order rounding, and what outliers have to do with it."""
