"""What users do with the method: the dense CRF in one call, run folders, training, scoring, labelling,
export.

The command line is a thin layer over it. No module of the library imports it, except for public names.
"""
