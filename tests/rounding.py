"""How far a result may lie from the exact one: what rounding allows on any machine, not what one machine printed.

The network in float64 is the truth: beside the rounding of float32 its own, 2**-29 of it, is nothing. It is judged by
another result, from the original code or from another way through ours: the two may differ by two roundings for each
tensor that is computed in succession. The result in question is right if it is no further from the truth than 1.5
times the other one, plus one rounding a tensor. Defects are larger than that by orders of magnitude.
"""

from __future__ import annotations

import copy
import sys
from unittest import mock

import torch

# Attention: norm, projection, rotation, scores, softmax, context, output, scaled residual, sum. MLP: norm, up, GELU,
# down, scaled residual, sum. After the last layer a norm and the head.
ROUNDINGS_OF_A_LAYER, ROUNDINGS_OF_THE_HEAD = 15, 2


def exact(model, *arguments, **options):
    """What `model(...)` would give without rounding; see the note on float16."""
    twin, module = copy.deepcopy(model).double(), sys.modules[type(model).__module__]
    tables = module.rotary_tables
    for own in (vars(part) for part in twin.modules()):  # tensors that are no parameters keep their type
        own.update({name: x.double() for name, x in own.items() if isinstance(x, torch.Tensor)})

    def as_trained(position_ids, size, dtype):  # angles rounded to float16 belong to the format: they are the truth
        return tuple(table.double() for table in tables(position_ids, size, torch.float16))

    half = mock.patch.object(module, "rotary_tables", as_trained) if model.dtype == torch.float16 else mock.MagicMock()
    with half, torch.no_grad():
        return twin(*arguments, **options)


def roundings(config, layers: int | None = None) -> int:
    """Of which the logits are the result; with `layers`, the hidden states behind so many."""
    if layers is not None:
        return ROUNDINGS_OF_A_LAYER * layers
    return ROUNDINGS_OF_A_LAYER * config.num_layers + ROUNDINGS_OF_THE_HEAD


def furthest(values: torch.Tensor, truth: torch.Tensor) -> float:
    return (values.double() - truth).abs().max().item()


def assert_as_near(ours: torch.Tensor, other: torch.Tensor, truth: torch.Tensor, roundings: int) -> None:
    """`ours` is about as near to the truth as `other`, a result of the same precision."""
    assert ours.shape == truth.shape and truth.dtype == torch.float64 and truth.any()  # zeros are right by any way
    explained = roundings * torch.finfo(ours.dtype).eps / 2 * truth.abs().max().item()
    error, other_error = furthest(ours, truth), furthest(other, truth)
    assert other_error <= 2 * explained, f"the other is off by {other_error:.2e}, one rounding each is {explained:.2e}"
    bound = 1.5 * other_error + explained
    assert error <= bound, f"off by {error:.2e}, rounding explains {bound:.2e}"
