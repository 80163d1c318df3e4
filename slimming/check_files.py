"""Part of the proof: every file of an output but the weights against what package, source and format say."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from package import ROOT as PACKAGE
from slimming.check import EMBEDDING, Case, Difference, Proved, Stored, named, read_json
from slimming.plan import Options

CODE_ENTRIES = ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py")
WORKING_FILES = ("slim.lock", "slim-journal.json")  # of slim.py, in its temporary folder alone
PUBLISHED_SHA256 = "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e"  # of the final ice_text.model

# The network's fields, each with what a configuration means that doesn't name it.
NETWORK = {
    "hidden_size": 4096,
    "num_layers": 28,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 2048,
    "position_encoding_2d": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "residual_scale": math.sqrt(56),
    "quantize_activations": False,
}
IDS = {"bos_token_id": "<sop>", "eos_token_id": "<eop>", "mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]"}
IDS["pad_token_id"] = "<pad>"
JUDGED = {*NETWORK, *IDS, "vocab_size", "model_type", "architectures", "auto_map", "tie_word_embeddings"}
JUDGED |= {"torch_dtype", "dtype", "quantization_bit", "quantization_group_size", "quantize_head"}
FLOAT_TYPES = ("float16", "bfloat16", "float32", "float64")
MODEL_CLASS = "modeling_chatglm.ChatGLMForConditionalGeneration"
AUTO_MAP = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": MODEL_CLASS}
AUTO_MAP.update({"AutoModelForCausalLM": MODEL_CLASS, "AutoModelForSeq2SeqLM": MODEL_CLASS})
# Fields that say nothing of the network; text among them names no code and no place.
VERSION = r"[\w.+-]{1,40}"
FURTHER_TEXTS = {"transformers_version": VERSION, "code_version": VERSION, "tokenizer_class": "ChatGLMTokenizer"}
SWITCHES = ("do_sample", "use_cache")
COUNTS = ("max_length", "max_new_tokens", "min_length", "top_k", "num_beams", "no_repeat_ngram_size")
COUNTS += ("num_return_sequences",)
RARE = ("early_stopping", "min_new_tokens", "num_beam_groups", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff")
RARE += ("diversity_penalty", "renormalize_logits", "remove_invalid_values", "_from_model_config")
NUMBERS = ("temperature", "top_p", "repetition_penalty", "length_penalty")
TEXT_CHOICES = {"do_lower_case": bool, "remove_space": bool, "model_max_length": (int, float)}
TEXT_CHOICES["clean_up_tokenization_spaces"] = bool
LORA_NUMBERS = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora", "use_dora", "bias")
LORA_NUMBERS += ("fan_in_fan_out", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_dropout")
CORPUS_LINES = 1000  # compared
STRINGS = (
    *("你好", "介绍一下清华大学", "晚上睡不着怎么办", "今天天气很好！", "人工智能是计算机科学的一个分支。"),
    *("hello world", "The quick brown fox", "def main():<n>    return 42", "1 + 1 = 2", "2023年5月13日"),
    *("[Round 0]<n>问：你好<n>答：", "，。！？：；", "𠮷野家 ☃ ñ", "a  b", "１２３ＡＢＣ", "x", " "),
)


# ------------------------------------------------------------------------------------------------------ which files


def compare_files(case: Case, output: Path, proved: Proved) -> None:
    """The folder has the files that it should have and no other; those that are copies are equal byte for byte."""
    names = {path.name for path in output.iterdir()}
    if output.name.endswith("-slim-partial"):
        names -= set(WORKING_FILES)
    weights = weight_names(case, output, names)
    required = {"README.md", *weights}
    copies: dict[str, Path] = {}
    if case.kind == "adapter":
        required.add("adapter_config.json")
    else:
        required |= {"config.json", "generation_config.json"}
        copies = {name: PACKAGE / name for name in code_files()}
        copies.update({name: PACKAGE / name for name in ("LICENSE",) if (PACKAGE / name).is_file()})
        copies.update({name: case.source / name for name in ("MODEL_LICENSE",) if (case.source / name).is_file()})
    if case.sentencepiece is not None:
        required |= {"ice_text.model", "tokenizer_config.json"}
        required |= {"tokenizer.json"} if case.options.fast_tokenizer else set()
        copies["chat_template.jinja"] = PACKAGE / "chat_template.jinja"
    if case.is_trimmed:
        required.add("vocabulary_map.json")
    for name in sorted(required | set(copies)):
        if name not in names:
            raise Difference(f"{name} is missing")
    for name in sorted(names - required - set(copies)):
        raise Difference(f"{name} is there, and neither the package nor the source has it")
    for name, original in copies.items():
        compare_bytes(name, (output / name).read_bytes(), original.read_bytes(), str(original))
    if not (output / "README.md").read_text(encoding="utf-8").startswith("---\n"):
        raise Difference("README.md doesn't begin with a model card's header")
    proved.files = len(names)


def code_files() -> set[str]:
    """The entries, and what they import from beside them."""
    found: set[str] = set()
    left = set(CODE_ENTRIES)
    while left:
        name = left.pop()
        found.add(name)
        text = (PACKAGE / name).read_text(encoding="utf-8")
        modules = set(re.findall(r"^\s*from \.(\w+)", text, re.MULTILINE))
        for names in re.findall(r"^\s*from \. import ([\w, ]+)", text, re.MULTILINE):
            modules |= {part.split()[0] for part in names.split(",")}
        left |= {f"{module}.py" for module in modules} - found
    return found


def compare_bytes(name: str, found: bytes, expected: bytes, origin: str) -> None:
    if found == expected:
        return
    place = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
    sides = [f"{len(side)} bytes, {side[place : place + 16]!r} there" for side in (found, expected)]
    raise Difference(f"{name} differs from {origin} at byte {place}: {sides[0]}, expected {sides[1]}")


def weight_names(case: Case, output: Path, names: set[str]) -> set[str]:
    """One safetensors file, or shards with an index that says of every tensor, and of no other, where it is."""
    stem = "adapter_model" if case.kind == "adapter" else "model"
    if f"{stem}.safetensors" in names:
        judge_format(output / f"{stem}.safetensors")
        return {f"{stem}.safetensors"}
    index_name = f"{stem}.safetensors.index.json"
    if index_name not in names:
        raise Difference(f"neither {stem}.safetensors nor {index_name} is there")
    index = read_json(output / index_name)
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    expected = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if shards != expected:
        raise Difference(f"shards {', '.join(sorted(set(shards) ^ set(expected)))} are missing or too many")
    places, nbytes = {}, 0
    for shard in shards:
        for tensor, size in judge_format(output / shard).items():
            places[tensor] = shard
            nbytes += size
    weight_map = dict(index["weight_map"])
    for tensor in sorted({*places, *weight_map}):
        says, holds = weight_map.get(tensor), places.get(tensor)
        if says != holds:
            raise Difference(f"{index_name} says {tensor} is in {says}, it is in {holds}")
    if index.get("metadata") != {"total_size": nbytes} or set(index) != {"metadata", "weight_map"}:
        raise Difference(f"{index_name}: metadata {index.get('metadata')}, expected total_size {nbytes} alone")
    return {*shards, index_name}


def judge_format(path: Path) -> dict[str, int]:
    """tensor -> bytes; transformers loads a file only if its header says that PyTorch wrote it."""
    from safetensors import safe_open

    from slimming.check import safetensors_of

    with safe_open(str(path), framework="pt") as file:
        if file.metadata() != {"format": "pt"}:
            raise Difference(f"{path.name}: metadata {file.metadata()}, expected {{'format': 'pt'}}")
    return {stored.name: stored.nbytes for stored in safetensors_of(path)}


# --------------------------------------------------------------------------------------------------------- settings


def compare_settings(case: Case, output: Path, tensors: dict[str, Stored], tied: bool | None) -> None:
    """The fields of every settings file; one that the format doesn't know is a difference."""
    if case.sentencepiece is not None:
        compare_tokenizer_settings(case, output)
    if case.kind == "adapter":
        compare_adapter_settings(case, read_json(output / "adapter_config.json"))
        return
    config = read_json(output / "config.json")
    expect("config.json", config, expected_config(case, config, tensors, tied))
    for name in sorted(set(config) - JUDGED):
        judge_further_field("config.json", name, config[name], case.config, ("use_cache",))
    compare_generation(case, read_json(output / "generation_config.json"), config)


