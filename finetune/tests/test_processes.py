"""Training on two processes of this machine is training on one, step by step, and so is what they save.

Run by torchrun, this file is the program of each process: train.py without the dropout of P-tuning's prefix, which two
processes cannot draw as one does.
"""

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
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from finetune import train  # noqa: E402
from finetune.methods import PREFIX_FILE, load_tuned  # noqa: E402

# Float32 sums in another order, through three steps of Adam; what is left out, or counted twice, shows in two digits.
SAME = 1e-3
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
]  # --cpu would start one, silently
RUNS = {
    "lora": [],
    "ptuning": ["--pre-seq-len", "8"],
    "full": [],
    "lora, FSDP": ["--fsdp"],
    "full, FSDP": ["--fsdp"],
    "lora, INT4, FSDP": ["--fsdp", "--bits", "4"],
}


def words(name: str, out: Path, *more: str) -> list[str]:
    """Three steps of two examples for each process."""
    run = ["--model", str(ROOT / "tiny"), "--data", str(ROOT / "finetune" / "sample.jsonl"), "--device", "cpu"]
    run += ["--method", name.partition(",")[0], "--steps", "3", "--log-every", "1", "--batch", "2"]
    return [*run, *RUNS[name], *more, "--out", str(out)]


def start(launcher: list[str], runs: list[list[str]], **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *launcher, __file__, json.dumps(runs)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def program(runs: list[list[str]]) -> None:
    """Of one process, which may be told to die in the middle of a step."""
    torch.nn.Dropout.forward = lambda self, states: states
    step, mine = train.Tuner.training_step, os.environ.get("RANK") == "1"

    def dying_step(self, *arguments, **options):
        if mine and str(self.state.global_step) == os.environ.get("DIE_AT_STEP"):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **options)

    train.Tuner.training_step = dying_step
    if any("--deepspeed" in run for run in runs):
        import deepspeed.ops

        # A quicker sum over processes of one machine, which it would compile here, for a minute, if it finds ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for run in runs:
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate's own, of the run before
        train.main(run)


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((out / "curve.csv").open(encoding="utf-8"))]


def saved(out: Path) -> dict[str, torch.Tensor]:
    if (out / PREFIX_FILE).is_file():
        return torch.load(out / PREFIX_FILE, weights_only=True)
    return load_file(next(out.glob("*model.safetensors")))


def assert_as_one(out: Path, alone: Path) -> None:
    assert len(losses(out)) == 3 and losses(out) == pytest.approx(losses(alone), rel=SAME)
    expected, found = saved(alone), saved(out)
    assert (
        expected.keys() <= found.keys() <= expected.keys() | {"lm_head.weight"}
    )  # DeepSpeed writes a tied head twice
    for name, matrix in expected.items():
        assert (found[name] - matrix).norm() <= SAME**0.5 * matrix.norm(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Path]:
    """One process that takes the examples of both, in two batches a step."""
    folder = tmp_path_factory.mktemp("alone")
    outs = {name: folder / str(index) for index, name in enumerate(RUNS) if "FSDP" not in name or "INT4" in name}
    kept = torch.nn.Dropout.forward
    torch.nn.Dropout.forward = lambda self, states: states
    for name, out in outs.items():
        train.main([word for word in words(name, out, "--accumulate", "2") if word != "--fsdp"])
    torch.nn.Dropout.forward = kept
    return {name: outs.get(name) or outs[name.partition(",")[0]] for name in RUNS}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("together")
    done = start(TORCHRUN, [words(name, folder / str(index)) for index, name in enumerate(RUNS)])
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_and_save_what_one_does(alone, together, name):
    folder, _ = together
    assert_as_one(folder / str(list(RUNS).index(name)), alone[name])


