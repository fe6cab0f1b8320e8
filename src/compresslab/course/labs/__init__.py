"""The labs: a package each, with lab.yaml, words.yaml, experiment.py, checks.py, exercise.py, solution.py and mutants/."""
