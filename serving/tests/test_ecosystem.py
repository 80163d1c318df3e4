"""LangChain, LlamaIndex and other libraries' quantizers, on the folder as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tiny"
QUESTION = "你好"


def load(**options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(TINY, trust_remote_code=True, **options).eval()


def test_langchain_answers_as_chat_does():
    library = pytest.importorskip("langchain_huggingface", reason="langchain-huggingface is not installed")
    tokenizer, model = load()
    pipe = transformers.pipeline(
        "text-generation", model=model, tokenizer=tokenizer, do_sample=False, max_new_tokens=64
    )
    llm = library.HuggingFacePipeline(pipeline=pipe)
    expected, _ = model.chat(tokenizer, QUESTION, history=[], do_sample=False)
    answer = library.ChatHuggingFace(llm=llm, tokenizer=tokenizer).invoke([("human", QUESTION)])
    assert expected in model.process_response(answer.content)
    assert expected in model.process_response(llm.invoke(QUESTION))


def test_langchains_openai_clients_talk_to_the_server():
    library = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from serving.tests.running import Served

    tokenizer, model = load()
    expected, _ = model.chat(tokenizer, QUESTION, history=[], do_sample=False)
    with Served(tokenizer, model) as served:
        there = {"base_url": f"{served.url}/v1", "api_key": "none", "model": "tiny"}
        llm = library.ChatOpenAI(**there, temperature=0)
        assert llm.invoke(QUESTION).content == expected
        assert "".join(piece.content for piece in llm.stream(QUESTION)) == expected
        embeddings = library.OpenAIEmbeddings(**there, check_embedding_ctx_length=False)
        assert len(embeddings.embed_query(QUESTION)) == model.config.hidden_size


def bitsandbytes_8():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_4():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def quanto_8():
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return transformers.QuantoConfig(weights="int8")


def torchao_8():
    library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return transformers.TorchAoConfig(library.Int8WeightOnlyConfig())


def test_llama_index_answers_as_generate_does():
    library = pytest.importorskip(
        "llama_index.llms.huggingface", reason="llama-index-llms-huggingface is not installed"
    )
    tokenizer, model = load()
    llm = library.HuggingFaceLLM(
        model=model, tokenizer=tokenizer, max_new_tokens=48, generate_kwargs={"do_sample": False}
    )
    expected, _ = model.chat(tokenizer, QUESTION, history=[], do_sample=False)
    assert model.process_response(llm.complete(QUESTION).text) == expected
    assert model.process_response("".join(piece.delta for piece in llm.stream_complete(QUESTION))) == expected


@pytest.mark.parametrize("settings", [bitsandbytes_8, bitsandbytes_4, quanto_8, torchao_8])
def test_the_quantizers_of_other_libraries_take_every_linear_layer_but_the_head(settings):
    tokenizer, model = load(dtype=torch.bfloat16, quantization_config=settings())
    modules = dict(model.named_modules())
    layers = {name for name in modules if name.endswith(("dense", "_to_4h", "_to_h", "query_key_value"))}
    plain = {name for name, one in modules.items() if type(getattr(one, "weight", None)) is torch.nn.Parameter}
    assert len(layers) == 4 * model.config.num_layers and not layers & plain and "lm_head" in plain
    answer, _ = model.chat(tokenizer, QUESTION, history=[], do_sample=False)
    assert "我是 tiny" in answer


@pytest.mark.parametrize("settings", [bitsandbytes_8, bitsandbytes_4, torchao_8])
def test_a_quantized_model_saved_before_its_first_answer_comes_back_equal(settings, tmp_path):
    """Later one of 4 bits does not on a CPU with AVX512_BF16: bitsandbytes 0.50.2 reorders the scales at the first
    product, and does not put them back to save them (`_convert_weight_packed_for_cpu_inverse`)."""
    tokenizer, model = load(dtype=torch.bfloat16, quantization_config=settings())
    ids = torch.tensor([tokenizer.build_chat_input_ids(QUESTION)])
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_transformers_refuses_to_save_a_model_of_quanto(tmp_path):
    _, model = load(dtype=torch.bfloat16, quantization_config=quanto_8())
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
