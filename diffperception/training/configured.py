"""Runs of training that configurations describe."""

import difflib
import json
import pydoc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffperception.configuration.inheritance import given, spread_files
from diffperception.configuration.parser import Options, summary
from diffperception.models.base import trusting, weights_lie_in
from diffperception.training.folder import FILES
from diffperception.training.options import RunOptions
from diffperception.training.recipe import Recipe
from diffperception.training.run import Outcome, run

RECIPES = {
    "detection": "detection.DetectionRecipe",
    "generation": "generation.GenerationRecipe",
    "classifier": "noisy_classifier.NoisyClassifierRecipe",
    "segmentation": "segmentation.SegmentationRecipe",
    "baseline": "baseline.BaselineRecipe",
}
DESCRIPTION = """{summary}

Everything is written to one folder: {files}.

{example}
Ctrl-C ends the run after the step in hand and leaves a checkpoint, which --resume goes on from. To use several
processes or machines, start the command with `torchrun --nproc_per_node=N -m diffperception train ...`; the learning
rate follows the number of images per step."""


def train(config: str | Path | Sequence[str | Path], **overrides: Any) -> Outcome:
    """Train what configuration files describe.

    Args:
        config: a YAML file, or several, of which the later ones win.
        overrides: options to change, as nested dictionaries or, in a dictionary that is unpacked, by dotted names:
            `train(FILE, output="runs/mine", **{"data.batch_size": 4})`. Without an output nothing is written.

    Raises:
        ArgumentError, ValueError, OSError: as :func:`diffperception.training.run.run`; an option is unknown or wrong.
    """
    files = [config] if isinstance(config, str | Path) else config
    arguments = [part for file in files for part in ("--config", str(file))]
    return train_by_arguments([*arguments, *(part for item in overrides.items() for part in _as_arguments(*item))])


def train_by_arguments(arguments: Sequence[str], require_output: bool = False) -> Outcome:
    """Train what the arguments of a command line say.

    Args:
        require_output: whether an output folder must be named.
    """
    options = options_for(arguments)
    parsed = options.parse(arguments)
    if require_output and parsed.output is None:
        raise ValueError("give --output, the folder for everything that the run writes")
    with trusting(parsed.trust), weights_lie_in(parsed.weights):
        recipe, of_run = options.instantiate(parsed)
        return run(options.parts[0](**recipe), RunOptions(**of_run), options.settings(parsed))


def options_for(arguments: Sequence[str]) -> Options:
    """The options of the task that arguments, or their configuration files, name; detection by default."""
    task = given(spread_files(arguments), "task") or next(iter(RECIPES))
    recipe = find_recipe(task)
    files = ", ".join(f"{name} ({text})" for name, text in {**recipe.files, **FILES}.items())
    example = f"For example: `diffperception train {recipe.example} --output runs/mine`.\n" if recipe.example else ""
    description = DESCRIPTION.format(summary=summary(recipe), files=files, example=example)
    return Options("train", recipe, RunOptions, description=description, task=task)


def find_recipe(task: str) -> type[Recipe]:
    """The recipe of a task, or of a user's own by its import path; ValueError, naming the nearest, if there is none."""
    try:
        found = pydoc.locate(f"{__package__}.recipes.{RECIPES[task]}" if task in RECIPES else task)
    except pydoc.ErrorDuringImport as error:
        raise ValueError(f"the task {task} cannot be imported: {error.value}") from error
    if isinstance(found, type) and issubclass(found, Recipe):
        return found
    near = difflib.get_close_matches(task, RECIPES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"train knows {', '.join(RECIPES)}, and recipes by their import path"
    raise ValueError(f"there is no task {task!r}: {hint}")


def _as_arguments(name: str, value: Any) -> list[str]:
    """`--data.batch_size=4`; nested dictionaries as a configuration of their own."""
    if isinstance(value, Mapping):
        return ["--config", yaml.safe_dump({name: value})]
    return [f"--{name}={value if isinstance(value, str | Path) else json.dumps(value)}"]
