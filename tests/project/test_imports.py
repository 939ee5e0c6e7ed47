"""Without ray installed, everything but soul.orchestration still imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Hides ray from the finders themselves, so that a library which only asks whether ray is there hears no.
WITHOUT_RAY = """
import importlib, importlib.machinery, pkgutil, sys, traceback

class WithoutRay(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.split(".")[0] == "ray" else super().find_spec(fullname, path, target)

sys.meta_path = [WithoutRay if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
try:
    import ray
except ModuleNotFoundError:
    pass
else:
    sys.exit("ray is still importable: this test shows nothing")

import soul
names = [module.name for module in pkgutil.walk_packages(soul.__path__, "soul.", onerror=lambda name: None)]
failed = 0
for name in names:
    if name.startswith("soul.orchestration"):
        continue
    try:
        importlib.import_module(name)
    except ImportError:
        failed += 1
        traceback.print_exc(limit=-3)
print(len(names))
sys.exit(failed and f"{failed} module(s) of soul do not import without ray")
"""


def test_soul_imports_without_ray() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 10  # it did walk the package
