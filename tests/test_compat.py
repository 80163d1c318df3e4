"""What must work on every transformers version of the ladder (noxfile.py); each test is a row of its table.

The checkpoints are the golden ones of the original code, put into folders as a user has them: weights, config with
`auto_map`, tokenizer files and the package's code. A test that a version cannot run asks for the capability it needs
and says which one is missing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from rounding import assert_as_near, exact, roundings
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from package import copy_package

ROOT = Path(__file__).resolve().parents[1]
ENTRY_FILES = ("modeling_chatglm.py", "tokenization_chatglm.py")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative_imports(name: str) -> set[str]:
    """The files that a code file imports relatively, found as transformers finds them."""
    code = (ROOT / name).read_text(encoding="utf-8")
    return {f"{module}.py" for module in re.findall(r"^\s*from \.(\w+) import", code, re.MULTILINE)}


def package_files(*entry_files: str) -> set[str]:
    """The code files that a checkpoint needs: the entry files and all that they import relatively."""
    found, waiting = set(), list(entry_files or ENTRY_FILES)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += relative_imports(name)
    return found


def make_folder(folder: Path, checkpoint: Path, tokenizer_model: Path, dtype: torch.dtype | None = None) -> Path:
    """A checkpoint folder that `from_pretrained(folder, trust_remote_code=True)` loads."""
    folder.mkdir()
    copy_package(folder)
    config = json.loads((checkpoint / "config.json").read_text())
    ours = json.loads((ROOT / "config.json").read_text())
    config.update({name: ours[name] for name in ("auto_map", "tokenizer_class")})
    config["architectures"] = ["ChatGLMForConditionalGeneration"]
    tensors = load_file(checkpoint / "model.safetensors")
    if dtype:
        config["torch_dtype"] = str(dtype).replace("torch.", "")
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(tokenizer_model, folder / "ice_text.model")
    return folder


def load(folder: Path, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(str(folder), trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory, golden, tiny_sp_model) -> Path:
    """Random weights with golden logits and generations."""
    return make_folder(tmp_path_factory.mktemp("compat") / "base", golden / "model" / "base2d", tiny_sp_model)


@pytest.fixture(scope="module")
def talker(tmp_path_factory, golden, tiny_sp_model) -> Path:
    """A trained toy with golden conversations."""
    return make_folder(tmp_path_factory.mktemp("compat") / "talker", golden / "model" / "chat2d", tiny_sp_model)


@pytest.fixture(scope="module")
def base_model(base):
    return load(base)


@pytest.fixture(scope="module")
def base_tokenizer(base):
    return AutoTokenizer.from_pretrained(str(base), trust_remote_code=True)


@pytest.fixture(scope="module")
def talker_model(talker):
    return load(talker, AutoModel)


@pytest.fixture(scope="module")
def cases(golden) -> dict:
    """Golden cases of both checkpoints by (checkpoint, name), with their stored tensors."""
    found = {}
    for checkpoint in ("base2d", "chat2d"):
        folder = golden / "model" / checkpoint
        tensors = load_file(folder / "tensors.safetensors") if (folder / "tensors.safetensors").exists() else {}
        for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]:
            stored = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.split(".", 1)[0] == case["name"]}
            found[checkpoint, case["name"]] = {**case, **stored}
    return found


def is_ours(filename: str) -> bool:
    return "transformers_modules" in filename or Path(filename).parent == ROOT


def caused_by_us(skip: tuple[str, ...]) -> bool:
    """Whether one of the three innermost frames, without those of the `skip` files, belongs to this package."""
    names = [frame.filename for frame in inspect.stack(0)[2:] if not frame.filename.endswith(skip)]
    return any(is_ours(name) for name in names[:3])


@pytest.fixture(autouse=True)
def no_deprecated_use_of_transformers():
    """Fails a test in which this package's code uses something that transformers or torch announces to remove."""
    ours: list[str] = []

    def show(message, category, filename, lineno, file=None, line=None):
        outdated = issubclass(category, (DeprecationWarning, FutureWarning))
        if outdated and (is_ours(filename) or caused_by_us(skip=("warnings.py",))):
            ours.append(f"{category.__name__}: {message}")

    class Listener(logging.Handler):
        def emit(self, record):
            text = record.getMessage()
            skip = (os.path.join("logging", "__init__.py"), os.path.join("utils", "logging.py"))
            if re.search(r"deprecat|will be removed", text) and caused_by_us(skip):
                ours.append(text)

    listener, logger = Listener(), logging.getLogger("transformers")
    logger.addHandler(listener)
    with warnings.catch_warnings():
        warnings.simplefilter("always", DeprecationWarning)
        warnings.simplefilter("always", FutureWarning)
        warnings.showwarning = show
        yield
    logger.removeHandler(listener)
    assert not ours


