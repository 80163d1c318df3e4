"""The proof: an output folder against its source, from the definition of the format and not from the conversion.

Nothing here asks the plan: rows follow from the arithmetic of ids, tensors are read by the safetensors library and by
`torch.load`, conversions and int8/int4 rounding have lines of their own, and so have files, settings, tokenizer
(`check_files`) and network (`check_network`). A tensor is compared in its own type, bit for bit, a block of rows at a
time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimming.plan import Options

IMAGE_ROWS = 20_000  # in front of the text rows of embedding and head in the first releases
SPELLED_LATER = 344  # pieces that the first release's SentencePiece file lacks
PUBLISHED_ROWS = 150528  # of the first release, for adapters and prefixes that come without a tokenizer
BLOCK_BYTES = 1 << 23
MAX_LINE = 600  # characters of a difference
EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
MATRIX = re.compile(r"\.(attention\.(query_key_value|dense)|mlp\.(dense_h_to_4h|dense_4h_to_h))\.weight$")
DTYPES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
DTYPES.update({"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"})
SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, SafetensorError)


class Difference(Exception):
    """What differs, where, and both values."""


# ---------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; its numbers are read when they are asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    rows: Callable[[int, int], Tensor]  # [begin, end) of the first axis
    whole: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensors(folder: Path, only_safetensors: bool = False) -> dict[str, Stored]:
    """name -> Stored of the weights that transformers and PEFT would load from a folder.

    Raises:
        Difference: a tensor that is there twice.
    """
    tensors: dict[str, Stored] = {}
    for name in weight_files(folder, ("safetensors",) if only_safetensors else ("safetensors", "bin")):
        for stored in (safetensors_of if name.endswith(".safetensors") else pickled_of)(folder / name):
            if stored.name in tensors:
                raise Difference(f"{stored.name} is in {tensors[stored.name].file} and in {stored.file}")
            tensors[stored.name] = stored
    return tensors


def weight_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """A single file goes before an index and safetensors before .bin; numbered shards may lack their index."""
    for suffix in suffixes:
        for stem in ("model", "adapter_model") if suffix == "safetensors" else ("pytorch_model", "adapter_model"):
            single, index = f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
            if (folder / single).exists():
                return [single]
            if index.exists():
                return sorted(set(read_json(index)["weight_map"].values()))
            numbered = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.{suffix}"))
            if numbered:
                return numbered
    raise Difference(f"{folder} holds no weights")


def safetensors_of(path: Path) -> Iterator[Stored]:
    file = safe_open(str(path), framework="pt")
    for name in file.keys():  # noqa: SIM118 (no dict)
        part = file.get_slice(name)
        dtype = getattr(torch, DTYPES[part.get_dtype()])
        yield Stored(
            name,
            tuple(part.get_shape()),
            dtype,
            path.name,
            lambda begin, end, part=part: part[begin:end],
            lambda name=name: file.get_tensor(name),
        )


def pickled_of(path: Path) -> Iterator[Stored]:
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # a file older than torch's ZIP format can't be mapped
        content = torch.load(str(path), map_location="cpu", weights_only=True)
    for name, tensor in content.items():
        rows = lambda begin, end, tensor=tensor: tensor[begin:end]  # noqa: E731
        yield Stored(name, tuple(tensor.shape), tensor.dtype, path.name, rows, lambda tensor=tensor: tensor)


def read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise Difference(f"{path.name} is no JSON object but a {type(content).__name__}")
    return content


# ------------------------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class Case:
    """A source and what the options ask of it: all that the output must follow from."""

    source: Path
    options: Options
    kind: str  # "model", "prefix" (P-tuning v2 alone) or "adapter" (LoRA)
    config: dict[str, Any]
    tensors: dict[str, Stored]
    sentencepiece: Any  # the source's own processor, None without a tokenizer
    source_rows: int
    offset: int  # image rows in front: 20,000 or 0
    kept: Tensor  # row of the source for each row of the output
    is_trimmed: bool = False

    @property
    def tokenizer_file(self) -> Path:
        return self.options.tokenizer or self.source / "ice_text.model"

    def new_id(self, old: int) -> int | None:
        """The id of the output for an id of the source; None where its row went."""
        found = (self.kept == old).nonzero() if 0 <= old < self.source_rows else ()
        return int(found[0]) if len(found) else None


def read_case(source: Path, output: Path, options: Options) -> Case:
    tensors = read_tensors(source)
    is_adapter = any(stored.file.startswith("adapter_model") for stored in tensors.values())
    kind = "adapter" if is_adapter else "model"
    if all(name.startswith("transformer.prefix_encoder.") for name in tensors):
        kind = "prefix"
    config = read_json(source / ("adapter_config.json" if is_adapter else "config.json"))
    processor = None
    path = options.tokenizer or source / "ice_text.model"
    if path.exists():
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    rows = source_rows(kind, config, tensors, processor)
    offset = image_rows(config, rows, processor)
    kept = torch.arange(offset, rows)
    if options.trims:
        kept = recorded_rows(output, rows, offset)
    return Case(source, options, kind, config, tensors, processor, rows, offset, kept, options.trims)


def pieces_of(processor: Any) -> int:
    """Pieces of the vocabulary, with those that code of the first release added in memory."""
    complete = processor.piece_to_id("<sop>") != processor.unk_id()
    return processor.get_piece_size() + (0 if complete else SPELLED_LATER)


def source_rows(kind: str, config: dict, tensors: dict[str, Stored], processor: Any) -> int:
    """Rows of the source's vocabulary; adapters say them by a tensor's size, by their base model or not at all."""
    if kind == "model":
        return tensors[EMBEDDING].shape[0]
    if kind == "prefix":
        return config.get("vocab_size") or 0
    sizes = [max(stored.shape) for name, stored in tensors.items() if is_vocabulary(name) and stored.shape]
    base = Path(str(config.get("base_model_name_or_path"))) / "config.json"
    if max(sizes, default=0) >= IMAGE_ROWS:
        return max(sizes)
    if base.is_file():
        return read_json(base)["vocab_size"]
    return IMAGE_ROWS + pieces_of(processor) if processor else PUBLISHED_ROWS


def image_rows(config: dict, rows: int, processor: Any) -> int:
    """20,000 where image rows and pieces fit into the rows; the config's <sop>, where it says one, must agree."""
    if processor is None:
        old = rows == PUBLISHED_ROWS or (config.get("pad_token_id") or 0) >= IMAGE_ROWS
        return IMAGE_ROWS if old else 0
    offset = IMAGE_ROWS if rows >= IMAGE_ROWS + pieces_of(processor) else 0
    sop = pieces_of(processor) - SPELLED_LATER + 4  # after [MASK], [gMASK], [sMASK] and <unused_0>
    if config.get("bos_token_id") not in (None, sop + offset):
        raise Difference(f"the source's bos_token_id is {config['bos_token_id']}, its {rows} rows say {sop + offset}")
    return offset


