"""What an experiment is: a frozen, validated object read from a small YAML file.

`load_recipe` reads a packaged recipe by name or a file by path, applies `--set` overrides, and validates everything
before any work starts. The resolved recipe is written into the run folder and can be run again from there.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from cifarlab import files
from cifarlab.errors import RecipeError, nearest
from cifarlab.recipe_base import Duration, Integer, Section, is_path, short, shown
from cifarlab.recipe_optimizer import Optimizer
from cifarlab.recipe_schedule import Schedule
from cifarlab.recipe_sections import Augment, Data, Evaluate, Loss, Model, Train

NAMED_DATASETS = ("cifar10", "cifar100", "digits")
FOLDER_PREFIX = "folder:"
# PyYAML takes seconds for 100 kB.
MAX_RECIPE_BYTES = 100_000
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", re.IGNORECASE)


def check_dataset_name(name: str) -> str:
    """Return `name` if it is a dataset's name or `folder:PATH`; raise RecipeError otherwise."""
    if not is_path(name):
        raise RecipeError(f"dataset {shown(name)} has a character that no path can have")
    if name in NAMED_DATASETS or (name.startswith(FOLDER_PREFIX) and len(name) > len(FOLDER_PREFIX)):
        return name
    if name.startswith(FOLDER_PREFIX):
        raise RecipeError("dataset 'folder:' names no path; write folder:PATH, the folder with one folder per class")
    raise RecipeError(
        f"unknown dataset '{short(name)}'; {nearest(short(name), NAMED_DATASETS)} (or folder:PATH for your own images)"
    )


