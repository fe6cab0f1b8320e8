"""The pictures of the labs: parts share no digit, seeds give the same pictures, and a network learns them."""

from __future__ import annotations

import torch

from compresslab.course import digits


def test_no_digit_is_in_two_parts_and_all_are_in_one() -> None:
    found = [digits._originals(part)[0].flatten(1) for part in digits.SHARES]
    assert [len(part) for part in found] == [*digits.SHARES.values()]
    rows = [tuple(row.tolist()) for part in found for row in part]
    assert len(rows) == len(set(rows)) == 1797


def test_a_seed_gives_the_same_pictures_and_another_one_others() -> None:
    one, same, other = (digits.pictures("train", 50, seed) for seed in (1, 1, 2))
    assert torch.equal(one.pixels, same.pixels) and torch.equal(one.labels, same.labels)
    assert not torch.equal(one.pixels, other.pixels)


def test_without_noise_a_picture_is_its_digit_at_some_place() -> None:
    shown = digits.pictures("test", 40, noise=0.0)
    images, labels = digits._originals("test")
    sums = {(int(y), round(float(image.sum()), 3)) for image, y in zip(images, labels, strict=True)}
    assert {(int(y), round(float(p.sum()), 3)) for p, y in zip(shown.pixels, shown.labels, strict=True)} <= sums
    places = {tuple(p[0].nonzero().amin(dim=0).tolist()) for p in shown.pixels}
    assert len(places) > 5


def test_a_network_learns_them_and_is_the_same_from_the_cache() -> None:
    settings = digits.Training(pictures=1400, epochs=4)
    test = digits.pictures("test", 300)
    network = digits.trained(7, settings)
    assert digits.accuracy(network, test) > 0.5 > digits.accuracy(digits.build(settings, 7), test)
    again = digits.trained(7, settings)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
