"""The official code's way to compute, as a yardstick: its network in plain PyTorch, written from how it behaves.

    python benchmarks/original.py --check
    python benchmarks/original.py FOLDER [--layers N] [--dtype bfloat16] [--threads 2]

The official code asks for an old transformers (4.27.1), so it cannot be measured beside ours. Here is what takes
its time, step for step: hidden states with the sequence first; linear layers without fusion; in each layer rotary
tables of its own, whose length is asked of the position ids, indexed for both halves of a head; keys and values
concatenated at each token; scores by batched products of the model's type, scaled and normalised in float32; GELU
written out; logits of all positions; masks and positions worked out from the ids as Python lists. What `generate` did
around that is left out, in the official code's favour: a loop takes the best token. `--check` compares logits and
greedy answers with those that the official code itself computed (tests/golden).
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import resident_memory
from make_model import ROOT
from remote import DECODE_PROMPT, serve
from safetensors import safe_open
from torch import Tensor, nn
from worker import options_of

MASKED = -10000.0
RESIDUAL = math.sqrt(2 * 28)  # whatever the number of layers


class Rotary(nn.Module):
    """Tables of one layer."""

    def __init__(self, size: int):
        super().__init__()
        frequencies = 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)
        self.register_buffer("inv_freq", frequencies.half(), persistent=False)
        self.length, self.cos, self.sin = 0, None, None

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [length, size]."""
        if length > self.length:
            angles = torch.outer(torch.arange(length).to(self.inv_freq.dtype), self.inv_freq)
            angles = torch.cat((angles, angles), dim=-1)
            self.length, self.cos, self.sin = length, angles.cos(), angles.sin()
        return self.cos[:length], self.sin[:length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """x [S, B, H, D / 2] with the angles of positions [S, B]."""
    cos, sin = (F.embedding(positions, table).unsqueeze(2) for table in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, index: int):
        super().__init__()
        self.heads, self.size, self.index = heads, width // heads, index
        self.rotary_emb = Rotary(self.size // 2)
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor, past) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """hidden [S, B, W], positions [B, 2, S], mask [B, 1, S, K] (True is hidden), past keys and values."""
        S, B, _ = hidden.shape
        query, key, value = self.query_key_value(hidden).view(S, B, self.heads, -1).chunk(3, dim=-1)
        rows = positions.permute(1, 2, 0)  # [2, S, B]
        cos, sin = self.rotary_emb(int(positions.max()) + 1)
        query, key = (
            torch.cat([rotate(half, cos, sin, row) for half, row in zip(x.chunk(2, dim=-1), rows)], dim=-1)
            for x in (query, key)
        )
        if past is not None:
            key, value = torch.cat((past[0], key)), torch.cat((past[1], value))
        kept = (key, value)
        factor = float(self.index + 1)
        query = query / (math.sqrt(self.size) * factor)
        query, key, value = (
            x.reshape(x.shape[0], B * self.heads, self.size).transpose(0, 1) for x in (query, key, value)
        )
        scores = torch.baddbmm(query.new_zeros(1, 1, 1), query, key.transpose(1, 2), beta=0.0)
        scores = scores.view(B, self.heads, S, -1)
        if mask.any():
            scores = scores.masked_fill(mask, MASKED)
        weights = F.softmax(scores.float() * factor, dim=-1).to(hidden.dtype)
        context = torch.bmm(weights.view(B * self.heads, S, -1), value)
        return self.dense(context.transpose(0, 1).reshape(S, B, -1)), kept


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(hidden)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, epsilon: float, index: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width, eps=epsilon)
        self.attention = Attention(width, heads, index)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=epsilon)
        self.mlp = MLP(width, inner)

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor, past):
        normed = self.input_layernorm(hidden)
        attended, kept = self.attention(normed, positions, mask, past)
        normed = self.post_attention_layernorm(normed * RESIDUAL + attended)
        return normed * RESIDUAL + self.mlp(normed), kept


