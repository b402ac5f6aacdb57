"""Logs on standard error, of both processes alike: lines for people, or one JSON object a line."""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]
REQUESTS = "farspan.requests"  # the logger of ended requests; what is logged is in the record's `request`


def configure_logs(kind: LogFormat, process: str, *, requests: bool = False) -> None:
    """Warnings and errors from now on, and what an engine decides at its start; ended requests, too, where
    they are asked for."""
    handler = logging.StreamHandler()
    text = logging.Formatter(f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines(process) if kind == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("engine").setLevel(logging.INFO)
    logging.getLogger(REQUESTS).setLevel(logging.INFO if requests else logging.WARNING)


class _JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, process, logger, message; exception, request where there are."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": "a request ended" if hasattr(record, "request") else record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if hasattr(record, "request"):
            line["request"] = record.request
        return json.dumps(line, ensure_ascii=False, default=str)
