"""Measures models on a file of conversations, and on tasks of lm-evaluation-harness: one line of a table for each.

    python finetune/evaluate.py --model tiny --bits 0 8 4 --data finetune/sample.jsonl
    python finetune/evaluate.py --model original slim --bits 0 4 --data my.jsonl --tasks cmmlu --limit 100
    python finetune/evaluate.py --model chatglm-6b-slim --tuned my-lora --data my.jsonl

docs/evaluation.md says what the columns are.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.collators import ExampleCollator
from finetune.data import IGNORED, Example, Sizes, encode_all, read_exchanges
from finetune.methods import DTYPES, load_base, load_tuned
from finetune.scores import TOKENS_A_BATCH, by_length, own_answers, share
from package import package_module

NEEDS = "pip install -r finetune/requirements-evaluate.txt"


def arguments_of(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, nargs="+", help="folders or Hub ids")
    add(
        "--bits",
        type=int,
        nargs="+",
        choices=(0, 4, 8),
        default=[0],
        help="formats to measure each model in; 0: its own",
    )
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["auto"],
        help="of the weights that are no integers; auto: as stored",
    )
    add("--tuned", type=Path, help="what train.py saved: measured on each model")
    add("--data", type=Path, help="jsonl, as train.py reads it")
    add("--tasks", nargs="*", default=[], help="of lm-evaluation-harness")
    add("--include-path", help="folder with tasks of your own (finetune/tasks has three for tiny)")
    add("--limit", type=int, help="so many rows of the file, and of each task")
    add("--batch", type=int, default=8, help="requests of a task that are computed together")
    add("--max-source", type=int, default=512, help="tokens of a prompt; its oldest rounds go first")
    add("--max-target", type=int, default=512, help="tokens of an answer")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(words)
    if not options.data and not options.tasks:
        parser.error("give --data FILE, --tasks NAME, or both")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit}: give 1 or more")
    return options


def main(words: list[str] | None = None) -> list[dict]:
    options = arguments_of(words)
    try:
        formats = [(bits, dtype) for bits in options.bits for dtype in options.dtype]
        rows = [measured(path, *format, options) for path in options.model for format in formats]
    except ImportError as error:
        raise SystemExit(f"error: {error.name} is missing: {NEEDS}") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return rows


def measured(path: str, bits: int, dtype: str, options: argparse.Namespace) -> dict:
    """One line of the table."""
    wanted = (bits, DTYPES[dtype])
    model, tokenizer = load_tuned(path, options.tuned, *wanted) if options.tuned else load_base(path, *wanted)
    model = model.to(options.device).eval()
    row = {"model": path, "weights": format_of(model)}
    if options.data:
        row |= on_conversations(model, tokenizer, options)
    if options.tasks:
        row |= on_tasks(model, tokenizer, options)
    del model
    gc.collect()
    return row


def format_of(model: nn.Module) -> str:
    """As "bfloat16", or "INT4, float32" where the rest of the numbers is float32."""
    held, rest = model.config.quantization_bit, str(model.dtype).removeprefix("torch.")
    return f"INT{held}, {rest}" if held else rest


# ---- A file of conversations ----------------------------------------------------------------------------------------


def on_conversations(model: nn.Module, tokenizer, options: argparse.Namespace) -> dict:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    sizes = Sizes(options.max_source, options.max_target)
    exchanges = read_exchanges(options.data, tokenizer)[: options.limit]
    examples = encode_all(exchanges, tokenizer, sizes)
    wanted = [shown(example, tokenizer) for example in examples]
    given = [shown(example, tokenizer) for example in own_answers(model, tokenizer, exchanges, sizes)]
    rouge = RougeScorer(["rougeL"], tokenizer=Words())
    scores = [rouge.score(want, give)["rougeL"].fmeasure for want, give in zip(wanted, given)]
    return {
        "exact match": share([want == give for want, give in zip(wanted, given)]),
        "BLEU-4": sacrebleu.corpus_bleu(given, [wanted], tokenize="zh").score / 100,  # of all answers together
        "ROUGE-L": sum(scores) / len(scores),
        "perplexity": perplexity(model, tokenizer, examples),
    }


class Words:
    """What ROUGE-L counts: single Chinese characters, and words and marks of other languages, as BLEU's "zh" does."""

    def tokenize(self, text: str) -> list[str]:
        from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

        return TokenizerZh()(text.lower()).split()


def shown(example: Example, tokenizer) -> str:
    """The answer as chat shows it. The wanted ones take the same way through the tokenizer: what it cannot spell
    cannot be answered."""
    answer = [token for token, label in zip(example.ids, example.labels) if label != IGNORED]
    return package_module("chat").process_response(tokenizer.decode(answer))


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer, examples: list[Example]) -> float:
    """exp of the mean cross entropy of the answers' tokens, <eop> included, after the right ones before them."""
    collate, total, count = ExampleCollator(tokenizer), 0.0, 0
    for batch in by_length(examples, lambda example: len(example.ids), TOKENS_A_BATCH):
        inputs = {name: rows.to(model.device) for name, rows in collate([examples[index] for index in batch]).items()}
        labels = inputs.pop("labels")[:, 1:]
        labels = labels.masked_fill(labels == tokenizer.bos_token_id, IGNORED)  # <sop> is given, not answered
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return math.exp(total / count)


# ---- Tasks ----------------------------------------------------------------------------------------------------------


def on_tasks(model: nn.Module, tokenizer, options: argparse.Namespace) -> dict:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from finetune.harness import ChatGLM

    harness = ChatGLM(model, tokenizer=tokenizer, batch_size=options.batch)
    manager = TaskManager(include_path=options.include_path, include_defaults=False)
    if not all(manager.match_tasks([task]) for task in options.tasks):
        manager = TaskManager(include_path=options.include_path)  # thousands of files
    unknown = [task for task in options.tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"--tasks {' '.join(unknown)}: lm-evaluation-harness knows none; --include-path has your own")
    asked = {"tasks": options.tasks, "task_manager": manager, "limit": options.limit, "bootstrap_iters": 0}
    found = lm_eval.simple_evaluate(harness, **asked)
    figures = {}
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            metric = name.removesuffix(",none")
            if isinstance(value, (int, float)) and "_stderr" not in metric and metric != "sample_len":
                figures[f"{task} {metric}"] = float(value)
    return figures


# ---- The table ------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---" if name in ("model", "weights") else "---:" for name in names]]
    lines += [[cell(name, row.get(name, "")) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(name: str, value) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if "perplexity" in name or not 0 <= value <= 1 else f"{value:.1%}"


if __name__ == "__main__":
    main()
