"""What fits is counted from what it takes, beside what is loaded; limits of the process are undone.

The Mac is faked where `memory` asks MLX about it. Working sets of a Mac of 24 GB are those that
Metal prints: two thirds of the memory up to macOS 15, 74 % on macOS 26.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import mlx.core as mx
import pytest

from mlx_diffgemma.bench.presets import RELEASE, config_like
from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checkpoint.memory import MemoryEstimate
from mlx_diffgemma.checkpoint.quantization import RECIPES, parameter_bytes, recipe_formats
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import MemoryShortageError

GB_24 = 17_179_890_000
GB_24_LATER = 19_069_670_000
MODEL = ModelConfig.from_dict(config_like(RELEASE))
CANVAS = MODEL.canvas_length


class Mac:
    """A faked Mac: what MLX reports, and the limits that it was given."""

    def __init__(self) -> None:
        self.working_set = GB_24
        self.active = 0
        self.wired = 5
        self.calls: list[str] = []

    def set_wired_limit(self, limit: int) -> int:
        self.calls.append(f"wired {limit}")
        self.wired, before = limit, self.wired
        return before


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Mac:
    fake = Mac()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        mx,
        "device_info",
        lambda device=None: {
            "max_recommended_working_set_size": fake.working_set,
            "memory_size": 24 * 2**30,
        },
    )
    monkeypatch.setattr(mx, "get_active_memory", lambda: fake.active)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 10**9)
    monkeypatch.setattr(mx, "set_wired_limit", fake.set_wired_limit)
    monkeypatch.setattr(mx, "synchronize", lambda: fake.calls.append("synchronize"))
    return fake


def weights_of(recipe: str) -> int:
    return sum(parameter_bytes(MODEL, recipe_formats(MODEL, RECIPES[recipe])).values())


def prompts(count: int, positions: int, answer: int = 256, step_size: int = 512) -> MemoryEstimate:
    return memory.estimate(
        MODEL.text,
        0,
        canvas_length=CANVAS,
        sequences=[(positions, answer)] * count,
        step_size=step_size,
    )


@pytest.mark.parametrize("working_set", [GB_24, GB_24_LATER])
@pytest.mark.parametrize("step_size", [512, 2048])
def test_long_prompts_on_24_gb_with_the_weights_loaded(
    mac: Mac, working_set: int, step_size: int
) -> None:
    mac.working_set, mac.active = working_set, weights_of("4bit")
    memory.require(prompts(1, 32_768, step_size=step_size), "a prompt of 32768 tokens")
    with pytest.raises(MemoryShortageError) as error:
        memory.require(prompts(1, 131_072, step_size=step_size), "a prompt of 131072 tokens")
    assert str(error.value).startswith("a prompt of 131072 tokens needs about ")
    assert "prefix 2.9 GB" in str(error.value)
    assert "GB beside what is loaded; shorten the prompt" in str(error.value)


def test_4bit_hq_loads_on_24_gb_and_answers(mac: Mac) -> None:
    weights = weights_of("4bit-hq")
    memory.require(memory.estimate(MODEL.text, weights, canvas_length=CANVAS), "4bit-hq")
    mac.active = weights
    memory.require(prompts(1, 8192), "a prompt")


def test_weights_in_too_many_bits_do_not_load(mac: Mac) -> None:
    needed = memory.estimate(MODEL.text, weights_of("6bit"), canvas_length=CANVAS)
    with pytest.raises(
        MemoryShortageError, match=r"weights 21\.1 GB.*choose weights in fewer bits"
    ):
        memory.require(needed, "6bit")


def test_a_batch_is_counted_as_many(mac: Mac) -> None:
    one, many = prompts(1, 1000), prompts(64, 1000)
    assert many.prefix == 64 * one.prefix
    assert many.step > 30 * one.step
    assert many.prefill == one.prefill  # one prompt at a time
    mac.active = weights_of("4bit")
    memory.require(one, "a prompt")
    with pytest.raises(MemoryShortageError, match=r"give fewer prompts at once\.$"):
        memory.require(many, "64 prompts")
    with pytest.raises(MemoryShortageError, match=r"; use --batch 8\.$"):
        memory.require(many, "64 prompts", mend="use --batch 8")


def test_what_is_loaded_is_taken_off_once(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    mac.active = 15 * 10**9
    assert memory.available_memory() == GB_24 - 15 * 10**9  # the cache can be given back
    mac.active = 18 * 10**9
    assert memory.available_memory() == 0
    linux = memory.Machine(working_set=None, free=5 * 10**9, active=15 * 10**9, cached=10**9)
    assert linux.available == 6 * 10**9
    assert memory.Machine(None, None, 0, 0).available is None


def test_this_machine_says_something_plausible() -> None:
    available = memory.available_memory()
    assert available is None or 10**8 < available < 10**14


def test_nobody_is_refused_where_the_system_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.require(prompts(64, 131_072), "64 prompts")


def test_the_prefix_is_what_the_layers_keep() -> None:
    # By hand: 25 sliding layers keep 1023 positions of 8 heads of 256, 5 full ones all positions
    # of 2 heads of 512 in buffers of multiples of 256; keys and values in two bytes.
    by_hand = 25 * 1023 * 2 * 8 * 256 * 2 + 5 * 2816 * 2 * 2 * 512 * 2
    assert prompts(1, 2100, answer=300).prefix == by_hand  # 2100 + two canvases are 2612


def test_the_parts_add_up() -> None:
    long, short = prompts(1, 10_000), prompts(1, 100)
    assert long.total == long.prefix + max(long.prefill, long.step)
    assert list(long.parts) == ["prefix", "prefill", "denoising step"]
    assert short.total < long.total
    loading = memory.estimate(MODEL.text, 1000, canvas_length=CANVAS)
    assert (loading.weights, loading.prefix, loading.prefill) == (1000, 0, 0)
    assert loading.total == 1000 + loading.step
    assert list(loading.parts) == ["weights", "denoising step"]


def test_a_step_holds_no_logits_unless_the_vocabulary_is_small() -> None:
    logits = CANVAS * MODEL.text.vocab_size * 4
    assert memory.estimate(MODEL.text, 0, canvas_length=CANVAS).step < logits
    twice = memory.estimate(MODEL.text, 0, canvas_length=CANVAS, activation_bytes=4).step
    assert twice > 1.5 * memory.estimate(MODEL.text, 0, canvas_length=CANVAS).step


def test_sizes_of_macs() -> None:
    assert memory.working_set(24) == pytest.approx(GB_24, abs=30_000)
    assert memory.working_set(36) == pytest.approx(28_991_030_000, abs=30_000)
    assert memory.smallest_mac(16_200_000_000) == (24, 24)
    assert memory.smallest_mac(12_000_000_000) == (18, 16)
    assert memory.smallest_mac(10**13) == (None, None)
    assert memory.raised_limit_mb(24) == 21 * 1024


def test_the_wired_limit_is_restored(mac: Mac) -> None:
    with memory.wired():
        assert mac.wired == GB_24
        with memory.wired():
            assert mac.wired == GB_24
        assert mac.wired == GB_24
    assert mac.wired == 5
    assert mac.calls == [f"wired {GB_24}", "synchronize", "wired 5"]


def test_the_wired_limit_is_restored_after_an_error(mac: Mac) -> None:
    with pytest.raises(ValueError, match="body"), memory.wired():
        raise ValueError("body")
    assert mac.wired == 5


def test_the_wired_limit_outlives_generators_that_end_in_any_order(mac: Mac) -> None:
    def generation() -> Iterator[int]:
        with memory.wired():
            yield from range(10)

    first, second = generation(), generation()
    next(first), next(second)
    first.close()
    assert mac.wired == GB_24  # the second one still runs
    second.close()
    assert mac.wired == 5


def test_no_limit_is_touched_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.delattr(mx, "set_wired_limit")
    with memory.wired():
        pass


def test_the_cache_limit_is_restored() -> None:
    before = mx.set_cache_limit(12_345)
    try:
        with ExitStack() as stack:
            stack.enter_context(memory.cache_limit(777))
            assert mx.set_cache_limit(777) == 777
        assert mx.set_cache_limit(before) == 12_345
    finally:
        mx.set_cache_limit(before)


def test_sizes_for_people() -> None:
    sizes = [0, 12_000, 350e6, 1.26e9]
    assert [memory.size_text(size) for size in sizes] == ["0 B", "12.0 kB", "0.3 GB", "1.3 GB"]
    assert memory.size_text(1.267e9, 2) == "1.27 GB"
