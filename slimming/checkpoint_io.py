"""Tensors of a checkpoint as byte ranges of its files: found, judged, read in chunks, written as safetensors shards.

Safetensors and `.bin` come down to one record, `StoredTensor`: a `.bin` is a ZIP archive with uncompressed tensors, so
once `torch.load(weights_only=True, mmap=True)` has said which tensor is which, both are read as plain bytes and no
shard is ever in memory. Everything here refuses (`Refusal`) rather than guess; each reason has its exit code (`Exit`).
Formats: safetensors' own description of its header; torch.save's ZIP layout (`<name>/data/<number>` records).
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import pickle
import re
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

CHUNK_BYTES = 1 << 18  # a multiple of every item size; read, scanned and written while it is in the CPU cache
# Limits, known before anything is parsed: a ChatGLM-6B has 0.1 MB of header, index or pickle, and 463 tensors.
MAX_JSON_BYTES = 16_000_000
MAX_HEADER_BYTES = 16_000_000
MAX_PICKLE_BYTES = 4_000_000
MAX_RECORDS = 100_000
MAX_DIMENSIONS = 8
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
    BAD_SETTINGS = 20


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
    Exit.OUTPUT_EXISTS: "OUTPUT exists (or its temporary folder's name is taken), or overlaps SOURCE",
    Exit.ALREADY_SLIM: "slim already, and nothing else to do",
    Exit.UNSUPPORTED: "a kind, dtype or option that can't be served",
    Exit.HUB: "download or upload failed",
    Exit.WRITE_FAILED: "reading or writing failed; the same command resumes",
    Exit.BUSY: "another run writes the same OUTPUT",
    Exit.BAD_SETTINGS: "a field of the source's settings that no ChatGLM-6B can have",
}


class Refusal(Exception):
    """A reason not to go on: one line that names value, limit and cure, and the exit code that stands for it."""

    def __init__(self, code: Exit, message: str):
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def printable(text: str) -> str:
    """What a file says is shown and not obeyed: no escape sequence and no second line of its reaches the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    foreign = plain.is_absolute() or ".." in plain.parts or "\\" in name or PureWindowsPath(name).drive
    if not plain.name or foreign or not name.isprintable() or max(map(len, plain.parts)) > 200:
        raise Refusal(Exit.UNSAFE_PATH, f"{name[:200]!r} is not a file name inside {folder}: correct the index")
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


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file of the checkpoint, which must be an object."""
    path = checked_file(folder, name)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        message = f"{path} has {size:,} bytes, limit {MAX_JSON_BYTES:,}: that is not a checkpoint's {name}"
        raise Refusal(Exit.NOT_A_CHECKPOINT, message)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(Exit.NOT_A_CHECKPOINT, f"{path} is not JSON ({error}): download it again") from None
    except RecursionError:
        raise Refusal(Exit.NOT_A_CHECKPOINT, f"{path} is nested too deeply: download it again") from None
    if not isinstance(content, dict):
        raise Refusal(
            Exit.NOT_A_CHECKPOINT, f"{path} holds a {type(content).__name__}, not an object: download it again"
        )
    return content


# ---------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file from its header, every offset judged."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if header_size > MAX_HEADER_BYTES:
            limit = f"header of {header_size:,} bytes, limit {MAX_HEADER_BYTES:,}"
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
    except (ValueError, RecursionError) as error:
        raise Refusal(Exit.BAD_OFFSETS, f"{path} has no readable header ({error}): download it again") from None
    if not isinstance(header, dict):
        raise Refusal(Exit.BAD_OFFSETS, f"{path} has a {type(header).__name__} for a header: download it again")
    return header


def header_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One entry of a safetensors header; its shape and dtype must fill its byte range exactly."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        entry_text = f"the entry of {name} is {repr(entry)[:200]}"
        raise Refusal(Exit.BAD_OFFSETS, f"{path}: {entry_text}: download it again") from None
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise Refusal(
            Exit.UNSUPPORTED, f"{path}: {name} has dtype {repr(dtype)[:80]}, known are {', '.join(ITEM_SIZES)}"
        )
    natural = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end))
    if not natural or len(shape) > MAX_DIMENSIONS or math.prod(shape) * ITEM_SIZES[dtype] != end - begin:
        where = f"offsets {repr(begin)[:40]}..{repr(end)[:40]} for {dtype} {repr(list(shape[:9]))[:80]}"
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
    return f"{path} is truncated or damaged ({first_line(error)}): download it again"


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
    except Exception as error:  # bytes at will can raise anything; the line says what they did
        raise Refusal(Exit.BROKEN_SHARD, damaged(path, error)) from None
    if not isinstance(content, dict):
        raise Refusal(Exit.NOT_A_CHECKPOINT, f"{path} holds a {type(content).__name__}, not a table of tensors")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            message = f"{path} holds a {type(value).__name__} under {name!r}: save the model's state_dict alone"
            raise Refusal(Exit.NOT_A_CHECKPOINT, message)
        judge_layout(path, name, value)
    return content


def judge_layout(path: Path, name: str, tensor: Any) -> None:
    """The numbers of a tensor must be in the file, one after the other and as they are meant."""
    import torch

    fault = ""
    if tensor.layout is not torch.strided:
        fault, cure = f"is sparse ({tensor.layout})", ".to_dense()"
    elif tensor.device.type != "cpu":
        fault, cure = f"is on the {tensor.device} device, its numbers are not in the file", "the weights loaded"
    elif tensor.is_conj() or tensor.is_neg():
        fault, cure = "is marked as negated or conjugated", ".resolve_neg().resolve_conj()"
    elif DTYPE_CODES.get(str(tensor.dtype).replace("torch.", "")) is None:
        fault, cure = f"has {tensor.dtype}, known are {', '.join(DTYPE_CODES)}", "one of them"
    elif not tensor.is_contiguous():
        fault, cure = "is stored transposed", ".contiguous()"
    if fault:
        raise Refusal(Exit.UNSUPPORTED, f"{path}: {name} {fault}: save it again with {cure}")


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
    return StoredTensor(name, DTYPE_CODES[str(tensor.dtype).replace("torch.", "")], tuple(tensor.shape), path, start)


def zip_records(path: Path) -> dict[int, int]:
    """offset -> size of the tensor records of a torch.save archive, which holds its records as they are."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            if len(archive.infolist()) > MAX_RECORDS:
                message = f"{path} has {len(archive.infolist()):,} records, limit {MAX_RECORDS:,}"
                raise Refusal(Exit.BROKEN_SHARD, f"{message}: get the checkpoint from a source you trust")
            return dict(record for info in archive.infolist() for record in tensor_record(path, archive, file, info))
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise Refusal(Exit.BROKEN_SHARD, damaged(path, error)) from None


