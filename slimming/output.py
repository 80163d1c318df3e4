"""Where an output appears: judged, filled under another name that is ours alone, and renamed when it is complete.

Nothing that was there, or that appears meanwhile, is replaced without `--overwrite`; no link is followed.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimming import checkpoint_io as io
from slimming.checkpoint_io import Exit, Refusal, first_line

MAX_NAME_BYTES = 200  # file systems end at 255, and the temporary folder's name is longer
MODEL_FILES = ("config.json", "adapter_config.json")  # one of them is in every folder that --overwrite may replace
MAX_DEPTH = 200
SUFFIX = "-slim-partial"


def partial_of(output: Path) -> Path:
    """The temporary folder beside OUTPUT."""
    return output.with_name(f"{output.name}{SUFFIX}")


def output_of(partial: Path) -> Path:
    return partial.with_name(partial.name.removesuffix(SUFFIX))


def replaced(output: Path) -> Path:
    """Where an old OUTPUT waits while the new one takes its place."""
    return output.with_name(f".{output.name}.replaced-by-slim")


def named_output(output: str | Path) -> Path:
    """OUTPUT as an absolute path, refused where no folder can be made under it or beside it."""
    text = str(output)
    if not text.strip() or "\0" in text:
        raise Refusal(Exit.USAGE, f"OUTPUT is {text!r}: give the name of a folder to make")
    path = Path(os.path.abspath(text))
    if not path.name:
        raise Refusal(Exit.OUTPUT_EXISTS, f"OUTPUT is {path}, which exists: give another name")
    if len(path.parts) > MAX_DEPTH:
        raise Refusal(
            Exit.USAGE, f"OUTPUT lies {len(path.parts)} folders deep, limit {MAX_DEPTH}: give a shorter path"
        )
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        message = f"OUTPUT's name has {len(os.fsencode(path.name))} bytes, limit {MAX_NAME_BYTES}"
        raise Refusal(Exit.USAGE, f"{message}: give a shorter one")
    return path


def judge_output(source: Path, output: Path, overwrite: bool) -> None:
    """OUTPUT is not there yet, or may be replaced; in no case does it touch the source."""
    here, there = source.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise Refusal(Exit.OUTPUT_EXISTS, f"{output} overlaps the source {source}: give a folder beside it")
    try:
        present = stat.S_IFMT(output.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return  # whether it can be made shows when it is
    except OSError as error:
        raise Refusal(Exit.USAGE, f"{str(output)[:200]} can't be OUTPUT ({first_line(error)})") from None
    if not overwrite:
        raise Refusal(Exit.OUTPUT_EXISTS, f"{output} exists: give another name, or --overwrite")
    if present != stat.S_IFDIR or not any((output / name).is_file() for name in MODEL_FILES):
        raise Refusal(Exit.OUTPUT_EXISTS, f"{output} is no model folder, --overwrite won't delete it: do it yourself")


def judge_partial(partial: Path) -> None:
    """A folder that only has the temporary one's name isn't ours to fill and rename."""
    try:
        status = partial.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return  # whether it can be made shows when it is
    ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    if stat.S_ISDIR(status.st_mode) and ours:
        names = os.listdir(partial)
        if not names or io.is_own_file(partial / io.Journal.NAME):
            return
    raise Refusal(Exit.OUTPUT_EXISTS, f"{partial}, the name of the temporary folder, is taken: move it away")


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """The temporary folder, made, and ours alone; a killed run's lock is gone with its process.

    The lock is on the folder itself, so that it goes with it when it is renamed, and no lock file can be a link.
    """
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise Refusal(
            Exit.WRITE_FAILED, f"{partial} can't be made ({first_line(error)}): give another OUTPUT"
        ) from None
    judge_partial(partial)
    lock = lock_folder(partial)
    try:
        judge_partial(partial)  # nobody else's, now that it can't change hands
        partial.chmod(0o700)
        yield
    finally:
        if lock is not None:
            os.close(lock)
        if partial.is_dir() and not os.listdir(partial):
            partial.rmdir()


def lock_folder(partial: Path) -> int | None:
    """An open descriptor that holds the lock; None where the system has none for folders."""
    try:
        import fcntl
    except ImportError:
        return None  # Windows
    message = f"another run writes {partial}: wait for it, or give another OUTPUT"
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), partial.lstat()):
            raise FileNotFoundError(partial)
    except (BlockingIOError, FileNotFoundError):  # at work, or just done: its folder is OUTPUT now
        os.close(descriptor)
        raise Refusal(Exit.BUSY, message) from None
    except OSError:
        os.close(descriptor)
        return None  # a network file system without locks on folders
    return descriptor


def clear(partial: Path, finished: set[str]) -> None:
    """Removes everything but these files proper; what else an unfinished run left is made again."""
    for path in list(partial.iterdir()):
        if path.name in finished and io.is_own_file(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def restore_interrupted(output: Path) -> None:
    """A run that was killed between the two renames of --overwrite left the old OUTPUT under another name; one that
    was killed after them left it to be deleted. Under the lock, for another run may be between them now.
    """
    old = replaced(output)
    if not old.is_dir() or old.is_symlink():
        return
    with locked(partial_of(output)):
        if not os.path.lexists(output):
            os.rename(old, output)
        elif not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)


def move_into_place(partial: Path, source: Path, output: Path, overwrite: bool) -> None:
    """The temporary folder becomes OUTPUT, judged again: what appeared there since isn't ours to replace. An old
    OUTPUT is deleted only after that. Under the lock.
    """
    old = replaced(output)
    try:
        judge_output(source, output, overwrite)
    except Refusal as refusal:
        raise Refusal(refusal.code, f"{refusal} (it appeared meanwhile; the result waits in {partial})") from None
    journal = partial / io.Journal.NAME
    content = journal.read_bytes()
    try:
        journal.unlink()
        partial.chmod(0o777 & ~umask())
        if os.path.lexists(output):
            os.rename(output, old)
        os.rename(partial, output)  # fails where a folder with something in it appears in this very moment
    except OSError as error:
        if old.is_dir() and not os.path.lexists(output):
            os.rename(old, output)
        io.write_file(journal, content)  # so that the folder is still known to be ours
        message = f"{partial} is complete but can't become {output} ({first_line(error)})"
        raise Refusal(Exit.WRITE_FAILED, message) from None
    shutil.rmtree(old, ignore_errors=True)


def umask() -> int:
    """Which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
