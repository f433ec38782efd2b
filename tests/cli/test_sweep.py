"""`jpeft finetune --sweep`: the best combination equals its own run, and a killed sweep goes on as if it was not."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jpeft.cli import main
from jpeft.errors import UserError
from jpeft.recipes import finetune, run_folder, sweep
from jpeft.recipes.config import Config, Interrupted
from tests.cli.runs import failure, trained

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiles_of_module")

RUN = ["--model", "bert", "--data", "train.csv", "--eval", "test.jsonl", "--epochs", "2", "--batch-size", "8",
       "--max-length", "24", "--checkpoint-every", "3"]  # fmt: skip
GRID = ["--sweep", "lr=1e-3,3e-2,1e-2", "rank=2,4", "--halving", "2"]


@pytest.fixture(scope="module")
def finished_sweep(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    with contextlib.chdir(home):
        assert main(["finetune", "--out", str(out), *RUN, *GRID]) == 0
    return out


def test_the_best_combination_is_kept_and_equals_its_own_run(finished_sweep, capsys):
    result = run_folder.read_result(finished_sweep)
    rows = result["sweep"]["combinations"]
    assert len(rows) == 6 and sorted(row["steps"] for row in rows) == [7, 7, 7, 13, 20, 20]  # 6, then 3, then 2
    (kept,) = [row for row in rows if row["kept"]]
    assert kept["eval_loss"] == min(row["eval_loss"] for row in rows if row["steps"] == 20) == result["loss_after"]
    assert result["config"]["lr"] == kept["lr"] and result["config"]["rank"] == kept["rank"]
    assert (finished_sweep / "sweep.png").stat().st_size > 10_000
    lr, rank = str(kept["lr"]), str(kept["rank"])
    assert main(["finetune", "--out", "alone", *RUN, "--lr", lr, "--rank", rank]) == 0
    alone = run_folder.read_result(Path("alone"))
    assert alone["loss_after"] == pytest.approx(result["loss_after"], rel=1e-3)
    own, other = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (finished_sweep, Path("alone")))
    assert own.keys() == other.keys()
    for name, leaf in own.items():
        np.testing.assert_allclose(leaf, other[name], atol=2e-3, err_msg=name)  # Adam, after 20 steps
    capsys.readouterr()
    assert main(["predict", str(finished_sweep), "--text-arg", "good tea"]) == 0
    assert "up" in capsys.readouterr().out


def test_the_table_and_json_list_all_combinations(finished_sweep, capsys):
    assert main(["finetune", "--out", str(finished_sweep), "--resume", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert len(out["sweep"]["combinations"]) == 6 and out["sweep"]["halving"] == 2
    assert main(["finetune", "--out", str(finished_sweep), "--resume"]) == 0
    shown = capsys.readouterr().out
    assert f"{out['sweep']['kept']}" in shown and "kept" in shown and "after 7 steps" in shown


class _Kill:
    """A reporter that interrupts a run within a step."""

    def __init__(self, step):
        self.step = step

    def say(self, text):
        pass

    def progress(self, done, total, loss, tokens_per_second):
        if done == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "saved"), [(15, 13), pytest.param(6, 3, marks=pytest.mark.exhaustive)])
def test_a_killed_sweep_goes_on_as_if_it_was_not(finished_sweep, step, saved, capsys):
    config = Config(
        model="bert", data="train.csv", eval="test.jsonl", epochs=2, batch_size=8, max_length=24, checkpoint_every=3
    )
    grid = {"lr": (1e-3, 3e-2, 1e-2), "rank": (2, 4)}
    with pytest.raises(Interrupted):
        sweep.sweep(config, grid, 2, "killed", _Kill(step))
    assert run_folder.saved_steps(Path("killed"))[-1] == saved
    assert "the sweep is not finished; continue it with" in failure(capsys, "predict", "killed", "--text-arg", "good")
    with pytest.raises(UserError, match="a sweep; continue it with"):
        finetune.resume("killed", {})
    assert main(["finetune", "--out", "killed", "--resume"]) == 0
    assert trained("killed") == trained(finished_sweep)


def test_bad_sweeps_are_told_before_a_model_is_read(capsys):
    start = ["finetune", "--out", "new", *RUN]
    refused = {
        "expected NAME=VALUE,VALUE with one of method, rank": ["--sweep", "epochs=1,2"],
        "lr must be a positive number, got 'high'": ["--sweep", "lr=1e-3,high"],
        "--sweep lr=-1.0: lr must be a positive number, got -1.0": ["--sweep", "lr=1e-3,-1"],
        "--sweep lr=nan: lr must be a positive number, got nan": ["--sweep", "lr=1e-3,nan"],
        "--sweep rank=-1: LoRA.rank must be a positive integer": ["--sweep", "rank=2,-1", "--model", "none"],
        "--sweep method=ia3 rank=2: method ia3 has no field 'rank'": ["--sweep", "method=lora,ia3", "rank=2,4"],
        "needs two combinations or more": ["--sweep", "lr=1e-3"],
        "a value is given twice": ["--sweep", "lr=1e-3,1e-3"],
        "lr is given twice": ["--sweep", "lr=1e-3,1e-2", "--sweep", "lr=1,2"],
        "--rank 4 contradicts --sweep": ["--rank", "4", "--sweep", "rank=2,4"],
        "--halving 1 has no meaning without --sweep": ["--halving", "1"],
        "--keep best: a sweep keeps the best combination": ["--sweep", "rank=2,4", "--keep", "best"],
        "2 combinations are one after fewer halvings": ["--sweep", "rank=2,4", "--halving", "2"],
        "--sweep trains in one process": ["--sweep", "rank=2,4", "--distributed"],
        "begin from fresh adapters": ["--sweep", "lr=1e-3,1e-2", "--adapter", "bert"],
    }
    for message, words in refused.items():
        error = failure(capsys, *start, *words)
        assert message in error, error
        assert not Path("new").exists()


def test_a_sweep_that_cannot_be_leaves_no_folder(capsys):
    words = ["--sweep", "rank=2,4", "--set", "init_weights=eva"]
    assert "start depends on data" in failure(capsys, "finetune", "--out", "new", *RUN, *words)
    assert not Path("new").exists()


def test_a_sweep_of_methods_has_a_program_for_each(capsys):
    words = ["--steps", "3", "--sweep", "method=lora,ia3", "lr=1e-2,3e-2"]
    assert main(["finetune", "--out", "methods", *RUN, *words]) == 0
    rows = run_folder.read_result(Path("methods"))["sweep"]["combinations"]
    assert [row["method"] for row in rows] == ["lora", "lora", "ia3", "ia3"]
    error = failure(capsys, "finetune", "--out", "methods", "--resume", "--weight-decay", "0.1")
    assert "--weight-decay 0.1 is not the sweep's" in error


def test_a_plan_lists_its_combinations_and_marks():
    plan = sweep.Plan(Config(), {"method": ("lora", "dora"), "seed": (0, 1, 2)}, halving=2)
    assert plan.labels[4] == "method=dora seed=1" and plan.configs[4].method == "dora"
    assert plan.marks(9) == [3, 6]
