"""`python -m pwlib`: see `pwlib.cli.parser`."""

import sys

from pwlib.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
