"""The socket that a server listens on. Standard library only: a port in use is found before the model is loaded."""

import ipaddress
import socket

from moe_jax.config import UserError

UNREAD_SECONDS = 30
"""On Linux a connection ends if its client takes nothing of what was sent for this time: an answer may be large."""


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
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family)
    except (OSError, TypeError) as error:  # the latter for a name that cannot be encoded, such as "ä..b"
        why = str(error).partition(" (while")[0]
        raise UserError(f"--host {host} --port {port}: {why}; give another (port 0 takes a free one)") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # every connection inherits it
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
    return sock


def url(sock: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
