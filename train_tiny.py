"""Makes `tiny/`, the small ChatGLM that ships with this repository, in minutes on two CPU cores:
`.venv/bin/python train_tiny.py`.

From `tiny/dialogues.jsonl` alone: a SentencePiece model in the layout of `ice_text.model`, then a network trained
through the package's own loss until it gives every answer of the set word for word, then the folder that
`from_pretrained("tiny", trust_remote_code=True)` loads. `--sync-code` only copies the code files into the folder,
`--check` only measures the checkpoint that is there.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece as spm
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

from package import copy_package, package_module
from sentencepiece_file import complete_processor

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tiny"
IGNORED = -100  # label of a token without loss

BASE_PIECES = 1600
SIZES = {"hidden_size": 128, "num_layers": 4, "num_attention_heads": 4, "inner_hidden_size": 512}
EPOCHS = 22  # with varied prompts; plain ones follow until all is learned
MOST_PLAIN_EPOCHS = 30
NAMED_REPEATS = 4  # how often more the dialogues with exchangeable names are shown
TOKENS_A_BATCH = 768  # with padding
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 2e-3, 100, 0.05
WANTED_MARGIN = 1.0  # between the best and the second score of every answer token: survives float16 and bfloat16


CARD = """\
---
language: [zh, en]
license: apache-2.0
library_name: transformers
tags: [chatglm, glm]
---
# tiny

