"""Tensors of a checkpoint as byte ranges of its files: found, judged, read in chunks, written as safetensors shards.

Safetensors and `.bin` come down to one record, `StoredTensor`: a `.bin` is a ZIP archive with uncompressed tensors, so
once `torch.load(weights_only=True, mmap=True)` has said which tensor is which, both are read as plain bytes and no
shard is ever in memory. Everything here refuses (`Refusal`) rather than guess; each reason has its exit code (`Exit`).
Formats: safetensors' own description of its header; torch.save's ZIP layout (`<name>/data/<number>` records).
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import math
import os
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

CHUNK_BYTES = 1 << 18  # a multiple of every item size; read, scanned and written while it is in the CPU cache
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ITEM_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
TORCH_NAMES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "F16": "float16", "BF16": "bfloat16", "I16": "int16"}
TORCH_NAMES.update({"F32": "float32", "I32": "int32", "F64": "float64", "I64": "int64"})
DTYPE_CODES = {torch_name: code for code, torch_name in TORCH_NAMES.items()}
EXPONENT_BITS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}


class Exit(enum.IntEnum):
    """Exit codes of `slim.py`; 2 is argparse's own for a wrong command line."""

    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    NOT_A_CHECKPOINT = 3
    WRONG_ROWS = 4
    WRONG_TENSORS = 5
    UNSAFE_PATH = 6
    BROKEN_SHARD = 7
    LFS_POINTER = 8
    BAD_OFFSETS = 9
    NONFINITE = 10
    WRONG_TOKENIZER = 11
    TOO_LITTLE_DISK = 12
    UNSAFE_PICKLE = 13
    OUTPUT_EXISTS = 14
    ALREADY_SLIM = 15
    UNSUPPORTED = 16
    HUB = 17
    WRITE_FAILED = 18
    BUSY = 19


EXIT_MEANINGS = {
    Exit.OK: "done",
    Exit.CHECK_FAILED: "--check found a difference",
    Exit.USAGE: "wrong command line",
    Exit.NOT_A_CHECKPOINT: "no folder, no Hub id, or no checkpoint in it",
    Exit.WRONG_ROWS: "row count that fits neither tokenizer nor config (ChatGLM2 and 3: 65024)",
    Exit.WRONG_TENSORS: "missing or duplicate tensor, or one of the wrong shape",
    Exit.UNSAFE_PATH: "a file name or link that leads out of the folder",
    Exit.BROKEN_SHARD: "missing, empty or truncated file",
    Exit.LFS_POINTER: "git-LFS pointer in place of a file",
    Exit.BAD_OFFSETS: "overlapping or out-of-range safetensors offsets",
    Exit.NONFINITE: "NaN or Inf in the weights",
    Exit.WRONG_TOKENIZER: "tokenizer file that is missing or doesn't belong to the weights",
    Exit.TOO_LITTLE_DISK: "too little free disk space",
    Exit.UNSAFE_PICKLE: "a .bin with more than tensors in it (it was not run)",
    Exit.OUTPUT_EXISTS: "OUTPUT exists or overlaps SOURCE",
    Exit.ALREADY_SLIM: "slim already, and nothing else to do",
    Exit.UNSUPPORTED: "a kind, dtype or option that can't be served",
    Exit.HUB: "download or upload failed",
    Exit.WRITE_FAILED: "writing failed; the same command resumes",
    Exit.BUSY: "another run writes the same OUTPUT",
}


