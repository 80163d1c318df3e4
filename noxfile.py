"""The ladder: the same tests on every transformers version that this package promises to serve.

One environment a rung, all on top of one torch: a rung's environment sees the packages of the environment that nox
itself runs in (through a `.pth` file), and holds only what its transformers version needs in another version.

    nox -s ladder            all rungs, two at a time, then the table
    nox -s rung-4.26.1       one rung
    nox -s table             the table of the last runs, in Markdown
    nox -s ecosystem         LangChain, LlamaIndex, other libraries' quantizers, Ray Serve, DeepSpeed
    nox -s canary            every test of tests/ on the newest transformers, PyTorch, PEFT, accelerate
    nox -s signatures        a type checker on the signatures of the package's files, a part of `make lint`
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nox

# The oldest version that the original's users were told to have, each version where something important changed,
# the last 4.x, the first 5.x and the newest.
RUNGS = [
    *("4.23.1", "4.26.1", "4.31.0", "4.36.2", "4.41.2", "4.49.0", "4.53.3", "4.57.6"),
    *("5.0.0", "5.3.0", "5.17.0", "5.23.0", "5.24.0"),
]
# Where a tokenizers of that time has no wheel for a newer Python; there the rung is skipped.
NEWEST_PYTHON = {"4.23.1": (3, 11), "4.26.1": (3, 11), "4.31.0": (3, 11), "4.41.2": (3, 12)}
# test_compat.py holds a row of the table for each feature; the others are the ordinary tests of the package's files.
FEATURES = "test_compat"
SUITES = [
    "loading",
    "configuration",
    "tokenization",
    "modeling",
    "chat",
    "quantization",
    "decode",
    "engine",
    "huge_pages",
    "hub",
    "fast_tokenizer",
    "cuda_kernels",
    "kernels_of_torch",
    "long_prompts",
    "weight_files",
]
# Of the tests of slim.py's check those that run the network; the others compare files, which no version changes.
CHECK = "test_slim_check"
OWN_TOOLS = "serving/tests/test_transformers_serve.py"  # skips itself below 5.23
OF_CHECK = [
    "test_a_right_output_passes[released]",
    "test_logits_alone_tell_damages_that_matter",
    "test_the_reference_network_gives_the_golden_logits",
]
# Other libraries that the development requirements do not bring: some 700 MB, and their tests.
OF_ECOSYSTEM = [
    "serving/tests/test_ecosystem.py",
    "serving/tests/test_replicas.py",
    "finetune/tests/test_processes.py::test_the_settings_for_deepspeed_are_what_transformers_reads",
    "finetune/tests/test_processes.py::test_deepspeed_learns_what_one_process_learns",
]
AT_ONCE = 2
REPORTS = Path(".nox") / "reports"
MARKS = {"passed": "✓", "failed": "✗", "skipped": "–"}

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["ladder"]
nox.options.reuse_existing_virtualenvs = True


def prepare(session: nox.Session, version: str) -> None:
    """Make this rung's environment: the packages below it, and its own transformers on top."""
    prepare_above(session)
    # No rung may build anything: a bare machine has no compiler.
    session.install("--only-binary=:all:", f"transformers=={version}")
    if not own_transformers(session, version):  # pip was content with the one below, which may be another tomorrow
        session.install("--only-binary=:all:", "--ignore-installed", "--no-deps", f"transformers=={version}")
    if not own_transformers(session, version):
        session.error(f"{session.virtualenv.location} has no transformers {version} of its own: delete the folder")


def prepare_above(session: nox.Session) -> None:
    """Lets the session's environment see the packages of the one that nox runs in."""
    Path(packages_of(session), "one_torch.pth").write_text(sysconfig.get_path("purelib") + "\n")


def packages_of(session: nox.Session) -> str:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return session.run("python", "-c", code, silent=True).strip()


def own_transformers(session: nox.Session, version: str) -> bool:
    """Whether `import transformers` gives this version, and out of the session's own environment."""
    code = "import transformers; print(transformers.__version__, transformers.__file__)"
    found, file = session.run("python", "-c", code, silent=True).strip().splitlines()[-1].split(" ", 1)
    session.log(f"transformers {found} of {file}")
    return found == version and Path(file).is_relative_to(packages_of(session))


def chosen_tests() -> list[str]:
    files = [FEATURES, *(f"test_{name}" for name in SUITES)]
    return [f"tests/{file}.py" for file in files] + [f"tests/{CHECK}.py::{test}" for test in OF_CHECK] + [OWN_TOOLS]


def register(version: str) -> None:
    """Define the session that runs the tests on one transformers version."""

    @nox.session(name=f"rung-{version}", venv_backend="venv", venv_params=["--without-pip"])
    def rung(session: nox.Session) -> None:
        newest = NEWEST_PYTHON.get(version, sys.version_info[:2])
        if sys.version_info[:2] > newest:
            session.skip(f"transformers {version} runs on Python {newest[0]}.{newest[1]} and older")
        prepare(session, version)
        if session.posargs == ["--prepare-only"]:
            return
        run_tests(session, version, "-m", "not once", *(session.posargs or chosen_tests()))


def run_tests(session: nox.Session, report: str, *arguments: str) -> None:
    REPORTS.mkdir(parents=True, exist_ok=True)
    session.run(
        *("python", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"--junitxml={REPORTS / report}.xml"),
        *arguments,
        env={
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(Path(session.virtualenv.location, "modules")),  # sessions share none
        },
    )


