"""Where small real files lie, on machines that have them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["REAL_DATA"]

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL_DATA = Path(os.environ.get("DOMAINSSL_SAMPLE_DATA") or _BESIDE)
"""The folder that `$DOMAINSSL_SAMPLE_DATA` names, or `../shared/data`; it need not exist."""
