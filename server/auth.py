"""Keys: which API keys are good, known by their digests only, compared in constant time."""

import hashlib
import hmac
import os
from pathlib import Path

from configs.errors import ConfigError
from configs.schema import ServerConfig

ENVIRONMENT = "FARSPAN_API_KEY"
ADMIN_ENVIRONMENT = "FARSPAN_ADMIN_KEY"


class Keys:
    """Holds digests, never the keys. Without any key, everybody may enter. Admin keys are good for all that
    others are, and for admin routes."""

    def __init__(self, keys: tuple[str, ...] = (), admin_keys: tuple[str, ...] = ()) -> None:
        self._digests = {_digest(key) for key in keys}
        self._admins = {_digest(key) for key in admin_keys}

    @classmethod
    def of(cls, config: ServerConfig) -> "Keys":
        """From the configuration, its file and the environment together. Raises ConfigError."""
        keys = [*config.api_keys, *os.environ.get(ENVIRONMENT, "").split()]
        if config.api_key_file is not None:
            keys += _read(config.api_key_file, "server.api_key_file")
        admins = os.environ.get(ADMIN_ENVIRONMENT, "").split()
        if config.admin_key_file is not None:
            admins += _read(config.admin_key_file, "server.admin_key_file")
        _check(keys, "server.api_keys")
        _check(admins, "server.admin_key_file")
        if config.max_requests_per_key is not None and not keys:
            raise ConfigError("server.max_requests_per_key: there are no API keys to count for")
        return cls(tuple(keys), tuple(admins))

    @property
    def are_needed(self) -> bool:
        return bool(self._digests)

    @property
    def has_admins(self) -> bool:
        return bool(self._admins)

    def owner(self, authorization: str) -> str | None:
        """A name for the key in this header, the same each time; None if there is none or it is wrong."""
        digest = _given(authorization)
        return (
            digest.hex() if digest is not None and _is_among(digest, self._digests | self._admins) else None
        )

    def is_admin(self, authorization: str) -> bool:
        digest = _given(authorization)
        return digest is not None and _is_among(digest, self._admins)


def _given(authorization: str) -> bytes | None:
    """The digest of the key in a header."""
    scheme, _, key = authorization.partition(" ")
    return _digest(key.strip()) if scheme.lower() == "bearer" else None


def _is_among(digest: bytes, known: set[bytes]) -> bool:
    # Every key is looked at, so that the time tells nothing about which is near.
    return any([hmac.compare_digest(digest, one) for one in known])


def _check(keys: list[str], where: str) -> None:
    if not all(key.isascii() and key.isprintable() and " " not in key and key for key in keys):
        raise ConfigError(f"{where}: keys are of printable ASCII characters without spaces")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _read(file: Path, where: str) -> list[str]:
    """One key a line; empty lines and those that begin with # do not count."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {file}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{where}: {file}: there is no key in it")
    return keys
