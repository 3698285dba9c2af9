"""Who may ask: keys of users and of administrators, from a file or the environment."""

import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from dlplora.errors import DlpLoraError
from dlplora.serving.errors import ApiError

USER_KEYS = "DLPLORA_API_KEYS"
ADMIN_KEYS = "DLPLORA_ADMIN_KEYS"
_LEAST = 16  # characters
_HOST = re.compile(r"\[?(?P<name>[^\[\]]*?)\]?(:\d*)?")


class KeysError(DlpLoraError):
    """Keys cannot be read or used, or are missing."""


@dataclass(frozen=True)
class Keys:
    """The keys that open the server. Without user keys everybody on this machine may ask."""

    user: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()

    def check(self, header: str | None, *, for_admin: bool = False) -> None:
        """Raise `ApiError` unless a header `Authorization` brings a key that is good enough.

        An administrator's key opens all; where there is none, nothing is administrated.
        """
        if for_admin and not self.admin:
            raise ApiError(
                403,
                "adapters cannot be changed at run time: the server has no administration key",
                code="administration_off",
            )
        if not (self.user or for_admin):
            return
        scheme, _, key = (header or "").partition(" ")
        told = key.strip().encode() if scheme.lower() == "bearer" else b""
        is_admin = _is_one_of(told, self.admin)
        is_user = _is_one_of(told, self.user)
        if is_admin or (is_user and not for_admin):
            return
        if is_user:
            raise ApiError(403, "this key does not allow administration", code="forbidden")
        raise ApiError(
            401,
            "no such key; expected the header `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def check_host(self, header: str) -> None:
        """Raise `ApiError` if a header `Host` without keys names another machine.

        A page of another site may lead a browser here by a name of its own.
        """
        named = _HOST.fullmatch(header)
        if not self.user and not (named and _is_local(named["name"])):
            raise ApiError(
                403, "without keys the server answers to localhost alone", code="host_not_allowed"
            )


def _is_one_of(key: bytes, keys: Sequence[bytes]) -> bool:
    """Compare with all keys, in the same time whichever it is."""
    return bool(sum([hmac.compare_digest(key, one) for one in keys]))


def read_keys(user_file: Path | None, admin_file: Path | None) -> Keys:
    """Read keys from files, a line each, or else from the environment, separated by commas.

    Raises `KeysError` if a file cannot be read or a key is short.
    """
    return Keys(_read(user_file, USER_KEYS), _read(admin_file, ADMIN_KEYS))


def _read(file: Path | None, variable: str) -> tuple[bytes, ...]:
    where = str(file) if file is not None else variable
    try:
        text = file.read_text(encoding="utf-8") if file else os.environ.get(variable, "")
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{where}: the keys cannot be read: {error}") from error
    lines = [line.strip() for line in (text.splitlines() if file else text.split(","))]
    keys = [line for line in lines if line and not (file and line.startswith("#"))]
    if (file is not None or text) and not keys:
        raise KeysError(f"{where}: found no key, expected one a line, or separated by commas")
    for number, key in enumerate(keys, start=1):
        if len(key) < _LEAST or not key.isascii():
            raise KeysError(
                f"{where}: key {number} has {len(key)} characters, expected at least {_LEAST}, all "
                f"ASCII"
            )
    return tuple(key.encode() for key in keys)


def check_listening(host: str, keys: Keys) -> None:
    """Raise `KeysError` if other machines could ask without a key."""
    if not keys.user and not _is_local(host):
        raise KeysError(
            f"--host {host} can be reached from other machines; give keys (--keys FILE or "
            f"{USER_KEYS}), or stay on 127.0.0.1"
        )


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
