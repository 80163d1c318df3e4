"""OpenVINO beside us: the same network of a few layers with random weights, compressed by nncf, and its worker.

    python benchmarks/peer_openvino.py convert - FILE --type int4 --layers N
    python benchmarks/peer_openvino.py work FILE

`peers.py openvino` makes its environment: openvino and nncf. The network is written in OpenVINO's own operations: the
same products, norms, biases, GELU and attention, a cache that OpenVINO keeps (ReadValue, Assign), the logits of the
last token only. bf16 is what its CPU plugin computes 16-bit weights in where the processor can; int4 is INT4_SYM with
groups of 128 columns, int8 INT8_SYM, head and embedding included. It wants the 16-bit weights of all layers in memory
to compress them, so few layers are measured and scaled.
"""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

from machine import cores, resident_memory
from remote import run_peer, serve

LAYERS, HIDDEN, INNER, HEADS, VOCABULARY = 4, 4096, 16384, 32, 130528
HEAD_SIZE = HIDDEN // HEADS
DEVIATION = 0.02  # of the weights, as the model is initialised with


class Network:
    """Builds the model of ids [B, S], mask [B, context and S] and beam_idx [B], as OpenVINO's own models are."""

    def __init__(self, layers: int):
        import numpy
        import openvino
        from openvino import opset13

        self.numpy, self.openvino, self.ops, self.states = numpy, openvino, opset13, []
        ids = self.ops.parameter([-1, -1], numpy.int64, name="input_ids")
        mask = self.ops.parameter([-1, -1], numpy.int64, name="attention_mask")
        self.beams = self.ops.parameter([-1], numpy.int32, name="beam_idx")
        self.batch = self.ops.gather(self.ops.shape_of(ids), [0], 0)
        visible = self.visible(ids, mask)
        x = self.ops.gather(self.weight("embedding", VOCABULARY, HIDDEN), ids, 0)
        for layer in range(layers):
            x = self.block(f"layer{layer}", x, visible)
        last = self.ops.slice(self.norm(x), [-1], [numpy.iinfo(numpy.int64).max], [1], [1])
        logits = self.ops.matmul(last, self.weight("head", VOCABULARY, HIDDEN), False, True)
        inputs = {"input_ids": ids, "attention_mask": mask, "beam_idx": self.beams}
        self.model = openvino.Model([self.ops.result(logits)], self.states, list(inputs.values()))
        for name, node in inputs.items():
            node.output(0).set_names({name})

    def weight(self, name: str, rows: int, columns: int):
        """[rows, columns], stored in float16 and computed in float32, as OpenVINO's converters leave it."""
        random = self.numpy.random.default_rng(zlib.crc32(name.encode()))
        part = random.standard_normal((4096, columns), dtype=self.numpy.float32) * DEVIATION
        stored = self.numpy.tile(part.astype(self.numpy.float16), (-(-rows // 4096), 1))[:rows]
        constant = self.ops.constant(stored)
        constant.set_friendly_name(name)
        return self.ops.convert(constant, "f32")

    def number(self, value: float):
        kind = self.numpy.int64 if isinstance(value, int) else self.numpy.float32
        return self.ops.constant(self.numpy.array(value, kind))

    def linear(self, name: str, x, rows: int, columns: int):
        y = self.ops.matmul(x, self.weight(name, rows, columns), False, True)
        return self.ops.add(y, self.ops.constant(self.numpy.zeros(rows, self.numpy.float32)))

    def norm(self, x):
        ones, zeros = self.numpy.ones(HIDDEN, self.numpy.float32), self.numpy.zeros(HIDDEN, self.numpy.float32)
        y = self.ops.mvn(x, [-1], True, 1e-5, "inside_sqrt")
        return self.ops.add(self.ops.multiply(y, self.ops.constant(ones)), self.ops.constant(zeros))

    def visible(self, ids, mask):
        """[B, 1, S, all tokens]: those of the mask that are not behind the token; 0 or far below."""
        ops, axis = self.ops, self.numpy.int64(1)
        length = ops.gather(ops.shape_of(mask), axis, 0)
        new = ops.gather(ops.shape_of(ids), axis, 0)
        places = ops.range(self.number(0), length, self.number(1), "i64")
        own = ops.range(ops.subtract(length, new), length, self.number(1), "i64")
        behind = ops.greater(ops.unsqueeze(places, 0), ops.unsqueeze(own, 1))
        padded = ops.equal(ops.unsqueeze(mask, [1, 2]), self.number(0))
        hidden = ops.logical_or(ops.unsqueeze(behind, [0, 1]), padded)
        return ops.select(hidden, self.number(-65504.0), self.number(0.0))

    def cached(self, name: str, new):
        """new [B, HEADS, S, HEAD_SIZE] behind what the cache holds of this name."""
        ops = self.ops
        empty = ops.broadcast(
            self.number(0.0), ops.concat([self.batch, ops.constant(self.numpy.array([HEADS, 0, HEAD_SIZE]))], 0)
        )
        past = ops.gather(ops.read_value(empty, name, self.numpy.float32, [-1, HEADS, -1, HEAD_SIZE]), self.beams, 0)
        states = ops.concat([past, new], 2)
        self.states.append(ops.assign(states, name))
        return states

    def block(self, name: str, x, visible):
        ops = self.ops
        mixed = self.linear(f"{name}.qkv", self.norm(x), 3 * HIDDEN, HIDDEN)
        parts = ops.split(ops.reshape(mixed, [0, 0, HEADS, 3 * HEAD_SIZE], True), 3, 3).outputs()
        query, key, value = (ops.transpose(part, [0, 2, 1, 3]) for part in parts)
        key, value = self.cached(f"{name}.key", key), self.cached(f"{name}.value", value)
        context = ops.scaled_dot_product_attention(query, key, value, visible)
        context = ops.reshape(ops.transpose(context, [0, 2, 1, 3]), [0, 0, HIDDEN], True)
        x = ops.add(x, self.linear(f"{name}.dense", context, HIDDEN, HIDDEN))
        inner = ops.gelu(self.linear(f"{name}.up", self.norm(x), INNER, HIDDEN), "tanh")
        return ops.add(x, self.linear(f"{name}.down", inner, HIDDEN, INNER))


def convert(_folder: Path, file: Path, kind: str, layers: int | None = None) -> None:
    import nncf
    import openvino

    model = Network(layers or LAYERS).model
    if kind != "bf16":
        mode = nncf.CompressWeightsMode.INT4_SYM if kind == "int4" else nncf.CompressWeightsMode.INT8_SYM
        groups = {"group_size": 128, "ratio": 1.0, "all_layers": True} if kind == "int4" else {}
        model = nncf.compress_weights(model, mode=mode, **groups)
    description = file.with_suffix(".xml")  # beside the weights
    openvino.save_model(model, description, compress_to_fp16=True)
    description.with_suffix(".bin").rename(file)


class Worker:
    def __init__(self, file: str):
        import numpy
        import openvino

        self.numpy, start = numpy, time.perf_counter()
        core = openvino.Core()
        model = core.read_model(Path(file).with_suffix(".xml"), file)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": cores()}
        self.request = core.compile_model(model, "CPU", settings).create_infer_request()
        loaded = time.perf_counter() - start
        self.prefill(8)
        first = time.perf_counter() - start
        can = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        version = f"{openvino.__version__} ({can})"
        self.started = {"load_seconds": loaded, "first_token_seconds": first, "version": version}

    def memory(self) -> dict:
        return resident_memory()

    def compute(self, ids, mask) -> float:
        """Seconds for ids [B, S] behind what the cache holds."""
        inputs = {"input_ids": ids, "attention_mask": mask, "beam_idx": self.numpy.arange(len(ids), dtype="int32")}
        start = time.perf_counter()
        self.request.infer(inputs)
        return time.perf_counter() - start

    def prefill(self, tokens: int) -> dict:
        self.request.reset_state()
        ids = 100 + 37 * self.numpy.arange(tokens)[None] % 90000
        return {"seconds": self.compute(ids, self.numpy.ones_like(ids))}

    def batch(self, lengths: list[int], steps: int) -> dict:
        """Seconds of each of `steps` tokens of all sequences, which stand behind so many tokens, padded in front."""
        longest, places = max(lengths), self.numpy.arange(max(lengths) + steps + 1)
        mask = (places >= longest - self.numpy.array(lengths)[:, None]).astype("int64")
        ids = 100 + self.numpy.arange(longest)[None] + self.numpy.arange(len(lengths))[:, None]
        self.request.reset_state()
        self.compute(ids, mask[:, :longest])
        return {"seconds": [self.compute(ids[:, :1], mask[:, : longest + 1 + n]) for n in range(steps + 1)][1:]}

    def decode(self, context: int, steps: int) -> dict:
        return self.batch([context], steps)


if __name__ == "__main__":
    os.environ["CI"] = "true"  # nncf reports its use home, but not then
    run_peer(__doc__, ("int4", "int8", "bf16"), convert, lambda file: serve(lambda: Worker(file)))