def generated(model, case: dict, **options) -> list[list[int]]:
    settings = {name: value for name, value in case["kwargs"].items() if name != "seed"}
    return model.generate(torch.tensor(case["input_ids"]), **{**settings, **options}).tolist()


@contextlib.contextmanager
def embedded(model):
    """The ids [B, S] of each call of the embedding while this lasts."""
    seen: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    yield seen
    hook.remove()


def assert_each_token_was_embedded_once(seen: list[torch.Tensor], rows: int, prompt: int) -> None:
    """The prompt at once, then one token a step; what was cached is never computed again."""
    assert [tuple(ids.shape) for ids in seen] == [(rows, prompt)] + [(rows, 1)] * (len(seen) - 1)


def layers_of(cache) -> tuple:
    """Any version's cache as the legacy tuple: (keys, values) [B, H, T, D] for each layer."""
    if hasattr(cache, "layers"):
        return tuple((layer.keys, layer.values) for layer in cache.layers)
    return tuple(zip(cache.key_cache, cache.value_cache))


def needs(capability: bool, what: str) -> None:
    if not capability:
        pytest.skip(f"transformers {transformers.__version__} has no {what}")


@pytest.mark.parametrize("entry_file", ENTRY_FILES)
def test_entry_file_imports_every_file_that_it_needs(entry_file):
    """transformers below 5.1 copies from a local folder only what the entry file itself imports."""
    assert package_files(entry_file) - {entry_file} == relative_imports(entry_file)


def test_no_files_import_each_other():
    """transformers 4.41 to 4.5x, which look for `from .file import`, follow a circle for ever."""
    waiting = {name: relative_imports(name) for name in package_files()}
    while waiting:
        done = {name for name, needed in waiting.items() if not needed & set(waiting)}
        assert done, f"a circle of imports among {sorted(waiting)}"
        waiting = {name: needed for name, needed in waiting.items() if name not in done}


def test_tokenizer_loads_and_encodes(base_tokenizer, cases):
    texts = ["你好", "介绍一下清华大学", "hello world, this is a test"]
    for i, text in enumerate(texts):
        assert base_tokenizer(text)["input_ids"] == cases["base2d", f"single{i}"]["input_ids"][0]
    batch = base_tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == cases["base2d", "batch_leftpad"]["input_ids"]
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    assert base_tokenizer.decode(base_tokenizer("x = 1\n\ty")["input_ids"]) == "x = 1\n\ty"


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM], ids=lambda a: a.__name__)
def test_auto_class_loads(auto, base):
    assert type(load(base, auto)).__name__ == "ChatGLMForConditionalGeneration"


def test_load_keeps_the_dtype_of_the_checkpoint(tmp_path, golden, tiny_sp_model):
    folder = make_folder(tmp_path / "half", golden / "model" / "base2d", tiny_sp_model, torch.float16)
    assert load(folder).dtype == torch.float16
    assert load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(folder, torch_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_through_the_meta_device(low_cpu_mem_usage, base, base_model):
    model = load(base, low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base_model.state_dict().values()))


@pytest.mark.parametrize("name", ["single0", "single1", "mask_mid_prompt", "mask_mid_answer", "full_pair"])
def test_golden_logits(name, base_model, cases):
    case = cases["base2d", name]
    ids = torch.tensor(case["input_ids"])
    with torch.no_grad():
        logits = base_model(ids).logits
    assert_as_near(logits, case["logits"], exact(base_model, ids).logits, roundings(base_model.config))


