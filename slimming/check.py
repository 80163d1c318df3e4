"""The proof: an output folder compared with its source, tensor by tensor and in the logits of both models.

It reads the output from its own files and maps rows by its own arithmetic, so a fault of the conversion shows here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from package import package_module
from slimming import checkpoint_io as io
from slimming.checkpoint_io import StoredTensor
from slimming.plan import EMBEDDING, Job, Options, Plan

PROMPTS = ("你好", "介绍一下清华大学", "hello world, this is a test")
BLOCK_BYTES = 1 << 23
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2  # of the largest logit: products of different widths add in different order


@dataclass
class Finding:
    """One line of the table."""

    part: str
    tensors: int = 0
    compared: int = 0  # bytes of the source
    fault: str = ""
    note: str = ""


def check(plan: Plan, folder: Path, options: Options) -> bool:
    """Compares and prints the table; whether all of it is equal."""
    findings = [*compare_tensors(plan, folder)]
    if not any(finding.fault for finding in findings):
        findings.append(compare_logits(plan, folder, options))
    print(f"{'part':<34}{'tensors':>8}{'bytes compared':>16}  result")
    for finding in findings:
        result = f"DIFFERENT: {finding.fault}" if finding.fault else finding.note or "equal"
        print(f"{finding.part:<34}{finding.tensors:>8}{finding.compared:>16,}  {result}")
    return not any(finding.fault for finding in findings)


# -------------------------------------------------------------------------------------------------------- tensors


def compare_tensors(plan: Plan, folder: Path) -> list[Finding]:
    """One finding for each group of tensors, and one for the set of names."""
    output = io.read_checkpoint(folder).tensors
    names = Finding("names and shapes", len(output))
    findings: dict[str, Finding] = {"": names}
    expected = set()
    with io.Reader() as source_reader, io.Reader() as output_reader:
        for tensor in plan.source.tensors.values():
            finding = findings.setdefault(part_of(tensor.name), Finding(part_of(tensor.name)))
            twin = output_name(plan, tensor.name)
            expected.update(name for name in (twin, f"{twin}_scale") if name in output)
            finding.tensors += 1
            if twin not in output:
                names.fault = names.fault or f"{twin} is missing"
                continue
            compared = compare(plan, tensor, output, twin, source_reader, output_reader)
            finding.compared += compared[0]
            finding.fault = finding.fault or compared[1]
    if set(output) - expected:
        names.fault = names.fault or f"{sorted(set(output) - expected)[0]} is not in the source"
    return list(findings.values())


def part_of(name: str) -> str:
    parts = name.split(".")
    if "word_embeddings" in parts:
        return "embedding, kept rows"
    if "lm_head" in parts:
        return "head, kept rows"
    if any("layernorm" in part for part in parts):
        return "layer norms"
    return "layers" if "layers" in parts else "other"


def output_name(plan: Plan, name: str) -> str:
    """A tied head is stored as the embedding."""
    if plan.tied and name.startswith("lm_head."):
        return name.replace("lm_head.", "transformer.word_embeddings.")
    return name


def compare(
    plan: Plan, tensor: StoredTensor, output: dict[str, StoredTensor], twin: str, *readers: io.Reader
) -> tuple[int, str]:
    """Bytes of the source compared, and what differs first ("" for nothing)."""
    rows = kept_rows(plan, tensor)
    axis = tensor.shape.index(plan.vocabulary.source_rows) if rows is not None else 0
    shape = list(tensor.shape)
    if rows is not None:
        shape[axis] = len(rows)
    job = next(job for job in plan.jobs if job.source.name == twin)
    packed = [shape[0], shape[1] * job.bits // 8] if job.bits else shape
    if list(output[twin].shape) != packed:
        return 0, f"{twin} has shape {list(output[twin].shape)}, not {packed}"
    if axis:  # a small factor of an adapter, cut along its columns
        return compare_columns(tensor, output[twin], rows, *readers)
    compared, step = 0, 1
    if shape and math.prod(shape):
        row_bytes = tensor.nbytes // tensor.shape[0]
        step = max(BLOCK_BYTES // row_bytes, 1)
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            block = source_block(readers[0], tensor, rows, start, stop)
            if not block_equals(block, job, output, twin, start, stop, readers[1]):
                return compared, f"{twin}, rows {start} to {stop - 1}"
            compared += len(block)
    return compared, ""


def kept_rows(plan: Plan, tensor: StoredTensor) -> numpy.ndarray | None:
    """Rows of the source in the order of the output, for a tensor with a vocabulary axis."""
    if part_of(tensor.name) not in ("embedding, kept rows", "head, kept rows"):
        return None
    if plan.vocabulary.source_rows not in tensor.shape:
        return None
    return numpy.concatenate([numpy.arange(begin, end) for begin, end in plan.vocabulary.runs])


def source_block(reader: io.Reader, tensor: StoredTensor, rows: Any, start: int, stop: int) -> bytearray:
    """The source's bytes of the output rows start ... stop - 1."""
    row_bytes = tensor.nbytes // tensor.shape[0]
    block = bytearray((stop - start) * row_bytes)
    view = memoryview(block)
    wanted = numpy.arange(start, stop) if rows is None else rows[start:stop]
    breaks = [0, *(numpy.flatnonzero(numpy.diff(wanted) != 1) + 1).tolist(), len(wanted)]
    for begin, end in zip(breaks, breaks[1:]):
        reader.read_into(tensor, int(wanted[begin]) * row_bytes, view[begin * row_bytes : end * row_bytes])
    return block


