"""Python imports this at its start where it lies on PYTHONPATH: see without_network.py."""

import os
import socket
import sys
from typing import Any

HERE = {"localhost", "::1", "", None, socket.gethostname()}


def is_here(host: Any) -> bool:
    return host in HERE or str(host).startswith("127.")


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    host: Any = None
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
    if is_here(host):
        return
    with open(os.environ["REFUSED_CONNECTIONS"], "a") as record:
        record.write(f"{event} {host}: {' '.join(sys.argv)}\n")
    raise OSError(f"no network: {event} {host}")


if "REFUSED_CONNECTIONS" in os.environ:
    sys.addaudithook(refuse)
