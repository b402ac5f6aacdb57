"""Logs: lines for people or JSON, and requests only where they are asked for."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def logged(kind: str, requests: bool) -> list[str]:
    """What a process writes to standard error that warns, raises and ends a request."""
    code = (
        "import logging\n"
        "from configs.logs import REQUESTS, configure_logs\n"
        f"configure_logs({kind!r}, 'server', requests={requests})\n"
        "logging.getLogger('somewhere').warning('slow %s', 'disk')\n"
        "logging.getLogger('somewhere').info('chatter')\n"
        "logging.getLogger('engine.startup').info('512 pages')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('x').exception('failed')\n"
        "logging.getLogger(REQUESTS).info('id=1', extra={'request': {'id': '1', 'plan': 'dense'}})\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return ran.stderr.splitlines()


def test_json_logs_are_one_object_a_line_with_exception_and_request() -> None:
    warning, decision, failure, request = map(json.loads, logged("json", True))
    assert warning["message"] == "slow disk" and warning["level"] == "warning"
    assert warning["process"] == "server" and warning["logger"] == "somewhere"
    assert warning["time"].endswith("+00:00")
    assert (decision["message"], decision["level"]) == ("512 pages", "info")
    assert "ZeroDivisionError" in failure["exception"] and failure["level"] == "error"
    assert request["request"] == {"id": "1", "plan": "dense"}


def test_text_logs_name_the_process_and_leave_requests_out() -> None:
    lines = logged("text", False)
    assert "server WARNING somewhere: slow disk" in lines[0]
    assert "server INFO engine.startup: 512 pages" in lines[1]
    assert not any("id=1" in line or "chatter" in line for line in lines)
