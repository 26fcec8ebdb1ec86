"""What users do with the method: the dense CRF in one call, run folders, training, scoring, labelling, export.

The command line is a thin layer over these modules. The library does not import them, except for public names.
"""
