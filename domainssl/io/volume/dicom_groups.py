"""Attributes of the frames of an enhanced DICOM file, which stand in groups per frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Grouped"]

_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "ImageType": "FrameType",
    "ReferencedSegmentNumber": "SegmentIdentificationSequence",
    "EchoTime": "MREchoSequence",
    "DiffusionBValue": "MRDiffusionSequence",
    "TemporalPositionIdentifier": "FrameContentSequence",
    "AcquisitionNumber": "FrameContentSequence",
    "TriggerTime": "CardiacSynchronizationSequence",
    "FlipAngle": "MRTimingAndRelatedParametersSequence",
    "RepetitionTime": "MRTimingAndRelatedParametersSequence",
}
_NAMES = {
    "EchoTime": "EffectiveEchoTime",
    "TemporalPositionIdentifier": "TemporalPositionIndex",
    "AcquisitionNumber": "FrameAcquisitionNumber",
    "TriggerTime": "NominalCardiacTriggerDelayTime",
}
# what may hold for all frames; a position never does
_WHOLE = ("ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
          "RescaleSlope", "RescaleIntercept", "RescaleType")  # fmt: skip
_FRAME_TYPES = ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence")


@dataclass(frozen=True)
class Grouped:
    """Attributes of one frame, from its functional groups or those that all frames share.

    Some writers leave scale and grid, which hold for all frames, where a single image has them.
    """

    own: Any
    shared: Any
    whole: Any

    def __call__(self, name: str) -> Any:
        """Return the value of an attribute; None where no group has it."""
        sequence = _GROUPS.get(name)
        if sequence == "FrameType":
            found = [self._in(place, "FrameType") for place in _FRAME_TYPES]
            return next((value for value in found if value is not None), None)
        value = None if sequence is None else self._in(sequence, _NAMES.get(name, name))
        return self.whole.get(name) if value is None and name in _WHOLE else value

    def _in(self, sequence: str, name: str) -> Any:
        for group in (self.own, self.shared):
            items = None if group is None else group.get(sequence)
            if items and items[0].get(name) is not None:
                return items[0].get(name)
        return None
