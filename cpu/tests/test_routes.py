"""Every way to compute a product is right, also those that another processor would choose, and the choice among them:
by time, never of a wrong one, as the environment says, and remembered whole or not at all."""

from __future__ import annotations

import json
import os

import pytest
import torch
from chatglm_cpu import crowding, instruction_set, kernels, linear, measuring, routes, runtime
from chatglm_cpu.kernels import activations_as_int8
from test_kernels import DTYPES, ROUNDING, make_weight, make_x

pytestmark = pytest.mark.skipif(not instruction_set(), reason="needs llvmlite and a CPU with AVX2 and FMA")
FORMATS = [(4, 0), (4, 32), (8, 0), (8, 128), (16, 0)]


def weight_type(bits, dtype):
    return torch.int8 if bits < 16 else torch.float16 if dtype == torch.float32 else dtype


def all_candidates():
    sets = ("avx2", "avx512", "avx512_bf16")
    for isa in sets[: sets.index(instruction_set() or "avx2") + 1]:
        for bits, group in FORMATS:
            for dtype in DTYPES:
                for rows in (1, 3, 7, 16, 33) if isa == instruction_set() else (3, 33):
                    for name in routes._candidates(isa, rows, dtype, bits, group, weight_type(bits, dtype), True):
                        label = f"{isa}-{bits}-{group}-{dtype}-{rows}-{name}"
                        yield pytest.param(isa, bits, group, dtype, rows, name, id=label)


CANDIDATES = list(all_candidates())


@pytest.mark.parametrize(("isa", "bits", "group", "dtype", "rows", "name"), CANDIDATES)
def test_each_candidate_of_each_instruction_set_is_right_when_it_is_asked_for_by_name(
    monkeypatch, isa, bits, group, dtype, rows, name
):
    monkeypatch.setitem(runtime._machine, "isa", isa)
    weight, scale, exact = make_weight(132, 640, bits, group, dtype if bits < 16 else weight_type(bits, dtype))
    x, bias = make_x(rows, 640, dtype), torch.linspace(-3, 3, 132).to(dtype)
    y = routes.linear_by(name, x, weight, scale, bits, bias)
    assert y is not None and y.dtype == dtype and y.shape == (rows, 132)
    if name == "gemm-int8":
        values, scales = activations_as_int8(x, bits)
        x = values.double() * scales.double()
    expected = x.double() @ exact.T + bias.double()
    size = x.double().abs() @ exact.abs().T + bias.double().abs()
    # Sums in float32; PyTorch's products get a weight that was rounded to its type, so do blocks with group scales.
    rounded_weight = ROUNDING[dtype] / 2 if name == "dense" or (name == "gemm" and group) else 0
    sums = 3e-6 if name not in ("dense", "torch") or dtype != torch.float16 else 640 * 2.0**-11  # which it may keep so
    before = (expected - bias.double()).abs() if name == "int8pack" else 0  # which it rounds too, before the scale
    bound = ROUNDING[dtype] * (expected.abs() + before) + (sums + rounded_weight) * size
    assert ((y - expected).abs() <= bound).all()


def test_names_that_are_no_candidates_compute_nothing():
    weight, scale, _ = make_weight(128, 256, 4)
    x = make_x(40, 256, torch.float32)
    for name in ("gemv-f32-l1", "int8pack", "torch", "anything", ""):
        assert routes.linear_by(name, x, weight, scale, 4) is None


