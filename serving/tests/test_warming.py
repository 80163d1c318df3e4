"""What a server does before it listens, so that no answer waits for it."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch

pytest.importorskip("fastapi", reason="pip install -r serving/requirements.txt")

from serving import api
from serving.batching import Batch, Generation
from serving.sampling import Sampling
from serving.service import Service, Settings
from serving.tests.conftest import TINY
from serving.tests.running import Served


@pytest.fixture
def shapes(tiny, monkeypatch):
    """[rows, tokens] of each call of the model."""
    _, model = tiny
    seen, forward = [], type(model).forward

    def record(self, *arguments, **named):
        seen.append(tuple(named["input_ids"].shape))
        return forward(self, *arguments, **named)

    monkeypatch.setattr(type(model), "forward", record)
    return seen


def test_each_number_of_answers_has_had_a_token_and_a_prompt_was_computed(tiny, shapes):
    Service(*tiny, Settings(slots=5)).warm_up()
    assert [rows for rows, tokens in shapes if tokens == 1] == [1, 2, 3, 4, 5]
    assert shapes[0][0] == 1 and shapes[0][1] > 2  # the prompt of them all, once
    assert {tokens for _, tokens in shapes[1:] if tokens > 1} == {24, 32, 64, 128, 256, 512}


def test_figures_and_kept_prompts_know_nothing_of_it(tiny):
    with Served(*tiny, slots=3) as served:
        before = served.get("/metrics").text
        served.service.warm_up()
        figures = served.get("/metrics").text.replace('chatglm_requests_total{path="/metrics",status="200"}', "")
        assert "chatglm_steps 0.0" in before and "chatglm_steps 0.0" in figures
        assert not served.batch.kept.prompts and served.batch.answer_seconds == 1.0


def test_a_model_that_would_end_at_once_is_warmed_up_all_the_same(tiny, shapes, monkeypatch):
    tokenizer, model = tiny
    everything = list(range(model.config.vocab_size - 1))
    monkeypatch.setattr(model.config, "eos_token_id", everything)
    Service(tokenizer, model, Settings(slots=2)).warm_up()
    assert [rows for rows, tokens in shapes if tokens == 1] == [1, 2]


def test_the_program_listens_when_it_is_warm(monkeypatch):
    done = []
    monkeypatch.setattr(Service, "warm_up", lambda self: done.append("warm"))
    monkeypatch.setattr(api.Server, "run", lambda self: done.append("listens"))
    assert api.main(["--model", str(TINY)]) == 0
    assert done == ["warm", "listens"]


def test_weights_move_to_huge_pages_before_the_ways_of_products_are_chosen(monkeypatch, tiny):
    engine, done = pytest.importorskip("chatglm_cpu", reason="pip install ./cpu"), []
    moved = engine.move_to_huge_pages
    monkeypatch.setattr(engine, "move_to_huge_pages", lambda model: (done.append("moved"), moved(model)))
    monkeypatch.setattr(Service, "warm_up", lambda self: done.append("warm"))
    service = api.ready_service(api.parse(["--model", str(TINY), "--device", "cpu", "--huge-pages"]))
    assert done == ["moved", "warm"]
    for name, weight in service.model.state_dict().items():
        assert torch.equal(weight, tiny[1].state_dict()[name]), name


def test_huge_pages_are_refused_where_they_cannot_be(monkeypatch, capsys):
    for engine in (None, types.ModuleType("one without them, as before 2.0.0")):
        monkeypatch.setitem(sys.modules, "chatglm_cpu", engine)
        assert api.main(["--model", str(TINY), "--huge-pages", "--device", "cpu"]) == 1
        assert "pip install ./cpu" in capsys.readouterr().err
    assert api.main(["--model", str(TINY), "--huge-pages", "--device", "meta"]) == 1
    assert "would be on meta" in capsys.readouterr().err


def test_a_model_that_can_answer_nobody_is_not_served(monkeypatch, capsys, tiny):
    _, model = tiny
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    monkeypatch.setattr(api, "load", lambda *_: (tiny[0], broken))
    monkeypatch.setattr(api.Server, "run", lambda self: pytest.fail("it listens"))
    assert api.main(["--model", str(TINY)]) == 1
    assert "not finite" in capsys.readouterr().err


def test_afterwards_no_request_meets_a_product_whose_way_or_kernel_is_not_there_yet(tiny, monkeypatch):
    routes = pytest.importorskip("chatglm_cpu.routes", reason="pip install ./cpu")
    from chatglm_cpu import runtime

    tokenizer, model = tiny
    model, chosen = copy.deepcopy(model).bfloat16().quantize(4), set()
    monkeypatch.setattr(routes, "SMALLEST", 1)
    monkeypatch.setattr(routes.measuring, "ranking", lambda problem, names, _: chosen.add(problem.label) or names)
    Service(tokenizer, model, Settings(slots=16)).warm_up()
    known, compiled = set(chosen), set(runtime._compiled)
    if not known:
        pytest.skip("the engine serves nothing on this processor")
    batch, ids = Batch(model, 16), tokenizer.build_chat_input_ids("你好")
    for rows in range(1, 17):
        batch.add(Generation(ids, lambda _: None, 3, Sampling(temperature=0)) for _ in range(rows))
        while batch.step():
            pass
    for tokens in (5, 9, 17, 25, 33, 65, 129, 600):
        batch.add([Generation(ids[:1] * (tokens - len(ids)) + ids, lambda _: None, 1, Sampling(temperature=0))])
        batch.step()
    assert chosen == known and set(runtime._compiled) == compiled
