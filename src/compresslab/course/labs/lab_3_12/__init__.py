"""Lab 3.12: peers, ensembles and one's own depth in the place of a teacher."""
