"""Patching, masking and position codes, in 2D and 3D."""

from __future__ import annotations

import pytest
import torch

from domainssl.errors import ConfigError, DataError
from domainssl.nn.masking import kept_count, mask_from_noise, restore_tokens, take_tokens
from domainssl.nn.patching import grid_coordinates, grid_of, patch_fraction, patchify, unpatchify
from domainssl.nn.positions import sincos_positions


@pytest.mark.parametrize("size", [(8, 12), (4, 8, 12)])
@pytest.mark.parametrize("channels_first", [True, False])
def test_unpatchify_undoes_patchify(size: tuple[int, ...], channels_first: bool) -> None:
    x = torch.randn(2, 3, *size)
    tokens = patchify(x, 4, channels_first=channels_first)
    grid = grid_of(size, 4)
    assert torch.equal(unpatchify(tokens, grid, 4, channels_first=channels_first), x)


@pytest.mark.parametrize("patch", [(4, 6), (2, 3, 4), (4, 4, 1)])
def test_patches_may_have_a_side_per_axis(patch: tuple[int, ...]) -> None:
    size = (8, 12, 4)[: len(patch)]
    x = torch.randn(2, 3, *size)
    tokens, grid = patchify(x, patch), grid_of(size, patch)
    assert grid == tuple(s // p for s, p in zip(size, patch, strict=True))
    corner = (slice(None), slice(None), *(slice(0, p) for p in patch))
    assert torch.equal(tokens[:, 0].unflatten(1, (*patch, 3)), x[corner].movedim(1, -1))
    assert torch.equal(unpatchify(tokens, grid, patch), x)
    assert patch_fraction(x[:, 0] > 9, patch).shape == tokens.shape[:2]


def test_a_patch_with_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"patch_size: got \[4, 4\], expected one number, or 3"):
        grid_of((8, 8, 8), (4, 4))


def test_token_order_is_that_of_the_coordinates() -> None:
    x = torch.arange(2 * 3 * 2, dtype=torch.float32).view(1, 1, 2, 3, 2)
    tokens = patchify(x, 1)[0, :, 0]
    coords = grid_coordinates((2, 3, 2)).long()
    assert torch.equal(tokens, x[0, 0, coords[:, 0], coords[:, 1], coords[:, 2]])


def test_values_inside_a_token_follow_the_named_order() -> None:
    x = torch.arange(8, dtype=torch.float32).view(1, 2, 2, 2)
    assert patchify(x, 2, channels_first=True)[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert patchify(x, 2)[0, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_size_that_is_no_multiple_names_one_that_is() -> None:
    with pytest.raises(DataError, match=r"\(60, 64\).*patch size 8.*\(56, 64\)"):
        grid_of((60, 64), 8)


def test_patch_fraction_counts_true_pixels() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, :3] = True
    assert patch_fraction(mask, 2).tolist() == [[0.5, 0.25, 0.0, 0.0]]


def test_kept_count_truncates_as_the_references_do() -> None:
    assert kept_count(225, 0.75) == 56
    assert kept_count(3, 0.99) == 1


def test_restored_tokens_stand_in_their_places() -> None:
    tokens = torch.randn(2, 6, 4)
    masking = mask_from_noise(torch.rand(2, 6), 2)
    visible = take_tokens(tokens, masking.keep)
    restored = restore_tokens(visible, masking.restore, torch.zeros(1, 1, 4))
    expected = tokens.masked_fill(masking.removed.unsqueeze(-1), 0)
    assert torch.equal(restored, expected)


def test_position_codes_of_volumes_encode_the_last_axis_first() -> None:
    codes = sincos_positions(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), 12)
    first, last = codes[:, :4], codes[:, 8:]
    torch.testing.assert_close(first[1], last[0])
    assert not torch.equal(first[0], first[1])


def test_position_codes_refuse_a_width_they_cannot_divide() -> None:
    with pytest.raises(ConfigError, match="multiple of 6"):
        sincos_positions(torch.zeros(1, 3), 32)
