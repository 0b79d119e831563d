"""`cifarlab ablate`."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cifarlab.cli.common import DataOption, DeviceOption, SetOption, make_console, parse_time, say
from cifarlab.errors import CifarlabError, RunError, UsageError

if TYPE_CHECKING:
    from cifarlab.ablate import Conduct, Workers

STUDIES = Path("studies")


class Designs(StrEnum):
    grid = "grid"
    one_at_a_time = "one-at-a-time"
    leave_one_out = "leave-one-out"


class Pruning(StrEnum):
    median = "median"
    asha = "asha"
    none = "none"


def ablate(
    recipe: Annotated[str, typer.Argument(help="A recipe's name ('cifarlab recipes' lists them) or a YAML file.")],
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=V1,V2…", help="A field and its values; KEY=…;KEY=… vary together. May be given again."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm: the recipe's seed, and those after it.")] = 3,
    design: Annotated[
        Designs,
        typer.Option(
            help="grid: all combinations. one-at-a-time: the recipe, and each value alone. leave-one-out: all that is "
            "varied (KEY=WITH,WITHOUT, or KEY=WITHOUT), and each left out."
        ),
    ] = Designs.grid,
    dataset: Annotated[str | None, typer.Option(help="The dataset. [default: the recipe's first]")] = None,
    name: Annotated[str | None, typer.Option(help="The study's name. [default: the recipe's and the fields']")] = None,
    studies: Annotated[Path, typer.Option(readable=False, help="Folder that the study's folder goes into.")] = STUDIES,
    search: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Try N settings out of values and ranges (KEY=LOW..HIGH) with Optuna."),
    ] = None,
    prune: Annotated[Pruning, typer.Option(help="How a search gives up runs with little hope.")] = Pruning.median,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="End after so long, as in 2h, 90m; the same command goes on.")
    ] = None,
    resolve: Annotated[
        float, typer.Option(min=0.001, max=99, help="A difference worth knowing, in points of accuracy.")
    ] = 0.2,
    on: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="local:N: N runs at a time, cores and GPUs dealt out. ray, ray://HOST:10001: a Ray cluster.",
        ),
    ] = "local",
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Cores of a run on a cluster. [default: its smallest node's, or by GPU]")
    ] = None,
    data: DataOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Find out what a change is worth: runs with paired seeds, differences with intervals, a verdict for each arm.

    Validation accuracy decides; the test set is scored once at the end, for the best arm and the baseline. The same
    command goes on with a study that was interrupted.

    Examples:

      cifarlab ablate ex1 --vary optimizer.lr=3e-4,1e-3,3e-3 --seeds 5

      cifarlab ablate fast90 --set data.validation=0.1 --design leave-one-out --vary train.prune=null

      cifarlab ablate ex1 --search 40 --seeds 1 --vary optimizer.lr=1e-4..1e-1 --vary augment.flip=random,null

      cifarlab ablate ex1 --vary 'train.batch_size=64,256;optimizer.lr=1e-3,2e-3' --on local:2
    """
    from cifarlab.ablate import Conduct, Conductor, merged, open_or_create, plan_study
    from cifarlab.cli.tables import print_study
    from cifarlab.factors import parse_factor
    from cifarlab.recipe import load_recipe
    from cifarlab.workers import parse_workers

    seconds = None if budget is None else parse_time(budget, "--budget")
    plan = load_recipe(recipe, set_ or [])
    factors = [parse_factor(text, ranges=search is not None) for text in vary]
    called = check_name(name or _name_of(plan.name, [field for factor in factors for field in factor.fields]))
    study = plan_study(
        called, plan, factors, design.value if search is None else "search", dataset=dataset or plan.datasets[0],
        seeds=range(plan.seed, plan.seed + seeds), resolve=resolve / 100, command=["cifarlab", *sys.argv[1:]],
    )  # fmt: skip
    kind, where = parse_workers(on)
    conduct = Conduct(data=data.absolute() if data is not None else None, device=device, budget=seconds)
    folder, there = open_or_create(studies / called, study)
    with folder.locked():
        study = merged(folder.read(), study) if there else study
        folder.write(study)
        say(f"study: {folder.path}, {len(study.arms)} arms, {len(study.seeds)} seeds")
        workers = _workers(kind, where, folder.path, device, cpus)
        with contextlib.closing(workers), _signals(conduct, workers) as received:
            if search is None:
                conductor = Conductor(folder, study, workers, conduct, say)
            else:
                from cifarlab.search import Search

                conductor = Search(folder, study, workers, conduct, say, trials=search, pruning=prune.value)
            study = conductor.carry_out()
        print_study(make_console(), study)
        _write_page(folder.path)
    failed = [run for run in study.runs if run.status == "failed"]
    if study.status == "stopped":
        left = sum(run.status not in ("finished", "diverged", "pruned") for run in study.runs)
        say(f"{left} of {len(study.runs)} runs are left; the same command goes on with them")
    if received:
        sys.exit(128 + received[0])
    if failed:
        raise RunError(
            f"{len(failed)} of {len(study.runs)} runs failed; the first: {failed[0].error}; what it printed is in "
            f"{folder.place(failed[0]) / 'output.txt'}; the same command tries them again"
        )


def _write_page(study: Path) -> None:
    """The study's page; without one, all else is still there."""
    from cifarlab.report.data import PAGE
    from cifarlab.report.page import write_page

    try:
        write_page([study], study / PAGE)
        say(f"page: {study / PAGE}")
    except CifarlabError as error:
        say(f"no page: {error}")


def check_name(name: str) -> str:
    """A study's name, which names its folder. Raises UsageError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name) or name.endswith("."):
        raise UsageError(
            f"--name {name[:60]!r}: expected at most 100 letters, digits and . _ + -, beginning with a letter or digit"
        )
    return name


def _name_of(recipe: str, fields: list[str]) -> str:
    parts = dict.fromkeys(re.sub(r"[^A-Za-z0-9_]+", "-", field.split(".")[-1]).strip("-") for field in fields)
    return "-".join([recipe, *parts])[:100].strip("-.")


def _workers(kind: str, where: str, study: Path, device: str, cpus: int | None) -> Workers:
    if kind == "local":
        from cifarlab.workers import LocalWorkers, gpus_of

        if cpus is not None:
            raise UsageError("--cpus is for --on ray; --on local:N deals out this machine's cores")
        return LocalWorkers(int(where), gpus_of(device))
    from cifarlab.ray_workers import RayWorkers

    return RayWorkers(f"ray://{where}" if where else "", study, device, cpus)


@contextmanager
def _signals(conduct: Conduct, workers: Workers) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM have the runs save and end; the second time they are ended at once. Gives those received."""
    import signal

    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) == 1:
            conduct.stopped.set()
            sys.stderr.write("\ncifarlab: the runs finish their step and save; once more to leave at once\n")
        else:
            workers.close()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