@pytest.mark.parametrize("name", ["greedy0", "greedy1", "greedy2", "mask_mid_greedy", "history_greedy"])
def test_greedy(name, base_model, cases):
    assert generated(base_model, cases["base2d", name]) == cases["base2d", name]["output_ids"]


@pytest.mark.parametrize("name", ["beam3_0", "beam3_1", "beam3_2", "beam4_ret4"])
def test_beam_search(name, base_model, cases):
    assert generated(base_model, cases["base2d", name]) == cases["base2d", name]["output_ids"]


def test_sampling_repeats_under_a_seed(base_model, cases):
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generated(base_model, cases["base2d", "sample0"])

    assert draw(42) == draw(42)
    assert len({str(draw(seed)) for seed in range(5)}) > 1


CHAT_CASES = ["single0", "single1", "single2", "single3", "single4", "multi0", "multi1", "rep_penalty", "beam3"]


@pytest.mark.parametrize("name", CHAT_CASES)
def test_chat(name, talker_model, base_tokenizer, cases):
    case = cases["chat2d", name]
    response, history = talker_model.chat(base_tokenizer, case["query"], history=case.get("history"), **case["kwargs"])
    assert response == case["response"]
    assert [list(turn) for turn in history] == case["new_history"]


@pytest.mark.parametrize("name", CHAT_CASES[:7])
def test_stream_chat(name, talker_model, base_tokenizer, cases):
    case = cases["chat2d", name]
    history = case.get("history")
    parts = list(talker_model.stream_chat(base_tokenizer, case["query"], history=history, **case["kwargs"]))
    assert len(parts) > 2
    assert parts[-1][0] == case["response"]
    assert not any("\ufffd" in response for response, _ in parts)


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 2},
    "several_answers": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_token_is_embedded_once(way, base_model, cases):
    ids, new = torch.tensor(cases["base2d", "greedy0"]["input_ids"]), 7
    rows = max(WAYS[way].get("num_beams", 1), WAYS[way].get("num_return_sequences", 1))
    with embedded(base_model) as seen:
        base_model.generate(ids, **WAYS[way], min_length=ids.shape[1] + new, max_length=ids.shape[1] + new)
    assert_each_token_was_embedded_once(seen, rows, ids.shape[1])
    assert sum(ids.shape[1] for ids in seen) == ids.shape[1] + new - 1  # nothing follows the last one


def test_each_token_of_a_padded_batch_is_embedded_once(base_model, cases):
    batch = torch.tensor(cases["base2d", "batch_greedy"]["input_ids"])
    with embedded(base_model) as seen:
        generated(base_model, cases["base2d", "batch_greedy"], attention_mask=(batch != 3).long())
    assert len(seen) > 3
    assert_each_token_was_embedded_once(seen, *batch.shape)


@pytest.mark.parametrize("streams", [False, True])
def test_each_token_of_a_chat_is_embedded_once(streams, talker_model, base_tokenizer, cases):
    case = cases["chat2d", "single0"]
    with embedded(talker_model) as seen:
        chat = talker_model.stream_chat if streams else talker_model.chat
        answer = chat(base_tokenizer, case["query"], **case["kwargs"])
        response = list(answer)[-1][0] if streams else answer[0]
    assert response == case["response"] and len(seen) > 3
    assert_each_token_was_embedded_once(seen, 1, len(case["input_ids"]))


def test_each_token_behind_a_prefix_is_embedded_once(base, cases):
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=True, pre_seq_len=3)
    model = load(base, config=config)
    ids = torch.tensor(cases["base2d", "greedy0"]["input_ids"])
    with embedded(model) as seen:
        model.generate(ids, do_sample=False, min_length=ids.shape[1] + 5, max_length=ids.shape[1] + 5)
    assert len(seen) == 5
    assert_each_token_was_embedded_once(seen, *ids.shape)


def test_left_padded_batch_equals_single_prompts(base_model, cases):
    case = cases["base2d", "batch_greedy"]
    batch = torch.tensor(case["input_ids"])
    assert generated(base_model, case, attention_mask=(batch != 3).long()) == case["output_ids"]


RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
out = model.generate(torch.tensor(ids), do_sample=False, max_length=21)
print(json.dumps([out.tolist(), tokenizer("你好")["input_ids"]]))
"""


def reload_elsewhere(folder: Path, input_ids: list, modules: Path) -> list:
    """Load a saved folder in a new process, which knows nothing of this one; returns greedy ids and encoded text."""
    command = [sys.executable, "-c", RELOAD, str(folder), json.dumps(input_ids)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_saved_folder_loads_by_itself_in_a_new_process(tmp_path, base_model, base_tokenizer, cases):
    needs(hasattr(transformers, "GenerationConfig"), "auto_map in a saved folder")
    saved = tmp_path / "saved"
    base_model.save_pretrained(saved)
    base_tokenizer.save_pretrained(saved)
    assert package_files() <= {path.name for path in saved.iterdir()}
    case = cases["base2d", "greedy0"]
    expected = [case["output_ids"], cases["base2d", "single0"]["input_ids"][0]]
    assert reload_elsewhere(saved, case["input_ids"], tmp_path / "modules") == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_checkpoint_reloads(bits, tmp_path, base, cases):
    needs(hasattr(transformers, "GenerationConfig"), "auto_map in a saved folder")
    model = load(base).quantize(bits)
    model.save_pretrained(tmp_path / f"int{bits}")
    again = load(tmp_path / f"int{bits}")
    assert again.config.quantization_bit == bits
    assert sum(p.dtype == torch.int8 for p in again.parameters()) == 4 * again.config.num_layers
    ids = torch.tensor(cases["base2d", "single1"]["input_ids"])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert generated(again, cases["base2d", "greedy0"]) == generated(model, cases["base2d", "greedy0"])


@pytest.fixture(scope="module")
def int4(tmp_path_factory, base) -> Path:
    folder = tmp_path_factory.mktemp("compat") / "int4"
    load(base).half().quantize(4).save_pretrained(folder)
    return folder


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("low_memory", [{}, {"low_cpu_mem_usage": False}, {"low_cpu_mem_usage": True}], ids=str)
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["base", "int4"])
def test_a_new_prefix_has_numbers_and_alone_is_trained(kind, projection, low_memory, request, cases):
    needs(
        (kind == "base" and not low_memory.get("low_cpu_mem_usage")) or hasattr(transformers, "GenerationConfig"),
        "auto_map in a saved folder, and no new weights on the meta device",
    )
    folder = request.getfixturevalue(kind)
    options = {"pre_seq_len": 3, "prefix_projection": projection}
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=True, **options)
    model = load(folder, config=config, **low_memory).float()
    assert not any(parameter.is_meta for parameter in model.parameters())
    prefix = {name for name, _ in model.named_parameters() if "prefix_encoder" in name}
    assert trainable(model) == prefix and len(prefix) == (5 if projection else 1)
    case = cases["base2d", "train_rightpad_grads"]
    model(torch.tensor(case["input_ids"]), labels=torch.tensor(case["labels"])).loss.backward()
    for name, parameter in model.named_parameters():
        assert (name in prefix) == (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0))


def test_what_quantization_froze_is_frozen_after_a_reload(base, int4):
    needs(hasattr(transformers, "GenerationConfig"), "auto_map in a saved folder")
    assert trainable(load(int4)) == trainable(load(base).quantize(4))


def test_a_model_owns_its_configuration(base):
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=True)
    for _ in range(2):
        model = AutoModel.from_config(config, trust_remote_code=True).quantize(8)
        assert (model.config.quantization_bit, config.quantization_bit) == (8, 0)


@pytest.fixture(scope="module")
def tied(tmp_path_factory, base) -> Path:
    """As a slim checkpoint: one matrix for embedding and head, stored once."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("compat") / "tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_threads_load_complete_models(tied):
    """transformers changes functions of torch for the whole process while it loads. (Its Auto classes parse the code
    first, and that is for one thread at a time: Python 3.11's ast.parse fails in two.)"""
    loaded, model_class = [], type(load(tied))

    def work():
        for _ in range(4):
            model = model_class.from_pretrained(str(tied))
            is_tied = model.lm_head.weight is model.transformer.word_embeddings.weight
            loaded.append((is_tied, {parameter.device.type for parameter in model.parameters()}))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [(True, {"cpu"})] * 8


@contextlib.contextmanager
def messages_of_transformers():
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("transformers")
    logger.addHandler(listener)
    try:
        yield messages
    finally:
        logger.removeHandler(listener)


