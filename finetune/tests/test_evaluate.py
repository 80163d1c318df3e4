"""evaluate.py's figures against their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

NEEDS = "pip install -r finetune/requirements-evaluate.txt"
pytest.importorskip("sacrebleu", reason=NEEDS)
pytest.importorskip("lm_eval", reason=NEEDS)

from finetune import evaluate  # noqa: E402
from finetune.evaluate import Words, perplexity, table  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TINY, TASKS = str(ROOT / "tiny"), str(ROOT / "finetune" / "tasks")


def test_one_command_makes_a_table_of_formats_and_tasks(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    rows = [("你好", "你好👋！我是 tiny，是 ChatGLM-6B-Slim 自带的小小测试模型。很高兴见到你！"), ("早上好", "错了")]
    lines = [json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False) for prompt, response in rows]
    data.write_text("\n".join(lines), encoding="utf-8")
    words = ["--model", TINY, "--bits", "0", "4", "--data", str(data), "--limit", "2", "--include-path", TASKS]
    words += ["--tasks", "tiny_choice", "tiny_answer", "tiny_text", "--json", str(tmp_path / "figures.json")]
    found = evaluate.main(words)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text()) == found and table(found) in printed
    plain, int4 = found
    assert (plain["weights"], int4["weights"]) == ("float32", "INT4, float32")
    assert plain["exact match"] == 0.5 and 0 < plain["ROUGE-L"] < 1 and 0 < plain["BLEU-4"] < 1
    assert plain["tiny_choice acc"] == plain["tiny_answer exact_match"] == 1
    assert 1 < plain["tiny_text byte_perplexity"] < 2 and plain["perplexity"] != int4["perplexity"]
    assert printed.count("| INT4, float32 |") == 1 and "| 50.0% |" in printed


def test_sixteen_bits_stand_beside_integers(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "你好", "response": "你好"}\n', encoding="utf-8")
    words = [
        "--model",
        TINY,
        "--data",
        str(data),
        "--bits",
        "0",
        "4",
        "--dtype",
        "bfloat16",
        "float16",
        "--max-target",
        "8",
    ]
    rows = evaluate.main(words)
    assert [row["weights"] for row in rows] == ["bfloat16", "float16", "INT4, bfloat16", "INT4, float16"]
    exact = evaluate.main(words[:4])[0]
    assert exact["weights"] == "float32" and len({row["perplexity"] for row in [exact, *rows]}) == 5
    for row in rows[:2]:  # 2**-8 and less in each of some dozen sums, and logits up to about 20
        assert math.isclose(math.log(row["perplexity"]), math.log(exact["perplexity"]), abs_tol=20 * 12 * 2**-8)


@torch.no_grad()
def test_perplexity_is_that_of_each_answer_and_its_end(load, tokenizer):
    model = load().eval()
    rows = [evaluate.Example(*row, "") for row in sequences(tokenizer)]
    total = count = 0
    for row in rows:
        for place in range(row.ids.index(tokenizer.bos_token_id) + 1, len(row.ids)):
            scores = model(torch.tensor([row.ids[:place]])).logits[0, -1].log_softmax(dim=-1)
            total, count = total + scores[row.ids[place]].item(), count + 1
    assert math.isclose(
        perplexity(model, tokenizer, rows), math.exp(-total / count), rel_tol=1e-4
    )  # float32 and two ways through the network


def sequences(tokenizer):
    for prompt, answer in (("你好", "你好！"), ("介绍一下清华大学", "清华")):
        context = [*tokenizer.encode_text(prompt), tokenizer.gmask_token_id]
        target = [tokenizer.bos_token_id, *tokenizer.encode_text(answer), tokenizer.eos_token_id]
        yield context + target, [-100] * len(context) + target


def test_rouge_counts_chinese_characters_and_other_words():
    from rouge_score.rouge_scorer import RougeScorer

    assert Words().tokenize("建于1911年，Tsinghua University。") == [
        *("建", "于", "1911", "年", "，", "tsinghua", "university", "。")
    ]
    score = RougeScorer(["rougeL"], tokenizer=Words()).score("今天天气好", "今天天气不好")["rougeL"]
    assert math.isclose(score.fmeasure, 2 * 5 / (5 + 6))


def test_what_cannot_be_measured_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        evaluate.main(["--model", TINY])
    assert "give --data FILE, --tasks NAME, or both" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--model", TINY, "--data", "x.jsonl", "--json", str(tmp_path / "no" / "x.json")])
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="^error: .*no such.jsonl"):
        evaluate.main(["--model", TINY, "--data", str(tmp_path / "no such.jsonl")])
    with pytest.raises(SystemExit, match="--tasks no_such_task: lm-evaluation-harness knows none"):
        evaluate.main(["--model", TINY, "--tasks", "no_such_task"])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="line 1"):
        evaluate.main(["--model", TINY, "--data", str(tmp_path / "bad.jsonl")])
