"""What PEFT has to be told of this package's INT8 and INT4 layers: a LoRA layer for them.

PEFT knows how to put LoRA on an nn.Linear and how to merge it there. The layers of a quantized model are none, so that
no adapter is merged into integers by mistake; `know_quantized_layers` gives a LoraConfig the layer that serves them.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

logger = logging.getLogger(__name__)
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


class QuantizedLora(Linear):
    """LoRA on a QuantizedLinear. A merge rounds the sum to the layer's own format, and says what that costs; it can be
    undone exactly until the wrapper is gone.

    Raises:
        ValueError: a kind of LoRA that computes with the base layer's weight: DoRA, PiSSA, OLoRA, LoftQ, ...
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs) -> None:
        self.before_merge: list[tuple[Tensor, Tensor, Tensor | None]] = []
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict:
        return {(): None}

    def update_layer(self, adapter_name: str, *args, config: LoraConfig, **kwargs) -> None:
        start = config.init_lora_weights
        special = [
            name for name in ("use_dora", "alora_invocation_tokens", "arrow_config") if getattr(config, name, 0)
        ]
        if special or not (isinstance(start, bool) or start in ("gaussian", "orthogonal")):
            raise ValueError(
                f"{', '.join(special) or f'init_lora_weights={start!r}'} on an INT{self.get_base_layer().bits} layer: "
                "it computes with the weight, which is rounded here; use plain LoRA, or a 16-bit base"
            )
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Dequantizes, adds, rounds again. `safe_merge` changes nothing: NaN and infinity are always refused."""
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            delta = self.get_delta_weight(name).detach().float()
            if not torch.isfinite(delta).all():
                raise ValueError(f"the adapter {name!r} holds NaN or infinite numbers, nothing is merged")
            before = base.weight.data, base.weight_scale.data, None if base.bias is None else base.bias.data
            report_rounding(delta, merge_into(base, delta))
            if self.lora_bias[name]:
                base.bias.data = base.bias.data + self.lora_B[name].bias.data * self.scaling[name]
            self.before_merge.append(before)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        base = self.get_base_layer()
        while self.merged_adapters:
            self.merged_adapters.pop()
            base.weight.data, base.weight_scale.data, bias = self.before_merge.pop()
            if bias is not None:
                base.bias.data = bias


def merge_into(base: nn.Module, delta: Tensor) -> Tensor:
    """Adds delta [out, in] to a quantized layer's weight; what the rounding put beside it, [out, in]."""
    quantization = code_of(base)
    plain = (base.weight, base.weight_scale, base.bits, torch.float32)
    wanted = quantization.dequantize_weight(*plain) + delta.to(base.weight.device)
    values, scale = quantization.quantize_weight(wanted, base.bits, base.group_size)
    base.weight.data, base.weight_scale.data = values, scale.to(base.weight_scale.dtype)
    return quantization.dequantize_weight(base.weight, base.weight_scale, base.bits, torch.float32) - wanted


def report_rounding(delta: Tensor, error: Tensor) -> None:
    share = float(error.norm() / delta.norm().clamp(min=1e-30))
    logger.warning(
        f"merged into integers: rounding moved the weight by {share:.0%} of what the adapter did"
        + ("; keep the adapter beside the model, or merge it into the 16-bit one" if share > 0.5 else "")
    )


def code_of(module: nn.Module):
    """The file that a module's class comes from: each checkpoint brings its own copy."""
    return sys.modules[type(module).__module__]


def know_quantized_layers(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Tells a LoraConfig of the quantized layers of this model; other kinds of adapters stay refused by PEFT."""
    if isinstance(config, LoraConfig):
        config._register_custom_module({code_of(model).QuantizedLinear: QuantizedLora})
    return config


def add_lora(model: nn.Module, rank: int = 8, alpha: int = 16, dropout: float = 0.0, **options) -> PeftModel:
    """A new adapter on all linear layers of the blocks, of a plain or quantized model."""
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **options)
    return get_peft_model(model, know_quantized_layers(config, model))


def load_lora(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """PeftModel.from_pretrained, on a plain or quantized model."""
    config = know_quantized_layers(PeftConfig.from_pretrained(str(folder)), model)
    return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)
