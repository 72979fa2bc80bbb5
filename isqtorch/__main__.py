"""`python -m isqtorch` is the `isqtorch` command."""

import sys

from isqtorch.cli import main

if __name__ == "__main__":
    sys.exit(main())