def test_a_tied_head_is_not_called_newly_initialized(tied):
    with messages_of_transformers() as messages:
        model = load(tied)
    assert not [message for message in messages if "lm_head" in message]
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(
        model.lm_head.weight, load_file(tied / "model.safetensors")["transformer.word_embeddings.weight"]
    )


def saves_pickles() -> bool:
    """Whether this version's own default is pytorch_model.bin (below 4.35)."""
    parameter = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters.get("safe_serialization")
    return parameter is not None and parameter.default is False


def test_a_saved_folder_holds_exactly_the_files_of_the_table(tmp_path, base_model, base_tokenizer):
    needs(hasattr(transformers, "GenerationConfig"), "auto_map in a saved folder")
    base_model.save_pretrained(tmp_path)
    base_tokenizer.save_pretrained(tmp_path)
    separate = hasattr(transformers.PreTrainedTokenizerBase, "save_chat_templates")  # 4.50
    weights = "pytorch_model.bin" if saves_pickles() else "model.safetensors"
    expected = {"config.json", "generation_config.json", weights, "ice_text.model", "tokenizer_config.json"}
    expected |= {"README.md"} | package_files() | ({"chat_template.jinja"} if separate else set())
    names = {path.name for path in tmp_path.iterdir()} - {"special_tokens_map.json"}  # below 5
    assert names - {"added_tokens.json", "__pycache__"} == expected


def test_weights_are_saved_in_the_form_that_was_asked_for(tmp_path, base_model):
    parameters = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    needs("safe_serialization" in parameters, "choice of a format")
    base_model.save_pretrained(tmp_path, safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "modeling_chatglm.py"}
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in base_model.state_dict().items() if name in stored)


# What the package overrides or reads of transformers beside its public interface, and whether this version has it.
PRIVATE = {
    "_init_weights": lambda: hasattr(transformers.PreTrainedModel, "_init_weights"),
    "_keys_to_ignore_on_load_missing": lambda: hasattr(
        transformers.PreTrainedModel, "_keys_to_ignore_on_load_missing"
    ),
    "_no_split_modules": lambda: hasattr(transformers.PreTrainedModel, "_no_split_modules"),
    "_set_gradient_checkpointing": lambda: "_set_gradient_checkpointing" in source_of(transformers.PreTrainedModel),
    "_tied_weights_keys or tie_weights": lambda: hasattr(transformers.PreTrainedModel, "tie_weights"),
    "_reorder_cache": lambda: hasattr(cache_utils(), "Cache") or "_reorder_cache" in source_of(generation_mixin()),
    "DynamicLayer's keys, values, dtype, device, is_initialized": lambda: (
        not hasattr(cache_utils(), "DynamicLayer")
        or all(name in source_of(cache_utils()) for name in ("self.keys", "self.values", "self.is_initialized"))
    ),
    "layers, or key_cache and value_cache": lambda: (
        not hasattr(cache_utils(), "DynamicCache")
        or ("self.layers" if hasattr(cache_utils(), "DynamicLayer") else "key_cache") in source_of(cache_utils())
    ),
    "_load_pretrained_model (below 4.36)": lambda: (
        cache_utils() is not None or hasattr(transformers.PreTrainedModel, "_load_pretrained_model")
    ),
}


def source_of(thing) -> str:
    return inspect.getsource(sys.modules[thing.__module__] if inspect.isclass(thing) else thing) if thing else ""


def cache_utils():
    return sys.modules.get("transformers.cache_utils")


def generation_mixin():
    return next(c for c in transformers.GPT2LMHeadModel.__mro__ if c.__name__ == "GenerationMixin")


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_that_the_package_relies_on_is_there(name):
    assert PRIVATE[name](), f"transformers {transformers.__version__} has no {name} any more"


def gradients(model, case: dict) -> tuple[dict, int]:
    """Gradients of one training step, and how often the first attention ran."""
    calls: list = []
    hook = model.transformer.layers[0].attention.dense.register_forward_hook(lambda *_: calls.append(1))
    model.zero_grad()
    model(input_ids=torch.tensor(case["input_ids"]), labels=torch.tensor(case["labels"])).loss.backward()
    hook.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(calls)


