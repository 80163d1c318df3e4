"""The files of the model's code, for the scripts of this repository: which they are, and how to import one."""

from __future__ import annotations

import ast
import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENTRY_FILES = ("configuration_chatglm.py", "tokenization_chatglm.py", "modeling_chatglm.py")


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


def package_module(name: str) -> types.ModuleType:
    """A file of the package, which imports its neighbours relatively, as a module of a package."""
    if "chatglm_slim" not in sys.modules:
        package = types.ModuleType("chatglm_slim")
        package.__path__ = [str(ROOT)]
        sys.modules["chatglm_slim"] = package
    return importlib.import_module(f"chatglm_slim.{name}")
