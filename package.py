"""The files of the model's code, for the scripts of this repository: which they are, how to copy and import them."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENTRY_FILES = ("configuration_chatglm.py", "tokenization_chatglm.py", "modeling_chatglm.py")
SETTINGS = ("tokenizer_config.json", "chat_template.jinja")  # that go with the code, whatever the weights


def package_files() -> list[Path]:
    """What transformers loads, and every file those import relatively.

    Raises:
        FileNotFoundError: a file is missing.
    """
    found: dict[str, Path] = {}
    names = list(ENTRY_FILES)
    while names:
        name = names.pop()
        if name in found:
            continue
        path = found[name] = ROOT / name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                names += [f"{module.split('.')[0]}.py" for module in modules]
    return sorted(found.values())


def copy_package(folder: Path, tokenizer: bool = True) -> list[str]:
    """Makes `folder` a model's folder of this code but for config, vocabulary and weights; the names of the files.

    A config.json that is there is told the version of the code beside it. Without `tokenizer` its settings stay away.
    """
    names = [*(path.name for path in package_files()), *(SETTINGS if tokenizer else ())]
    for name in names:
        shutil.copyfile(ROOT / name, folder / name)
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["code_version"] = package_module("configuration_chatglm").CODE_VERSION
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    return names


def package_module(name: str) -> types.ModuleType:
    """A file of the package, which imports its neighbours relatively, as a module of a package."""
    find_engine()
    if "chatglm_slim" not in sys.modules:
        package = types.ModuleType("chatglm_slim")
        package.__path__ = [str(ROOT)]
        sys.modules["chatglm_slim"] = package
    return importlib.import_module(f"chatglm_slim.{name}")


def find_engine() -> None:
    """Where chatglm_cpu is not installed, it is found in this clone."""
    if str(ROOT / "cpu") not in sys.path:
        sys.path.append(str(ROOT / "cpu"))


def engine_module(name: str = "") -> types.ModuleType:
    """chatglm_cpu, or a file of it."""
    find_engine()
    return importlib.import_module(f"chatglm_cpu.{name}" if name else "chatglm_cpu")
