"""The socket that a server listens on. Standard library only: a port in use is found before the model is loaded."""

import errno
import ipaddress
import socket
import sys

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
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # a name such as "a..b" cannot be encoded for a name server
        cause = getattr(error, "strerror", None) or "no host name"
        raise UserError(f"--host {host}: is no address of this machine ({cause}); try 127.0.0.1") from None
    try:
        if sys.platform != "win32":  # there it would share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: is in use on {host}; give another, or 0 for a free one") from None
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror}); give another"
        ) from None
    return sock


def url(sock: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
