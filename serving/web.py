"""Chat in a browser: `python serving/web.py --model FOLDER-OR-HUB-ID`, then http://127.0.0.1:7860.

Answers appear as they are made, as Markdown with code and LaTeX; they can be stopped, tried again and undone, and
questions edited. One answer is made at a time, others wait for their turn. Nothing is sent or fetched anywhere else.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from serving.loading import DTYPES, load  # noqa: E402
from serving.rounds import latest_rounds  # noqa: E402

LATEX = [("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False)]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        import gradio  # noqa: F401
    except ImportError:
        print("the page needs Gradio: `make web`, or pip install -r serving/requirements-web.txt", file=sys.stderr)
        return 1
    try:
        tokenizer, model = load(options.model, options.dtype, options.bits, options.device)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"cannot load {options.model}: {error}", file=sys.stderr)
        return 1
    if not is_loopback(options.host):
        print(f"whoever reaches {options.host} can use the page: it asks for no password", file=sys.stderr)
    page(tokenizer, model).launch(server_name=options.host, server_port=options.port, **LAUNCH)
    return 0


# Gradio's own colours are too faint: of every answer, of hints, and of code above all.
COLOURS = {"comment": ("#57606a", "#9198a1"), "keyword": ("#a40e26", "#ff7b72"), "function": ("#6639ba", "#d2a8ff")}
COLOURS.update(string=("#0a3069", "#a5d6ff"), number=("#0550ae", "#79c0ff"), punctuation=("inherit", "inherit"))
HINTS = ":root:root {--block-info-text-color: #57606a}\n"
LEGIBLE = (
    HINTS
    + ".chatbot.prose {opacity: 1 !important}\n"
    + "".join(
        f"code .token.{kind} {{color: {light} !important}} .dark code .token.{kind} {{color: {dark} !important}}\n"
        for kind, (light, dark) in COLOURS.items()
    )
)
# Nothing from outside; no links to an API that nobody asked for.
LAUNCH = {"share": False, "ssr_mode": False, "pwa": False, "footer_links": [], "show_error": True, "css": LEGIBLE}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", default=str(ROOT / "tiny"), help="folder or Hub id (default: the tiny one here)")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    add("--device", help="cpu, cuda, cuda:1, mps … (default: the first GPU, else the CPU)")
    add("--bits", type=int, choices=(0, 4, 8), default=0, help="quantize the loaded weights")
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    add("--port", type=int, default=7860)
    return parser.parse_args(arguments)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def page(tokenizer, model):
    """The page, not yet served."""
    import gradio as gr

    def respond(
        query: str, history: list[dict], system: str, sample: bool, temperature: float, top_p: float, max_length: int
    ) -> Iterator[str]:
        """The answer so far, after each token. Gradio closes this where the answer is stopped or nobody reads it."""
        options = {"do_sample": sample, "temperature": temperature, "top_p": top_p, "max_length": max_length}
        try:
            told = latest_rounds(tokenizer, query, conversation(system, history), max_length)
            with contextlib.closing(model.stream_chat(tokenizer, query, history=told, **options)) as stream:
                for answer, _ in stream:
                    yield answer
        except (ValueError, RuntimeError) as error:  # too long a prompt, non-finite logits, no memory: it says which
            raise gr.Error(str(error)) from error

    return gr.ChatInterface(
        respond,
        title="ChatGLM-6B-Slim",
        chatbot=gr.Chatbot(latex_delimiters=latex(), buttons=["copy", "copy_all"], scale=1, show_label=False),
        additional_inputs_accordion=gr.Accordion("Settings 设置", open=False),
        additional_inputs=[
            gr.Textbox("", label="System message 系统消息", lines=2),
            gr.Checkbox(True, label="Sample 采样", info="Off: always the likeliest token 关闭则每次取概率最大的词元"),
            gr.Slider(0.05, 2.0, 0.95, step=0.05, label="Temperature 温度"),
            gr.Slider(0.05, 1.0, 0.7, step=0.05, label="Top-p"),
            gr.Slider(64, model.config.max_sequence_length, 2048, step=32, label="Max length 最大长度"),
        ],
        editable=True,
        flagging_mode="never",
        analytics_enabled=False,
        api_visibility="private",
        concurrency_limit=1,
        fill_height=True,
    )


def latex() -> list[dict]:
    return [{"left": left, "right": right, "display": display} for left, right, display in LATEX]


def conversation(system: str, history: list[dict]) -> list[dict]:
    """Gradio's messages, whose contents are lists of parts, as messages of text."""
    told = [{"role": "system", "content": system}] if system.strip() else []
    return told + [{"role": one["role"], "content": text_of(one["content"])} for one in history]


def text_of(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


if __name__ == "__main__":
    sys.exit(main())
