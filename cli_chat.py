"""Chat in a terminal: `python cli_chat.py --model FOLDER-OR-HUB-ID`. The official name of serving/cli.py."""

from __future__ import annotations

import sys

from serving.cli import main

if __name__ == "__main__":
    sys.exit(main())