@pytest.fixture
def choosing(monkeypatch, tmp_path):
    """Weights of any size are timed, nothing is decided yet, and the cache directory is empty; set `.words`."""

    def words(text):
        monkeypatch.setenv("CHATGLM_CPU_ROUTES", text)
        monkeypatch.setattr(measuring, "_rankings", {})
        measuring.settings.cache_clear()

    monkeypatch.setattr(routes, "SMALLEST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words("")
    yield words
    measuring.settings.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each way takes, by name; they pass when it computes."""
    seconds, now, compute = {}, [0.0], routes._compute

    def slow(name, *arguments):
        now[0] += seconds.get(name, 1.0)
        return compute(name, *arguments)

    monkeypatch.setattr(routes, "_compute", slow)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    return seconds


def ranked(rows=6, bits=8):
    weight, scale, _ = make_weight(128, 256, bits)
    return routes.ranked(make_x(rows, 256, torch.bfloat16), weight, scale, bits)


@pytest.mark.parametrize("fastest", ["gemm", "dense", "int8pack"])
def test_the_fastest_serves(choosing, clock, fastest):
    clock[fastest] = 0.5
    assert ranked()[0] == fastest
    weight, scale, _ = make_weight(128, 256, 8)
    x = make_x(6, 256, torch.bfloat16)
    expected = routes.linear_by(fastest, x, weight, scale, 8)
    assert linear(x, weight, scale, 8).equal(expected)


def test_the_default_stays_unless_another_is_clearly_faster(choosing, clock):
    default = routes.candidates(8, torch.bfloat16, 8)[0]
    clock["dense"] = 0.97
    assert ranked()[0] == default


def test_one_lucky_moment_does_not_win(choosing, monkeypatch):
    """As where memory has two speeds, and changes between them while the ways are timed."""
    default = routes.candidates(8, torch.bfloat16, 8)[0]
    now, calls, compute = [0.0], [], routes._compute

    def lucky_once(name, *arguments):
        calls.append(name)
        now[0] += 0.003 if name == "dense" and calls.count("dense") == 3 else 0.005
        return compute(name, *arguments)

    monkeypatch.setattr(routes, "_compute", lucky_once)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    assert ranked()[0] == default and calls.count("dense") > 3


def test_a_wrong_result_never_wins(choosing, clock, monkeypatch):
    clock["dense"], compute = 0.5, routes._compute

    def wrong(name, *arguments):
        y = compute(name, *arguments)
        return y * 1.05 if name == "dense" else y

    monkeypatch.setattr(routes, "_compute", wrong)
    assert ranked()[0] != "dense" and ranked()[-1] == "dense"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 128, 512])
def test_a_sample_has_as_many_blocks_of_rows_for_each_thread(monkeypatch, threads, rows):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = torch.empty(12288, 2048, dtype=torch.int8)
    sample, _ = measuring._sample(measuring.Problem("", rows, torch.bfloat16, weight, torch.empty(12288), 4))
    assert len(sample) >= 2 * measuring.BLOCK_ROWS * threads and len(sample) % (measuring.BLOCK_ROWS * threads) == 0


def test_small_weights_are_not_timed(choosing, monkeypatch):
    monkeypatch.setattr(routes, "SMALLEST", 128 * 256 + 1)
    ranked()
    assert not measuring._rankings


def test_what_was_chosen_is_remembered_by_the_next_process(choosing, clock):
    clock["dense"] = 0.5
    assert ranked()[0] == "dense"
    clock["dense"], clock["gemm"] = 1.0, 0.5
    choosing("")
    assert ranked()[0] == "dense"
    choosing("measure")
    assert ranked()[0] == "gemm"


def test_a_word_that_nobody_knows_is_told(choosing):
    choosing("list, defualt")
    with pytest.warns(UserWarning, match="defualt is neither default, list, measure nor a way"):
        measuring.settings()


def test_what_was_chosen_while_other_work_held_the_cores_is_not_remembered(choosing, clock, monkeypatch):
    waited = iter([0.0, 1e9])
    monkeypatch.setattr(measuring, "seconds_waited", lambda: next(waited))
    monkeypatch.setattr(crowding, "seconds_waited", lambda: next(waited))
    clock["dense"] = 0.5
    assert ranked()[0] == "dense"
    assert not measuring.cache_file().exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"machine": 3}', '{"routes": {}}', "machine", "names", "\udcff"])
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(choosing, clock, damage):
    path = measuring.cache_file()
    clock["dense"] = 0.5
    ranked()
    content = json.loads(path.read_text())
    if damage == "machine":
        content["machine"]["processor"] = "another"
    if damage == "names":
        content["routes"] = {label: ["rm -rf", *names[1:]] for label, names in content["routes"].items()}
    text = json.dumps(content) if damage in ("machine", "names") else damage
    path.write_bytes(text.encode(errors="surrogateescape"))
    choosing("")
    clock["dense"], clock["gemm"] = 1.0, 0.5
    assert ranked()[0] == "gemm"
    assert json.loads(path.read_text())["machine"] == measuring.machine_key()
    assert os.listdir(path.parent) == [path.name]  # nothing is left of writing it


def test_a_cache_directory_that_cannot_be_made_is_no_error(choosing, clock, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    clock["dense"] = 0.5
    assert ranked()[0] == "dense"


def test_a_disk_that_fills_leaves_nothing_behind(choosing, clock, monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measuring.json, "dump", full)
    clock["dense"] = 0.5
    assert ranked()[0] == "dense" and not list((tmp_path / "chatglm_cpu").iterdir())


def test_without_a_home_nothing_is_written(choosing, clock, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    clock["dense"] = 0.5
    assert ranked()[0] == "dense" and not list(tmp_path.iterdir())


def test_other_threads_and_other_code_have_files_of_their_own(choosing, monkeypatch):
    files, more = {measuring.cache_file()}, torch.get_num_threads() + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: more)
    files.add(measuring.cache_file())
    monkeypatch.setattr(measuring, "own_version", lambda: "later")
    files.add(measuring.cache_file())
    assert len(files) == 3


def test_the_environment_fixes_the_choice_and_a_run_can_be_repeated(choosing, clock, tmp_path):
    choosing("dense")
    assert ranked()[0] == "dense" and ranked(rows=1)[0].startswith("gemv")
    choosing("int8:bfloat16:8=gemm")
    assert ranked()[0] == "gemm" and ranked(rows=16)[0] == routes.candidates(16, torch.bfloat16, 8)[0]
    choosing("default")
    files = {path: path.read_bytes() for path in (tmp_path / "chatglm_cpu").glob("*")}
    assert ranked()[0] == routes.candidates(8, torch.bfloat16, 8)[0]
    assert {path: path.read_bytes() for path in (tmp_path / "chatglm_cpu").glob("*")} == files
    clock["dense"] = 0.5
    choosing("measure")
    ranked()
    told, clock["dense"] = measuring.chosen(), 2.0
    choosing(f"default,{told}")
    assert "int8:bfloat16:8=dense" in told and ranked()[0] == "dense"


def test_a_way_that_is_not_there_is_refused_with_those_that_are(choosing):
    choosing("int8:bfloat16:8=tensor-cores")
    with pytest.raises(ValueError, match="int8:bfloat16:8=tensor-cores, but there are only .*gemm.*dense"):
        ranked()


def test_list_prints_the_choice_and_the_times(choosing, clock, capsys):
    clock["dense"] = 0.5
    choosing("list")
    ranked()
    assert "int8:bfloat16:8=dense (" in capsys.readouterr().err


def test_a_dense_product_uses_one_buffer_again_and_blocks_of_any_size_are_right(monkeypatch):
    weight, scale, exact = make_weight(140, 256, 4)
    x = make_x(20, 256, torch.float32)
    whole = routes.linear_by("dense", x, weight, scale, 4)
    monkeypatch.setattr(kernels, "DENSE_BYTES", 8 * 256 * 4)  # eight rows of the weight
    monkeypatch.setattr(kernels, "_buffers", [])
    parts = [routes.linear_by("dense", x, weight, scale, 4) for _ in range(3)]
    assert len(kernels._buffers) == 1 and kernels._buffers[0].nbytes == 8 * 256 * 4
    size = x.double().abs() @ exact.abs().T
    for y in (whole, *parts):
        assert ((y - x.double() @ exact.T).abs() <= 3e-6 * size).all()
    monkeypatch.setattr(kernels, "DENSE_BYTES", 100)  # not even one tile
    assert routes.linear_by("dense", x, weight, scale, 4) is None