def recorded_rows(output: Path, rows: int, offset: int) -> Tensor:
    """The rows that a trimmed output says it kept: ascending, text rows of the source, each once."""
    record = read_json(output / "vocabulary_map.json")
    bounds = [number for run in record.get("kept_runs", ()) for number in run]
    ascending = all(type(number) is int for number in bounds) and bounds == sorted(set(bounds))
    if not bounds or len(bounds) % 2 or not ascending or bounds[0] < offset or bounds[-1] > rows:
        raise Difference(f"vocabulary_map.json: kept_runs are no ascending runs of rows from {offset} to {rows - 1}")
    kept = torch.cat([torch.arange(begin, end) for begin, end in zip(bounds[::2], bounds[1::2])])
    expected = {"source_rows": rows, "rows": len(kept), "kept_runs": record["kept_runs"]}
    for name in sorted({*record, *expected}):
        if record.get(name) != expected.get(name):
            raise Difference(f"vocabulary_map.json: {name} is {record.get(name)}, expected {expected.get(name)}")
    return kept


def is_vocabulary(name: str) -> bool:
    return "word_embeddings" in name.split(".") or "lm_head" in name.split(".")


# ------------------------------------------------------------------------------------------- what tensors shall be


def expected_blocks(case: Case, stored: Stored) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(first row, output name -> rows from there on) of what a source tensor becomes, block by block."""
    axis = vocabulary_axis(case, stored)
    if not stored.shape or axis:  # one number, or a small factor of an adapter that is cut along its columns
        numbers = stored.whole()
        yield 0, transformed(case, stored.name, numbers.index_select(axis, case.kept) if axis else numbers)
        return
    total = rows_of(case, stored)
    step = block_rows(stored)
    for begin in range(0, max(total, 1), step):
        yield begin, transformed(case, stored.name, source_block(case, stored, begin, min(begin + step, total)))


def block_rows(stored: Stored) -> int:
    return max(BLOCK_BYTES // max(stored.nbytes // max(stored.shape[0], 1), 1), 1)


def rows_of(case: Case, stored: Stored) -> int:
    """Of the output's tensor."""
    return len(case.kept) if vocabulary_axis(case, stored) == 0 else stored.shape[0] if stored.shape else 1