def expect(file: str, found: dict[str, Any], expected: dict[str, tuple]) -> None:
    """Each field holds one of the values that it may have, in type too; `...` among them: it may be absent."""
    for name, values in expected.items():
        value = found.get(name, ...)
        if not any(same(value, one) for one in values):
            shown = " or ".join("absent" if one is ... else repr(one) for one in values)
            raise Difference(f"{file}: {name} is {'absent' if value is ... else repr(value)}, expected {shown}")


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def expected_config(case: Case, config: dict, tensors: dict[str, Stored], tied: bool | None) -> dict[str, tuple]:
    """field -> values that it may have."""
    own = case.config
    expected: dict[str, tuple] = {}
    for name, default in NETWORK.items():
        value = own.get(name, own.get("num_hidden_layers") if name == "num_layers" else None)
        value = default if value is None else value
        expected[name] = (value, ..., None) if same(value, default) else (value,)
    for name in IDS:
        expected[name] = expected_id(case, name)
    expected["vocab_size"] = (len(case.kept),)
    expected["model_type"] = ("chatglm",)
    expected["architectures"] = (["ChatGLMForConditionalGeneration"],)
    expected["tie_word_embeddings"] = (tied,) if tied is not None else (own.get("tie_word_embeddings", ...), True)
    bits = case.options.bits or own.get("quantization_bit") or 0
    group = case.options.group_size if case.options.bits else own.get("quantization_group_size") or 0
    expected["quantization_bit"] = (bits,) if bits else (0, ..., None)
    expected["quantization_group_size"] = (group,) if group else (0, ..., None)
    expected["quantize_head"] = head_fields(tensors, own)
    expected["auto_map"] = (auto_map(config.get("auto_map")),)
    expected.update(expected_types(case, tensors))
    if "code_version" in config:
        expected["code_version"] = (package_version(),)
    return expected


