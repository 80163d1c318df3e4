"""Everything of an output folder but the weights: config, ids, tokenizer, code, index, model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from package import ROOT as PACKAGE
from package import copy_package, package_module
from slimming import checkpoint_io as io
from slimming.card import model_card
from slimming.checkpoint_io import Exit, Refusal
from slimming.fast_tokenizer import FAST_FILE, tokenizer_json
from slimming.plan import EMBEDDING, IDS, VOCAB_FILE, Options, Plan, Vocabulary
from slimming.settings import IDENTITY

ID_MAP = "vocabulary_map.json"
PAD_PIECE = "<pad>"


def write_folder(folder: Path, plan: Plan, options: Options, name: str) -> None:
    """Writes all that belongs beside the shards; the card calls the folder `name`."""
    if plan.source.kind == "adapter":
        write_json(folder / "adapter_config.json", adapter_config(plan, options))
    else:
        write_json(folder / "config.json", model_config(plan, options))
        write_json(folder / "generation_config.json", generation_config(plan))
        copy_package(folder, tokenizer=False)
        copy_licenses(plan, folder)
    if plan.vocabulary.sentencepiece is not None:
        write_tokenizer(folder, plan, options)
    if len(plan.shards) > 1:
        write_json(folder / "model.safetensors.index.json", shard_index(plan))
    if plan.vocabulary.figures:  # trimming was asked for, and may have found nothing to cut
        write_json(folder / ID_MAP, id_map(plan.vocabulary), indent=None)
    io.write_file(folder / "README.md", model_card(plan, options, name))


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    io.write_file(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def copy(path: Path, folder: Path) -> None:
    io.write_file(folder / path.name, path.read_bytes())


def copy_licenses(plan: Plan, folder: Path) -> None:
    """The code's licence is the package's, the weights' own comes with them."""
    if (PACKAGE / "LICENSE").is_file():
        copy(PACKAGE / "LICENSE", folder)
    if plan.source.license is not None:
        io.write_file(folder / "MODEL_LICENSE", plan.source.license)


# ------------------------------------------------------------------------------------------------------------- ids


def moved_id(plan: Plan, name: str, value: Any) -> Any:
    """An id field, or a list of ids, in the output's numbering; None for a row that goes and that no code needs."""
    if isinstance(value, list):
        return [moved_id(plan, name, one) for one in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    pieces = plan.source.pieces
    if name == "pad_token_id" and value < plan.vocabulary.offset and pieces:
        value = pieces[PAD_PIECE] + plan.vocabulary.offset  # the first code's default, 0, was an image row
    moved = plan.vocabulary.new_id(value)
    if moved is None and name in (*IDS, "pad_token_id"):
        raise Refusal(Exit.WRONG_TOKENIZER, f"{name} is {value}, a row that goes: correct the config of the source")
    return moved


def moved_ids(plan: Plan, content: dict[str, Any]) -> dict[str, Any]:
    moved = {name: moved_id(plan, name, value) for name, value in content.items() if name.endswith("_token_id")}
    return {**content, **moved}


def id_table(plan: Plan) -> list[tuple[str, int, int]]:
    """(what, id in the source, id in the output) of the config's tokens."""
    pieces = plan.source.pieces
    if pieces is None:
        config = plan.source.config
        fields = [name for name in (*IDS, "pad_token_id") if isinstance(config.get(name), int)]
        return [(name, config[name], moved_id(plan, name, config[name])) for name in fields]
    named = {
        **{piece: field for field, piece in IDS.items()},
        PAD_PIECE: "pad_token_id",
        "</s>": "",
        "<n>": "",
        "▁": "",
    }
    olds = {piece: pieces[piece] + plan.vocabulary.offset for piece in named if piece in pieces}
    return [(f"{piece} {named[piece]}".strip(), old, moved_id(plan, piece, old)) for piece, old in olds.items()]


def id_map(vocabulary: Vocabulary) -> dict[str, Any]:
    """Row of the output -> row of the source, as half-open runs of source rows in order."""
    return {"source_rows": vocabulary.source_rows, "rows": vocabulary.rows, "kept_runs": vocabulary.runs}


# --------------------------------------------------------------------------------------------------------- configs


def package_json(name: str) -> dict[str, Any]:
    return json.loads((PACKAGE / name).read_text(encoding="utf-8"))


def model_config(plan: Plan, options: Options) -> dict[str, Any]:
    """The source's fields with moved ids, this package's classes and the facts found about the weights."""
    package = package_json("config.json")
    config = moved_ids(plan, plan.source.config)
    if plan.source.pieces is not None:
        for name, piece in {**IDS, "pad_token_id": PAD_PIECE}.items():
            config.setdefault(name, moved_id(plan, name, plan.source.pieces[piece] + plan.vocabulary.offset))
    config["vocab_size"] = plan.vocabulary.rows
    config.update({name: package[name] for name in IDENTITY if name in package})
    config["code_version"] = package_module("configuration_chatglm").CODE_VERSION
    config.setdefault("transformers_version", package["transformers_version"])
    if plan.tied is not None:
        config["tie_word_embeddings"] = plan.tied
    if options.dtype:
        config["torch_dtype"] = options.dtype
        config.pop("dtype", None)  # transformers 5's name for the same field
    if options.bits:
        config["quantization_bit"], config["quantization_group_size"] = options.bits, options.group_size
    config.pop("quantization_embeddings", None)  # the same layout under the name of the official int4 code
    made = {name: dtype for job in plan.jobs for name, dtype, _ in job.outputs}
    if made.get(EMBEDDING) == "I8":
        config["quantize_head"] = 4 if plan.source.head_bits == 4 else True
    else:
        config.pop("quantize_head", None)
    return config


def generation_config(plan: Plan) -> dict[str, Any]:
    """The source's with moved ids, or the package's with the ids of the config."""
    own, content = plan.source.config, plan.source.generation
    if content is not None:
        agreed = {key: own[key] for key in content if isinstance(content[key], int) and isinstance(own.get(key), int)}
        return moved_ids(plan, {**content, **{key: agreed[key] for key in agreed if key.endswith("_token_id")}})
    package, config = package_json("generation_config.json"), moved_ids(plan, own)
    return {**package, **{key: config[key] for key in package if key.endswith("_token_id") and key in config}}


def write_tokenizer(folder: Path, plan: Plan, options: Options) -> None:
    """SentencePiece model, chat template, and the package's settings with the source's choices about text; on request
    the same once more as tokenizer.json."""
    model = plan.vocabulary.sentencepiece or b""
    io.write_file(folder / VOCAB_FILE, model)
    if options.fast_tokenizer:
        io.write_file(folder / FAST_FILE, tokenizer_json(model, plan.source.text_choices))
    copy(PACKAGE / "chat_template.jinja", folder)
    write_json(folder / "tokenizer_config.json", {**package_json("tokenizer_config.json"), **plan.source.text_choices})


def adapter_config(plan: Plan, options: Options) -> dict[str, Any]:
    """The adapter's own config, for the slim base: a new reference if `--base` gives one, and moved token ids."""
    config = dict(plan.source.config)
    if options.base:
        config["base_model_name_or_path"] = options.base
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        config["trainable_token_indices"] = {k: moved_id(plan, k, ids) for k, ids in indices.items()}
    elif indices is not None:
        config["trainable_token_indices"] = moved_id(plan, "trainable_token_indices", indices)
    return config


def shard_index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: file for file, jobs in plan.shards.items() for job in jobs for name, _, _ in job.outputs}
    return {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