for _version in RUNGS:
    register(_version)


@nox.session(venv_backend="venv", venv_params=["--without-pip"])
def ecosystem(session: nox.Session) -> None:
    """The tests of libraries that few need, above the environment that nox runs in, which stays as it is."""
    prepare_above(session)
    pinned = ("--constraint", "requirements.txt")
    session.install("--only-binary=:all:", *pinned, *files_of("serving", "ecosystem", "ray"))
    # DeepSpeed comes as source: nothing of it is compiled before its first use, and its setup.py wants to see torch.
    deepspeed = ("--no-build-isolation", *pinned, *files_of("finetune", "deepspeed"))
    session.install(*deepspeed, env={"DS_BUILD_OPS": "0"})
    if Path(packages_of(session), "torch").exists():
        session.error(f"pip put another PyTorch into {session.virtualenv.location}: delete the folder")
    run_tests(session, "ecosystem", *(session.posargs or OF_ECOSYSTEM))


def files_of(folder: str, *names: str) -> list[str]:
    return [word for name in names for word in ("-r", f"{folder}/requirements-{name}.txt")]


@nox.session(venv_backend="venv", venv_params=["--without-pip"])
def canary(session: nox.Session) -> None:
    """Every test on the newest libraries that pip finds, pinned nowhere: what a user's `pip install` gives today.

    `-- --keep-torch` leaves PyTorch as it is: a newer one is a download of gigabytes, with CUDA unless TORCH_INDEX
    names another index. It makes an environment of its own above the one that nox runs in, and changes nothing there.
    """
    prepare_above(session)
    newest = ["transformers", "peft", "accelerate", "sentencepiece", "llvmlite"]
    if "--keep-torch" not in session.posargs:
        index = os.environ.get("TORCH_INDEX")
        session.log("PyTorch's newest release is downloaded: some 200 MB from a CPU index, else gigabytes")
        session.install("--upgrade", "torch", *(["--index-url", index] if index else []))
    session.install("--upgrade", "--only-binary=:all:", *newest)
    names = [*newest, "torch", "tokenizers", "huggingface_hub"]
    code = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {names}), sep=', ')"
    session.run("python", "-c", code)
    chosen = [argument for argument in session.posargs if argument != "--keep-torch"]
    session.run(
        *("python", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *(chosen or ["tests"])),
        env={"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(session.virtualenv.location, "modules"))},
    )


def outcomes(report: Path) -> dict[str, str]:
    """Row -> passed, failed or skipped, from one rung's JUnit report; empty if the rung never got that far.

    Rows are the tests of tests/test_compat.py, and each other file as a whole; the worst outcome of its cases counts.
    """
    if not report.is_file():
        return {}
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        file = (case.get("classname") or case.get("name", "")).rpartition(".")[2]  # no class: skipped as a whole
        row = f"the network in {file}.py" if file == CHECK else f"all of {file}.py"
        row = case.get("name", "").partition("[")[0] if file == FEATURES else row
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found[row] = min(outcome, found.get(row, outcome))  # failed < passed < skipped: also their order here
    return found


def markdown(columns: dict[str, dict[str, str]]) -> str:
    """Feature x version."""
    features = sorted({name for column in columns.values() for name in column}, key=lambda name: ("." in name, name))
    lines = ["| feature | " + " | ".join(columns) + " |", "|---|" + ":-:|" * len(columns)]
    for feature in features:
        marks = [MARKS.get(column.get(feature, ""), "?") for column in columns.values()]
        title = feature if "." in feature else feature.removeprefix("test_").replace("_", " ")
        lines.append(f"| {title} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Print the table of the last runs."""
    print(markdown({version: outcomes(REPORTS / f"{version}.xml") for version in RUNGS}))


@nox.session(python=False)
def ladder(session: nox.Session) -> None:
    """Climb all rungs, two at a time, print each one's output when it ends, then the table."""

    def climb(version: str) -> bool:
        (REPORTS / f"{version}.xml").unlink(missing_ok=True)
        command = [sys.executable, "-m", "nox", "-s", f"rung-{version}", "--", *session.posargs]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(AT_ONCE) as pool:
        good = list(pool.map(climb, RUNGS))
    if session.posargs != ["--prepare-only"]:
        table(session)
    failed = [version for version, fine in zip(RUNGS, good) if not fine]
    if failed:
        session.error(f"failed on transformers {', '.join(failed)}")


@nox.session(python=False)
def signatures(session: nox.Session) -> None:
    """mypy on the stubs of the package's files: whether their types exist and agree, also with torch and transformers.

    The bodies are not looked at: most of what stands there is a tensor, of which mypy knows no shape.
    """
    root = Path(__file__).resolve().parent
    sys.path.insert(0, str(root))
    from package import package_files

    tools, stubs = Path(sys.executable).parent, Path(session.create_tmp(), "stubs").resolve()
    shutil.rmtree(stubs, ignore_errors=True)
    package = stubs / "source" / "chatglm_slim"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for file in package_files():
        shutil.copy(file, package)
    with session.chdir(package.parent):
        options = ("--quiet", "--parse-only", "--output", str(stubs), "--package", package.name)
        session.run(str(tools / "stubgen"), *options, external=True)
    with session.chdir(stubs):
        settings = ("--config-file", str(root / "pyproject.toml"), "--python-executable", sys.executable)
        cache = ("--cache-dir", str(stubs.parent / "cache"))
        session.run(str(tools / "mypy"), *settings, *cache, "--package", package.name, external=True)
