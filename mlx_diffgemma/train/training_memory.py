"""What memory training takes, in bytes counted from the shapes; 1 GB is 1e9 bytes.

The count is of what a step holds at its peak: weights, what is trained with gradients and
optimizer, what the backward pass needs of the forward pass, and the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil, prod

from mlx_diffgemma import cpu
from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checkpoint.names import expected_shapes, module_class, module_path
from mlx_diffgemma.config import AttentionConfig, ModelConfig
from mlx_diffgemma.train.adapt import DEFAULT_TARGETS, FROZEN, chosen_paths
from mlx_diffgemma.train.config import TrainConfig
from mlx_diffgemma.train.cross_entropy import BLOCK

_OPTIMIZER_COPIES = {"adam": 2, "adamw": 2, "muon": 1, "sgd": 1, "adafactor": 0.1}
# Float32 copies of logits that MLX was seen to hold at once for loss and gradient, by the bytes of
# an activation (4 on a CPU, 2 on a GPU): of all logits where they are one block, and of one block
# where they are several.
_LOGIT_COPIES = {4: (13, 20), 2: (7, 15)}
_GUESS_COPIES = 3  # copies of logits in the first pass, for the examples that see their own guess
_TRANSIENT = 3.5  # copies of a layer's activations while its gradient is computed


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step holds at its peak.

    Attributes:
        weights: weights of the base.
        trained: the adapters; 0 where the weights themselves are trained.
        gradients: gradients of what is trained; twice where batches are accumulated.
        optimizer: state of the optimizer.
        activations: what is kept for the backward pass, and what one layer takes while its gradient
            is computed.
        logits: logits of canvas and encoder, with their gradient.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for, as an error lists them."""
        return {
            "weights": self.weights,
            "adapters, gradients and optimizer": self.trained + self.gradients + self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
        }


def estimate(
    shapes: ModelConfig, weights: int, config: TrainConfig, *, length: int, activation_bytes: int
) -> TrainingMemory:
    """Memory of a step on `config.batch_size` sequences of `length` tokens.

    Args:
        weights: bytes of the base.
        activation_bytes: bytes of a number between layers, which are 2, or 4 on a CPU.

    Raises:
        UsageError: a target matches nothing.
    """
    text, batch, canvas = shapes.text, config.batch_size, shapes.canvas_length
    count = trained_numbers(shapes, config)
    full = config.fine_tune_type == "full"
    size = activation_bytes if full else 4  # adapters are float32
    kept, largest = 0, 0
    for attention in text.attention:
        layer = 0
        for new, seen in ((length, length), (canvas, length + canvas)):
            numbers = new * memory.layer_numbers(text, attention)
            numbers += attention.num_heads * new * seen  # attention weights
            layer += batch * numbers * activation_bytes
            largest = max(largest, batch * numbers * activation_bytes)
        inputs = (length + canvas) * text.hidden_size + length * 2 * _kv(attention)
        kept += batch * inputs * activation_bytes if config.grad_checkpoint else layer
    return TrainingMemory(
        weights=weights,
        trained=0 if full else count * size,
        gradients=count * size * (2 if config.grad_accumulation_steps > 1 else 1),
        optimizer=int(count * size * _OPTIMIZER_COPIES[config.optimizer]),
        activations=int(kept + _TRANSIENT * largest),
        logits=_logits(shapes, config, length, activation_bytes),
    )


def _logits(shapes: ModelConfig, config: TrainConfig, length: int, activation_bytes: int) -> int:
    vocabulary, canvases = shapes.text.vocab_size, config.batch_size * shapes.canvas_length
    whole, block = _LOGIT_COPIES[activation_bytes]
    copies = 0
    for rows in (canvases, config.batch_size * length if config.encoder_loss_weight else 0):
        most = max(1, BLOCK // vocabulary)
        copies += rows * whole if rows <= most else most * block
    guessed = ceil(config.batch_size * config.self_conditioning) * shapes.canvas_length
    return vocabulary * 4 * max(copies, guessed * _GUESS_COPIES)


def trained_numbers(shapes: ModelConfig, config: TrainConfig) -> int:
    """How many numbers a run trains.

    Raises:
        UsageError: a target matches nothing.
    """
    return sum(_trained(shapes, config))


def activation_bytes() -> int:
    """Bytes of a number between layers on this machine."""
    return 4 if cpu.is_device() else 2


def require(needed: TrainingMemory, name: str, config: TrainConfig) -> None:
    """Refuse a run of the model `name` that needs more memory than this machine has.

    Raises:
        MemoryShortageError: the memory does not suffice; the message gives the numbers, and what to
            do.
    """
    mends = [] if config.grad_checkpoint else ["--grad-checkpoint"]
    mends += [f"a --batch-size below {config.batch_size}"] if config.batch_size > 1 else []
    mends += ["shorter examples", "weights in fewer bits"]
    mend = f"try {', '.join(mends[:-1])} or {mends[-1]} (see --plan)"
    memory.require(needed, f"training {name}", mend=mend)


def _kv(attention: AttentionConfig) -> int:
    return attention.num_kv_heads * attention.head_dim


def _trained(shapes: ModelConfig, config: TrainConfig) -> Iterator[int]:
    known = {module_path(n): shape for n, shape in expected_shapes(shapes).items()}
    layers, keys = shapes.text.num_hidden_layers, config.lora_parameters.keys
    if config.fine_tune_type == "full" and not keys:
        first = 0 if config.num_layers < 0 else layers - config.num_layers
        within = tuple(f"model.decoder.layers.{index}." for index in range(first, layers))
        for path, shape in known.items():
            here = config.num_layers < 0 or path.startswith(within)
            if here and module_class(path) != FROZEN:
                yield prod(shape)
        return
    matrices = [path for path, shape in known.items() if len(shape) > 1]
    for path in chosen_paths(matrices, keys or DEFAULT_TARGETS, config.num_layers, layers):
        *experts, outputs, inputs = known[path]
        if config.fine_tune_type == "full":
            yield prod(known[path])
            continue
        yield prod(experts) * config.lora_parameters.rank * (inputs + outputs)
        if config.fine_tune_type == "dora":
            yield outputs
