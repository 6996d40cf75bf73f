"""`python -m tokenry` is the `tokenry` command."""

import sys

from tokenry.cli import main

if __name__ == "__main__":
    sys.exit(main())
