"""xFasterTransformer beside us: a folder of float16 files with random weights, and its worker.

    python benchmarks/peer_xfastertransformer.py convert - FOLDER --type int4 [--layers N]
    python benchmarks/peer_xfastertransformer.py work FOLDER

`peers.py xfastertransformer` makes its environment, with the torch that it wants (gigabytes, as pip's own comes with
CUDA). It knows ChatGLM-6B. The weights are quantized each time that a folder is loaded, to the type that the folder is
named after. It is made for Intel's Xeons with AMX.
"""

from __future__ import annotations

import configparser
import os
import time
from importlib.metadata import version
from pathlib import Path

from machine import cores, resident_memory
from remote import run_peer, serve

LAYERS, HIDDEN, INNER, HEADS, VOCABULARY = 28, 4096, 16384, 32, 130528
DEVIATION = 0.02  # of the weights, as the model is initialised with
MATRICES = {  # name in a layer: rows and columns as its converter leaves them
    "attention.query_key_value": (HIDDEN, 3 * HIDDEN),
    "attention.dense": (HIDDEN, HIDDEN),
    "mlp.dense_h_to_4h": (HIDDEN, INNER),
    "mlp.dense_4h_to_h": (INNER, HIDDEN),
}
SPLIT = ("attention.query_key_value.bias", "mlp.dense_h_to_4h.bias")  # files with the number of a rank in their names


def convert(_folder: Path, folder: Path, _kind: str, layers: int | None = None) -> None:
    import numpy

    random, layers = numpy.random.default_rng(0), layers or LAYERS
    folder.mkdir(exist_ok=True)

    def write(name: str, *shape: int, value: float = 0) -> None:
        if len(shape) == 1:
            data = numpy.full(shape, value, numpy.float16)
        else:
            data = (random.standard_normal((1024, shape[1]), dtype=numpy.float32) * DEVIATION).astype(numpy.float16)
            data = numpy.tile(data, (-(-shape[0] // 1024), 1))[: shape[0]]
        data.tofile(folder / f"model.{name}.bin")

    write("wte", VOCABULARY, HIDDEN)
    write("lm_head.weight", VOCABULARY, HIDDEN)
    write("final_layernorm.weight", HIDDEN, value=1)
    write("final_layernorm.bias", HIDDEN)
    for layer in (f"layers.{index}" for index in range(layers)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            write(f"{layer}.{norm}.weight", HIDDEN, value=1)
            write(f"{layer}.{norm}.bias", HIDDEN)
        for name, (rows, columns) in MATRICES.items():
            write(f"{layer}.{name}.weight.0", rows, columns)
            write(f"{layer}.{name}.bias" + ".0" * (f"{name}.bias" in SPLIT), columns)
    config = configparser.ConfigParser()
    config["chatglm"] = {
        "model_name": "chatglm",
        "head_num": HEADS,
        "size_per_head": HIDDEN // HEADS,
        "inter_size": INNER,
        "max_pos_seq_len": 2048,
        "num_layer": layers,
        "layernorm_eps": "1e-5",
        "layernorm_type": "pre_layernorm",
        "activation_type": "Gelu",
        "has_post_decoder_layernorm": 0,
        "vocab_size": VOCABULARY,
        "start_id": 130004,
        "end_id": 130005,
        "weight_data_type": "fp16",
        "attn_params_type": "GQAttnParams",
        "ffn_params_type": "GptFFNParams",
    }
    with open(folder / "config.ini", "w") as file:
        config.write(file)


class Worker:
    def __init__(self, folder: str):
        os.environ["OMP_NUM_THREADS"] = str(cores())
        import torch
        import xfastertransformer

        self.torch, start = torch, time.perf_counter()
        kind = Path(folder).stem
        self.model = xfastertransformer.AutoModel.from_pretrained(folder, dtype=kind)
        loaded = time.perf_counter() - start
        self.prefill(8)
        first = time.perf_counter() - start
        own = f"{version('xfastertransformer')} (torch {torch.__version__})"
        self.started = {"load_seconds": loaded, "first_token_seconds": first, "version": own}

    def memory(self) -> dict:
        return resident_memory()

    def times(self, sequences: int, tokens: int, new_tokens: int) -> list[float]:
        """Seconds of each new token of all sequences; the first is the prompt's."""
        ids = 100 + 37 * self.torch.arange(sequences * tokens).view(sequences, tokens) % 90000
        ids[:, -2:] = self.torch.tensor([130001, 130004])
        self.model.config(max_length=tokens + new_tokens, do_sample=False)
        self.model.input(ids)
        seconds = []
        for _ in range(new_tokens):
            start = time.perf_counter()
            self.model.forward()
            seconds.append(time.perf_counter() - start)
        self.model.finalize()
        return seconds

    def prefill(self, tokens: int) -> dict:
        return {"seconds": self.times(1, tokens, 1)[0]}

    def decode(self, context: int, steps: int) -> dict:
        return {"seconds": self.times(1, context, steps + 2)[2:]}

    def batch(self, lengths: list[int], steps: int) -> dict:
        """All sequences as long as the longest: it takes no mask here."""
        return {"seconds": self.times(len(lengths), max(lengths), steps + 2)[2:]}


if __name__ == "__main__":
    run_peer(__doc__, ("int4", "int8", "w8a8", "bf16"), convert, lambda folder: serve(lambda: Worker(folder)))
