"""Child: how an engine process is started."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio

from configs.loading import load_config
from engine.child import Child


def test_threads_spin_and_sleep_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[dict[str, str]] = []

    def refuse(*given: Any, env: dict[str, str], **options: Any) -> None:
        seen.append(env)
        raise OSError("seen enough")

    async def start() -> None:
        with zmq.asyncio.Context() as context, pytest.raises(OSError, match="seen enough"):
            Child(load_config(None, {}), context, f"ipc://{tmp_path}/engine")

    monkeypatch.setattr("engine.child.subprocess.Popen", refuse)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    asyncio.run(start())
    assert seen[0]["GOMP_SPINCOUNT"] == "10000" and seen[0]["OMP_WAIT_POLICY"] == "active"