def tensor_record(path: Path, archive: zipfile.ZipFile, file: Any, info: zipfile.ZipInfo) -> list[tuple[int, int]]:
    """[(offset, size)] if a record is a tensor's; what else torch.load reads is judged by its size before it does."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise Refusal(
            Exit.BROKEN_SHARD, f"{path}: {info.filename} is compressed, torch.save never does that: do not trust it"
        )
    is_tensor = info.filename.split("/")[-2:-1] == ["data"]
    if not is_tensor and info.file_size > MAX_PICKLE_BYTES:
        message = f"{info.filename} has {info.file_size:,} bytes, limit {MAX_PICKLE_BYTES:,}"
        raise Refusal(Exit.BROKEN_SHARD, f"{path}: {message}: that is no table of a checkpoint's tensors")
    if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
        raise Refusal(Exit.UNSUPPORTED, f"{path} is big-endian: save it again on a little-endian machine")
    if not is_tensor:
        return []
    file.seek(info.header_offset + 26)
    name_size, extra_size = struct.unpack("<HH", file.read(4))
    return [(info.header_offset + 30 + name_size + extra_size, info.file_size)]


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
    """The weights of a folder: `tensors` by name in file order, the files they are in, and what tells these apart."""

    folder: Path
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    identities: tuple[tuple, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def judge_unchanged(self) -> None:
        """The files are still those that were judged: nothing was written beside a half that was read before."""
        for path, identity in zip(self.files, self.identities):
            if file_identity(path) != identity:
                raise Refusal(Exit.BROKEN_SHARD, f"{path} was changed while it was read: run the command again")


def file_identity(path: Path) -> tuple:
    """Changes when a file is replaced or written: its size, times and inode, and a hash of 64 blocks all over it, for
    times can be set and some systems have no inodes.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        for block in range(64):
            file.seek(status.st_size * block // 64)
            digest.update(file.read(4096))
    times = status.st_mtime_ns, status.st_ctime_ns
    return (path.name, status.st_size, *times, status.st_ino, digest.hexdigest())


# In the order in which transformers looks for them, on every version of the ladder (tests/test_weight_files.py): one
# file before an index beside it, safetensors before .bin. PEFT has the same order for an adapter.
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")


def loaded_file(names: Collection[str]) -> str | None:
    """Which of a folder's files transformers loads the weights from: a file, or an index; None without one."""
    return next((found for name in WEIGHT_NAMES for found in (name, f"{name}.index.json") if found in names), None)


def read_checkpoint(folder: Path) -> Checkpoint:
    """All tensors of a checkpoint folder, from one file, an index with shards, or numbered shards without an index."""
    names, weight_map = weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    paths = tuple(checked_file(folder, name) for name in names)
    identities = tuple(map(file_identity, paths))
    for name, path in zip(names, paths):
        found = read_safetensors(path) if name.endswith(".safetensors") else read_bin(path)
        for tensor in sorted(found, key=lambda tensor: tensor.start or 0):
            if tensor.name in tensors:
                where = f"{tensors[tensor.name].file.name} and in {name}"
                raise Refusal(Exit.WRONG_TENSORS, f"duplicate tensor {tensor.name}: it is in {where}: remove one")
            tensors[tensor.name] = tensor
    if not tensors:
        raise Refusal(Exit.NOT_A_CHECKPOINT, f"{paths[0]} holds no tensors: download it again")
    if weight_map is not None:
        judge_index(weight_map, tensors)
    return Checkpoint(folder, tensors, paths, identities, stale_files(folder, names))


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index's tensor -> file table where there is one."""
    present = {path.name for path in folder.iterdir()}
    loaded = loaded_file(present)
    if loaded and loaded.endswith(".index.json"):
        weight_map = read_json(folder, loaded).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Refusal(Exit.NOT_A_CHECKPOINT, f"{folder / loaded} has no weight_map: download it again")
        suffix = loaded.removesuffix(".index.json").rsplit(".", 1)[1]
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or not inside(folder, file).name.endswith(f".{suffix}"):
                message = f"{folder / loaded} says that {tensor} is in {repr(file)[:80]}, which is no .{suffix} file"
                raise Refusal(Exit.WRONG_TENSORS, f"{message}: download it again")
        return sorted(set(weight_map.values())), weight_map
    if loaded:
        return [loaded], None
    for name in WEIGHT_NAMES:
        stem, suffix = name.split(".")
        numbered = sorted(one for one in present if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", one))
        if numbered:
            judge_numbers(folder, numbered)
            return numbered, None
    raise Refusal(Exit.NOT_A_CHECKPOINT, f"{folder} holds none of {', '.join(WEIGHT_NAMES)}, nor an index of them")


def stale_files(folder: Path, names: list[str]) -> tuple[str, ...]:
    """A line about an index that lies beside the one file that counts: its shards may hold other numbers."""
    beside = f"{names[0]}.index.json"
    if len(names) > 1 or not (folder / beside).exists():
        return ()
    return (f"{names[0]} is the checkpoint, as for transformers; {beside} and its shards are ignored",)


def judge_numbers(folder: Path, names: list[str]) -> None:
    """`x-00001-of-00008` without an index: all eight must be there."""
    total = names[0].rsplit("-of-", 1)[1].split(".")[0]
    stem, suffix = names[0].split("-")[0], names[0].split(".")[-1]
    count = int(total) if len(total) <= 5 and int(total) < 10_000 else 0
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
            try:
                count = self.file.readinto(view[filled:])
            except OSError as error:
                raise OSError(f"reading {tensor.file}: {error}") from error
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

    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


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
    checksums = {name: hashlib.blake2b() for name in positions}
    with new_file(path) as file:
        file.write(header)
        for name, data in content:
            file.seek(positions[name])
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            positions[name] += len(data)
            checksums[name].update(data)
    assert positions == ends, "every tensor of the plan is written whole"
    return folded(header, checksums)


def new_file(path: Path) -> Any:
    """`path` opened for unbuffered writing, as a file that didn't exist: what was there goes, and no link is followed.

    In a folder that only we can write to nobody else can put one there in between.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0)


def write_file(path: Path, content: bytes | str) -> None:
    with new_file(path) as file:
        left = memoryview(content.encode() if isinstance(content, str) else content)
        while left:
            left = left[file.write(left) :]


def folded(header: bytes, checksums: dict[str, Any]) -> str:
    """One number for a shard: its header and the BLAKE2b hash of each tensor, whose bytes come in pieces."""
    lines = "\n".join(f"{name} {checksum.hexdigest()}" for name, checksum in sorted(checksums.items()))
    return hashlib.blake2b(header + lines.encode()).hexdigest()


def shard_checksum(path: Path) -> str:
    """The checksum of a shard that was written before, from its bytes."""
    tensors = read_safetensors(path)
    checksums = {tensor.name: hashlib.blake2b() for tensor in tensors}
    with Reader() as reader:
        for tensor in tensors:
            for chunk in reader.chunks(tensor, [(0, tensor.nbytes)]):
                checksums[tensor.name].update(chunk)
    with open(path, "rb") as file:
        size = file.read(8)
        return folded(size + file.read(struct.unpack("<Q", size)[0]), checksums)


def is_own_file(path: Path) -> bool:
    """A file proper under one name, neither a link nor one that has another name elsewhere."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


class Journal:
    """The finished shards of an unfinished output, with their checksums, so that a killed run can go on.

    A shard enters after it is complete, by an atomic replace, and counts again only if its bytes still have that
    checksum and the plan (source files, options, layout, code) is the same.
    """

    NAME = "slim-journal.json"

    def __init__(self, folder: Path, plan: str):
        self.folder = folder
        self.plan = plan
        self.shards: dict[str, str] = {}
        try:
            content = json.loads((folder / self.NAME).read_text(encoding="utf-8"))
            self.shards = dict(content["shards"]) if content["plan"] == plan else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # none yet, or not one of ours: every shard is written
        self.write()  # from here on the folder is known to be ours

    def is_finished(self, name: str) -> bool:
        path = self.folder / name
        try:
            return name in self.shards and is_own_file(path) and shard_checksum(path) == self.shards[name]
        except (OSError, Refusal):
            return False

    def record(self, name: str, checksum: str) -> None:
        self.shards[name] = checksum
        self.write()

    def write(self) -> None:
        temporary = self.folder / f"{self.NAME}.new"
        write_file(temporary, json.dumps({"plan": self.plan, "shards": self.shards}, indent=1))
        os.replace(temporary, self.folder / self.NAME)
