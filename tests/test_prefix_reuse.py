"""A prefix cache from one call to the next: what it saves, and that no way of using it is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from text.gemma_like import TEMPLATE, build

from mlx_diffgemma import batch_generate, generate, load, stream_generate
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.encode import ends_of_turns
from mlx_diffgemma.diffusion.generate import generate_canvases
from mlx_diffgemma.diffusion.noise import seeded
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.model.cache import Prefix, PrefixCache
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma
from mlx_diffgemma.text.prompt import encode_prompt

PUZZLE = "sudoku\n4..613\n61.42.\n.6...4\n134...\n3265.1\n5...6."
IN_USE = (
    "this prefix_cache is in use by another call; give each call at a time its own "
    "(prefix_cache.snapshot() makes one that holds the same)."
)

# As the release's: thoughts are left out of the history, and where the model is not to think, the
# prompt ends with an empty thought.
LIKE_THE_RELEASE = TEMPLATE.replace(
    "{{ message['content'] | trim }}",
    "{{ message['content'].split('<channel|>')[-1] | trim }}",
).replace(
    "<|turn>model\n{% endif %}",
    "<|turn>model\n{% if not (enable_thinking is defined and enable_thinking) %}"
    "<|channel>thought\n<channel|>{% endif %}{% endif %}",
)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load("demo")


@contextmanager
def counted(model: DiffusionGemma) -> Iterator[list[int]]:
    """How many tokens each call of `model.encode` gets."""
    counts: list[int] = []
    whole = model.encode

    def counting(ids: Any, prefixes: Any) -> Any:
        counts.append(sum(map(len, ids)))
        return whole(ids, prefixes)

    model.encode = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        del model.encode


def text_of(seed: int, length: int) -> str:
    letters = [chr(code) for code in range(97, 123) if chr(code) not in "abtur"]
    return "".join(np.random.default_rng(seed).choice(letters, length))


def logits_behind(model: DiffusionGemma, prefix: Prefix) -> np.ndarray:
    tokens = mx.arange(20, 20 + model.config.canvas_length)
    return np.array(model.logits(model.decode([CanvasView(tokens, prefix)])))


def check_equal(model: DiffusionGemma, found: Prefix) -> None:
    """A prefix equals that of a fresh run: the same argmax, and logits to rounding."""
    (fresh,) = model.encode([list(found.ids)], [model.empty_prefix()])[1]
    ours, theirs = logits_behind(model, found), logits_behind(model, fresh)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


class TestLongChats:
    """Turns of 1,500 tokens on a model whose sliding layers hold 63 positions."""

    TURN = 1500

    @pytest.fixture
    def chat(self, tiny_model) -> tuple[DiffusionGemma, Any]:
        tokenizer = build(LIKE_THE_RELEASE)
        model = tiny_model(
            1, sliding_window=64, vocab_size=len(tokenizer), max_position_embeddings=16_384
        )
        model.eval()
        return model, tokenizer

    def turn(self, chat, cache, messages, seed, **options):
        """Answer; returns the text, the prompt, the prefix it was answered on and what was
        encoded of it."""
        model, tokenizer = chat
        ids = encode_prompt(tokenizer, messages)
        config = DiffusionConfig(
            max_tokens=2 * model.config.canvas_length, max_denoising_steps=2, eos_token_ids=(1, 5)
        )
        prefixes: list[Prefix] = []
        encoded: list[int] = []
        with counted(model) as counts:
            for event in generate_canvases(
                model, [ids], config, seeded(seed), caches=[cache],
                marks=[ends_of_turns(ids, config.eos_token_ids)], **options,
            ):  # fmt: skip
                if getattr(event, "total", None) is not None and event.done == event.total:
                    prefixes.append(cache.prefix)
                    encoded = list(counts)
                last = event
        assert prefixes[0].ids == tuple(ids)
        return tokenizer.decode(last.tokens[0]), ids, prefixes[0], encoded

    @pytest.mark.parametrize("answer", ["as it came", "with a thought"])
    def test_each_turn_encodes_itself_alone(self, chat, answer):
        model, _ = chat
        cache = model.make_cache()
        messages = [{"role": "user", "content": text_of(0, self.TURN)}]
        text, ids, prefix, encoded = self.turn(chat, cache, messages, 0)
        assert sum(encoded) == len(ids) >= self.TURN
        check_equal(model, prefix)
        for number in (1, 2):
            if answer == "with a thought":
                text = f"<|channel>thought\n{text_of(9, 40)}<channel|>{text_of(8, 30)}"
            before = len(ids)
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": text_of(number, self.TURN)},
            ]
            text, ids, prefix, encoded = self.turn(chat, cache, messages, number)
            assert len(ids) > before + self.TURN
            # The end of the last prompt, from the model's turn on, is written in another way now.
            assert self.TURN < sum(encoded) < len(ids) - before + 40
            check_equal(model, prefix)

    def test_the_answer_of_a_second_turn_is_that_of_a_fresh_run(self, chat):
        model, _ = chat
        cache = model.make_cache()
        messages = [{"role": "user", "content": text_of(0, self.TURN)}]
        text, *_ = self.turn(chat, cache, messages, 0)
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": text_of(1, self.TURN)},
        ]
        _, ids, reused, encoded = self.turn(chat, cache, messages, 1)
        _, same, fresh, whole = self.turn(chat, model.make_cache(), messages, 1)
        assert ids == same and sum(whole) == len(ids) > 1.9 * sum(encoded)
        ours, theirs = logits_behind(model, reused), logits_behind(model, fresh)
        assert (ours.argmax(-1) == theirs.argmax(-1)).all()
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)

    def test_another_question_after_the_same_beginning_goes_back_to_it(self, chat):
        """The first turn is marked, for a system prompt that many chats share."""
        model, _ = chat
        cache = model.make_cache()
        system = {"role": "system", "content": text_of(5, self.TURN)}
        for number in range(3):
            messages = [system, {"role": "user", "content": text_of(number, 100)}]
            _, ids, prefix, encoded = self.turn(chat, cache, messages, number)
            assert sum(encoded) == len(ids) if number == 0 else sum(encoded) < 200
            check_equal(model, prefix)

    def test_a_repeated_question_encodes_no_more_than_the_head_of_the_answer(self, chat):
        model, _ = chat
        cache = model.make_cache()
        messages = [{"role": "user", "content": text_of(0, self.TURN)}]
        first, _, _, _ = self.turn(chat, cache, messages, 0)
        again, _, prefix, encoded = self.turn(chat, cache, messages, 0)
        assert again == first and sum(encoded) < 64
        check_equal(model, prefix)


def test_ends_of_turns_are_marked() -> None:
    assert ends_of_turns([2, 7, 7, 5, 8, 9, 5, 7, 5, 9, 9], (1, 5)) == (4, 9)
    assert ends_of_turns([2, 7, 5, *[9] * 65], (1, 5)) == (3, 68)
    assert ends_of_turns([2, 7, 5], (1, 5)) == (3,)
    assert ends_of_turns([7, 7], (1, 5)) == (2,)
    assert ends_of_turns([7, 5, 7], ()) == (3,)


def test_a_chat_with_a_cache_is_the_chat_without_one(demo) -> None:
    """Token for token on the demo model, whose window is shorter than the chat."""
    model, tokenizer = demo
    assert model.config.text.sliding_window < 200
    cache, messages = model.make_cache(), []
    for turn in range(4):
        messages.append({"role": "user", "content": PUZZLE})
        prefixes: list[Prefix] = []

        def on_prefill(done: int, total: int, prefixes: list[Prefix] = prefixes) -> None:
            prefixes[:] = [cache.prefix]

        text = generate(
            model, tokenizer, messages, seed=turn, prefix_cache=cache, on_prefill=on_prefill
        )
        assert prefixes[0].ids == tuple(encode_prompt(tokenizer, messages))
        check_equal(model, prefixes[0])
        if turn < 3:  # the demo model loses its way in long chats, and rounding decides
            assert text == generate(model, tokenizer, messages, seed=turn)
        messages.append({"role": "assistant", "content": text})
    assert len(prefixes[0]) > 2 * model.config.text.sliding_window


# Interrupted (sequences of calls that once gave another question's answer).


class Interrupted(BaseException):
    """As Ctrl-C: no `except Exception` takes it."""


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 6, 7])
def test_an_exception_in_on_prefill_leaves_a_cache_that_is_true(demo, chunk) -> None:
    model, tokenizer = demo
    cache, calls = model.make_cache(), 0
    first = list(range(20, 120))

    def on_prefill(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == chunk + 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        generate(
            model, tokenizer, first, prefix_cache=cache, prefill_step_size=16,
            on_prefill=on_prefill, seed=0,
        )  # fmt: skip
    assert cache.prefix.ids == tuple(first[: min(16 * chunk, 100)])
    for prompt in ([*first[:40], 99, 98], PUZZLE, first):
        kept = cache.snapshot()
        found = generate(model, tokenizer, prompt, prefix_cache=kept, seed=1, max_tokens=64)
        assert found == generate(model, tokenizer, prompt, seed=1, max_tokens=64)


def interrupt_layers(monkeypatch, model, after: int) -> None:
    """Raise in the `after`-th layer that is run from now on, in a prefill, a step or a commit."""
    kind, calls = type(model.layers[0]), 0
    whole = kind.__call__

    def broken(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == after:
            raise Interrupted
        return whole(self, *arguments)

    monkeypatch.setattr(kind, "__call__", broken)


def test_an_interrupt_at_any_moment_leaves_a_cache_that_is_true(demo, monkeypatch) -> None:
    """In the layers of a chunk, of a step, and of a canvas that is committed."""
    model, tokenizer = demo
    other = [*range(20, 90), 99, *range(30, 60)]
    options: dict[str, Any] = {"seed": 2, "max_tokens": 64, "max_denoising_steps": 3}
    fresh = generate(model, tokenizer, other, **options)
    lengths = set()
    layers = len(model.layers)
    for after in range(1, 16 * layers, 5):
        cache = model.make_cache()
        with monkeypatch.context() as patch:
            interrupt_layers(patch, model, after)
            with suppress(Interrupted):
                generate(
                    model, tokenizer, list(range(20, 120)), prefix_cache=cache, seed=1,
                    prefill_step_size=16, max_tokens=192, max_denoising_steps=2, eos_token_ids=(0,),
                )  # fmt: skip
        lengths.add(len(cache.prefix))
        check_equal_or_empty(model, cache)
        assert generate(model, tokenizer, other, prefix_cache=cache, **options) == fresh
    assert {0, 16, 96, 100, 164} <= lengths  # chunks, the prompt, and the prompt with a canvas


def check_equal_or_empty(model: DiffusionGemma, cache: PrefixCache) -> None:
    if cache.offset:
        check_equal(model, cache.prefix)
    else:
        assert cache.nbytes == 0


@pytest.mark.parametrize("responses", [1, 3, 10**6])
def test_a_stream_that_is_left_leaves_a_cache_that_is_true(demo, responses) -> None:
    model, tokenizer = demo
    cache = model.make_cache()
    stream = stream_generate(model, tokenizer, PUZZLE, seed=0, prefix_cache=cache)
    for _, _ in zip(range(responses), stream, strict=False):
        pass
    stream.close()
    check_equal(model, cache.prefix)
    assert generate(model, tokenizer, "copy\nabc", prefix_cache=cache, seed=1) == generate(
        model, tokenizer, "copy\nabc", seed=1
    )


# Snapshots, and two calls at once.


def test_a_snapshot_is_not_touched_by_its_origin(demo) -> None:
    model, tokenizer = demo
    first = model.make_cache()
    answer = generate(model, tokenizer, PUZZLE, prefix_cache=first, seed=0)
    second = first.snapshot()
    before = logits_behind(model, first.prefix)
    generate(model, tokenizer, [*first.prefix.ids, 30, 31], prefix_cache=second, seed=1)
    assert (logits_behind(model, first.prefix) == before).all()
    generate(model, tokenizer, [*first.prefix.ids, 40], prefix_cache=first, seed=1)
    check_equal(model, first.prefix)
    check_equal(model, second.prefix)
    assert generate(model, tokenizer, PUZZLE, prefix_cache=second, seed=0) == answer


def test_a_second_call_on_a_cache_is_refused_in_one_line(demo) -> None:
    model, tokenizer = demo
    cache = model.make_cache()
    stream = stream_generate(model, tokenizer, PUZZLE, seed=0, prefix_cache=cache)
    next(stream)
    other = stream_generate(model, tokenizer, "copy\nabc", seed=0, prefix_cache=cache)
    with pytest.raises(UsageError) as error:
        next(other)
    assert str(error.value) == IN_USE
    beside = generate(model, tokenizer, "copy\nabc", seed=0, prefix_cache=cache.snapshot())
    assert beside == generate(model, tokenizer, "copy\nabc", seed=0)
    text = "".join(response.text for response in stream)
    assert text == generate(model, tokenizer, PUZZLE, seed=0)
    assert generate(model, tokenizer, "copy\nabc", seed=0, prefix_cache=cache) == beside


def test_a_stream_that_is_left_gives_its_cache_back(demo) -> None:
    model, tokenizer = demo
    cache = model.make_cache()
    for leave in ("close", "drop", "fail"):
        stream = stream_generate(model, tokenizer, PUZZLE, seed=0, prefix_cache=cache)
        next(stream)
        if leave == "close":
            stream.close()
        elif leave == "drop":
            del stream
        else:
            with pytest.raises(Interrupted):
                stream.throw(Interrupted)  # type: ignore[attr-defined]
        with cache.in_use():
            pass


def test_a_cache_that_waits_for_its_first_response_is_free(demo) -> None:
    """A stream takes its cache when it is first asked."""
    model, tokenizer = demo
    cache = model.make_cache()
    unused = stream_generate(model, tokenizer, PUZZLE, seed=0, prefix_cache=cache)
    with cache.in_use():
        pass
    unused.close()  # type: ignore[attr-defined]


def test_two_threads_on_one_cache(demo) -> None:
    """One answers, the other is refused or, if it came later, answers too; neither crashes."""
    model, tokenizer = demo
    cache = model.make_cache()
    prompts = {"a": PUZZLE, "b": "copy\nabc", "c": PUZZLE}
    expected = {name: generate(model, tokenizer, p, seed=0) for name, p in prompts.items()}
    found: dict[str, Any] = {}
    barrier = threading.Barrier(len(prompts))

    def work(name: str) -> None:
        barrier.wait()
        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                found[name] = generate(model, tokenizer, prompts[name], seed=0, prefix_cache=cache)
        except Exception as error:
            found[name] = error

    threads = [threading.Thread(target=work, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [each for each in found.values() if isinstance(each, UsageError)]
    assert all(str(error) == IN_USE for error in refused)
    answers = {name: each for name, each in found.items() if each not in refused}
    assert answers and answers == {name: expected[name] for name in answers}
    check_equal(model, cache.prefix)
    assert generate(model, tokenizer, PUZZLE, seed=0, prefix_cache=cache) == expected["a"]


# Two places for one thing.


def test_a_prefix_cannot_part_from_its_ids(demo) -> None:
    model, tokenizer = demo
    cache = model.make_cache()
    generate(model, tokenizer, PUZZLE, prefix_cache=cache, seed=0)
    with pytest.raises(AttributeError):
        cache.prefix.ids = ()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        cache.offset = 3  # type: ignore[misc]
    assert cache.offset == len(cache.prefix.ids)


def test_the_cache_of_another_model_is_refused_in_one_line(demo, tiny_model) -> None:
    model, tokenizer = demo
    changed, _ = load("demo")
    norm = changed.model.decoder.norm
    norm.weight = norm.weight * 1.01
    for other in (tiny_model(0), changed):
        cache = other.make_cache()
        with pytest.raises(UsageError) as error:
            generate(model, tokenizer, PUZZLE, prefix_cache=cache, seed=0)
        assert str(error.value) == (
            "this prefix_cache belongs to another model; take one from model.make_cache()."
        )
        assert cache.offset == 0
    same, _ = load("demo")
    cache = same.make_cache()
    text = generate(same, tokenizer, PUZZLE, prefix_cache=cache, seed=0)
    assert generate(model, tokenizer, PUZZLE, prefix_cache=cache, seed=0) == text


def test_a_cache_saved_in_mid_canvas_is_true(demo, tmp_path) -> None:
    model, tokenizer = demo
    cache = model.make_cache()
    stream = stream_generate(
        model, tokenizer, PUZZLE, seed=0, prefix_cache=cache, max_tokens=192, eos_token_ids=(0,),
        max_denoising_steps=3,
    )  # fmt: skip
    offsets = set()
    for response in stream:
        if response.step == 2:
            cache.save(tmp_path / "cache")
            loaded = PrefixCache.load(tmp_path / "cache", model)
            assert loaded.prefix.ids == cache.prefix.ids
            check_equal(model, loaded.prefix)
            offsets.add(loaded.offset)
    assert len(offsets) == 3  # the prompt, with one canvas, with two
    found = generate(model, tokenizer, PUZZLE, seed=0, prefix_cache=loaded)
    assert found == generate(model, tokenizer, PUZZLE, seed=0)


# Ids from outside, and batches.


@pytest.mark.parametrize("token", [128, -1, 2**30])
def test_initial_canvas_with_an_id_from_outside(demo, token) -> None:
    canvas = [30] * 64
    canvas[9] = token
    with pytest.raises(UsageError) as error:
        generate(*demo, PUZZLE, initial_canvas=canvas, seed=0)
    assert str(error.value) == f"initial_canvas: token 9 is {token}; ids go from 0 to 127."


@pytest.mark.parametrize("token", [128, -1, 2**30])
def test_a_prompt_with_an_id_from_outside(demo, token) -> None:
    with pytest.raises(PromptError, match=rf"token 2 is {token}; ids go from 0 to 127"):
        generate(*demo, [7, 8, token], seed=0)
    with pytest.raises(PromptError, match=rf"^prompt 2: token 2 is {token}; ids go"):
        batch_generate(*demo, [[7, 8], [7, 8, token]], seed=0)


def test_a_padding_id_from_outside_is_refused(demo) -> None:
    with pytest.raises(
        UsageError, match=r"^pad_token_id has 1073741824, and ids go from 0 to 127; name one"
    ):
        batch_generate(*demo, [PUZZLE, "copy\nabc"], seed=0, pad_token_id=2**30)


def test_each_prompt_of_a_batch_has_its_own_room(demo) -> None:
    """A prompt near the end of the context does not cut the answer of a short one."""
    model, tokenizer = demo
    config = model.config
    model.config = replace(config, text=replace(config.text, max_position_embeddings=200))
    options: dict[str, Any] = {"seed": 0, "max_denoising_steps": 2, "eos_token_ids": (0,)}
    try:
        short, long = encode_prompt(tokenizer, PUZZLE), [30] * 130
        found = batch_generate(model, tokenizer, [short, long], 128, **options)
        alone = list(stream_generate(model, tokenizer, short, 128, **options))
        other = list(stream_generate(model, tokenizer, long, 128, **options))
    finally:
        model.config = config
    assert (alone[-1].generation_tokens, other[-1].generation_tokens) == (128, 64)
    assert found.texts[0] == "".join(response.text for response in alone)
    assert [row.context_full for row in found.rows] == [False, True]
    parts = [response.text for response in alone if response.text]
    assert len(parts) == 2  # both canvases wrote something


def test_one_text_is_no_list_of_prompts(demo) -> None:
    with pytest.raises(UsageError) as error:
        batch_generate(*demo, "text")
    assert str(error.value) == ("prompts is one text; give a list of prompts, or use generate.")


@pytest.mark.parametrize("seed", [-1, 1.5, "0"])
def test_a_seed_that_is_none(demo, seed) -> None:
    for call in (
        lambda: batch_generate(*demo, [PUZZLE], seed=seed),
        lambda: generate(*demo, PUZZLE, seed=seed),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert str(error.value) == f"seed must be an integer of at least 0, not {seed!r}."
