"""Dockerfiles run by buildah, in namespaces that vanish with its processes.

What a Dockerfile runs is anybody's code. Where root runs the node it becomes, outside of its own namespace,
users that own nothing on this machine; else its root is the user who runs the node, and its others are those
that /etc/subuid gives to that user. Either way it sees no other process, has not the capabilities to mount or
to leave its root folder, and the node's own folders are covered by empty ones. Its mounts exist for its
processes alone, and its containers are in the build's folder: who kills them and removes the folder has
removed everything.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from flops.adapters.uv_program import is_disk_full
from flops.command import run_command, stop_if_needless
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ContainerBuild, Report

PROGRAM = "buildah"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PLACE = "/mnt/build"  # of the build's folder, for buildah
_SETTINGS, _MADE = "settings", "made"
_FIRST_ID, _IDS = 1_879_048_192, 65_536  # above those of containers and users, below those that systemd keeps
_DOCKERFILE_FAILS = 3
_HOLDER_TIMEOUT_S = 10.0
_STEP = re.compile(r"(?:\[\d+/\d+\] )?STEP (?P<step>\d+)/(?P<steps>\d+): (?P<text>.*)")
_NOISE = ("subprocess exited with status", "[Warning] one or more build args", 'time="')
_VERDICT = re.compile(r'Error: building at STEP ".*?": (?P<why>.*?)(?: &imagebuilder.*)?')
_SHOWN_LINES, _SHOWN_CHARACTERS = 8, 600
_DROPPED = "CAP_SYS_CHROOT,CAP_MKNOD"

# In a mount namespace of its own: $1 covers a folder each, up to "--"; what follows is run.
_COVER = f"""
mount --make-rprivate /
mount -t tmpfs -o mode=755 none /mnt
mkdir {_PLACE}
mount --no-canonicalize --bind /proc/self/cwd {_PLACE}
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mount -t tmpfs -o mode=000 none "$1"
  elif [ -e "$1" ]; then mount --bind /dev/null "$1"; fi
  shift
done
shift
exec "$@"
"""
_TAG = "localhost/flops-base"
_POLICY = f"--signature-policy={_PLACE}/{_SETTINGS}/policy.json"
# Among its own users and processes: $0 is buildah, $1 how many images there are to begin with.
_INSIDE = f"""
cd {_PLACE}
clean() {{  # files of users that only this namespace can remove, after what buildah left mounted
  umount --recursive --lazy {_MADE}/storage/overlay 2>/dev/null || true
  rm -rf {_MADE}/storage {_MADE}/run || true
}}
trap clean EXIT
driver=overlay
"$0" --storage-driver overlay info >/dev/null 2>&1 || driver=vfs
containers() {{ "$program" --storage-driver $driver "$@"; }}
program=$0 count=$1 number=0
shift
while [ $number -lt $count ]; do
  id=$(containers pull --quiet {_POLICY} oci:bases:$number)
  containers tag "$id" {_TAG}:$number
  number=$((number + 1))
