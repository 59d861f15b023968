"""Run a command without network: `python without_network.py RECORD COMMAND...`.

Every Python process of it refuses connections and look-ups of names beyond this machine, and writes each attempt into
the file RECORD (sitecustomize.py beside this file does that). Where the kernel allows it, as it does for root, the
command also gets a network of its own in which there is nothing but loopback.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 1


def leave_network() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14s", b"lo", IFF_UP, b""))


if __name__ == "__main__":
    record, *command = sys.argv[1:]
    leave_network()
    os.environ["REFUSED_CONNECTIONS"] = record
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    os.execvp(command[0], command)
