"""The start-up check that our packages are ours: others use names such as `server`, too."""

import importlib.util
import os
from pathlib import Path

PACKAGES = ("configs", "engine", "kvcache", "server", "sparse")
ROOT = Path(__file__).resolve().parents[1]


class ShadowedPackage(Exception):
    """Another package would be imported in place of ours."""


def refuse_shadowed_packages() -> None:
    """Raise ShadowedPackage if Python would import something else under one of our names."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != ROOT / name:
            raise ShadowedPackage(
                f"the package {name!r} of Farspan is in {ROOT}, but Python finds {found or 'none'};"
                " run farspan from another folder, or in a virtual environment of its own"
            )


def protect_children() -> None:
    """Let the processes we start find the same packages, whatever lies in the working directory."""
    os.environ["PYTHONSAFEPATH"] = "1"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
