"""The command: each method learns, saves what loads again in another process, and goes on after it was killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune import train
from finetune.data import Example
from finetune.methods import PREFIX, PREFIX_FILE, kind_of, load_tuned
from finetune.train import Tuner

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    ("你们几点开门？", "早上八点开门。"),
    ("你们有猫吗？", "有，一只白猫。"),
    ("Where are you?", "We are near the lake."),
]
QUICK = ["--model", str(ROOT / "tiny"), "--device", "cpu", "--batch", "3", "--log-every", "1"]
METHODS = {
    "lora": ["--steps", "40", "--rank", "16"],
    "lora-int4": ["--steps", "50", "--rank", "16", "--bits", "4", "--gradient-checkpointing"],
    "lora-bf16": ["--steps", "40", "--rank", "16", "--mixed", "bf16"],
    "ptuning": ["--steps", "60", "--pre-seq-len", "16"],
    "ptuning-int8": ["--steps", "60", "--pre-seq-len", "16", "--bits", "8"],
    "full": ["--steps", "25"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in ROWS), encoding="utf-8")
    return path


def command(data, out, *words) -> list[str]:
    return [*QUICK, "--data", str(data), "--out", str(out), *words]


ASK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from finetune.methods import load_tuned
model, tokenizer = load_tuned(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
print(model.chat(tokenizer, sys.argv[5], history=[], do_sample=False)[0])
"""


def ask(out, bits, query) -> str:
    words = [sys.executable, "-c", ASK, str(ROOT), str(ROOT / "tiny"), str(out), str(bits), query]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=900).stdout.strip()


@pytest.mark.parametrize("name", METHODS)
def test_each_method_learns_a_batch_and_its_result_answers_in_a_fresh_process(data, tmp_path, capsys, name):
    method, bits = name.partition("-")[0], {"int4": 4, "int8": 8}.get(name.partition("-")[2], 0)
    out = tmp_path / "out"
    report = train.main(command(data, out, "--method", method, *METHODS[name]))
    assert report["before"]["task"] == 0 and report["after"]["task"] == 1
    assert kind_of(out) == method and not list(out.glob("checkpoint-*"))
    if method != "full":
        assert sum(file.stat().st_size for file in out.iterdir()) < 2**20
    said = capsys.readouterr().out
    assert f"before: {report['before']['answer']}" in said and f"after:  {ROWS[0][1]}" in said
    assert ask(out, bits, ROWS[0][0]) == ROWS[0][1] != report["before"]["answer"]


def test_a_prefix_file_is_what_the_official_filter_reads(data, tmp_path):
    out = tmp_path / "out"
    train.main(command(data, out, "--method", "ptuning", "--steps", "2", "--pre-seq-len", "4", "--prefix-projection"))
    state = torch.load(out / PREFIX_FILE, weights_only=True)
    assert all(name.startswith(PREFIX) for name in state)
    stripped = {name[len(PREFIX) :]: tensor for name, tensor in state.items()}
    model, _ = load_tuned(str(ROOT / "tiny"), out)
    model.transformer.prefix_encoder.load_state_dict(stripped)  # strictly, as the official evaluation does
    assert set(stripped) == {"embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"}
    assert model.config.pre_seq_len == 4 and model.config.prefix_projection


