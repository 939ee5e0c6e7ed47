"""A store for checks: a temporary folder stands for every bucket, so that claims and probes are written for real, but not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

# The chain of credentials is looked through before anything is written; the address says that a cluster will be joined.
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "checked-elsewhere", "AWS_SECRET_ACCESS_KEY": "checked-elsewhere", "RAY_ADDRESS": "auto"}


@contextmanager
def store_for_checks() -> Iterator[None]:
    """Until the block ends, what `soul` writes to a store goes into a folder that is deleted then. Buckets are there by being named."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from soul import object_store
    from soul.store import COPIES_VARIABLE

    with tempfile.TemporaryDirectory(prefix="soul-validate-") as folder:
        buckets = Path(folder) / "buckets"
        buckets.mkdir()
        stand_in: Any = PyFileSystem(FSSpecHandler(DirFileSystem(path=str(buckets), fs=LocalFileSystem(auto_mkdir=True))))
        told = {**ENVIRONMENT, COPIES_VARIABLE: str(Path(folder) / "copies")}
        with patch.dict(os.environ, told), patch.object(object_store, "make_filesystem", lambda uri, attempts=0: stand_in):
            yield
