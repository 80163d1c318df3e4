"""The CPU engine of ChatGLM-6B-Slim: products with INT8, INT4 and 16-bit weights, attention, and whole decode steps,
by kernels that are compiled for the very machine at their first use.

It knows nothing of transformers or of the model's classes: it is handed tensors and numbers. What it does not serve
gives None, and the caller computes that in plain PyTorch. Importing it compiles, starts and changes nothing.
"""

from __future__ import annotations

from .huge_pages import move_to_huge_pages
from .kernels import dequantize, gelu
from .program import Network, decode_program
from .routes import attention, linear
from .runtime import instruction_set

# Counts up when something is added. What a level has, all later ones have too: checkpoints carry the code that asks.
API_LEVEL = 2

__all__ = [
    "API_LEVEL",
    "Network",
    "attention",
    "decode_program",
    "dequantize",
    "gelu",
    "instruction_set",
    "linear",
    "move_to_huge_pages",
]