class Recipe(Section):
    """An experiment. `datasets` are the ones it runs on without `--dataset`."""

    name: str = Field(min_length=1, max_length=100)
    datasets: tuple[str, ...] = Field(min_length=1)
    seed: Integer = Field(0, ge=0, lt=2**31)
    data: Data = Data()
    augment: Augment = Augment()
    model: Model
    loss: Loss = Loss()
    optimizer: Optimizer
    schedule: Schedule
    train: Train
    evaluate: Evaluate = Evaluate()

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise ValueError("must be letters, digits and . _ + -, beginning with a letter or digit: it names a folder")
        if _RESERVED.fullmatch(name):
            raise ValueError(
                "names that Windows keeps for devices (con, nul, com1 …) or that end in a dot name no folder"
            )
        return name

    @field_validator("datasets")
    @classmethod
    def _datasets_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                check_dataset_name(name)
            except RecipeError as error:
                raise ValueError(str(error)) from None
        return names

    @model_validator(mode="after")
    def _durations_can_be_kept(self) -> Self:
        if self.schedule.warmup is not None and self.schedule.warmup.minutes is not None:
            raise ValueError("schedule.warmup: minutes need a time budget; give epochs, steps or share")
        for name in ("freeze_backbone", "whitening_bias"):
            duration = getattr(self.model, name)
            if duration is not None and duration.minutes is not None:
                raise ValueError(f"model.{name}: minutes need a time budget; give epochs, steps or share")
        every = self.train.checkpoint_every
        if every is not None and not any(every.model_dump().values()):
            raise ValueError("train.checkpoint_every: expected more than 0; null keeps no checkpoints")
        return self

    @model_validator(mode="after")
    def _plateau_has_something_to_read(self) -> Self:
        if self.schedule.name == "plateau" and self.data.validation == 0:
            raise ValueError(
                "schedule.name 'plateau' reads the validation loss, and data.validation is 0; set one apart"
            )
        return self

    @model_validator(mode="after")
    def _what_reads_validation_has_some(self) -> Self:
        if self.data.validation == 0:
            for field, asked in (
                ("train.early_stopping", self.train.early_stopping is not None),
                ("evaluate.tta 'auto'", self.evaluate.tta == "auto"),
            ):
                if asked:
                    raise ValueError(f"{field} goes by validation accuracy, and data.validation is 0; set some apart")
        return self

    @model_validator(mode="after")
    def _augmented_views_differ(self) -> Self:
        if isinstance(self.evaluate.tta, int) and not self.augment.random:
            raise ValueError(
                f"evaluate.tta {self.evaluate.tta} averages augmented views, and the recipe has no augmentation; "
                "give it some, such as augment.flip: random, or set evaluate.tta to flip or crops"
            )
        return self

    @model_validator(mode="after")
    def _cached_features_are_not_mixed(self) -> Self:
        if self.caches and (self.loss.mixup or self.loss.cutmix):
            raise ValueError(
                "loss.mixup and loss.cutmix blend images, and model.cache keeps what frozen stages made of one image: "
                "set model.cache to null, or mixup and cutmix to 0"
            )
        return self

    def resolved(self, *, dataset: str, seed: int) -> Recipe:
        """The recipe of one run: one dataset, one seed, folders and files by absolute paths. Raises RecipeError."""
        check_dataset_name(dataset)
        if dataset.startswith(FOLDER_PREFIX):
            dataset = FOLDER_PREFIX + str(files.expand(dataset.removeprefix(FOLDER_PREFIX)).absolute())
        values = {**self.to_dict(), "datasets": [dataset], "seed": seed}
        if isinstance(self.model.pretrained, str):
            values["model"] |= {"pretrained": str(files.expand(self.model.pretrained).absolute())}
        return make_recipe(values, origin=f"recipe {self.name}")

    @property
    def evaluation_side(self) -> int | None:
        """The side of images in evaluation; None: as they are."""
        return self.evaluate.resolution or self.train.last_resolution

    @property
    def sides(self) -> tuple[int | None, ...]:
        """The sides that the network sees, in training and evaluation, each once; None: images as they are."""
        return tuple(dict.fromkeys([*(side for _, side in self.train.resolutions), self.evaluation_side]))

    @property
    def largest_side(self) -> int | None:
        """The side that images need to be stored at; None: as they are."""
        return max((side for side in self.sides if side is not None), default=None)

    @property
    def caches(self) -> bool:
        """Whether what frozen stages compute is kept: there are some, and images come again as they were."""
        return self.model.freeze_stages > 0 and self.model.cache is not None and self.augment.cycle is not None

    def with_train(self, **values: Any) -> Recipe:
        """The recipe with other values in `train`, which are not checked."""
        return self.model_copy(update={"train": self.train.model_copy(update=values)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values (JSON types), in the order of the fields."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe as a file that `load_recipe` accepts."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)

    def fingerprint(self) -> str:
        """SHA-256 of the fields that decide the result, apart from the seed: runs that share it are repetitions."""
        return fingerprint(self.to_dict())


# How a run is named, stored and carried out; the result is the same whatever they are.
_UNDECISIVE = frozenset(
    {
        "name", "datasets", "seed", "data.memory", "data.workers", "model.cache_memory", "train.checkpoint_every",
        "train.keep", "evaluate.test", "evaluate.batch_size",
    }
)  # fmt: skip


def fingerprint(values: Mapping[str, Any]) -> str:
    """`Recipe.fingerprint` from a recipe's plain values (a run folder's recipe.yaml, read without validation).

    A field that is not there counts as its default, so that a recipe keeps its fingerprint when fields are added.
    """
    fields = flatten(_defaults(values)) | flatten(values)
    kept = {
        key: value
        for key, value in fields.items()
        if not any(key == field or key.startswith(f"{field}.") for field in _UNDECISIVE)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every field that has one, for the optimizer and the schedule that `values` names."""
    defaults: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if name in _CHOICES:
            chosen = values.get(name)
            section = _CHOICES[name].get(str(chosen.get("name")) if isinstance(chosen, Mapping) else "")
        if isinstance(section, type) and issubclass(section, BaseModel):
            given = {
                key: inner.get_default(call_default_factory=True)
                for key, inner in section.model_fields.items()
                if not inner.is_required()
            }
            defaults[name] = json.loads(json.dumps(given, default=BaseModel.model_dump))
    return defaults


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"epochs": 2}}` as `{"train.epochs": 2}`, the way `--set` names fields."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --- where recipes come from ------------------------------------------------------------------


def recipe_names() -> list[str]:
    """The packaged recipes, by name."""
    files = importlib.resources.files("cifarlab.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The packaged recipe's file, with its opening comment (source, expected accuracy, cost, command)."""
    return importlib.resources.files("cifarlab.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a packaged recipe by name, or a YAML file by path, and apply `KEY=VALUE` overrides.

    Raises RecipeError with one sentence that names the field, the line or the file.
    """
    if source in recipe_names():
        text, origin = recipe_text(source), f"recipe {source}"
    elif source.endswith((".yaml", ".yml")) or "/" in source:
        path = Path(source)
        origin = str(path)
        try:
            if files.regular_size(path) > MAX_RECIPE_BYTES:
                raise RecipeError(f"{path} is larger than {MAX_RECIPE_BYTES:,} bytes; a recipe is a small YAML file")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise RecipeError(f"{path} is not a UTF-8 text file; a recipe is a small YAML file") from None
    else:
        raise RecipeError(f"unknown recipe '{source}'; {nearest(source, recipe_names())} (or give a .yaml file)")
    return make_recipe(parse_yaml(text, origin), overrides, origin)


def make_recipe(values: Any, overrides: Sequence[str] = (), origin: str = "recipe") -> Recipe:
    """Validate plain values with overrides applied. Raises RecipeError."""
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: expected sections such as 'model:' and 'train:', found {shown(values)}")
    for override in overrides:
        values = _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {_sentence(error)}") from None


# --- YAML ---------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with four changes.

    `1e-3` is a number, a key may stand once, there are no aliases, and integers have 64 bits: Python prints no longer
    ones than of 4,300 digits, and takes its time for those.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not used in recipes", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{short(key_node.value)}' stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # 64 binary digits, a sign and 0b.
        if len(node.value) <= 67 and -(2**63) <= (value := super().construct_yaml_int(node)) < 2**63:
            return value
        raise yaml.constructor.ConstructorError(None, None, "an integer of more than 64 bits", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


# YAML 1.1 asks for a dot in a float with an exponent; people write 1e-3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Dumper(yaml.SafeDumper):
    pass


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    # repr, with a dot: other YAML readers take `1e-05` for text.
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)


def parse_yaml(text: str, origin: str) -> Any:
    """Read one YAML document. Raises RecipeError that names the line."""
    if len(text) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{origin}: more than {MAX_RECIPE_BYTES:,} characters; a recipe is a small YAML file")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise RecipeError(f"{origin}:{where} not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's own for a tag on what it isn't for: `!!bool maybe`, `!!timestamp x`.
        raise RecipeError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{origin}: nested too deeply for a recipe") from None


# --- overrides ----------------------------------------------------------------------------------

_DURATION_KEYS = frozenset(Duration.model_fields)


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    path = key.split(".")
    if not equals or not all(path):
        raise RecipeError(f"--set {override}: expected KEY=VALUE, for example --set train.epochs=2")
    return _assign(values, path, parse_yaml(text, f"--set {key}"), key)


def _assign(values: dict[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        if head == "name" and key != "name":
            values = _without_foreign_fields(key.removesuffix(".name"), values, value)
        return {**values, head: value}
    inner = values.get(head)
    if inner is None or (key.startswith("train.numerics.") and inner in ("auto", "exact")):
        inner = {}
    if not isinstance(inner, dict):
        raise RecipeError(f"--set {key}: '{head}' is {shown(inner)}, which has no field '{rest[0]}'")
    # A duration has one unit: setting another replaces it.
    if len(rest) == 1 and rest[0] in _DURATION_KEYS and inner.keys() <= _DURATION_KEYS:
        inner = {}
    return {**values, head: _assign(inner, rest, value, key)}


def _without_foreign_fields(section: str, values: dict[str, Any], name: Any) -> dict[str, Any]:
    """What stays of a section when its `name` changes: `optimizer.name=sgd` keeps lr and drops Adam's betas."""
    choices = _CHOICES.get(section, {})
    if not isinstance(name, str) or name not in choices:
        return values
    return {key: value for key, value in values.items() if key in choices[name].model_fields}


def _choices(annotation: Any) -> dict[str, type[BaseModel]]:
    union = annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation
    return {model.model_fields["name"].default: model for model in union.__args__}


_CHOICES = {"optimizer": _choices(Optimizer), "schedule": _choices(Schedule)}


# --- sentences ----------------------------------------------------------------------------------


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, in words: the field, what was expected, what was found."""
    # An unknown key is the likeliest cause of whatever else is reported.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    steps = [short(str(step)) for step in problem["loc"]]
    choice = None
    if len(steps) > 1 and steps[0] in _CHOICES and steps[1] in _CHOICES[steps[0]]:
        choice = steps.pop(1)  # pydantic puts the tag of a union into the path, and the type of a number
    if len(steps) > 2 and (steps[-1] == "float" or steps[-1].endswith("int]")):
        steps.pop()
    field = ".".join(steps)
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        owner = steps[-2] if len(steps) > 1 else "a recipe"
        known = _fields_of(steps[:-1], choice)
        return f"unknown key '{field}'; {choice or owner} has no '{steps[-1]}': {nearest(steps[-1], known)}"
    if kind == "union_tag_invalid":
        tag = short(problem["ctx"]["tag"])
        return f"unknown {field} '{tag}'; {nearest(tag, _CHOICES[steps[0]])}"
    if kind == "union_tag_not_found":
        return f"'{field}.name' is missing; choose from {', '.join(sorted(_CHOICES[steps[0]]))}"
    if kind == "missing":
        return f"'{field}' is missing"
    if kind == "literal_error":
        return f"{field}: expected {problem['ctx']['expected']}, not {shown(found)}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if kind == "value_error" and not field:
        return message
    where = f"{field}: " if field else ""
    return f"{where}{message[:1].lower() + message[1:]}" + ("" if kind == "value_error" else f", not {shown(found)}")


def _fields_of(path: list[str], choice: str | None) -> Iterable[str]:
    if not path:
        return Recipe.model_fields
    if len(path) > 1:
        return Duration.model_fields  # the only thing that is nested this deep
    if choice is not None:
        return _CHOICES[path[0]][choice].model_fields
    return getattr(Recipe.model_fields[path[0]].annotation, "model_fields", {})
