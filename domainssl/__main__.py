"""`python -m domainssl VERB …`."""

from __future__ import annotations

import sys

from domainssl.cli import main

if __name__ == "__main__":
    sys.exit(main())
