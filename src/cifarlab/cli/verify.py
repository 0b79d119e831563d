"""`cifarlab verify-resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from cifarlab.cli.common import DataOption, DeviceOption, SetOption, say


def verify_resume(
    recipe: Annotated[str, typer.Argument(help="A recipe's name ('cifarlab recipes' lists them) or a YAML file.")],
    dataset: Annotated[str | None, typer.Option(help="The dataset. [default: the recipe's first]")] = None,
    data: DataOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Show that a recipe's runs go on here as if they had never stopped: by a few steps, with stops and without.

    Example: cifarlab verify-resume fast90 --dataset digits
    """
    import tempfile
    from pathlib import Path

    from cifarlab import machine

    machine.prepare()
    from cifarlab.experiment import check_plans, load
    from cifarlab.recipe import load_recipe
    from cifarlab.verify import verify_resume

    plan = load_recipe(recipe, set_ or [])
    plan = plan.resolved(dataset=dataset or plan.datasets[0], seed=plan.seed)
    place = machine.choose_device(device)
    check_plans([plan], Path(tempfile.gettempdir()), place, say)
    tensors = verify_resume(plan, load(plan, data, say), place, say)
    say(f"equal, bit for bit: {tensors} tensors of weights and optimizer, and the log")
