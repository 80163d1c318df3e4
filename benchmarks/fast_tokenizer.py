"""How often tokenizer.json (`slim.py --fast-tokenizer`) gives other ids than SentencePiece, and whether they are ties.

    .venv/bin/python benchmarks/fast_tokenizer.py ice_text.model '/usr/share/doc/**/*' '/usr/share/locale/zh_*/**/*.mo'

A row for each pattern: its UTF-8 files, .gz and message catalogues too, in a fixed random order up to `--most`
characters, line by line.
"""

from __future__ import annotations

import argparse
import gettext
import glob
import gzip
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimming.fast_tokenizer import FAST_FILE, tokenizer_json
from slimming.trim_vocabulary import tokenizer_of

HALF_ULP = 2.0**-24  # of a number in 32 bits


def texts(path: Path) -> Iterator[str]:
    """What is written in a file; nothing for one that is no text."""
    try:
        if path.suffix == ".mo":
            with path.open("rb") as file:
                yield from (text for text in gettext.GNUTranslations(file)._catalog.values() if isinstance(text, str))
        else:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            yield content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return


def lines(pattern: str, most: int) -> Iterator[str]:
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    random.Random(0).shuffle(paths)
    left = most
    for path in paths:
        for text in texts(path):
            for line in text.split("\n"):
                if line.strip() and left > 0:
                    left -= len(line)
                    yield line


def row(slow, fast: tokenizers.Tokenizer, pattern: str, most: int) -> str:
    count = characters = tokens = differing = tied = near = 0
    for line in lines(pattern, most):
        ours, theirs = slow.encode_text(line), fast.encode(line, add_special_tokens=False).ids
        count, characters, tokens = count + 1, characters + len(line), tokens + len(ours)
        if ours != theirs:
            sums = [sum(sorted(map(slow.sp.get_score, ids))) for ids in (ours, theirs)]
            apart = abs(sums[0] - sums[1])
            differing += 1
            tied += apart < 1e-9
            near += 1e-9 <= apart <= 2 * len(ours) * abs(sums[0]) * HALF_ULP
    return f"| {pattern} | {count:,} | {characters:,} | {tokens:,} | {differing} | {tied} | {near} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="a complete ice_text.model")
    parser.add_argument("patterns", nargs="+", help="of files, ** for any folders")
    parser.add_argument("--most", type=int, default=12 * 10**6, help="characters of a pattern")
    options = parser.parse_args()
    model = options.model.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FAST_FILE
        path.write_text(tokenizer_json(model, {}), encoding="utf-8")
        fast = tokenizers.Tokenizer.from_file(str(path))
    fast.encode_special_tokens = True
    print("| files | lines | characters | tokens | lines that differ | equal sums | within rounding |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for pattern in options.patterns:
        print(row(tokenizer_of(model), fast, pattern, options.most), flush=True)


if __name__ == "__main__":
    main()
