"""Record a run of the reference's `generate`: every random draw and what each step made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSampler


@dataclass
class RecordedStep:
    """One denoising step; R is the whole batch, for the reference goes on with finished rows."""

    draw: np.ndarray  # [R, C]
    noise: np.ndarray  # [R, C]
    accepted: np.ndarray  # [R, C]
    canvas: np.ndarray  # [R, C]
    draft: np.ndarray  # [R, C]
    done: np.ndarray  # [R]
    processed: np.ndarray = field(repr=False)  # [R, C, V]
    router_gaps: np.ndarray = field(repr=False)  # [R]


@dataclass
class RecordedCanvas:
    """One canvas: what it started from, and its steps."""

    initial: np.ndarray  # [R, C]
    steps: list[RecordedStep] = field(default_factory=list)


@dataclass
class Recording:
    """A whole run. `sequences` [R, T] are the generated tokens as the reference returns them:
    whole canvases, padding behind the first eos."""

    canvases: list[RecordedCanvas]
    sequences: np.ndarray


class _Recorder(EntropyBoundSampler):
    """The reference's sampler, unchanged but for noting what passes through it."""

    def __init__(self, sampler: EntropyBoundSampler) -> None:
        self.__dict__.update(sampler.__dict__)
        self.canvases: list[RecordedCanvas] = []
        self.renoising = False

    def initialize_canvas(self, batch_size, device):
        canvas = super().initialize_canvas(batch_size, device)
        if self.renoising:
            self.noise = canvas.numpy().copy()
        else:
            self.canvases.append(RecordedCanvas(canvas.numpy().copy()))
        return canvas

    def accept_canvas(self, current_canvas, denoiser_canvas, logits, cur_step):
        self.draw, self.processed = denoiser_canvas.numpy().copy(), logits.numpy().copy()
        return super().accept_canvas(current_canvas, denoiser_canvas, logits, cur_step)

    def renoise_canvas(self, accepted_canvas, cur_step):
        self.renoising = True
        try:
            return super().renoise_canvas(accepted_canvas, cur_step)
        finally:
            self.renoising = False


def record(
    model: DiffusionGemmaForBlockDiffusion,
    prompts: list[list[int]],
    *,
    seed: int,
    max_new_tokens: int,
    eos_token_id: list[int] | None,
    router_gaps,
    **inputs: torch.Tensor,
) -> Recording:
    """Run the reference with its own random numbers and default settings.

    `router_gaps` is a `RouterGaps` on this model for as many sequences; `inputs` are what it takes
    beside token ids, such as pictures.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    recorders: list[_Recorder] = []
    prepare, step = model._prepare_sampler, model._denoising_step

    def prepare_sampler(generation_config):
        recorders.append(_Recorder(prepare(generation_config)))
        return recorders[-1]

    def denoising_step(**kwargs):
        outputs = step(**kwargs)
        canvas, draft, _, done = outputs
        recorder = recorders[-1]
        recorder.canvases[-1].steps.append(
            RecordedStep(
                draw=recorder.draw,
                noise=recorder.noise,
                accepted=recorder.accepted_token_mask.numpy().copy(),
                canvas=canvas.numpy().copy(),
                draft=draft.numpy().copy(),
                done=done.numpy().copy(),
                processed=recorder.processed,
                router_gaps=router_gaps.take(),
            )
        )
        return outputs

    model._prepare_sampler, model._denoising_step = prepare_sampler, denoising_step
    try:
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=0,
            **inputs,
        )
    finally:
        del model._prepare_sampler, model._denoising_step
    return Recording(recorders[0].canvases, output.sequences[:, longest:].numpy())
