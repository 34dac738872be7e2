"""The embedded samples of scans: folders of files and a manifest, made from known factors.

`petct`: 160 training and 96 held-out exams of registered CT and PET. `ctmr`: 96 and 96 exams of
the abdomen, half of them CT and half MR, with maps of the organs; one is a DICOM series. `brain`:
160 and 96 exams of four MR contrasts, some of them missing, with maps of the lesions. `upright` and
`heads`: 160 and 96 exams, of CT and of T1, whose classes a quarter turn about the axis of the body
leaves as they are. `organs` and `lesions`: 96 and 32 exams of such scans, whose maps only the
layers of the tissue tell. `visits`: 128 and 96 patients with four visits. As in real files, stored
axes point in several directions, integers have slopes and offsets, and some patients come twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.volumes_brain import (
    BRAIN,
    HEADS,
    write_brain,
    write_upright_head,
)
from domainssl.datamodules.samples.volumes_ctmr import CTMR, write_ctmr
from domainssl.datamodules.samples.volumes_petct import (
    PETCT,
    UPRIGHT,
    write_petct,
    write_upright,
)
from domainssl.datamodules.samples.volumes_plan import Plan
from domainssl.datamodules.samples.volumes_regions import (
    LESIONS,
    ORGANS,
    write_lesions,
    write_organs,
)
from domainssl.datamodules.samples.volumes_visits import VISITS, write_visits
from domainssl.errors import ConfigError, nearest

__all__ = ["SAMPLES", "build", "sample_root"]

# name -> plan, what writes an exam, and a version that changes with the values
SAMPLES: dict[str, tuple[Plan, Callable[[Path, str, int], Mapping[str, str]], str]] = {
    "petct": (PETCT, write_petct, "3"),
    "upright": (UPRIGHT, write_upright, "1"),
    "ctmr": (CTMR, write_ctmr, "2"),
    "brain": (BRAIN, write_brain, "2"),
    "heads": (HEADS, write_upright_head, "1"),
    "visits": (VISITS, write_visits, "1"),
    "organs": (ORGANS, write_organs, "1"),
    "lesions": (LESIONS, write_lesions, "1"),
}


def sample_root(name: str) -> Path:
    """Return the folder of a sample, made on first use in seconds.

    Raises:
        ConfigError: There is no such sample.
    """
    if name not in SAMPLES:
        raise ConfigError(
            f"sample:{name}: no such sample of volumes.{nearest(name, SAMPLES)} "
            f"There are {', '.join(SAMPLES)}."
        )
    what = f"sample of volumes {name!r}"
    return made_once(f"volumes-{name}", SAMPLES[name][2], what, lambda to: build(name, to))


def build(name: str, folder: Path) -> None:
    """Write a sample into an empty folder; the same bytes every time."""
    plan, write_exam, _ = SAMPLES[name]
    plan.write(folder, write_exam)
