"""`python -m tokenry` is the `tokenry` command."""

from tokenry.cli import main

if __name__ == "__main__":
    main()
