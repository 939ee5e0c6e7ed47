"""A process that ends others when this one is gone, however it went: vLLM's would keep a GPU's memory after a SIGKILL of the replica."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Final

import psutil

# Reads until its parent's end closes the pipe; a line on it means that all is well. Process ids are used again, their start times are not.
_SCRIPT: Final = """
import sys, psutil
if not sys.stdin.readline():
    for word in sys.argv[1:]:
        number, _, began = word.partition("@")
        try:
            process = psutil.Process(int(number))
            if str(process.create_time()) == began:
                process.kill()
        except psutil.NoSuchProcess:
            pass
"""


class Orphans:
    """Watches over `processes` until `release`."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        words = [f"{process.pid}@{process.create_time()}" for process in processes]
        self._watch = subprocess.Popen([sys.executable, "-c", _SCRIPT, *words], stdin=subprocess.PIPE, start_new_session=True)

    def release(self) -> None:
        """They have ended, or may outlive this process."""
        self._watch.communicate(b"well\n")


def children() -> set[psutil.Process]:
    """Everything that runs below this process."""
    return set(psutil.Process().children(recursive=True))
