"""Two INT4 columns in a byte, as the official ChatGLM-6B stores them."""

import torch
from torch import Tensor


def pack_int4(values: Tensor) -> Tensor:
    """int8 [..., in] with values -8 ... 7 -> int8 [..., in / 2], even columns in the high nibbles."""
    if values.shape[-1] % 2:
        raise ValueError(f"{values.shape[-1]} columns: INT4 packs two in a byte, so their number must be even")
    return ((values[..., 0::2] & 15) << 4) | (values[..., 1::2] & 15)


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 [..., in / 2] -> int8 [..., in], the reverse of pack_int4."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)
