"""One dataclass of options makes the flags, the configuration files, the checks, the help and the reference page."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from cyclopts import App

from jpeft.checks import POSITIVE_INT
from jpeft.cli import main, reference
from jpeft.cli.app import COMMANDS, classes_of
from jpeft.cli.arguments import known_options, make_command, parse
from jpeft.cli.finetune import _with_file
from jpeft.errors import UserError
from jpeft.recipes.config import Config
from jpeft.recipes.config_file import read_config_file
from jpeft.recipes.options import TRAINING, option, options
from jpeft.recipes.prepare import build_method
from tests.cli.runs import failure, job, trained

pytestmark = pytest.mark.usefixtures("keep_compiled", "standard_promotion")


@dataclass(frozen=True)
class Longer(Config):
    """The configuration with one more field, stated once."""

    patience: int = option("evaluations without progress to wait for", TRAINING, 7, rule=POSITIVE_INT)


def test_a_field_that_is_stated_once_is_everywhere(tmp_path, capsys):
    known = known_options([Longer])
    app = App(name="jpeft", result_action="return_value")
    make_command(app, "finetune", "Fine-tune.", [Longer])
    assert parse(app, ["finetune", "--patience", "3"], known) == {"patience": 3}

    (tmp_path / "run.yaml").write_text("patience: 3")
    assert read_config_file(tmp_path / "run.yaml", known) == {"patience": 3}
    (tmp_path / "run.yaml").write_text("patienc: 3")
    with pytest.raises(UserError, match=r"run.yaml: unknown key 'patienc'; did you mean 'patience'\?"):
        read_config_file(tmp_path / "run.yaml", known)

    with pytest.raises(UserError, match="`patience` must be a positive integer, got 0"):
        Longer(patience=0)
    assert Longer().patience == 7

    app(["finetune", "--help"])
    assert "--patience INT" in capsys.readouterr().out
    row = "| `patience` | integer | 7 | evaluations without progress to wait for |"
    assert row in reference.configuration([Longer])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_help_and_the_reference_under_its_group(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown, page = capsys.readouterr().out, reference.commands()[command]
    assert stop.value.code == 0
    for entry in known_options(classes_of(command)).values():
        name = entry.metavar if entry.positional else (entry.flag or f"--{entry.name.replace('_', '-')}")
        assert name in shown and f"`{name}" in page and f"─ {entry.group} ─" in shown and f"### {entry.group}" in page


# ------------------------------------------------------------------------------------------------- configuration files


def test_the_config_json_of_a_run_repeats_it(finished, home):
    assert main(["finetune", "--config", str(finished / "config.json"), "--out", "again"]) == 0
    assert trained("again") == trained(finished)


def test_a_file_with_overrides_is_the_same_as_flags(finished):
    Path("run.yaml").write_text(
        "model: bert\ndata: train.csv\neval: test.jsonl\nepochs: 9\nbatch_size: 8\nlr: 3e-2\nmax_length: 24\n"
        "checkpoint_every: 3\nout: again\nsamples: null\n"
    )
    assert main(["finetune", "--config", "run.yaml", "epochs=4"]) == 0
    assert trained("again") == trained(finished)


def test_a_resumed_run_is_compared_with_what_was_typed_or_is_in_the_file(stopped, finished, capsys):
    Path("run.yaml").write_text("lr: 0.5")
    assert "--lr 0.5 conflicts with the run's 0.03" in failure(
        capsys, "finetune", "--resume", stopped, "--config", "run.yaml"
    )
    assert main(["finetune", "--resume", str(stopped), "--config", str(finished / "config.json")]) == 0
    assert trained(stopped) == trained(finished)


def test_dropout_among_the_fields_of_the_method_is_the_option():
    config = Config(settings={"dropout": 0.5})
    assert config.dropout == build_method(config).methods()[0].dropout == 0.5


def test_settings_of_a_file_and_of_flags_are_both_given(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1\nsettings: {length: 3, init_std: 1}")
    given = _with_file(str(tmp_path / "run.yaml"), {"settings": {"length": 4}, "rank": 2})
    assert given == {"lr": 1, "rank": 2, "settings": {"length": 4, "init_std": 1}}


def test_a_lengthened_run_is_not_repeated_silently(finished, tmp_path):
    record = json.loads((finished / "config.json").read_text())
    record["lengthened"] = [{"from_steps": 20, "to_steps": 40, "after_step": 20}]
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="was lengthened after step 20, which a new run with its options is not"):
        assert read_config_file(tmp_path / "config.json", options(Config))["epochs"] == 4


def test_types_of_yaml(tmp_path):
    text = "lr: 1e-3\nrank: 4\npacked: true\neval: no\ntargets: [query, value]\nsettings: {rslora: true}\nsteps: ~\n"
    (tmp_path / "run.yaml").write_text(text)
    assert read_config_file(tmp_path / "run.yaml", options(Config)) == {
        "lr": 0.001, "rank": 4, "packed": True, "eval": "no", "targets": ["query", "value"],
        "settings": {"rslora": True},
    }  # fmt: skip


BAD = {
    "unknown key": ("lrr: 1", "run.yaml: unknown key 'lrr'; did you mean 'lr'?"),
    "a flag's spelling": ("batch-size: 8", "run.yaml: unknown key 'batch-size'; did you mean 'batch_size'?"),
    "misplaced key": ("settings: {lr: 1}", "--method lora has no field 'lr'; --lr is an option of its own"),
    "nested": ("training: {lr: 1}", "run.yaml: unknown key 'training'"),
    "wrong type": ("rank: eight", "run.yaml: 'rank' must be an integer, got 'eight'"),
    "wrong type of a choice": ("dtype: float8", "one of float32, bfloat16, float16, got 'float8'; did you mean"),
    "a list": ("- lr", "run.yaml: expected options such as `lr: 1e-3`, got a list"),
    "a text": ("lr=1", "got a text"),
    "twice": ("lr: 1\nlr: 2", "run.yaml, line 2: found duplicate key"),
    "malformed": ("lr: [1", "run.yaml, line 1: expected ',' or ']'"),
    "a tag": ("lr: !!python/object:os.system 1", "run.yaml, line 1: could not determine a constructor"),
    "a number as key": ("1: 2", "run.yaml: unknown key 1"),
    "of the command line": ("resume: true", "run.yaml: 'resume' is an option of the command line"),
    "a flag's name": ("set: {length: 3}", "run.yaml: unknown key 'set'; did you mean 'settings'?"),
    "another library's name": ("learning_rate: 1", "'learning_rate'; jpeft finetune --help lists the options"),
    "a fraction": ("checkpoint_every: 2.0", "run.yaml: 'checkpoint_every' must be an integer, got 2.0"),
    "a bool for an integer": ("rank: true", "run.yaml: 'rank' must be an integer, got True"),
    "beyond all counts": (f"eval_every: {10**30}", "run.yaml: 'eval_every' must be a smaller integer"),
    "beyond float32": ("warmup: 0\nweight_decay: 1e300", "run.yaml: 'weight_decay' must be a number, at least 0"),
    "a number for a text": ("text: 5", "'text' must be a non-empty text, got 5; in quotes it is a text"),
    "an empty text": ("label: ''", "run.yaml: 'label' must be a non-empty text, got ''"),
    "a long value": (f"rank: {'x' * 9999}", "xxx…xxx"),
    "a method": ("method: lorra", "run.yaml: 'method' must be one of adalora, adapterfusion, alora"),
    "a date": ("settings: {init: 2024-01-01}", "run.yaml: 'settings' must be fields by name"),
    "a mapping within itself": ("settings: &s {init: *s}", "run.yaml: 'settings' must be fields by name"),
    "of another task": (
        "packed: false",
        "--packing is for --task chat, not for --task classify (with the options of r",
    ),
    "given twice": ("rank: 4\nsettings: {rank: 8}", "--rank 4 contradicts --set rank=8; give one"),
    "several documents": ("lr: 1\n---\nlr: 2", "line 2: expected a single document in the stream, but found another"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_and_makes_no_run(case, capsys):
    text, message = BAD[case]
    Path("run.yaml").write_text(text)
    assert message in failure(capsys, *job("run"), "--config", "run.yaml")
    assert not Path("run").exists()


def test_files_that_cannot_be_read(capsys, finished):
    assert "none.yaml: No such file" in failure(capsys, *job("run"), "--config", "none.yaml")
    Path("latin.yaml").write_bytes("model: caf\xe9".encode("latin-1"))
    assert "latin.yaml: not UTF-8: byte offset 10" in failure(capsys, *job("run"), "--config", "latin.yaml")
    Path("comma.json").write_text('{"lr": 1,}')
    assert "comma.json, line 1: not JSON: " in failure(capsys, *job("run"), "--config", "comma.json")
    Path("twice.json").write_text('{"lr": 1, "lr": 2}')
    assert "twice.json: the key 'lr' is given twice" in failure(capsys, *job("run"), "--config", "twice.json")
    record = json.loads((finished / "config.json").read_text())
    Path("new.json").write_text(json.dumps({**record, "format": 99}))
    assert "new.json: of a run in format 99; this version" in failure(capsys, *job("run"), "--config", "new.json")
    shutil.copy(finished / "result.json", "result.json")
    assert "result.json: unknown key" in failure(capsys, *job("run"), "--config", "result.json")


# ------------------------------------------------------------------------------------------------------- command lines

SUGGESTIONS = {
    "fintune": "unknown command 'fintune'; did you mean 'finetune'? (see",
    "-v": "unknown option '-v'; the commands are finetune",
    "help fintune": "unknown command 'fintune'; did you mean 'finetune'?",
    "finetune --taks chat": "unknown option --taks; did you mean '--task'?",
    "finetune --LR 1": "unknown option --LR; did you mean '--lr'?",
    "finetune --task chatt": "--task must be one of classify, chat, got 'chatt'; did you mean 'chat'?",
    "finetune --quantize NF4": "got 'NF4'; did you mean 'nf4'?",
    "finetune --method lorra": "got 'lorra'; did you mean 'lora'?",
    "finetune lrr=1e-3": "lrr=1e-3: no option is called 'lrr'; did you mean 'lr'?",
    "finetune packing=false": "no option is called 'packing'; did you mean 'packed'?",
    "finetune lr.x=1": "lr.x=1: 'lr' has no fields; expected lr=VALUE",
    "finetune settings=a": "settings=a: expected settings.NAME=VALUE",
    "finetune runs/first": "unexpected argument 'runs/first'",
    "finetune -x": "unknown option -x; a text that begins with a dash stands after --",
    "finetune --rank --lr 1": "--rank has no value; expected an integer",
    "finetune --epochs 2.5": "--epochs must be an integer, got '2.5'",
    "finetune --lr fast": "--lr must be a finite number, got 'fast'",
    "finetune --no-json": "unknown option --no-json",
    "merge one two three": "unexpected argument 'three'",
    "merge one": "OUT is missing: the folder to write",
    "plan --model x": "--topology is missing: v5e:4x4",
}


@pytest.mark.parametrize("line", SUGGESTIONS)
def test_a_mistyped_command_line_suggests_the_nearest(line, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and SUGGESTIONS[line] in err


def parser_of(command):
    """A function that parses words of a command, or a line of them."""
    known, app = known_options(classes_of(command)), App(result_action="return_value")
    make_command(app, command, "", classes_of(command))
    return lambda words: parse(app, [command, *(words.split() if isinstance(words, str) else words)], known)


def test_options_without_a_value_and_by_name():
    given = parser_of("finetune")
    assert given("--resume") == {"resume": ""} and given("--resume runs/1") == {"resume": "runs/1"}
    assert given("--resume lr=0.1") == {"resume": "", "lr": 0.1}
    assert given("--resize-embeddings --rank 2") == {"resize_embeddings": 1, "rank": 2}
    assert given("--resize-embeddings 64") == {"resize_embeddings": 64}
    assert given("--set a=1 --set b=x settings.c=[2]") == {"settings": {"a": 1, "b": "x", "c": [2]}}
    assert given("packed=false batch_size=2") == {"packed": False, "batch_size": 2}
    assert given("--mesh data=2,fsdp=4 --alpha -1") == {"mesh": "data=2,fsdp=4", "alpha": -1.0}
    assert given("--rank 2 --rank 3 rank=4") == {"rank": 4}
    assert given("--method LoRA --batch_size=2 --no-packing") == {"method": "lora", "batch_size": 2, "packed": False}


def test_texts_that_look_like_options():
    given = parser_of("generate")
    for text in ("- a list", "-1 + 2", "-- hello", "--hello world", "a=b", "lr=1", "two\nlines", "-5"):
        assert given([text]) == {"prompts": (text,)}
        assert given(["--system", text, "--seed", "1", "hi"]) == {"system": text, "seed": 1, "prompts": ("hi",)}
    assert given("--system -x --temperature 1 hi -- --raw -h") == {
        "system": "-x", "temperature": 1.0, "prompts": ("hi", "--raw", "-h"),
    }  # fmt: skip
    assert given("--messages -") == {"messages": "-"} and given(["--system=", "hi"])["system"] == ""
    assert parser_of("predict")("run --text-arg -5 --text-arg -x")["text_arg"] == ["-5", "-x"]


@pytest.mark.parametrize("line", ["help merge", "--help merge", "merge --help", "merge a -h", "--help", "help"])
def test_help_may_stand_first_or_last(line, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith(f"Usage: jpeft {'merge' if 'merge' in line else 'COMMAND'}")
    assert "\x1b" not in out
