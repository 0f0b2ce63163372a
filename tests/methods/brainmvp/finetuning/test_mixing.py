"""Which modalities a template replaces: never all that a case has, every number alike, the same at each call."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from nnssl_plugin.methods.brainmvp.finetuning.mixing import Mixing, replaced_modalities
from nnssl_plugin.methods.brainmvp.finetuning.settings import Settings

CASES = ("all", "one", "two")
PRESENT = {
    "all": np.array([True, True, True, True]),
    "one": np.array([False, False, True, False]),
    "two": np.array([True, False, False, True]),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mixing(*, known=(True,) * 4, present=PRESENT, dimensions=3, seed=(1,), **settings):
    return Mixing(Settings(**settings), known, present, dimensions, seed)


def data(batch=3, channels=4, size=(6, 5, 7), windows=()):
    """Images below 0, templates above."""
    images = -torch.rand(batch, channels, *windows, *size) - 0.1
    return torch.cat((images, torch.rand(batch, channels, *windows, *size) + 0.1), 1)


@pytest.mark.parametrize("known", [(True, True, True, True), (True, False, True, False), (False, False, True, True)])
def test_one_modality_that_the_case_has_always_stays_and_only_known_ones_go(known):
    present = torch.tensor([list(row) for row in product((False, True), repeat=4) if any(row)])
    known = torch.tensor(known)
    for seed in range(300):
        replaced = replaced_modalities(present, known, 3, seeded(seed))
        assert (present & ~replaced).any(1).all() and not (replaced & ~known).any()


def test_the_number_is_even_from_0_to_the_most_and_the_choice_even_among_the_modalities():
    present = torch.ones(20000, 4, dtype=torch.bool)
    replaced = replaced_modalities(present, torch.ones(4, dtype=torch.bool), 3, seeded(0))
    counts = torch.bincount(replaced.sum(1), minlength=5)[:4] / 20000
    torch.testing.assert_close(counts, torch.full((4,), 0.25), atol=0.015, rtol=0)
    torch.testing.assert_close(replaced.float().mean(0), torch.full((4,), 0.375), atol=0.015, rtol=0)
    pairs = Counter(tuple(row.nonzero().flatten().tolist()) for row in replaced if row.sum() == 2)
    assert len(pairs) == 6 and min(pairs.values()) > 700 and max(pairs.values()) < 970  # 5000 / 6 each
    few = replaced_modalities(present, torch.ones(4, dtype=torch.bool), 1, seeded(0))
    assert few.sum(1).max() == 1
    assert not replaced_modalities(present, torch.ones(4, dtype=torch.bool), 0, seeded(0)).any()


def test_absent_modalities_go_too_sometimes():
    present = torch.tensor([[False, False, True, False]]).expand(2000, 4)
    replaced = replaced_modalities(present, torch.ones(4, dtype=torch.bool), 3, seeded(0))
    assert not replaced[:, 2].any()
    shares = replaced.float().mean(0)[[0, 1, 3]]
    torch.testing.assert_close(shares, torch.full((3,), 0.5), atol=0.05, rtol=0)


@pytest.mark.parametrize(("size", "windows"), [((6, 5, 7), ()), ((6, 5), ()), ((6, 5, 7), (2,))])
def test_a_copy_has_in_each_channel_the_image_or_the_whole_template(size, windows):
    batch = data(size=size, windows=windows)
    copies = mixing(dimensions=len(size)).copies(batch, CASES, 4)
    assert copies.shape == (6, 4, *windows, *size)
    images, templates = batch[:, :4], batch[:, 4:]
    chosen = []
    for row, copy in enumerate(copies):
        for channel, found in enumerate(copy):
            options = images[row % 3, channel], templates[row % 3, channel]
            matches = [torch.equal(found, option) for option in options]
            assert sum(matches) == 1
            chosen.append(matches.index(True))
    assert 0 < sum(chosen) < len(chosen)


def test_the_two_copies_differ_and_a_step_repeats_itself_alone():
    batch = data()
    draws = [mixing().copies(batch, CASES, step) for step in (0, 0, 1)]
    other = mixing(seed=(2,)).copies(batch, CASES, 0)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], other)
    many = torch.stack([mixing().copies(batch, CASES, step) for step in range(20)])
    assert not torch.equal(many[:, :3], many[:, 3:])


def test_without_replacements_both_copies_are_the_image():
    batch = data()
    copies = mixing(most_replaced=0).copies(batch, CASES, 0)
    assert torch.equal(copies, torch.cat((batch[:, :4], batch[:, :4])))


@pytest.mark.parametrize("windows", [(), (3,)])
def test_one_channel_is_masked_twice_by_cubes_of_its_template(windows):
    present = {case: np.array([True]) for case in CASES}
    batch = data(channels=1, size=(16, 16, 16), windows=windows)
    subject = mixing(known=(True,), present=present, masked=0.5, block=4)
    copies = subject.copies(batch, CASES, 0)
    assert copies.shape == (6, 1, *windows, 16, 16, 16)
    replaced = copies > 0
    both = batch.unflatten(1, (2, 1))
    expected = torch.where(
        replaced, both[:, 1].repeat(2, *(1,) * (copies.ndim - 1)), both[:, 0].repeat(2, *(1,) * (copies.ndim - 1))
    )
    assert torch.equal(copies, expected)
    assert not torch.equal(replaced[:3], replaced[3:])
    torch.testing.assert_close(replaced.float().mean().item(), 0.5, atol=0.06, rtol=0)
    assert (replaced.flatten(2).float().mean(-1) >= 0.5).all() or windows  # reached in each image


def test_a_batch_of_one_case_that_has_one_modality():
    batch = data(batch=1)
    for step in range(50):
        copies = mixing().copies(batch, ["one"], step)
        assert torch.equal(copies[:, 2], batch[:, 2].expand(2, -1, -1, -1))
