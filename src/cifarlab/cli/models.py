"""`cifarlab models`: which networks there are."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Annotated

import typer

from cifarlab.cli.common import make_console, say
from cifarlab.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from cifarlab.models.catalog import Network

MANY = 10  # to count: from so many on, a line says how far it has come
WIDE = 120  # columns


def models(
    pattern: Annotated[
        str | None,
        typer.Argument(help="Part of a name, or a pattern such as 'timm:*vit*'. [default: ours and torchvision's]"),
    ] = None,
) -> None:
    """List networks: parameters, the image size that their weights are for, and where those come from.

    Examples:

      cifarlab models mobilenet

      cifarlab models 'timm:*vit*'

      cifarlab models 'timm:resnet50.*'

    The last lists all weights of one network, and so does any pattern with a dot.
    """
    from cifarlab.models import catalog

    if pattern is None:
        print_networks(make_console(), [*catalog.OWN_NAMES, *catalog.torchvision_names()])
        say(f"and {len(catalog.timm_names()):,} networks of timm: 'cifarlab models timm:' lists them")
        return
    wanted = pattern.lower() if any(c in pattern for c in "*?[") else f"*{pattern.lower()}*"
    names = [*catalog.OWN_NAMES, *catalog.torchvision_names(), *catalog.timm_names()]
    if "." in pattern:
        names += [name for name in catalog.timm_names(tags=True) if "." in name]
    found = [name for name in names if fnmatch.fnmatchcase(name.lower(), wanted)]
    if not found:
        raise UsageError(f"no network's name matches '{pattern}'; {catalog.suggestion(pattern)}")
    print_networks(make_console(), found)


def print_networks(console: Console, names: list[str]) -> None:
    """A table of networks, by their names."""
    from rich import box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from cifarlab.models import catalog
    from cifarlab.models.weights import origin

    networks = [catalog.find(name) for name in names]
    to_count = [network for network in networks if network.parameters is None]
    counted = {
        network.name: _count(network)
        for network in track(
            to_count, "counting parameters", console=Console(stderr=True), transient=True, disable=len(to_count) < MANY
        )
    }
    # Without frames it fits into the 80 columns of a plain terminal.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("images", justify="right", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    for network in networks:
        where = origin(network.name)
        table.add_row(
            network.name,
            f"{network.parameters or counted[network.name]:,}",
            "any" if network.input_side is None else str(network.input_side),
            where if console.width >= WIDE else where.partition(":")[0],
        )
    console.print(table)
    if any(network.input_side is None for network in networks):
        say("ex1, ex2, racing: parameters for 10 classes and images of 32x32")


def _count(network: Network) -> int:
    """The parameters with the network's own head; ours have none, and get one of 10 classes for images of 32x32."""
    from cifarlab.models import parameter_count
    from cifarlab.models.catalog import on_meta

    side = network.input_side or 32
    return parameter_count(on_meta(network, None if network.input_side else 10, (side, side)))
