"""Small models with random weights that stand for published ones.

Each has the structure of the published model, its attribute names, and a method that does what the published method
does, in its order of operations and of random draws, its faults included. None shares code with ``varkern.families``.
"""
