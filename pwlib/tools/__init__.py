"""What users do with the method: run folders, training, scoring, labelling of image files, export.

The command line is a thin layer over it. No module of the library imports it, except for the public name `load_run`.
"""
