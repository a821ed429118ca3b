"""``NodeEngine config``: what an operator configures for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flops.cli.output import print_line, say
from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.node.configuration import NodeConfiguration
    from flops.node.paths import NodePaths

config = typer.Typer(
    help="Configure this node; everything takes effect at its next start.", no_args_is_help=True
)
virtualization = typer.Typer(help="Show or choose how services are run.", invoke_without_command=True)
visibility = typer.Typer(help="Choose under which address services are announced.", no_args_is_help=True)
config.add_typer(virtualization, name="virtualization")
config.add_typer(visibility, name="visibility")

ACTIVE = "🟢 Active"
DISABLED = "❌ Disabled"


def paths_of(context: typer.Context) -> NodePaths:
    """The files of the node that the command line means."""
    from flops.wiring.node_files import node_paths

    home: Path | None = context.find_root().obj
    return node_paths(home)


def load_configuration(paths: NodePaths) -> NodeConfiguration:
    """The node's configuration.

    Raises:
        FlopsError: ``config_corrupt``, ``file_unreadable``.
    """
    from flops.node.configuration import NodeConfiguration
    from flops.wiring.node_files import node_conf_file

    return NodeConfiguration(node_conf_file(paths).load())


def change_configuration(
    paths: NodePaths, change: Callable[[NodeConfiguration], NodeConfiguration]
) -> NodeConfiguration:
    """Change the node's configuration; on an error, nothing is changed.

    Raises:
        FlopsError: ``config_corrupt``, ``file_unreadable``, ``disk_full``.
    """
    from flops.node.configuration import NodeConfiguration
    from flops.wiring.node_files import node_conf_file

    def update(raw: dict[str, Any]) -> dict[str, Any]:
        return dict(change(NodeConfiguration(raw)).raw)

    return NodeConfiguration(node_conf_file(paths).update(update))


@config.command("default")
def write_default(context: typer.Context) -> None:
    """Write the default configuration, whatever is there."""
    from flops.wiring.node_files import node_conf_file

    paths = paths_of(context)
    node_conf_file(paths).reset()
    say(f"The default configuration is written to {paths.conf}.")


@config.command("cluster")
def set_cluster(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="Host name or address of the cluster.")],
    port: Annotated[
        int | None, typer.Option("-p", "--clusterPort", help="Port of the cluster [10100].")
    ] = None,
    is_tls: Annotated[bool, typer.Option("-s", "--clusterSSL", help="Encrypt the connection (TLS).")] = False,
) -> None:
    """Set the cluster that this node joins: address, port and encryption."""
    from flops.node.configuration import DEFAULT_CLUSTER_PORT

    host, chosen = cluster_of(url, port)
    values = {
        "cluster_address": host,
        "cluster_port": chosen if chosen is not None else DEFAULT_CLUSTER_PORT,
        "cluster_ssl": is_tls,
    }
    change_configuration(paths_of(context), lambda conf: conf.with_values(**values))
    say(f"The cluster is {host}:{values['cluster_port']}{' (TLS)' if is_tls else ''}.")


def cluster_of(address: str, port: int | None) -> tuple[str, int | None]:
    """Host and port from the two options; the port is None when neither names one.

    Raises:
        FlopsError: ``config_invalid``; ``usage`` when they name different ports.
    """
    from flops.node.configuration import check_port, parse_address

    host, port_in_address = parse_address(address)
    if port is not None:
        check_port(port)
    if None not in (port, port_in_address) and port != port_in_address:
        raise FlopsError(
            ErrorCode.USAGE,
            f"The address {address} and the option for the port ({port}) name different ports.",
            hint="Give the port once; nothing was changed.",
        )
    return host, port if port is not None else port_in_address


@config.command("applogs")
def set_app_logs(
    context: typer.Context, path: Annotated[str, typer.Argument(help="Folder for the output of services.")]
) -> None:
    """Set the folder that takes the output of services."""
    folder = Path(path).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise FlopsError(ErrorCode.CONFIG_INVALID, f"{folder} is not a folder.")
    change_configuration(paths_of(context), lambda conf: conf.with_values(app_logs=str(folder)))
    say(f"The output of services goes to {folder}.")


@config.command("auth")
def set_certificate(
    context: typer.Context,
    certificate: Annotated[str, typer.Option("-c", "--certFile", help="This node's certificate (PEM).")] = "",
    key: Annotated[str, typer.Option("-k", "--keyFile", help="Its private key (PEM).")] = "",
) -> None:
    """Set the certificate that this node shows to a cluster with TLS."""
    given = {"mqtt_cert_file": certificate, "mqtt_key_file": key}
    values = {name: str(Path(value).expanduser().absolute()) for name, value in given.items() if value}
    if not values:
        raise FlopsError(ErrorCode.USAGE, "Neither --certFile nor --keyFile is given; nothing was changed.")
    for file in values.values():
        if not Path(file).is_file():
            raise FlopsError(ErrorCode.FILE_UNREADABLE, f"There is no file {file}; nothing was changed.")
    change_configuration(paths_of(context), lambda conf: conf.with_values(**values))
    say("The certificate is set.")


@visibility.command("public")
def be_public(context: typer.Context) -> None:
    """Announce services under the machine's public address, if it has one."""
    change_configuration(paths_of(context), lambda conf: conf.with_values(public_ip=True))
    say("Services are announced under the public address of this machine, if it has one.")


