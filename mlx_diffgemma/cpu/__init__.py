"""What only a CPU needs: forms of layers, of the pass over the vocabulary and of what training
differentiates. A model that is loaded for a CPU gets them from `use`; no model, kernel or loop asks
whether it runs on one."""

from mlx_diffgemma.cpu.forms import use

__all__ = ["use"]
