"""Is Lion worth it? Adam, AdamW and Lion on EfficientNet-Lite0: a grid, then fresh seeds of the best. For docs/lion.md.

    python studies/lion.py --data DIR --runs FOLDER --jobs 2

The grid (seed 0) is decided by validation accuracy, its test images left alone; what is far behind on CIFAR-10 is not
tried on CIFAR-100. The two best settings, the best of each optimizer, and Lion as the report had it run again with the
seeds 1, 2 and 3, which had no say in the choice; these are tested.
A run whose loss became NaN counts as 0 %. What is finished is not run again, so the study can be interrupted. About two
hours on two cores, with a job on each.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from study import Plan, Study, add_arguments, add_jobs, row, score

DATASETS = ("cifar10", "cifar100")
SEEDS = (1, 2, 3)
COMMON = (
    "data.limit=10000",
    "train.resolution=64",
    "augment.crop_padding=8",
    "train.epochs=4",
    "train.checkpoint_every=null",
)
# A setting that was so far behind the best of its optimizer on one dataset is not tried on the next.
FAR = 0.08


class Setting(NamedTuple):
    optimizer: str
    lr: float
    weight_decay: float

    def overrides(self) -> list[str]:
        return [f"optimizer.{name}={value}" for name, value in zip(("name", "lr", "weight_decay"), self, strict=True)]

    def __str__(self) -> str:
        return f"{self.optimizer} {self.lr:g} {self.weight_decay:g}"


REPORTED = Setting("lion", 1e-4, 1e-4)
GRID = (
    # Adam's decay is part of the gradient, and hardly matters at this size: EX-4's, with higher rates.
    *(Setting("adam", lr, 1e-4) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    # AdamW's and Lion's shrinks the weights by lr x decay a step.
    *(
        Setting("adamw", lr, decay)
        for lr, decay in ((3e-4, 1e-2), (1e-3, 1e-2), (1e-3, 1e-1), (3e-3, 1e-2), (1e-2, 1e-2), (3e-2, 1e-2))
    ),
    REPORTED,
    # From a third to a tenth of EX-4's rate, with as much more decay, and with AdamW's; then higher rates.
    *(
        Setting("lion", lr, decay)
        for lr, decay in (
            *((1e-5, 1e-3), (3e-5, 3e-4), (1e-5, 1e-1), (3e-5, 3e-2), (3e-5, 3e-1), (1e-4, 1e-1)),
            *((2e-4, 3e-2), (3e-4, 1e-2), (3e-4, 1e-1), (1e-3, 1e-2)),
        )
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "runs/lion")
    add_jobs(parser)
    arguments = parser.parse_args()
    study = Study(arguments.data, arguments.runs, arguments.jobs, arguments.device)
    settings = list(GRID)
    for dataset in DATASETS:
        settings = compare(dataset, settings, study)


def compare(dataset: str, settings: list[Setting], study: Study) -> list[Setting]:
    """The grid and the fresh seeds of one dataset, and their tables. Returns the settings that are not far behind."""

    def plan(setting: Setting, seed: int, test: bool) -> Plan:
        return Plan(str(setting), "ex4-lite0", dataset, seed, (*COMMON, *setting.overrides()), test)

    grid = dict(zip(settings, study.run_all([plan(one, 0, False) for one in settings]), strict=True))
    print(f"\n{dataset}, seed 0\n")
    for setting, folder in grid.items():
        print(row(str(setting), [folder]), flush=True)
    scores = {setting: score(grid[setting]) for setting in settings}
    ranked = sorted(settings, key=lambda setting: scores[setting], reverse=True)
    best_of_each = {setting.optimizer: setting for setting in reversed(ranked)}
    chosen = list(dict.fromkeys([*ranked[:2], *best_of_each.values(), REPORTED]))
    finals = study.run_all([plan(setting, seed, True) for setting in chosen for seed in SEEDS])
    print(f"\n{dataset}, seeds {SEEDS}\n")
    for number, setting in enumerate(chosen):
        print(row(str(setting), finals[number * len(SEEDS) : (number + 1) * len(SEEDS)]), flush=True)
    return [one for one in settings if one == REPORTED or scores[one] >= scores[best_of_each[one.optimizer]] - FAR]


if __name__ == "__main__":
    main()
