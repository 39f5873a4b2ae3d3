"""The engine: what requests become in each other's company, how they leave, and what they share."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma import load, stream_generate
from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.distributed.line import LOST, RanksError
from mlx_diffgemma.editing.decide import decide
from mlx_diffgemma.editing.infill import infill
from mlx_diffgemma.editing.structured import generate_structured
from mlx_diffgemma.errors import MemoryShortageError, UsageError
from mlx_diffgemma.server.asking import answer
from mlx_diffgemma.server.engine import Engine, EngineSettings, QueueFullError
from mlx_diffgemma.server.jobs import Seat, Ticket
from mlx_diffgemma.server.pieces import Asked, Text
from mlx_diffgemma.server.refusals import refusal

PUZZLE = "1.3.5. 4.6.2. 2.1.6. 5.4.3. 3.2.1. 6.5.4."


@cache
def loaded() -> tuple[Any, Any]:
    return load("demo")


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Engine]:
    model, tokenizer = loaded()
    engine = Engine(model, tokenizer, name="demo", settings=EngineSettings(**settings))
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop, 10.0)
        assert not engine._thread.is_alive()
        assert engine.failure is None


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


def said(prompt: str, seed: int, **options: Any) -> Callable[[Seat], Any]:
    """A work that answers a prompt."""

    def work(seat: Seat) -> Any:
        return stream_generate(
            seat.model, seat.tokenizer, prompt, seed=seed, draft=False,
            denoiser=seat.denoiser, prefix_cache=seat.cache, **options,
        )  # fmt: skip

    return work


async def text_of(ticket: Ticket) -> str:
    return "".join([response.text async for response in ticket])


def alone(prompt: str, seed: int, **options: Any) -> str:
    model, tokenizer = loaded()
    responses = stream_generate(model, tokenizer, prompt, seed=seed, draft=False, **options)
    return "".join(response.text for response in responses)


PROMPTS = ["sort: 3 1 2", "count to 5", "hi", f"sudoku: {PUZZLE}", "sort: 9 8 1 4", "two plus two"]


def test_each_answer_is_the_one_that_its_seed_gives_alone() -> None:
    async def test() -> None:
        async with running(max_batch=4) as engine:
            tickets = [
                engine.submit(said(prompt, seed, profile=profile, max_tokens=96))
                for seed, prompt in enumerate(PROMPTS)
                for profile in ("exact", "balanced")
            ]
            texts = await asyncio.gather(*map(text_of, tickets))
            assert engine.counters.steps < engine.counters.canvas_steps
        expected = [
            alone(prompt, seed, profile=profile, max_tokens=96)
            for seed, prompt in enumerate(PROMPTS)
            for profile in ("exact", "balanced")
        ]
        assert texts == expected

    run(test)


def test_every_kind_of_work_shares_the_engine() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    questions = {"even": {"type": "noul", "instructions": "the number is even"}}

    def works(seat: Any) -> dict[str, Callable[[], Any]]:
        shared: dict[str, Any] = (
            {"denoiser": seat.denoiser, "prefix_cache": seat.cache}
            if isinstance(seat, Seat)
            else {}
        )
        at = (seat.model, seat.tokenizer) if isinstance(seat, Seat) else loaded()
        return {
            "infill": lambda: infill(*at, "1 2 [[?]] 4", seed=1, lengths=[1, 2], **shared).text,
            "schema": lambda: (
                generate_structured(
                    *at, "give a number", 24, json_schema=schema, seed=2, **shared
                ).text
            ),
            "decide": lambda: [
                answer.probabilities
                for answer in decide(*at, "4", questions, seed=3, **shared).answers.values()
            ],
        }

    async def one(engine: Engine, name: str) -> Any:
        return [value async for value in engine.submit(lambda seat: [works(seat)[name]()])]

    async def test() -> None:
        async with running() as engine:
            names = list(works(None))
            got = await asyncio.gather(*(one(engine, name) for name in names))
        for name, (found,) in zip(names, got, strict=True):
            expected = works(None)[name]()
            if name == "decide":
                assert found[0] == pytest.approx(expected[0], abs=1e-5)
            else:
                assert found == expected

    run(test)


def test_a_cancelled_request_ends_within_a_step_and_others_go_on() -> None:
    async def test() -> None:
        async with running() as engine:
            steps: list[int] = []

            async def leave_after(ticket: Ticket, count: int) -> None:
                async with ticket:
                    async for _ in ticket:
                        count -= 1
                        if not count:
                            steps.append(engine.counters.steps)
                            return

            goes = engine.submit(said(PROMPTS[0], 0, profile="exact", max_tokens=64))
            leaves = engine.submit(said(PROMPTS[1], 1, profile="exact", max_tokens=2000))
            never_begins = engine.submit(said(PROMPTS[2], 2))
            never_begins.cancel()
            text, _ = await asyncio.gather(text_of(goes), leave_after(leaves, 3))
            while engine.counters.cancelled < 2:
                await asyncio.sleep(0.01)
            assert text == alone(PROMPTS[0], 0, profile="exact", max_tokens=64)
            assert leaves.state == never_begins.state == "done"
            after = engine.counters.steps
            await asyncio.sleep(0.2)
            assert engine.counters.steps == after

    run(test)


def test_a_long_prompt_is_left_within_a_chunk() -> None:
    async def test() -> None:
        async with running() as engine:
            ids = [5] * 900
            ticket = engine.submit(said(ids, 0, raw=True, prefill_step_size=16))  # type: ignore[arg-type]
            while not engine.counters.chunks:
                await asyncio.sleep(0)
            ticket.cancel()
            while ticket.state != "done":
                await asyncio.sleep(0)
            assert engine.counters.chunks < 900 // 16

    run(test)


def test_what_an_earlier_request_encoded_is_not_encoded_again() -> None:
    system = "You are terse. " * 12

    async def test() -> None:
        async with running() as engine:
            tickets = []
            for prompt in ("hi", "hello"):
                options = {"system_prompt": system, "max_tokens": 16}
                tickets.append(engine.submit(said(prompt, 0, **options)))
                assert await text_of(tickets[-1]) == alone(prompt, 0, **options)
            first, second = (ticket.seat for ticket in tickets)
            assert first.cached_tokens == 0
            assert second.cached_tokens > second.prompt_tokens // 2

    run(test)


def test_a_failure_is_that_of_its_request() -> None:
    def fails(seat: Seat) -> Any:
        yield 1
        raise UsageError("no.")

    async def test() -> None:
        async with running() as engine:
            ticket = engine.submit(fails)
            goes = engine.submit(said("hi", 0, max_tokens=16))
            with pytest.raises(UsageError, match=r"^no"):
                [value async for value in ticket]
            assert await text_of(goes) == alone("hi", 0, max_tokens=16)
            assert engine.counters.failed == 1

    run(test)


def test_a_lost_mac_is_told_to_all_who_wait_while_the_engine_is_blocked() -> None:
    """By another thread than the engine's, which waits in a collective for ever; what comes of
    that later tells nobody anything else."""
    gone, told = threading.Event(), RanksError("rank 1 is gone.", LOST)

    def blocked(seat: Seat) -> Any:
        yield 1
        gone.wait(60)
        raise RuntimeError("[ring] connection to a peer was lost")

    async def test() -> None:
        model, tokenizer = loaded()
        settled: list[BaseException] = []
        engine = Engine(model, tokenizer, name="demo", settle=settled.append)
        tickets = [engine.submit(blocked), engine.submit(said("hi", 0))]
        assert await anext(tickets[0]) == 1
        await asyncio.to_thread(engine.fail, told)
        for ticket in tickets:
            with pytest.raises(RanksError) as raised:
                [value async for value in ticket]
            refused = refusal(raised.value)
            assert refused.status == 503 and refused.headers["retry-after"]
        with pytest.raises(QueueFullError):
            engine.submit(said("hi", 0))
        assert not engine.alive and engine.failure is told
        gone.set()
        await asyncio.to_thread(engine.stop, 10.0)
        assert not engine._thread.is_alive() and engine.failure is told
        assert [type(each) for each in settled] == [RuntimeError]

    run(test)


def test_a_bad_value_ends_its_own_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from mlx_diffgemma.diffusion import predict
    from mlx_diffgemma.errors import NumericalError

    whole = predict.Predictor.__call__

    def spoilt(self: Any, canvases: Any, prefixes: Any) -> Any:
        passed = whole(self, canvases, prefixes)
        return [
            replace(
                each,
                prediction=replace(each.prediction, entropy=each.prediction.entropy * float("nan")),
            )
            if canvas.settings.max_tokens == 31
            else each
            for canvas, each in zip(canvases, passed, strict=True)
        ]

    async def test() -> None:
        async with running() as engine:
            bad = engine.submit(said("hi", 0, max_tokens=31))
            good = engine.submit(said("count to 5", 0, max_tokens=32))
            found = await asyncio.gather(text_of(bad), text_of(good), return_exceptions=True)
            assert isinstance(found[0], NumericalError)
            assert found[1] == expected

    expected = alone("count to 5", 0, max_tokens=32)
    monkeypatch.setattr(predict.Predictor, "__call__", spoilt)
    run(test)


def test_a_step_that_cannot_be_queued_fails_for_the_request_that_is_to_blame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_diffgemma.diffusion import predict

    whole, shared = predict.Predictor.__call__, []

    def spoilt(self: Any, canvases: Any, prefixes: Any) -> Any:
        lengths = [canvas.settings.max_tokens for canvas in canvases]
        if 31 in lengths:
            shared.append(len(lengths))
            raise RuntimeError("a fault of MLX")
        return whole(self, canvases, prefixes)

    async def test() -> None:
        async with running() as engine:
            with engine._changed:  # they begin together
                bad = engine.submit(said("hi", 0, max_tokens=31))
                good = engine.submit(said("count to 5", 0, max_tokens=32))
            found = await asyncio.gather(text_of(bad), text_of(good), return_exceptions=True)
            assert isinstance(found[0], RuntimeError)
            assert found[1] == expected and max(shared) == 2

    expected = alone("count to 5", 0, max_tokens=32)
    monkeypatch.setattr(predict.Predictor, "__call__", spoilt)
    run(test)


def test_more_than_may_wait_are_refused() -> None:
    async def test() -> None:
        async with running(queue=2) as engine:
            with engine._changed:  # the engine cannot begin any
                tickets = [engine.submit(said("hi", 0, max_tokens=8)) for _ in range(2)]
                with pytest.raises(QueueFullError, match="2 requests wait already"):
                    engine.submit(said("hi", 0))
            assert len(set(await asyncio.gather(*map(text_of, tickets)))) == 1

    run(test)


def test_requests_that_do_not_fit_together_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with running() as engine:
            need = engine._bytes(64, 64)
            monkeypatch.setattr(memory, "available_memory", lambda: need * 3 // 2)
            beside = []

            def work(seat: Seat) -> Any:
                beside.append(len(engine._running))
                yield from said("hi", 0, max_tokens=8)(seat)

            with engine._changed:
                sizes = {"prompt_tokens": 64, "answer_tokens": 64}
                tickets = [engine.submit(work, **sizes) for _ in range(3)]
            await asyncio.gather(*map(text_of, tickets))
            assert beside == [1, 1, 1]

    run(test)


def test_memory_is_reserved_for_the_canvases_that_a_request_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with running() as engine:
            offered = engine._bytes(2, 2000) * 2  # enough for canvases of the model's own length
            monkeypatch.setattr(memory, "available_memory", lambda: offered)
            engine._offered = 0
            asked = Asked(prompt="hi", seed=0, max_tokens=64, settings={"canvas_length": 2000})
            with pytest.raises(MemoryShortageError, match="the length of a canvas"):
                async for _ in answer(engine, asked):
                    pass

    run(test)


def test_what_there_is_no_memory_for_now_may_be_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(prompt="hi", seed=0, max_tokens=8)

    async def texts(engine: Engine) -> str:
        return "".join([p.text async for p in answer(engine, asked) if isinstance(p, Text)])

    async def test() -> None:
        async with running(prefix_bytes=0) as engine:
            expected = await texts(engine)
            whole = memory.available_memory()
            monkeypatch.setattr(memory, "available_memory", lambda: 0)
            with pytest.raises(MemoryShortageError) as now:
                await texts(engine)
            assert (refusal(now.value).status, engine.counters.failed) == (503, 1)
            assert refusal(now.value).headers["retry-after"] == "5"
            monkeypatch.setattr(engine, "_offered", 0)
            with pytest.raises(MemoryShortageError) as ever:
                await texts(engine)
            assert refusal(ever.value).status == 400
            monkeypatch.setattr(memory, "available_memory", lambda: whole)
            assert await texts(engine) == expected

    run(test)


def test_a_request_that_is_over_holds_no_arrays() -> None:
    async def leave(engine: Engine, seed: int) -> None:
        ticket = engine.submit(said(PROMPTS[seed % 3], seed, profile="exact", max_tokens=900))
        async with ticket:
            count = 0
            async for _ in ticket:
                count += 1
                if count > 2 + seed % 4:
                    break
        while ticket.state != "done":
            await asyncio.sleep(0.005)

    async def test() -> None:
        async with running(prefix_bytes=0) as engine:
            held = []
            gc.collect()
            gc.disable()  # what only it would find is held for as long as it does not run
            try:
                for _ in range(3):
                    await asyncio.gather(*(leave(engine, seed) for seed in range(6)))
                    await asyncio.sleep(0.1)
                    held.append(mx.get_active_memory())
            finally:
                gc.enable()
            assert max(held) - min(held) < 100_000

    run(test)


def test_nothing_is_left_when_the_engine_ends() -> None:
    async def test() -> None:
        threads = threading.active_count()
        async with running() as engine:
            ticket = engine.submit(said("hi", 0, profile="exact", max_tokens=4000))
            async for _ in ticket:
                break
            await asyncio.to_thread(engine.stop, 0.0)
        assert threading.active_count() <= threads + 1  # the event loop's own worker

    run(test)
    mx.clear_cache()