class Original(nn.Module):
    """The network, with the names of the checkpoint's tensors."""

    def __init__(self, config: dict, layers: int | None = None):
        super().__init__()
        width, heads, epsilon = config["hidden_size"], config["num_attention_heads"], config["layernorm_epsilon"]
        self.gmask, self.masked, self.bos = (config[f"{name}_token_id"] for name in ("gmask", "mask", "bos"))
        inner, rows = config["inner_hidden_size"], config["vocab_size"]
        self.transformer = nn.Module()
        self.transformer.word_embeddings = nn.Embedding(rows, width)
        blocks = [Block(width, heads, inner, epsilon, i) for i in range(layers or config["num_layers"])]
        self.transformer.layers = nn.ModuleList(blocks)
        self.transformer.final_layernorm = nn.LayerNorm(width, eps=epsilon)
        self.lm_head = nn.Linear(width, rows, bias=False)

    def positions(self, ids: Tensor, last: bool = False) -> Tensor:
        """[B, 2, S], from the ids as lists; with `last` only the last column."""
        rows = []
        for row in ids.tolist():
            mask = row.index(self.gmask if self.gmask in row else self.masked)
            context = row.index(self.bos)
            answer = len(row) - context
            if last:
                rows.append([[mask], [answer]])
                continue
            first = [*range(context), *[mask] * answer]
            rows.append([first, [0] * context + list(range(1, answer + 1))])
        return torch.tensor(rows)

    def mask(self, ids: Tensor) -> Tensor:
        """[B, 1, S, S], True where a key is hidden."""
        visible = torch.ones(len(ids), ids.shape[1], ids.shape[1]).tril_()
        for row, sequence in enumerate(ids.tolist()):
            visible[row, :, : sequence.index(self.bos)] = 1
        return (visible < 0.5).unsqueeze(1)

    def forward(self, ids: Tensor, past=None) -> tuple[Tensor, list]:
        """Logits [B, S, V] of ids [B, S], or with a past of the last ones only, and the new past."""
        positions = self.positions(ids, last=past is not None)
        if past is None:
            mask = self.mask(ids)
        else:
            ids, mask = ids[:, -1:], torch.zeros(1, 1, dtype=torch.bool)
        hidden = self.transformer.word_embeddings(ids).transpose(0, 1)
        kept = []
        for block, before in zip(self.transformer.layers, past or [None] * len(self.transformer.layers)):
            hidden, states = block(hidden, positions, mask, before)
            kept.append(states)
        logits = self.lm_head(self.transformer.final_layernorm(hidden))
        return logits.permute(1, 0, 2).contiguous(), kept

    @torch.no_grad()
    def generate(self, ids: Tensor, new_tokens: int, past=None) -> tuple[Tensor, list, list[float]]:
        """Ids with the best tokens behind them, the past, and the seconds of each token."""
        seconds = []
        for _ in range(new_tokens):
            start = time.perf_counter()
            logits, past = self(ids, past)
            ids = torch.cat((ids, logits[:, -1].float().argmax(-1, keepdim=True)), dim=1)
            seconds.append(time.perf_counter() - start)
        return ids, past, seconds


def load(folder: Path, layers: int | None, dtype: torch.dtype) -> Original:
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        model = Original(config, layers)
    model.to(dtype).to_empty(device="cpu")
    for block in model.transformer.layers:
        block.attention.rotary_emb = Rotary(block.attention.size // 2).to(dtype)
    wanted = dict(model.named_parameters())
    if config.get("tie_word_embeddings", True):
        model.lm_head.weight = model.transformer.word_embeddings.weight
        del wanted["lm_head.weight"]
    with torch.no_grad():
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as stored:
                for name in set(stored.keys()) & set(wanted):
                    wanted.pop(name).copy_(stored.get_tensor(name))
    if wanted:
        raise ValueError(f"{folder} lacks {sorted(wanted)[:3]}")
    return model.eval()


class Worker:
    def __init__(self, options):
        start = time.perf_counter()
        self.model = load(Path(options.folder), options.layers, getattr(torch, options.dtype or "bfloat16"))
        loaded = time.perf_counter() - start
        self.prefill(8)
        self.started = {"load_seconds": loaded, "first_token_seconds": time.perf_counter() - start}

    def memory(self) -> dict:
        return resident_memory()

    def prompt(self, tokens: int) -> Tensor:
        text = torch.randint(100, 100000, (1, tokens - 2), generator=torch.Generator().manual_seed(tokens))
        return torch.cat((text, torch.tensor([[self.model.gmask, self.model.bos]])), dim=1)

    def prefill(self, tokens: int) -> dict:
        return {"seconds": self.model.generate(self.prompt(tokens), 1)[2][0]}

    def decode(self, context: int, steps: int) -> dict:
        """As worker.py's: the answer's keys and values are copies of the prompt's."""
        ids, past, _ = self.model.generate(self.prompt(min(DECODE_PROMPT, context)), 1)
        repeats = -(-context // past[0][0].shape[0])
        past = [tuple(x.repeat(repeats, 1, 1, 1)[:context] for x in layer) for layer in past]
        ids = torch.cat((ids, torch.full((1, context + 1 - ids.shape[1]), 100)), dim=1)
        return {"seconds": self.model.generate(ids, steps + 1, past)[2][1:]}


def check() -> None:
    """Compares with what the official code computed."""
    folder = ROOT / "tests" / "golden" / "model" / "base2d"
    model = load(folder, None, torch.float32)
    cases = {case["name"]: case for case in json.loads((folder / "cases.json").read_text())["cases"]}
    with safe_open(folder / "tensors.safetensors", "pt") as stored, torch.no_grad():
        for name in ("single0", "single1", "full_pair", "mask_mid_prompt", "mask_mid_answer"):
            logits, _ = model(torch.tensor(cases[name]["input_ids"]))
            error = (logits - stored.get_tensor(f"{name}.logits")).abs().max().item()
            print(f"{name}: logits differ by {error:.1e} at most")
            if error > 2e-5:
                raise SystemExit("too much")
    for name in ("greedy0", "greedy1", "greedy2"):
        ids, answer = torch.tensor(cases[name]["input_ids"]), cases[name]["output_ids"]
        given = model.generate(ids, len(answer[0]) - ids.shape[1])[0].tolist()
        print(f"{name}: {'the same answer' if given == answer else 'ANOTHER ANSWER'}")
        if given != answer:
            raise SystemExit(1)


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        check()
        return
    options = options_of(sys.argv[1:])
    if options.threads:
        torch.set_num_threads(options.threads)
    serve(lambda: Worker(options))


if __name__ == "__main__":
    main()
