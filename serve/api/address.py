"""Where the server is to be found: a port or a Unix socket, with TLS or without."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
import stat

from serve.errors import StartError


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet: nobody connects before the model is ready.

    Raises StartError.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(f"Port {port} on {host} is in use; choose another with --port.", 1) from None
        raise StartError(f"Cannot bind {host}:{port}: {error.strerror or error}.", 2) from None
    bound.setblocking(False)
    return bound


def bind_unix(path: str) -> socket.socket:
    """The same for a Unix socket. What was left of an earlier server is replaced; a socket that answers, or any other
    file, is not. Raises StartError.
    """
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.connect(path)
            raise StartError(f"The socket {path} is in use; choose another with --uds.", 1)
        raise StartError(f"{path} is there and no socket; choose another with --uds.", 2)
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError as error:
        raise StartError(f"Cannot bind {path}: {error.strerror or error}.", 2) from None
    try:
        bound.bind(path)
    except OSError as error:
        raise StartError(f"Cannot bind {path}: {error.strerror or error}.", 2) from None
    bound.setblocking(False)
    return bound


def check_certificate(certificate: str | None, key: str | None, authorities: str | None, ciphers: str | None) -> None:
    """Raises StartError unless TLS can be spoken with what is given; where nothing is, there is none to be spoken."""
    if certificate is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, _no_password)
    except OSError as error:  # SSLError is one
        beside = "" if key is None else f" with --ssl-keyfile {key}"
        raise StartError(
            f"--ssl-certfile {certificate}{beside} cannot be used: {error.strerror or error}.", 2
        ) from None
    try:
        if authorities is not None:
            context.load_verify_locations(authorities)
    except OSError as error:
        raise StartError(f"--ssl-ca-certs {authorities} cannot be used: {error.strerror or error}.", 2) from None
    try:
        if ciphers is not None:
            context.set_ciphers(ciphers)
    except ssl.SSLError as error:
        raise StartError(f"--ssl-ciphers {ciphers} cannot be used: {error.args[0]}.", 2) from None


def _no_password() -> str:
    """Of a key that wants one, in place of a question at the terminal."""
    return ""


def shown(bound: socket.socket, *, tls: bool) -> str:
    """The address as a person would type it."""
    if bound.family not in (socket.AF_INET, socket.AF_INET6):
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    if bound.family not in (socket.AF_INET, socket.AF_INET6):
        return False  # of a Unix socket, no page in a browser can know
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback
