"""Any ChatGLM-6B checkpoint -> ChatGLM-6B-Slim: `python slim.py SOURCE OUTPUT`.

The first releases keep 20,000 image-token rows in front of the text rows of embedding and head. No text uses them, so
they go and every id moves by -20,000; all other numbers stay bit for bit. Tensors are streamed from byte range to byte
range, so memory stays small whatever the size. On request the same pass converts (`--dtype`), quantizes (`--bits`) or
trims the vocabulary further (`--corpus`, `--keep-languages`).

Order of a run: read and judge the source, plan every output tensor, judge the disk, write shards into
`OUTPUT-slim-partial` (a killed run resumes there), add the other files, check, rename to OUTPUT, push.
The parts are in `slimming/`; `slim()` is the same run for a program.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slimming import checkpoint_io as io
from slimming.checkpoint_io import EXIT_MEANINGS, Exit, Refusal, first_line
from slimming.folder import id_table, write_folder
from slimming.output import (
    clear,
    judge_output,
    judge_partial,
    locked,
    move_into_place,
    named_output,
    output_of,
    partial_of,
    restore_interrupted,
)
from slimming.plan import VOCAB_FILE, Job, Options, Plan, judge_chunk, make_plan, read_source

HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "MODEL_LICENSE"]
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SMALL_FILES = 16 * 10**6  # room for everything but the shards
ROWS_BYTES = 1 << 23  # of a matrix, quantized at a time
MAX_LINE = 2000  # characters of an error
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def slim(source: str, output: str | Path, options: Options | None = None, revision: str | None = None) -> Plan:
    """Makes OUTPUT from SOURCE, a local folder or a Hub id; returns the plan that was carried out.

    Raises:
        Refusal: with the exit code and the line that the command would end with. Nothing is written then, but for
            `WRITE_FAILED`, after which the same call goes on where it stopped.

    Example:
        >>> from slim import Options, slim
        >>> slim("chatglm-6b", "chatglm-6b-slim", Options(check=True)).vocabulary.rows  # doctest: +SKIP
        130528
    """
    options, output = options or Options(), named_output(output)
    folder, partial = open_source(source, revision), partial_of(output)
    if not options.dry_run:
        restore_interrupted(output)
    judge_output(folder, output, options.overwrite)
    plan = make_plan(read_source(folder, source, options), options)
    print(describe(plan))
    if options.dry_run:
        return plan
    judge_partial(partial)
    judge_disk(plan, partial)
    with locked(partial):
        judge_output(folder, output, options.overwrite)  # another run may have made it while the source was read
        write_partial(plan, partial, options)
        if options.check:
            from slimming.check import check

            if not check(folder, partial, options):
                raise Refusal(Exit.CHECK_FAILED, f"the check failed: {partial} is left for a look, {output} not made")
        move_into_place(partial, folder, output, options.overwrite)
    print(f"{output} is complete: {plan.nbytes:,} bytes of weights in {len(plan.shards)} file(s)")
    return plan


# ---------------------------------------------------------------------------------------------- before the writing


def open_source(source: str, revision: str | None = None) -> Path:
    """The local folder of SOURCE, downloaded first if it is a Hub id."""
    if not source.isprintable():
        raise Refusal(Exit.NOT_A_CHECKPOINT, f"{source!r} has characters that no name needs: rename the folder")
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(source) or os.path.lexists(source):
        raise Refusal(Exit.NOT_A_CHECKPOINT, f"{source} is neither a folder nor a Hub id: give one of the two")
    import huggingface_hub as hub

    try:
        names = hub.HfApi().list_repo_files(source, revision=revision)
        loaded = io.loaded_file(names) or ""  # "" for shards without an index
        others = [["*.safetensors"], ["*.bin", "*.bin.index.json"]][".safetensors" in loaded] if loaded else None
        path = hub.snapshot_download(source, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=others)
    except Exception as error:  # the client's errors differ between its versions: told apart by what is behind them
        raise hub_refusal(f"{source} can't be downloaded", error, "check the id, or log in") from None
    return Path(path)


def hub_refusal(what: str, error: Exception, cure: str) -> Refusal:
    """What went wrong with the Hub: the disk, the id and the rights to it (`cure`), or something on the way."""
    chain: list[BaseException] = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) is not None and behind not in chain:
        chain.append(behind)
    for one in chain:
        reason, number = f"{what} ({first_line(one)})", getattr(one, "errno", None)
        if number in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            return Refusal(Exit.TOO_LITTLE_DISK, f"{reason}: make room, or set HF_HOME to a folder on another disk")
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return Refusal(Exit.HUB, f"{reason}: set HF_HOME to a folder that you can write to")
    answers = [getattr(getattr(one, "response", None), "status_code", None) for one in chain]
    if not any(400 <= (answer or 0) < 500 for answer in answers):
        cure = "see whether the Hub can be reached, then run the command again"
    return Refusal(Exit.HUB, f"{what} ({first_line(error)}): {cure}")


def judge_disk(plan: Plan, partial: Path) -> None:
    """Shards and small files must fit into the free space; what an unfinished run left there counts as free."""
    place = next(path for path in (partial, *partial.parents) if path.is_dir())
    left = sum(path.lstat().st_size for path in partial.iterdir()) if partial.is_dir() else 0
    needed, free = plan.nbytes + SMALL_FILES - left, shutil.disk_usage(place).free
    if needed > free:
        message = f"{needed:,} bytes needed in {place}, {free:,} free: make room, or give OUTPUT on another disk"
        raise Refusal(Exit.TOO_LITTLE_DISK, message)


def describe(plan: Plan) -> str:
    """What the run changes: kind, rows, bytes, head, ids."""
    source, vocabulary = plan.source, plan.vocabulary
    kinds = {"model": "model", "prefix": "P-tuning v2 prefix", "adapter": "LoRA adapter"}
    before, after = source.checkpoint.nbytes, plan.nbytes
    cut = vocabulary.source_rows - vocabulary.rows
    files = len(source.checkpoint.files)
    images = min(vocabulary.offset, cut)
    rows = f"{vocabulary.source_rows:,} -> {vocabulary.rows:,} ({cut:,} cut, {images:,} of them image tokens)"
    lines = [
        f"{source.name}: {kinds[source.kind]}, {len(source.tensors)} tensors in {files} file(s)",
        f"vocabulary rows: {rows if any(job.axis is not None for job in plan.jobs) else 'in no tensor of these'}",
        f"bytes of tensors: {before:,} -> {after:,} (saved: {before - after:,}, {(before - after) / before:.1%})",
        *plan.notes,
        *([f"trimmed: {vocabulary.figures}"] if vocabulary.figures else []),
        *(f"  {what:<24}{old:>8} -> {new}" for what, old, new in id_table(plan)),
    ]
    return "\n".join(map(io.printable, lines))


# ----------------------------------------------------------------------------------------------------- the writing


def write_partial(plan: Plan, partial: Path, options: Options) -> None:
    """Fills the temporary folder; what an interrupted run of the same plan finished stays."""
    try:
        journal = io.Journal(partial, plan.fingerprint())
        clear(partial, {io.Journal.NAME, *journal.shards})
        write_shards(plan, partial, journal, options)
        plan.source.checkpoint.judge_unchanged()
        write_folder(partial, plan, options, options.push or output_of(partial).name)
    except Refusal:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        message = f"stopped ({first_line(error)}): run the same command again, finished shards are kept in {partial}"
        raise Refusal(Exit.WRITE_FAILED, message) from None


def write_shards(plan: Plan, partial: Path, journal: io.Journal, options: Options) -> None:
    """Streams every shard that the journal doesn't know."""
    total = sum(job.read_bytes for job in plan.jobs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="slimming", disable=None) as bar, io.Reader() as reader:
        for name, jobs in plan.shards.items():
            if journal.is_finished(name):
                bar.update(sum(job.read_bytes for job in jobs))
                continue
            tensors = [output for job in jobs for output in job.outputs]
            journal.record(name, io.write_shard(partial / name, tensors, stream(reader, jobs, options, bar)))


