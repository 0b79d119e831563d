"""`cifarlab bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cifarlab.cli.common import DataOption, DeviceOption, SetOption, make_console, say
from cifarlab.errors import UsageError, nearest

# A run that doesn't end, or stop for anything else than what is measured, in the middle of a round.
_LONG = ("train.epochs=100000", "train.early_stopping=null", "train.checkpoint_every=null", "evaluate.test=false")
# The others don't validate either.
_NO_VALIDATION = ("data.validation=0", "train.early_stopping=null", "evaluate.tta=null")


def bench(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name ('cifarlab recipes' lists them) or a YAML file.")
    ] = None,
    machine: Annotated[
        bool,
        typer.Option(
            "--machine", help="What the hardware can do, and what each setting of the process is worth on it."
        ),
    ] = False,
    dataset: Annotated[str | None, typer.Option(help="The dataset. [default: the recipe's first]")] = None,
    data: DataOption = None,
    set_: SetOption = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="NAME",
            help="ceiling, 'standard 0' (workers), 'standard 2', 'standard 4', fastai or lightning; may come again. "
            "[default: all that are installed]",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each, taking turns.")] = 5,
    json: Annotated[Path | None, typer.Option("--json", readable=False, help="Write every round there.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Images per second of a recipe's training step here: beside its ceiling, and beside other loops.

    The ceiling is the same step on one batch that never changes. The others train the same model on the same images
    with their own loops and defaults. --machine needs no recipe and no data, and takes about two minutes.

    Examples:

      cifarlab bench ex1 --dataset cifar10

      cifarlab bench --machine
    """
    if machine:
        of_recipes = {"RECIPE": recipe, "--dataset": dataset, "--data": data, "--set": set_, "--against": against}
        for name, given in of_recipes.items():
            if given:
                raise UsageError(f"--machine measures no recipe and takes no {name}; leave out one of the two")
        _bench_machine(device, rounds, json)
    elif recipe is None:
        raise UsageError(
            "give a RECIPE to measure ('cifarlab recipes' lists them), or --machine to measure the hardware"
        )
    else:
        _bench_recipe(recipe, dataset, data, set_, against, rounds, json, device)


def _bench_machine(device: str, rounds: int, json: Path | None) -> None:
    from cifarlab import machine

    machine.prepare()
    from cifarlab import files
    from cifarlab.bench import hardware
    from cifarlab.cli.tables import print_machine, print_settings, print_speeds

    place = machine.choose_device(device)
    console = make_console()
    print_machine(console, machine.describe(place))
    with console.status("") as status:
        speeds = list(hardware.speeds(place, status.update))
        status.update("memory and denormal numbers")
        bandwidth, denormals = hardware.bandwidth(place), hardware.cost_of_denormals()
    print_speeds(console, speeds, bandwidth, denormals)
    machine.give_back_memory(place)
    steps = []
    for name in hardware.STEPS:
        plan = hardware.step_recipe(name, place)
        with console.status("") as status:
            pairs = hardware.worth(plan, place, rounds, status.update)
        print_settings(console, plan, pairs)
        steps.append(hardware.record(plan, pairs))
    if json is not None:
        record = {
            "machine": machine.describe(place),
            "speeds": [speed.record() for speed in speeds],
            "copied_bytes_per_second": bandwidth,
            "denormals": {"cost": denormals, "left_out": None if denormals else "this CPU can't flush them"},
            "steps": steps,
        }
        files.write_json(json, record)


def _bench_recipe(
    recipe: str,
    dataset: str | None,
    data: Path | None,
    set_: list[str] | None,
    against: list[str] | None,
    rounds: int,
    json: Path | None,
    device: str,
) -> None:
    from cifarlab import machine

    machine.prepare(without=["threads_pinned"])  # the measured processes see to that themselves
    from cifarlab import files
    from cifarlab.bench.contenders import Job, available
    from cifarlab.bench.measure import measure
    from cifarlab.cli.tables import print_pairs
    from cifarlab.experiment import check_plans, get_ready, load
    from cifarlab.recipe import load_recipe, make_recipe

    names = [name for name in available() if name != "ours"]
    for name in against or []:
        if name not in names:
            raise UsageError(
                f"--against {name}: {nearest(name, names)} (pip install 'cifarlab[bench]' adds the others)"
            )
    plan = load_recipe(recipe, set_ or [])
    if plan.schedule.name != "plateau":  # which needs it
        plan = make_recipe(plan.to_dict(), _NO_VALIDATION)
    plan = plan.resolved(dataset=dataset or plan.datasets[0], seed=plan.seed)
    place = machine.choose_device(device)
    check_plans([plan], Path.cwd(), place, say)
    prepared, _, (plan, *_) = get_ready(plan, load(plan, data, say), place, say)
    count, batch = len(prepared.train), plan.train.batch
    if count < batch:
        raise UsageError(f"{count} training images are no whole batch of {batch}; --set train.batch_size={count}")
    # Whole batches of one kind, as the ceiling has them: at the last resolution, everything training.
    alike = [f"data.limit={count // batch * batch}", "model.cache=null"]
    alike += [f"model.{field}=null" for field in ("freeze_backbone", "freeze_late")]
    if plan.train.last_resolution is not None:
        alike.append(f"train.resolution={plan.train.last_resolution}")
    plan = make_recipe(plan.to_dict(), [*_LONG, *alike])
    with make_console().status("bench") as status:
        job = Job(plan.to_yaml(), data, str(place), plan.train.batch)
        pairs = measure(against or names, job, rounds, status.update)
    print_pairs(make_console(), plan, pairs)
    if json is not None:
        record = {
            "recipe": plan.to_dict(),
            "machine": machine.describe(place),
            "pairs": [
                {"contender": p.contender, "ours": p.ours, "theirs": p.theirs, "failed": p.failed} for p in pairs
            ],
        }
        files.write_json(json, record)
