"""`cifarlab lr-find`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cifarlab.cli.common import DataOption, DeviceOption, SetOption, make_console, say
from cifarlab.errors import UsageError


def lr_find(
    recipe: Annotated[str, typer.Argument(help="A recipe's name ('cifarlab recipes' lists them) or a YAML file.")],
    dataset: Annotated[str | None, typer.Option(help="The dataset. [default: the recipe's first]")] = None,
    data: DataOption = None,
    set_: SetOption = None,
    low: Annotated[float, typer.Option("--from", help="Learning rate to begin with.")] = 1e-6,
    high: Annotated[float, typer.Option("--to", help="Learning rate to end with.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 100,
    out: Annotated[Path, typer.Option(readable=False, help="Where the picture goes.")] = Path("lr-find.png"),
    device: DeviceOption = "auto",
) -> None:
    """Train a few steps while the learning rate rises, and show where the loss falls fastest (Smith 2015).

    Example: cifarlab lr-find ex4-lite0 --dataset cifar10
    """
    from cifarlab import machine

    machine.prepare()
    from cifarlab import plots
    from cifarlab.build import make_task
    from cifarlab.experiment import check_plans, explained, get_ready, load
    from cifarlab.lr_find import check_range, learning_rate_test
    from cifarlab.recipe import load_recipe

    check_range(low, high, steps)
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the picture's name, as in {out / 'lr-find.png'}")
    plan = load_recipe(recipe, set_ or [])
    plan = plan.resolved(dataset=dataset or plan.datasets[0], seed=plan.seed)
    place = machine.choose_device(device)
    check_plans([plan], out.parent, place, say)
    left_open = plan.train.batch_size == "auto"
    prepared, weights, (plan, *_) = get_ready(plan, load(plan, data, say), place, say)
    with explained(plan):
        task = make_task(plan, prepared, place, weights, say)
        with make_console().status("learning-rate test") as status:
            test = learning_rate_test(
                plan,
                task,
                low=low,
                high=high,
                steps=steps,
                progress=lambda step, rate, loss: status.update(f"step {step}/{steps}  lr {rate:.2e}  loss {loss:.4f}"),
            )
    if test.steepest is None or test.tenth is None:
        say(f"the loss never fell between {low:g} and {test.rates[-1]:g}; try a lower --from, or more --steps")
    else:
        say(
            f"the loss falls fastest at a learning rate of {test.steepest:.1e}; a tenth of the lowest: {test.tenth:.1e}"
        )
        found = [f"optimizer.lr={test.steepest:.1e}"]
        for name in ("head_lr", "bias_lr"):
            rate = getattr(plan.optimizer, name, None)
            if rate is not None:  # it rose in the same proportion
                found.append(f"optimizer.{name}={rate * test.steepest / plan.optimizer.lr:.1e}")
        if left_open:  # the rate is for this size
            found.append(f"train.batch_size={plan.train.batch}")
        command = ["cifarlab", "run", recipe, "--dataset", plan.datasets[0]]
        command += ["--data", str(data)] if data is not None else []
        command += ["--device", device] if device != "auto" else []
        command += [word for override in [*(set_ or []), *found] for word in ("--set", override)]
        say(f"to use it: {shlex.join(command)}")
    plots.learning_rate_curve(out, test.rates, test.losses, test.steepest, title=f"{plan.name} on {plan.datasets[0]}")
    say(f"picture: {out}")