@visibility.command("private")
def be_private(context: typer.Context) -> None:
    """Announce services under the address that the cluster sees."""
    change_configuration(paths_of(context), lambda conf: conf.with_values(public_ip=False))
    say("Services are announced under the address from which this machine reaches the cluster.")


@config.command("disclosure")
def set_disclosure(
    context: typer.Context,
    choice: Annotated[
        str | None, typer.Argument(help="full, message or none", metavar="[full|message|none]")
    ] = None,
) -> None:
    """Show or choose what this node reveals when users' code fails on its data."""
    from flops.disclosure import parse_disclosure
    from flops.node.configuration import DISCLOSURE_KEY

    paths = paths_of(context)
    if choice is not None:
        value = parse_disclosure(choice).value
        change_configuration(paths, lambda conf: conf.with_values(**{DISCLOSURE_KEY: value}))
    conf = load_configuration(paths)
    print_line(f"Disclosure: {conf.disclosure.value} ({conf.disclosure.meaning})")
    for sentence in pending_changes(paths, conf):
        say(sentence)


@virtualization.callback()
def show_virtualizations(context: typer.Context) -> None:
    """Show how services are run."""
    if context.invoked_subcommand is None:
        _show_virtualizations(paths_of(context))


@virtualization.command("container")
def switch_containers(
    context: typer.Context, switch: Annotated[str, typer.Argument(help="on or off", metavar="[on/off]")]
) -> None:
    """Run services in containers of Docker or Podman, where they can be."""
    from flops.core.health import Severity
    from flops.node.configuration import CONTAINER, parse_switch
    from flops.wiring.node_files import node_engine_findings

    paths = paths_of(context)
    is_on = parse_switch(switch, CONTAINER)
    change_configuration(paths, lambda conf: conf.with_containers(is_on=is_on))
    _show_virtualizations(paths)
    for finding in node_engine_findings(is_preferred=is_on):
        if finding.severity in {Severity.WARNING, Severity.PROBLEM}:
            say(f"{finding.what} {finding.advice}")


def _show_virtualizations(paths: NodePaths) -> None:
    from flops.node.configuration import CONTAINER, PROCESS

    conf = load_configuration(paths)
    configured = conf.virtualizations
    if not configured:
        print_line("No Virtualization Runtime Configured.")
        return
    print_line("Virtualization Runtimes:")
    for name, is_on in configured.items():
        print_line(f"     - {name}: {ACTIVE if is_on and name in {PROCESS, CONTAINER} else DISABLED}")
    foreign = [name for name, is_on in configured.items() if is_on and name not in {PROCESS, CONTAINER}]
    if foreign:
        say(
            f"FLOps runs services as processes ({PROCESS}) and in containers ({CONTAINER}); it does not use"
            f" {', '.join(foreign)}."
        )
    for sentence in pending_changes(paths, conf):
        say(sentence)


@config.command("addon")
def configure_addon(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="FLOps-learner (FLOps) or image-builder.")] = None,
    switch: Annotated[str | None, typer.Argument(help="on or off", metavar="[on/off]")] = None,
) -> None:
    """Show the addons, or switch one on or off."""
    from flops.core.cluster import IMAGE_BUILDER_ADDON
    from flops.node.configuration import find_addon, parse_switch

    paths = paths_of(context)
    if name is None:
        _show_addons(paths)
        return
    addon = find_addon(name)
    if switch is None:
        raise FlopsError(ErrorCode.USAGE, f"{name} needs exactly one parameter: [on/off]")
    is_on = parse_switch(switch, addon)
    change_configuration(paths, lambda conf: conf.with_addon(addon, is_on=is_on))
    _show_addons(paths)
    if addon == IMAGE_BUILDER_ADDON and is_on:
        _say_what_can_be_built()


def _say_what_can_be_built() -> None:
    from flops.core.build_tools import build_findings
    from flops.wiring.node_files import node_build_tools

    for finding in build_findings(node_build_tools()):
        say(f"{finding.what} {finding.advice}".rstrip())


def _show_addons(paths: NodePaths) -> None:
    conf = load_configuration(paths)
    if not conf.addons:
        print_line("No Addons Configured.")
    else:
        print_line("Configured Addons:")
        for name, is_on in conf.addons.items():
            print_line(f"     - {name}: {ACTIVE if is_on else DISABLED}")
    for sentence in pending_changes(paths, conf):
        say(sentence)


def pending_changes(paths: NodePaths, conf: NodeConfiguration) -> list[str]:
    """How the running daemon differs from the configuration, one sentence each."""
    from flops.cli.node_process import running_report

    report = running_report(paths)
    if report is None:
        return []
    running, configured = set(report.active_addons), set(conf.active_addons)
    sentences = [
        f"{name} is switched {'on' if name in configured else 'off'}, but the running NodeEngine was started"
        f" with it {'off' if name in configured else 'on'}: this takes effect at the next start."
        for name in sorted(running ^ configured)
    ]
    if report.prefers_containers != conf.prefers_containers:
        choice = "on" if conf.prefers_containers else "off"
        sentences.append(
            f"Containers are switched {choice}, but the running NodeEngine was started before: this takes"
            " effect at the next start."
        )
    if report.disclosure != conf.disclosure:
        sentences.append(
            f"The disclosure is set to {conf.disclosure}, but the running NodeEngine was started with"
            f" {report.disclosure}: this takes effect at the next start."
        )
    if report.cluster_address != conf.cluster:
        sentences.append(
            f"The cluster is set to {conf.cluster}, but the running NodeEngine uses {report.cluster_address}:"
            " this takes effect at the next start."
        )
    return sentences
