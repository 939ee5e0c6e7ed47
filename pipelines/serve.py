"""Serve the models of run directories over an OpenAI-compatible API, and a page to try them on; --help explains every flag."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without installation

from soul.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("serve", prog="pipelines/serve.py"))
