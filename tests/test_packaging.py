"""What the README, the requirements and the Makefile say of each other is true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import install
import package
import slim

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
DOCS = ROOT / "docs"
PAGES = [
    *READMES,
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")),
]
FOLDERS = ("benchmarks", "cpu", "finetune", "serving", "tiny")
PAGES_OF_FOLDERS = [page for name in FOLDERS for page in sorted((ROOT / name).glob("*.md"))]
REPORTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))


def pins(name: str) -> dict[str, str]:
    """Distribution -> version of a requirements file; every line must be an exact pin."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("-r ")]
    assert all("==" in line for line in lines)
    return dict(line.split("==") for line in lines)


def code_blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_pinned_versions_lie_in_the_declared_ranges():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    of_extras = {"dev": "requirements-dev", "finetune": "finetune/requirements"}
    of_extras["evaluate"] = "finetune/requirements-evaluate"
    of_extras.update(chat="serving/requirements-chat", web="serving/requirements-web", server="serving/requirements")
    files = [(project["dependencies"], "requirements.txt")]
    for declared, file in files + [(extras[name], f"{file}.txt") for name, file in of_extras.items()]:
        pinned, ranges = pins(file), {r.name: r.specifier for r in map(Requirement, declared)}
        assert pinned.keys() == ranges.keys()
        assert all(ranges[name].contains(version) for name, version in pinned.items())


def test_the_newest_rung_is_the_pinned_transformers_and_the_pages_name_the_rungs():
    rungs = re.search(r"RUNGS = \[(.*?)\]", (ROOT / "noxfile.py").read_text(), re.DOTALL).group(1)
    versions = re.findall(r'"(.*?)"', rungs)
    assert versions[-1] == pins("requirements.txt")["transformers"]
    assert all(version in (DOCS / "versions.md").read_text(encoding="utf-8") for version in versions)
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        assert versions[0] in text and versions[-1] in text


def test_readmes_are_short_and_say_what_is_missing_before_anything_else():
    for readme, limits in zip(READMES, ("## Limits", "## 先说局限")):
        lines = readme.read_text(encoding="utf-8").splitlines()
        headings = [line for line in lines if line.startswith("## ")]
        assert len(lines) <= 130 and headings[0].startswith(limits)


def test_one_range_of_python_versions_stands_everywhere():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    run = [line.removeprefix(prefix) for line in project["classifiers"] if line.startswith(prefix)]
    oldest, newest = ".".join(map(str, install.OLDEST)), run[-1]
    assert project["requires-python"] == f">={oldest}" and run[0] == oldest
    assert oldest in (ROOT / "Makefile").read_text()
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        assert oldest in text and newest in text


@pytest.mark.parametrize("target", ["chat", "web", "test", "ladder", "ecosystem", "canary", "tiny", "clean"])
def test_make_targets_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_torch_index_reaches_the_installation(tmp_path):
    command = ["make", "-n", f"{tmp_path}/.runtime-installed", f"VENV={tmp_path}", "TORCH_INDEX=https://mirror/cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f'install.py --venv "{tmp_path}" --torch-index "https://mirror/cpu"' in done.stdout


def test_chat_variables_reach_the_program():
    command = ["make", "-n", "chat", "MODEL=some/model", "DTYPE=bfloat16", "DEVICE=cuda:1", "ARGS=--bits 4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'cli_chat.py --model "some/model" --dtype bfloat16 --device cuda:1 --bits 4' in done.stdout


def test_the_notebook_runs_from_top_to_bottom(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "examples")
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    variables: dict = {}
    for cell in cells:
        assert not cell.get("outputs"), "outputs are not kept"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), variables)
    shown = capsys.readouterr().out
    assert "清华大学在北京市海淀区" in shown and shown.count("很高兴见到你！\n") >= 2


def test_python_examples_of_the_readme_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    variables: dict = {}
    blocks = [code for page in (READMES[0], DOCS / "usage.md") for code in code_blocks(page, "python")]
    blocks = [code for code in blocks if "chatglm-6b-slim" not in code]
    assert len(blocks) >= 4
    for code in blocks:
        exec(compile(code, "README.md", "exec"), variables)
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"print\(response\)  # .*?([\u4e00-\u9fff].*)", "".join(blocks))
    assert len(promised) == 5 and set(promised) <= set(printed)
    translated = "".join(page.read_text(encoding="utf-8") for page in (READMES[1], DOCS / "zh" / "usage.md"))
    assert all(text in translated for text in promised)


def test_commands_of_the_pages_use_the_environment_that_make_made():
    for page in [*PAGES, *PAGES_OF_FOLDERS]:
        text = page.read_text(encoding="utf-8")
        without_make = re.sub(r"^```sh\n(?:.*\n)*?pip install(?:.*\n)*?```", "", text, flags=re.MULTILINE)
        assert not re.findall(r"(?<!bin/)\bpython [\w/]+\.py", without_make), page.name
    assert all(".venv/bin/python cli_chat.py" in readme.read_text(encoding="utf-8") for readme in READMES)


