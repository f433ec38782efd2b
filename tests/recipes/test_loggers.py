"""Loggers, against services that are stood in for: what they get, also of a run that was killed and resumed."""

import contextlib
import json
import sys
import tomllib
import types
from pathlib import Path

import pytest

from jpeft.errors import UserError
from jpeft.recipes.loggers import LOGGERS, Loggers, check_loggers, open_loggers

CONFIG = {"lr": 1e-3, "targets": None}


class Service:
    """Stands in for a package: runs by identity, each with all that was logged to it, in order."""

    def __init__(self, name, knows_its_step=False):
        self.runs, self.given, self.module = {}, [], types.ModuleType(name)
        self.knows_its_step, self.loses = knows_its_step, 0
        self.module.init = self.init
        self.module.Settings = dict

    def init(self, **given):
        print("a service greets on stdout")
        self.given.append(given)
        rows = self.runs.setdefault(given.get("id") or given["name"], [])
        del rows[len(rows) - self.loses :]  # what had not been sent when the process was killed
        resumed = self.knows_its_step and bool(rows)
        last = max((step for step, _ in rows), default=-1)
        return types.SimpleNamespace(
            log=lambda metrics, step: rows.append((step, metrics)),
            finish=lambda: print("a service says goodbye"), resumed=resumed, step=last + 1,
            **({"_next_step": last + 1} if self.knows_its_step else {}),
        )  # fmt: skip


@pytest.fixture
def services(monkeypatch):
    found = {"wandb": Service("wandb"), "trackio": Service("trackio")}
    for name, service in found.items():
        monkeypatch.setitem(sys.modules, name, service.module)
    return found


def lines_of(steps):
    for step in steps:
        yield {"step": step, "loss": 1.0 / step, "lr": 0.1, "compiled": True, "note": "text"}
        if step % 2 == 0:
            yield {"step": step, "eval_loss": 2.0 / step, "perplexity": None}


def log(loggers, lines):
    for line in lines:
        loggers.log({name: value for name, value in line.items() if name != "step"}, line["step"])


