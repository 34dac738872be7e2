"""Patches of images and volumes through one token and back."""

from __future__ import annotations

import pytest
import torch

from domainssl.errors import ConfigError
from domainssl.nn.bypass import PatchDecoder, PatchEncoder, Pooled, pooled_sizes, unpool
from domainssl.nn.relative import bucket_table


@pytest.mark.parametrize(
    ("patch", "sizes"),
    [
        (50, [(25, 25), (12, 12), (6, 6), (3, 3)]),
        ((8, 8, 4), [(4, 4, 2), (2, 2, 1)]),
        ((16, 16, 1), [(8, 8, 1), (4, 4, 1), (2, 2, 1)]),
        ((3, 1, 2), [(2, 1, 1)]),
    ],
)
def test_every_axis_is_halved_until_one_place_is_left(patch, sizes) -> None:
    assert pooled_sizes(patch) == sizes
    shape = (patch, patch) if isinstance(patch, int) else patch
    encoder, decoder = PatchEncoder(2, 8, patch), PatchDecoder(2, 8, patch)
    x = torch.randn(3, 2, *shape)
    tokens, poolings = encoder(x, torch.ones(3, dtype=torch.bool))
    assert tokens.shape == (3, 8)
    assert [p.size for p in poolings] == sizes[::-1]
    assert decoder(tokens, poolings).shape == x.shape


def test_a_patch_that_no_pooling_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at least 3 pixels along one axis, got \(2, 2, 2\)"):
        pooled_sizes((2, 2, 2))


def test_maxima_of_volumes_return_to_their_places() -> None:
    x = torch.randn(2, 3, 4, 2, 6)
    best, indices = torch.nn.functional.max_pool3d(x, 2, return_indices=True)
    back = unpool(best, Pooled(indices, (4, 2, 6)))
    expected = torch.nn.functional.max_unpool3d(best, indices, 2)
    assert torch.equal(back, expected)
    assert int((back != 0).sum()) == best.numel()


def test_flat_patches_of_volumes_are_encoded_like_patches_of_images() -> None:
    torch.manual_seed(0)
    flat, deep = PatchEncoder(2, 8, 6).eval(), PatchEncoder(2, 8, (6, 6, 1)).eval()
    back, deep_back = PatchDecoder(2, 8, 6), PatchDecoder(2, 8, (6, 6, 1))
    for one, other in ((flat, deep), (back, deep_back)):
        state = other.state_dict()
        for name, tensor in one.state_dict().items():
            if tensor.ndim == 4:  # the middle slice meets the patch, the others meet padding
                state[name][..., 1] = tensor
            else:
                state[name].copy_(tensor)
    x, counts = torch.randn(5, 2, 6, 6), torch.ones(5, dtype=torch.bool)
    with torch.no_grad():
        tokens, poolings = flat(x, counts)
        deep_tokens, deep_poolings = deep(x.unsqueeze(-1), counts)
        torch.testing.assert_close(deep_tokens, tokens)
        for a, b in zip(poolings, deep_poolings, strict=True):
            assert torch.equal(a.indices, b.indices.squeeze(-1))
        a, b = back(tokens, poolings), deep_back(deep_tokens, deep_poolings)
        torch.testing.assert_close(b.squeeze(-1), a)


def test_buckets_of_thick_slices_count_their_thickness() -> None:
    row = bucket_table((2, 1, 3), proportions=(1.0, 1.0, 2.0))[1, 1:]
    # distances 0, 2, 4 within a column, and 1, sqrt(5), sqrt(17) to the next
    assert row.tolist() == [3, 5, 6, 4, 5, 6]
    assert bucket_table((2, 1, 3))[1, 1:].tolist() == [3, 4, 5, 4, 4, 5]