@pytest.mark.parametrize("name", ["full, FSDP", "lora, FSDP", "lora, INT4, FSDP", "ptuning"])
def test_what_two_processes_saved_loads_and_answers_as_reported(together, name):
    out = together[0] / str(list(RUNS).index(name))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    model, tokenizer = load_tuned(str(ROOT / "tiny"), out, 4 if "INT4" in name else 0)
    said = model.chat(tokenizer, report["after"]["prompt"], history=[], do_sample=False, max_new_tokens=128)[0]
    assert said == report["after"]["answer"]
    assert ("full" in name) == (out / "modeling_chatglm.py").is_file() and not list(out.glob("_fsdp*"))


def test_the_command_says_how_many_train(together):
    assert together[1].count("2 processes x 1 batches x 2 examples a step") == len(RUNS)


def test_accelerate_launch_starts_the_same(alone, tmp_path):
    done = start(ACCELERATE, [words("lora", tmp_path / "out")])
    assert done.returncode == 0, done.stderr[-4000:]
    assert_as_one(tmp_path / "out", alone["lora"])


@pytest.mark.parametrize("name", ["full, FSDP"])
def test_where_one_process_dies_nothing_half_done_is_left_and_the_run_goes_on(alone, tmp_path, name):
    out = tmp_path / "out"
    run = [words(name, out, "--save-every", "1")]
    done = start(TORCHRUN, run, DIE_AT_STEP="2")
    assert done.returncode and "Signal 9 (SIGKILL)" in done.stderr
    assert not (out / "report.json").exists() and (out / "checkpoint-2").is_dir()
    done = start(TORCHRUN, run)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_as_one(out, alone[name])
    assert not list(out.glob("checkpoint-*"))


REFUSED = [
    (["--fsdp"], {}, "--fsdp needs several processes: torchrun"),
    (["--fsdp", "--method", "ptuning"], {"WORLD_SIZE": "2"}, "leave out --fsdp, or use --method lora or full"),
    (["--fsdp", "--deepspeed", "x.json"], {"WORLD_SIZE": "2"}, "give one of them"),
    ([], {"ACCELERATE_USE_FSDP": "true"}, "start it with --multi_gpu, and give train.py --fsdp"),
    ([], {"ACCELERATE_USE_DEEPSPEED": "true"}, "give train.py --deepspeed FILE"),
    (["--deepspeed", "no such.json"], {}, "--deepspeed no such.json: [Errno 2]"),
    (["--deepspeed", str(ROOT / "finetune" / "sample.jsonl")], {}, "sample.jsonl: Extra data"),
    (["--deepspeed", str(ROOT / "finetune" / "deepspeed.json")], {}, "DeepSpeed is missing: pip install deepspeed"),
]


@pytest.mark.parametrize("more, variables, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_a_launch_that_would_train_otherwise_than_asked_is_refused(
    tmp_path, capsys, monkeypatch, more, variables, message
):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        train.main([*words("lora", tmp_path / "out"), *more])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_number_of_processes_does_not_go_on_with_a_run(tmp_path, monkeypatch):
    run = words("lora", tmp_path / "out")
    train.main(run)
    (tmp_path / "out" / "report.json").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="holds a run with processes 1, now 2"):
        train.main(run)


def test_the_settings_for_deepspeed_are_what_transformers_reads(tmp_path):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    settings = HfTrainerDeepSpeedConfig(str(ROOT / "finetune" / "deepspeed.json"))
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "use_cpu": True}
    settings.trainer_config_process(TrainingArguments(str(tmp_path), **options))
    settings.trainer_config_finalize(TrainingArguments(str(tmp_path), **options), None, 10)
    assert settings.is_zero2() and settings.get_value("train_micro_batch_size_per_gpu") == 2
    assert settings.get_value("gradient_accumulation_steps") == 3 and "auto" not in json.dumps(settings.config)


def test_deepspeed_learns_what_one_process_learns(alone, tmp_path):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    for name in ("lora", "full"):
        more = ["--deepspeed", str(ROOT / "finetune" / "deepspeed.json")]
        done = start(TORCHRUN, [words(name, tmp_path / name, *more)])
        assert done.returncode == 0, done.stderr[-4000:]
        assert_as_one(tmp_path / name, alone[name])


if __name__ == "__main__":
    program(json.loads(sys.argv[1]))