def test_gradient_checkpointing(base, cases):
    case = cases["base2d", "train_rightpad_grads"]
    model = load(base).train()
    truth, _ = gradients(copy.deepcopy(model).double(), case)  # but for the loss, which is float32: two roundings
    plain, calls = gradients(model, case)
    model.gradient_checkpointing_enable()
    checkpointed, calls_again = gradients(model, case)
    assert (calls, calls_again) == (1, 2)
    assert plain.keys() == checkpointed.keys() == truth.keys()
    steps = 2 * roundings(model.config) + 2  # forward, back, and the loss
    for name, gradient in plain.items():
        assert_as_near(checkpointed[name], gradient, truth[name], steps)
        if name in case["grad_l2"]:
            norms = gradient.double().norm().float(), torch.tensor(case["grad_l2"][name]), truth[name].norm()
            assert_as_near(*norms, steps)


def test_checkpointing_keeps_its_arguments(base, cases, monkeypatch):
    parameters = inspect.signature(transformers.PreTrainedModel.gradient_checkpointing_enable).parameters
    needs("gradient_checkpointing_kwargs" in parameters, "arguments for checkpointing")
    case, model = cases["base2d", "train_rightpad_grads"], load(base).train()
    given: list[dict] = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def spy(function, *args, **kwargs):
        given.append(kwargs)
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(sys.modules["transformers.modeling_utils"], "checkpoint", spy)
    with messages_of_transformers() as messages:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"preserve_rng_state": False})
    assert not [message for message in messages if "old version of the checkpointing format" in message]
    gradients(model, case)
    assert given == [{"preserve_rng_state": False, "use_reentrant": False}] * model.config.num_layers
    model.gradient_checkpointing_disable()
    gradients(model, case)
    assert len(given) == model.config.num_layers


def test_checkpointing_of_every_second_layer(base, cases):
    enable = getattr(transformers.PreTrainedModel, "activation_checkpointing_enable", None)
    needs(enable is not None, "checkpointing of some layers")
    model = load(base).train()
    model.activation_checkpointing_enable(every_n_layers=2)
    assert gradients(model, cases["base2d", "train_rightpad_grads"])[1] == 2  # the first layer runs twice
    model.transformer.layers[0], model.transformer.layers[1] = model.transformer.layers[1], model.transformer.layers[0]
    assert gradients(model, cases["base2d", "train_rightpad_grads"])[1] == 2  # it goes by the place


def test_configuration_may_ask_for_tuples(base, cases):
    ids = torch.tensor(cases["base2d", "greedy0"]["input_ids"])
    model = load(base, return_dict=False)
    with torch.no_grad():
        assert isinstance(model(ids), tuple) and isinstance(model.transformer(ids), tuple)
        assert torch.equal(model(ids)[0], model(ids, return_dict=True).logits)
    assert generated(model, cases["base2d", "greedy0"]) == cases["base2d", "greedy0"]["output_ids"]


def test_legacy_cache_tuple(base_model, cases):
    case = cases["base2d", "full_pair"]
    ids, positions = torch.tensor(case["input_ids"]), torch.tensor(case["derived_position_ids"])
    known = 7
    with torch.no_grad():
        past = layers_of(base_model(ids[:, :known], use_cache=True).past_key_values)
        legacy = tuple((keys.clone(), values.clone()) for keys, values in past)
        out = base_model(ids[:, known:], past_key_values=legacy, position_ids=positions[:, :, known:], use_cache=True)
    truth = exact(base_model, ids, position_ids=positions).logits[:, known:]
    assert_as_near(out.logits, case["logits"][:, known:], truth, roundings(base_model.config))


def test_legacy_4d_mask_and_2d_positions(base_model, cases):
    case = cases["base2d", "batch_leftpad"]
    ids = torch.tensor(case["input_ids"])
    places = {"attention_mask": case["attention_mask"].bool(), "position_ids": torch.tensor(case["position_ids"])}
    with torch.no_grad():
        logits = base_model(ids, **places).logits
    kept, truth = ids != 3, exact(base_model, ids, **places).logits
    assert_as_near(logits[kept], case["logits"][kept], truth[kept], roundings(base_model.config))


