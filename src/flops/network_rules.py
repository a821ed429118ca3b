"""Keeps a process and all that it starts to TCP, and to a few ports: Landlock and seccomp, without root.

`restrict` is called between fork and exec. Where nobody can do that, as in a container, this file is run in
front of the program: ``python -I -S network_rules.py DIALS LISTENS PROGRAM ARGUMENT…``, the ports parted by
commas. It uses the standard library only, and nothing of ours: it is mounted into images by itself.

Landlock knows ports, and no addresses. It does not know UDP and other protocols, and not all ways to connect:
those are refused by a filter of system calls. At a port that the kernel picks, everybody may listen.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterable, Sequence

CANNOT_RESTRICT = 126  # exit code
NOT_STARTED = 127  # exit code
_LANDLOCK_VERSION = 4  # Linux 6.7

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_ASK_VERSION = 1
_PORT_RULE = 2
_BIND, _CONNECT = 1, 2
_NO_NEW_PRIVILEGES, _SET_SECCOMP = 38, 22  # options of prctl(2)
_FILTER_MODE = 2

# Numbers of system calls: architecture, socket, then sendto, sendmsg, sendmmsg with the place of their flags.
_CALLS = {
    "x86_64": (0xC000_003E, 41, ((44, 3), (46, 2), (307, 3))),
    "aarch64": (0xC000_00B7, 198, ((206, 3), (211, 2), (269, 3))),
}
_IO_URING_SETUP = 425  # its sockets are made and used without the calls above
_OTHER_ABI = 0x4000_0000  # x32: the same calls by other numbers
_SEND_TO_CONNECT = 0x2000_0000  # MSG_FASTOPEN connects without asking Landlock
_LOAD, _MASK, _EQUALS, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF_0000, 0x0005_0000
_UNIX, _INTERNET, _INTERNET_6, _NETLINK = 1, 2, 10, 16
_STREAM, _TCP = 1, 6
_KIND = 0xF  # of a socket; the rest are flags

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Version of the kernel's Landlock; 0 when there is none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION)))


def can_restrict() -> bool:
    """Whether this kernel and machine can hold a process to its ports."""
    return landlock_version() >= _LANDLOCK_VERSION and os.uname().machine in _CALLS


def command(python: Sequence[str], file: str, dials: Iterable[int], listens: Iterable[int]) -> list[str]:
    """What to put in front of a program's command line, to hold it to ports.

    Args:
        python: command of an interpreter that the restricted program has no hand in.
        file: where this file is, for it.
        dials: TCP ports that may be connected to.
        listens: TCP ports that may be listened at.
    """
    return [*python, "-I", "-S", "-B", file, *(",".join(map(str, ports)) for ports in (dials, listens))]


def restrict(dials: Iterable[int], listens: Iterable[int]) -> None:
    """Hold this process to TCP ports, for good. UNIX sockets stay as they are.

    Args:
        dials: ports that it may connect to.
        listens: ports that it may listen at, beside those that the kernel picks.

    Raises:
        OSError: the kernel cannot.
    """
    if not can_restrict():
        raise OSError(errno.ENOSYS, "the kernel cannot hold it to ports, or may not be asked here")
    check(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "give up privileges")
    attributes = struct.pack("=QQ", 0, _BIND | _CONNECT)
    rules = check(
        _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0), "make a ruleset"
    )
    for right, ports in ((_CONNECT, dials), (_BIND, (0, *listens))):
        for port in ports:
            rule = struct.pack("=QQ", right, port)
            check(_libc.syscall(_ADD_RULE, rules, _PORT_RULE, rule, 0), f"allow port {port}")
    check(_libc.syscall(_RESTRICT_SELF, rules, 0), "restrict itself")
    os.close(rules)
    _filter_calls()


def check(result: int, what: str) -> int:
    """What a call of libc returned.

    Raises:
        OSError: it failed, and at what.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"it cannot {what}: {os.strerror(number)}")
    return result


def _filter_calls() -> None:
    steps = _filter(os.uname().machine)
    program = ctypes.create_string_buffer(steps, len(steps))
    head = struct.pack("HP", len(steps) // 8, ctypes.addressof(program))  # struct sock_fprog
    check(_libc.prctl(_SET_SECCOMP, _FILTER_MODE, head, 0, 0), "filter its system calls")


def _filter(machine: str) -> bytes:
    """A program for seccomp; of each test, the ways on are how many steps to skip, or where to end."""
    architecture, socket, sends = _CALLS[machine]
    steps: list[tuple[int, int, int | str, int | str]] = [
        (_LOAD, 4, 0, 0),
        (_EQUALS, architecture, 0, "absent"),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, _OTHER_ABI, "absent", 0),
        (_EQUALS, _IO_URING_SETUP, "absent", 0),
    ]
    for number, flags in sends:
        steps += [(_EQUALS, number, 0, 2), (_LOAD, _argument(flags), 0, 0)]
        steps += [(_HAS_BITS, _SEND_TO_CONNECT, "refused", "allowed")]
    steps += [
        (_EQUALS, socket, 0, "allowed"),
        (_LOAD, _argument(0), 0, 0),
        (_EQUALS, _UNIX, "allowed", 0),
        (_EQUALS, _NETLINK, "allowed", 0),
        (_EQUALS, _INTERNET, 1, 0),
        (_EQUALS, _INTERNET_6, 0, "refused"),
        (_LOAD, _argument(1), 0, 0),
        (_MASK, _KIND, 0, 0),
        (_EQUALS, _STREAM, 0, "refused"),
        (_LOAD, _argument(2), 0, 0),
        (_EQUALS, 0, "allowed", 0),
        (_EQUALS, _TCP, "allowed", "refused"),
    ]
    ends = {"allowed": _ALLOW, "refused": _REFUSE | errno.EACCES, "absent": _REFUSE | errno.ENOSYS}
    places = {name: len(steps) + index for index, name in enumerate(ends)}
    program = b""
    for index, (code, operand, if_true, if_false) in enumerate(steps):
        ways = (places[way] - index - 1 if isinstance(way, str) else way for way in (if_true, if_false))
        program += struct.pack("HBBI", code, *ways, operand)
    return program + b"".join(struct.pack("HBBI", _RETURN, 0, 0, end) for end in ends.values())


def _argument(index: int) -> int:
    """Where the lower half of a system call's argument is; both architectures are little-endian."""
    return 16 + 8 * index


def main() -> None:
    """Restrict this process, and become the program on the command line."""
    dials, listens = (tuple(int(port) for port in ports.split(",") if port) for ports in sys.argv[1:3])
    try:
        restrict(dials, listens)
    except OSError as exc:
        sys.stderr.write(f"The service cannot be held to its network: {exc.strerror}\n")
        raise SystemExit(CANNOT_RESTRICT) from None
    program = sys.argv[3]
    try:
        os.execvp(program, sys.argv[3:])  # noqa: S606 (no shell is wanted)
    except OSError as exc:
        sys.stderr.write(f"{program} cannot be started: {exc.strerror}\n")
        raise SystemExit(NOT_STARTED) from None


if __name__ == "__main__":
    main()
