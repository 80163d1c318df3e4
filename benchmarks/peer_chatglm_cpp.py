"""chatglm.cpp beside us: its file made from our random weights, and its worker.

    python benchmarks/peer_chatglm_cpp.py convert FOLDER FILE --type q4_0
    python benchmarks/peer_chatglm_cpp.py work FILE

`peers.py chatglm.cpp` makes its environment, which sees ours (torch, safetensors) and needs a C++ compiler.
The conversion is chatglm.cpp's own code, fed tensor by tensor, because its loader wants a whole model in float32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from machine import resident_memory
from remote import DECODE_PROMPT, run_peer, serve

LENGTH = 2048  # tokens that its cache is made for
HEAD, EMBEDDING = "lm_head.weight", "transformer.word_embeddings.weight"


class Worker:
    """`generate_next_token` is what chatglm.cpp's own `generate` calls for each token, the prompt's first included."""

    def __init__(self, file: str):
        from chatglm_cpp import Pipeline
        from chatglm_cpp._C import GenerationConfig

        start = time.perf_counter()
        self.pipeline = Pipeline(file, max_length=LENGTH)
        self.greedy = GenerationConfig(do_sample=False, max_length=LENGTH)
        loaded = time.perf_counter() - start
        self.prefill(8)
        first = time.perf_counter() - start
        self.started = {"load_seconds": loaded, "first_token_seconds": first, "version": version("chatglm-cpp")}

    def memory(self) -> dict:
        return resident_memory()

    def next_token(self, ids: list[int], past: int, context: int) -> tuple[int, float]:
        start = time.perf_counter()
        token = self.pipeline.model.generate_next_token(ids, None, self.greedy, past, context)
        return token, time.perf_counter() - start

    def prefill(self, tokens: int) -> dict:
        ids = [100 + 37 * index % 90000 for index in range(tokens - 2)] + [130001, 130004]
        return {"seconds": self.next_token(ids, 0, tokens)[1]}

    def decode(self, context: int, steps: int) -> dict:
        """Seconds of each of `steps` tokens behind `context` tokens; what the cache holds does not change the time."""
        ids = [100 + index for index in range(context)]
        seconds = []
        for _ in range(steps + 1):
            ids.append(100)
            token, time_taken = self.next_token(ids, len(ids) - 1, min(DECODE_PROMPT, context))
            ids[-1] = token
            seconds.append(time_taken)
        return {"seconds": seconds[1:]}


class StoredTensors(Mapping):
    """The state dict of a folder, each tensor read when it is asked for, as float16."""

    def __init__(self, folder: Path):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.folder, self.files = folder, index["weight_map"]
        self.files[HEAD] = self.files[EMBEDDING]

    def __getitem__(self, name: str):
        from safetensors import safe_open

        with safe_open(self.folder / self.files[name], "pt") as stored:
            return stored.get_tensor(EMBEDDING if name == HEAD else name).half()

    def __iter__(self):
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def convert(folder: Path, file: Path, ggml_type: str, layers: int | None = None) -> None:
    from chatglm_cpp.convert import ChatGLMConverter, GGMLType

    fields = json.loads((folder / "config.json").read_text())
    fields.update({"num_layers": layers} if layers else {})
    config = SimpleNamespace(pre_seq_len=None, **fields)
    pieces = (folder / "ice_text.model").read_bytes()
    tokenizer = SimpleNamespace(serialized_model_proto=lambda: pieces)
    for name in ("sp", "text_tokenizer", "sp_tokenizer"):
        tokenizer = SimpleNamespace(**{name: tokenizer})
    tensors = StoredTensors(folder)
    model = SimpleNamespace(config=config, state_dict=lambda: tensors)
    with open(file, "wb") as out:
        ChatGLMConverter.convert(out, model, tokenizer, GGMLType[ggml_type.upper()])


if __name__ == "__main__":
    run_peer(__doc__, ("q4_0", "q4_1", "q8_0", "f16"), convert, lambda file: serve(lambda: Worker(file)))
