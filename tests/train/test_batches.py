"""Order of data, canvases and padding of batches."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.train.batches import Batches, Sizes
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.examples import Example

SIZES = Sizes(canvas=8, vocabulary=60, eos=(1, 5), context=200)


def example(number: int, prompt: int = 5, response: int = 6, eos: int = 5) -> Example:
    return Example((number,) * prompt + (number,) * (response - 1) + (eos,), prompt)


def batches(examples, **settings) -> Batches:
    return Batches(examples, TrainConfig(**settings), SIZES)


def firsts(batch) -> list[int]:
    """Which examples are in a batch, by their first token."""
    return sorted(np.array(batch.sequence)[:, 0].tolist())


def same(one, other) -> bool:
    names = ("sequence", "prefix", "canvas", "corrupted", "noise", "counted")
    equal = (
        np.array_equal(np.array(getattr(one, name)), np.array(getattr(other, name)))
        for name in names
    )
    return all(equal) and one.conditioned == other.conditioned


def test_a_batch_follows_from_its_number_alone():
    examples = [example(number) for number in range(7, 40)]
    going = batches(examples, batch_size=4, seed=3)
    seen = [going[number] for number in range(20)]
    for number in (19, 0, 7):
        assert same(batches(examples, batch_size=4, seed=3)[number], seen[number])
    assert not same(batches(examples, batch_size=4, seed=4)[7], seen[7])
    assert not same(seen[7], seen[8])


def test_each_example_comes_once_an_epoch_in_another_order():
    examples = [example(number) for number in range(7, 31)]  # 6 batches of 4, 3 windows of 2
    data = batches(examples, batch_size=4, sorted_batches=2)
    orders = []
    for epoch in range(2):
        order = [firsts(data[6 * epoch + number]) for number in range(6)]
        assert sorted(chain.from_iterable(order)) == list(range(7, 31))
        orders.append(order)
    assert orders[0] != orders[1]


def test_a_stream_is_asked_for_its_examples_in_order():
    asked = []

    def stream(first: int, count: int) -> list[Example]:
        asked.append((first, count))
        return [example(7 + number % 50) for number in range(first, first + count)]

    data = Batches(stream, TrainConfig(batch_size=2, sorted_batches=3), SIZES)
    seen = [firsts(data[number]) for number in range(6)]
    assert asked == [(0, 6), (6, 6)]
    assert sorted(chain.from_iterable(seen)) == list(range(7, 19))


def test_sequences_of_like_length_go_together():
    rng = np.random.default_rng(0)
    examples = [example(7, prompt=int(length)) for length in rng.integers(4, 150, 64)]

    def padding(window: int) -> int:
        data = batches(examples, batch_size=4, sorted_batches=window)
        parts = [data[number] for number in range(16)]
        return sum(part.sequence.size + part.canvas.size - part.tokens for part in parts)

    assert padding(16) < 0.5 * padding(1)


def test_a_canvas_is_any_of_its_response_with_all_before_it_as_prefix():
    tokens = (*range(7, 30), 5)
    one = Example(tokens, 3)  # 21 tokens of response: canvases of 8, 8 and 5
    data = batches([one], batch_size=1, sorted_batches=1)
    starts = set()
    for number in range(40):
        batch = data[number]
        start = int(batch.prefix[0].item())
        starts.add(start)
        left = list(tokens[start : start + 8])
        assert batch.canvas[0].tolist() == left + [5] * (8 - len(left))
        assert batch.sequence[0, : len(tokens)].tolist() == list(tokens)
    assert starts == {3, 11, 19}


def test_the_tail_is_filled_with_the_eos_of_the_response():
    for eos, fill in ((5, 5), (1, 1), (9, 1)):
        batch = batches([example(7, eos=eos)], batch_size=1)[0]
        assert batch.canvas[0].tolist()[6:] == [fill] * 2


@pytest.mark.parametrize(("mask_prompt", "first"), [(True, 4), (False, 0)])
def test_what_the_encoder_loss_counts(mask_prompt, first):
    batch = batches([example(7)], batch_size=1, mask_prompt=mask_prompt)[0]
    counted = np.flatnonzero(np.array(batch.counted)[0]).tolist()
    assert counted == list(range(first, 10))  # position 10 guesses what is beyond the end


def test_without_the_encoder_loss_the_sequence_ends_with_the_prefix():
    long = Example((7,) * 20 + (8,) * 59 + (5,), 20)
    one = batches([long], batch_size=1, encoder_loss_weight=0.0)
    for number in range(8):
        batch = one[number]
        assert batch.counted.shape == (1, 0)
        assert 0 <= batch.sequence.shape[1] - int(batch.prefix[0].item()) < 16


@pytest.mark.parametrize(("share", "expected"), [(0.0, {0}), (0.5, {3, 2}), (1.0, {5})])
def test_share_of_conditioned_examples(share, expected):
    examples = [example(number) for number in range(7, 40)]
    data = batches(examples, batch_size=5, self_conditioning=share)
    counts = [data[number].conditioned for number in range(60)]
    assert set(counts) == expected
    assert abs(np.mean(counts) - 5 * share) < 0.25


def test_few_lengths_occur():
    for least, most, kinds in ((1, 16, 1), (129, 180, 4)):
        examples = [example(7, prompt=n) for n in range(least, most - 5) if n > 0]
        data = batches(examples, batch_size=1)
        lengths = {data[number].sequence.shape[1] for number in range(len(examples))}
        assert len(lengths) <= kinds, lengths


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (example(7, prompt=190, response=11), "201 tokens"),
        (example(60), "outside 0 to 59"),
        (example(-1), "outside 0 to 59"),
    ],
)
def test_examples_that_cannot_be_trained_on(bad, message):
    with pytest.raises(UsageError, match=message):
        batches([bad], batch_size=1)[0]


def test_no_data():
    with pytest.raises(UsageError, match="empty"):
        batches([])[0]


@pytest.mark.parametrize("prompt", [0, 11])
def test_examples_need_a_prompt_and_a_response(prompt):
    with pytest.raises(UsageError, match="at least one token"):
        Example((7,) * 11, prompt)
