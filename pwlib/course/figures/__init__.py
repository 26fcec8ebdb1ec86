"""The figures of the notebooks: one module for each notebook, one function for each figure, with its alternative text.

A function draws what its notebook computed and shows it with `pwlib.course.plots.show`.
"""