def vocabulary_axis(case: Case, stored: Stored) -> int | None:
    is_cut = is_vocabulary(stored.name) and case.source_rows in stored.shape
    return stored.shape.index(case.source_rows) if is_cut else None


def source_block(case: Case, stored: Stored, begin: int, end: int) -> Tensor:
    """The source's numbers for the rows begin ... end - 1 of the output."""
    if vocabulary_axis(case, stored) is None:
        return stored.rows(begin, end)
    kept = case.kept[begin:end]
    cuts = [0, *((kept.diff() != 1).nonzero().flatten() + 1).tolist(), len(kept)]
    parts = [stored.rows(int(kept[a]), int(kept[b - 1]) + 1) for a, b in zip(cuts, cuts[1:]) if a < b]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def transformed(case: Case, name: str, numbers: Tensor) -> dict[str, Tensor]:
    """Rows as they are, in another float type, or as int8/int4 with their scales."""
    options = case.options
    if not numbers.is_floating_point():
        return {name: numbers}
    if options.dtype:
        numbers = numbers.to(getattr(torch, options.dtype))
    if options.bits and MATRIX.search(name):
        values, scale = rounded(numbers, options.bits, options.group_size)
    elif options.quantize_head and name in (EMBEDDING, HEAD):
        values, scale = rounded(numbers, 8, 0)
    else:
        return {name: numbers}
    return {name: values, f"{name}_scale": scale}


def rounded(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in] or two int4 a byte [out, in / 2], and scales [out] or [out, in / group_size].

    scale = max|w| / (2^(bits-1) - 1) in the weight's type, then in float16 (bfloat16 stays bfloat16);
    value = w / scale in the weight's type (bfloat16: float32), to the nearest, halves to even; zeros stay zeros.
    """
    largest = 2 ** (bits - 1) - 1
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    groups = weight.reshape(weight.shape[0], -1, group_size or weight.shape[1]).to(exact)
    short = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16
    scale = (groups.abs().amax(2) / largest).to(weight.dtype).to(short)
    quotient = groups / scale.to(exact)[:, :, None]
    if weight.dtype == torch.float16:
        quotient = quotient.half().float()
    quotient[(scale == 0)[:, :, None].expand_as(quotient)] = 0
    values = quotient.round().clamp(-largest, largest).to(torch.int8).reshape(weight.shape)
    if bits == 4:  # the even column in the high four bits
        values = (values[:, 0::2] << 4) | (values[:, 1::2] & 15)
    return values, (scale if group_size else scale[:, 0]).to(weight.dtype)


def is_tied(case: Case) -> bool:
    """Whether the head is absent, or holds the embedding's bits in every kept row, scales included."""
    modules = (EMBEDDING.rpartition(".")[0], HEAD.rpartition(".")[0])
    sides = [{n[len(m) :]: s for n, s in case.tensors.items() if n.startswith(f"{m}.")} for m in modules]
    if HEAD not in case.tensors:
        return True
    if sides[0].keys() != sides[1].keys():
        return False
    return all(kept_rows_agree(case, sides[0][name], sides[1][name]) for name in sides[0])


def kept_rows_agree(case: Case, one: Stored, other: Stored) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    for begin in range(0, len(case.kept), block_rows(one)):
        end = min(begin + block_rows(one), len(case.kept))
        sides = [source_block(case, side, begin, end) for side in (one, other)]
        if not torch.equal(*map(bits_of, sides)):
            return False
    return True


# ------------------------------------------------------------------------------------------------------ comparison


