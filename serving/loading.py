"""Loading a model for a person: what a name means, said in one line where it means nothing, and what was loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")
HUB_PATIENCE = 10  # seconds


def load(
    name: str, dtype: str | None = None, bits: int = 0, device: str | None = None, huge_pages: bool = False
) -> tuple:
    """Tokenizer and model of a folder or of the Hub, ready to answer; says what it loads and what it got.

    Args:
        dtype: of DTYPES; None for the checkpoint's own.
        bits: 4 or 8 quantizes the weights; 0 leaves them.
        device: cpu, cuda, cuda:1, mps; None takes the first GPU, else the CPU.
        huge_pages: copy the weights to 2 MiB pages of this process, which a CPU reads faster; ordinary ones where the
            system has none.

    Raises:
        ValueError: there is no such model, or no such device; other errors are those of transformers.
    """
    print(f"loading {name} …", flush=True)
    where = find(name)
    import torch  # both are slow to import: after --help, a sign of life and what can be wrong
    from transformers import AutoModel, AutoTokenizer

    device = usable_device(device)
    move_to_huge_pages = mover_to_huge_pages(device) if huge_pages else None
    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=True)
    model = AutoModel.from_pretrained(**where, trust_remote_code=True).eval()
    if dtype:
        model = model.to(getattr(torch, dtype))
    if bits:
        model = model.quantize(bits)
    model = model.to(device)
    if move_to_huge_pages is not None:
        move_to_huge_pages(model)
    print(describe(model), flush=True)
    return tokenizer, model


def mover_to_huge_pages(device: str) -> Callable:
    """The engine's function; ValueError without it, in an old one too, and for weights that are not on the CPU."""
    if device.partition(":")[0] != "cpu":
        raise ValueError(f"huge pages are for weights on the CPU, and these would be on {device}")
    try:
        from chatglm_cpu import move_to_huge_pages
    except ImportError as error:
        raise ValueError("huge pages come with the CPU engine: pip install ./cpu in a clone") from error
    return move_to_huge_pages


def usable_device(asked: str | None) -> str:
    """The device asked for, else the first GPU, else the CPU; ValueError where this PyTorch cannot use it."""
    import torch

    if asked is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: built without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {asked!r} is of no use here: {reason}") from error
    return asked


def find(name: str) -> dict:
    """What `name` means, as arguments of from_pretrained: a folder, or a model of the Hub.

    Judged before transformers is asked, which answers a mistyped path with minutes of retries or with a message about
    something else. ValueError says what is wrong and what helps.
    """
    folder = Path(name).expanduser()
    if not name:
        raise ValueError("the name is empty; give a folder or the id of a model on the Hub")
    if folder.is_dir():
        refuse_incomplete(folder)
        return {"pretrained_model_name_or_path": str(folder)}
    if folder.exists():
        raise ValueError("this is a file; give the folder that it lies in")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) or name.startswith("."):
        raise ValueError("there is no such folder")
    return find_on_hub(name)


def refuse_incomplete(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError("there is no config.json in this folder, so it is none of a model")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(
            f"there is no tokenizer_config.json in this folder: `python slim.py {folder} OUTPUT --repackage` makes a "
            "complete one of it (with the ice_text.model of ChatGLM-6B in it)"
        )


def find_on_hub(name: str) -> dict:
    """One short question to the Hub; without an answer, what an earlier download left in the cache."""
    import huggingface_hub
    from huggingface_hub.utils import HfHubHTTPError

    arguments = {"pretrained_model_name_or_path": name}
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_PATIENCE)
    except HfHubHTTPError as error:
        reason = str(error).strip().partition("\n")[0]
        if getattr(error.response, "status_code", 500) in (401, 403, 404):
            message = f"there is no folder of this name here, and no model on the Hub that you may read ({reason})"
            raise ValueError(message) from error
    except Exception as error:  # each version has its own for no network, for a time-out and for HF_HUB_OFFLINE
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    else:
        return arguments
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        print("the Hub does not answer: this is the copy of an earlier download", flush=True)
        return {**arguments, "local_files_only": True}
    raise ValueError(f"there is no folder of this name here, and the Hub does not answer ({reason})")


def describe(model) -> str:
    """One line: the code's version, layers, width, precision, device, and the memory that the weights take."""
    config = model.config
    version = getattr(sys.modules[type(config).__module__], "CODE_VERSION", "1")  # of the folder's code, which runs
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    precision = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    if config.quantization_bit:
        precision = f"INT{config.quantization_bit} + {precision}"
    return (
        f"code {version}, {config.num_layers} layers of {config.hidden_size}, {config.vocab_size} tokens, "
        f"{precision}, {size / 1e6:,.1f} MB of weights on {model.device}"
    )
