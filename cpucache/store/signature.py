"""Ed25519 signatures of packs, with keys from ``ssh-keygen -t ed25519`` or ``openssl genpkey``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpucache.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_PURPOSE = b"cpucache pack\0"  # signed with the data, so that no other signature of the key is valid for a pack
_KEY_LIMIT = 1 << 16


def sign(data: bytes, key: Path) -> bytes:
    """Signature of ``data`` with the private key in a file (PEM or OpenSSH). Raises ``InputError`` for a bad key."""
    return _private(key).sign(_PURPOSE + data)


def is_signed(data: bytes, signature: bytes, key: Path) -> bool:
    """Whether ``signature`` of ``data`` fits the public key in a file. Raises ``InputError`` for a bad key."""
    public, _ = _public(key), _needed()
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, _PURPOSE + data)
    except InvalidSignature:
        return False
    return True


def _needed() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise InputError("signatures need the package cryptography: pip install 'cpucache[sign]'") from error
    return serialization


def _private(path: Path) -> Ed25519PrivateKey:
    serialization = _needed()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = _read(path)
    load = serialization.load_ssh_private_key if b"OPENSSH" in data else serialization.load_pem_private_key
    try:
        key = load(data, None)
    except TypeError as error:
        raise InputError(f"{path}: a passphrase protects this key; sign with a key without a passphrase") from error
    except Exception as error:  # the library's exceptions for a file that is no key vary
        raise InputError(f"{path}: the file has no private key in PEM or OpenSSH format") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: the key is not an Ed25519 key; `ssh-keygen -t ed25519` creates one")
    return key


def _public(path: Path) -> Ed25519PublicKey:
    serialization = _needed()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    data = _read(path)
    load = serialization.load_pem_public_key if data.startswith(b"-----") else serialization.load_ssh_public_key
    try:
        key = load(data)
    except Exception as error:  # the library's exceptions for a file that is no key vary
        raise InputError(f"{path}: the file has no public key in PEM or OpenSSH format") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: the key is not an Ed25519 key; `ssh-keygen -t ed25519` creates one")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_KEY_LIMIT)
    except OSError as error:
        raise InputError(f"{path}: the key can't be read ({error.strerror})") from error
