"""Keys: which API keys are good, known by their digests only, compared in constant time."""

import hashlib
import hmac
import os
from pathlib import Path

from configs.errors import ConfigError
from configs.schema import ServerConfig

ENVIRONMENT = "FARSPAN_API_KEY"


class Keys:
    """Holds digests, never the keys. Without any key, everybody may enter."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._digests = {_digest(key) for key in keys}

    @classmethod
    def of(cls, config: ServerConfig) -> "Keys":
        """From the configuration, its file and the environment together. Raises ConfigError."""
        keys = [*config.api_keys, *os.environ.get(ENVIRONMENT, "").split()]
        if config.api_key_file is not None:
            keys += _read(config.api_key_file)
        if not all(key.isascii() and key.isprintable() and " " not in key and key for key in keys):
            raise ConfigError("server.api_keys: keys are of printable ASCII characters without spaces")
        if config.max_requests_per_key is not None and not keys:
            raise ConfigError("server.max_requests_per_key: there are no API keys to count for")
        return cls(tuple(keys))

    @property
    def are_needed(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str) -> str | None:
        """A name for the key in this header, the same each time; None if there is none or it is wrong."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = _digest(key.strip())
        # Every key is looked at, so that the time tells nothing about which is near.
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex() if any(found) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _read(file: Path) -> list[str]:
    """One key a line; empty lines and those that begin with # do not count."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file: {file}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"server.api_key_file: {file}: there is no key in it")
    return keys
