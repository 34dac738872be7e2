"""What `python -m domainssl bench` measures: one subject per file, ratios of interleaved runs.

A subject is a function `measure(settings)` that yields `report.Row`s as they are found.
"""

from __future__ import annotations