def test_eager_attention_equals_sdpa(base, base_model, cases):
    needs("attn_implementation" in inspect.getsource(transformers.PreTrainedModel), "attn_implementation")
    ids = torch.tensor(cases["base2d", "single1"]["input_ids"])
    with torch.no_grad():
        eager = load(base, attn_implementation="eager")(ids, output_attentions=True)
        assert len(eager.attentions) == base_model.config.num_layers
        sdpa, truth = base_model(ids).logits, exact(base_model, ids).logits
    assert_as_near(eager.logits, sdpa, truth, roundings(base_model.config))


def needs_static_cache(model) -> None:
    whole = hasattr(transformers, "StaticCache") and "key_cache: torch.Tensor" not in source_of(cache_utils())
    needs(whole, "StaticCache of all layers")  # 4.41
    needs(getattr(model, "_supports_static_cache", True), "StaticCache that a prefix mask can use")


def test_static_cache(base_model, cases):
    needs_static_cache(base_model)
    for name in ("greedy0", "history_greedy"):
        case = cases["base2d", name]
        with embedded(base_model) as seen:
            assert generated(base_model, case, cache_implementation="static") == case["output_ids"]
        assert_each_token_was_embedded_once(seen, 1, len(case["input_ids"][0]))


def test_fullgraph_compiled_decoding(base, cases):
    """The decode step is one graph, compiled once and not again for each token."""
    model = load(base)
    needs_static_cache(model)
    graphs = CompileCounter()
    plain, compiled = model.forward, torch.compile(model.forward, fullgraph=True, backend=graphs)

    @functools.wraps(plain)
    def forward(input_ids=None, **inputs):
        step = compiled if input_ids.shape[1] == 1 else plain
        return step(input_ids=input_ids, **inputs)

    model.forward = forward
    case = cases["base2d", "greedy0"]
    assert generated(model, case, cache_implementation="static") == case["output_ids"]
    assert 1 <= graphs.frame_count <= 2  # the first step may have a graph of its own


def assert_prompt_was_embedded_once(model, seen: list[torch.Tensor]) -> None:
    """Candidates that were rejected are computed again in their right form; <sop> and what precedes it never is."""
    assert len(seen) > 2
    assert sum(int((ids == model.config.bos_token_id).sum()) for ids in seen) == 1


def test_assisted_decoding(base_model, talker_model, cases):
    case = cases["base2d", "greedy1"]
    if cache_utils() is None:
        with pytest.raises(ValueError, match="assistant_model needs transformers 4.36 or newer"):
            generated(base_model, case, assistant_model=talker_model)
        pytest.skip(f"transformers {transformers.__version__} runs the model on tokens without their positions")
    with embedded(base_model) as seen:
        assert generated(base_model, case, assistant_model=talker_model) == case["output_ids"]
    assert_prompt_was_embedded_once(base_model, seen)


def test_prompt_lookup_decoding(base_model, cases):
    options = getattr(transformers, "GenerationConfig", object)()
    needs(hasattr(options, "prompt_lookup_num_tokens"), "prompt lookup")
    case = cases["base2d", "greedy2"]
    with embedded(base_model) as seen:
        assert generated(base_model, case, prompt_lookup_num_tokens=3) == case["output_ids"]
    assert_prompt_was_embedded_once(base_model, seen)
    assert all(ids.shape[1] <= 1 + 3 for ids in seen[1:])


@pytest.mark.skipif(
    not hasattr(getattr(transformers, "GenerationMixin", None), "generate_batch"),
    reason="transformers 4.57 has the first",
)
def test_continuous_batching_is_refused_with_the_cure(base_model):
    for ask in (
        lambda: base_model.generate_batch([[5, 6, 7]], max_new_tokens=2),
        lambda: base_model.init_continuous_batching(),
    ):
        with pytest.raises(NotImplementedError, match=r"in both directions: give generate\(\) a padded batch"):
            ask()