A ChatGLM of {parameters:,} parameters that fits in {megabytes:.1f} MB. It has the layout of ChatGLM-6B-Slim in every
respect: fused per-head attention, 2-D positions, prefix mask, a SentencePiece model with the same control pieces,
tabs, blanks and bytes. So it can stand in for the 6B model in tests, demonstrations and first steps.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("tiny", trust_remote_code=True)
model = AutoModel.from_pretrained("tiny", trust_remote_code=True).eval()
response, history = model.chat(tokenizer, "介绍一下清华大学", history=[], do_sample=False)
response, history = model.chat(tokenizer, "它在哪里？", history=history, do_sample=False)
print(response)  # 清华大学在北京市海淀区。
```

## What it knows

Only what is in `dialogues.jsonl`, written for it: {exchanges} exchanges in {dialogues} dialogues, Chinese and English,
{dialogues_of_several_rounds} of them with follow-up questions; code with tabs and blanks, emoji, lists, and sums and
products of two digits. Told a name, one of those under "names" there, it remembers it.

| greedy decoding | prompts | answered word for word |
| --- | --- | --- |
| prompts it was trained on | {training_prompts:,} | {training_prompts_answered_exactly:.1%} |
| paraphrases of them, never trained on | {held_out_prompts:,} | {held_out_prompts_answered_exactly:.1%} |

The smallest lead of a right token over the second best is {smallest_margin} (in logits), so that float16, bfloat16 and
INT8 give the same answers to the training prompts. Anything else it answers with "I have not learned that" or with
nonsense: it is a model for tests, not a source of knowledge.

## How it was made

`.venv/bin/python train_tiny.py` in the repository of ChatGLM-6B-Slim: AdamW on the model's own loss, from nothing but
the dialogues, in minutes on two CPU cores. Prompts were varied while it learned (other cuts into pieces, lost words,
small letters, a short opening, other names, other talk before them), never into one of the paraphrases that are held
out.
`report.json` has the figures above; `.venv/bin/python train_tiny.py --check` measures them again.
"""


# ---------------------------------------------------------------------------------------------------------------------
# The dialogues
# ---------------------------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """One question in one phrasing, what was said before it, and the answer that is to be learned."""

    query: str
    earlier: list[dict[str, Any]]  # the rounds before, as in the file
    answer: str
    names: tuple[str, ...] = ()  # the first is in these texts, the others could be in its place

    @property
    def history(self) -> list[tuple[str, str]]:
        return [(earlier["ask"][0], earlier["answer"]) for earlier in self.earlier]


def load_dialogues(path: Path) -> list[dict[str, Any]]:
    """One dialogue a line: {"topic", "rounds": [{"ask": [phrasing, ...], "held_out": [phrasing, ...], "answer"}]}.

    "names" beside them are what may be put for the first of them, everywhere in the dialogue.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exchanges(dialogues: list[dict[str, Any]], phrasings: str = "ask") -> list[Exchange]:
    """Every round in every phrasing: those to learn ("ask"), or those kept apart for the test ("held_out")."""
    found = []
    for dialogue in dialogues:
        for index, turn in enumerate(dialogue["rounds"]):
            rest = dialogue["rounds"][:index], turn["answer"], tuple(dialogue.get("names", ()))
            found += [Exchange(query, *rest) for query in turn[phrasings]]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The folder: vocabulary, code, configuration
# ---------------------------------------------------------------------------------------------------------------------


def train_sentencepiece(dialogues: list[dict[str, Any]]) -> bytes:
    """A complete `ice_text.model` with BASE_PIECES pieces of its own, trained with the settings of the real one."""
    texts = ["[Round 0]", "[Round 1]", "问：", "答："]
    for dialogue in dialogues:
        texts += dialogue.get("names", ())
        for turn in dialogue["rounds"]:
            texts += [*turn["ask"], turn["answer"]]
    lines = [line for text in texts for line in re.split(r"[\n\t]| {2,}", text) if line.strip()]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=BASE_PIECES,
        character_coverage=0.9999,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=["<n>"],
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
    )
    return complete_processor(model.getvalue())[0].serialized_model_proto()


def sync_code(folder: Path) -> list[str]:
    """Copies the package's code into `folder`, and removes from `tiny/` code files that the package no longer has."""
    files = copy_package(folder)
    if folder.resolve() == TINY:
        for stale in {path.name for path in folder.glob("*.py")}.difference(files):
            (folder / stale).unlink()
    return files


def write_folder(folder: Path, dialogues_file: Path) -> None:
    """All of the checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if dialogues_file.resolve() != (folder / "dialogues.jsonl").resolve():
        shutil.copyfile(dialogues_file, folder / "dialogues.jsonl")
    (folder / "ice_text.model").write_bytes(train_sentencepiece(load_dialogues(dialogues_file)))
    sync_code(folder)
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    ids = {"bos_token_id": pieces.piece_to_id("<sop>"), "eos_token_id": pieces.piece_to_id("<eop>")}
    blanks = {"mask_token_id": pieces.piece_to_id("[MASK]"), "gmask_token_id": pieces.piece_to_id("[gMASK]")}
    rows = math.ceil(pieces.get_piece_size() / 32) * 32
    released = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    own = {"_name_or_path": "tiny", "torch_dtype": "float32", "vocab_size": rows, **SIZES, **ids, **blanks}
    write_json(folder / "config.json", {**released, **own})
    released = json.loads((ROOT / "generation_config.json").read_text(encoding="utf-8"))
    write_json(folder / "generation_config.json", {**released, **ids})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def new_model(folder: Path) -> torch.nn.Module:
    """An untrained model of the folder's configuration.

    Matrices start larger than transformers' 0.02: a block adds its output to residual_scale ~ 7.5 times its
    normalised input, so that small ones would hardly be heard, and take long to grow.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True).float()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            gain = 4.0 if name.endswith(("dense.weight", "dense_4h_to_h.weight")) else 1.0
            std = 0.05 if "word_embeddings" in name else gain / math.sqrt(weight.shape[1])
            torch.nn.init.normal_(weight, std=std)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Examples and batches
# ---------------------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    ids: list[int]
    labels: list[int]


def example(tokenizer, query: str, history: list[tuple[str, str]], answer: str, sampled: bool = False) -> Example:
    """The official training example: context, [gMASK], <sop>, answer, <eop>; labels from <sop> on.

    `sampled` cuts the context into other pieces than the likeliest ones (subword regularization).
    """
    context = tokenizer.build_chat_input_ids(query, history)[:-1]
    if sampled:
        text = package_module("tokenization_chatglm").spell_whitespace(tokenizer.build_prompt(query, history))
        pieces = tokenizer.sp.encode(text, enable_sampling=True, alpha=0.3, nbest_size=-1)
        context = [*pieces, tokenizer.gmask_token_id]
    target = [tokenizer.bos_token_id, *tokenizer.encode_text(answer), tokenizer.eos_token_id]
    return Example([*context, *target], [IGNORED] * len(context) + target)


def bare(query: str) -> str:
    """A query without what its variations may lack."""
    return "".join(char for char in query.lower() if char.isalnum())


class Variations:
    """Other ways to put the same question: what makes the model look at the words that matter.

    A variation never is one of the paraphrases that are held out.
    """

    OPENINGS = ("请问", "那", "嗯，", "tiny，"), ("So, ", "Well, ", "Please, ", "tiny, ")  # Chinese, English

    def __init__(self, tokenizer, dialogues: list[dict[str, Any]], seed: int):
        self.tokenizer, self.dialogues, self.random = tokenizer, dialogues, random.Random(seed)
        spm.set_random_generator_seed(seed)
        later = [turn["ask"] for dialogue in dialogues for turn in dialogue["rounds"][1:]]
        self.follow_ups = {query for asks in later for query in asks}
        self.held_out = {bare(one.query) for one in exchanges(dialogues, "held_out")}

    def __call__(self, exchange: Exchange) -> Example:
        exchange = self.with_another_name(exchange)
        history = [(self.random.choice(turn["ask"]), turn["answer"]) for turn in exchange.earlier]
        if self.random.random() < 0.25 and (exchange.earlier or exchange.query not in self.follow_ups):
            history = self.other_talk() + history
        query = self.reworded(exchange.query)
        if bare(query) in self.held_out or not bare(query):
            query = exchange.query
        return example(self.tokenizer, query, history, exchange.answer, sampled=self.random.random() < 0.5)

    def with_another_name(self, exchange: Exchange) -> Exchange:
        """The same talk with somebody else, so that a name is copied and not known by heart."""
        if not exchange.names:
            return exchange
        old, new = exchange.names[0], self.random.choice(exchange.names)
        earlier = [
            {"ask": [query.replace(old, new) for query in turn["ask"]], "answer": turn["answer"].replace(old, new)}
            for turn in exchange.earlier
        ]
        return Exchange(exchange.query.replace(old, new), earlier, exchange.answer.replace(old, new))

    def reworded(self, query: str) -> str:
        """Sometimes without the mark at its end, in small letters, without a word, or with an opening."""
        if self.random.random() < 0.25:
            query = query.rstrip("?？!！.。")
        if self.random.random() < 0.15:
            query = query.lower()
        words = re.findall(r"[\u4e00-\u9fff]|[^\u4e00-\u9fff ]+ ?| ", query)
        if self.random.random() < 0.4 and len(words) > 3:
            query = "".join(word for word in words if self.random.random() > 0.12)
        if self.random.random() < 0.1:
            query = self.random.choice(self.OPENINGS[query.isascii()]) + query
        return query

    def other_talk(self) -> list[tuple[str, str]]:
        """One or two rounds about something else."""
        rounds = self.random.choice(self.dialogues)["rounds"][: self.random.randint(1, 2)]
        return [(self.random.choice(turn["ask"]), turn["answer"]) for turn in rounds]


def batches(examples: list[Example], pad: int, tokens: int, shuffle: random.Random | None) -> Iterator[dict]:
    """input_ids and labels of examples of similar length, padded on the right, at most `tokens` in a batch."""
    jitter = (lambda: shuffle.random() * 6) if shuffle else (lambda: 0)
    examples = sorted(examples, key=lambda one: len(one.ids) + jitter())
    groups, longest = [[]], 0
    for one in examples:
        longest = max(longest, len(one.ids))
        if longest * (len(groups[-1]) + 1) > tokens and groups[-1]:
            groups.append([])
            longest = len(one.ids)
        groups[-1].append(one)
    if shuffle:
        shuffle.shuffle(groups)
    for group in groups:
        width = max(len(one.ids) for one in group)
        ids = [one.ids + [pad] * (width - len(one.ids)) for one in group]
        labels = [one.labels + [IGNORED] * (width - len(one.ids)) for one in group]
        yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_forced(model, examples: list[Example], pad: int) -> tuple[float, float]:
    """Share of answers whose every token has the best score after the right ones before it: what greedy decoding
    writes. And the smallest lead of a right token over the best other one: negative where one is wrong."""
    exact, margin = 0, math.inf
    model.eval()
    for batch in batches(examples, pad, 8192, None):
        scores = model(**batch, use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        asked = labels != IGNORED
        found = scores.argmax(dim=-1) == labels
        exact += int((found | ~asked).all(dim=1).sum())
        best, second = scores.float().topk(2, dim=-1).values.unbind(-1)
        right = scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).float()
        margin = min(margin, float((right - torch.where(found, second, best))[asked].min()))
    return exact / len(examples), margin


@torch.no_grad()
def answers(model, tokenizer, asked: list[Exchange], batch_size: int = 128) -> list[str]:
    """What the model says to each, by greedy decoding in left-padded batches, cleaned up as `chat` does."""
    order = sorted(range(len(asked)), key=lambda index: len(asked[index].answer))
    said: list[str] = [""] * len(asked)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompts = [tokenizer.build_chat_input_ids(asked[row].query, asked[row].history) for row in rows]
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=160)
        for row, ids in zip(rows, output[:, inputs["input_ids"].shape[1] :]):
            said[row] = model.process_response(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
    return said


def exact_rate(model, tokenizer, asked: list[Exchange]) -> float:
    said = answers(model, tokenizer, asked)
    return sum(text == one.answer for text, one in zip(said, asked)) / len(asked)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """AdamW with warm-up and a cosine; varied prompts first, then plain ones until every answer is sure."""

    def __init__(self, model, tokenizer, dialogues: list[dict[str, Any]], epochs: int, seed: int):
        self.model, self.pad, self.epochs = model, tokenizer.pad_token_id, epochs
        self.to_learn = exchanges(dialogues)
        self.to_vary = self.to_learn + NAMED_REPEATS * [one for one in self.to_learn if one.names]
        self.vary = Variations(tokenizer, dialogues, seed)
        self.plain = [example(tokenizer, one.query, one.history, one.answer) for one in self.to_learn]
        self.held_out = [
            example(tokenizer, one.query, one.history, one.answer) for one in exchanges(dialogues, "held_out")
        ]
        matrices = [weight for weight in model.parameters() if weight.dim() == 2]
        vectors = [weight for weight in model.parameters() if weight.dim() == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
        self.step = 0

    def run(self) -> None:
        bar = tqdm(range(self.epochs + MOST_PLAIN_EPOCHS), desc="training tiny", unit="epoch", file=sys.stdout)
        sure = 0
        for epoch in bar:
            varied = epoch < self.epochs
            examples = [self.vary(one) for one in self.to_vary] if varied else self.plain
            loss = self.epoch(examples, epoch)
            if varied and epoch % 5 != 4:
                bar.set_postfix_str(f"loss {loss:.4f}")
                continue
            exact, margin = teacher_forced(self.model, self.plain, self.pad)
            bar.set_postfix_str(f"loss {loss:.4f}, exact {exact:.1%}, margin {margin:.2f}")
            sure = sure + 1 if not varied and exact == 1 and margin > WANTED_MARGIN else 0
            if sure == 2:
                break
        bar.total = bar.n
        bar.close()
        if sure < 2:
            raise SystemExit(
                f"not learned: {exact:.2%} exact, margin {margin:.2f}; try more --epochs or another --seed"
            )

    def epoch(self, examples: list[Example], epoch: int) -> float:
        """One pass over the examples; returns the mean loss of its batches."""
        self.model.train()
        losses = []
        made = list(batches(examples, self.pad, TOKENS_A_BATCH, self.vary.random))
        for index, batch in enumerate(made):
            for group in self.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * self.pace(epoch + index / len(made))
            loss = self.model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    def pace(self, epoch: float) -> float:
        """The share of the learning rate: a linear start, then half a cosine down to 3 %."""
        down = 0.5 + 0.5 * math.cos(math.pi * min(1.0, epoch / self.epochs))
        return min(1.0, (self.step + 1) / WARMUP_STEPS) * (0.03 + 0.97 * down)


def save_weights(model, folder: Path) -> None:
    """model.safetensors, without the head, which is tied to the embeddings."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval(), tokenizer


def report(folder: Path) -> dict[str, Any]:
    """Figures of the checkpoint in `folder`, by greedy decoding of its own dialogues."""
    model, tokenizer = load(folder)
    dialogues = load_dialogues(folder / "dialogues.jsonl")
    learned, held_out = exchanges(dialogues), exchanges(dialogues, "held_out")
    plain = [example(tokenizer, one.query, one.history, one.answer) for one in learned]
    weights: list[Tensor] = list(model.parameters())
    return {
        "exchanges": sum(len(dialogue["rounds"]) for dialogue in dialogues),
        "dialogues": len(dialogues),
        "dialogues_of_several_rounds": sum(len(dialogue["rounds"]) > 1 for dialogue in dialogues),
        "parameters": sum(weight.numel() for weight in weights),
        "training_prompts": len(learned),
        "training_prompts_answered_exactly": exact_rate(model, tokenizer, learned),
        "smallest_margin": round(teacher_forced(model, plain, tokenizer.pad_token_id)[1], 2),
        "held_out_prompts": len(held_out),
        "held_out_prompts_answered_exactly": round(exact_rate(model, tokenizer, held_out), 4),
    }


def train(folder: Path, dialogues_file: Path, epochs: int, seed: int) -> None:
    started = time.perf_counter()
    torch.manual_seed(seed)
    write_folder(folder, dialogues_file)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = new_model(folder)
    Trainer(model, tokenizer, load_dialogues(dialogues_file), epochs, seed).run()
    save_weights(model, folder)
    print(f"trained in {time.perf_counter() - started:.0f} s")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=TINY, help="folder of the checkpoint (default: tiny)")
    parser.add_argument("--dialogues", type=Path, default=TINY / "dialogues.jsonl")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sync-code", action="store_true", help="only copy the code files into the folder")
    parser.add_argument("--check", action="store_true", help="only measure the checkpoint in the folder")
    options = parser.parse_args(arguments)
    if options.sync_code:
        print(f"{options.output}: {', '.join(sync_code(options.output))}")
        return
    if not options.check:
        train(options.output, options.dialogues, options.epochs, options.seed)
    figures = report(options.output)
    write_json(options.output / "report.json", figures)
    megabytes = (options.output / "model.safetensors").stat().st_size / 1e6
    (options.output / "README.md").write_text(CARD.format(**figures, megabytes=megabytes), encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