def auto_map(found: Any) -> dict[str, str]:
    """The classes of this folder's own files; further auto classes may name one that the file has."""
    expected = dict(AUTO_MAP)
    for name, value in (found if isinstance(found, dict) else {}).items():
        file, _, class_name = value.partition(".") if isinstance(value, str) else ("", "", "")
        known = f"{file}.py" in CODE_ENTRIES and re.fullmatch(r"Auto\w+", name) and re.fullmatch(r"\w+", class_name)
        if known and f"class {class_name}(" in (PACKAGE / f"{file}.py").read_text(encoding="utf-8"):
            expected.setdefault(name, value)
    return expected


def head_fields(tensors: dict[str, Stored], own: dict) -> tuple:
    """What says how the embedding is stored: int8 with all its columns, int4 with half of them, or as floats."""
    stored = tensors.get(EMBEDDING)
    if stored is None:
        return (own.get("quantize_head", ...), False)
    if named(stored.dtype) != "int8":
        return (False, ..., 0)
    return (True, 8) if stored.shape[1] == (own.get("hidden_size") or NETWORK["hidden_size"]) else (4,)


def expected_types(case: Case, tensors: dict[str, Stored]) -> dict[str, tuple]:
    """The type that transformers loads in, under its old name or its new one: as asked, or as the source said."""
    own = case.config.get("torch_dtype", case.config.get("dtype"))
    if case.options.dtype:
        values: tuple = (case.options.dtype,)
    elif own in FLOAT_TYPES:
        values = (own,)
    else:
        values = (..., None, *sorted({named(stored.dtype) for stored in tensors.values()} & set(FLOAT_TYPES)))
    return {"torch_dtype": (*values, ...), "dtype": (*values, ...)}