def bits_of(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(SAME_SIZE[numbers.dtype.itemsize])


@dataclass
class Proved:
    """What was compared and found equal."""

    tensors: int = 0
    rows: int = 0
    nbytes: int = 0
    strings: int = 0
    files: int = 0
    logits: str = ""


def compare_tensors(case: Case, output: dict[str, Stored], tied: bool | None, proved: Proved) -> None:
    """Each tensor of the source is in the output as it should be, and no other is.

    Raises:
        Difference: the first one: tensor, row, column and both values.
    """
    left = set(output)
    for name, stored in case.tensors.items():
        if tied and name.startswith("lm_head."):
            continue  # its kept rows are the embedding's, bit for bit
        parts: dict[str, Tensor] = {}
        for begin, parts in expected_blocks(case, stored):
            for part, numbers in parts.items():
                if part not in output:
                    raise Difference(f"{part} is missing, {stored.file} of the source has {name}")
                compare_block(case, output[part], numbers, begin, rows_of(case, stored))
        proved.tensors += len(parts)
        proved.rows += sum(output[part].shape[0] if output[part].shape else 1 for part in parts)
        proved.nbytes += sum(output[part].nbytes for part in parts)
        left -= set(parts)
    if left:
        raise Difference(f"{min(left)} is not in the source" + (", or not apart from the embedding" if tied else ""))


def compare_block(case: Case, found: Stored, expected: Tensor, begin: int, total: int) -> None:
    """Rows of an output tensor, from `begin` on, and its type and shape: it has `total` rows."""
    shape = (total, *expected.shape[1:]) if expected.dim() else ()
    if (found.dtype, found.shape) != (expected.dtype, shape):
        sides = [
            f"{named(dtype)} {list(size)}" for dtype, size in ((found.dtype, found.shape), (expected.dtype, shape))
        ]
        raise Difference(f"{found.name} is {sides[0]}, expected {sides[1]}")
    numbers = found.rows(begin, begin + len(expected)) if shape else found.whole()
    unequal = bits_of(numbers) != bits_of(expected)
    if not unequal.any():
        return
    place = unequal.nonzero()[0].tolist()
    where = [found.name]
    if place:
        row = place[0] + begin
        is_cut = is_vocabulary(found.name) and total == len(case.kept)
        where.append(f"row {row}" + (f" (row {int(case.kept[row])} of the source)" if is_cut else ""))
    where += [f"column {column}" for column in place[1:]]
    values = [side[tuple(place)].item() for side in (numbers, expected)]
    raise Difference(
        f"{', '.join(where)}: {values[0]!r}, expected {values[1]!r}{bits_apart(numbers, expected, place)}"
    )


def bits_apart(numbers: Tensor, expected: Tensor, place: list[int]) -> str:
    """NaN and -0.0 look the same when printed."""
    words = [bits_of(side)[tuple(place)].item() for side in (numbers, expected)]
    values = [side[tuple(place)].item() for side in (numbers, expected)]
    return f" (bits {words[0]:#x} and {words[1]:#x})" if repr(values[0]) == repr(values[1]) else ""


def named(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "")


# ------------------------------------------------------------------------------------------------------- the report


def check(source: Path, output: Path, options: Options) -> bool:
    """Compares OUTPUT with what the format makes of SOURCE under the options, prints the report, and says whether all
    of it is as it should be.
    """
    from slimming import check_files, check_network

    proved, differences = Proved(), []
    found: dict[str, Stored] = {}
    known: list[tuple[Case, bool | None]] = []

    def rows() -> None:
        case = read_case(source, output, options)
        known.append((case, is_tied(case) if case.kind == "model" else None))

    guarded("rows", rows, differences)
    if not known:
        return report(proved, differences)
    case, tied = known[0]

    def tensors() -> None:
        found.update(read_tensors(output, only_safetensors=True))
        compare_tensors(case, found, tied, proved)

    def files() -> None:
        check_files.compare_files(case, output, proved)

    def settings() -> None:
        check_files.compare_settings(case, output, found, tied)

    def tokenizer() -> None:
        proved.strings = check_files.compare_tokenizer(case, output)

    def logits() -> None:
        proved.logits = check_network.compare_logits(case, output, found)

    for part in (tensors, files, settings, tokenizer, logits):
        if part is logits and differences:
            break  # numbers or settings are known to be wrong
        guarded(part.__name__, part, differences)
    return report(proved, differences)


def guarded(part: str, compare: Callable[[], None], differences: list[str]) -> None:
    """Notes a difference; a file that can't be read is one too."""
    try:
        compare()
    except Difference as difference:
        differences.append(f"{part}: {difference}")
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        differences.append(f"{part}: can't be read as it should be ({type(error).__name__}: {reason})")


def report(proved: Proved, differences: list[str]) -> bool:
    for difference in differences:
        # what a file holds is shown and not obeyed: no escape sequence reaches the terminal
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in difference)
        print(f"DIFFERENT: {line[:MAX_LINE]}")
    if differences:
        return False
    print(
        f"proved: {proved.tensors:,} tensors with {proved.rows:,} rows ({proved.nbytes:,} bytes) bit for bit, "
        f"{proved.files} files, {proved.strings} strings of the tokenizer; logits: {proved.logits}"
    )
    return True
