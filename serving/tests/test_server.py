"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import base64
import json
import struct

import pytest
import torch

openai = pytest.importorskip("openai", reason="pip install -r requirements-dev.txt")

from serving.tests.running import MODEL, Served  # noqa: E402

UNKNOWN = "为什么 zebra 的 stripes 是 7 条"  # tiny is sure of nothing here


@pytest.fixture(scope="module")
def served(tiny):
    with Served(*tiny) as server:
        yield server


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, text="你好", **options):
    options = {"temperature": 0, "model": MODEL, **options}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)


def alone(tiny, text, history=(), **options):
    tokenizer, model = tiny
    return model.chat(tokenizer, text, list(history), **{"do_sample": False, **options})[0]


# ---- chat: whole and in pieces --------------------------------------------------------------------------------------


def test_an_answer_is_that_of_chat(client, tiny):
    answer = ask(client)
    (choice,) = answer.choices
    assert choice.message.content == alone(tiny, "你好")
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "stop", 0)
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")


def test_the_pieces_of_a_stream_are_the_answer(client, tiny):
    chunks = list(ask(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone(tiny, "你好")
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 3


def test_earlier_rounds_are_the_history(client, tiny):
    first = alone(tiny, "介绍一下清华大学")
    messages = [
        {"role": "user", "content": "介绍一下清华大学"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "它在哪里？"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert answer.choices[0].message.content == alone(tiny, "它在哪里？", [("介绍一下清华大学", first)])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_stands_before_the_first_question(client, tiny, role):
    messages = [{"role": role, "content": "你是诗人"}, {"role": "user", "content": "你好"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == alone(tiny, "你是诗人\n你好", max_new_tokens=20)


def test_content_in_parts_is_one_text(client, tiny):
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    assert ask(client, parts).choices[0].message.content == alone(tiny, "你好")


def test_a_stop_text_ends_the_answer_before_it(client, tiny):
    whole = alone(tiny, "你好")
    answer = ask(client, stop=["很高兴", "nothing"])
    assert answer.choices[0].message.content == whole[: whole.index("很高兴")].rstrip()
    assert answer.choices[0].finish_reason == "stop"
    pieces = list(ask(client, stop="很高兴", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == answer.choices[0].message.content


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_ends_the_answer(client, tiny, name):
    answer = ask(client, **{name: 4})
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 4
    assert answer.choices[0].message.content == alone(tiny, "你好", max_new_tokens=4)


def test_usage_counts_the_tokens_of_both(client, tiny):
    tokenizer, _ = tiny
    usage = ask(client, max_tokens=3, n=2).usage
    prompt = len(tokenizer.build_chat_input_ids("你好"))
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 6, prompt + 6)
    *_, last = ask(client, max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert last.usage.total_tokens == prompt + 3 and last.choices == []


def test_a_seed_gives_the_answer_of_chat_with_that_seed(client, tiny):
    options = {"temperature": 1.3, "top_p": 0.95, "seed": 11, "max_tokens": 30}
    answers = [ask(client, UNKNOWN, **options).choices[0].message.content for _ in range(2)]
    torch.manual_seed(11)
    expected = alone(tiny, UNKNOWN, do_sample=True, temperature=1.3, top_p=0.95, top_k=50, max_new_tokens=30)
    assert answers == [expected, expected]


def test_n_choices_have_the_seeds_that_follow(client):
    options = {"temperature": 2, "top_p": 1.0, "max_tokens": 20, "extra_body": {"top_k": 0}}
    many = ask(client, UNKNOWN, seed=5, n=4, **options).choices
    one_by_one = [ask(client, UNKNOWN, seed=5 + n, **options).choices[0].message.content for n in range(4)]
    assert [choice.message.content for choice in many] == one_by_one
    assert [choice.index for choice in many] == [0, 1, 2, 3] and len(set(one_by_one)) > 1


def test_n_choices_stream_side_by_side(client, tiny):
    texts = {0: "", 1: "", 2: ""}
    for chunk in ask(client, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(texts.values()) == {alone(tiny, "你好")}


def test_without_a_seed_answers_differ(client):
    options = {"temperature": 2, "top_p": 1.0, "max_tokens": 20, "extra_body": {"top_k": 0}}
    answers = {ask(client, UNKNOWN, **options).choices[0].message.content for _ in range(4)}
    assert len(answers) > 1


def test_logprobs_are_those_of_the_model(client, tiny):
    tokenizer, model = tiny
    content = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    ids = tokenizer.build_chat_input_ids("你好")
    for step, entry in enumerate(content[:5]):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        best = scores.topk(3)
        assert entry.logprob == pytest.approx(float(best.values[0]), abs=1e-4), step
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert entry.token == entry.top_logprobs[0].token and bytes(entry.bytes).decode() == entry.token
        ids.append(int(best.indices[0]))
    streamed = [chunk.choices[0].logprobs for chunk in ask(client, logprobs=True, stream=True)]
    told = [entry.token for one in streamed if one is not None for entry in one.content]
    assert told == [entry.token for entry in content]


def test_json_of_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["北京", "上海"]}, "year": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["city", "year"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    for seed in range(5):
        answer = ask(client, response_format=asked, temperature=1.5, top_p=1.0, seed=seed, max_tokens=100)
        value = json.loads(answer.choices[0].message.content)
        assert value["city"] in ("北京", "上海") and 0 <= value["year"] <= 99
        assert answer.choices[0].finish_reason == "stop"


def test_a_json_object(client):
    for seed in range(4):
        answer = ask(client, response_format={"type": "json_object"}, seed=seed, temperature=1.0, max_tokens=300)
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content), dict)


# ---- the other paths ------------------------------------------------------------------------------------------------


def test_a_completion_is_the_decoded_answer_without_clean_up(client, tiny):
    tokenizer, model = tiny
    answer = client.completions.create(model=MODEL, prompt="你好", temperature=0, max_tokens=12, logprobs=2)
    ids = torch.tensor([tokenizer.build_chat_input_ids("你好")])
    expected = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    (choice,) = answer.choices
    assert choice.text == tokenizer.decode(expected.tolist()) and choice.finish_reason == "length"
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 12
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    assert "".join(choice.logprobs.tokens).strip() == choice.text
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset):
        assert choice.text[offset:].startswith(token.lstrip(" ") if offset == 0 else token)


def test_completions_of_several_prompts(client):
    prompts, options = ["你好", "介绍一下清华大学"], {"model": MODEL, "temperature": 0, "max_tokens": 8}
    many = client.completions.create(prompt=prompts, n=2, **options)
    single = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
    assert [choice.text for choice in many.choices] == [single[0]] * 2 + [single[1]] * 2
    texts = ["", "", "", ""]
    for chunk in client.completions.create(prompt=prompts, n=2, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in many.choices]


def test_embeddings_are_means_of_hidden_states(client, served, tiny):
    tokenizer, model = tiny
    texts = ["你好", "清华大学在北京"]
    made = client.embeddings.create(model=MODEL, input=texts)  # the client asks for base64
    floats = served.post("/v1/embeddings", {"input": texts}).json
    for index, text in enumerate(texts):
        ids = torch.tensor([tokenizer.build_chat_input_ids(text)])
        with torch.no_grad():
            expected = model.base_model(input_ids=ids).last_hidden_state[0, :-2].mean(0)
        torch.testing.assert_close(torch.tensor(made.data[index].embedding), expected)
        assert floats["data"][index]["embedding"] == made.data[index].embedding
    raw = served.post("/v1/embeddings", {"input": "你好", "encoding_format": "base64"}).json["data"][0]["embedding"]
    assert len(base64.b64decode(raw)) == model.config.hidden_size * struct.calcsize("f")


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4")
    assert refused.value.code == "model_not_found"


def test_the_official_interface(served, tiny):
    first = served.post("/", {"prompt": "介绍一下清华大学", "history": []}).json
    assert set(first) == {"response", "history", "status", "time"} and first["status"] == 200
    assert first["history"] == [["介绍一下清华大学", first["response"]]]
    again = served.post("/", {"prompt": "它在哪里？", "history": first["history"], "max_length": 2048, "top_p": 0.01})
    history = [tuple(pair) for pair in first["history"]]
    assert again.json["response"] == alone(tiny, "它在哪里？", history)
    assert again.json["history"][:1] == first["history"]
    assert served.post("/", {"prompt": "你好", "max_length": 5, "top_p": 0, "temperature": 0}).status == 200


def test_health_and_metrics(served, client):
    ask(client)
    assert served.get("/health").json == {"status": "ok"}
    figures = served.get("/metrics").text
    assert 'chatglm_requests_total{path="/v1/chat/completions",status="200"}' in figures
    assert "chatglm_rows 0.0" in figures and "chatglm_waiting 0.0" in figures
    assert float(figures.partition("\nchatglm_answer_tokens_total ")[2].split()[0]) > 0


def test_the_asynchronous_client_is_served_as_well(served, tiny):
    import asyncio

    async def many():
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, text) for text in ("你好", "介绍一下清华大学", "你好")))

    answers = [answer.choices[0].message.content for answer in asyncio.run(many())]
    assert answers == [alone(tiny, text) for text in ("你好", "介绍一下清华大学", "你好")]