def package_version() -> Any:
    match = re.search(r"^CODE_VERSION\b.*?= *(.+?) *(#.*)?$", (PACKAGE / CODE_ENTRIES[0]).read_text(), re.MULTILINE)
    return match[1].strip("\"'") if match and match[1][0] in "\"'" else int(match[1]) if match else None


def expected_id(case: Case, name: str) -> tuple:
    """An id field of the source 20,000 lower, or where its row went; the piece's own place if the source has none."""
    value, pieces = case.config.get(name), case.sentencepiece
    place = piece_id(case, IDS[name]) if pieces is not None else None
    if name == "pad_token_id" and isinstance(value, int) and value < case.offset and place is not None:
        return (place,)  # the first code's default, 0, was an image row
    if value is None:
        return (place,) if place is not None else (..., None)
    return (moved(case, value),)


def piece_id(case: Case, piece: str) -> int | None:
    """The id in the output of a piece: the first release's file lacks the 344 last ones, which stood behind it."""
    found = case.sentencepiece.piece_to_id(piece)
    if found == case.sentencepiece.unk_id():
        later = [text for text, _ in later_pieces()]
        found = case.sentencepiece.get_piece_size() + later.index(piece)
    return case.new_id(found + case.offset)


def moved(case: Case, value: Any) -> Any:
    if isinstance(value, list):
        return [moved(case, one) for one in value]
    return case.new_id(value) if isinstance(value, int) and not isinstance(value, bool) else value


def judge_further_field(file: str, name: str, value: Any, own: dict[str, Any], known: tuple[str, ...]) -> None:
    """A field beside those of the network is one of a few, with the source's value, or known text."""
    if name in FURTHER_TEXTS and isinstance(value, str) and re.fullmatch(FURTHER_TEXTS[name], value):
        return
    if name not in known:
        raise Difference(f"{file}: {name} is {value!r:.80}, a field that the format doesn't know")
    expect(file, {name: value}, {name: (own.get(name, ...),)})


def compare_generation(case: Case, found: dict[str, Any], config: dict[str, Any]) -> None:
    """The source's own settings with moved ids, which its config.json overrules; or the package's, with those ids."""
    path = case.source / "generation_config.json"
    own = read_json(path) if path.exists() else read_json(PACKAGE / "generation_config.json")
    expected: dict[str, tuple] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = own.get(name)
        overruled = isinstance(value, int) and isinstance(case.config.get(name), int) or not path.exists()
        if overruled:
            expected[name] = (config.get(name, ...), *((...,) if name not in case.config else ()))
        elif value is None:
            expected[name] = (..., None, config.get(name))
        elif name == "pad_token_id" and isinstance(value, int) and value < case.offset:
            expected[name] = (config.get(name),)
        else:
            expected[name] = (moved(case, value),)
    for name in (*SWITCHES, *COUNTS, *NUMBERS):
        if is_setting(name, own.get(name)):
            expected[name] = (own[name],)
    expect("generation_config.json", found, expected)
    for name in sorted(set(found) - set(expected)):
        judge_further_field("generation_config.json", name, found[name], own, (*NUMBERS, *SWITCHES, *COUNTS, *RARE))


def is_setting(name: str, value: Any) -> bool:
    """Whether a source's choice about sampling is one, so that it must stay."""
    if name in SWITCHES:
        return isinstance(value, bool)
    return (
        type(value) is int and 0 <= value < 2**31 or name in NUMBERS and isinstance(value, float) and 0 <= value < 1e9
    )


