"""Which device a verb computes on."""

from __future__ import annotations

import re

import torch

from domainssl.errors import ConfigError

__all__ = ["chosen_device"]


def chosen_device(name: str, verb: str) -> torch.device:
    """Return `cpu`, `cuda` or `cuda:N` as a device; `auto` takes the first GPU there is.

    Raises:
        ConfigError: It is something else, or there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"{verb} --device: got {name!r}, expected auto, cpu, cuda or cuda:N.")
    found = torch.device(name)
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ConfigError(f"{verb} --device={name}: torch finds {count or 'no'} CUDA device(s).")
    return found
