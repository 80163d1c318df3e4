"""Model cards, and `push_to_hub` of model and tokenizer, against a stand-in of the Hub's HTTP API on 127.0.0.1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from chatglm_slim.configuration_chatglm import CODE_VERSION, ChatGLMConfig, model_card
from huggingface_hub import ModelCard

from package import copy_package

ROOT = Path(__file__).resolve().parents[1]
OPEN = """
import sys
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
PUSH = "model.push_to_hub('me/pushed')\ntokenizer.push_to_hub('me/pushed')\n"
SAVE_AND_PUSH = "model.save_pretrained('saved', push_to_hub=True, repo_id='me/pushed')\n"
CHAT = """
import json
answer, _ = model.eval().chat(tokenizer, "你好", history=[], do_sample=False)
print(json.dumps([type(model).__module__, answer]))
"""
USERS = "---\nlicense: mit\n---\n# Mine\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`tiny` without its card."""
    copy = tmp_path_factory.mktemp("hub") / "tiny"
    shutil.copytree(ROOT / "tiny", copy, ignore=shutil.ignore_patterns("README.md", "__pycache__"))
    copy_package(copy)
    return copy


def ran(hub: dict, program: str, *arguments) -> str:
    process = hub["run"]("-c", program, *arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_a_pushed_model_and_tokenizer_load_from_the_hub_and_have_a_card(hub, folder):
    if not hasattr(transformers, "GenerationConfig"):
        pytest.skip("auto_map in a saved folder")
    ran(hub, OPEN + PUSH, folder)
    pushed = hub["repositories"] / "me" / "pushed"
    assert {path.name for path in pushed.iterdir()} >= {"modeling_chatglm.py", "ice_text.model", "config.json"}
    assert (
        (pushed / "README.md")
        .read_text(encoding="utf-8")
        .startswith(model_card(ChatGLMConfig.from_pretrained(folder)))
    )
    module, answer = json.loads(ran(hub, OPEN + CHAT, "me/pushed").splitlines()[-1])
    assert module.startswith("transformers_modules.") and "pushed" in module
    assert "我是 tiny" in answer


@pytest.mark.parametrize("where", ["folder", "hub", "nowhere"])
def test_the_card_of_a_user_stays_and_no_other_is_in_its_place(hub, folder, tmp_path, where):
    places = {"folder": tmp_path / "saved", "hub": hub["repositories"] / "me" / "pushed"}
    if where in places:
        places[where].mkdir(parents=True)
        (places[where] / "README.md").write_text(USERS, encoding="utf-8")
    ran(hub, OPEN + SAVE_AND_PUSH, folder)
    expected = USERS if where in places else model_card(ChatGLMConfig.from_pretrained(folder))
    text = (places["hub"] / "README.md").read_text(encoding="utf-8")
    assert text.rstrip() == expected.rstrip() or (where == "hub" and "# Mine" in text and "license: mit" in text)


def test_the_card_says_of_the_6b_model_what_the_hub_shows(tmp_path):
    (tmp_path / "README.md").write_text(model_card(ChatGLMConfig()), encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    found = card.data.to_dict()
    assert found["language"] == ["zh", "en"] and found["license"] == "other"
    assert found["license_name"] == "chatglm-6b-license" and found["license_link"].endswith("/MODEL_LICENSE")
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert found["base_model"] == "THUDM/chatglm-6b"
    assert f"version {CODE_VERSION} of the code" in card.text


def test_of_another_model_the_card_claims_neither_licence_nor_base(tmp_path):
    (tmp_path / "README.md").write_text(model_card(ChatGLMConfig(num_layers=2)), encoding="utf-8")
    found = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert not {"license", "license_name", "base_model", "base_model_relation"} & set(found)


def test_saving_writes_a_card_once_and_never_over_the_users(folder, tmp_path):
    model = transformers.AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    card = tmp_path / "saved" / "README.md"
    assert card.read_text(encoding="utf-8") == model_card(model.config)
    card.write_bytes(USERS.encode("utf-16"))  # whatever it is
    model.save_pretrained(tmp_path / "saved")
    assert card.read_bytes() == USERS.encode("utf-16")
    model.save_pretrained(tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "er" / "README.md").is_file()
