"""Whatever the OpenAPI document allows, and what it does not, is answered as it says; nothing fails.

Twenty seconds by default; `FARSPAN_FUZZ=600 make test ARGS=tests/server/test_fuzz.py` for ten minutes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.builders import FakeEngine, http_server, say

SECONDS = int(os.environ.get("FARSPAN_FUZZ", "20"))
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)


@pytest.mark.timeout(SECONDS * 3 + 120)
def test_no_request_breaks_the_server_or_gets_what_the_document_does_not_say(
    folder: Path, tmp_path: Path
) -> None:
    beside = Path(sys.executable).with_name("schemathesis")
    command = str(beside) if beside.exists() else shutil.which("schemathesis")
    if command is None:
        pytest.skip("schemathesis is not installed: pip install schemathesis, anywhere on the PATH")
    with http_server(FakeEngine(say(5, 6, 7)), folder) as url:
        options = [f"--checks={','.join(CHECKS)}", f"--max-time={SECONDS}", "--continue-on-failure"]
        options += ["--generation-deterministic", "--suppress-health-check=all", "--no-color"]
        ran = subprocess.run(
            [command, "run", f"{url}/openapi.json", *options], cwd=tmp_path, capture_output=True, text=True
        )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
