"""Other people's frameworks beside ours, each in an environment of its own.

A peer is one script and one list of pinned requirements under scripts/, and an entry in peers.yaml. Its packages never meet
ours: `environments` makes a virtual environment for it in the cache folder, `asking` starts its script there with a job as
JSON and reads what it says. The labs ask them (course/beside.py), and so do the benchmarks.
"""
