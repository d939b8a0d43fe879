"""What a comparison is: one model shape, one corpus, one recipe, and the designs and seeds to train with them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crosslayer.data import DataConfig
from crosslayer.engine import SamplingParams
from crosslayer.errors import UserError
from crosslayer.train import Recipe, TrainConfig

DEFAULT = Path(__file__).with_name("default.yaml")


@dataclass(frozen=True)
class Sample:
    """A continuation of `prompt` to show at the end, by the model of one of the designs."""

    design: str
    prompt: str
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=80))

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("prompt must not be empty")
        if self.sampling.n != 1:
            raise UserError(f"sampling.n must be 1, got {self.sampling.n}: the report shows one continuation")


@dataclass(frozen=True)
class CompareConfig:
    """A comparison. Every design is applied to the shape in `model` and trained with the recipe in `train`, once for
    each seed; a seed stands for a data order and for initial weights, which designs share wherever they have the same
    matrices. `learning_rates` holds the rates of designs that are to have one of their own. `overrides` holds model
    settings of single designs, laid over `model`; with `design` among them, the entry of `designs` is a name of its
    own, so that one design can be compared with itself in another shape.

    A design that cannot be built is no error here: it is reported with the results of the others.

    Raises:
        UserError: no designs or seeds, the same one twice, a setting for a design that is not compared, or a model
            shape or training setting that cannot be.
    """

    model: dict[str, Any]
    designs: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    data: DataConfig = field(default_factory=DataConfig)
    train: Recipe = field(default_factory=Recipe)
    learning_rates: dict[str, float] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    sample: Sample | None = None

    def __post_init__(self) -> None:
        if not self.designs or not self.seeds:
            raise UserError("designs and seeds need at least one entry each")
        folders = [design_folder(design).casefold() for design in self.designs]
        for position, folder in enumerate(folders):
            if (first := folders.index(folder)) != position:
                both = f"{self.designs[first]!r} and {self.designs[position]!r}"
                raise UserError(f"designs {both} would be kept in the same folder; spell one of them otherwise")
        for seed in self.seeds:
            if seed < 0 or self.seeds.count(seed) > 1:
                raise UserError(f"seeds must be different whole numbers from 0 up, got {list(self.seeds)}")
        named = {f"learning_rates.{design}": design for design in self.learning_rates}
        named |= {f"overrides.{design}": design for design in self.overrides}
        if self.sample:
            named["sample.design"] = self.sample.design
        for key, design in named.items():
            if design not in self.designs:
                raise UserError(f"{key}: {design!r} is not compared; designs: {', '.join(self.designs)}")
        if "design" in self.model:
            raise UserError("model.design is not used in a comparison; list the designs under designs")
        if self.train.seed:
            raise UserError("train.seed is not used in a comparison; list the seeds under seeds")
        TrainConfig(self.model, self.data, self.train)
        for design in self.learning_rates:
            self._recipe(design, self.seeds[0])
        for design, changes in self.overrides.items():
            shape = {key: value for key, value in changes.items() if key != "design"}
            try:
                TrainConfig({**self.model, **shape}, self.data, self.train)
            except UserError as error:
                raise UserError(f"overrides.{design}: {error}") from None

    def _recipe(self, design: str, seed: int) -> Recipe:
        rate = self.learning_rates.get(design, self.train.learning_rate)
        return replace(self.train, learning_rate=rate, seed=seed)

    def training(self, design: str, seed: int) -> TrainConfig:
        """The training run of one design with one seed.

        Raises:
            UserError: the design cannot be applied to the shape.
        """
        model = {**self.model, "design": design, **self.overrides.get(design, {})}
        return TrainConfig(model, self.data, self._recipe(design, seed))


def design_folder(design: str) -> str:
    """The design's string with every character that a folder's name should not have replaced."""
    return re.sub(r"[^\w.,=@+-]", "_", design)
