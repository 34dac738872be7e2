"""What is looked at once weights are loaded: their numbers, and the bands of their tag."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from domainssl.backbones.base import Backbone
from domainssl.backbones.pretrained import Pretrained
from domainssl.errors import WeightsError

__all__ = ["check_record", "refuse_lost_numbers"]


def refuse_lost_numbers(backbone: Backbone) -> None:
    """Refuse weights that are not numbers.

    Raises:
        WeightsError: A tensor holds NaN or infinite numbers.
    """
    lost = [n for n, tensor in backbone.named_parameters() if not bool(tensor.isfinite().all())]
    if lost:
        raise WeightsError(
            f"{len(lost)} tensors of the weights hold NaN or infinite numbers, such as "
            f"{lost[0]!r}: their training diverged, or the file is damaged. Take an earlier "
            "checkpoint, or get the file again."
        )


def check_record(backbone: Backbone, known: Pretrained, weights: str | Path) -> None:
    """Compare bands with those of the published weights under whose tag a file was loaded.

    Raises:
        WeightsError: Their numbers differ, or their order where the file does not tell it.
    """
    fitted = {c.modality: len(c.kept) + len(c.dropped) for c in backbone.band_changes}
    counts = {n: fitted.get(n, m.num_channels) for n, m in backbone.modalities.items()}
    expected = {name: len(bands) for name, bands in known.bands.items()}
    if len(expected) == 1:  # whatever the data call it
        is_it = list(counts.values()) == list(expected.values())
    else:
        is_it = all(counts[name] == expected[name] for name in counts.keys() & expected.keys())
    if not is_it:
        raise WeightsError(
            f"{weights}: holds weights for {_counted(counts)}, but those published under "
            f"{known.tag!r} are for {_counted(expected)}. Get the file of that tag, or load this "
            f"one without it: load_backbone({known.backbone!r}, weights=…)."
        )
    only = next(iter(known.bands.values()), ()) if len(known.bands) == 1 else ()
    for name, modality in backbone.modalities.items():
        own = known.bands.get(name, only)
        if name not in fitted and modality.channels != own and set(modality.channels) == set(own):
            raise WeightsError(
                f"{name}: the same bands in another order: got {list(modality.channels)}, the "
                f"weights of {known.tag!r} are for {list(own)}. Choose this order in the "
                "DataModule and in modalities=…"
            )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} bands of {name}" for name, count in counts.items())
