"""The course: labs that a learner starts, fills in, has graded and runs; every number in them is measured.

catalogue.py finds the labs, learner.py keeps their folders and progress, grading.py grades a file in a process of its own,
experiment.py runs what a lab measures and judges it, notebook.py executes its notebook. A lab is a folder under labs/.
"""
