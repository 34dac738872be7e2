"""Which contrast a DICOM series shows, as a word such as `t1c`, from what vendors write.

Descriptions may hold names: they are compared with words and with what a user asks for, and shown
nowhere. Only words of this file leave it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase

__all__ = ["WORDS", "is_asked_for", "word_of"]

WORDS = ("t1", "t1c", "t2", "flair", "pd", "t2star", "swi", "dwi", "adc", "tof", "ct", "pet")
_SAME = {
    "t1w": "t1", "t1n": "t1", "t1ce": "t1c", "t1gd": "t1c", "t1post": "t1c", "t2w": "t2",
    "t2f": "flair", "pdw": "pd", "t2*": "t2star", "pt": "pet",
}  # fmt: skip
_OF_MODALITY = {"CT": "ct", "PT": "pet"}
# what is computed from an image, or shows no contrast of its own
_DERIVED = (
    r"(min|m)ip|minip|sub|subtraction|pha|phase|mag|fa|colfa|tensor|cbf|cbv|mtt|ttp|scout|loc"
)
_BEFORE = (
    r"pre|precontrast|nativ|native|without|wo|no|non|noncontrast|unenhanced|plain|ohne|sans|sin"
)
_AGENT = (
    r"(t1)?(gd|gad|gado|gadolinium|gadovist|dotarem|magnevist|post|postcontrast|contrast|ce|km|pc)"
)
_T1_NAMES = r"mprage|mp2rage|bravo|f?spgr|tfl3d|irfspgr"
_DIFFUSION = r"dwi\w*|diff|diffusion\w*|dti|trace\w*|b\d{2,4}"


def word_of(modality: str, texts: list[str], agent: str) -> str:
    """Return the word of a series, empty where it is not known or not one.

    Args:
        modality: As the file states it: CT, MR, PT.
        texts: Description of the series, name of the protocol.
        agent: Contrast agent as stated.
    """
    if modality != "MR":
        return _OF_MODALITY.get(modality, "")
    return next((word for word in (_of_text(text, agent) for text in texts) if word), "")


def _of_text(text: str, agent: str) -> str:
    text = re.sub(r"t2\s*(\*|star)", " t2star ", text.lower()).replace("w/o", " wo ")
    has_plus = bool(re.search(r"t1\w*\s*\+|\+\s*(c|gd|km)\b|\bc\s*\+", text))
    words = re.findall(r"[a-z0-9]+", text)

    def says(pattern: str) -> bool:
        return any(re.fullmatch(pattern, word) for word in words)

    if says(_DERIVED):
        return ""
    if says("adc|apparent"):
        return "adc"
    if says(_DIFFUSION):
        return "dwi"
    if says("swi|swan|swip"):
        return "swi"
    if says("t2star|t2s|hemo"):
        return "t2star"
    if says("tof|mra|angio"):
        return "tof"
    is_t1 = says(rf"t1\w*|{_T1_NAMES}")
    kinds = [is_t1, says(r"t2(?!star)\w*"), says(r"pdw?|proton")]
    if says(r"flair\w*|darkfluid|t2flair") or (says("dark") and says("fluid")):
        return "flair" if not is_t1 else _t1(says, has_plus, agent)
    if kinds.count(True) != 1:
        return ""
    return _t1(says, has_plus, agent) if is_t1 else ("t2" if kinds[1] else "pd")


def _t1(says: Callable[[str], bool], has_plus: bool, agent: str) -> str:
    """Tell T1 with an agent from T1 without: by the description, else by what the file states."""
    if says(_BEFORE):
        return "t1"
    is_given = agent.strip().lower() not in ("", "none", "no", "n", "nil", "no contrast")
    return "t1c" if has_plus or says(_AGENT) or says("t1(c|ce|gd|post)") or is_given else "t1"


def is_asked_for(wanted: str, key: str, word: str, texts: list[str]) -> bool:
    """Tell whether a series is what a contrast names.

    Args:
        wanted: Its word, its key, or its description or protocol with `*` for any letters.
        key: Key of the series, such as `mr-3`.
        word: Of `word_of`.
        texts: Description of the series, name of the protocol.
    """
    asked = wanted.strip().lower()
    if asked == key or (word and _SAME.get(asked, asked) == word):
        return True
    return any(fnmatchcase(text.strip().lower(), asked) for text in texts if text.strip())