def compare_tokenizer_settings(case: Case, output: Path) -> None:
    """The package's settings, but for choices about text that the source may have made."""
    found, package = (read_json(folder / "tokenizer_config.json") for folder in (output, PACKAGE))
    path = case.source / "tokenizer_config.json"
    own = read_json(path) if path.exists() else {}
    expected = {name: (package.get(name, ...),) for name in {*found, *package}}
    for name, kind in TEXT_CHOICES.items():
        if name in own and isinstance(own[name], kind) and isinstance(own[name], bool) == (kind is bool):
            expected[name] = (own[name],)
    expect("tokenizer_config.json", found, dict(sorted(expected.items())))


def compare_adapter_settings(case: Case, found: dict[str, Any]) -> None:
    """The adapter's own fields; its base is the one that was asked for, its token ids moved."""
    own = dict(case.config)
    if case.options.base:
        own["base_model_name_or_path"] = case.options.base
    indices = own.get("trainable_token_indices")
    if indices is not None:
        pairs = indices.items() if isinstance(indices, dict) else ()
        own["trainable_token_indices"] = {k: moved(case, v) for k, v in pairs} if pairs else moved(case, indices)
    needed = {*LORA_NUMBERS, "base_model_name_or_path", "trainable_token_indices"}
    names = sorted(set(found) | needed & set(own))
    expect("adapter_config.json", found, {name: (own.get(name, ...),) for name in names})


# -------------------------------------------------------------------------------------------------------- tokenizer


def compare_tokenizer(case: Case, output: Path) -> int:
    """ice_text.model byte for byte: the source's, completed, without pieces whose rows went; number of strings whose
    ids were compared.
    """
    import sentencepiece

    if case.sentencepiece is None:
        return 0
    source, found = case.tokenizer_file.read_bytes(), (output / "ice_text.model").read_bytes()
    expected = completed(case, source)
    if case.is_trimmed:
        kept = {int(row) - case.offset for row in case.kept}
        expected = b"".join(part for index, part in numbered_pieces(expected) if index is None or index in kept)
    compare_bytes("ice_text.model", found, expected, f"the source's {case.tokenizer_file.name}, completed")
    processor = sentencepiece.SentencePieceProcessor(model_proto=found)
    judge_pieces(case, processor)
    compare_fast(case, output, processor)
    return compare_strings(case, processor, hashlib.sha256(found).hexdigest())


def judge_pieces(case: Case, processor: Any) -> None:
    """Each piece has the row of the same piece of the source; rows behind the pieces have none."""
    own, size = case.sentencepiece, processor.get_piece_size()
    if size > len(case.kept):
        raise Difference(f"ice_text.model has {size} pieces, {len(case.kept)} rows")
    later = [text for text, _ in later_pieces()]
    for text in ("<s>", "</s>", "<pad>", "<n>", *later):
        if piece_id(case, text) is None:
            raise Difference(f"ice_text.model: {text}, which every text may need, has lost its row")
    for index, row in enumerate(case.kept[:size].tolist()):
        old = row - case.offset
        text = own.id_to_piece(old) if old < own.get_piece_size() else later[old - own.get_piece_size()]
        if processor.id_to_piece(index) != text:
            raise Difference(f"ice_text.model: piece {index} is {processor.id_to_piece(index)!r}, expected {text!r}")


def compare_strings(case: Case, processor: Any, digest: str) -> int:
    """Built-in strings, and the corpus that pieces were kept for, encode to the ids of the source, 20,000 lower or
    where the rows went; returns how many.
    """
    compared, needed = 0, corpus_lines(case.options)
    for text in (*STRINGS, *needed):
        old = case.sentencepiece.encode(text)
        expected = [case.new_id(index + case.offset) for index in old]
        if case.sentencepiece.unk_id() in old or None in expected and text not in needed:
            continue  # spelled by other pieces or by bytes now
        if processor.encode(text) != expected:
            raise Difference(f"ice_text.model: {text[:60]!r} is {processor.encode(text)}, expected {expected}")
        compared += 1
    if digest == PUBLISHED_SHA256 and processor.encode("你好") != [5, 74874]:
        raise Difference(f"ice_text.model: '你好' is {processor.encode('你好')}, published is [5, 74874]")
    return compared


