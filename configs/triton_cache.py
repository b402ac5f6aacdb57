"""PrebuiltCache: Triton's cache, with a second folder to look in: kernels that an image brings along.

    TRITON_CACHE_MANAGER=configs.triton_cache:PrebuiltCache FARSPAN_PREBUILT=FOLDER

What is compiled goes to TRITON_CACHE_DIR as ever; the second folder is only read. It was filled as a
TRITON_CACHE_DIR itself (`farspan prebuild`), and may have been moved since.
"""

import json
import os
from pathlib import Path

from triton.runtime.cache import FileCacheManager

FOLDER = "FARSPAN_PREBUILT"


class PrebuiltCache(FileCacheManager):  # type: ignore[misc]  # Triton has no types
    """One kernel in both folders, under the key that Triton gives it."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Paths of a kernel's files by name, or None if it must be compiled."""
        own: dict[str, str] | None = super().get_group(filename)
        return own or self._prebuilt(filename)

    def _prebuilt(self, filename: str) -> dict[str, str] | None:
        root = os.environ.get(FOLDER)
        if not root:
            return None
        folder = Path(root) / self.key
        try:
            names = json.loads((folder / f"__grp__{filename}").read_text())["child_paths"]
        except (OSError, ValueError, KeyError):
            return None  # as Triton does where a group cannot be read
        paths = {name: folder / name for name in names}
        return (
            {name: str(path) for name, path in paths.items()}
            if all(map(Path.exists, paths.values()))
            else None
        )
