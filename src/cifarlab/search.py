"""A search: arms whose values Optuna draws, by what came of those before, and gives up where there is little hope.

Optuna only says what to try. What was tried is in the study's folder, and Optuna is told of it anew each time, so a
search goes on after an interruption, and with more trials, as any study does.
"""

from __future__ import annotations

import statistics
import threading
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from cifarlab.ablate import Conduct, Conductor, Report, Workers, wait_for
from cifarlab.errors import NotARunError, UsageError
from cifarlab.factors import arm_id, changes_in_words
from cifarlab.recipe import make_recipe
from cifarlab.study import ENDED, Arm, Factor, Run, Study, StudyFolder

if TYPE_CHECKING:
    import optuna

Pruning = Literal["median", "asha", "none"]


class Search(Conductor):
    """Carries a search out until it has so many trials. Each is an arm, with a run for each of the study's seeds.

    pruning: a trial's first run is given up where its validation accuracy after an epoch is below the median of the
    others' at that epoch (median), or not among the best third of those that came as far (asha: asynchronous successive
    halving, arXiv 1810.05934). Raises UsageError where Optuna isn't installed.
    """

    def __init__(
        self,
        folder: StudyFolder,
        study: Study,
        workers: Workers,
        conduct: Conduct,
        report: Report,
        *,
        trials: int,
        pruning: Pruning,
    ) -> None:
        super().__init__(folder, study, workers, conduct, report)
        self._trials = trials
        # Begun anew with the seed of the beginning, it would draw again what it drew then.
        self._optuna = _optuna_study(make_recipe(study.recipe).seed * 100_000 + len(study.arms), pruning)
        self._distributions = {_key(factor): _distribution(factor) for factor in study.factors}
        self._asking = threading.Lock()

    def _go_further(self) -> None:
        if self._over():
            return
        for arm in self.study.arms[1:]:
            self._tell_of(arm)
        with self._pool() as pool:
            wait_for([pool.submit(self._try_on) for _ in range(self.workers.slots)])

    def _try_on(self) -> None:
        """Try one thing after the other until there are enough."""
        while not self._over():
            with self._asking:
                if len(self.study.arms) > self._trials:
                    return
                trial = self._optuna.ask(self._distributions)
                runs = self._add(trial.params)
            accuracies = self._run_all(runs, trial)
            if accuracies is None:  # failed, or interrupted: the same command goes on with it
                self._optuna.tell(trial, state=_states().FAIL)
            elif len(accuracies) == len(runs):
                self._optuna.tell(trial, statistics.fmean(accuracies))
            else:
                self._optuna.tell(trial, state=_states().PRUNED)

    def _run_all(self, runs: list[Run], trial: optuna.Trial) -> list[float] | None:
        """The accuracies of a trial's runs; fewer, where the first was given up; None where one has not ended."""
        accuracies: list[float] = []
        for run in runs:
            found = self._carry_out(run, (lambda: self._hopeless(runs[0], trial)) if run is runs[0] else never)
            if found.status not in ENDED:
                return None
            if found.status == "pruned":
                break
            accuracies.append(found.val_accuracy or 0.0)  # of what diverged
        return accuracies

    def _add(self, params: dict[str, Any]) -> list[Run]:
        """The runs of a new arm, written down before they start."""
        changes = {
            field: value
            for factor in self.study.factors
            for field, value in zip(factor.fields, _values(factor, params[_key(factor)]), strict=True)
        }
        name = changes_in_words(changes)
        arm = Arm(id=arm_id(len(self.study.arms), name), name=name, changes=changes)
        runs = [Run(arm=arm.id, seed=seed) for seed in self.study.seeds]
        self._update(arms=[*self.study.arms, arm], runs=[*self.study.runs, *runs])
        self._write_recipes()
        return runs

    def _hopeless(self, run: Run, trial: optuna.Trial) -> bool:
        """Tell Optuna of a run's epochs so far, and ask whether it is worth going on with."""
        for epoch, accuracy in self._epochs(run):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of epochs that it knows
                trial.report(accuracy, epoch)
        return bool(trial.should_prune())

    def _epochs(self, run: Run) -> list[tuple[int, float]]:
        folder = self.folder.folder(run)
        if folder is not None:
            with suppress(NotARunError, KeyError, TypeError, ValueError):
                entries = folder.train_log()["epochs"]
                return [(int(entry["epoch"]), float(entry["val_accuracy"])) for entry in entries]
        return []

    def _tell_of(self, arm: Arm) -> None:
        """Tell Optuna of a trial of an earlier time."""
        from optuna.trial import create_trial

        runs = self.study.runs_of(arm)
        if any(run.status not in ENDED for run in runs):
            return
        params = {_key(factor): _param(factor, arm.changes) for factor in self.study.factors}
        pruned = any(run.status == "pruned" for run in runs)
        accuracies = [run.val_accuracy or 0.0 for run in runs]
        self._optuna.add_trial(
            create_trial(
                params=params,
                distributions=self._distributions,
                value=None if pruned else statistics.fmean(accuracies),
                state=_states().PRUNED if pruned else _states().COMPLETE,
                intermediate_values=dict(self._epochs(runs[0])),
            )
        )


def _states() -> Any:
    from optuna.trial import TrialState

    return TrialState


def never() -> bool:
    return False


def _optuna_study(seed: int, pruning: Pruning) -> optuna.Study:
    try:
        import optuna
    except ImportError:
        raise UsageError("--search: Optuna is not installed; pip install 'cifarlab[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners = {
        "median": optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
        "asha": optuna.pruners.SuccessiveHalvingPruner(reduction_factor=3),
        "none": optuna.pruners.NopPruner(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is called experimental
        # Others that run at the same time count as bad for the moment, so that two don't try the same.
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.create_study(direction="maximize", sampler=sampler, pruner=pruners[pruning])


def _key(factor: Factor) -> str:
    return ";".join(factor.fields)


def _distribution(factor: Factor) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if factor.low is None or factor.high is None:
        return CategoricalDistribution(range(len(factor.values)))  # by number: values may be lists
    if isinstance(factor.low, int) and isinstance(factor.high, int):
        return IntDistribution(factor.low, factor.high, log=True)
    return FloatDistribution(factor.low, factor.high, log=True)


def _values(factor: Factor, param: Any) -> list[Any]:
    if factor.values:
        return factor.values[int(param)]
    return [param]


def _param(factor: Factor, changes: dict[str, Any]) -> Any:
    """What Optuna calls the values that an arm has."""
    if factor.values:
        return factor.values.index([changes[field] for field in factor.fields])
    return changes[factor.fields[0]]