def compare_fast(case: Case, output: Path, processor: Any) -> None:
    """tokenizer.json has the pieces and scores, and its own library reads the ids of the strings from it."""
    if not case.options.fast_tokenizer:
        return
    import tokenizers

    rows = read_json(output / "tokenizer.json")["model"]["vocab"]
    pieces = [[processor.id_to_piece(row), processor.get_score(row)] for row in range(processor.get_piece_size())]
    for row, (found, expected) in enumerate(zip_longest(rows, pieces)):
        if found != expected:
            raise Difference(f"tokenizer.json: piece {row} is {found}, expected {expected}")
    fast = tokenizers.Tokenizer.from_file(str(output / "tokenizer.json"))
    for text in (one.lower() for one in STRINGS if "  " not in one):  # whatever becomes of capitals and blanks
        expected, found = processor.encode(text), fast.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise Difference(f"tokenizer.json: {text!r} is {found}, expected {expected}")


def corpus_lines(options: Options) -> list[str]:
    """Lines whose pieces must all be there; those with tabs or rows of blanks, which have pieces of their own, not."""
    if options.corpus is None or options.min_count > 1:
        return []
    with open(options.corpus, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\r\n") for line in islice(file, CORPUS_LINES)]
    return [line for line in lines if line.strip() == line and "  " not in line and "\t" not in line]


def later_pieces() -> list[tuple[str, int]]:
    """(text, type) of the 344 pieces that the first release's code added: control 3, user-defined 4, byte 6."""
    control = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
    spelled = ("<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81)))
    return [(t, 3) for t in control] + [(t, 4) for t in spelled] + [(f"<0x{byte:02X}>", 6) for byte in range(256)]


def completed(case: Case, source: bytes) -> bytes:
    """The first release's file with its later pieces and `byte_fallback` (field 35 of the trainer's settings) on."""
    if case.sentencepiece.piece_to_id("<sop>") != case.sentencepiece.unk_id():
        return source
    entries = []
    for text, kind in later_pieces():
        entry = delimited(1, text.encode()) + b"\x15\0\0\0\0" + bytes((3 << 3, kind))  # text, score 0.0, type
        entries.append(delimited(1, entry))
    parts = []
    for number, part in fields(source):
        if number == 2:
            trainer = list(fields(part[len(part) - payload_length(part) :]))
            before = b"".join(p for n, p in trainer if n < 35)
            after = b"".join(p for n, p in trainer if n > 35)
            parts += [*entries, delimited(2, before + b"\x98\x02\x01" + after)]
        else:
            parts.append(part)
    return b"".join(parts)


def numbered_pieces(model: bytes) -> Iterator[tuple[int | None, bytes]]:
    """(number of the piece, None for anything else, and its bytes) of a SentencePiece file."""
    index = 0
    for number, part in fields(model):
        yield (index if number == 1 else None), part
        index += number == 1


def delimited(number: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes((size & 127 | 128,)), size >> 7
    return bytes((number << 3 | 2,)) + length + bytes((size,)) + content


def payload_length(field: bytes) -> int:
    """Of a length-delimited field with a one-byte key."""
    return varint(field, 1)[0]


def varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while data[place] > 127:
        value, shift, place = value | (data[place] & 127) << shift, shift + 7, place + 1
    return value | data[place] << shift, place + 1


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, bytes with key and length) of the fields of a protobuf message."""
    place = 0
    while place < len(message):
        begin = place
        key, place = varint(message, place)
        if key & 7 == 0:
            _, place = varint(message, place)
        elif key & 7 == 2:
            length, place = varint(message, place)
            place += length
        else:
            place += {1: 8, 5: 4}[key & 7]
        yield key >> 3, message[begin:place]
