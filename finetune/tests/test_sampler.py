"""Batches of similar length: every example once an epoch, little padding, an order that can be had again."""

from __future__ import annotations

import random

from finetune.sampler import SimilarLengths

CHOICE = random.Random(0)
LENGTHS = [CHOICE.choice([8, 12, 20, 200]) + place % 5 for place in range(333)]


def batches(sampler):
    order = list(sampler)
    return [order[start : start + sampler.batch] for start in range(0, len(order), sampler.batch)]


def test_every_epoch_has_each_example_once_in_an_order_of_its_own():
    sampler, orders = SimilarLengths(LENGTHS, 8, seed=3), []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(LENGTHS))) and len(sampler) == len(LENGTHS)
    assert orders[0] == orders[2] != orders[1]
    assert list(SimilarLengths(LENGTHS, 8, seed=3)) == orders[0] != list(SimilarLengths(LENGTHS, 8, seed=4))


def test_batches_hold_less_padding_than_random_ones():
    def padded(groups):
        return sum(len(group) * max(LENGTHS[place] for place in group) for group in groups)

    indices = list(range(len(LENGTHS)))
    at_random = padded([indices[start : start + 8] for start in range(0, len(indices), 8)])
    assert sum(LENGTHS) <= padded(batches(SimilarLengths(LENGTHS, 8, seed=0))) < 0.6 * at_random


def test_long_batches_do_not_come_together():
    longest = [max(LENGTHS[place] for place in group) for group in batches(SimilarLengths(LENGTHS, 8, seed=0))]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