def stream(reader: io.Reader, jobs: Sequence[Job], options: Options, bar: Any) -> Iterator[tuple[str, Any]]:
    """(tensor name, bytes) of every output tensor of a shard, in chunks."""
    for job in jobs:
        unit = io.ITEM_SIZES[job.source.dtype]
        if job.bits:  # whole rows, and enough of them to be worth a call
            row = unit * job.shape[1]
            unit = row * max(ROWS_BYTES // row, 1)
        position = 0
        for chunk in reader.chunks(job.source, job.ranges(), unit):
            judge_chunk(chunk, job, position, options)
            position += len(chunk)
            yield from transformed(job, chunk, options)
            bar.update(len(chunk))


def transformed(job: Job, chunk: memoryview, options: Options) -> Iterator[tuple[str, Any]]:
    """A chunk as it is, converted, or (whole rows) quantized to weight and scale."""
    name = job.source.name
    if not job.bits and job.dtype == job.source.dtype:
        yield name, chunk
        return
    import torch

    numbers = io.as_tensor(chunk, job.source.dtype)
    converted = numbers.to(getattr(torch, io.TORCH_NAMES[job.dtype]))
    if not options.allow_nonfinite and not converted.isfinite().all():
        largest = numbers.abs().max().item()
        message = f"{name} reaches {largest:g}, too large for {io.TORCH_NAMES[job.dtype]}: use --dtype bfloat16"
        raise Refusal(Exit.NONFINITE, message)
    if not job.bits:
        yield name, io.tensor_bytes(converted)
        return
    weight, scale = quantized(converted.view(-1, job.shape[1]), job)
    yield name, io.tensor_bytes(weight)
    yield f"{name}_scale", io.tensor_bytes(scale)


def quantized(rows: Any, job: Job) -> tuple[Any, Any]:
    """Whole rows as the package's own quantization stores them, the scale in the model's dtype."""
    from package import package_module

    weight, scale = package_module("quantization").quantize_weight(rows, job.bits, job.group_size)
    return weight, scale.to(rows.dtype)


# -------------------------------------------------------------------------------------------------- to the Hub


def push(output: Path, repo_id: str, public: bool) -> None:
    """Uploads OUTPUT to the Hub; a repository made for it is private unless asked otherwise."""
    import huggingface_hub as hub

    try:
        api = hub.HfApi()
        api.create_repo(repo_id, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=output, commit_message="ChatGLM-6B-Slim")
    except Exception as error:  # the client's errors differ between its versions; the same cure for all
        message = f"{output} is complete but not on the Hub ({first_line(error)})"
        raise Refusal(Exit.HUB, f"{message}: `hf upload {repo_id} {output}` does that") from None
    print(f"pushed to {hub.constants.ENDPOINT}/{repo_id}")


# ---------------------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    values = vars(parser().parse_args(arguments))
    source, output, revision = values.pop("source"), values.pop("output"), values.pop("revision")
    check_only, options = values.pop("check_only"), Options(**values)
    for console in (sys.stdout, sys.stderr):
        if hasattr(console, "reconfigure"):
            console.reconfigure(errors="replace")  # one that lacks a character shows "?" instead
    try:
        if check_only:
            return check_folder(source, output, options, revision)
        slim(source, output, options, revision)
        if options.push and not options.dry_run:
            push(output, options.push, options.public)
    except Refusal as refusal:
        print(f"slim.py: {io.printable(str(refusal))[:MAX_LINE]}", file=sys.stderr)
        return int(refusal.code)
    except OSError as error:
        print(f"slim.py: {io.printable(first_line(error))}: run the same command again, or elsewhere", file=sys.stderr)
        return int(Exit.WRITE_FAILED)
    except KeyboardInterrupt:
        print("slim.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return int(Exit.OK)


def check_folder(source: str, output: str, options: Options, revision: str | None) -> int:
    """`--check-only`: compares an OUTPUT made before."""
    from slimming.check import check

    folder, output = open_source(source, revision), named_output(output)
    read_source(folder, source, options)  # what would not be slimmed is refused here too
    return int(Exit.OK if check(folder, output, options) else Exit.CHECK_FAILED)


def parser() -> argparse.ArgumentParser:
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_MEANINGS.items())
    result = argparse.ArgumentParser(
        prog="slim.py",
        description="Turn any ChatGLM-6B checkpoint into ChatGLM-6B-Slim.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("source", metavar="SOURCE", help="local folder or Hub id: model, P-tuning v2 prefix or LoRA adapter")
    add("output", metavar="OUTPUT", help="folder to make")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="convert, LayerNorms too (default: keep)")
    add("--max-shard-size", type=parse_size, default=Options.max_shard_size, metavar="SIZE", help="default 2GB")
    add("--check", action="store_true", help="compare every kept row and tensor, and logits, before OUTPUT appears")
    add("--check-only", action="store_true", help="compare an OUTPUT made before (with the same options)")
    add("--dry-run", action="store_true", help="print what would change, write nothing")
    add("--overwrite", action="store_true", help="replace an existing OUTPUT, once the new one is complete")
    add("--repackage", action="store_true", help="go on with a checkpoint that is slim already")
    add("--allow-nonfinite", action="store_true", help="go on with NaN or Inf in the weights")
    add("--tokenizer", type=Path, metavar="FILE", help=f"{VOCAB_FILE}, if SOURCE has none")
    add("--fast-tokenizer", action="store_true", help="tokenizer.json as well, for programs in Rust and JavaScript")
    add("--base", metavar="NAME", help="the slim base model that an adapter's config shall name")
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--push", type=parse_repository, metavar="REPO_ID", help="upload OUTPUT to the Hub (new: private)")
    add("--public", action="store_true", help="make the pushed repository public")
    quantize = result.add_argument_group("quantization, straight from the shards").add_argument
    quantize("--bits", type=int, choices=(0, 4, 8), default=0, help="layers to int4 or int8 (official format)")
    quantize("--group-size", type=int, choices=(0, 32, 64, 128), default=0, help="columns a scale (default: a row)")
    quantize("--quantize-head", action="store_true", help="embedding and head to int8 as well (needs --bits)")
    trim = result.add_argument_group("trimming further").add_argument
    trim("--corpus", type=Path, metavar="FILE", help="keep the pieces that this UTF-8 text uses")
    trim("--min-count", type=parse_count, default=1, metavar="N", help="... at least N times (default 1)")
    trim(
        "--keep-languages", type=parse_languages, default=(), metavar="zh,en", help="keep the pieces in their scripts"
    )
    return result


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 2GB, 500MB or 1GiB")
    return int(float(match[1]) * UNITS[match[2]])


def parse_count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no count: write 1 or more")
    return int(text)


def parse_repository(text: str) -> str:
    if not HUB_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no repository: write NAME/REPOSITORY")
    return text


def parse_languages(text: str) -> tuple[str, ...]:
    return tuple(language.strip().lower() for language in text.split(",") if language.strip())


if __name__ == "__main__":
    sys.exit(main())
