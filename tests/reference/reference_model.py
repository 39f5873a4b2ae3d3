"""The reference implementation with the same weights as ours, and how close two results are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

ROUTER_TIE = 3e-6  # probabilities closer than this may be ordered either way by rounding


def build_reference(
    config: dict[str, Any], weights: dict[str, np.ndarray]
) -> DiffusionGemmaForBlockDiffusion:
    """The reference in float32, from a parsed `config.json` and weights under our names."""
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**copy.deepcopy(config)))
    state = {
        name.replace("experts.gate_up_proj.weight", "experts.gate_up_proj").replace(
            "experts.down_proj.weight", "experts.down_proj"
        ): torch.from_numpy(value.copy())
        for name, value in weights.items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ("model.encoder.language_model.", "model.encoder.vision_tower.", "lm_head.")
    wrong = [n for n in missing if not n.startswith((*tied, "model.encoder.embed_vision."))]
    assert not wrong and not unexpected, (wrong, unexpected)
    model.tie_weights()
    table = model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight is table
    assert model.model.encoder.language_model.embed_tokens.weight is table
    return model.float().eval()


def padded_pictures(pictures: Sequence[Any], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference takes of pictures that have `patches` and `columns`, padded to `most`
    patches: values [P, most, 768] and column and row of each patch, −1 for padding."""
    values = torch.zeros(len(pictures), most, 768)
    positions = torch.full((len(pictures), most, 2), -1)
    for number, picture in enumerate(pictures):
        count = len(picture.patches)
        values[number, :count] = torch.from_numpy(picture.patches / 255.0)
        positions[number, :count] = torch.from_numpy(patch_positions(picture))
    return values, positions


def patch_positions(picture: Any) -> np.ndarray:
    """[P, 2] column and row of each patch of a picture."""
    row, column = np.divmod(np.arange(len(picture.patches)), picture.columns)
    return np.stack([column, row], axis=-1)


class RouterGaps:
    """How clearly the reference's routers chose: the difference between the probabilities of the
    last expert chosen and of the first left out. Rounding may swap the two where it is tiny."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion, batch: int) -> None:
        self.least = np.full(batch, np.inf)
        layers = [*model.model.encoder.language_model.layers, *model.model.decoder.layers]
        self.hooks = [layer.router.register_forward_hook(self._see) for layer in layers]

    def _see(self, router: torch.nn.Module, inputs: tuple, outputs: tuple) -> None:
        top_k = router.config.top_k_experts
        ordered = outputs[0].sort(dim=-1, descending=True).values
        gaps = (ordered[:, top_k - 1] - ordered[:, top_k]).reshape(len(self.least), -1)
        self.least = np.minimum(self.least, gaps.min(dim=-1).values.numpy())

    def take(self) -> np.ndarray:
        """The least gap [B] of each sequence since the last call."""
        least, self.least = self.least, np.full(len(self.least), np.inf)
        return least

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class Prefix:
    """The reference's cache of left-padded sequences, encoded piece by piece."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion, mask: np.ndarray) -> None:
        """`mask` [B, L] is 0 where the prompt is padding."""
        self.model, self.cache = model, None
        self.mask = torch.from_numpy(mask.astype(np.int64))
        self.length = 0

    @torch.no_grad()
    def encode(self, ids: np.ndarray) -> np.ndarray:
        """Append ids [B, L] and return their hidden states [B, L, D]."""
        self.length += ids.shape[1]
        missing = self.length - self.mask.shape[1]
        if missing > 0:
            self.mask = torch.nn.functional.pad(self.mask, (0, missing), value=1)
        output = self.model.model.encoder(
            input_ids=torch.from_numpy(ids.astype(np.int64)),
            attention_mask=self.mask,
            past_key_values=self.cache,
        )
        self.cache = output.past_key_values
        return output.last_hidden_state.numpy()

    @torch.no_grad()
    def logits(self, canvas: np.ndarray, conditioning: np.ndarray | None = None) -> np.ndarray:
        """Logits [B, C, V] of a canvas, given the processed logits of a previous step."""
        return self.model(
            past_key_values=self.cache,
            decoder_input_ids=torch.from_numpy(canvas.astype(np.int64)),
            self_conditioning_logits=None
            if conditioning is None
            else torch.from_numpy(conditioning),
            decoder_attention_mask=torch.nn.functional.pad(
                self.mask, (0, canvas.shape[1]), value=1
            ),
        ).logits.numpy()


class Closeness:
    """Figures over many comparisons: |Δ| relative to the largest value, and equal argmax."""

    def __init__(self) -> None:
        self.ties = 0
        self.relative: list[np.ndarray] = []
        self.same: list[np.ndarray] = []
        self.largest = np.inf

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        assert ours.shape == theirs.shape
        largest = np.abs(theirs).max()
        self.relative.append((np.abs(ours - theirs) / largest).ravel())
        self.same.append((ours.argmax(-1) == theirs.argmax(-1)).ravel())
        self.largest = min(self.largest, largest)

    def add_sequences(self, ours: np.ndarray, theirs: np.ndarray, gaps: np.ndarray) -> np.ndarray:
        """Add [B, ...] but for the sequences that differ because a router was undecided (gaps [B]);
        returns which [B] those are."""
        far = np.abs(ours - theirs).reshape(len(ours), -1).max(-1) > 1e-3 * np.abs(theirs).max()
        tied = far & (gaps < ROUTER_TIE)
        self.ties += int(tied.sum())
        if not tied.all():
            self.add(ours[~tied], theirs[~tied])
        return tied

    @property
    def median(self) -> float:
        return float(np.median(np.concatenate(self.relative)))

    @property
    def p999(self) -> float:
        return float(np.quantile(np.concatenate(self.relative), 0.999))

    @property
    def argmax(self) -> float:
        return float(np.concatenate(self.same).mean())

    def __str__(self) -> str:
        count = sum(map(len, self.relative))
        return (
            f"median {self.median:.1e}, 99.9th percentile {self.p999:.1e} of the largest "
            f"(at least {self.largest:.1f}), argmax equal {self.argmax:.4%}, {count} values, "
            f"{self.ties} router ties left out"
        )
