"""An answer out of the running batch has the ids that it has alone, whoever else joins, leaves or fails."""

from __future__ import annotations

import copy
import math
import random
import threading
import time

import pytest
import torch

from serving.batching import Batch, Embedding, End, Generation
from serving.prompts import Prompts
from serving.sampling import Sampling, Token
from serving.scheduler import QueueFull, Scheduler, ShuttingDown

GREEDY = Sampling(temperature=0)


class Heard:
    """The events of one work."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)

    @property
    def end(self):
        return next((event for event in self.events if isinstance(event, End)), None)


def generation(tokenizer, query, history=(), max_tokens=20, sampling=GREEDY, **options):
    ids = tokenizer.build_chat_input_ids(query, list(history))
    return Generation(ids, Heard(), max_tokens, sampling, **options)


def run(batch):
    while batch.step():
        pass


class Record:
    """A stopping criterion that keeps the ids."""

    def __call__(self, ids, scores, **options):
        self.ids = ids[0].tolist()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def alone(model, tokenizer, job):
    """The ids that `model.chat` makes for the job, without others and without our scheduler."""
    record, sampling = Record(), job["sampling"]
    torch.manual_seed(sampling.seed or 0)
    options = {"do_sample": sampling.temperature > 0, "stopping_criteria": [record]}
    if options["do_sample"]:
        options.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    model.chat(tokenizer, job["query"], list(job["history"]), max_new_tokens=job["max_tokens"], **options)
    return record.ids


def jobs_of(questions, count):
    """Half of them greedy, half sampled, short and long prompts, one or many rounds."""
    chance, jobs = random.Random(3), []
    for index in range(count):
        rounds = chance.choice([0, 0, 1, 3])
        history = [(chance.choice(questions), "好的。" * chance.randint(1, 40)) for _ in range(rounds)]
        sampled = Sampling(temperature=0.95, top_p=chance.choice([0.7, 0.9, 1.0]), top_k=50, seed=1000 + index)
        jobs.append(
            {
                "query": questions[index],
                "history": history,
                "max_tokens": chance.choice([3, 17, 60]),
                "sampling": sampled if index % 2 else GREEDY,
            }
        )
    return jobs


def batched(batch, tokenizer, jobs, leavers=()):
    """Runs the jobs with random arrivals, and works that come and are cancelled; the works of the jobs."""
    chance = random.Random(5)
    works = [generation(tokenizer, **job) for job in jobs]
    arrivals = sorted((chance.randint(0, 60), index) for index in range(len(works)))
    leavers = [generation(tokenizer, query, max_tokens=500) for query in leavers]
    coming, present, step = list(leavers), [], 0
    while arrivals or any(work.tell.end is None for work in works):
        while arrivals and arrivals[0][0] <= step:
            batch.add([works[arrivals.pop(0)[1]]])
        if coming and step % 7 == 0:
            batch.add([coming[-1]])
            present.append(coming.pop())
        for work in present:
            if chance.random() < 0.15:
                work.cancelled = True
        batch.step()
        step += 1
    for work in leavers:
        work.cancelled = True
    run(batch)
    return works


@pytest.fixture(scope="module")
def expected(tiny, questions):
    """By name of the weights: model, and the ids of each job alone."""
    tokenizer, model = tiny
    made = {}

    def of(weights):
        if weights not in made:
            ours = copy.deepcopy(model)
            if weights.startswith("int"):
                ours = ours.quantize(int(weights[3:]))
            jobs = jobs_of(questions, 32)
            made[weights] = ours, jobs, [alone(ours, tokenizer, job) for job in jobs]
        return made[weights]

    return of


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
@pytest.mark.parametrize("slots", [16, 3])
def test_ids_are_those_of_chat_alone_greedy_and_seeded(tiny, questions, expected, weights, slots):
    tokenizer, _ = tiny
    model, jobs, ids = expected(weights)
    batch = Batch(model, slots)
    works = batched(batch, tokenizer, jobs, leavers=questions[:8])
    assert [work.ids + work.answer for work in works] == ids
    assert not batch.running and not batch.waiting and not batch.cache.lengths


def test_each_answer_is_told_token_by_token_and_ends_once(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model, slots=4)
    works = [generation(tokenizer, query, max_tokens=5 + n) for n, query in enumerate(questions[:8])]
    batch.add(works)
    run(batch)
    for work in works:
        *tokens, end = work.tell.events
        assert [token.id for token in tokens] == work.answer
        assert all(isinstance(token, Token) for token in tokens)
        assert end.reason == ("stop" if work.answer[-1] == model.config.eos_token_id else "length")
        assert end.reason == "stop" or len(work.answer) == work.answer_tokens


def test_a_p_tuning_prefix_is_read_by_each_row(golden_like_tiny, tiny, questions):
    tokenizer, _ = tiny
    model = golden_like_tiny(pre_seq_len=5)
    jobs = jobs_of(questions, 8)
    works = batched(Batch(model, slots=4), tokenizer, jobs)
    assert [work.ids + work.answer for work in works] == [alone(model, tokenizer, job) for job in jobs]


def test_a_model_with_one_row_of_positions_is_served(golden_like_tiny, tiny, questions):
    tokenizer, _ = tiny
    model = golden_like_tiny(position_encoding_2d=False)
    jobs = jobs_of(questions, 8)
    works = batched(Batch(model, slots=4), tokenizer, jobs)
    assert [work.ids + work.answer for work in works] == [alone(model, tokenizer, job) for job in jobs]


@pytest.fixture
def golden_like_tiny(tiny):
    """A model of the shape of tiny, with random weights and other fields of its configuration."""

    def make(**fields):
        _, model = tiny
        config = copy.deepcopy(model.config)
        for name, value in fields.items():
            setattr(config, name, value)
        torch.manual_seed(0)
        return type(model)(config).eval()

    return make


# ---- prompts together -----------------------------------------------------------------------------------------------


@pytest.fixture
def prompts_of(monkeypatch):
    """Tokens of each row of prompts that the model is given."""

    def watch(model):
        tokens, forward = [], type(model.base_model).forward

        def record(self, input_ids, *arguments, **named):
            if input_ids.shape[1] > 1:
                assert len(input_ids) == 1
                tokens.append(input_ids.shape[1])
            return forward(self, input_ids, *arguments, **named)

        monkeypatch.setattr(type(model.base_model), "forward", record)
        return tokens

    return watch


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_ids_are_those_of_chat_alone_when_all_ask_at_once(tiny, expected, prompts_of, weights):
    tokenizer, _ = tiny
    model, jobs, ids = expected(weights)
    batch, tokens = Batch(model), prompts_of(model)
    batch.together = 600
    works = [generation(tokenizer, **job) for job in jobs]
    batch.add(works)
    run(batch)
    assert [work.ids + work.answer for work in works] == ids
    lengths = [len(ids) for ids in {tuple(work.ids) for work in works}]
    assert len(tokens) < len(lengths) == batch.prompts_computed
    assert sum(tokens) == sum(lengths) and max(tokens) <= max(600, *lengths)  # no padding


@pytest.mark.parametrize("fields", [{"pre_seq_len": 5}, {"position_encoding_2d": False}], ids=str)
def test_prompts_of_other_models_are_computed_together(golden_like_tiny, tiny, questions, prompts_of, fields):
    tokenizer, _ = tiny
    model, jobs = golden_like_tiny(**fields), jobs_of(questions, 6)
    ids = [alone(model, tokenizer, job) for job in jobs]
    batch, tokens = Batch(model), prompts_of(model)
    batch.together = 10**6
    works = [generation(tokenizer, **job) for job in jobs]
    batch.add(works)
    run(batch)
    assert [work.ids + work.answer for work in works] == ids
    assert tokens == [sum(len(work.ids) for work in works)]


def test_a_prompt_reads_nothing_of_those_beside_it(tiny, questions):
    tokenizer, model = tiny
    first, second, third = (tokenizer.build_chat_input_ids(query) for query in questions[:3])
    other = [first[0], *reversed(first[1:-2]), *first[-2:]]
    assert other != first
    made = []
    for beside in (first, other):
        prompts = Prompts([beside, second, third], model)
        with torch.inference_mode():
            scores = model(**prompts.inputs, logits_to_keep=prompts.last).logits[0]
        made.append([scores[1:], *(state for states in prompts.states[1:] for layer in states for state in layer)])
    for one, another in zip(*made):
        torch.testing.assert_close(one, another)


def test_a_long_prompt_is_computed_alone_and_short_ones_before_it_do_not_wait(tiny, questions, prompts_of):
    tokenizer, model = tiny
    batch, tokens = Batch(model), prompts_of(model)
    works = [generation(tokenizer, query, max_tokens=50) for query in questions[:5]]
    works[2].ids[1:1] = works[2].ids[1:2] * batch.together
    batch.end_ids = set()
    batch.add(works)
    answers = []
    while not all(work.answer for work in works):
        batch.step()
        answers.append([bool(work.answer) for work in works])
    lengths = [len(work.ids) for work in works]
    assert tokens == [sum(lengths[:2]), lengths[2], sum(lengths[3:])]
    assert answers == [[True] * 2 + [False] * 3, [True] * 3 + [False] * 2, [True] * 5]


def test_who_leaves_during_a_prompt_of_several_takes_nothing_from_the_others(tiny, questions):
    tokenizer, model = tiny
    jobs = jobs_of(questions, 5)
    ids = [alone(model, tokenizer, job) for job in jobs]
    batch = Batch(model)
    batch.together = 10**6
    works = [generation(tokenizer, **job) for job in jobs]

    def leave(layer):
        works[2].cancelled = works[2].cancelled or layer == 1

    batch.add(works)
    with Layers(model, leave):
        batch.step()
    assert works[2].tell.end.reason == "cancelled" and not works[2].answer
    assert len(batch.running) == len(batch.cache.lengths) == 4
    run(batch)
    others = works[:2] + works[3:]
    assert [work.ids + work.answer for work in others] == ids[:2] + ids[3:]


def test_a_prompt_of_several_that_all_left_stops_at_its_next_layer(tiny, questions):
    tokenizer, model = tiny
    batch, seen = Batch(model), []
    works = [generation(tokenizer, query) for query in questions[:3]]

    def leave(layer):
        seen.append(layer)
        works[layer].cancelled = True

    batch.add(works)
    with Layers(model, leave):
        batch.step()
    assert seen == [0, 1, 2] and not batch.prompts_computed
    assert {work.tell.end.reason for work in works} == {"cancelled"}


def test_a_prompt_without_finite_scores_fails_alone(tiny, questions):
    tokenizer, model = tiny
    jobs = jobs_of(questions, 4)
    ids = [alone(model, tokenizer, job) for job in jobs]
    works = [generation(tokenizer, **job) for job in jobs]
    marker = next(token for token in works[1].ids if not any(token in work.ids for work in works[:1] + works[2:]))

    def poison(_, inputs, output):
        return output.masked_fill((inputs[0] == marker)[..., None] & (inputs[0].shape[1] > 1), float("nan"))

    handle, batch = model.get_input_embeddings().register_forward_hook(poison), Batch(model)
    batch.together = 10**6
    try:
        batch.add(works)
        run(batch)
    finally:
        handle.remove()
    assert works[1].tell.end.reason == "error" and "not finite" in str(works[1].tell.end.error)
    for work, expected in zip(works[:1] + works[2:], ids[:1] + ids[2:]):
        assert work.ids + work.answer == expected


def test_an_end_of_the_server_ends_a_prompt_of_several_at_its_next_layer(tiny, questions):
    tokenizer, model = tiny
    batch, seen = Batch(model), []
    works = [generation(tokenizer, query) for query in questions[:3]]

    def end(layer):
        seen.append(layer)
        batch.stopped_by = ShuttingDown()

    batch.add(works)
    with Layers(model, end):
        batch.step()
    assert seen == [0] and all(isinstance(work.tell.end.error, ShuttingDown) for work in works)


# ---- joining and leaving --------------------------------------------------------------------------------------------


def test_a_cancelled_row_is_free_before_the_next_token(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model, slots=4)
    works = [generation(tokenizer, query, max_tokens=100) for query in questions[:4]]
    batch.end_ids = set()  # they go on
    batch.add(works)
    for _ in range(6):
        batch.step()
    told = len(works[1].answer)
    works[1].cancelled = True
    batch.step()
    assert works[1] not in batch.running and len(works[1].answer) == told
    assert works[1].tell.end.reason == "cancelled"
    assert len(batch.cache.lengths) == len(batch.running) == 3


class Layers:
    """Calls `act(layer)` at each layer of a prompt (of more tokens than one)."""

    def __init__(self, model, act):
        self.handles = [
            block.register_forward_pre_hook(lambda _, inputs, n=n: act(n) if inputs[0].shape[1] > 1 else None)
            for n, block in enumerate(model.base_model.layers)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def test_a_prompt_whose_client_left_stops_at_its_next_layer(tiny, questions):
    tokenizer, model = tiny
    batch, seen = Batch(model, slots=4), []
    work = generation(tokenizer, questions[0])

    def leave(layer):
        seen.append(layer)
        work.cancelled = True

    with Layers(model, leave):
        batch.add([work])
        batch.step()
    assert seen == [0] and work.tell.end.reason == "cancelled"
    assert not batch.running and not batch.prompts_computed
    again = generation(tokenizer, questions[0])
    batch.add([again])
    run(batch)
    assert again.answer


def test_the_others_get_tokens_between_the_layers_of_a_prompt(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model, slots=4)
    batch.end_ids = set()
    runner = generation(tokenizer, questions[0], max_tokens=200)
    batch.add([runner])
    batch.step()
    told = []

    def look(_):
        batch.step_ended = 0.0  # as if the last step were long ago
        told.append(len(runner.answer))

    with Layers(model, look):
        batch.add([generation(tokenizer, questions[1])])
        batch.step()
    assert told == list(range(told[0], told[0] + model.config.num_layers))


def test_one_question_of_many_answers_is_computed_once(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model, slots=2, kept_bytes=0)
    first, *others = jobs_of([questions[0]] * 5, 5)
    jobs = [{**first, "sampling": Sampling(seed=seed)} for seed in range(5)]
    works = [generation(tokenizer, **job) for job in jobs]
    batch.add(works)
    run(batch)
    assert (batch.prompts_computed, batch.prompts_reused) == (1, 4)
    assert [work.ids + work.answer for work in works] == [alone(model, tokenizer, job) for job in jobs]


def test_a_question_asked_again_is_not_computed_again(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model)
    works = [generation(tokenizer, questions[0]) for _ in range(2)]
    for work in works:
        batch.add([work])
        run(batch)
    assert (batch.prompts_computed, batch.prompts_reused) == (1, 1)
    assert works[0].answer == works[1].answer


def test_kept_prompts_stay_within_their_room(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model, kept_bytes=200_000)
    for query in questions[:20]:
        batch.add([generation(tokenizer, query, max_tokens=2)])
        run(batch)
        kept = [prompt.states.bytes for prompt in batch.kept.prompts.values()]
        assert sum(kept) == batch.kept.used <= 200_000
    assert 1 < len(kept) < 20


def test_rows_times_the_longest_stay_within_the_places(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model, slots=8, places=200)
    works = [generation(tokenizer, query, max_tokens=60) for query in questions[:8]]
    batch.add(works)
    most = 0
    while batch.step():
        rows = len(batch.running)
        most = max(most, rows)
        assert rows <= 1 or rows * max(work.tokens for work in batch.running) <= 200
    assert most > 1 and all(work.tell.end.reason in ("stop", "length") for work in works)


def test_room_is_given_back_when_long_answers_have_left(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model, slots=8)
    batch.end_ids = set()
    batch.add([generation(tokenizer, query, max_tokens=300) for query in questions[:8]])
    rooms = set()
    while batch.step():
        rooms.add(batch.cache.room)
    assert (8, 512) in rooms
    batch.add([generation(tokenizer, questions[9], max_tokens=2)])
    run(batch)
    assert math.prod(batch.cache.room) <= 4 * 256


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_a_row_without_finite_scores_fails_alone(tiny, questions, monkeypatch):
    tokenizer, model = tiny
    jobs = jobs_of(questions, 4)
    batch = Batch(model, slots=4)
    works = [generation(tokenizer, **{**job, "max_tokens": 30}) for job in jobs]
    forward = batch._forward

    def poisoned():
        scores = forward()
        if batch.steps == 5:
            row = batch.running.index(works[1])
            for buffer in batch.cache.layers[0]:
                buffer[row, :, 3] = float("nan")
        return scores

    monkeypatch.setattr(batch, "_forward", poisoned)
    batch.end_ids = set()
    batch.add(works)
    run(batch)
    assert works[1].tell.end.reason == "error" and "not finite" in str(works[1].tell.end.error)
    assert len(works[1].answer) < 30
    for work in works[:1] + works[2:]:
        assert work.tell.end.reason == "length" and len(work.answer) == 30


def test_an_error_in_a_prompt_is_told_to_its_request_alone(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model, slots=4)
    good, bad = (generation(tokenizer, query, max_tokens=10) for query in questions[:2])
    bad.ids = bad.ids[:-2]  # neither [gMASK] nor <sop>
    batch.add([good, bad])
    run(batch)
    assert bad.tell.end.reason == "error" and "<sop>" in str(bad.tell.end.error)
    assert good.tell.end.reason in ("stop", "length")


def test_an_error_in_a_step_is_told_to_all_rows_and_the_next_request_is_served(tiny, questions, monkeypatch):
    tokenizer, model = tiny
    batch = Batch(model, slots=4)
    works = [generation(tokenizer, query, max_tokens=10) for query in questions[:3]]
    batch.add(works)
    for _ in range(3):
        batch.step()
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_forward", lambda: (_ for _ in ()).throw(MemoryError("no memory")))
        batch.step()
    assert {work.tell.end.reason for work in works} <= {"error", "stop"}
    after = generation(tokenizer, questions[5])
    batch.add([after])
    run(batch)
    assert after.tell.end.reason in ("stop", "length")


# ---- embeddings -----------------------------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_last_hidden_states_of_the_text(tiny, questions):
    tokenizer, model = tiny
    batch = Batch(model)
    works = [Embedding(tokenizer.build_chat_input_ids(query), Heard()) for query in questions[:3]]
    batch.add([*works, generation(tokenizer, questions[4])])
    run(batch)
    for work in works:
        vector, end = work.tell.events
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([work.ids])).last_hidden_state[0]
        assert end.reason == "stop"
        torch.testing.assert_close(vector, states[:-2].mean(dim=0))


# ---- the thread -----------------------------------------------------------------------------------------------------


def until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def wait_for(works):
    until(lambda: all(work.tell.end for work in works))


def test_the_thread_serves_whoever_submits_and_ends_with_close(tiny, questions):
    tokenizer, model = tiny
    before = threading.active_count()
    scheduler = Scheduler(Batch(model, slots=4)).start()
    jobs = jobs_of(questions, 8)
    works = [generation(tokenizer, **job) for job in jobs]
    threads = [threading.Thread(target=scheduler.submit, args=([work],)) for work in works]
    for thread in threads:
        thread.start()
    wait_for(works)
    assert [work.ids + work.answer for work in works] == [alone(model, tokenizer, job) for job in jobs]
    scheduler.close()
    assert not scheduler.thread.is_alive() and threading.active_count() == before


def test_a_full_queue_takes_no_more_and_says_when_to_come_again(tiny, questions):
    tokenizer, model = tiny
    scheduler = Scheduler(Batch(model, slots=1), queue=2)  # not started: nothing leaves the queue
    scheduler.submit([generation(tokenizer, questions[0])])
    with pytest.raises(QueueFull) as refused:
        scheduler.submit([generation(tokenizer, query) for query in questions[:2]])
    assert 1 <= refused.value.retry_after <= 120
    assert scheduler.waiting == 1
    scheduler.submit([generation(tokenizer, questions[1])])


def test_close_lets_finish_what_can_and_ends_the_rest_in_time(tiny, questions):
    tokenizer, model = tiny
    scheduler = Scheduler(Batch(model, slots=2)).start()
    short = generation(tokenizer, questions[0], max_tokens=2)
    endless = [generation(tokenizer, query, max_tokens=10**9) for query in questions[1:4]]
    scheduler.batch.end_ids = set()
    scheduler.submit([short, *endless])
    until(lambda: endless[0].answer)
    started = time.monotonic()
    scheduler.close(seconds=3)  # one more token of `short`, on a busy machine
    assert not scheduler.thread.is_alive() and time.monotonic() - started >= 3
    assert short.tell.end.reason == "length"
    assert all(isinstance(work.tell.end.error, ShuttingDown) for work in endless)
    with pytest.raises(ShuttingDown):
        scheduler.submit([generation(tokenizer, questions[0])])


def test_a_fault_of_ours_ends_what_runs_and_the_thread_goes_on(tiny, questions, monkeypatch):
    tokenizer, model = tiny
    scheduler = Scheduler(Batch(model, slots=2)).start()
    step, faults = scheduler.batch.step, [RuntimeError("a fault")]
    monkeypatch.setattr(scheduler.batch, "step", lambda: step() if not faults else (_ for _ in ()).throw(faults.pop()))
    bad = generation(tokenizer, questions[0])
    scheduler.submit([bad])
    wait_for([bad])
    assert str(bad.tell.end.error) == "a fault"
    good = generation(tokenizer, questions[1])
    scheduler.submit([good])
    wait_for([good])
    assert good.tell.end.reason in ("stop", "length")
    scheduler.close()