class Refusal(Exception):
    """A reason not to go on: one line that names value, limit and cure, and the exit code that stands for it."""

    def __init__(self, code: Exit, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file; its little-endian, contiguous bytes begin at `start` of `file`.

    `start` is None for a file that can't be read by byte range (a `.bin` older than the ZIP format).
    """

    name: str
    dtype: str  # a safetensors code: "F16"
    shape: tuple[int, ...]
    file: Path
    start: int | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


# ---------------------------------------------------------------------------------------------------------- files


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, refused if the name or a link leads out of it.

    A snapshot in the Hub's cache consists of links into `../../blobs`; there the model's cache folder is the limit.
    """
    plain = PurePosixPath(name)
    if not name or plain.is_absolute() or ".." in plain.parts or "\\" in name or PureWindowsPath(name).drive:
        raise Refusal(Exit.UNSAFE_PATH, f"{name!r} is not a file name inside {folder}: correct the index")
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    path = folder / name
    target = path.resolve()
    if target != root and root not in target.parents:
        raise Refusal(Exit.UNSAFE_PATH, f"{path} is a link out of {root}, to {target}: put the file itself there")
    return path


def checked_file(folder: Path, name: str) -> Path:
    """`inside`, and the file exists, is not empty and is not a git-LFS pointer."""
    path = inside(folder, name)
    if not path.is_file():
        raise Refusal(Exit.BROKEN_SHARD, f"{path} is missing: download it again")
    with open(path, "rb") as file:
        beginning = file.read(len(LFS_POINTER))
    if not beginning:
        raise Refusal(Exit.BROKEN_SHARD, f"{path} is empty (0 bytes): download it again")
    if beginning == LFS_POINTER:
        raise Refusal(Exit.LFS_POINTER, f"{path} is a git-LFS pointer, not the file: run `git lfs pull` in {folder}")
    return path


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file of the checkpoint."""
    path = checked_file(folder, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(Exit.NOT_A_CHECKPOINT, f"{path} is not JSON ({error}): download it again") from None


# ---------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file from its header, every offset judged."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if header_size > MAX_HEADER_BYTES:
            limit = f"header of {header_size} bytes, limit {MAX_HEADER_BYTES}"
            raise Refusal(Exit.BAD_OFFSETS, f"{path} is not safetensors ({limit}): download it again")
        if len(prefix) < 8 or 8 + header_size > size:
            raise Refusal(Exit.BROKEN_SHARD, f"{path} is truncated in its header ({size} bytes): download it again")
        header = parse_header(path, file.read(header_size))
    header.pop("__metadata__", None)
    tensors = [header_entry(path, name, entry, 8 + header_size) for name, entry in header.items()]
    judge_offsets(path, tensors, 8 + header_size, size)
    return tensors


def parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise Refusal(Exit.WRONG_TENSORS, f"{path} holds {name} {count} times: remove all but one")
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except ValueError as error:
        raise Refusal(Exit.BAD_OFFSETS, f"{path} has no readable header ({error}): download it again") from None
    if not isinstance(header, dict):
        raise Refusal(Exit.BAD_OFFSETS, f"{path} has a {type(header).__name__} for a header: download it again")
    return header


def header_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One entry of a safetensors header; its shape and dtype must fill its byte range exactly."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        natural = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise Refusal(Exit.BAD_OFFSETS, f"{path}: the entry of {name} is {entry!r}: download it again") from None
    if dtype not in ITEM_SIZES:
        raise Refusal(Exit.UNSUPPORTED, f"{path}: {name} has dtype {dtype}, known are {', '.join(ITEM_SIZES)}")
    if not natural or math.prod(shape) * ITEM_SIZES[dtype] != end - begin:
        where = f"offsets {begin}..{end} for {dtype} {list(shape)}"
        raise Refusal(Exit.BAD_OFFSETS, f"{path}: {name} has {where}: download it again")
    return StoredTensor(name, dtype, shape, path, data_start + begin)


def judge_offsets(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The tensors must cover the data of the file exactly: no overlap, no hole, nothing after or beyond the end."""
    position = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != position:
            fault = "overlaps the one before" if tensor.start < position else "leaves a hole before it"
            raise Refusal(Exit.BAD_OFFSETS, f"{path}: {tensor.name} {fault} at byte {position}: download it again")
        position += tensor.nbytes
    if position > size:
        raise Refusal(Exit.BROKEN_SHARD, f"{path} is truncated: {size} bytes, its header needs {position}")
    if position < size:
        raise Refusal(Exit.BAD_OFFSETS, f"{path} has {size - position} bytes behind its tensors: download it again")


# ----------------------------------------------------------------------------------------------------------- .bin


def damaged(path: Path, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0][:160]
    return f"{path} is truncated or damaged ({reason}): download it again"


def load_pickled(path: Path, mmap: bool) -> dict[str, Any]:
    """name -> tensor of a `.bin` file; only tensors are unpickled, any other object in it is refused unrun."""
    import torch

    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        reason = f" ({lines[0].strip()[:160]})" if lines else ""
        message = f"{path} holds more than tensors and was not run{reason}: get the checkpoint from a source you trust"
        raise Refusal(Exit.UNSAFE_PICKLE, message) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise Refusal(Exit.BROKEN_SHARD, damaged(path, error)) from None
    if not isinstance(content, dict):
        raise Refusal(Exit.NOT_A_CHECKPOINT, f"{path} holds a {type(content).__name__}, not a table of tensors")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            message = f"{path} holds a {type(value).__name__} under {name!r}: save the model's state_dict alone"
            raise Refusal(Exit.NOT_A_CHECKPOINT, message)
    return content


def read_bin(path: Path) -> list[StoredTensor]:
    """The tensors of a torch.save file, located in its ZIP archive where it is one."""
    with open(path, "rb") as file:
        signature = file.read(4)
    if signature[:1] != b"\x80" and signature != b"PK\x03\x04":
        raise Refusal(
            Exit.BROKEN_SHARD, f"{path} is no torch.save file (it begins with {signature!r}): download it again"
        )
    if signature[:1] == b"\x80":  # torch.save before 1.6: tensors can't be found without reading all of it
        return [stored(path, name, tensor, None) for name, tensor in load_pickled(path, mmap=False).items()]
    records = zip_records(path)
    tensors = load_pickled(path, mmap=True)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    storages.pop(0, None)  # empty tensors
    base = mapping_base(path, storages, records)
    entries = []
    for name, tensor in tensors.items():
        start = tensor.data_ptr() - base if tensor.numel() else 0
        entries.append(stored(path, name, tensor, start))
    return entries


def stored(path: Path, name: str, tensor: Any, start: int | None) -> StoredTensor:
    dtype = DTYPE_CODES.get(str(tensor.dtype).replace("torch.", ""))
    if dtype is None:
        raise Refusal(Exit.UNSUPPORTED, f"{path}: {name} has {tensor.dtype}, known are {', '.join(DTYPE_CODES)}")
    if start is not None and not tensor.is_contiguous():
        raise Refusal(Exit.UNSUPPORTED, f"{path}: {name} is stored transposed: save it again with .contiguous()")
    return StoredTensor(name, dtype, tuple(tensor.shape), path, start)


def zip_records(path: Path) -> dict[int, int]:
    """offset -> size of the tensor records of a torch.save archive."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            records = {}
            for info in archive.infolist():
                if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                    raise Refusal(Exit.UNSUPPORTED, f"{path} is big-endian: save it again on a little-endian machine")
                if info.filename.split("/")[-2:-1] != ["data"]:
                    continue
                if info.compress_type != zipfile.ZIP_STORED:
                    raise Refusal(Exit.BROKEN_SHARD, f"{path}: {info.filename} is compressed, torch.save never does")
                file.seek(info.header_offset + 26)
                name_size, extra_size = struct.unpack("<HH", file.read(4))
                records[info.header_offset + 30 + name_size + extra_size] = info.file_size
            return records
    except zipfile.BadZipFile as error:
        raise Refusal(Exit.BROKEN_SHARD, f"{path} is truncated or damaged ({error}): download it again") from None


def mapping_base(path: Path, storages: dict[int, int], records: dict[int, int]) -> int:
    """The address at which torch mapped byte 0 of the file.

    The whole file is one mapping, so address minus file offset is the same number for every storage: the one number
    (a page boundary) that sends each of them to a record of its own size.
    """
    if not storages:
        return 0
    lowest = min(storages)
    candidates = {lowest - offset for offset, size in records.items() if size == storages[lowest]}
    fitting = [
        base
        for base in candidates
        if base % 4096 == 0 and all(records.get(address - base) == size for address, size in storages.items())
    ]
    if len(fitting) != 1:
        message = (
            f"{path}: the tensors can't be told apart in the archive: save it again with torch.save or safetensors"
        )
        raise Refusal(Exit.UNSUPPORTED, message)
    return fitting[0]


# -------------------------------------------------------------------------------------------------- whole checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder: `tensors` by name in file order, and the files they are in."""

    folder: Path
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")


def read_checkpoint(folder: Path) -> Checkpoint:
    """All tensors of a checkpoint folder, from one file, an index with shards, or numbered shards without an index."""
    names, weight_map = weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    files = []
    for name in names:
        path = checked_file(folder, name)
        files.append(path)
        found = read_safetensors(path) if name.endswith(".safetensors") else read_bin(path)
        for tensor in sorted(found, key=lambda tensor: tensor.start or 0):
            if tensor.name in tensors:
                where = f"{tensors[tensor.name].file.name} and in {name}"
                raise Refusal(Exit.WRONG_TENSORS, f"duplicate tensor {tensor.name}: it is in {where}: remove one")
            tensors[tensor.name] = tensor
    if not tensors:
        raise Refusal(Exit.NOT_A_CHECKPOINT, f"{files[0]} holds no tensors: download it again")
    if weight_map is not None:
        judge_index(weight_map, tensors)
    return Checkpoint(folder, tensors, tuple(files))


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index's tensor -> file table where there is one; safetensors first."""
    for name in WEIGHT_NAMES:
        if (folder / f"{name}.index.json").exists():
            weight_map = read_json(folder, f"{name}.index.json").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise Refusal(
                    Exit.NOT_A_CHECKPOINT, f"{folder / name}.index.json has no weight_map: download it again"
                )
            return sorted(set(map(str, weight_map.values()))), weight_map
        if (folder / name).exists():
            return [name], None
        stem, suffix = name.split(".")
        numbered = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.{suffix}"))
        if numbered:
            judge_numbers(folder, numbered)
            return numbered, None
    raise Refusal(Exit.NOT_A_CHECKPOINT, f"{folder} holds none of {', '.join(WEIGHT_NAMES)}, nor an index of them")


def judge_numbers(folder: Path, names: list[str]) -> None:
    """`x-00001-of-00008` without an index: all eight must be there."""
    total = names[0].rsplit("-of-", 1)[1].split(".")[0]
    stem, suffix = names[0].split("-")[0], names[0].split(".")[-1]
    count = int(total) if total.isdigit() and int(total) < 10_000 else 0
    expected = [f"{stem}-{number:0{len(total)}d}-of-{total}.{suffix}" for number in range(1, count + 1)]
    if names != expected:
        missing = sorted(set(expected) - set(names)) or names
        raise Refusal(Exit.BROKEN_SHARD, f"{folder} has shards without an index, and not all: look at {missing[0]}")


def judge_index(weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    """Index and shards must agree on every tensor; a stale total_size is nothing to judge by."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != PurePosixPath(file).name:
            raise Refusal(Exit.WRONG_TENSORS, f"missing tensor {name}: the index says {file}, it isn't in there")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise Refusal(Exit.WRONG_TENSORS, f"{tensor.file.name} holds {name}, which the index doesn't name: add it")


# -------------------------------------------------------------------------------------------------------- reading


class Reader:
    """Reads tensors' bytes; keeps one file open at a time, and a whole file in memory only if its format needs it."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.file: Any = None
        self.pickled: dict[str, Any] = {}
        self.buffer = memoryview(bytearray(CHUNK_BYTES))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.open(None)

    def open(self, path: Path | None, pickled: bool = False) -> None:
        if path == self.path:
            return
        if self.file is not None:
            self.file.close()
        self.path, self.file, self.pickled = path, None, {}
        if path is not None and pickled:
            self.pickled = load_pickled(path, mmap=False)
        elif path is not None:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by the next open or __exit__)
            if hasattr(os, "posix_fadvise"):  # not on macOS and Windows
                os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, tensor: StoredTensor, begin: int, view: memoryview) -> None:
        """Fills `view` with the bytes of `tensor` from its byte `begin` on."""
        self.open(tensor.file, pickled=tensor.start is None)
        if tensor.start is None:
            view[:] = tensor_bytes(self.pickled[tensor.name])[begin : begin + len(view)]
            return
        self.file.seek(tensor.start + begin)
        filled = 0
        while filled < len(view):
            count = self.file.readinto(view[filled:])
            if not count:
                raise Refusal(Exit.BROKEN_SHARD, f"{tensor.file} ended early in {tensor.name}: it changed meanwhile")
            filled += count

    def chunks(self, tensor: StoredTensor, ranges: Iterable[tuple[int, int]], unit: int = 8) -> Iterator[memoryview]:
        """The byte ranges of a tensor, back to back, in chunks of whole `unit`s that are valid until the next one."""
        size, filled = max(CHUNK_BYTES // unit, 1) * unit, 0
        if size > len(self.buffer):
            self.buffer = memoryview(bytearray(size))
        for begin, end in ranges:
            while begin < end:
                count = min(end - begin, size - filled)
                self.read_into(tensor, begin, self.buffer[filled : filled + count])
                begin, filled = begin + count, filled + count
                if filled == size:
                    yield self.buffer[:size]
                    filled = 0
        if filled:
            yield self.buffer[:filled]


def tensor_bytes(tensor: Any) -> memoryview:
    """The contiguous bytes of a torch tensor."""
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def as_tensor(chunk: memoryview, dtype: str) -> Any:
    """A 1-D torch tensor over the bytes of a chunk (no copy)."""
    import torch

    return torch.frombuffer(chunk, dtype=getattr(torch, TORCH_NAMES[dtype]))


def first_nonfinite(chunk: memoryview, dtype: str) -> int | None:
    """The index of the first NaN or infinity among the numbers of a chunk: all exponent bits set."""
    import numpy

    mask, size = EXPONENT_BITS.get(dtype), ITEM_SIZES[dtype]
    if mask is None or not chunk:
        return None
    # as integers they are the largest positive ones, and with the sign bit the largest of all: two maxima, no copy
    signed, unsigned = numpy.frombuffer(chunk, f"<i{size}"), numpy.frombuffer(chunk, f"<u{size}")
    if signed.max() < mask and unsigned.max() < mask + (1 << 8 * size - 1):
        return None
    return int((unsigned & mask == mask).argmax())


# -------------------------------------------------------------------------------------------------------- writing


def shard_layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Header of a safetensors file of (name, dtype, shape), and where each tensor begins in the file.

    Wide items come first, so that every tensor is aligned to its item size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda entry: -ITEM_SIZES[entry[1]]):
        end = position + math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header.pop("__metadata__")
    data_start = 8 + len(text)
    starts = {name: data_start + entry["data_offsets"][0] for name, entry in header.items()}
    return struct.pack("<Q", len(text)) + text, starts


