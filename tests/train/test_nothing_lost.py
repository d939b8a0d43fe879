"""The command, in a process of its own: killed, asked to stop, short of disk; what it has done is never lost."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from crosslayer.train.metrics import read_metrics
from tests.train.runs import metrics, same_weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 80
# Wide layers, so that a checkpoint (38 MB) takes long enough to be interrupted.
CONFIG = """
model: {hidden_size: 64, intermediate_size: 4096, num_hidden_layers: 4, num_attention_heads: 2, design: MQA-CLA2}
data: {source: text, paths: [%s], vocab_size: 300, valid_fraction: 0.2}
train: {tokens: %d, sequence_length: 16, batch_size: 4, learning_rate: 1e-2, device: cpu, log_every: 3, eval_every: 7,
  eval_tokens: 50, checkpoint_every: 5}
"""


class Command:
    """`crosslayer train` (or another command) in a process; killed with the block, if it still runs."""

    def __init__(self, folder: Path, *arguments: str, shell: str = "") -> None:
        environment = {**os.environ, "CROSSLAYER_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "crosslayer", *arguments]
        if shell:  # runs before the command, in its process
            command = ["bash", "-c", f'{shell}; exec "$@"', "bash", *command]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def wait_for(self, what: Callable[[], bool]) -> bool:
        """Until `what()` is true; False if the command has ended before."""
        while not what():
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        return True

    def end(self, signum: int | None = None) -> tuple[int, str]:
        """Send a signal, and wait for the end: the status and what was written to stderr."""
        if signum is not None:
            self.process.send_signal(signum)
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, its text, and in whole/ a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("nothing-lost")
    (folder / "text").mkdir()
    for n in range(20):
        (folder / "text" / f"{n}.txt").write_text(f"{n} cats sat on {n + 1} mats and saw {n * n} mice. " * 20)
    (folder / "config.yaml").write_text(CONFIG % (folder / "text", STEPS * 64))
    assert train(folder, "whole").end()[0] == 0
    return folder


def train(folder: Path, out: str, *settings: str, shell: str = "") -> Command:
    return Command(folder, "train", str(folder / "config.yaml"), *settings, "--out", str(folder / out), shell=shell)


def assert_same(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert same_weights(one, other)


def scratch_folders(out: Path) -> list[Path]:
    """Of checkpoints that are being written, or were when the process was killed."""
    return list((out / "checkpoints").glob(".step-*"))


def test_killed_at_any_moment(folder: Path) -> None:
    """Five times in one run, three of them while a checkpoint is being written."""
    out, chance, cut_off = folder / "killed", random.Random(0), 0
    for number in range(5):
        started = time.time_ns()
        command = train(folder, "killed")

        def writing(started: int = started) -> bool:
            with suppress(FileNotFoundError):  # renamed just now
                return any(path.stat().st_mtime_ns > started for path in scratch_folders(out))
            return False

        if number % 2 == 0:
            assert command.wait_for(writing)
            time.sleep(chance.uniform(0, 0.03))
        else:
            lines = len(read_metrics(out)) + chance.randint(1, 3)
            assert command.wait_for(lambda lines=lines: len(read_metrics(out)) >= lines)
        command.process.kill()
        assert command.end()[0] == -signal.SIGKILL
        assert not (out / "result.json").exists()
        cut_off += any(scratch_folders(out))
    assert cut_off >= 2
    status, errors = train(folder, "killed").end()
    assert status == 0
    assert "damaged" not in errors  # what was cut off is not even seen
    assert not scratch_folders(out)
    assert_same(out, folder / "whole")


def test_sigterm_stops_with_a_checkpoint(folder: Path) -> None:
    out = folder / "stopped"
    command = train(folder, "stopped")
    assert command.wait_for(lambda: len(read_metrics(out)) > 1)
    status, errors = command.end(signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    last = errors.splitlines()[-1]
    told = re.fullmatch(
        rf"crosslayer train: stopped by SIGTERM at step (\d+) of {STEPS}; the same command goes on from step \1", last
    )
    assert told, errors
    assert max(path.name for path in (out / "checkpoints").iterdir()) == f"step-{int(told[1]):08d}"
    assert train(folder, "stopped").end()[0] == 0
    assert_same(out, folder / "whole")


def test_a_disk_without_room_for_checkpoints(folder: Path) -> None:
    """The limit lies between the size of the model, 13 MB, and that of a checkpoint."""
    out = folder / "full"
    status, errors = train(folder, "full", shell="ulimit -f 20000").end()
    assert status == 0
    warnings = [line for line in errors.splitlines() if "warning" in line]
    assert len(warnings) == STEPS // 5
    assert warnings[0].startswith("crosslayer train: warning: the checkpoint of step 5 could not be written to ")
    assert warnings[0].endswith("training goes on, there is none before it")
    assert "File too large" in warnings[0]
    assert json.loads((out / "result.json").read_text())["failed_checkpoints"] == STEPS // 5
    assert same_weights(out, folder / "whole")


def test_a_disk_without_room_for_the_model(folder: Path) -> None:
    """Training is kept in its last checkpoint, of which nothing is repeated once there is room."""
    out = folder / "full-at-last"
    shutil.copytree(folder / "whole", out)  # as it was after the last checkpoint, and a line more
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    status, errors = train(folder, "full-at-last", shell="ulimit -f 10000").end()
    assert status == 2
    assert errors.splitlines()[-1].startswith(f"crosslayer train: {out / 'model'} cannot be written: ")
    status, errors = train(folder, "full-at-last").end()
    assert status == 0
    assert "step " not in errors  # the first thing that it shows is held-out text
    assert_same(out, folder / "whole")
