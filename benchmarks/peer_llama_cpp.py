"""llama.cpp beside us: a file of the same shape with random weights, and its worker.

    python benchmarks/peer_llama_cpp.py convert - FILE --type q4_0 [--layers N]
    python benchmarks/peer_llama_cpp.py work FILE

`peers.py llama.cpp` makes its environment: the `gguf` package, which writes the file, and llama.cpp as the npm package
@node-llama-cpp/linux-x64 has built it (needs node). llama.cpp does not know ChatGLM-6B, so the shape is written as a
GPT-NeoX: the same products, norms, biases and GELU, with embedding and head apart, both in the type of the layers. No
token reads the embedding. llama.cpp turns the type's blocks into what suits the processor when it loads a file.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from machine import cores
from remote import run_peer, script

LAYERS, HIDDEN, INNER, HEADS, VOCABULARY, CONTEXT = 28, 4096, 16384, 32, 130528, 2560
DEVIATION = 0.02  # of the weights, as the model is initialised with
BLOCK = 32  # weights that share a scale in q4_0 and q8_0
ROWS_AT_ONCE = 4096  # random rows, of which larger matrices repeat; that changes no time
MATRICES = {  # name in a layer: rows, columns
    "attn_qkv": (3 * HIDDEN, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of all; vectors are biases and the weights of norms."""
    yield from (("token_embd.weight", (VOCABULARY, HIDDEN)), ("output.weight", (VOCABULARY, HIDDEN)))
    yield from ((f"output_norm.{part}", (HIDDEN,)) for part in ("weight", "bias"))
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            yield from ((f"blk.{layer}.{name}.{part}", (HIDDEN,)) for part in ("weight", "bias"))
        for name, shape in MATRICES.items():
            yield f"blk.{layer}.{name}.weight", shape
            yield f"blk.{layer}.{name}.bias", shape[:1]


def stored(name: str, shape: tuple[int, ...], kind: str):
    """A tensor as its file has it: float32 vectors; matrices as bytes [rows, ...], of normal weights (bf16), or of
    evenly spread integers with their scales."""
    import numpy

    if len(shape) == 1:
        return numpy.full(shape, float(name.endswith("norm.weight")), numpy.float32)
    random, (rows, columns) = numpy.random.default_rng(zlib.crc32(name.encode())), shape
    if kind == "bf16":
        weights = random.standard_normal((min(rows, ROWS_AT_ONCE), columns), dtype=numpy.float32) * DEVIATION
        data = (weights.view(numpy.uint32) >> 16).astype(numpy.uint16).view(numpy.uint8)
    else:
        size, largest = {"q4_0": (2 + BLOCK // 2, 8), "q8_0": (2 + BLOCK, 128)}[kind]
        data = random.integers(0, 256, (min(rows, ROWS_AT_ONCE), columns // BLOCK, size), dtype=numpy.uint8)
        scale = DEVIATION * 3**0.5 / largest  # what gives even integers from -largest to largest that deviation
        data[:, :, :2] = numpy.array([scale], numpy.float16).view(numpy.uint8)
        data = data.reshape(len(data), -1)
    return numpy.tile(data, (-(-rows // ROWS_AT_ONCE), 1))[:rows]


def convert(_folder: Path, file: Path, kind: str, layers: int | None = None) -> None:
    import gguf
    import numpy

    layers, matrix_type = layers or LAYERS, gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(file, "gptneox")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_parallel_residual(False)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    for name, shape in tensors(layers):
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, numpy.dtype("float32"), 4 * shape[0])
        else:
            shape = gguf.quant_shape_to_byte_shape(shape, matrix_type)
            writer.add_tensor_info(name, shape, numpy.dtype("uint8"), shape[0] * shape[1], raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in tensors(layers):
        writer.write_tensor_data(stored(name, shape, kind))
    writer.close()


def work(file: str) -> None:
    """Becomes the program that serves."""
    os.execvp("node", ["node", script("peer_llama_cpp.cjs"), file, str(cores())])


if __name__ == "__main__":
    run_peer(__doc__, ("q4_0", "q8_0", "bf16"), convert, work)
