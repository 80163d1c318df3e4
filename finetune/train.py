"""Tunes a ChatGLM on a file of conversations.

    python finetune/train.py --model tiny --data finetune/sample.jsonl --method lora --out my-lora

README.md beside this file says what the methods are, and how to go on with what they save.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.collators import ExampleCollator
from finetune.curve import Curve
from finetune.data import Columns, Example, Exchange, Sizes, encode_all, read_exchanges
from finetune.memory import peak_memory
from finetune.methods import DTYPES, METHODS, fill_prefix, load_base, save_prefix, trainable
from finetune.processes import check_launch, how_many, is_split, save_whole, shard_on_cpus, sharding
from finetune.sampler import SimilarLengths
from finetune.scores import answered, own_answers, share

# Adam's steps have to shrink with the width: these are for 4,096 columns, as the official recipe has them for two.
LEARNING_RATE = {"ptuning": 2e-2, "lora": 3e-4, "full": 1e-4}
LARGEST_RATE = {"ptuning": 1e-1, "lora": 1e-2, "full": 3e-3}
REPORT, ARGUMENTS, REPLAYED, BEFORE = "report.json", "arguments.json", "replay.json", "before.json"  # in --out
MAY_CHANGE = ("resume", "log_every", "save_every")  # between a run and its resumption


class Tuner(Trainer):
    """transformers' Trainer, whose checkpoints of P-tuning hold the prefix alone, as the official ones do."""

    tunes_prefix = False

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            shard_on_cpus(self)

    def _get_train_sampler(self, train_dataset=None) -> SimilarLengths:
        lengths = [len(example.ids) for example in train_dataset or self.train_dataset]
        return SimilarLengths(lengths, self.args.train_batch_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not (self.tunes_prefix or is_split(self.model)):
            super()._save(output_dir, state_dict)
        elif self.args.should_save and is_split(self.model):
            save_whole(self.model, state_dict, output_dir)
        elif self.args.should_save:
            save_prefix(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.tunes_prefix:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return fill_prefix(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))


def arguments_of(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id of the base model")
    add("--data", required=True, type=Path, help="jsonl: prompt/response/history columns, or messages")
    add("--method", choices=METHODS, default="lora")
    add("--out", required=True, type=Path, help="new folder, or that of a run that was interrupted: it goes on")
    add("--bits", type=int, choices=(0, 4, 8), default=0, help="quantize the base first (lora and ptuning)")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=8, help="examples a step and device")
    add("--accumulate", type=int, default=1, help="batches a step")
    add("--learning-rate", type=float, help="default: by method and width, see README.md")
    add("--seed", type=int, default=0)
    add("--rank", type=int, default=8, help="of LoRA")
    add("--alpha", type=int, default=16, help="of LoRA")
    add("--dropout", type=float, default=0.0, help="of LoRA")
    add("--pre-seq-len", type=int, default=128, help="length of the P-tuning prefix")
    add("--prefix-projection", action="store_true", help="P-tuning through a two-layer network")
    add("--replay", type=int, default=0, metavar="N", help="mix N of the base model's own answers into training")
    add("--replay-prompts", type=Path, help="what it is asked for them; default: the file of --check-chat")
    add("--check-chat", type=Path, metavar="FILE", help="conversations that it should still answer as before")
    add("--prompt-column", default="prompt")
    add("--response-column", default="response")
    add("--history-column", default="history")
    add("--max-source", type=int, default=512, help="tokens of a prompt; its oldest rounds go first")
    add("--max-target", type=int, default=512, help="tokens of an answer")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be used")
    add("--dtype", choices=DTYPES, default="auto", help="of the base model; auto: as it is stored")
    add("--mixed", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--save-every", type=int, default=100, help="steps between checkpoints, from which a killed run goes on")
    add("--log-every", type=int, default=10)
    add("--fsdp", action="store_true", help="each of several processes holds a part of the model (FSDP2)")
    add("--deepspeed", type=Path, metavar="FILE", help="DeepSpeed's settings, as deepspeed.json beside this file")
    add("--device", choices=("auto", "cpu"), default="auto")
    options = parser.parse_args(words)
    for name in ("steps", "batch", "accumulate", "rank", "pre_seq_len", "save_every", "log_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: give 1 or more")
    if min(options.max_source, options.max_target) < 4:
        parser.error("--max-source and --max-target: give 4 tokens or more")
    if options.replay and not (options.replay_prompts or options.check_chat):
        parser.error("--replay needs prompts: give --replay-prompts FILE or --check-chat FILE")
    if options.method == "full" and options.bits:
        parser.error("--method full --bits: integers cannot be tuned; use --method lora or ptuning")
    if problem := check_launch(options):
        parser.error(problem)
    return options


def main(words: list[str] | None = None) -> dict:
    options = arguments_of(words)
    try:
        return tune(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def tune(options: argparse.Namespace) -> dict:
    checkpoint = judge_output(options)
    set_seed(options.seed)
    prefix = {"pre_seq_len": options.pre_seq_len, "prefix_projection": options.prefix_projection}
    base, tokenizer = load_base(options.model, options.bits, DTYPES[options.dtype])
    base.to(first_device(options))
    columns = Columns(options.prompt_column, options.response_column, options.history_column)
    exchanges = read_exchanges(options.data, tokenizer, columns, skip_bad=options.skip_bad)
    sizes = Sizes(options.max_source, options.max_target)
    examples = encode_all(exchanges, tokenizer, sizes)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / ARGUMENTS, settings_of(options))
    chat = conversations(options.check_chat, base, tokenizer, columns, sizes)
    replay = replayed(options, base, tokenizer, columns, sizes)
    report = {
        "before": once(options.out / BEFORE, lambda: scores(base, tokenizer, exchanges, examples, chat, options))
    }
    set_seed(options.seed)  # again: how much chance was used so far is not the same in all processes
    if options.method == "ptuning":
        del base
        base, _ = load_base(options.model, options.bits, DTYPES[options.dtype], **prefix)
    model = trainable(base, options.method, options.rank, options.alpha, options.dropout)
    trainer = trainer_of(model, tokenizer, mixed(examples, replay), options)
    if trainer.is_world_process_zero():
        print(f"{how_many()} processes x {options.accumulate} batches x {options.batch} examples a step")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    report["seconds"] = round(time.perf_counter() - started, 1)
    report["steps"] = options.steps - (step_of(checkpoint) if checkpoint else 0)
    report["gib"] = peak_memory()
    report["loss"] = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1:]
    if options.fsdp or trainer.is_world_process_zero():  # of whose parts all processes are needed
        report["after"] = scores(model, tokenizer, exchanges, examples, chat, options)
    finish(trainer, tokenizer, options, report)
    return report


def first_device(options: argparse.Namespace) -> torch.device:
    """Where the base model answers before the training, as the Trainer will choose for it; whole, which may be more
    than a GPU holds where FSDP is to split it."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or options.device == "cpu" or options.fsdp:
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", 0)))


def judge_output(options: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, if the folder holds an interrupted run of the same arguments.

    Raises:
        ValueError: it holds something else.
    """
    if not options.out.exists() or not any(options.out.iterdir()):
        return None
    if (options.out / REPORT).is_file():
        raise ValueError(f"--out {options.out} holds the result of a run that is done: name another folder")
    if not (options.out / ARGUMENTS).is_file():
        raise ValueError(f"--out {options.out} is not empty, and no run of this program: name another folder")
    before, now = json.loads((options.out / ARGUMENTS).read_text(encoding="utf-8")), settings_of(options)
    other = [f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
    if other:
        raise ValueError(
            f"--out {options.out} holds a run with {'; '.join(other)}: repeat those, or name another folder"
        )
    whole = [path for path in options.out.glob("checkpoint-*") if is_whole(path)]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def is_whole(checkpoint: Path) -> bool:
    """Its last file is readable: a run killed while it saved leaves a checkpoint without."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def settings_of(options: argparse.Namespace) -> dict:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in MAY_CHANGE}
    return {**settings, "processes": how_many()}


def write_json(path: Path, content) -> None:
    partial = path.with_suffix(f".{os.environ.get('RANK', 0)}.partial")  # each process may write the same
    partial.write_text(
        json.dumps(content, ensure_ascii=False, indent=None if isinstance(content, list) else 2) + "\n",
        encoding="utf-8",
    )
    partial.replace(path)


def once(path: Path, make):
    """make(), kept in a file for a run that goes on."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def conversations(path: Path | None, base, tokenizer, columns: Columns, sizes: Sizes) -> list[Example]:
    """Those of --check-chat; where the file has no answer, the base model's own."""
    if path is None:
        return []
    asked = read_exchanges(path, tokenizer, columns, need_answers=False)
    known = [one for one in asked if one.answer is not None]
    unknown = [one for one in asked if one.answer is None]
    return encode_all(known, tokenizer, sizes) + own_answers(base, tokenizer, unknown, sizes)


def replayed(options: argparse.Namespace, base, tokenizer, columns: Columns, sizes: Sizes) -> list[Example]:
    """N answers of the base model, made once: a resumed run reads them again."""
    if not options.replay:
        return []
    asked = read_exchanges(options.replay_prompts or options.check_chat, tokenizer, columns, need_answers=False)
    if len(asked) < options.replay:
        raise ValueError(f"--replay {options.replay}: the file has {len(asked)} prompts")
    asked = random.Random(options.seed).sample(asked, options.replay)
    return [Example(*row) for row in once(options.out / REPLAYED, lambda: own_answers(base, tokenizer, asked, sizes))]


def mixed(examples: list[Example], replay: list[Example]) -> list[Example]:
    """What an epoch trains on: the new ones so often that they are half of it, or few drown in a large replay."""
    return examples * max(1, round(len(replay) / len(examples))) + replay


def scores(model, tokenizer, exchanges: list[Exchange], examples: list[Example], chat: list[Example], options) -> dict:
    found = {"task": share(answered(model, tokenizer, examples))}
    if chat:
        found["chat"] = share(answered(model, tokenizer, chat))
    first = exchanges[0]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = inner.training
    limits = {"max_length": None, "max_new_tokens": min(options.max_target, 128)}
    said = inner.eval().chat(tokenizer, first.query, history=list(first.history), do_sample=False, **limits)[0]
    inner.train(was_training)
    return {**found, "prompt": first.query, "answer": said}


def learning_rate(method: str, width: int) -> float:
    return min(LEARNING_RATE[method] * 4096 / width, LARGEST_RATE[method])


def trainer_of(model, tokenizer, examples: list[Example], options: argparse.Namespace) -> Tuner:
    arguments = TrainingArguments(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate or learning_rate(options.method, model.config.hidden_size),
        lr_scheduler_type="cosine",
        warmup_steps=min(20, options.steps // 10),
        weight_decay=0.0,
        seed=options.seed,
        bf16=options.mixed == "bf16",
        fp16=options.mixed == "fp16",
        gradient_checkpointing=options.gradient_checkpointing,
        logging_steps=options.log_every,
        logging_first_step=True,
        save_steps=options.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        use_cpu=options.device == "cpu",
        report_to=[],
        deepspeed=str(options.deepspeed) if options.deepspeed else None,
        **(sharding() if options.fsdp else {}),
    )
    trainer = Tuner(model, arguments, ExampleCollator(tokenizer), examples, callbacks=[Curve(options.out)])
    trainer.tunes_prefix = options.method == "ptuning"
    return trainer


def finish(trainer: Tuner, tokenizer, options: argparse.Namespace, report: dict) -> None:
    """Saves the result, prints what changed, removes the checkpoints."""
    trainer.save_model(str(options.out))
    if not trainer.is_world_process_zero():
        return
    if options.method == "full":
        tokenizer.save_pretrained(options.out)
    result = [
        path
        for path in options.out.iterdir()
        if path.suffix in (".bin", ".safetensors") and path.stem != "training_args"
    ]
    report["megabytes"] = round(sum(path.stat().st_size for path in result) / 1e6, 2)
    before, after = report["before"], report["after"]
    print(f"\n{before['prompt']}\n  before: {before['answer']}\n  after:  {after['answer']}\n")
    print(f"new task, answered word for word: {before['task']:.1%} before, {after['task']:.1%} after")
    if "chat" in after:
        print(f"old chat, answered word for word: {before['chat']:.1%} before, {after['chat']:.1%} after")
    rate, peak = report["steps"] / report["seconds"], report["gib"]
    print(
        f"{report['steps']} steps in {report['seconds']} s, {rate:.1f} a second" + f"; {peak} GiB at most" * bool(peak)
    )
    print(f"{report['megabytes']} MB in {options.out}")
    for path in options.out.glob("checkpoint-*"):
        shutil.rmtree(path)
    write_json(options.out / REPORT, report)


if __name__ == "__main__":
    main()
