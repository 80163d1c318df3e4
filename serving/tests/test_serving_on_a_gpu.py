"""The running batch and the server with a model on a GPU; without one nothing here runs."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from serving.batching import Batch
from serving.loading import load, usable_device
from serving.tests.conftest import TINY
from serving.tests.test_batching import alone, batched, jobs_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("slots", [16, 3])
def test_ids_of_the_batch_are_those_of_chat_alone(tiny, questions, bits, slots):
    tokenizer, model = tiny
    model = copy.deepcopy(model)
    model = (model.quantize(bits) if bits else model).cuda()
    jobs = jobs_of(questions, 16)
    works = batched(Batch(model, slots), tokenizer, jobs, leavers=questions[:4])
    same = [work.ids + work.answer == alone(model, tokenizer, job) for work, job in zip(works, jobs)]
    assert sum(same) >= len(same) - 1, same  # products of other numbers of rows: a tie may fall otherwise


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_the_server_takes_the_gpu_and_answers_many_at_once(tiny, questions, dtype):
    pytest.importorskip("fastapi", reason="pip install -r serving/requirements.txt")
    from serving.tests.running import Served

    assert usable_device(None) == "cuda"
    tokenizer, model = load(str(TINY), dtype, 4)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    answers = {}
    with Served(tokenizer, model) as server:

        def ask(question):
            answers[question] = server.chat(question, max_tokens=24).json["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(question,)) for question in questions[:16]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        streamed = server.chat(questions[0], max_tokens=24, stream=True)
        assert (streamed.status, streamed.text.count("data: ") > 2) == (200, True)
    expected = tiny[1] if dtype is None else model
    if dtype is None:
        expected = copy.deepcopy(expected).quantize(4)
    options = {"history": [], "do_sample": False, "max_new_tokens": 24}
    same = [expected.chat(tokenizer, asked, **options)[0] == answer for asked, answer in answers.items()]
    assert sum(same) >= (15 if dtype is None else 12), same