def losses(out) -> list[tuple[str, str]]:
    with open(out / "curve.csv", newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("method", ["lora", "ptuning", "full"])
def test_a_killed_run_goes_on_with_equal_losses(data, tmp_path, monkeypatch, method):
    """Killed in the middle of a step after a checkpoint, while a younger checkpoint is half written."""
    words = ["--method", method, "--steps", "8", "--save-every", "3", "--dropout", "0.1", "--pre-seq-len", "8"]
    words = command(data, "OUT", *words)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main([str(whole) if word == "OUT" else word for word in words])
    program = [sys.executable, str(ROOT / "finetune" / "train.py"), *(str(killed) if w == "OUT" else w for w in words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "KILL_AT_STEP": "5"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums over other parts round otherwise
    start = [sys.executable, "-c", KILLER, *program[1:]]
    ended = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert not (killed / "report.json").exists() and (killed / "checkpoint-3").is_dir()
    (killed / "checkpoint-6").mkdir()
    (killed / "checkpoint-6" / "trainer_state.json").write_text("{")
    report = train.main([str(killed) if word == "OUT" else word for word in words])
    assert report["steps"] == 5 and report["gib"] > 0  # what its seconds are for: those from the checkpoint on
    assert losses(killed) == losses(whole) and len(losses(whole)) == 8
    assert report["loss"] == json.loads((whole / "report.json").read_text())["loss"]


KILLER = """
import os, runpy, signal, sys
from transformers import Trainer
step = Trainer.training_step
def killing_step(self, *arguments, **options):
    if self.state.global_step == int(os.environ["KILL_AT_STEP"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **options)
Trainer.training_step = killing_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_same_seed_gives_the_same_losses_and_another_one_others(data, tmp_path):
    words = ["--method", "lora", "--steps", "3", "--batch", "1"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train.main(command(data, tmp_path / name, *words, "--seed", seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_what_lies_in_the_output_is_never_overwritten(data, tmp_path):
    words = ["--method", "lora", "--steps", "1"]
    out = tmp_path / "out"
    train.main(command(data, out, *words))
    with pytest.raises(SystemExit, match="holds the result of a run that is done"):
        train.main(command(data, out, *words))
    (out / "report.json").unlink()
    with pytest.raises(SystemExit, match="holds a run with rank 8, now 4"):
        train.main(command(data, out, *words, "--rank", "4"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(SystemExit, match="no run of this program"):
        train.main(command(data, tmp_path / "notes", *words))


def test_bad_rows_end_the_command_by_line_before_anything_is_written(data, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text(encoding="utf-8") + '{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="line 4: the response is None"):
        train.main(command(bad, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there_are_named_in_one_line(data, tmp_path):
    with pytest.raises(SystemExit, match="^error: .*no such.jsonl"):
        train.main(command(tmp_path / "no such.jsonl", tmp_path / "out"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="^error: .*Not a directory"):
        train.main(command(data, tmp_path / "file"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--steps", "0"], "--steps 0"),
        (["--replay", "3"], "--replay needs prompts"),
        (["--method", "full", "--bits", "4"], "integers cannot be tuned"),
        (["--max-source", "2"], "--max-source and --max-target"),
    ],
)
def test_arguments_without_meaning_are_refused(data, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        train.main(command(data, tmp_path / "out", *words))
    assert message in capsys.readouterr().err


def test_the_curve_is_a_csv_and_a_picture(data, tmp_path, capsys, monkeypatch):
    words = ["--method", "lora", "--steps", "2"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train.main(command(data, tmp_path / "a", *words))
    assert [step for step, _ in losses(tmp_path / "a")] == ["1", "2"] and not (tmp_path / "a" / "curve.png").exists()
    assert "pip install matplotlib" in capsys.readouterr().out
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    train.main(command(data, tmp_path / "b", *words))
    assert (tmp_path / "b" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_replay_mixes_the_models_own_answers_and_prints_the_old_chat(data, tmp_path, capsys):
    chat = tmp_path / "chat.jsonl"
    rows = [{"prompt": "早上好"}, {"prompt": "你好"}, {"prompt": "谢谢", "response": "no"}]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--method", "lora", "--steps", "2", "--replay", "2", "--check-chat", str(chat)]
    report = train.main(command(data, tmp_path / "out", *words))
    assert report["before"]["chat"] == pytest.approx(2 / 3)  # its own answers, and one that is not
    replay = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert len(replay) == 2 and all(1605 in ids and labels.count(-100) < len(ids) for ids, labels, _ in replay)
    assert "old chat, answered word for word: 66.7% before" in capsys.readouterr().out


def test_new_examples_are_half_of_what_is_trained_beside_a_larger_replay():
    new, old = [Example([place], [place], "") for place in range(3)], Example([9], [9], "")
    assert train.mixed(new, []) == new and train.mixed(new, [old]) == [*new, old]
    of_twelve = train.mixed(new, [old] * 12)
    assert len(of_twelve) == 24 and of_twelve.count(old) == 12 and all(of_twelve.count(one) == 4 for one in new)


def test_checkpoints_of_p_tuning_hold_the_prefix_alone(data, tmp_path, monkeypatch):
    saved = []
    save = Tuner._save
    monkeypatch.setattr(Tuner, "_save", lambda self, *a, **k: (save(self, *a, **k), saved.append(Path(a[0]))))
    words = ["--method", "ptuning", "--steps", "2", "--save-every", "1", "--pre-seq-len", "4"]
    train.main(command(data, tmp_path / "out", *words))
    assert saved and not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("more, where", [([], "meta"), (["--device", "cpu"], "cpu"), (["--fsdp"], "cpu")])
def test_the_base_model_answers_where_it_will_be_trained(data, tmp_path, monkeypatch, more, where):
    """A device without numbers stands for a GPU: the base is seen where it would begin to answer."""
    seen = []

    def look(model, *_):
        seen.append({one.device.type for one in model.parameters()})
        raise ValueError("enough")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    monkeypatch.setattr(train, "scores", look)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--model", str(ROOT / "tiny"), "--data", str(data), "--out", str(tmp_path / "out"), *more]
    with pytest.raises(SystemExit, match="enough"):
        train.main(words)
    assert seen == [{where}]
