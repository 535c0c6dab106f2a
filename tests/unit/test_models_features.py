"""Fixed front ends: functions of one record, bounded, and blind to what must not matter."""

import pytest
import torch

from fedfuse_shared.models import features

GREY = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0)).expand(3, 28, 28)
COLOUR = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(1))
MEL = -13 * torch.rand(40, 48, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "values",
    [
        features.oriented_gradients(GREY),
        features.oriented_gradients(COLOUR),
        features.spectral_shape(MEL),
        features.hashed_words("one two two three", limit=9, buckets=32),
    ],
)
def test_features_have_norm_one(values):
    assert values.norm().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        features.oriented_gradients(torch.full((3, 28, 28), 0.5)),
        features.spectral_shape(torch.full((40, 48), -13.8)),
        features.hashed_words("... !", limit=9, buckets=32),
        features.standardised(torch.full((40, 48), -13.8)),
        features.centred(torch.full((3, 28, 28), 0.5)),
    ],
)
def test_an_empty_record_gives_finite_features_near_zero(values):
    assert torch.isfinite(values).all()
    assert values.abs().max() < 0.05


def test_gradients_look_at_shape_not_at_brightness_and_leave_colour_empty_in_grey():
    plain = features.oriented_gradients(GREY)
    assert torch.allclose(plain, features.oriented_gradients(GREY * 0.5 + 0.4), atol=0.05)
    assert torch.equal(plain[-98:], torch.zeros(98))
    assert features.oriented_gradients(COLOUR)[-98:].abs().max() > 0


def test_a_vertical_edge_and_a_horizontal_one_fall_in_different_directions():
    edge = torch.zeros(3, 28, 28)
    edge[:, :, 14:] = 1
    upright = features.oriented_gradients(edge)[:392].view(8, 49).sum(dim=1)
    lying = features.oriented_gradients(edge.transpose(1, 2))[:392].view(8, 49).sum(dim=1)
    assert upright.argmax() == 0
    assert lying.argmax() == 4


def test_the_level_of_a_spectrum_does_not_matter():
    assert torch.allclose(features.spectral_shape(MEL), features.spectral_shape(MEL + 3), atol=1e-5)


def test_words_are_folded_counted_without_order_and_limited():
    bag = features.hashed_words("Straße ÉCOLE école", limit=9, buckets=64)
    assert torch.equal(bag, features.hashed_words("école STRASSE École", limit=9, buckets=64))
    assert features.words_of("a b, c-d  ﬁn", 4) == ["a", "b", "c", "d"]
    assert features.words_of("ﬁn ひらがな 42", 9) == ["fin", "ひらがな", "42"]


def test_buckets_are_the_same_in_every_process():
    assert features.hashed_words("privacy", limit=1, buckets=2048).argmax() == 264  # CRC-32, not hash()


def test_bytes_are_shifted_by_one_and_padded_with_zero():
    assert features.byte_ids("é", 4).tolist() == [0xC3 + 1, 0xA9 + 1, 0, 0]
    assert features.byte_ids("abcdef", 3).tolist() == [98, 99, 100]
    assert features.byte_ids("", 2).tolist() == [0, 0]
