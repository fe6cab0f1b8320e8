"""What draws the figures: a module for each chapter, with its FIGURES by name."""