def write_shard(
    path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], content: Iterable[tuple[str, memoryview | bytes]]
) -> str:
    """Writes a safetensors file from (tensor name, bytes), each tensor's pieces in order; returns its checksum."""
    header, positions = shard_layout(tensors)
    ends = {name: positions[name] + math.prod(shape) * ITEM_SIZES[dtype] for name, dtype, shape in tensors}
    checksums = {name: Checksum() for name in positions}
    with open(path, "wb", buffering=0) as file:
        file.write(header)
        for name, data in content:
            file.seek(positions[name])
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            positions[name] += len(data)
            checksums[name].update(memoryview(data))
    assert positions == ends, "every tensor of the plan is written whole"
    return folded(header, checksums)


class Checksum:
    """Two 64-bit sums over the 8-byte words of a stream, plain and weighted by position, as in Fletcher's checksum.

    Changed, lost and moved blocks show in it, at a tenth of the time of a cryptographic hash, which would double the
    processor time of a copy. It guards against damage, not against forgery.
    """

    WORDS = CHUNK_BYTES // 8

    def __init__(self) -> None:
        self.plain = self.weighted = self.position = 0
        self.rest = b""

    def update(self, data: memoryview) -> None:
        import numpy

        if self.rest:
            data = memoryview(self.rest + bytes(data))
        whole = len(data) // 8 * 8
        for start in range(0, whole, CHUNK_BYTES):
            words = numpy.frombuffer(data[start : min(start + CHUNK_BYTES, whole)], "<u8")
            plain, weighted = int(words.sum()), int(words.dot(self.weights(len(words))))
            self.plain = (self.plain + plain) % 2**64
            self.weighted = (self.weighted + weighted + self.position * plain) % 2**64
            self.position += len(words)
        self.rest = bytes(data[whole:])

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def weights(count: int) -> Any:
        import numpy

        return numpy.arange(1, count + 1, dtype=numpy.uint64)

    def __str__(self) -> str:
        return f"{self.plain:016x}{self.weighted:016x}{self.rest.hex()}"


