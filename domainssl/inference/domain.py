"""What a backbone is shown: rasters, volumes, tiles of slides, or bags of their features."""

from __future__ import annotations

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError

__all__ = ["domain_of"]


def domain_of(backbone: Backbone) -> str:
    """Return what a backbone is shown: `volumes`, `rasters`, `slides` or `bags`.

    Raises:
        ConfigError: It is something else, such as a table.
    """
    modalities = backbone.modalities.values()
    if {m.kind for m in modalities} == {"features"}:
        return "bags"
    if {m.spatial_dims for m in modalities} == {3}:
        return "volumes"
    if {m.spatial_dims for m in modalities} == {2}:
        return "slides" if all(m.mpp_um for m in modalities) else "rasters"
    shown = ", ".join(f"{m.name} ({m.kind})" for m in modalities)
    raise ConfigError(
        f"A backbone of {shown}: rasters, scans, slides and bags of features are read from paths. "
        "Give its forward pass batches instead."
    )
