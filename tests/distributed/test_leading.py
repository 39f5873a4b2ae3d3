"""What rank 0 orders, and that nothing breaks off between an order and rank 0's own part of it."""

from __future__ import annotations

import json
import os
import signal

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.distributed.exchange import Exchange
from mlx_diffgemma.distributed.leading import OutOfStepError, lead
from mlx_diffgemma.distributed.loading import local_model, share_of_weights
from mlx_diffgemma.distributed.orders import found_prefix, told_prefix
from mlx_diffgemma.distributed.shares import Split, shares_of
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import CanvasView
from mlx_diffgemma.model.layers import DecoderLayer


class Sent(list):
    """Orders as a follower would read them."""

    def send(self, order):
        self.append(json.loads(json.dumps(order)))


@pytest.fixture
def leading(tiny_model):
    """A model that leads nobody, and what it orders."""
    whole, sent = tiny_model(11), Sent()
    (share,) = shares_of(whole.config, Split.even("tensor", 1))
    model = local_model(share)
    model.load_weights(
        list(share_of_weights(share, dict(tree_flatten(whole.parameters()))).items())
    )
    return lead(model, share, Exchange(mx.distributed.init()), sent), sent


def test_what_is_no_longer_held_is_told_with_the_next_order(leading):
    model, sent = leading
    _, (first,) = model.encode([[7, 8, 9]], [model.empty_prefix()])
    _, (second,) = model.encode([[10]], [first.cut(2)])
    assert [order["keep"] for order in sent] == [[0], [1]]
    assert sent[1]["prefixes"] == [{"origin": 0, "length": 2, "room": 0, "marks": []}]
    del first
    _, kept = model.decode_keeping([CanvasView(mx.array([3, 4]), second)])
    assert sent[2]["dead"] == [0] and sent[2]["keep"] == [2]
    model.decode([CanvasView(mx.array([3, 4]), second)])
    assert "dead" not in sent[3]
    del kept, second
    model.encode([[5]], [model.empty_prefix()])
    assert sorted(sent[4]["dead"]) == [1, 2, 3]


def test_ctrl_c_takes_effect_behind_rank_0s_own_part(leading):
    model, sent = leading
    send = sent.send

    def pressed(order):
        send(order)
        os.kill(os.getpid(), signal.SIGINT)

    sent.send = pressed
    with pytest.raises(KeyboardInterrupt):
        model.encode([[7, 8]], [model.empty_prefix()])
    sent.send = send
    hidden, _ = model.encode([[7, 8]], [model.empty_prefix()])
    assert hidden.shape[0] == 2 and len(sent) == 2


def test_a_pass_that_broke_off_is_the_last_one(leading, monkeypatch):
    model, sent = leading
    with monkeypatch.context() as broken:
        broken.setattr(DecoderLayer, "before_experts", None)
        with pytest.raises(TypeError):
            model.encode([[7]], [model.empty_prefix()])
    assert model.leading.is_broken
    with pytest.raises(OutOfStepError, match="start all of them anew"):
        model.encode([[7]], [model.empty_prefix()])
    assert len(sent) == 1


def test_a_refusal_orders_nothing(leading):
    model, sent = leading
    with pytest.raises(UsageError, match="empty row"):
        model.encode([[]], [model.empty_prefix()])
    assert not sent


def test_a_prefix_is_found_by_way_of_the_marks_that_rank_0_went_by(tiny_model):
    """Rank 0 may have cut a prefix at a mark, and again before it, where sliding layers had not
    dropped anything yet."""
    model = tiny_model(11)
    window = model.config.text.sliding_window
    ids = list(range(7, 7 + 3 * window))
    _, (early,) = model.encode([ids[: window - 2]], [model.empty_prefix()])
    _, (held,) = model.encode([ids[window - 2 :]], [early.marked()])
    cut = held.back_to(ids[: window - 2]).back_to(ids[:4])
    assert len(cut) == 4 and not held.can_be_cut(4)
    told = told_prefix(cut) | {"origin": 3}
    found = found_prefix(told, {3: held}, model.empty_prefix())
    assert found.ids == cut.ids and not found.marks
    for ours, theirs in zip(found.layers, cut.layers, strict=True):
        assert all(mx.array_equal(*pair) for pair in zip(ours.held(), theirs.held(), strict=True))
