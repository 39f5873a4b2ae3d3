"""The training loop: a generator of events, which prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_diffgemma.errors import NumericalError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.train import processes, state
from mlx_diffgemma.train.batches import Batches, Sizes
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.evaluate import held_out_loss
from mlx_diffgemma.train.events import Evaluation, Event, Finished, Report, Saved
from mlx_diffgemma.train.examples import Example, Supply
from mlx_diffgemma.train.gradients import Stepper, learning_rate


def train(
    model: DiffusionGemma,
    config: TrainConfig,
    train_examples: Supply,
    valid_examples: Sequence[Example],
    folder: Path,
    *,
    resume: bool = False,
    generate_exact: Callable[[DiffusionGemma], float] | None = None,
) -> Iterator[Event]:
    """Train the trainable parameters of `model`, yielding events as things happen.

    Where several processes train together, the first of them evaluates and writes.

    Args:
        train_examples: all examples to train on, or a stream of them.
        valid_examples: held-out examples; none turns the evaluation of the loss off.
        folder: where `adapters.safetensors` (all trainable parameters) and the state go.
        resume: go on from the state in `folder`, where there is one.
        generate_exact: called at every evaluation; gives the share of held-out responses that
            generation gets exactly.

    Raises:
        UsageError: an example is too long, or the state is of another run.
        CheckpointError, ConfigError: the state is damaged, or the model names no eos.
        NumericalError: the loss, in training or on held-out examples, or its gradient is not
            finite.
    """
    sizes = sizes_of(model)
    batches = Batches(train_examples, config, sizes, together=processes.count())
    stepper = Stepper(model, config)
    parameters = model.trainable_parameters()
    run = state.load(folder, parameters, config) if resume else None
    if run is None:
        # Copies: the model's own arrays may be replaced by whoever holds the model.
        run = state.RunState(0, 0, tree_map(mx.array, parameters), stepper.fresh_state(parameters))
    processes.check_together(run.step, config.grad_accumulation_steps)
    model.update(run.parameters)

    def evaluate(step: int) -> Iterator[Evaluation]:
        if not processes.is_first() or (not valid_examples and generate_exact is None):
            return
        model.eval()
        held_out = held_out_loss(model, valid_examples, config, sizes) if valid_examples else None
        exact = generate_exact(model) if generate_exact is not None else None
        model.train()
        yield Evaluation(
            step=step,
            loss=float("nan") if held_out is None else held_out.mean,
            encoder_loss=0.0 if held_out is None else held_out.encoder,
            by_noise={} if held_out is None else held_out.by_noise,
            exact=exact,
        )

    begun = time.perf_counter()
    if run.step == 0 and config.steps_per_eval:
        yield from evaluate(0)
    model.train()
    clock = _Clock(config)
    while run.step < config.iters:
        run = _step(model, stepper, batches, config, run, clock)
        step, last = run.step, run.step == config.iters
        if _due(step, config.steps_per_report, last):
            yield clock.report(step, run.tokens)
        if _due(step, config.steps_per_eval, last):
            with clock.paused():
                yield from evaluate(step)
        if _due(step, config.save_every, False) or last:
            with clock.paused():
                if processes.is_first():
                    state.save(folder, run, config)
                yield Saved(step, folder / state.ADAPTERS)
    model.eval()
    yield Finished(run.step, time.perf_counter() - begun)


def sizes_of(model: DiffusionGemma) -> Sizes:
    """What batches need to know of `model`.

    Raises:
        ConfigError: the model names no eos.
    """
    config = model.config
    text, ids = config.text, config.end_token_ids()
    return Sizes(config.canvas_length, text.vocab_size, ids, text.max_position_embeddings)


def _step(
    model: DiffusionGemma,
    stepper: Stepper,
    batches: Batches,
    config: TrainConfig,
    run: state.RunState,
    clock: _Clock,
) -> state.RunState:
    """One optimizer step; `model` has the new parameters afterwards.

    Raises:
        NumericalError: the loss or the gradient is not finite.
    """
    count = config.grad_accumulation_steps
    part = [batches[run.step * count + place] for place in range(count)]
    result = stepper.step(run.step + 1, run.parameters, run.optimizer, part)
    mx.eval(result.parameters, result.optimizer_state, result.losses, result.grad_norm)
    figures = np.array([one.item() for one in (*result.losses, result.grad_norm)], float)
    if not np.isfinite(figures).all():
        model.update(run.parameters)
        raise NumericalError(
            f"step {run.step + 1}: the loss or its gradient is not finite; lower learning_rate, "
            "raise warmup, or look for damaged weights with --check."
        )
    model.update(result.parameters)
    if 0 < config.clear_cache_threshold < mx.get_cache_memory():
        mx.clear_cache()
    tokens = sum(batch.tokens for batch in part)
    clock.add(figures, tokens, sum(batch.size for batch in part))
    return state.RunState(
        run.step + 1, run.tokens + tokens, result.parameters, result.optimizer_state
    )


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


class _Clock:
    """Sums over the steps since the last report, without the time of evaluations and saves."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._begin()

    def _begin(self) -> None:
        self._figures: list[np.ndarray] = []
        self._tokens = self._examples = 0
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        stopped = time.perf_counter()
        yield
        self._since += time.perf_counter() - stopped

    def add(self, figures: np.ndarray, tokens: int, examples: int) -> None:
        """Add the losses and the gradient norm of a step, and how many tokens and examples it
        saw."""
        self._figures.append(figures)
        self._tokens += tokens
        self._examples += examples

    def report(self, step: int, tokens: int) -> Report:
        seconds = time.perf_counter() - self._since
        loss, canvas, encoder, norm = np.mean(self._figures, axis=0).tolist()
        report = Report(
            step=step,
            loss=loss,
            canvas_loss=canvas,
            encoder_loss=encoder,
            learning_rate=learning_rate(self._config, step),
            grad_norm=norm,
            tokens=tokens,
            tokens_per_second=self._tokens / seconds,
            examples_per_second=self._examples / seconds,
            peak_memory=mx.get_peak_memory() / 1e9,
            seconds_left=(self._config.iters - step) * seconds / len(self._figures),
        )
        self._begin()
        return report
