"""From a checkpoint folder to the list of what each of its tensors becomes; nothing is written here.

`read_source` reads and judges config, tokenizer and tensor tables, `make_plan` judges the row counts against tokenizer
and config (20,000 image rows + pieces + padding), compares head and embedding, and lays the output out in shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from package import package_module
from sentencepiece_file import VOCAB_FILE, read_complete
from slimming import checkpoint_io as io
from slimming import settings
from slimming.checkpoint_io import Checkpoint, Exit, Refusal, StoredTensor, first_line

IMAGE_ROWS = 20_000  # IMAGE_TOKENS of configuration_chatglm.py, which imports transformers; a test compares the two
EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
PREFIX = "transformer.prefix_encoder."
VOCABULARY_MODULES = ("word_embeddings", "lm_head")
OWN_NAMES = re.compile(r"transformer\.(layers|word_embeddings|prefix_encoder|final_layernorm)\.|lm_head\.")
MATRICES = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
IDS = {"bos_token_id": "<sop>", "eos_token_id": "<eop>", "mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]"}
OTHER_MODELS = {65024: "ChatGLM2-6B or ChatGLM3-6B", 151552: "GLM-4-9B"}  # by rows
PUBLISHED_ROWS = (150528, 130528)  # full and slim, for adapters that come without tokenizer
PUBLISHED_SHA256 = "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e"  # of the final ice_text.model
MAX_LICENSE_BYTES = 1_000_000
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Options:
    """What the command line can ask for; see `parser` for the meaning of each."""

    dtype: str | None = None
    max_shard_size: int = 2 * 10**9
    bits: int = 0
    group_size: int = 0
    quantize_head: bool = False
    corpus: Path | None = None
    keep_languages: tuple[str, ...] = ()
    min_count: int = 1
    tokenizer: Path | None = None
    fast_tokenizer: bool = False
    base: str | None = None
    repackage: bool = False
    overwrite: bool = False
    allow_nonfinite: bool = False
    check: bool = False
    dry_run: bool = False
    push: str | None = None
    public: bool = False

    @property
    def changes_slim(self) -> bool:
        """Whether there is something to do for a checkpoint that is slim already."""
        changed = self.dtype or self.bits or self.trims or self.quantize_head or self.fast_tokenizer
        return bool(self.repackage or changed)

    @property
    def trims(self) -> bool:
        return self.corpus is not None or bool(self.keep_languages)


# ----------------------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class Source:
    """A checkpoint with its config (an adapter's own for an adapter) and, where there is one, completed tokenizer.

    Of every settings file only the fields that `settings` lets through.
    """

    name: str  # as the user gave it
    kind: str  # "model", "prefix" (P-tuning v2 alone) or "adapter" (LoRA)
    checkpoint: Checkpoint
    config: dict[str, Any]
    sentencepiece: bytes | None
    pieces: dict[str, int] | None  # text -> number
    generation: dict[str, Any] | None  # None: no generation_config.json
    text_choices: dict[str, Any]  # of tokenizer_config.json
    license: bytes | None  # MODEL_LICENSE
    notes: tuple[str, ...]  # what was left out

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return self.checkpoint.tensors

    @property
    def head_bits(self) -> int:
        """Bits of a quantized embedding, as it is stored; 0 for floats."""
        stored, hidden = self.tensors.get(EMBEDDING), self.config.get("hidden_size", 4096)
        if stored is None or stored.dtype != "I8" or len(stored.shape) != 2:
            return 0
        return 4 if stored.shape[1] * 2 == hidden else 8


def read_source(folder: Path, name: str, options: Options) -> Source:
    """Reads and judges everything about a checkpoint that needs no tensor's numbers."""
    try:
        return judged_source(folder, name, options)
    except OSError as error:
        raise Refusal(Exit.BROKEN_SHARD, f"{folder} can't be read ({first_line(error)})") from None


def judged_source(folder: Path, name: str, options: Options) -> Source:
    adapter = io.weight_files(folder)[0][0].startswith("adapter_model")
    raw = io.read_json(folder, "adapter_config.json" if adapter else "config.json")
    judge_family(adapter, raw)
    config, notes = (settings.adapter_fields if adapter else settings.model_fields)(folder, raw)
    generation, more = (None, ()) if adapter else settings.generation_fields(folder)
    checkpoint = io.read_checkpoint(folder)
    prefix = all(tensor.startswith(PREFIX) for tensor in checkpoint.tensors)
    sentencepiece, pieces = read_sentencepiece(folder, options)
    choices, most = settings.tokenizer_fields(folder)
    kind = "adapter" if adapter else "prefix" if prefix else "model"
    notes = (*checkpoint.notes, *notes, *more, *most)
    words = read_license(folder)
    source = Source(name, kind, checkpoint, config, sentencepiece, pieces, generation, choices, words, notes)
    if kind == "model":
        judge_model(source)
    if kind == "prefix":
        judge_prefix(source)
    if kind == "adapter" and not any(OWN_NAMES.search(tensor) for tensor in checkpoint.tensors):
        message = f"{folder} adapts {next(iter(checkpoint.tensors))}, which ChatGLM-6B doesn't have: another model's?"
        raise Refusal(Exit.UNSUPPORTED, message)
    judge_quantization(source, options)
    return source


def read_license(folder: Path) -> bytes | None:
    """The licence that the weights came with."""
    path = folder / "MODEL_LICENSE"
    if not path.exists() and not path.is_symlink():
        return None
    if io.checked_file(folder, path.name).stat().st_size > MAX_LICENSE_BYTES:
        message = f"{path} has {path.stat().st_size:,} bytes, limit {MAX_LICENSE_BYTES:,}: that is no licence"
        raise Refusal(Exit.NOT_A_CHECKPOINT, message)
    return path.read_bytes()


def judge_family(adapter: bool, config: dict[str, Any]) -> None:
    rows = config.get("padded_vocab_size")
    if rows:
        other = OTHER_MODELS.get(rows, "a later GLM") if type(rows) is int else "a later GLM"
        message = f"a vocabulary of {repr(rows)[:80]} rows is {other}, only ChatGLM-6B can be slimmed"
        raise Refusal(Exit.WRONG_ROWS, message)
    if not adapter and config.get("model_type", "chatglm") != "chatglm":
        message = f"model_type is {repr(config['model_type'])[:80]}: only 'chatglm' can be slimmed"
        raise Refusal(Exit.UNSUPPORTED, message)


def read_sentencepiece(folder: Path, options: Options) -> tuple[bytes | None, dict[str, int] | None]:
    """The folder's (or `--tokenizer`'s) SentencePiece model, completed to its final form, and its pieces by text."""
    path = options.tokenizer.resolve() if options.tokenizer else folder / VOCAB_FILE
    if options.tokenizer is None and not path.exists() and not path.is_symlink():
        return None, None
    path = io.checked_file(path.parent, path.name)
    try:
        processor, complete = read_complete(path)
        pieces = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
    except ValueError as error:
        raise Refusal(Exit.WRONG_TOKENIZER, str(error)) from None
    model = path.read_bytes() if complete else processor.serialized_model_proto()
    missing = [piece for piece in (*IDS.values(), "<pad>", "</s>") if piece not in pieces]
    if missing:
        raise Refusal(Exit.WRONG_TOKENIZER, f"{path} has no piece {missing[0]}: give the file of the weights")
    return model, pieces


def judge_model(source: Source) -> None:
    """Every tensor that the config asks for is there, in its shape; embedding and head agree on their rows."""
    if EMBEDDING not in source.tensors or not source.tensors[EMBEDDING].shape:
        judge_foreign(source)
    rows = source.tensors[EMBEDDING].shape[0]
    config_rows = source.config.get("vocab_size", rows)
    if rows in OTHER_MODELS or rows != config_rows:
        other = f", which is {OTHER_MODELS[rows]}" if rows in OTHER_MODELS else ""
        message = f"{EMBEDDING} has {rows} rows{other}; config.json says vocab_size {config_rows}: they must agree"
        raise Refusal(Exit.WRONG_ROWS, message)
    judge_head(source)
    for name, shape in expected_shapes(source.config, rows, len(source.tensors), source.head_bits).items():
        if name not in source.tensors:
            raise Refusal(Exit.WRONG_TENSORS, f"missing tensor {name} {list(shape)}: download the checkpoint again")
        judge_shape(source, name, shape)
    if HEAD not in source.tensors and source.config.get("tie_word_embeddings") is False:
        raise Refusal(Exit.WRONG_TENSORS, f"missing tensor {HEAD}: config.json says tie_word_embeddings false")
    if HEAD in source.tensors:
        judge_shape(source, HEAD, source.tensors[EMBEDDING].shape)


def judge_shape(source: Source, name: str, shape: tuple[int, ...]) -> None:
    found = source.tensors[name].shape
    if found != shape:
        message = f"{name} has shape {list(found)}, config.json makes it {list(shape)}: wrong checkpoint?"
        raise Refusal(Exit.WRONG_TENSORS, message)


def judge_head(source: Source) -> None:
    """Rows of head and embedding; a quantized embedding has its scales and is stored as config.json says."""
    rows, head = source.tensors[EMBEDDING].shape[0], source.tensors.get(HEAD)
    if head is not None and head.shape[:1] != (rows,):
        message = f"{HEAD} has {head.shape[0] if head.shape else 'no'} rows, {EMBEDDING} {rows}: they must agree"
        raise Refusal(Exit.WRONG_ROWS, message)
    bits = source.head_bits
    says = settings.settings_of(source.folder, source.config).head_bits
    if bits and f"{EMBEDDING}_scale" not in source.tensors:
        raise Refusal(Exit.WRONG_TENSORS, f"missing tensor {EMBEDDING}_scale: {EMBEDDING} is int{bits}")
    if bits and not source.config.get("quantization_bit"):
        message = f"{EMBEDDING} is int{bits}, and config.json has no quantization_bit: wrong checkpoint?"
        raise Refusal(Exit.WRONG_TENSORS, message)
    if says and says != bits:
        stored = f"int{bits}" if bits else source.tensors[EMBEDDING].dtype
        message = f"{EMBEDDING} is {stored} {list(source.tensors[EMBEDDING].shape)}, config.json says int{says}"
        raise Refusal(Exit.WRONG_TENSORS, f"{message}: wrong checkpoint?")


def judge_prefix(source: Source) -> None:
    """A P-tuning prefix alone: config.json says how long it is and of which vocabulary its base."""
    for name in ("pre_seq_len", "vocab_size"):
        if not source.config.get(name):
            message = f"{source.folder / 'config.json'} has no {name}: give the one that the prefix was saved with"
            raise Refusal(Exit.BAD_SETTINGS, message)
    for name, shape in prefix_shapes(settings.settings_of(source.folder, source.config)).items():
        if name not in source.tensors:
            raise Refusal(Exit.WRONG_TENSORS, f"missing tensor {name} {list(shape)}: download the checkpoint again")
        judge_shape(source, name, shape)


def judge_quantization(source: Source, options: Options) -> None:
    """`--bits` and its companions apply to whole models that aren't quantized otherwise already."""
    asked = (options.bits, options.group_size)
    present = tuple(int(source.config.get(name) or 0) for name in ("quantization_bit", "quantization_group_size"))
    if (options.group_size or options.quantize_head) and not (options.bits or present[0]):
        raise Refusal(Exit.UNSUPPORTED, "--group-size and --quantize-head go with --bits 4 or --bits 8: add that")
    if source.kind != "model" and (options.bits or options.quantize_head):
        message = f"{source.folder} is a {source.kind} without the model's matrices: --bits needs those"
        raise Refusal(Exit.UNSUPPORTED, message)
    if options.bits and present[0] and asked != present:
        message = f"{source.folder} is quantized already (bits {present[0]}, group size {present[1]})"
        raise Refusal(Exit.UNSUPPORTED, f"{message}: give the 16-bit checkpoint for --bits {asked[0]}")


def judge_foreign(source: Source) -> None:
    for name, tensor in source.tensors.items():
        other = OTHER_MODELS.get(tensor.shape[0] if tensor.shape else 0)
        if other:
            message = f"{name} has {tensor.shape[0]} rows, which is {other}: only ChatGLM-6B can be slimmed"
            raise Refusal(Exit.WRONG_ROWS, message)
    raise Refusal(Exit.WRONG_TENSORS, f"missing tensor {EMBEDDING}: {source.folder} holds no whole ChatGLM-6B")


def expected_shapes(config: dict[str, Any], rows: int, tensors: int, head_bits: int = 0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ChatGLM-6B state dict, without the head (which may be tied) and the ignored inv_freq; for
    a checkpoint of `tensors` tensors.
    """
    fields = settings.settings_of(Path(), config)
    layers, hidden, inner = fields.num_layers, fields.hidden_size, fields.inner_hidden_size
    bits, group = fields.quantization_bit, fields.quantization_group_size
    if layers > tensors:  # known before millions of names are made
        message = f"config.json says num_layers {layers}, the files hold {tensors} tensors in all: wrong config?"
        raise Refusal(Exit.WRONG_TENSORS, message)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, hidden * head_bits // 8 if head_bits else hidden)}
    matrices = ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner))
    norms = [
        f"transformer.layers.{i}.{which}_layernorm" for i in range(layers) for which in ("input", "post_attention")
    ]
    for norm in (*norms, "transformer.final_layernorm"):
        shapes.update({f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)})
    for layer in range(layers):
        for matrix, (outputs, inputs) in zip(MATRICES, matrices):
            name = f"transformer.layers.{layer}.{matrix}"
            shapes[f"{name}.bias"] = (outputs,)
            shapes[f"{name}.weight"] = (outputs, inputs * bits // 8 if bits else inputs)
            if bits:
                shapes[f"{name}.weight_scale"] = (outputs, inputs // group) if group else (outputs,)
    return {**shapes, **prefix_shapes(fields)}


def prefix_shapes(fields: Any) -> dict[str, tuple[int, ...]]:
    length, hidden, width = fields.pre_seq_len, fields.hidden_size, 2 * fields.num_layers * fields.hidden_size
    if not length:
        return {}
    if not fields.prefix_projection:
        return {f"{PREFIX}embedding.weight": (length, width)}
    return {
        f"{PREFIX}embedding.weight": (length, hidden),
        f"{PREFIX}trans.0.weight": (hidden, hidden),
        f"{PREFIX}trans.0.bias": (hidden,),
        f"{PREFIX}trans.2.weight": (width, hidden),
        f"{PREFIX}trans.2.bias": (width,),
    }


# -------------------------------------------------------------------------------------------------- the vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """Which rows of the source stay (`runs`, half-open), in order; the tokenizer that goes with them."""

    source_rows: int
    offset: int  # image rows in front: 20,000 or 0
    runs: tuple[tuple[int, int], ...]
    sentencepiece: bytes | None
    figures: str = ""  # what trimming does to the corpus

    @property
    def rows(self) -> int:
        return sum(end - begin for begin, end in self.runs)

    @property
    def is_trimmed(self) -> bool:
        return self.runs != ((self.offset, self.source_rows),)

    def new_id(self, old: int) -> int | None:
        """The id in the output of the source's id `old`; None where its row went."""
        position = 0
        for begin, end in self.runs:
            if begin <= old < end:
                return position + old - begin
            position += end - begin
        return None


def find_vocabulary(source: Source, options: Options) -> Vocabulary:
    """Rows, image rows and pieces of the source, judged against each other; trimmed where asked."""
    rows = vocabulary_rows(source)
    offset = image_rows(source, rows)
    if source.pieces is not None:
        padding = rows - offset - len(source.pieces)
        if not 0 <= padding < IMAGE_ROWS:
            parts = f"{offset} image rows + {len(source.pieces)} pieces = {rows - padding}"
            message = (
                f"{rows} vocabulary rows, but {parts}, with 0 to {IMAGE_ROWS - 1} rows of padding: wrong checkpoint?"
            )
            raise Refusal(Exit.WRONG_ROWS, message)
    if not offset and not options.changes_slim:
        message = f"{source.name} is slim already ({rows} rows): --repackage makes safetensors, code and card of it"
        raise Refusal(Exit.ALREADY_SLIM, message)
    vocabulary = Vocabulary(rows, offset, ((offset, rows),), source.sentencepiece)
    return trimmed(vocabulary, source, options) if options.trims else vocabulary


def vocabulary_rows(source: Source) -> int:
    """Rows of the vocabulary: the embedding's, or the config's, or what an adapter's tensors or its base say."""
    if source.kind == "model":
        return source.tensors[EMBEDDING].shape[0]
    if source.kind == "prefix":
        return source.config["vocab_size"]
    base = Path(source.config.get("base_model_name_or_path") or ".")
    lengths = {max(t.shape, default=0) for name, t in source.tensors.items() if is_vocabulary(name)}
    found = {length for length in lengths if length >= IMAGE_ROWS}
    if base != Path(".") and (base / "config.json").is_file():
        rows = io.read_json(base, "config.json").get("vocab_size")
        found |= {rows} if settings.natural(rows) else set()
    if len(found) > 1 or found & set(OTHER_MODELS):
        message = f"the adapter's vocabulary tensors and its base model have {sorted(found)} rows"
        raise Refusal(Exit.WRONG_ROWS, f"{message}: they must agree, and be ChatGLM-6B's")
    if found:
        return found.pop()
    if source.config.get("trainable_token_indices"):
        message = f"the adapter names token ids, and its base {base} is no folder here that says of which vocabulary"
        raise Refusal(Exit.WRONG_ROWS, f"{message}: correct base_model_name_or_path in adapter_config.json")
    return IMAGE_ROWS + len(source.pieces) if source.pieces else PUBLISHED_ROWS[0]


def is_vocabulary(name: str) -> bool:
    return not set(VOCABULARY_MODULES).isdisjoint(name.split("."))


def image_rows(source: Source, rows: int) -> int:
    """20,000 or 0: where the config's <sop> lies before the tokenizer's; the tokenizer must agree on all four ids."""
    if source.kind == "adapter":
        return adapter_image_rows(source, rows)
    if source.pieces is None:
        if source.kind == "model":
            message = f"{source.folder} has no {VOCAB_FILE}: give one with --tokenizer FILE"
            raise Refusal(Exit.WRONG_TOKENIZER, message)
        return IMAGE_ROWS if (source.config.get("pad_token_id") or 0) >= IMAGE_ROWS or rows == PUBLISHED_ROWS[0] else 0
    offset = IMAGE_ROWS if rows >= IMAGE_ROWS + len(source.pieces) else 0
    for field_name, piece in IDS.items():
        value, expected = source.config.get(field_name), source.pieces[piece] + offset
        # some fine-tuned models stop at </s>, or at either
        fitting = {expected, source.pieces["</s>"] + offset} if field_name == "eos_token_id" else {expected}
        if value is not None and not fitting.issuperset(value if isinstance(value, list) else [value]):
            message = f"{field_name} is {value}, but {VOCAB_FILE} and {rows} rows put {piece} at {expected}"
            raise Refusal(Exit.WRONG_TOKENIZER, f"{message}: give the file that belongs to the weights")
    return offset


def adapter_image_rows(source: Source, rows: int) -> int:
    """An adapter says nothing about its vocabulary but the sizes of its tensors."""
    if source.pieces is not None:
        return IMAGE_ROWS if rows >= IMAGE_ROWS + len(source.pieces) else 0
    if rows not in PUBLISHED_ROWS:
        message = (
            f"the adapter's vocabulary has {rows} rows, not {PUBLISHED_ROWS[0]}: give its {VOCAB_FILE} (--tokenizer)"
        )
        raise Refusal(Exit.WRONG_ROWS, message)
    return IMAGE_ROWS if rows == PUBLISHED_ROWS[0] else 0


def trimmed(vocabulary: Vocabulary, source: Source, options: Options) -> Vocabulary:
    """The vocabulary without the pieces that `--corpus` and `--keep-languages` don't need."""
    from slimming import trim_vocabulary as trim

    if source.sentencepiece is None:
        raise Refusal(
            Exit.WRONG_TOKENIZER, f"{source.folder} has no {VOCAB_FILE} to trim: give one with --tokenizer FILE"
        )
    try:
        kept = trim.kept_pieces(source.sentencepiece, options.corpus, options.keep_languages, options.min_count)
    except (ValueError, OSError, RuntimeError) as error:
        raise Refusal(Exit.UNSUPPORTED, f"the vocabulary can't be trimmed: {first_line(error)}") from None
    model = trim.with_pieces(source.sentencepiece, kept)
    figures = f"{len(kept):,} of {len(source.pieces or ()):,} pieces stay"
    if options.corpus is not None:
        figures += f"; {trim.corpus_figures(source.sentencepiece, model, kept, options.corpus)}"
    runs = runs_of(index + vocabulary.offset for index in kept)
    spare = vocabulary.offset + len(source.pieces or ())  # rows without a piece fill up to a multiple of 64
    padding = min(-len(kept) % 64, vocabulary.source_rows - spare)
    if padding:
        runs = runs_of([*(row for run in runs for row in range(*run)), *range(spare, spare + padding)])
    return replace(vocabulary, runs=runs, sentencepiece=model, figures=figures)


def runs_of(rows: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as half-open runs."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    return tuple((begin, end) for begin, end in runs)


# -------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Job:
    """One tensor of the source and what becomes of it: rows kept along `axis`, `dtype`, quantized to `bits`."""

    source: StoredTensor
    dtype: str
    axis: int | None = None
    runs: tuple[tuple[int, int], ...] = ()
    bits: int = 0
    group_size: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """After the cut, before quantization."""
        if self.axis is None:
            return self.source.shape
        rows = sum(end - begin for begin, end in self.runs)
        return (*self.source.shape[: self.axis], rows, *self.source.shape[self.axis + 1 :])

    @property
    def outputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of the one tensor that it makes, or of weight and scale."""
        name = self.source.name
        if not self.bits:
            return [(name, self.dtype, self.shape)]
        rows, columns = self.shape
        scale = (rows, columns // self.group_size) if self.group_size else (rows,)
        return [(name, "I8", (rows, columns * self.bits // 8)), (f"{name}_scale", self.dtype, scale)]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * io.ITEM_SIZES[dtype] for _, dtype, shape in self.outputs)

    @property
    def read_bytes(self) -> int:
        return math.prod(self.shape) * io.ITEM_SIZES[self.source.dtype]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Byte ranges of the source tensor that stay."""
        if self.axis is None:
            yield 0, self.source.nbytes
            return
        shape = self.source.shape
        row = math.prod(shape[self.axis + 1 :]) * io.ITEM_SIZES[self.source.dtype]
        for outer in range(math.prod(shape[: self.axis])):
            start = outer * shape[self.axis] * row
            for begin, end in self.runs:
                yield start + begin * row, start + end * row


@dataclass(frozen=True)
class Plan:
    """All that a run will do, known before it writes."""

    source: Source
    vocabulary: Vocabulary
    tied: bool | None  # None where there is neither embedding nor head
    shards: dict[str, list[Job]]
    allow_nonfinite: bool
    notes: tuple[str, ...]

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.shards.values() for job in jobs]

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    def fingerprint(self) -> str:
        """Changes with every source file, option, layout or version of the code that could change a shard."""
        jobs = [
            (name, [(j.source.name, j.dtype, j.axis, j.runs, j.bits, j.outputs) for j in js])
            for name, js in self.shards.items()
        ]
        version = package_module("configuration_chatglm").CODE_VERSION
        source = [str(self.source.folder.resolve()), self.source.checkpoint.identities, self.allow_nonfinite]
        return hashlib.blake2b(json.dumps([version, source, jobs]).encode(), digest_size=32).hexdigest()


def make_plan(source: Source, options: Options) -> Plan:
    """Judges rows and numbers of the vocabulary, and lays every output tensor into its shard."""
    vocabulary = find_vocabulary(source, options)
    notes = list(source.notes)
    if vocabulary.sentencepiece and not vocabulary.is_trimmed and source.kind != "adapter":
        digest = hashlib.sha256(vocabulary.sentencepiece).hexdigest()
        notes.append(f"{VOCAB_FILE}: sha256 {digest}" + (", the published file" if digest == PUBLISHED_SHA256 else ""))
    jobs = [make_job(source, tensor, vocabulary, options) for tensor in source.tensors.values()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: judge_finite(job, options), [job for job in jobs if job.axis is not None]))
    tied = None
    if source.kind == "model":
        tied = HEAD not in source.tensors or head_equals_embedding(jobs)
        stored = "absent" if HEAD not in source.tensors else "equal to the embedding" if tied else "different"
        notes.append(f"head: {stored}, so {'stored once, tied' if tied else 'both are stored, untied'}")
    if tied:
        jobs = [job for job in jobs if job.source.name.rsplit(".", 1)[0] != "lm_head"]
    shards = lay_out(jobs, source.kind, options.max_shard_size)
    return Plan(source, vocabulary, tied, shards, options.allow_nonfinite, tuple(notes))


def make_job(source: Source, tensor: StoredTensor, vocabulary: Vocabulary, options: Options) -> Job:
    dtype = tensor.dtype
    if options.dtype and dtype in FLOATS:
        dtype = io.DTYPE_CODES[options.dtype]
    axis = vocabulary_axis(tensor, vocabulary.source_rows)
    job = Job(tensor, dtype, axis, vocabulary.runs if axis is not None else ())
    matrix = any(tensor.name.endswith(f"{name}.weight") for name in MATRICES)
    in_vocabulary = tensor.name in (EMBEDDING, HEAD)
    if tensor.dtype not in FLOATS or not (options.bits and matrix or options.quantize_head and in_vocabulary):
        return job
    bits, group = (options.bits, options.group_size) if matrix else (8, 0)
    if bits == 4 and job.shape[1] % 2 or group and job.shape[1] % group:
        message = f"{tensor.name} has {job.shape[1]} columns, not a multiple of {group or 2}: use another --group-size"
        raise Refusal(Exit.UNSUPPORTED, message)
    return replace(job, bits=bits, group_size=group)


def vocabulary_axis(tensor: StoredTensor, rows: int) -> int | None:
    return tensor.shape.index(rows) if is_vocabulary(tensor.name) and rows in tensor.shape else None


def lay_out(jobs: list[Job], kind: str, max_shard_size: int) -> dict[str, list[Job]]:
    """File name -> jobs, in source order; a tensor larger than `max_shard_size` has a shard for itself."""
    groups: list[list[Job]] = [[]]
    for job in jobs:
        if (
            groups[-1]
            and sum(other.nbytes for other in groups[-1]) + job.nbytes > max_shard_size
            and kind != "adapter"
        ):
            groups.append([])
        groups[-1].append(job)
    if len(groups) == 1:
        return {"adapter_model.safetensors" if kind == "adapter" else "model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def judge_finite(job: Job, options: Options) -> None:
    """Reads a vocabulary tensor's kept rows and refuses the first NaN or infinity."""
    with io.Reader() as reader:
        position = 0
        for chunk in reader.chunks(job.source, job.ranges()):
            judge_chunk(chunk, job, position, options)
            position += len(chunk)


def judge_chunk(chunk: memoryview, job: Job, position: int, options: Options) -> None:
    if options.allow_nonfinite:
        return
    found = io.first_nonfinite(chunk, job.source.dtype)
    if found is not None:
        index = position // io.ITEM_SIZES[job.source.dtype] + found
        row = index // max(math.prod(job.shape[1:]), 1)
        message = f"{job.source.name} has NaN or Inf in row {row} of those kept: --allow-nonfinite goes on with it"
        raise Refusal(Exit.NONFINITE, message)


def head_equals_embedding(jobs: list[Job]) -> bool:
    """Whether the kept rows of both are the same bytes, and their scales too where they are quantized."""
    import numpy

    modules = [EMBEDDING.rsplit(".", 1)[0], HEAD.rsplit(".", 1)[0]]
    sides = [{j.source.name[len(m) + 1 :]: j for j in jobs if j.source.name.startswith(f"{m}.")} for m in modules]
    kinds = [{name: (job.source.dtype, job.shape) for name, job in side.items()} for side in sides]
    if kinds[0] != kinds[1]:
        return False
    with io.Reader() as one, io.Reader() as other:
        for name, left in sides[0].items():
            right = sides[1][name]
            chunks = zip(one.chunks(left.source, left.ranges()), other.chunks(right.source, right.ranges()))
            if not all(numpy.array_equal(numpy.frombuffer(a, "u1"), numpy.frombuffer(b, "u1")) for a, b in chunks):
                return False
    return True