def block_equals(
    block: bytearray, job: Job, output: dict[str, StoredTensor], name: str, start: int, stop: int, reader: io.Reader
) -> bool:
    """Whether rows of the output hold what the source's bytes become: themselves, converted, or quantized."""
    expected = [(name, memoryview(block))]
    if job.bits or job.dtype != job.source.dtype:
        import torch

        rows = io.as_tensor(memoryview(block), job.source.dtype).to(getattr(torch, io.TORCH_NAMES[job.dtype]))
        expected = [(name, io.tensor_bytes(rows))]
        if job.bits:
            quantize = package_module("quantization").quantize_weight
            weight, scale = quantize(rows.view(stop - start, -1), job.bits, job.group_size)
            expected = [(name, io.tensor_bytes(weight)), (f"{name}_scale", io.tensor_bytes(scale.to(rows.dtype)))]
    for part, content in expected:
        found = bytearray(len(content))
        reader.read_into(output[part], start * (output[part].nbytes // output[part].shape[0]), memoryview(found))
        if not numpy.array_equal(numpy.frombuffer(found, "u1"), numpy.frombuffer(content, "u1")):
            return False
    return True


def compare_columns(
    tensor: StoredTensor, twin: StoredTensor, rows: Any, reader: io.Reader, output_reader: io.Reader
) -> tuple[int, str]:
    import torch

    sides = []
    for one, its_reader in ((tensor, reader), (twin, output_reader)):
        content = bytearray(one.nbytes)
        its_reader.read_into(one, 0, memoryview(content))
        sides.append(io.as_tensor(memoryview(content), one.dtype).view(one.shape))
    expected = sides[0][:, torch.from_numpy(rows)].to(sides[1].dtype)
    equal = io.tensor_bytes(expected) == io.tensor_bytes(sides[1])
    return tensor.nbytes, "" if equal else twin.name


# --------------------------------------------------------------------------------------------------------- logits


def compare_logits(plan: Plan, folder: Path, options: Options) -> Finding:
    """The same prompts through both models, one after the other in memory; kept columns must agree."""
    finding = Finding("logits on kept columns", len(PROMPTS))
    numbers = sum(math.prod(tensor.shape) for tensor in plan.source.tensors.values())
    if plan.source.kind != "model" or plan.vocabulary.sentencepiece is None:
        finding.note = f"not compared: a {plan.source.kind} alone computes none"
        return finding
    free = available_memory()
    exact = numbers * 5 < free  # float32 and room for one more; else in the checkpoint's own dtype
    if not exact and source_bytes(plan) * 1.25 > free:
        finding.note = f"not compared: {source_bytes(plan) * 1.25:,.0f} bytes of memory needed, {free:,} are free"
        return finding
    rows = numpy.concatenate([numpy.arange(begin, end) for begin, end in plan.vocabulary.runs])
    with quiet_transformers():
        model, prompts = load_output(folder, exact)
        output_logits = run(model, prompts)
        classes = type(model), type(model.config), model.dtype
        del model  # one at a time
        model = load_source(plan, *classes)
        source_logits = run(model, [[int(rows[index]) for index in ids] for ids in prompts])
    worst, agree = 0.0, True
    for ours, theirs in zip(output_logits, source_logits):
        theirs = theirs[..., rows]
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
        agree = agree and bool((ours.argmax(-1) == theirs.argmax(-1)).all())
    finding.note = f"largest difference {worst:.1e} of the largest logit" if worst else "equal bit for bit"
    limit = TOLERANCE if exact else HALF_TOLERANCE
    if options.bits or options.quantize_head or options.dtype:
        finding.note += ", from the conversion"
    elif worst > limit or math.isnan(worst) or exact and not agree:
        finding.fault = f"largest difference {worst:.1e}, limit {limit:.0e}; same best token: {agree}"
    return finding


def source_bytes(plan: Plan) -> int:
    return plan.source.checkpoint.nbytes


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars and warnings about a model that is about to be left behind."""
    from transformers.utils import logging

    remote_code = logging.logging.getLogger("transformers_modules")
    remote_code.setLevel(logging.ERROR)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        remote_code.setLevel(logging.NOTSET)
        logging.enable_progress_bar()


def available_memory() -> int:
    """Bytes that could be had: what Linux says, else a modest guess."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 << 30


def load_output(folder: Path, exact: bool) -> tuple[Any, list[list[int]]]:
    """The folder's model, loaded as a user would, and the ids of the prompts."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return model.float() if exact else model, [tokenizer.build_chat_input_ids(prompt) for prompt in PROMPTS]


def load_source(plan: Plan, model_class: type, config_class: type, dtype: Any) -> Any:
    """The source's own tensors in the same code and dtype, with the source's vocabulary."""
    import torch

    stale = ("auto_map", "architectures", "torch_dtype", "dtype")
    config = {name: value for name, value in plan.source.config.items() if name not in stale}
    config.update(vocab_size=plan.vocabulary.source_rows, tie_word_embeddings=plan.tied)
    config["quantize_head"] = plan.source.tensors[EMBEDDING].dtype == "I8"
    with torch.device("meta"):
        model = model_class(config_class(**config)).eval()
    state = {}
    with io.Reader() as reader:
        for name, tensor in plan.source.tensors.items():
            content = bytearray(tensor.nbytes)
            reader.read_into(tensor, 0, memoryview(content))
            numbers = io.as_tensor(memoryview(content), tensor.dtype).view(tensor.shape)
            state[name] = numbers.to(dtype) if numbers.is_floating_point() else numbers
    if plan.tied:
        shared = [name for name in state if name.startswith("transformer.word_embeddings.")]
        state.update({name.replace("transformer.word_embeddings", "lm_head"): state[name] for name in shared})
    model.load_state_dict(state, strict=False, assign=True)
    return model


def run(model: Any, prompts: list[list[int]]) -> list[Any]:
    import torch

    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits.float() for ids in prompts]
