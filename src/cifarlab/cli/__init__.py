"""The command line: parse, call, print, exit code. What takes long to import is imported where it is needed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cifarlab import __version__
from cifarlab.cli.ablate import ablate
from cifarlab.cli.bench import bench
from cifarlab.cli.board import board
from cifarlab.cli.common import DataOption, DeviceOption, SetOption, make_console, parse_time, say
from cifarlab.cli.data import data_app
from cifarlab.cli.doctor import doctor
from cifarlab.cli.lr_find import lr_find
from cifarlab.cli.models import models
from cifarlab.cli.report import report
from cifarlab.cli.verify import verify_resume
from cifarlab.errors import CifarlabError, UsageError, printable

if TYPE_CHECKING:
    import torch

    from cifarlab.data.dataset import Dataset
    from cifarlab.recipe import Recipe
    from cifarlab.rundir import RunFolder
    from cifarlab.train import StopRequest

app = typer.Typer(
    name="cifarlab",
    help="Train, measure and compare image classifiers: the most accuracy per minute on the hardware you have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.command("lr-find")(lr_find)
app.command()(ablate)
app.command()(bench)
app.command()(board)
app.command()(doctor)
app.command("verify-resume")(verify_resume)

RUNS = Path("runs")
TtaOption = Annotated[
    str | None,
    typer.Option(
        "--tta", metavar="MODE", help="Test-time augmentation: flip, crops, diagonal, a number of views, auto, none."
    ),
]


def main() -> None:
    """Run the command line; errors of ours end as one sentence on stderr and the exit code of their class."""
    try:
        code = app(standalone_mode=False)
        _leave(None if not code else "it was interrupted")
    except SystemExit:
        _leave("it was interrupted")
        raise
    except CifarlabError as error:
        # What all processes of torchrun find, one of them says.
        code = _complain(str(error), error.exit_code) if _leave(str(error)) else error.exit_code
    except typer.TyperException as error:
        message = error.format_message().strip()  # empty where the help was shown instead
        code = _complain(_as_sentence(message), error.exit_code) if message else error.exit_code
    except typer.Abort:
        code = 130
    except BrokenPipeError:
        # Whoever read the output has left; point stdout elsewhere so that Python's last flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    _leave("it was interrupted")  # where it hasn't left yet
    if code == 130:  # what typer makes of a KeyboardInterrupt
        _complain("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _leave(complaint: str | None) -> bool:
    """`distributed.leave`, where this process may have joined others."""
    distributed = sys.modules.get("cifarlab.distributed")
    joined = distributed is not None and distributed.place().size > 1
    # Before they have joined, each process of a machine finds the same.
    own = "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"
    return bool(distributed.leave(complaint)) if distributed is not None and joined else own


def _as_sentence(message: str) -> str:
    return message[:1].lower() + message[1:].removesuffix(".") + "; see --help"


def _complain(sentence: str, code: int) -> int:
    sys.stderr.write(f"cifarlab: {printable(sentence)}\n")
    return code


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"cifarlab {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name ('cifarlab recipes' lists them) or a YAML file.")],
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="cifar10, cifar100, digits or folder:PATH; may be given again. [default: the recipe's]"),
    ] = None,
    data: DataOption = None,
    runs: Annotated[Path, typer.Option(readable=False, help="Folder that the run folders go into.")] = RUNS,
    set_: SetOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The seed. [default: the recipe's]")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Run with N seeds: the recipe's, and those after it.")
    ] = None,
    tta: TtaOption = None,
    device: DeviceOption = "auto",
    profile: Annotated[
        bool, typer.Option("--profile", help="Write where ten steps spend their time: trace.json.gz, profile.txt.")
    ] = False,
    histograms: Annotated[
        bool, typer.Option("--histograms", help="Write each epoch's histograms of the weights, for TensorBoard.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what was begun by the same command; what is finished stays.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="What each run may take in all, as in 10m: as many epochs as there is time for."
        ),
    ] = None,
) -> None:
    """Train and test a recipe; leaves a run folder for each dataset and seed.

    Examples:

      cifarlab run ex1

      torchrun --nproc-per-node 2 -m cifarlab run ex1

      cifarlab run ex2-schedule --dataset cifar10 --seeds 3 --set train.epochs=10
    """
    from cifarlab.recipe import load_recipe

    if seed is not None and seeds is not None:
        raise UsageError("give --seed N (one run with that seed) or --seeds N (N runs), not both")
    plan = load_recipe(recipe, [*(set_ or []), *_tta_override(tta)])
    seconds = None if budget is None else parse_time(budget, "--budget")
    if seconds is not None:
        from cifarlab.budget import fit_to_be_timed

        plan = fit_to_be_timed(plan, set_ or [])
    first = plan.seed if seed is None else seed
    plans = [
        plan.resolved(dataset=name, seed=number)
        for name in dict.fromkeys(dataset or plan.datasets)
        for number in range(first, first + (seeds or 1))
    ]
    _carry_out(plans, data, runs, device, profile=profile, histograms=histograms, resume=resume, budget=seconds)


@app.command("resume")
def resume_run(
    run: Annotated[Path, typer.Argument(readable=False, help="A run folder.")],
    data: DataOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Go on with a run that was stopped or killed, from its newest checkpoint to its end.

    On the CPU the result is the same, bit for bit, as if it had never stopped.
    """
    from cifarlab.rundir import RunFolder

    if os.environ.get("WORLD_SIZE", "1") == "1":  # else some may be on machines that haven't got it
        RunFolder.open(run).recipe()
    _carry_out([], data, RUNS, device, begun=run)