done
containers build {_POLICY} "$@" 1>&2 || exit {_DOCKERFILE_FAILS}
containers push --quiet {_POLICY} "$(cat {_MADE}/id)" oci:{_MADE}/image:made
"""
_OPTIONS = (
    "--isolation=chroot",
    "--format=oci",
    "--timestamp=0",
    "--pull-never",
    "--layers=false",
    f"--cap-drop={_DROPPED}",
    f"--iidfile={_PLACE}/{_MADE}/id",
    f"--file={_PLACE}/Dockerfile",
)


class Buildah:
    """Implements `flops.image_ports.ContainerBuilds`.

    Args:
        environ: environment of buildah, such as proxies; Dockerfiles see no more of it than those.
        hidden: files and folders that no Dockerfile may use.
        program: buildah.
        output: gets what it writes, and all that Dockerfiles write; our standard output unless given.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        hidden: Sequence[str] = (),
        program: str = PROGRAM,
        output: BinaryIO | None = None,
    ) -> None:
        self._environ = environ
        self._hidden = tuple(hidden)
        self._program = program
        self._output = sys.stdout.buffer if output is None else output

    @staticmethod
    def missing(program: str = PROGRAM) -> tuple[str, ...]:
        """Debian packages that this machine needs for it, and has not."""
        needed = {program: program, **({} if os.geteuid() == 0 else {"newuidmap": "uidmap"})}
        return tuple(package for name, package in needed.items() if shutil.which(name, path=PATH) is None)

    def run(self, build: ContainerBuild, report: Report, keep_open: Sequence[int] = ()) -> None:
        """Run a Dockerfile to its end.

        Raises:
            FlopsError: ``dockerfile_failed``, ``image_build_failed``, ``timeout``, ``disk_full``.
            StoppedError: the work became needless; nothing of it runs any more.
        """
        progress = _Progress(build, report, self._output)
        self._prepare(build.folder)
        try:
            with _entered() as (outside, inside):
                done = run_command(
                    [
                        *outside,
                        "sh",
                        "-ec",
                        _COVER,
                        "sh",
                        *self._hidden,
                        "--",
                        *inside,
                        *self._buildah(build),
                    ],
                    environ={**self._environ, **_variables()},
                    cwd=build.folder,
                    timeout_s=build.timeout_s,
                    watch=progress.take,
                    keep_open=keep_open,
                )
        except OSError as exc:
            raise _impossible(f"{exc.strerror}: {exc.filename}") from exc
        progress.finish()
        errors = _readable(progress.as_users_know_it(done.errors))
        if done.is_timed_out:
            raise FlopsError(
                ErrorCode.TIMEOUT,
                f"{progress.where} did not end within {build.timeout_s:g} s.",
                details={"output": errors[-4_000:]},
            )
        if done.exit_code != 0:
            raise _error(done.exit_code, errors, progress.where)

    def _prepare(self, folder: Path) -> None:
        """Write buildah's settings, and make the folder that it may write to."""
        if missing := self.missing(self._program):
            raise _impossible(f"{' and '.join(missing)} is missing")
        settings, made = folder / _SETTINGS, folder / _MADE
        for made_here in (settings, made):  # nobody else made them: a link would lead elsewhere
            made_here.mkdir(mode=0o755)
        if os.geteuid() == 0:
            os.chown(made, _FIRST_ID, _FIRST_ID)
        (settings / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{_PLACE}/{_MADE}/storage"\n'
            f'runroot = "{_PLACE}/{_MADE}/run"\n'
        )
        (settings / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        for name in ("containers.conf", "registries.conf"):
            (settings / name).write_text("")

    def _buildah(self, build: ContainerBuild) -> list[str]:
        contexts = [
            f"--build-context={name}=docker-image://{_TAG}:{number}"
            for number, name in enumerate(build.bases)
        ]
        options = [*_OPTIONS, f"--platform={build.platform}", *contexts, f"{_PLACE}/context"]
        return ["sh", "-ec", _INSIDE, self._program, str(len(build.bases)), *options]


@contextlib.contextmanager
def _entered() -> Iterator[tuple[list[str], list[str]]]:
    """What runs a command in a mount namespace of its own, and what then makes it root of its own users."""
    private = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc", "--"]
    if os.geteuid() != 0:
        yield ["unshare", "--user", "--map-root-user", "--map-auto", "--mount", "--"], private
        return
    # It ends with this process, whose end of the pipe is the only one.
    with subprocess.Popen(["unshare", "--user", "cat"], stdin=subprocess.PIPE) as holder:
        _map_ids(holder.pid)
        enter = ["nsenter", f"--user=/proc/{holder.pid}/ns/user", "--setuid=0", "--setgid=0", "--"]
        yield ["unshare", "--mount", "--"], [*enter, *private]


def _map_ids(pid: int) -> None:
    own, deadline_s = Path("/proc/self/ns/user").readlink(), time.monotonic() + _HOLDER_TIMEOUT_S
    while Path(f"/proc/{pid}/ns/user").readlink() == own:
        stop_if_needless()
        if time.monotonic() > deadline_s:
            raise _impossible("the kernel makes no user namespace")
        time.sleep(0.005)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text(f"0 {_FIRST_ID} {_IDS}")


def _variables() -> dict[str, str]:
    settings = f"{_PLACE}/{_SETTINGS}"
    return {
        "PATH": PATH,
        "HOME": f"{_PLACE}/{_MADE}",
        "TMPDIR": f"{_PLACE}/{_MADE}",
        "XDG_RUNTIME_DIR": f"{_PLACE}/{_MADE}",
        "XDG_CONFIG_HOME": f"{_PLACE}/{_MADE}",
        "XDG_DATA_HOME": f"{_PLACE}/{_MADE}",
        "CONTAINERS_CONF": f"{settings}/containers.conf",
        "CONTAINERS_REGISTRIES_CONF": f"{settings}/registries.conf",
        "CONTAINERS_STORAGE_CONF": f"{settings}/storage.conf",
        "_CONTAINERS_USERNS_CONFIGURED": "1",
        "LC_ALL": "C",
    }


class _Progress:
    """Follows the output: hands it on, and knows the step that runs."""

    def __init__(self, build: ContainerBuild, report: Report, output: BinaryIO) -> None:
        self._output = output
        self._what = f"{build.what} for {build.platform}"
        self._bases = build.bases
        self._report = report
        self._rest = ""
        self.where = self._what

    def take(self, news: str) -> None:
        """Take in what was written."""
        *lines, self._rest = (self._rest + news).split("\n")
        for line in lines:
            told = self.as_users_know_it(line)
            self._output.write(f"{told}\n".encode(errors="surrogateescape"))
            self._output.flush()
            if (found := _STEP.fullmatch(_readable(told).strip())) is not None:
                text = found["text"] if len(found["text"]) < 120 else f"{found['text'][:117]}..."
                self.where = f"{self._what}, step {found['step']} of {found['steps']} ({text})"
                self._report(f"{self.where} runs.")

    def as_users_know_it(self, text: str) -> str:
        """Output with the names that the Dockerfile has for the images it begins with."""
        for number, name in enumerate(self._bases):
            text = text.replace(f"{_TAG}:{number}", name)
        return text

    def finish(self) -> None:
        """Take in the last line, which may have no end."""
        if self._rest:
            self.take("\n")


def _readable(text: str) -> str:
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _error(exit_code: int, errors: str, where: str) -> FlopsError:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [
        verdict["why"] if (verdict := _VERDICT.fullmatch(line)) is not None else line
        for line in lines
        if not line.startswith(_NOISE) and not _STEP.fullmatch(line)
    ]
    essence = " / ".join(told[-_SHOWN_LINES:])[-_SHOWN_CHARACTERS:] or f"exit code {exit_code}"
    details = {"output": errors[-4_000:]}
    if is_disk_full(errors):
        return FlopsError(ErrorCode.DISK_FULL, f"{where}: the disk is full: {essence}", details=details)
    if exit_code != _DOCKERFILE_FAILS:
        return _impossible(essence, details)
    return FlopsError(ErrorCode.DOCKERFILE_FAILED, f"{where} fails: {essence}", details=details)


def _impossible(why: str, details: Mapping[str, str] | None = None) -> FlopsError:
    return FlopsError(
        ErrorCode.IMAGE_BUILD_FAILED,
        f"No Dockerfile can be run on this machine: {why}.",
        hint="Debian: `apt-get install buildah`; for another user than root also uidmap, and lines for that "
        "user in /etc/subuid and /etc/subgid (docs/images.md).",
        details=details,
    )
