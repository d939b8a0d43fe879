"""Where figures go: a file that survives a full disk, and Weights & Biases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crosslayer.data import PreparedData
from crosslayer.errors import UserError
from crosslayer.train.metrics import MetricsFile, MetricsWriter, read_metrics
from tests.limits import file_size_limit
from tests.train.runs import metrics, run


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, 0)
    file.write(1, {"loss": 1.5})
    with file_size_limit(70):
        file.write(2, {"loss": 1.5})
        for step in range(3, 6):
            with pytest.warns(UserWarning, match=r"metrics\.jsonl cannot be written: File too large"):
                file.write(step, {"loss": 1.5})
    assert all(line.keys() == {"step", "loss"} for line in read_metrics(tmp_path))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    file.write(6, {"loss": 2.5})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 6


def test_lines_wait_while_the_folder_is_elsewhere(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    writer = MetricsWriter(here, {"train": {"tensorboard": False, "wandb": None}}, step=0, num_lines=0)
    writer.write(1, loss=1.5)
    here.rename(elsewhere)
    for act in (lambda: writer.write(2, loss=2.5), writer.flush):
        with pytest.warns(UserWarning, match=rf"{here}/metrics\.jsonl cannot be written: No such file"):
            act()
    elsewhere.rename(here)
    writer.write(3, loss=3.5)
    writer.flush()
    assert [line["loss"] for line in read_metrics(here)] == [1.5, 2.5, 3.5]


@pytest.mark.parametrize("rest", [b'{"step": 2, "lo', b'{"step": 2, "\xc3', b"\0" * 64, b"\xff\n"])
def test_a_line_that_was_not_finished_is_left_out(rest: bytes, tmp_path: Path) -> None:
    MetricsFile(tmp_path, 0).write(1, {"loss": 1.5})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(rest)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.5}]
    MetricsFile(tmp_path, 1).write(2, {"loss": 2.5})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


class FakeWandb(SimpleNamespace):
    """Remembers what a run was told, as the real thing keeps it: by id, a step once."""

    def __init__(self) -> None:
        super().__init__()
        self.inits: list[dict[str, Any]] = []
        self.logged: dict[str, dict[int, dict[str, float]]] = {}
        self.finished = 0

    def init(self, **settings: Any) -> Any:
        self.inits.append(settings)
        steps = self.logged.setdefault(settings["id"], {})

        def log(values: dict[str, float], step: int) -> None:
            if step >= max(steps, default=0):
                steps.setdefault(step, {}).update(values)

        def finish() -> None:
            self.finished += 1

        return SimpleNamespace(log=log, finish=finish)


def test_weights_and_biases(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    result = run(data, tmp_path / "a", wandb="study", eval_every=4)
    (told,) = wandb.inits
    assert (told["project"], told["resume"], told["name"], told["dir"]) == ("study", "allow", "a", str(tmp_path / "a"))
    assert told["config"]["train"]["learning_rate"] == 1e-2
    assert told["config"]["model"]["design"] == "MQA-CLA2"
    (steps,) = wandb.logged.values()
    assert sorted(steps) == [4, 8, 10]
    for line in metrics(tmp_path / "a"):
        assert steps[line["step"]].items() >= {key: value for key, value in line.items() if key != "step"}.items()
    assert steps[10]["validation_loss"] == result["validation"]["loss"]
    assert wandb.finished == 1

    # Started again, it is the same run there; another folder is another run.
    (tmp_path / "a" / "result.json").unlink()
    run(data, tmp_path / "a", wandb="study", eval_every=4)
    run(data, tmp_path / "b", wandb="study")
    ids = [told["id"] for told in wandb.inits]
    assert ids[0] == ids[1] != ids[2]
    assert json.loads((tmp_path / "a" / "wandb.json").read_text()) == {"id": ids[0]}


def test_weights_and_biases_that_is_not_installed(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = r"train\.wandb is on, but Weights & Biases is not installed: pip install 'crosslayer\[wandb\]'"
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "out", wandb="study")
    assert not (tmp_path / "out").exists()