def _tta_override(tta: str | None) -> list[str]:
    """`--tta flip` as `--set evaluate.tta=flip`."""
    return [] if tta is None else [f"evaluate.tta={'null' if tta == 'none' else tta}"]


class _Job(NamedTuple):
    """A recipe to run; or, where there is a run folder, a run of it to go on with."""

    plan: Recipe
    begun: Path | None


def _jobs(plans: list[Recipe], runs: Path, *, resume: bool, begun: Path | None) -> list[_Job]:
    """What is to be done, as the first process finds it."""
    from cifarlab import distributed
    from cifarlab.recipe import make_recipe
    from cifarlab.rundir import RunFolder, find_run_of

    def find(plan: Recipe, since: float) -> str | None:
        run = find_run_of(runs, plan, since)
        return str(run.path) if run is not None else None

    if begun is not None:
        values = distributed.from_first(lambda: RunFolder.open(begun).recipe().to_dict())
        return [_Job(make_recipe(values, origin=str(begun / "recipe.yaml")), begun)]
    found: list[str | None] = [None] * len(plans)
    # Started again by torchrun, it goes on with what it had begun itself.
    since = 0.0 if resume else distributed.began_before()
    if since is not None:
        found = distributed.from_first(lambda: [find(plan, since) for plan in plans])
    return [_Job(plan, Path(path) if path else None) for plan, path in zip(plans, found, strict=True)]


def _carry_out(
    plans: list[Recipe],
    folder: Path | None,
    runs: Path,
    device_name: str,
    *,
    profile: bool = False,
    histograms: bool = False,
    resume: bool = False,
    budget: float | None = None,
    begun: Path | None = None,
) -> None:
    """Run recipes, or go on with one run that was begun. resume: go on with those of their runs that there are."""
    from cifarlab import distributed, machine

    machine.prepare()  # before torch is there
    from cifarlab.cli.display import NoDisplay, RunDisplay
    from cifarlab.cli.tables import print_comparison
    from cifarlab.compare import compare
    from cifarlab.experiment import check_plans, load, resume_experiment, run_experiment
    from cifarlab.train import StopRequest

    began = time.time() - machine.process_age()
    console = make_console()
    device = distributed.join(device_name)
    shown = distributed.is_first()
    tell = say if shown else (lambda _: None)
    jobs = _jobs(plans, runs, resume=resume, begun=begun)
    if new := [plan for plan, begun in jobs if begun is None]:
        check_plans(new, runs, device, tell)
    done: list[RunFolder] = []
    pages: list[Path] = []
    stop = StopRequest()
    many_seeds = len({plan.seed for plan, _ in jobs}) > 1
    loaded: tuple[str, Dataset] | None = None
    try:
        with _signals(stop):
            for plan, begun in jobs:
                name = plan.datasets[0]
                title = f"{plan.name} {name}" + (f" seed {plan.seed}" if many_seeds else "")
                with RunDisplay(console, title) if shown else NoDisplay() as display:
                    common: dict[str, Any] = {
                        "device": device, "display": display, "stop": stop, "process_started": began,
                        "report": display.report,
                    }  # fmt: skip
                    if begun is not None:
                        loaded = None
                        run = resume_experiment(begun, data_folder=folder, **common)
                    else:
                        if loaded is None or loaded[0] != name:
                            loaded = None  # two datasets at once may not fit
                            loaded = name, load(plan, folder, display.report)
                        run = run_experiment(
                            plan, loaded[1], runs=runs, profile=profile, histograms=histograms, budget=budget, **common
                        )
                if not shown:
                    pass
                elif run.train_log()["status"] == "finished":
                    done.append(run)
                    _summary(console, run)
                    pages += _page(run)
                    _remember_end(run, began, device)
                else:
                    where = f"./{run.path}" if str(run.path).startswith("-") else str(run.path)
                    where = subprocess.list2cmdline([where]) if os.name == "nt" else shlex.quote(where)
                    _complain(f"stopped; the run so far is in {run.path}; go on with: cifarlab resume {where}", 0)
                began = time.time()
                # One may have been sent a signal when the loop was over.
                signals = [number for number in distributed.everyones(stop.signal) if number is not None]
                if signals:
                    distributed.leave()
                    sys.exit(128 + signals[0])
    finally:
        # What has finished is worth seeing, whatever became of the rest.
        if done:
            print_comparison(console, compare(done))
            if pages:
                others = f" (and {len(pages) - 1:,} more; 'cifarlab report' puts many runs on one)" * (len(pages) > 1)
                say(f"page: {pages[-1]}{others}")


