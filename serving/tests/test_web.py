"""The page in a browser: type, see it stream, stop, try again, undo, edit, clear."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

pytest.importorskip("gradio", reason="Gradio is not installed (serving/requirements-web.txt)")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

from serving import web  # noqa: E402

RICH = "**bold** and $x^2$\n\n```python\ndef f(x):\n    return x  # 注释\n```\n\n1. 第一\n2. 第二"


class Model:
    """Answers by rule, and notes how it was asked and when its stream was closed."""

    config = SimpleNamespace(max_sequence_length=2048)

    def __init__(self):
        self.asked, self.closed = [], threading.Event()

    def stream_chat(self, tokenizer, query, history=None, **options):
        self.asked.append((query, history, options))
        self.closed.clear()
        try:
            if query == "refuse":
                raise ValueError("prompt of 3000 tokens leaves no room")
            if query == "endless":
                for n in range(1, 100000):
                    yield " ".join(f"w{i}" for i in range(n)), None
                    time.sleep(0.05)
            else:
                yield RICH if query == "rich" else f"answer {len(self.asked)} to {query}", None
        finally:
            self.closed.set()


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def address(model):
    app = web.page(SimpleNamespace(build_chat_input_ids=lambda query, history: [0]), model)
    _, local, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **web.LAUNCH)
    yield local
    app.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address, model):
    """The page, open; everything that it asks for is noted."""
    model.asked.clear()
    tab = browser.new_page()
    tab.set_default_timeout(60_000)
    tab.requested = []
    tab.on("request", lambda request: tab.requested.append(request.url))
    tab.goto(address)
    tab.wait_for_selector("textarea")
    yield tab
    tab.close()


def ask(tab, text: str) -> None:
    box = tab.locator("textarea[data-testid=textbox]").first
    playwright.expect(box).to_be_enabled()
    box.fill(text)
    box.press("Enter")


def shown(tab, text: str | re.Pattern):
    found = tab.get_by_test_id("bot").get_by_text(text).first
    found.wait_for()
    return found


def texts(history) -> list[tuple[str, str]]:
    return [(one["role"], one["content"]) for one in history]


def test_an_answer_streams_is_stopped_and_the_page_cleared(tab, model):
    ask(tab, "endless")
    shown(tab, re.compile(r"w3\b"))
    first = tab.get_by_test_id("bot").last.inner_text()
    shown(tab, re.compile(rf"w{len(first.split()) + 3}\b"))
    tab.locator("button.stop-button").click()
    assert model.closed.wait(60), "the model goes on, though it was stopped"
    stopped = tab.get_by_test_id("bot").last.inner_text()
    ask(tab, "hello")
    shown(tab, "answer 2 to hello")
    query, history, _ = model.asked[-1]
    assert texts(history)[0] == ("user", "endless") and stopped.split()[:3] == history[1]["content"].split()[:3]
    tab.get_by_label("Clear").click()
    playwright.expect(tab.get_by_test_id("bot")).to_have_count(0)
    ask(tab, "again")
    shown(tab, "answer 3 to again")
    assert model.asked[-1][1] == []


def test_an_answer_is_tried_again_undone_and_a_question_edited(tab, model):
    ask(tab, "first")
    shown(tab, "answer 1 to first")
    tab.get_by_label("Retry").last.click()
    shown(tab, "answer 2 to first")
    assert [texts(history) for _, history, _ in model.asked] == [[], []]
    ask(tab, "second")
    shown(tab, "answer 3 to second")
    tab.get_by_label("Undo").last.click()
    playwright.expect(tab.get_by_test_id("bot")).to_have_count(1)
    tab.get_by_label("Edit").first.click()
    tab.locator("textarea.edit-textarea").fill("another")
    tab.get_by_label("Submit").first.click()
    shown(tab, "answer 4 to another")
    assert texts(model.asked[-1][1]) == []


def test_settings_reach_the_model(tab, model):
    tab.get_by_text("Settings").click()
    playwright.expect(tab.get_by_label("System message")).to_be_visible()
    settings = {
        "System message": "be brief",
        "number input for Temperature": "0.5",
        "number input for Top-p": "0.9",
        "number input for Max length": "128",
    }
    for label, value in settings.items():
        tab.get_by_label(label).fill(value)
        tab.get_by_label(label).blur()
    tab.get_by_label("Sample").uncheck()
    for label, value in settings.items():
        playwright.expect(tab.get_by_label(label)).to_have_value(value)
    ask(tab, "hello")
    shown(tab, "answer 1 to hello")
    _, history, options = model.asked[-1]
    assert texts(history) == [("system", "be brief")]
    expected = {"do_sample": False, "temperature": 0.5, "top_p": 0.9, "max_length": 128}
    assert options == expected


def test_a_refusal_is_shown_with_its_reason(tab):
    ask(tab, "refuse")
    tab.get_by_text("prompt of 3000 tokens leaves no room").wait_for()


def test_a_tab_that_is_closed_ends_its_answer(browser, address, model):
    tab = browser.new_page()
    tab.goto(address)
    ask(tab, "endless")
    shown(tab, re.compile(r"w3\b"))
    tab.close()
    assert model.closed.wait(60), "the model goes on for nobody"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_markdown_code_and_latex_are_drawn_and_legible(tab, address, theme, tmp_path):
    tab.goto(f"{address}?__theme={theme}")
    ask(tab, "rich")
    bold = tab.get_by_test_id("bot").locator("strong", has_text="bold")
    bold.wait_for()
    assert tab.get_by_test_id("bot").locator(".katex").count() == 1
    assert "return x  # 注释" in tab.get_by_test_id("bot").locator("pre code").inner_text()
    assert tab.get_by_test_id("bot").locator("ol li").all_inner_texts() == ["第一", "第二"]
    code = tab.get_by_test_id("bot").locator("pre code, pre code .token").all()
    assert len(code) > 5
    tab.get_by_text("Settings").click()
    hint = tab.get_by_text("always the likeliest token")
    hint.wait_for()
    labels = [
        tab.get_by_text(text, exact=False).first for text in ("System message", "Sample", "Temperature", "Top-p")
    ]
    for element in (bold, *code, tab.get_by_text("Settings"), hint, *labels):
        assert contrast(element) >= 4.5, "the least that WCAG 2 asks of text (AA)"
    tab.screenshot(path=tmp_path / f"{theme}.png")


def contrast(element) -> float:
    """Of a text and what lies behind it, by the formula of WCAG 2."""
    return element.evaluate("""element => {
        const parts = colour => colour.match(/[\\d.]+/g).map(Number);
        let behind = element;
        while (behind && (parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) == 0) behind = behind.parentElement;
        const background = behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
        let seen = 1;
        for (let one = element; one && one != behind; one = one.parentElement) seen *= getComputedStyle(one).opacity;
        const mixed = parts(getComputedStyle(element).color).slice(0, 3)
            .map((c, i) => seen * c + (1 - seen) * parts(background)[i]);
        const light = channels => channels.map(c => c / 255)
            .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const [low, high] = [light(mixed), light(parts(background).slice(0, 3))].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    }""")


def test_the_page_asks_nobody_but_this_machine(tab):
    ask(tab, "rich")
    tab.get_by_test_id("bot").locator(".katex").wait_for()
    hosts = {re.match(r"\w+://([^/:]+)", url)[1] for url in tab.requested if "://" in url}
    assert hosts == {"127.0.0.1"} and len(tab.requested) > 5


def test_it_listens_on_this_machine_alone_unless_told(capsys):
    assert web.parse([]).host == "127.0.0.1"
    assert web.is_loopback("127.0.0.1") and web.is_loopback("::1") and web.is_loopback("localhost")
    assert not web.is_loopback("0.0.0.0") and not web.is_loopback("10.0.0.1") and not web.is_loopback("example.org")


def test_the_messages_of_gradio_become_messages_of_text():
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    told = web.conversation(" ", [{"role": "user", "content": parts, "metadata": None}])
    assert told == [{"role": "user", "content": "你好"}]


def test_tiny_answers_in_the_browser(browser):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny", trust_remote_code=True)
    app = web.page(tokenizer, AutoModel.from_pretrained(ROOT / "tiny", trust_remote_code=True).eval())
    _, local, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **web.LAUNCH)
    try:
        tab = browser.new_page()
        tab.goto(local)
        tab.get_by_text("Settings").click()
        tab.get_by_label("Sample").uncheck()
        ask(tab, "你好")
        shown(tab, "很高兴见到你！")
        tab.close()
    finally:
        app.close()
