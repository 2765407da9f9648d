"""The commands as a user runs them: help, exit codes, the one line of an error, what is printed."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY, list_record

from gradret.cli import main
from gradret.settings import FitSettings, spell_option


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_help_loads_no_torch():
    code = (
        "import sys; from click.testing import CliRunner; from gradret.cli import main\n"
        "for command in ('', 'gen', 'look', 'fit', 'export', 'bench', 'bench quality', 'bench loss', 'bench eval'):\n"
        "    assert CliRunner().invoke(main, [*command.split(), '--help']).stdout.startswith('Usage:')\n"
        "print(sorted({'torch', 'transformers', 'ir_datasets', 'llama_cpp', 'openai'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("group", [(), ("bench",)])
def test_no_help_of_a_command_is_cut_off(group):
    help_text = invoke(*group, "--help").stdout
    assert "Commands:" in help_text and "..." not in help_text.partition("Commands:")[2]


def test_a_launchers_variable_that_is_no_number_is_told(monkeypatch):
    monkeypatch.setenv("RANK", "x")
    result = invoke("fit", "--loss", "kl")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "RANK is 'x'; expected a number, as torchrun sets it; else unset it" in result.stderr


def test_usage_errors_exit_with_2():
    assert invoke("fit", "--loss", "hinge").exit_code == 2
    result = invoke("fit", "--temperature", "nan")
    assert (result.exit_code, "'--temperature': must be a finite number, got nan" in result.stderr) == (2, True)
    alone = "is for --loss wasserstein, not gaussian; leave it out"
    for options, message in (
        (("--chunk", "x"), "Invalid value for '--chunk': must be a whole number or 'auto', got 'x'"),
        (("--chunk", "0"), "Invalid value for '--chunk': must be 1 or above, got 0"),
        (("--order", "3"), "Invalid value for '--order': must be one of 1, 2; got 3"),
        (("--dev", ""), "Invalid value for '--dev': must not be empty; give a value or leave it out"),
        (("--device", ""), "Invalid value for '--device': must not be empty"),
        (("--data", "sample", "--data", ""), "Invalid value for '--data': must not be empty"),
        (("--query-prefix", "", "--order", "3"), "Invalid value for '--order'"),  # no prefix is one
        (("--set", "lora_targets=,"), "Invalid value for '--set': lora_targets must be names, got ','"),
        (("--set", "layers"), "'layers' is not NAME=VALUE, such as dev_measure=VALUE"),
        (("--set", "pooling=max"), "pooling must be one of 'mean', 'cls', 'last'; got 'max'"),
        (("--set", "epoch=3"), "'epoch' is not a setting here; did you mean --epochs?"),
        (("--set", "laers=3"), "'laers' is not a setting here; did you mean layers?"),
        (("--set", "epochs=3"), "'epochs' has an option of its own: --epochs"),
        (("--set", "normalize=maybe"), "normalize must be yes or no, got 'maybe'"),
        (("--loss", "kl:.6+contrast:.6"), "loss 'kl:.6+contrast:.6': the weights must sum to 1, got 1.2"),
        (("--loss", "kl", "--positive-from", "2"), "--positive-from is for --loss infonce, not kl"),
        (
            ("--loss", "kl:.5+gaussian:.5", "--set", "ground=grade"),
            "--set ground is for --loss wasserstein, not gaussian:.5+kl:.5;",
        ),
        (("--loss", "gaussian", "--order", "2"), f"--order {alone}"),
        (
            ("--loss", "infonce", "--targets", "gain"),
            "--targets is for --loss wasserstein, gaussian, kl, contrast, not infonce; leave it out",
        ),
        (("--dev-every", "5"), "--dev-every has no use without --dev; leave it out"),
        (("--set", "dev_measure=RR@10"), "--set dev_measure has no use without --dev; leave it out"),
        (
            ("--no-in-batch", "--set", "in_batch_grade=1"),
            "--set in_batch_grade has no use without --in-batch; leave it out",
        ),
    ):
        result = invoke("fit", *options)
        assert (result.exit_code, message in result.stderr) == (2, True)
    for options, message in (
        (("--losses", "infonce", "--order", "1"), "--order is for --loss wasserstein, not infonce; leave it out"),
        (("--losses", "infonce,infonce"), "--losses infonce,infonce: the same loss stands there twice"),
        (("--losses", "kl,kl:1.0"), "--losses kl,kl:1.0: the same loss stands there twice"),
    ):
        result = invoke("bench", *options)
        assert (result.exit_code, message in result.stderr) == (2, True)
    result = invoke("bench", "quality", "--losses", "infonce,hinge")
    assert result.exit_code == 2
    assert "'hinge' is not one of wasserstein, gaussian, infonce, kl, contrast, ranknet; mix them as" in result.stderr


BAD_DATA = [
    (["{'query_id'"], "{data}:1: not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
    (
        [list_record("a"), list_record("b", ("high",))],
        "{data}:2: passage 1: grade 'high' is not a finite number below 1000; write one such as 0, 1, 2 or 3",
    ),
    (
        [list_record("a", (float("nan"),))],
        "{data}:1: passage 1: grade NaN is not a finite number below 1000; write one such as 0, 1, 2 or 3",
    ),
    (
        [list_record("a", (1, -2))],
        "{data}:1: list 'a' has the negative grade -2, to which targets of 2^grade - 1 or sqrt(grade) give nothing; "
        "map it (SOURCE?grades=-2:0,...) or use --targets softmax",
    ),
    ([list_record("a", ())], "{data}:1: list 'a' has no passages; give it at least one or remove the line"),
    (
        [list_record("a"), list_record("a")],
        "{data}:2: query id 'a' was already used in line 1; "
        "give every list an id of its own, or pass the files as two sources to merge them",
    ),
    (
        [list_record("a", (0, 0)), list_record("b", (0,))],
        "loss wasserstein:.15+contrast:.85: no passage is more relevant than another, the highest grade is 0; "
        "give lists with other grades, or map them (SOURCE?grades=OLD:NEW,...)",
    ),
]


@pytest.mark.parametrize(("records", "message"), BAD_DATA)
def test_bad_data_is_one_line_and_leaves_nothing(write_jsonl, tiny_encoder, tmp_path, records, message):
    data = write_jsonl("data.jsonl", records)
    result = invoke("fit", "--data", data, "--model", tiny_encoder, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {message.replace('{data}', str(data))}\n"
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_one_line(tiny_encoder, tmp_path, beir_directory):
    (tmp_path / "empty").mkdir()
    (beir_directory / "qrels" / "test.tsv").write_text("query\tdoc\n")
    assert invoke("fit", "--model", tiny_encoder, "--max-steps", 1, "--out", tmp_path / "done").exit_code == 0
    for arguments, message in (
        (
            ("fit", "--model", tiny_encoder, "--max-steps", 1, "--out", tmp_path / "done"),
            f"{tmp_path}/done: holds a finished run with these settings; choose another --out",
        ),
        (("fit", "--data", tmp_path / "no.jsonl"), f"{tmp_path}/no.jsonl: no such file"),
        (
            ("fit", "--model", tmp_path / "empty", "--out", tmp_path / "out"),
            f"{tmp_path}/empty: no weights; expected model.safetensors beside config.json "
            "(weights in other formats are not read: convert them with save_pretrained)",
        ),
        (
            ("fit", "--model", tiny_encoder, "--out", beir_directory),
            f"{beir_directory}: is not empty and holds no gradret run; choose another --out",
        ),
        (
            ("fit", "--resume", "--out", tmp_path / "typo"),
            f"{tmp_path}/typo: holds no run to resume; check --out, or start one without --resume",
        ),
        (
            ("bench", "eval", "--run", tmp_path / "no" / "run"),
            f"{tmp_path}/no/run: cannot be written (No such file or directory)",
        ),
        (
            ("bench", "eval", "--dataset", "sample?sample=2"),
            "sample: sample=2 is for training lists, not for a collection to measure",
        ),
        (
            ("bench", "eval", "--grade-map", "3=nan"),
            "grade map '3=nan': expected OLD:NEW or GRADE, numbers between -1000 and 1000, separated by commas, "
            "got '3=nan'",
        ),
        (
            ("bench", "eval", "--grade-map", "3=1e21"),
            "grade map '3=1e21': expected OLD:NEW or GRADE, numbers between -1000 and 1000, separated by commas, "
            "got '3=1e21'",
        ),
        (("bench", "eval", "--grade-map", "1=2,1=3"), "grade map '1=2,1=3': grade 1 stands there twice; give it once"),
        (
            ("bench", "eval", "--dataset", "medquad", "--grade-map", "9=3"),
            "medquad: has none of the grades 9 to map; it has 0, 1, 2, 3",
        ),
        (
            ("bench", "eval", "--dataset", "medquad?grades=1:0,2:0,3:-1"),
            "medquad: no document is relevant, as the highest grade is 0; give grades above 0 to those that are "
            "(grades=OLD:NEW)",
        ),
        (
            ("bench", "eval", "--dataset", "beir/nope"),
            "beir/nope: no such file or directory, and not an ir_datasets id; "
            "check the path, or pick an id from https://ir-datasets.com",
        ),
        (
            ("bench", "eval", "--dataset", "beir/scifact"),
            "beir/scifact: this ir_datasets id has no qrels; "
            "name one that has, such as beir/scifact/test, beir/scifact/train",
        ),
        (
            ("bench", "eval", "--dataset", beir_directory),
            f"{beir_directory}/qrels/test.tsv:1: expected the header 'query-id<TAB>corpus-id<TAB>score', "
            "got 'query\tdoc'; add it as the first line",
        ),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, result.stderr) == (1, f"Error: {message}\n")


def test_rare_settings_are_set_by_name(tiny_encoder, tmp_path):
    out = tmp_path / "out"
    arguments = ("fit", "--model", tiny_encoder, "--max-steps", 1, "--out", out, "--set", "clip=2", "--set", "layers=1")
    assert invoke(*arguments).exit_code == 0
    settings = json.loads((out / "gradret.json").read_text())["settings"]
    assert (settings["clip"], settings["layers"]) == (2.0, 1)
    assert "| `--set clip` | 2 |" in (out / "README.md").read_text()
    same = invoke("fit", "--resume", "--out", out, "--set", "clip=2")
    assert same.stdout == f"{out}: already finished, 1 step\n"
    other = invoke("fit", "--resume", "--out", out, "--set", "clip=3")
    message = "holds another run, with clip=2.0 where 3.0 is asked for; choose another --out"
    assert (other.exit_code, other.stderr) == (1, f"Error: {out}: {message}\n")
    result = invoke("bench", "eval", "--set", "clip=1")  # takes those of the encoder alone
    assert result.exit_code == 2 and "'clip' is not a setting here" in result.stderr


def test_a_run_of_another_version_is_told(tmp_path):
    (tmp_path / "gradret.json").write_text('{"settings": {"kl_share": null}}')
    result = invoke("fit", "--resume", "--out", tmp_path)
    message = f"{tmp_path}: holds a run of another version of gradret, with the setting 'kl_share'"
    assert (result.exit_code, result.stderr) == (1, f"Error: {message}; choose another --out\n")


def test_help_shows_few_options_in_groups_and_the_other_settings_at_its_end():
    text = invoke("fit", "--help").stdout
    assert len(re.findall(r"^\s+(?:-\w, )?--[a-z]", text, re.M)) <= 36
    headings = re.findall(r"^(\w.*):$", text, re.M)
    groups = ["Data", "Encoder", "Loss", "Optimisation", "Memory and processes", "Run"]
    assert headings == ["Options to begin with", *groups, "Values of --set"]
    for declared in fields(FitSettings):
        spelled = spell_option(declared).removeprefix("--set ")
        assert re.search(rf"^  {spelled}[= ]", text, re.M), spelled
    headings = re.findall(r"^(\w.*):$", invoke("gen", "--help").stdout, re.M)
    assert headings == ["Queries and output", "Model and engine", "What is written", "Sampling", "Run"]


def test_fit_without_options_then_eval(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADRET_CACHE", str(tmp_path / "cache"))
    result = invoke("fit", "--model", tiny_encoder, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["out"], document["steps"]) == ("gradret-model", 20)
    result = invoke("bench", "eval", "--model", "gradret-model", "--run", "out.run", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert list(document["measures"]) == ["nDCG@10", "R@100", "RR@10"]
    assert (document["queries"], document["documents"]) == (96, 384)
    assert len((tmp_path / "out.run").read_text().splitlines()) == 96 * 384
    table = invoke("bench", "eval", "--model", "gradret-model", "--queries", "even", "--measures", "AP").stdout
    assert table.splitlines()[0].split() == ["sample", "AP"]
    assert table.splitlines()[2].split()[0] == "gradret-model"
    finished = invoke("fit", "--resume")
    assert finished.stdout == "gradret-model: already finished, 20 steps\n"


def test_a_report_without_its_extra_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("bench", "quality")
    assert result.exit_code == 1
    assert result.stderr == "Error: a chart needs the package matplotlib: pip install 'gradret[bench]'\n"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("gradret be", {"bench"}),
        ("gradret bench ", {"eval", "loss", "quality"}),
        ("gradret bench quality --max", {"--max-steps"}),
        ("gradret fit --loss ", {"wasserstein", "gaussian", "infonce", "kl", "contrast", "ranknet"}),
    ],
)
def test_a_shell_completes(words, completed):
    cursor = str(len(words.split(" ")) - 1)
    environment = {"_GRADRET_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": cursor}
    result = CliRunner().invoke(main, [], env=environment, prog_name="gradret")
    assert {line.partition(",")[2] for line in result.stdout.split()} == completed


def test_the_module_runs_as_the_command():
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-m", "gradret", "--version"], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.startswith("gradret, version ")
