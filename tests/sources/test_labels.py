"""Classes by number: their order, unknown ones, one number in two forms."""

from __future__ import annotations

import pytest

from domainssl.errors import ConfigError, DataError
from domainssl.sources.labels import class_names


def test_classes_are_sorted_as_numbers_where_all_are() -> None:
    assert class_names({"10", "9", "2"}, (), "exams") == ("2", "9", "10")
    assert class_names({"b", "10", "9"}, (), "exams") == ("10", "9", "b")
    assert class_names({"0.5", "1.5"}, (), "exams") == ("0.5", "1.5")
    assert class_names({"b"}, ("b", "a"), "exams") == ("b", "a")


def test_a_class_that_was_not_asked_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="but tiles have the class 'c'"):
        class_names({"a", "c"}, ("a", "b"), "tiles")


@pytest.mark.parametrize("other", ["1.0", "01", "+1", "1."])
def test_a_number_that_is_written_in_two_ways_is_refused(other: str) -> None:
    with pytest.raises(DataError, match=r"slides have the classes .* which are one number"):
        class_names({"1", other, "2"}, (), "slides")
