"""Random changes of a window that all contrasts of an exam share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainssl.errors import ConfigError, require
from domainssl.io.volume.geometry import spacing_of
from domainssl.io.volume.prepared import Prepared
from domainssl.sources.resampling import resample_labels, resample_scan

__all__ = ["Augmentation", "Change"]

Array = np.ndarray[Any, Any]
_DEGREE = 3  # of the polynomial of a bias field


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training windows are changed; everything is off by default.

    Objectives change brightness and noise of their views themselves. Bias field, gamma and noise
    leave Hounsfield units alone.

    Attributes:
        probability: Of each change, drawn apart.
        rotation_deg: Largest rotation about each axis.
        scale: Largest relative change of size: 0.1 means 0.9 to 1.1.
        bias_field: Largest coefficient of the polynomial in the exponent of a bias field.
        gamma: Smallest and largest exponent of values between the exam's limits.
        noise: Largest standard deviation of Gaussian noise, relative to the exam's limits.
    """

    probability: float = 0.5
    rotation_deg: float = 0.0
    scale: float = 0.0
    bias_field: float = 0.0
    gamma: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0

    def __post_init__(self) -> None:
        where = "data.init_args.window.augmentation"
        if not 0 <= self.probability <= 1 or not 0 <= self.scale < 1:
            raise ConfigError(
                f"{where}: got probability={self.probability!r}, scale={self.scale!r}; expected "
                "numbers from 0 to 1, scale below 1."
            )
        least = min(self.rotation_deg, self.bias_field, self.noise)
        if least < 0 or not 0 < self.gamma[0] <= self.gamma[1]:
            raise ConfigError(
                f"{where}: got rotation_deg={self.rotation_deg!r}, bias_field={self.bias_field!r}, "
                f"noise={self.noise!r}, gamma={self.gamma!r}; expected numbers from 0 on, and two "
                "ascending exponents above 0."
            )

    def draw(self, rng: np.random.Generator) -> Change:
        """Draw the change of one window."""
        does = rng.random(5) < self.probability
        angles = rng.uniform(-1, 1, 3) * self.rotation_deg * does[0]
        scale = 1 + rng.uniform(-1, 1) * self.scale * does[1]
        seed = int(rng.integers(2**32))
        gamma = float(rng.uniform(*self.gamma)) if does[3] else 1.0
        noise = float(rng.uniform(0, 1)) * self.noise * does[4]
        return Change(
            angles_deg=tuple(float(a) for a in angles),
            scale=float(scale),
            bias_field=self.bias_field * bool(does[2]),
            gamma=gamma,
            noise=noise,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to one window; `Augmentation` says what the numbers mean.

    Attributes:
        angles_deg: Rotation about x, y and z, in this order.
        scale: Size of what is shown, relative to the scan.
        bias_field: Largest coefficient.
        gamma: Exponent.
        noise: Standard deviation relative to the limits.
        seed: Of bias field and noise.
    """

    angles_deg: tuple[float, ...] = (0.0, 0.0, 0.0)
    scale: float = 1.0
    bias_field: float = 0.0
    gamma: float = 1.0
    noise: float = 0.0
    seed: int = 0

    @property
    def moves(self) -> bool:
        """Whether voxels change their place."""
        return any(self.angles_deg) or self.scale != 1

    def extent(self, size: Sequence[int], affine: Array) -> tuple[int, ...]:
        """Return the voxels along each axis that a window of `size` voxels is sampled from."""
        if not self.moves:
            return tuple(size)
        needed = np.abs(self._steps(affine)) @ (np.array(size) - 1)
        return tuple(int(n) for n in np.ceil(needed - 1e-9) + 1)

    def _steps(self, affine: Array) -> Array:
        """Return the step in the scan, in voxels, of a step in the window: (3, 3)."""
        sizes = np.array(spacing_of(affine))
        turn = np.eye(3)
        for axis, angle in enumerate(np.deg2rad(self.angles_deg)):
            a, b = (i for i in range(3) if i != axis)
            one = np.eye(3)
            one[a, a] = one[b, b] = np.cos(angle)
            one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
            turn = one @ turn
        return np.asarray(turn * sizes / sizes[:, None] / self.scale)

    def move(self, box: Prepared, size: Sequence[int]) -> Prepared:
        """Sample a window out of the box around it, both about the same centre.

        Args:
            box: Voxels (X, Y, Z) of `extent`, every modality with its validity.
            size: Voxels of the window.
        """
        if not self.moves:
            return box
        steps = np.eye(4)
        steps[:3, :3] = self._steps(box.affine)
        middle, target = ((np.array(s) - 1) / 2 for s in (box.shape, size))
        steps[:3, 3] = middle - steps[:3, :3] @ target
        affine = box.affine @ steps
        moved = {
            name: resample_scan(values, box.valid[name], box.affine, size, affine)
            for name, values in box.values.items()
        }
        mask = box.mask
        if mask is not None:
            mask = resample_labels(mask, box.affine, size, affine, outside=-1)
        return replace(
            box,
            values={name: found[0] for name, found in moved.items()},
            valid={name: found[1] for name, found in moved.items()},
            mask=mask,
            affine=affine,
        )

    def shade(self, box: Prepared, names: Collection[str]) -> Prepared:
        """Change values of some modalities, with one field, exponent and level of noise."""
        if not self.bias_field and self.gamma == 1 and not self.noise:
            return box
        values = dict(box.values)
        for number, name in enumerate(box.values):
            if name in names:
                values[name] = self._shaded(values[name], box.limits[name], number)
        return replace(box, values=values)

    def _shaded(self, values: Array, limits: Array, number: int) -> Array:
        x = values.astype(np.float32)
        if self.bias_field:
            transforms: Any = require("monai.transforms", "medical")
            field = transforms.RandBiasField(
                degree=_DEGREE, coeff_range=(-self.bias_field, self.bias_field), prob=1.0
            )
            field.set_random_state(seed=self.seed)  # of all contrasts alike
            x = np.asarray(field(x), np.float32)
        low = limits[:, 0].reshape(-1, 1, 1, 1)
        span = limits[:, 1].reshape(-1, 1, 1, 1) - low
        if self.gamma != 1:  # MONAI's AdjustContrast would take its range from the window alone
            x = low + span * np.maximum((x - low) / span, 0) ** np.float32(self.gamma)
        if self.noise:
            rng = np.random.default_rng([self.seed, number])
            x += span * self.noise * rng.standard_normal(x.shape, np.float32)
        return x
