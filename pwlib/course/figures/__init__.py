"""The figures of notebooks and labs: one module for each, one function for each figure, with its alternative text.

A function draws what its notebook or lab computed and shows it with `pwlib.course.plots.show`.
"""