def wanted(steps):
    kept = ("loss", "lr", "eval_loss")
    return [(x["step"], {k: v for k, v in x.items() if k in kept}) for x in lines_of(steps)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_with_the_same_remote_run_and_repeats_no_step(services, name, tmp_path):
    service, run = services[name], tmp_path / "first"
    run.mkdir()
    loggers = open_loggers([name], run, CONFIG, first_step=1)
    log(loggers, sent := list(lines_of(range(1, 8))))  # killed here: nothing is closed
    loggers = open_loggers([name], run, CONFIG, first_step=5, sent=sent)  # the last checkpoint was of step 4
    log(loggers, lines_of(range(5, 11)))
    loggers.close()
    assert list(service.runs.values()) == [wanted(range(1, 11))]
    first, second = service.given
    assert first["config"] == CONFIG and first["project"] == "jpeft" and "first" in first["name"]
    assert {k: v for k, v in first.items() if k != "settings"} == {k: v for k, v in second.items() if k != "settings"}
    (identity,) = json.loads((run / "loggers.json").read_text()).values()
    assert identity in (first.get("id"), first["name"].removeprefix("first-"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_knows_its_last_step_gets_what_was_lost_too(services, name, tmp_path):
    services[name].knows_its_step = True
    log(open_loggers([name], tmp_path, CONFIG, first_step=1), sent := list(lines_of(range(1, 8))))
    services[name].loses = 1  # step 7 was not sent
    log(open_loggers([name], tmp_path, CONFIG, first_step=5, sent=sent), lines_of(range(5, 9)))
    assert list(services[name].runs.values()) == [wanted(range(1, 9))]


def test_a_logger_that_joins_a_resumed_run_gets_every_step_from_there(services, tmp_path):
    sent = list(lines_of(range(1, 8)))
    log(open_loggers(["trackio"], tmp_path, CONFIG, first_step=5, sent=sent), lines_of(range(5, 9)))
    assert list(services["trackio"].runs.values()) == [wanted(range(5, 9))]


def test_two_runs_are_two_at_a_service_also_of_one_name(services, tmp_path):
    for parent in "ab":
        (tmp_path / parent / "run").mkdir(parents=True)
        with contextlib.closing(open_loggers(["wandb", "trackio"], tmp_path / parent / "run", CONFIG, 1)) as loggers:
            log(loggers, lines_of([1]))
    assert [len(service.runs) for service in services.values()] == [2, 2]


def test_several_at_once_and_stdout_stays_clean(services, tmp_path, capsys):
    with contextlib.closing(open_loggers(["wandb", "trackio", "tensorboard", "wandb"], tmp_path, CONFIG, 1)) as loggers:
        log(loggers, lines_of(range(1, 4)))
    assert [list(s.runs.values()) for s in services.values()] == [[wanted(range(1, 4))]] * 2
    assert len(services["wandb"].given) == 1 and list((tmp_path / "tensorboard").iterdir())
    streams = capsys.readouterr()
    assert streams.out == "" and "greets" in streams.err and "goodbye" in streams.err


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOGGERS)
def test_one_that_is_not_installed_names_the_command(name, monkeypatch, tmp_path):
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        check_loggers([name])
    assert str(caught.value) == f'`log` {name} needs {package}: pip install "jpeft[{name}]"'


def test_one_that_does_not_exist_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"`log` wand: no such logger; nearest: wandb; choose from tensorboard, wandb,"):
        check_loggers(["tensorboard", "wand"])


def test_one_that_does_not_start_is_one_line_and_closes_the_others(services, tmp_path):
    def no_login(**_):
        raise RuntimeError("No API key configured.\n  Use `wandb login` to log in.")

    services["wandb"].module.init = no_login
    closed = []
    services["trackio"].module.init = lambda **_: types.SimpleNamespace(finish=lambda: closed.append(1))
    with pytest.raises(UserError) as caught:
        open_loggers(["trackio", "wandb"], tmp_path, CONFIG, 1)
    assert str(caught.value) == (
        "`log` wandb does not start: No API key configured. Use `wandb login` to log in; log in, or set "
        f"WANDB_MODE=offline, and continue with: jpeft finetune --out {tmp_path} --resume"
    )
    assert closed == [1]
    assert "wandb" not in json.loads((tmp_path / "loggers.json").read_text()), "the next attempt is the first"


class Broken:
    def __init__(self, fails):
        self.fails, self.got = fails, []

    def log(self, metrics, step):
        self.got.append(step)
        if self.fails == "log" and step == 2:
            raise ConnectionError("the disk of the service is full")

    def close(self):
        if self.fails == "close":
            raise ConnectionError("no route")


def test_one_that_fails_in_training_is_left_out_with_one_warning():
    broken, other = Broken("log"), Broken("")
    loggers = Loggers({"wandb": broken, "trackio": other})
    loggers.log({"loss": 1.0}, 1)
    with pytest.warns(UserWarning, match=r"`log` wandb failed at step 2, .*metrics.jsonl has everything: the disk"):
        loggers.log({"loss": 1.0}, 2)
    loggers.log({"loss": 1.0}, 3)  # warnings are errors here
    loggers.close()
    assert broken.got == [1, 2] and other.got == [1, 2, 3]


def test_one_that_cannot_be_closed_does_not_end_the_run():
    loggers = Loggers({"wandb": Broken("close"), "trackio": Broken("")})
    with pytest.warns(UserWarning, match="`log` wandb failed when it was closed"):
        loggers.close()
    loggers.close()


def test_a_damaged_record_is_named(services, tmp_path):
    Path(tmp_path / "loggers.json").write_text("{")
    with pytest.raises(UserError, match=r"loggers.json"):
        open_loggers(["wandb"], tmp_path, CONFIG, 1)


def test_every_extra_is_there():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, (_, package, _) in LOGGERS.items():
        assert project["optional-dependencies"][name][0].startswith(package)
