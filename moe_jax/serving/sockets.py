"""The socket that a server listens on. Standard library only: a port in use is found before the model is loaded."""

import errno
import ipaddress
import os
import socket

from moe_jax.config import UserError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one. Raises UserError if the port is in use or the host is not here.

    Clients that connect before the model is loaded wait.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):  # a name such as "a..b" cannot be encoded for a name server
        raise UserError(f"--host {host}: is no address of this machine; try 127.0.0.1") from None
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: is in use on {host}; give another, or 0 for a free one") from None
        why = f"cannot be listened on ({os.strerror(error.errno or 0)}); give another"
        raise UserError(f"--host {host} --port {port}: {why}") from None


def url(sock: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
