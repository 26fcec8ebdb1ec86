"""The command line: `python -m pwlib`."""