def test_commands_of_the_pages_name_programs_and_options_that_there_are():
    folders = ("", "benchmarks", "finetune", "serving", "slimming")
    code = "".join(file.read_text(encoding="utf-8") for name in folders for file in (ROOT / name).glob("*.py"))
    known, seen = {*re.findall(r'"(--[a-z][\w-]*)"', code), "--help"}, 0
    for page in [*PAGES, *PAGES_OF_FOLDERS]:
        if page.name == "speed.md":
            continue  # figures of an earlier version stand with the command of that version
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for program, options in re.findall(r"bin/python ((?:\w+/)*\w+\.py)\b([^`\n]*)", text):
            seen += 1
            unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", options)) - known
            assert (ROOT / program).is_file() and not unknown, f"{page}: {program}{options}"
    assert seen > 20


def test_pages_in_both_languages_show_the_same_code():
    def without_comments(page: Path) -> list[str]:
        return [re.sub(r"#.*", "", code) for code in code_blocks(page, "python")]

    assert without_comments(READMES[0]) == without_comments(READMES[1])
    for page in (DOCS / "zh").glob("*.md"):
        shown = without_comments(page)
        assert shown == without_comments(DOCS / page.name)[: len(shown)], page.name


def test_the_architecture_page_lists_what_travels_with_a_checkpoint():
    listed = re.findall(r"^\| `(\w+\.py)` \|", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    travelling = {path.name for path in package.package_files()}
    assert set(listed[: len(travelling)]) == travelling


def test_commands_that_error_messages_name_as_a_cure_are_commands_of_slim():
    files = [*ROOT.glob("*.py"), *(ROOT / "slimming").glob("*.py")]
    named = [
        line for file in files for line in re.findall(r"`python slim\.py ([^`]+)`", file.read_text(encoding="utf-8"))
    ]
    assert len(named) >= 4
    for line in named:
        options = slim.parser().parse_args(line.split())
        # What the Hub has is slim since April 2023, which slim.py refuses without --repackage.
        assert options.repackage or options.source != "THUDM/chatglm-6b", line


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_links_of_all_pages_lead_to_files_and_headings():
    for page in [*PAGES, *PAGES_OF_FOLDERS, *REPORTS]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, heading = target.partition("#")
            file = page.parent / name if name else page
            assert target.startswith("https://") or file.exists(), f"{page}: {target}"
            assert not heading or file.suffix != ".md" or heading in anchors(file), f"{page}: {target}"


def test_importing_the_code_files_does_nothing_but_define():
    """No output, no threads, and no CUDA or network module pulled in by our own files."""
    code = (
        "import sys, threading, types; p = types.ModuleType('chatglm_slim'); p.__path__ = ['.']\n"
        "sys.modules['chatglm_slim'] = p; before = threading.active_count()\n"
        "import transformers.modeling_utils, torch\n"
        "settings = torch.get_num_threads(), torch.get_default_dtype()\n"
        "import chatglm_slim.modeling_chatglm, chatglm_slim.tokenization_chatglm\n"
        "assert threading.active_count() == before\n"
        "assert settings == (torch.get_num_threads(), torch.get_default_dtype())\n"
        "assert not {'cpm_kernels', 'llvmlite', 'requests'} & set(sys.modules), 'imported early'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "newest, rung, named",
    [
        ("<skipped message='no such thing'/>", "", False),  # another version runs it
        ("<skipped message='no such thing'/>", "<skipped message='no such thing'/>", True),
        ("<skipped message='needs a GPU'/>", "<skipped message='needs a GPU'/>", False),
        ("<skipped message='collection skipped'>Skipped: no such thing</skipped>", None, True),
    ],
)
def test_a_test_that_ran_nowhere_for_an_unknown_reason_is_named(tmp_path, newest, rung, named):
    for name, inside in (("newest", newest), ("rung", rung)):
        case = "" if inside is None else f"<testcase classname='tests.test_a' name='test_b'>{inside}</testcase>"
        (tmp_path / f"{name}.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    command = [sys.executable, str(ROOT / ".ci" / "skips.py"), *map(str, tmp_path.glob("*.xml"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == int(named) and ("tests.test_a test_b" in done.stdout) is named, done.stdout + done.stderr


@pytest.mark.parametrize("ran", [True, False])
def test_a_file_skipped_as_a_whole_in_one_report_may_run_in_another(tmp_path, ran):
    whole = "<testcase classname='' name='tests.test_a'><skipped>Skipped: no such thing</skipped></testcase>"
    tests = "<testcase classname='tests.test_a' name='test_b'></testcase>" if ran else whole
    for name, cases in (("newest", whole), ("other", tests)):
        (tmp_path / f"{name}.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    command = [sys.executable, str(ROOT / ".ci" / "skips.py"), *map(str, tmp_path.glob("*.xml"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == int(not ran), done.stdout + done.stderr