def _page(run: RunFolder) -> list[Path]:
    """Writes the run's own page, which is worth no failure; its path, or nothing and a sentence."""
    from cifarlab.report.page import write_run_page

    try:
        return [write_run_page(run)]
    except CifarlabError as error:
        say(f"no page: {error}")
        return []


def _remember_end(run: RunFolder, began: float, device: torch.device) -> None:
    """What the end of a budgeted run took, besides evaluation, is what that of the next will."""
    from cifarlab import machine
    from cifarlab.budget import remember_finishing

    budget, test = run.train_log().get("budget"), run.test_log()
    if budget is None or test is None:
        return
    looks = test["test_time"] + (test["tta"]["test_time"] if test["tta"] is not None else 0.0)
    remember_finishing(machine.identity(device), max(0.0, time.time() - began - budget["spent"] - looks))


def _summary(console: Any, run: RunFolder) -> None:
    from cifarlab.metrics import rising_since

    log = run.trained_log()
    rising = rising_since([entry["val_loss"] for entry in log["epochs"]])
    if log["overfitting_gap"] is not None and log["best_val_accuracy"] is not None:
        averaged = " (averaged weights)" if log["best_weights"] == "ema" else ""
        console.print(
            f"best epoch {log['best_epoch']}{averaged}, validation accuracy {log['best_val_accuracy']:.2%}, "
            f"overfitting gap {100 * log['overfitting_gap']:+.2f} points"
            + (f", validation loss rising since epoch {rising}" if rising is not None else "")
            + (f", stopped early after epoch {len(log['epochs'])}" if log["stopped_early"] else "")
        )
    console.print(printable(f"record and pictures: {run.path}"), markup=False)


@contextmanager
def _signals(stop: StopRequest) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the training loop after its step; elsewhere, and the second time, they end at once."""
    import signal

    from cifarlab.distributed import is_first

    def handle(number: int, frame: object) -> None:
        if stop.listening and stop.signal is None:
            stop.signal = number
            if is_first():
                sys.stderr.write("\ncifarlab: finishing this step and saving; once more to leave at once\n")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def recipes() -> None:
    """List the recipes that come with cifarlab."""
    from cifarlab.cli.tables import print_recipes

    print_recipes(make_console())


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file.")],
    dataset: Annotated[str | None, typer.Option(help="Show it for this dataset. [default: the recipe's first]")] = None,
    data: DataOption = None,
    set_: SetOption = None,
) -> None:
    """Show a resolved recipe, its network's layers (output shapes, parameters, sizes), and the FLOPs of training it."""
    from cifarlab.cli.tables import print_flops, print_layers, print_recipe
    from cifarlab.data.sources import dataset_shape, training_images
    from cifarlab.recipe import load_recipe

    plan = load_recipe(recipe, set_ or [])
    name = dataset or plan.datasets[0]
    plan = plan.resolved(dataset=name, seed=plan.seed)
    shape = dataset_shape(name)
    console = make_console()
    print_recipe(console, recipe, plan)
    print_layers(console, plan, *shape)
    print_flops(console, plan, *shape, training_images(name, plan.data))


@app.command()
def test(
    run: Annotated[Path, typer.Argument(readable=False, help="A run folder.")],
    data: DataOption = None,
    tta: TtaOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Score a run's best checkpoint on the test set again. The look is counted in its test.json."""
    from cifarlab import distributed, machine

    machine.prepare()
    from cifarlab.cli.tables import print_scores
    from cifarlab.experiment import score_run
    from cifarlab.rundir import RunFolder

    own_device = distributed.join(device)
    shown = distributed.is_first()
    log = score_run(
        run,
        data_folder=data,
        device=own_device,
        report=say if shown else lambda _: None,
        override=_tta_override(tta),
    )
    if shown:
        print_scores(make_console(), log)
        _page(RunFolder(run))


class Format(StrEnum):
    table = "table"
    markdown = "markdown"
    csv = "csv"
    json = "json"


@app.command()
def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(readable=False, help="Run folders, or folders that hold some. [default: runs]"),
    ] = None,
    format_: Annotated[Format, typer.Option("--format", help="How to print the table.")] = Format.table,
) -> None:
    """Compare runs in one table per dataset; runs that differ only by seed fold into mean ± std (n)."""
    from cifarlab import compare as comparison
    from cifarlab.rundir import find_runs

    rows = comparison.compare(find_runs(runs or [RUNS]))
    if format_ is Format.table:
        from cifarlab.cli.tables import print_comparison

        print_comparison(make_console(), rows)
        return
    forms = {"markdown": comparison.to_markdown, "csv": comparison.to_csv, "json": comparison.to_json}
    sys.stdout.write(forms[format_.value](rows))


app.command()(models)
app.command()(report)


if __name__ == "__main__":
    main()
