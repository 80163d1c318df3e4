"""Build the emulated driver around a CUDA source: a folder that $CUDA_PATH can point at, as a CUDA toolkit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++17", "-w", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"]
FLAGS += ["-U_FORTIFY_SOURCE"]  # its longjmp suspects every jump to another stack
# A kernel that would fault or be undefined on a GPU stops here: misaligned loads, shifts too far, casts that overflow.
CHECKS = ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=vptr,float-divide-by-zero"]
CHECKS += ["-fno-sanitize-recover=all"]


def kernel_names() -> list[str]:
    """Every entry point of the source."""
    kinds = ["linear{}_{}_1", "linear{}_{}_4", "dequantize{}_{}", "quantize{}_{}"]
    return [
        kind.format(bits, element) for kind in kinds for bits in (8, 4) for element in ("half", "bfloat16", "float")
    ]


def build(source: str, folder: Path, sanitized: bool = True) -> Path:
    """Compile `source` behind the emulated driver into folder/lib64; returns the library.

    Unsanitized, it is built in half the time, for mutants that show without.
    """
    libraries = folder / "lib64"
    libraries.mkdir(parents=True)
    (folder / "kernels.inc").write_text(source)
    (folder / "names.inc").write_text("\n".join(f"KERNEL({name})" for name in kernel_names()))
    library = libraries / "libcuda.so"
    flags = [*FLAGS, *(["-O1", *CHECKS] if sanitized else ["-O0"]), f"-I{folder}", f"-I{HERE}"]
    command = [COMPILER, *flags, str(HERE / "driver.cpp"), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"g++ refuses the emulated driver:\n{result.stderr}")
    for name in ("cudart", "cublasLt"):
        (libraries / f"lib{name}.so").symlink_to(library.name)
    return library