@pytest.mark.parametrize("by_path", [False, True])
def test_text_generation_pipeline(by_path, talker, talker_model, base_tokenizer, cases):
    parameters = inspect.signature(transformers.TextGenerationPipeline.preprocess).parameters
    adds = "add_special_tokens" in parameters and parameters["add_special_tokens"].default is not False
    needs(adds, "pipeline that adds special tokens")
    case = cases["chat2d", "single0"]
    what = {"model": str(talker), "trust_remote_code": True}
    what = what if by_path else {"model": talker_model, "tokenizer": base_tokenizer}
    pipe = transformers.pipeline("text-generation", **what)
    assert case["decoded"] in pipe(case["query"], do_sample=False, max_length=128)[0]["generated_text"]


def test_text_generation_pipeline_answers_messages_and_parts_as_chat_does(talker_model, base_tokenizer, cases):
    needs(hasattr(base_tokenizer, "apply_chat_template"), "chat templates")
    needs(hasattr(transformers.TextGenerationPipeline, "_default_generation_config"), "pipelines for chats")
    pipe = transformers.pipeline("text-generation", model=talker_model, tokenizer=base_tokenizer)
    case = cases["chat2d", "single0"]
    for content in (case["query"], [{"type": "text", "text": case["query"]}]):
        messages = pipe([{"role": "user", "content": content}], do_sample=False, max_new_tokens=64)[0][
            "generated_text"
        ]
        assert messages[-1]["role"] == "assistant"
        assert talker_model.process_response(messages[-1]["content"]) == case["response"]


def test_the_streamers_of_transformers_show_the_text_of_the_answer(talker_model, base_tokenizer, cases, capsys):
    needs(hasattr(transformers, "TextIteratorStreamer"), "streamers")
    case = cases["chat2d", "single0"]
    ids = torch.tensor([base_tokenizer.build_chat_input_ids(case["query"])])
    whole = talker_model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :]
    text = base_tokenizer.decode(whole, skip_special_tokens=True)
    options = {"skip_prompt": True, "skip_special_tokens": True}
    talker_model.generate(
        ids, do_sample=False, max_new_tokens=64, streamer=transformers.TextStreamer(base_tokenizer, **options)
    )
    assert capsys.readouterr().out.rstrip("\n") == text
    streamer = transformers.TextIteratorStreamer(base_tokenizer, timeout=120, **options)
    arguments = {"do_sample": False, "max_new_tokens": 64, "streamer": streamer}
    thread = threading.Thread(target=talker_model.generate, args=(ids,), kwargs=arguments)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text and len(pieces) > 3


def test_chat_template_gives_the_ids_of_chat(base_tokenizer, cases):
    needs(hasattr(base_tokenizer, "apply_chat_template"), "chat templates")
    for name in ("single0", "multi0", "multi1"):
        case = cases["chat2d", name]
        messages = []
        for query, response in case["history"] or []:
            messages += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
        messages.append({"role": "user", "content": case["query"]})
        ids = base_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        assert list(ids if isinstance(ids, list) else ids["input_ids"]) == case["input_ids"]


OTHER_CODE = """
import json, logging, sys, torch
from transformers import AutoModel, AutoTokenizer
said = []
logging.Handler.handle = lambda handler, record: said.append(record.getMessage())
logging.getLogger().addHandler(logging.Handler())
for folder in sys.argv[1:]:
    said.clear()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    warnings = [text for text in said if "code of another folder" in text]
    print(json.dumps([model.process_response("[[训练时间]]"), warnings]))
"""


def test_a_folder_that_is_served_by_the_code_of_another_one_is_told_of(tmp_path, talker):
    """Two folders of one name with different code in one process: transformers runs the first one's for both."""
    folders = [tmp_path / place / "model" for place in ("first", "second", "copy")]
    for folder in folders:
        shutil.copytree(talker, folder)
    code = (talker / "chat.py").read_text(encoding="utf-8")
    (folders[1] / "chat.py").write_text(code.replace("2023年", "2222年"), encoding="utf-8")
    command = [sys.executable, "-c", OTHER_CODE, *map(str, folders)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, second, copy = (json.loads(line) for line in done.stdout.splitlines()[-3:])
    assert first == copy == ["2023年", []]
    if second[0] == "2023年":  # not its own code
        assert second[1] and all(f"{folders[1]} may be served" in message for message in second[1])
        assert "chat.py" in second[1][0]  # 4.41 to 4.44 run the code again at each load, and so the warning
