"""Everything of an output folder but the weights: config, ids, tokenizer, code, index, model card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from package import ROOT as PACKAGE
from package import package_files
from slimming import checkpoint_io as io
from slimming.checkpoint_io import Exit, Refusal
from slimming.plan import EMBEDDING, IDS, VOCAB_FILE, Options, Plan, Vocabulary

ID_MAP = "vocabulary_map.json"
PAD_PIECE = "<pad>"
TOKENIZER_CHOICES = ("do_lower_case", "remove_space", "model_max_length", "clean_up_tokenization_spaces")


def write_folder(folder: Path, plan: Plan, options: Options) -> None:
    """Writes all that belongs beside the shards."""
    if plan.source.kind == "adapter":
        write_json(folder / "adapter_config.json", adapter_config(plan, options))
    else:
        write_json(folder / "config.json", model_config(plan, options))
        write_json(folder / "generation_config.json", generation_config(plan))
        for path in package_files():
            shutil.copyfile(path, folder / path.name)
        copy_licenses(plan, folder)
    if plan.vocabulary.sentencepiece is not None:
        write_tokenizer(folder, plan)
    if len(plan.shards) > 1:
        write_json(folder / "model.safetensors.index.json", shard_index(plan))
    if plan.vocabulary.is_trimmed:
        write_json(folder / ID_MAP, id_map(plan.vocabulary), indent=None)
    (folder / "README.md").write_text(model_card(plan), encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_licenses(plan: Plan, folder: Path) -> None:
    """The code's licence is the package's, the weights' own comes with them."""
    if (PACKAGE / "LICENSE").is_file():
        shutil.copyfile(PACKAGE / "LICENSE", folder / "LICENSE")
    if (plan.source.folder / "MODEL_LICENSE").is_file():
        shutil.copyfile(io.checked_file(plan.source.folder, "MODEL_LICENSE"), folder / "MODEL_LICENSE")


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


def model_config(plan: Plan, options: Options) -> dict[str, Any]:
    """The source's config with moved ids, this package's classes and the facts found about the weights."""
    package = json.loads((PACKAGE / "config.json").read_text(encoding="utf-8"))
    config = moved_ids(plan, plan.source.config)
    if plan.source.pieces is not None:
        for name, piece in {**IDS, "pad_token_id": PAD_PIECE}.items():
            config.setdefault(name, moved_id(plan, name, plan.source.pieces[piece] + plan.vocabulary.offset))
    config["vocab_size"] = plan.vocabulary.rows
    config["auto_map"], config["architectures"] = package["auto_map"], package["architectures"]
    config["model_type"] = package["model_type"]
    if plan.tied is not None:
        config["tie_word_embeddings"] = plan.tied
    if options.dtype:
        config["torch_dtype"] = options.dtype
        config.pop("dtype", None)  # transformers 5's name for the same field
    if options.bits:
        config["quantization_bit"], config["quantization_group_size"] = options.bits, options.group_size
    if any(name == EMBEDDING and dtype == "I8" for job in plan.jobs for name, dtype, _ in job.outputs):
        config["quantize_head"] = True
        config.pop("quantization_embeddings", None)  # the same layout under the name of the discontinued code
    return config


def generation_config(plan: Plan) -> dict[str, Any]:
    """The source's with moved ids, or the package's with the ids of the config."""
    name, own = "generation_config.json", plan.source.config
    if (plan.source.folder / name).exists():
        content = io.read_json(plan.source.folder, name)
        agreed = {key: own[key] for key in content if isinstance(content[key], int) and isinstance(own.get(key), int)}
        return moved_ids(plan, {**content, **{key: agreed[key] for key in agreed if key.endswith("_token_id")}})
    package, config = json.loads((PACKAGE / name).read_text(encoding="utf-8")), moved_ids(plan, own)
    return {**package, **{key: config[key] for key in package if key.endswith("_token_id") and key in config}}


def write_tokenizer(folder: Path, plan: Plan) -> None:
    """SentencePiece model, chat template, and the package's settings with the source's choices about text."""
    (folder / VOCAB_FILE).write_bytes(plan.vocabulary.sentencepiece or b"")
    shutil.copyfile(PACKAGE / "chat_template.jinja", folder / "chat_template.jinja")
    settings = json.loads((PACKAGE / "tokenizer_config.json").read_text(encoding="utf-8"))
    if (plan.source.folder / "tokenizer_config.json").exists():
        own = io.read_json(plan.source.folder, "tokenizer_config.json")
        settings.update({name: own[name] for name in TOKENIZER_CHOICES if name in own})
    write_json(folder / "tokenizer_config.json", settings)


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


# ------------------------------------------------------------------------------------------------------- the card


def model_card(plan: Plan) -> str:
    base = plan.source.name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", plan.source.name) else None
    header = ["---", "language:", "- zh", "- en", "license: other", "library_name: transformers"]
    header += ["pipeline_tag: text-generation", "tags:", "- chatglm", "- custom_code"]
    header += [f"base_model: {base}"] if base else []
    title = {"model": "ChatGLM-6B-Slim", "prefix": "P-tuning v2 prefix for ChatGLM-6B-Slim"}
    lines = [*header, "---", "", f"# {title.get(plan.source.kind, 'LoRA adapter for ChatGLM-6B-Slim')}", ""]
    lines += [changes(plan), "", *usage(plan), ""]
    if plan.vocabulary.figures:
        lines += [f"Trimmed vocabulary: {plan.vocabulary.figures}. `{ID_MAP}` lists the kept rows.", ""]
    if plan.source.kind != "adapter":
        lines += ["The code is under Apache-2.0; the weights stay under the licence they came with.", ""]
    return "\n".join(lines)


def changes(plan: Plan) -> str:
    vocabulary, cut = plan.vocabulary, plan.vocabulary.source_rows - plan.vocabulary.rows
    if not any(job.axis is not None for job in plan.jobs):
        return "The tensors are those of the source, bit for bit; ids are those of the slim vocabulary."
    kept = "all other numbers are those of the source"
    copied = all(not job.bits and job.dtype == job.source.dtype for job in plan.jobs)
    how = "bit for bit" if copied else "converted or quantized as config.json says"
    return (
        f"Made by `slim.py`: {cut:,} of {vocabulary.source_rows:,} vocabulary rows were cut "
        f"({min(vocabulary.offset, cut):,} image tokens that no text uses), {vocabulary.rows:,} are left; "
        f"{kept}, {how}."
    )


def usage(plan: Plan) -> list[str]:
    """Code that loads the folder."""
    if plan.source.kind == "adapter":
        code = ["from peft import PeftModel", "", 'model = PeftModel.from_pretrained(slim_base_model, "THIS_FOLDER")']
    elif plan.source.kind == "prefix":
        code = [
            "from safetensors.torch import load_file",
            "from transformers import AutoConfig, AutoModel",
            "",
            'config = AutoConfig.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
            'model = AutoModel.from_pretrained("SLIM_MODEL", config=config, trust_remote_code=True)',
            'model.load_state_dict(load_file("THIS_FOLDER/model.safetensors"), strict=False)',
        ]
    else:
        code = [
            "from transformers import AutoModel, AutoTokenizer",
            "",
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
            'model = AutoModel.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
            'response, history = model.chat(tokenizer, "你好", history=[])',
        ]
    return ["```python", *code, "```"]
