"""The official tuning programs, unchanged, on a model of this package.

They are not ours to ship: $OFFICIAL_PTUNING names the folder `ptuning` of a fetched copy of the ChatGLM-6B repository,
$OFFICIAL_PYTHON the python of an environment with transformers 4.27.1, datasets, jieba, rouge-chinese and nltk.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER, PYTHON = os.environ.get("OFFICIAL_PTUNING"), os.environ.get("OFFICIAL_PYTHON")
pytestmark = pytest.mark.skipif(not (FOLDER and PYTHON), reason="set OFFICIAL_PTUNING and OFFICIAL_PYTHON")
ROWS = [
    ("类型#上衣", "白色的上衣。"),
    ("类型#裤子", "红色的裤子。"),
    ("类型#裙子", "绿色的裙子。"),
    ("类型#鞋子", "蓝色的鞋子。"),
]


def words_of(script: str, **changes) -> list[str]:
    """What a script gives main.py, with other values for some options, and without the GPUs that it asks for."""
    text = (Path(FOLDER) / script).read_text().replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+)=(\S+)$", text, flags=re.M))
    line = next(line for line in text.splitlines() if "main.py" in line).partition("main.py")[2]
    words = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line).split()
    for name, value in changes.items():
        option = f"--{name}"
        if option in words:
            place = words.index(option)
            has_value = place + 1 < len(words) and not words[place + 1].startswith("--")
            words[place : place + 1 + has_value] = []
        words += [] if value is None else [option] if value is True else [option, str(value)]
    return words


def run(words: list[str], data: Path) -> str:
    environment = {
        **os.environ,
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "HF_MODULES_CACHE": str(data / "modules"),
    }
    done = subprocess.run(
        [PYTHON, "main.py", *words], cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    for name in ("train", "dev"):
        rows = [{"content": q, "summary": a} for q, a in ROWS]
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        rows = [{"prompt": q, "response": a, "history": [["你好", "你好"]]} for q, a in ROWS]
        (folder / f"chat-{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def options(data: Path, chat: str = "") -> dict:
    quick = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "gradient_accumulation_steps": 2, "no_cuda": True}
    files = {"train_file": data / f"{chat}train.json", "validation_file": data / f"{chat}dev.json"}
    return {**quick, **files, "model_name_or_path": ROOT / "tiny", "cache_dir": data / "cache"}


@pytest.mark.parametrize("script, chat", [("train.sh", ""), ("train_chat.sh", "chat-")])
def test_p_tuning_trains_saves_the_prefix_goes_on_and_is_evaluated(data, script, chat):
    out = data / f"out-{script}"
    run(words_of(script, **options(data, chat), output_dir=out), data)
    state = torch.load(out / "checkpoint-2" / "pytorch_model.bin", weights_only=True)
    assert set(state) == {"transformer.prefix_encoder.embedding.weight"}
    again = {**options(data, chat), "max_steps": 3, "resume_from_checkpoint": out / "checkpoint-2"}
    run(words_of(script, **again, output_dir=out), data)
    log = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]  # of both runs
    quick = {"no_cuda": True, "cache_dir": data / "cache", "model_name_or_path": ROOT / "tiny"}
    files = {"validation_file": data / "dev.json", "test_file": data / "dev.json"}
    run(words_of("evaluate.sh", **quick, **files, ptuning_checkpoint=out / "checkpoint-3", output_dir=out), data)
    predicted = (out / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["labels"] for line in predicted] == [answer for _, answer in ROWS]


def test_full_tuning_trains_and_is_evaluated_from_its_checkpoint(data):
    out = data / "out-full"
    plain = {**options(data), "fp16": None, "deepspeed": None, "test_file": data / "dev.json"}  # those want a GPU
    run(words_of("ds_train_finetune.sh", **plain, output_dir=out), data)
    quick = {"no_cuda": True, "cache_dir": data / "cache", "fp16_full_eval": None}
    files = {"validation_file": data / "dev.json", "test_file": data / "dev.json"}
    run(
        words_of("evaluate_finetune.sh", **quick, **files, model_name_or_path=out / "checkpoint-2", output_dir=out),
        data,
    )
    assert len((out / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()) == len(ROWS)
