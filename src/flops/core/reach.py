"""Which of a node's own files a service may use, and which network."""

from __future__ import annotations

from flops.core.model import Value


class Reach(Value):
    """What a confined service may use beside its work folder, which it may write to.

    What is no node's own (system folders, installed programs) can be read by every service.
    """

    readable: tuple[str, ...] = ()  # files and folders of the node that it may read
    writable: tuple[str, ...] = ()  # folders that it may write to
    dials: tuple[int, ...] | None = None  # TCP ports that it may connect to; None for any network
    listens: tuple[int, ...] = ()  # TCP ports that it may listen at, if `dials` says something
    gpus: tuple[int, ...] = ()  # numbers of the node's GPUs that it may use
    confines_itself: bool = False  # before it touches anything of a user's; see flops.adapters.confinement
    image: str = ""  # the container image that it runs in; "" for the node's own system and programs
