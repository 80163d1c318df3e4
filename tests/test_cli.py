"""The terminal chat, as a person uses it (on a pseudo-terminal) and piped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chatglm_slim.chat import with_round
from chatglm_slim.tokenization_chatglm import ChatGLMTokenizer
from terminal import Terminal
from test_compat import make_folder

from serving import cli, loading, screen

ROOT = Path(__file__).resolve().parents[1]
GREETING = "你好👋！我是人工智能 ChatGLM-6B，可以回答问题。"
CTRL_C, CTRL_D = b"\x03", b"\x04"


@pytest.fixture(scope="module")
def talker(tmp_path_factory, golden, tiny_sp_model) -> Path:
    """A trained toy whose greedy answers are known."""
    return make_folder(tmp_path_factory.mktemp("cli") / "talker", golden / "model" / "chat2d", tiny_sp_model)


@pytest.fixture(scope="module")
def endless(tmp_path_factory, golden, tiny_sp_model) -> Path:
    """Random weights: talks until the context is full."""
    return make_folder(tmp_path_factory.mktemp("cli") / "endless", golden / "model" / "base2d", tiny_sp_model)


def command(model: Path, *options: str) -> list[str]:
    program = [sys.executable, str(ROOT / "cli_chat.py"), "--model", str(model), "--device", "cpu", "--greedy"]
    return [*program, "--plain", *options]


def test_a_conversation_in_a_terminal(talker):
    pytest.importorskip("pty")
    terminal = Terminal(command(talker))
    at = terminal.wait_for(screen.ASK.strip())
    assert "2 layers of 64, 1472 tokens, float32" in terminal.seen
    terminal.type("你好\n")
    at = terminal.wait_for(f"{screen.ANSWER}{GREETING}\n", at)
    at = terminal.wait_for(screen.ASK.strip(), at)
    assert terminal.seen.count("👋") == 1, "a part of the answer was drawn twice"

    at = terminal.interrupt("leaves)", at)  # at the prompt: no exit
    at = terminal.wait_for(screen.ASK.strip(), at)

    terminal.type("clear\n")
    at = terminal.wait_for(screen.CLEAR_SCREEN, at)
    at = terminal.wait_for(screen.ASK.strip(), at)
    terminal.type("写 code\n")
    at = terminal.wait_for("def f(x):\n    return x\t# ok", at)
    at = terminal.wait_for(screen.ASK.strip(), at)
    terminal.type("stop\n")
    assert terminal.exit_code() == 0


@pytest.mark.parametrize("name", ["C", "POSIX"])
def test_chinese_can_be_typed_and_deleted_in_a_locale_without_letters(talker, name):
    pytest.importorskip("pty")
    pytest.importorskip("readline")
    terminal = Terminal(command(talker), LC_ALL=name)
    at = terminal.wait_for(screen.ASK.strip())
    terminal.type("你好吗\x7f\n")  # the key Backspace takes a whole character
    at = terminal.wait_for(f"{screen.ANSWER}{GREETING}\n", at)
    at = terminal.wait_for(screen.ASK.strip(), at)
    terminal.type("\t\t\n")  # a tab lists no files
    at = terminal.wait_for(screen.ASK.strip(), at)
    assert "pyproject.toml" not in terminal.seen
    terminal.type("/bye\n")
    assert terminal.exit_code() == 0


def test_ctrl_c_while_loading_ends_the_program_without_a_traceback(talker):
    pytest.importorskip("pty")
    terminal = Terminal(command(talker))
    terminal.wait_for("loading")
    terminal.type(CTRL_C)
    assert terminal.exit_code() == cli.INTERRUPTED
    assert "stopped while loading" in terminal.seen and "Traceback" not in terminal.seen


def test_ctrl_c_stops_the_answer_and_not_the_program(endless):
    """On the way: pasted lines are one question, and so are lines continued with a backslash."""
    pytest.importorskip("pty")
    pytest.importorskip("readline")
    terminal = Terminal(command(endless, "--max-length", "100000"))
    at = terminal.wait_for(screen.ASK.strip())
    for question in (b"\x1b[200~one\ntwo\nthree\x1b[201~\n", b"four \\\nfive\n"):
        terminal.type(question)
        at = terminal.wait_for(screen.ANSWER, at)
        begun = len(terminal.seen)
        while len(terminal.seen) < begun + 30:
            assert terminal.read(30)
        terminal.type(CTRL_C)
        terminal.type(CTRL_C)  # a second one, in a hurry
        at = terminal.wait_for("(stopped)", at)
        at = terminal.wait_for(screen.ASK.strip(), at)
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0
    assert terminal.seen.count(screen.ANSWER) == 2


def run(model: Path, typed: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    environment.pop("PYTHONIOENCODING", None)
    return subprocess.run(
        command(model, *options), input=typed, capture_output=True, text=True, encoding="utf-8", env=environment
    )


def test_piped_questions_are_answered_line_by_line_until_the_end(talker):
    done = run(talker, "你好\n\nclear\nsay hi\n")
    assert done.returncode == 0, done.stderr
    answers = re.findall(rf"^{re.escape(screen.ANSWER)}(.*)$", done.stdout, re.MULTILINE)
    assert answers == [GREETING, "Hi, how are you?"]
    assert screen.CLEAR_SCREEN not in done.stdout


def test_dtype_and_bits_are_applied_and_shown(talker):
    done = run(talker, "say hi\nstop\nnever read\n", "--dtype", "bfloat16", "--bits", "4")
    assert done.returncode == 0, done.stderr
    assert "INT4 + bfloat16" in done.stdout
    assert done.stdout.count(screen.ANSWER) == 1


def test_pipes_are_utf_8_whatever_the_code_page(talker):
    done = run(talker, "你好\n", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")  # Python's encoding is ASCII
    assert done.returncode == 0, done.stderr
    assert f"{screen.ANSWER}{GREETING}\n" in done.stdout


def test_words_that_are_commands():
    leave = ["stop", "exit", "quit", " Quit ", "/stop", "/exit", "/quit", "/bye"]
    assert all(cli.command(line)[0] in cli.LEAVE for line in leave)
    assert cli.command("clear") == cli.command("/clear") == (cli.CLEAR, "")
    assert cli.command("/help") == cli.command("/?") == cli.command("/halp") == ("/help", "")
    assert cli.command(" /System  be brief\nplease ") == ("/system", "be brief\nplease")
    assert cli.command("/set") == ("/set", "")
    questions = ["", "bye", "help", "stop it", "/etc/passwd", "/", "你好", "/setting sun", "save this"]
    assert not any(cli.command(line)[0] for line in questions)


# --- what cannot be loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere/at/all", "there is no such folder"),
        ("./nowhere", "there is no such folder"),
        ("/nowhere", "there is no such folder"),
        ("~/nowhere", "there is no such folder"),
        ("", "the name is empty"),
        (str(ROOT / "cli_chat.py"), "this is a file"),
        (str(ROOT / "tests"), "no config.json"),
        (str(ROOT / "tests" / "golden" / "model" / "base2d"), r"slim.py .*base2d OUTPUT --repackage` makes"),
    ],
)
def test_a_name_that_leads_to_no_model_is_refused_with_the_reason(name, message):
    with pytest.raises(ValueError, match=message):
        loading.find(name)


def test_a_folder_that_is_none_gives_one_line_and_an_exit_code(tmp_path):
    done = run(tmp_path / "nowhere", "")
    assert (done.returncode, done.stdout) == (1, f"loading {tmp_path / 'nowhere'} …\n")
    assert done.stderr == f"cannot load {tmp_path / 'nowhere'}: there is no such folder\n"


def test_the_home_folder_may_be_a_tilde(talker, monkeypatch):
    monkeypatch.setenv("HOME", str(talker.parent))
    monkeypatch.setenv("USERPROFILE", str(talker.parent))
    assert loading.find(f"~/{talker.name}") == {"pretrained_model_name_or_path": str(talker)}


def hub_answers(monkeypatch, answer, cached=None) -> list:
    """What the Hub says from now on, and what its cache holds; returns the names that it is asked for."""
    import huggingface_hub

    asked = []

    def model_info(self, name, timeout):
        asked.append(name)
        if isinstance(answer, Exception):
            raise answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: cached)
    return asked


def test_a_name_on_the_hub_is_asked_for_once(monkeypatch, capsys):
    asked = hub_answers(monkeypatch, None)
    assert loading.find("someone/chatglm-6b-slim") == {"pretrained_model_name_or_path": "someone/chatglm-6b-slim"}
    unreachable = ConnectionError("Name or service not known\nand more")
    hub_answers(monkeypatch, unreachable, "/cache/config.json")
    assert loading.find("a/b") == {"pretrained_model_name_or_path": "a/b", "local_files_only": True}
    assert "copy of an earlier download" in capsys.readouterr().out
    again = hub_answers(monkeypatch, unreachable)
    with pytest.raises(ValueError, match=r"no folder of this name here, .* does not answer \(Name or .* known\)$"):
        loading.find("a/b")
    assert (asked, again) == (["someone/chatglm-6b-slim"], ["a/b"])


def test_a_name_that_the_hub_does_not_know_is_no_matter_of_the_network(monkeypatch):
    from huggingface_hub.utils import HfHubHTTPError

    error = HfHubHTTPError.__new__(HfHubHTTPError)  # what its making takes differs from version to version
    Exception.__init__(error, "404 Client Error")
    error.response = SimpleNamespace(status_code=404)
    hub_answers(monkeypatch, error, "/cache/config.json")
    with pytest.raises(ValueError, match="no model on the Hub that you may read"):
        loading.find("a/b")


def test_a_device_that_this_pytorch_cannot_use_is_named_before_anything_is_loaded(talker):
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=f"device '{device}' is of no use here: "):
            loading.load(str(talker), device=device)


class ScriptedModel:
    """Streams the given texts, and notes how it was asked and when its stream is closed."""

    def __init__(self, *texts: str):
        self.texts, self.closed, self.asked = texts, False, []

    def stream_chat(self, tokenizer, query, history=None, **options):
        self.asked.append((query, history, options))
        try:
            for text in self.texts:
                yield text, with_round(history, query, text)
        finally:
            self.closed = True


class Prompts:
    """A tokenizer whose prompts are short."""

    def build_chat_input_ids(self, query, history):
        return [0]


def conversation(model, *arguments: str, tokenizer=None) -> cli.Conversation:
    tokenizer = tokenizer or Prompts()
    return cli.Conversation(tokenizer, model, cli.parse(["--greedy", *arguments]), screen.PlainTerminal())


def texts_of(messages: list) -> list:
    return [(one["role"], one["content"]) for one in messages]


def test_an_answer_is_printed_once_whatever_is_rewritten_on_the_way(capsys):
    texts = ["", "[", "[[训", "[[训练时间]", "2023年", "2023年,", "2023年，你", "2023年，你好!", "2023年，你好！"]
    talk = conversation(ScriptedModel(*texts))
    assert talk.hear("q")
    assert capsys.readouterr().out == f"{screen.ANSWER}2023年，你好！\n"
    assert texts_of(talk.messages) == [("user", "q"), ("assistant", "2023年，你好！")]


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_ctrl_c_closes_the_stream_and_keeps_what_was_said(capsys, presses):
    """However often it is pressed before the next token."""

    class Interrupting(ScriptedModel):
        def stream_chat(self, tokenizer, query, history=None, **options):
            for item in super().stream_chat(tokenizer, query, history, **options):
                for _ in range(presses):
                    os.kill(os.getpid(), signal.SIGINT)
                yield item

    before = signal.getsignal(signal.SIGINT)
    talk = conversation(Interrupting("one", "one two"))
    with talk.ctrl_c:
        assert talk.ctrl_c.while_typing(lambda: "typed") == "typed"
        talk.hear("q")
        with pytest.raises(KeyboardInterrupt):  # while a question is typed, it is an exception
            talk.ctrl_c.while_typing(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert talk.model.closed
    assert texts_of(talk.messages) == [("user", "q"), ("assistant", "one")]
    assert capsys.readouterr().out == f"{screen.ANSWER}one (stopped)\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_refused_question_leaves_the_history_as_it_was(capsys):
    class Refusing:
        def stream_chat(self, *args, **options):
            raise ValueError("prompt of 3000 tokens leaves no room")
            yield

    talk = conversation(Refusing())
    talk.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert talk.hear("q")
    assert texts_of(talk.messages) == [("user", "a"), ("assistant", "b")]
    assert "leaves no room" in capsys.readouterr().out


def test_a_system_message_leads_every_question_until_it_is_taken_back(capsys):
    talk = conversation(ScriptedModel("one"))
    for line in ("first", "/system be brief", "second", "clear", "third", "/system", "fourth"):
        assert talk.hear(line)
    told = [texts_of(history) for _, history, _ in talk.model.asked]
    first, third = [("user", "first"), ("assistant", "one")], [("user", "third"), ("assistant", "one")]
    assert told == [[], [("system", "be brief"), *first], [("system", "be brief")], third]


def test_settings_reach_the_next_answer_and_wrong_ones_are_named(capsys):
    talk = conversation(ScriptedModel("one"))
    for line in ("/set temperature 0.5", "/set top-p=0.9", "/set max_length 99", "q"):
        assert talk.hear(line)
    expected = {"max_length": 99, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert talk.model.asked[-1][2] == expected
    assert "greedy False" in capsys.readouterr().out
    for line, message in {
        "/set temperature 0": "'0': give a number above 0 to 100",
        "/set top_p nan": "'nan': give a number above 0 to 1",
        "/set max_length 2.5": "'2.5': give a whole number from 1 to",
        "/set greedy perhaps": "say on or off",
        "/set colour red": "/set colour red: give one of max_length, ",
        "/set seed": "/set seed: give one of ",
    }.items():
        assert talk.hear(line)
        assert message in capsys.readouterr().out
    assert talk.hear("/set greedy on") and talk.hear("q")
    assert talk.model.asked[-1][2] == {"max_length": 99, "do_sample": False}


def test_a_seed_repeats_what_is_sampled():
    class Rolling(ScriptedModel):
        def stream_chat(self, tokenizer, query, history=None, **options):
            text = str(torch.rand(1).item())
            yield text, with_round(history, query, text)

    talk = conversation(Rolling(), "--seed", "5")
    for line in ("q", "q", "/set seed 5", "q"):
        talk.hear(line)
    answers = [text for role, text in texts_of(talk.messages) if role == "assistant"]
    assert answers[0] == answers[2] != answers[1]


def test_a_conversation_is_saved_and_loaded_whole_and_no_other_file_is_overwritten(tmp_path, capsys, tiny_sp_model):
    tokenizer, file, other = ChatGLMTokenizer(str(tiny_sp_model)), tmp_path / "talk.json", tmp_path / "other"
    other.write_text("mine")
    talk = conversation(ScriptedModel("您好 👋\n再见"), tokenizer=tokenizer)
    for line in ("/system be brief", "你好", f"/save {other}", f"/save {file}", "again", "/save"):
        talk.hear(line)
    assert "is there already" in capsys.readouterr().out
    assert other.read_text() == "mine"
    fresh = conversation(ScriptedModel("one"), tokenizer=tokenizer)
    fresh.hear(f"/load {file}")
    assert texts_of(fresh.messages) == texts_of(talk.messages) and len(fresh.messages) == 5
    assert "user: 你好\n\nassistant: 您好 👋\n再见" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ('{"a": 1}', "not a list"),
        ('[{"role": "user", "content": "q"}]', "ends with the query"),
        ('[{"role": "tool", "content": "q"}]', "'tool'"),
        ('[{"role": "user", "content": 5}]', "not a str"),
    ],
)
def test_a_file_that_holds_no_conversation_is_refused(tmp_path, capsys, tiny_sp_model, content, message):
    talk = conversation(ScriptedModel("one"), tokenizer=ChatGLMTokenizer(str(tiny_sp_model)))
    talk.hear("q")
    if content:
        (tmp_path / "talk.json").write_text(content)
    capsys.readouterr()
    talk.hear(f"/load {tmp_path / 'talk.json'}")
    assert message in capsys.readouterr().out
    assert len(talk.messages) == 2 and talk.file is None


def test_control_characters_never_reach_the_terminal():
    assert screen.printable("a\x1b[2Jb\x07\x9b\n\tc") == "a[2Jb\n\tc"


def test_sampling_options_reach_the_model():
    given = ["--top-p", "0.5", "--temperature", "1.5", "--repetition-penalty", "1.1", "--max-length", "99"]
    expected = {"max_length": 99, "do_sample": True, "top_p": 0.5, "temperature": 1.5, "repetition_penalty": 1.1}
    assert cli.sampling(cli.parse(given)) == expected
    assert cli.sampling(cli.parse(["--greedy"])) == {"max_length": 2048, "do_sample": False}


def test_the_start_waits_for_no_library():
    """--help, and the line that says what is loaded, come before anything slow is imported."""
    code = (
        "import cli_chat, sys; print(sorted({'torch', 'transformers', 'rich', 'prompt_toolkit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_the_terminal_libraries_it_talks_plain_text_and_says_what_would_help(talker):
    pytest.importorskip("pty")
    without = "import sys; sys.modules['prompt_toolkit'] = None; sys.argv[0] = 'cli_chat.py'; import cli_chat; "
    terminal = Terminal(
        [sys.executable, "-c", f"{without}cli_chat.main(sys.argv[1:])", "--model", str(talker), "--greedy"],
        PYTHONPATH=str(ROOT),
    )
    at = terminal.wait_for("requirements-chat.txt")
    at = terminal.wait_for(screen.ASK.strip(), at)
    terminal.type("你好\n")
    at = terminal.wait_for(f"{screen.ANSWER}{GREETING}\n", at)
    terminal.wait_for(screen.ASK.strip(), at)  # before that the line editor does not read yet, and the key is lost
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0
