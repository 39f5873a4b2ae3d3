"""The connection between rank 0 and its followers: who may join, what is said, and how it ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlx_diffgemma.distributed import channel, launched, line
from mlx_diffgemma.distributed.channel import Follower, Leader
from mlx_diffgemma.distributed.group import Ranks
from mlx_diffgemma.distributed.line import LOST, Ending, RanksError

LOCAL = ("127.0.0.1",)


class Losses:
    """What a side was told about its end."""

    def __init__(self) -> None:
        self.found: list[Ending] = []
        self._came = threading.Event()

    def __call__(self, ending: Ending) -> None:
        self.found.append(ending)
        self._came.set()

    def wait(self) -> Ending:
        assert self._came.wait(5)
        (ending,) = self.found
        return ending


class Sides:
    """A leader and its followers in one process."""

    def __init__(self, size: int = 3) -> None:
        self.losses = [Losses() for _ in range(size)]
        self.leader = Leader(size, LOCAL, self.losses[0])
        self.followers: dict[int, Follower] = {}

        def join(rank: int) -> None:
            self.followers[rank] = Follower(rank, self.leader.invitation, self.losses[rank])

        joining = [threading.Thread(target=join, args=(rank,)) for rank in range(1, size)]
        for each in joining:
            each.start()
        self.leader.accept(5)
        for each in joining:
            each.join()

    def close(self) -> None:
        self.leader.end(seconds=0)
        for each in self.followers.values():
            each.leave()


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(channel, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(channel, "LOOK_SECONDS", 0.02)
    made = Sides()
    yield made
    made.close()


def test_orders_come_in_order_and_end(ranks):
    sent = [{"do": "encode", "number": n} for n in range(50)]
    took: dict[int, list] = {rank: [] for rank in ranks.followers}

    def follow(rank: int) -> None:
        took[rank] += ranks.followers[rank].orders()
        ranks.followers[rank].leave()

    following = [threading.Thread(target=follow, args=(rank,)) for rank in took]
    for each in following:
        each.start()
    for order in sent:
        ranks.leader.send(order)
    ranks.leader.end(Ending(7))
    for each in following:
        each.join(5)
    assert took == {1: sent, 2: sent}
    assert {each.ending for each in ranks.followers.values()} == {Ending(7)}
    assert not any(each.found for each in ranks.losses)


def test_followers_hand_in_by_rank_and_get_values(ranks):
    for rank, follower in ranks.followers.items():
        follower.tell({"rank": rank})
    assert ranks.leader.gather() == {1: {"rank": 1}, 2: {"rank": 2}}
    ranks.leader.spread([1, 2])
    assert [each.value() for each in ranks.followers.values()] == [[1, 2]] * 2


def test_ranks_that_differ_are_refused_on_all(ranks):
    """By facts that rank 0 has, by those that it lacks, and only then."""
    groups = {
        rank: SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 3) for rank in range(3)
    }
    seen = {rank: Ranks(groups[rank], ranks.losses[rank]) for rank in range(3)}
    seen[0].leader = ranks.leader
    for rank, follower in ranks.followers.items():
        seen[rank].follower = follower
    facts = {"mlx": "0.32.4", "config.json": "aa"}

    def agree(theirs: dict[str, str]) -> None:
        for rank in (1, 2):
            asking = threading.Thread(
                target=seen[rank].agree, args=(theirs if rank == 2 else facts,)
            )
            asking.start()
        seen[0].agree(facts)

    agree(facts)
    with pytest.raises(
        RanksError, match=r"rank 2 has config\.json bb and rank 0 has config\.json aa;"
    ):
        agree(facts | {"config.json": "bb"})
    assert "rank 2 has config.json bb" in (ranks.losses[1].wait().line or "")
    assert ranks.losses[2].wait().code == 1


def test_the_error_of_one_ends_all(ranks):
    ranks.followers[2].fail("the weights are gone; fetch them.", 1, seconds=0)
    expected = Ending(1, "rank 2: the weights are gone; fetch them.")
    assert [each.wait() for each in ranks.losses] == [expected] * 3


def test_a_closed_connection_is_a_loss_for_all(ranks):
    ranks.followers[1].leave()
    told = ranks.losses[0].wait()
    assert told.code == LOST and told.line.startswith("rank 1 ended without a word;")
    assert ranks.losses[2].wait() == told


def test_rank_0_gone_is_a_loss_for_all_others(ranks):
    ranks.leader._ended.set()  # it does not say so
    for peer in ranks.leader._peers.values():
        peer.line.close()
    for each in ranks.losses[1:]:
        told = each.wait()
        assert told.code == LOST and told.line.startswith("rank 0 ended without a word;")


def test_silence_is_a_loss(ranks, monkeypatch):
    monkeypatch.setattr(ranks.followers[2], "_report", lambda: None)
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.5)
    told = ranks.losses[0].wait()
    assert told.code == LOST and told.line.startswith("rank 2 has said nothing for")
    assert ranks.losses[1].wait() == told


def test_an_order_that_nobody_gets_on_with_is_a_loss(ranks, monkeypatch):
    monkeypatch.setattr(channel, "STUCK_SECONDS", 0.5)
    time.sleep(0.7)  # nothing is outstanding, so nothing is amiss
    assert not ranks.losses[0].found
    ranks.leader.send({"do": "encode"})
    next(ranks.followers[1].orders())
    told = ranks.losses[0].wait()
    assert told.line.startswith("ranks 1, 2 did not finish an order for")


def test_a_stranger_is_not_listened_to():
    leader = Leader(2, LOCAL, Losses())
    place = (LOCAL[0], leader.invitation.port)
    errors: list[RanksError] = []

    def accept() -> None:
        try:
            leader.accept(1.5)
        except RanksError as error:
            errors.append(error)

    accepting = threading.Thread(target=accept)
    accepting.start()
    with socket.create_connection(place) as stranger:
        stranger.recv(100)
        stranger.sendall(json.dumps({"hello": [1, "0" * 64, "a"]}).encode() + b"\n")
        assert stranger.recv(100) == b""  # it is shown the door
    with socket.create_connection(place) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    accepting.join(5)
    (error,) = errors
    assert "rank 1 did not connect to rank 0" in str(error) and error.exit_code == LOST


def test_a_follower_does_not_obey_who_lacks_the_secret(monkeypatch):
    monkeypatch.setattr(channel, "JOIN_SECONDS", 1.0)
    leader = Leader(2, LOCAL, Losses())
    other = replace(leader.invitation, secret="00" * 32)

    def accept() -> None:
        with pytest.raises(RanksError):
            leader.accept(1.5)

    accepting = threading.Thread(target=accept)
    accepting.start()
    with pytest.raises(RanksError, match="cannot reach rank 0"):
        channel._connected(1, other, 1.0)
    accepting.join(5)


def test_a_line_is_bounded(ranks, monkeypatch):
    monkeypatch.setattr(line, "LONGEST_LINE", 1000)
    with pytest.raises(ValueError, match="longer than 1000"):
        ranks.leader.send({"ids": "1" * 2000})
    ranks.followers[1]._line._connection.sendall(b"1" * 2000)
    assert "longer than 1000" in ranks.losses[0].wait().line


def test_addresses_of_rank_0(monkeypatch, tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["127.0.0.1:32323", "127.0.0.1:32324"], ["127.0.0.1:32325"]]))
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert launched.count() == 2
    monkeypatch.delenv("MLX_JACCL_COORDINATOR", raising=False)
    assert launched.addresses() == LOCAL
    hosts.write_text(json.dumps([["192.168.7.1:32323"], ["192.168.7.2:32324"]]))
    assert launched.addresses()[0] == "192.168.7.1"
    monkeypatch.delenv("MLX_HOSTFILE")
    monkeypatch.setenv("MLX_JACCL_COORDINATOR", "10.0.0.1:32323")
    assert launched.addresses()[0] == "10.0.0.1"