def folded(header: bytes, checksums: dict[str, Checksum]) -> str:
    """One number for a shard: its header and the sums of its tensors."""
    lines = "\n".join(f"{name} {checksum}" for name, checksum in sorted(checksums.items()))
    return hashlib.sha256(header + lines.encode()).hexdigest()


def shard_checksum(path: Path) -> str:
    """The checksum of a shard that was written before, from its bytes."""
    tensors = read_safetensors(path)
    checksums = {tensor.name: Checksum() for tensor in tensors}
    with Reader() as reader:
        for tensor in tensors:
            for chunk in reader.chunks(tensor, [(0, tensor.nbytes)]):
                checksums[tensor.name].update(chunk)
    with open(path, "rb") as file:
        size = file.read(8)
        return folded(size + file.read(struct.unpack("<Q", size)[0]), checksums)


class Journal:
    """The finished shards of an unfinished output, with their checksums, so that a killed run can go on.

    A shard enters after it is complete, by an atomic replace, and counts again only if its bytes still have that
    checksum and the plan (source files, options, layout) is the same.
    """

    NAME = "slim-journal.json"

    def __init__(self, folder: Path, plan: str):
        self.folder = folder
        self.plan = plan
        self.shards: dict[str, str] = {}
        try:
            content = json.loads((folder / self.NAME).read_text(encoding="utf-8"))
            self.shards = dict(content["shards"]) if content["plan"] == plan else {}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or not one of ours: every shard is written

    def is_finished(self, name: str) -> bool:
        try:
            return name in self.shards and shard_checksum(self.folder / name) == self.shards[name]
        except (OSError, Refusal):
            return False

    def record(self, name: str, checksum: str) -> None:
        self.shards[name] = checksum
        self.write()

    def write(self) -> None:
        temporary = self.folder / f"{self.NAME}.new"
        temporary.write_text(json.dumps({"plan": self.plan, "shards": self.shards}, indent=1), encoding="utf-8")
        os.replace(temporary, self.folder / self.NAME)
