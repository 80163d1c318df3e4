"""Attention of a prompt in bfloat16 on CPUs that multiply it: as matrix products, one head after the other.

PyTorch's `scaled_dot_product_attention` reaches a quarter of the speed of its own matrix products there. A product
rounds its sums to bfloat16, which is too coarse for scores; a second one brings what the rounding took away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .runtime import is_plain

TILE = 512  # rows of scores that are computed at once: one MB of float32 for as many keys
HIDDEN = torch.finfo(torch.float32).min  # not -inf, of which a row that sees nothing would become NaN


def prompt_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor | None:
    """Softmax(query @ key.T / sqrt(D)) @ value, with scores of 16 bits and sums in float32.

    Args:
        query: [B, H, S, D]; key, value: [B, H, K, D].
        visible: bool, broadcastable to [B, 1, S, K]; None means everything. What a row that sees nothing gets is 0.

    Returns:
        [B, H, S, D], or None where this is not served.
    """
    if not is_served(query, key, value, visible):
        return None
    batch, heads, tokens, size = query.shape
    keys = key.shape[2]
    hidden = first_hidden = None
    if visible is not None:
        hidden = visible.logical_not().expand(batch, 1, tokens, keys)
        columns = hidden.flatten(0, 2).any(dim=0).nonzero()  # often <sop> alone, which the context does not see
        hidden, first_hidden = (hidden, int(columns[0])) if len(columns) else (None, None)
    rounded, rest = query.new_empty(2, min(tokens, TILE), keys)
    scores, weights = query.new_empty(2, min(tokens, TILE), keys, dtype=torch.float32)
    product = query.new_empty(min(tokens, TILE), size)
    context = query.new_empty(batch, tokens, heads, size).transpose(1, 2)
    for row in range(batch):
        for head in range(heads):
            key_columns = key[row, head].t()
            for start in range(0, tokens, TILE):
                part = query[row, head, start : start + TILE]
                count = len(part)
                first, second, exact, weight, of_part = (x[:count] for x in (rounded, rest, scores, weights, product))
                torch.addmm(first, part, key_columns, beta=0, alpha=size**-0.5, out=first)
                torch.addmm(first, part, key_columns, beta=-1, alpha=size**-0.5, out=second)
                exact.copy_(first).add_(second)
                if hidden is not None:
                    unseen = hidden[row, 0, start : start + count, first_hidden:]
                    exact[:, first_hidden:].masked_fill_(unseen, HIDDEN)
                torch.softmax(exact, dim=-1, out=weight)
                context[row, head, start : start + count] = torch.mm(
                    first.copy_(weight), value[row, head], out=of_part
                )
    blind = hidden.all(dim=-1, keepdim=True) if first_hidden == 0 else None
    return context if blind is None else context.masked_fill_(blind, 0)


def is_served(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> bool:
    states = (query, key, value)
    if any(x.dtype != torch.bfloat16 or not is_plain(x) for x in states):
        return False
    if visible is not None and visible.dim() > 3 and visible.shape[-3] > 1:  # another mask for each head
        return False
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in states)
    return not trained
