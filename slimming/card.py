"""The README.md of an output: a model card of what is known about it, and nothing else."""

from __future__ import annotations

import re

from package import package_module
from slimming.plan import Options, Plan

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ORIGINAL = "THUDM/chatglm-6b"
ORIGINAL_SIZES = {"hidden_size": 4096, "num_layers": 28, "inner_hidden_size": 16384}  # also of a config that is silent
TITLES = {
    "model": "ChatGLM-6B-Slim",
    "prefix": "P-tuning v2 prefix for ChatGLM-6B-Slim",
    "adapter": "LoRA adapter for ChatGLM-6B-Slim",
}
TAGS = {
    "model": ("chatglm", "custom_code"),
    "prefix": ("chatglm", "custom_code", "p-tuning"),
    "adapter": ("chatglm", "lora"),
}
PACKAGES = '"torch>=2.13" "transformers>=4.23.1,<6" "sentencepiece>=0.2.0" "accelerate>=0.26"'  # as in pyproject.toml
ENGINE = (
    "On an x86-64 CPU answers come faster with `chatglm_cpu`: `pip install ./cpu` in a clone of the ChatGLM-6B-Slim "
    "repository."
)


def model_card(plan: Plan, options: Options, name: str) -> str:
    """Front matter as the Hub reads it, what was changed, how to load it, whose licence it has.

    Args:
        name: what a program gives to from_pretrained: the repository, or the folder's name.
    """
    kind = plan.source.kind
    parts = [front_matter(plan, options), f"# {TITLES[kind]}", changes(plan), *usage(kind, name)]
    if plan.vocabulary.figures:
        parts.append(
            f"Trimmed vocabulary: {plan.vocabulary.figures}. `vocabulary_map.json` lists the rows that are left."
        )
    parts.append(license_text(plan))
    return "\n\n".join(parts) + "\n"


def facts():
    """The file of the package that knows version and licence, once it is needed: `slim.py --help` does not wait."""
    return package_module("configuration_chatglm")


def is_original_size(plan: Plan) -> bool:
    config = plan.source.config
    return all(config.get(field, size) == size for field, size in ORIGINAL_SIZES.items())


def base_of(plan: Plan, options: Options) -> str | None:
    """The Hub id of what it was made from or for, where that is known."""
    candidates = [options.base if plan.source.kind == "adapter" else None, plan.source.name]
    found = next((one for one in candidates if one and HUB_ID.fullmatch(one) and one.count("/") == 1), None)
    return found or (ORIGINAL if plan.source.kind != "adapter" and is_original_size(plan) else None)


def front_matter(plan: Plan, options: Options) -> str:
    """What the Hub reads; a field that is not known is left out."""
    kind, base = plan.source.kind, base_of(plan, options)
    relation = "adapter" if kind != "model" else "quantized" if options.bits else None
    known = holds_original_weights(plan)
    fields = {"license": known and "other", "license_name": known and facts().LICENSE_NAME}
    fields.update(license_link=known and license_link(plan))
    fields.update(library_name="peft" if kind == "adapter" else "transformers", pipeline_tag="text-generation")
    fields.update(base_model=base, base_model_relation=base and relation)
    lines = [f"{name}: {value}" for name, value in fields.items() if value]
    tags = [f"- {tag}" for tag in TAGS[kind]]
    return "\n".join(["---", "language:", "- zh", "- en", *lines, "tags:", *tags, "---"])


def holds_original_weights(plan: Plan) -> bool:
    """Whether the licence of ChatGLM-6B's weights is known to apply: it came with them, or they have its sizes."""
    return plan.source.kind == "model" and (plan.source.license is not None or is_original_size(plan))


def license_link(plan: Plan) -> str:
    """The licence that lies beside the card, else the published one."""
    return (
        "MODEL_LICENSE" if plan.source.license is not None and plan.source.kind != "adapter" else facts().LICENSE_LINK
    )


def changes(plan: Plan) -> str:
    """What `slim.py` did to the source."""
    vocabulary, cut = plan.vocabulary, plan.vocabulary.source_rows - plan.vocabulary.rows
    copied = all(not job.bits and job.dtype == job.source.dtype for job in plan.jobs)
    if not cut or not any(job.axis is not None for job in plan.jobs):
        how = "the source's, bit for bit" if copied else "the source's, converted or quantized as config.json says"
        return f"Made by `slim.py`: the numbers are {how}; token ids are those of the slim vocabulary."
    images = min(vocabulary.offset, cut)
    which = f" ({images:,} of them image tokens, which no text uses)" if images else ""
    how = "bit for bit" if copied else "converted or quantized as config.json says"
    return (
        f"Made by `slim.py`: {cut:,} of {vocabulary.source_rows:,} vocabulary rows were cut{which}, "
        f"{vocabulary.rows:,} are left. All other numbers are those of the source, {how}; token ids are lower by the "
        "rows that were cut before them."
    )


def usage(kind: str, name: str) -> list[str]:
    """The install line, and code that loads the folder."""
    packages = f"{PACKAGES} peft" if kind == "adapter" else PACKAGES
    load = f'.from_pretrained("{literal(name)}", trust_remote_code=True)'
    code = [
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer{load}",
        f"model = AutoModel{load}.eval()",
        'response, history = model.chat(tokenizer, "你好", history=[])',
    ]
    if kind == "adapter":
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModel",
            "",
            'base = AutoModel.from_pretrained("SLIM_MODEL", trust_remote_code=True)  # the slim model it is for',
            f'model = PeftModel.from_pretrained(base, "{literal(name)}")',
        ]
    elif kind == "prefix":
        code = [
            "from safetensors.torch import load_file",
            "from transformers import AutoConfig, AutoModel",
            "",
            f"config = AutoConfig{load}",
            'model = AutoModel.from_pretrained("SLIM_MODEL", config=config, trust_remote_code=True)  # it is for',
            f'model.load_state_dict(load_file("{literal(name)}/model.safetensors"), strict=False)  # of this folder',
        ]
    blocks = [f"```sh\npip install {packages}\n```", ENGINE, "\n".join(["```python", *code, "```"])]
    trust = (
        "`trust_remote_code=True` runs the `.py` files of this folder; they are the code of ChatGLM-6B-Slim, version "
        f"{facts().CODE_VERSION}."
    )
    return [*blocks, trust] if kind == "model" else blocks


def literal(name: str) -> str:
    """A name inside the quotes of a Python string, on one line of a code block."""
    return "".join(c if c.isprintable() and c not in '"\\`' else f"\\u{ord(c):04x}" for c in name)


def license_text(plan: Plan) -> str:
    license_of = f"have a licence of their own: [{facts().LICENSE_NAME}]({license_link(plan)})."
    code = "" if plan.source.kind == "adapter" else " The code in this folder is under Apache-2.0 (`LICENSE`)."
    if holds_original_weights(plan):
        return f"The weights of ChatGLM-6B {license_of}{code}"
    what = "these" if plan.source.kind == "model" else f"this {plan.source.kind}"
    return f"The weights of ChatGLM-6B, which {what} may be made from or need, {license_of}{code}"
