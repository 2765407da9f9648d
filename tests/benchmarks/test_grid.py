"""The plan of a quality benchmark: what a TOML file or the options say, which runs they need, what is refused."""

import json
from dataclasses import replace

import pytest

from gradret.bench.grid import Run, add_source_option, hash_record
from gradret.bench.grid_file import read_grid
from gradret.console import GradretError
from gradret.settings import FitSettings

PLAN = """
title = "Two losses"
measures = ["AP", "nDCG@10"]
seeds = 2
baselines = ["infonce", "untrained"]
primary = "ours"
[settings]
max_steps = 1
epochs = 1
exclude = ["own/exclude.jsonl"]
[encoders.small]
model = "a/small"
[encoders.long]
model = "a/long"
document_max_length = 512
learning_rate = 1e-4
[data]
odd = ["sample?queries=odd"]
both = ["one.jsonl?sample=3", "two.jsonl"]
[collections]
Even = "sample?queries=even"
All = "b.jsonl"
[systems.bm25]
ranker = "bm25"
label = "BM25"
[systems.untrained]
ranker = "untrained"
[systems.infonce]
loss = "infonce"
[systems.ours]
temperature = 1
[systems.real]
data = "odd"
seeds = 1
[[experiments]]
name = "main"
title = "Main"
data = "both"
[[experiments]]
name = "heat"
data = "both"
encoders = ["small"]
systems = ["untrained", "ours"]
collections = ["All"]
vary = "temperature"
values = [0.05, 1]
[[experiments]]
name = "noise"
data = "both"
encoders = ["small"]
systems = ["untrained", "ours"]
seeds = 1
vary = "grades"
values = ["3,0", "3"]
"""


@pytest.fixture
def read(tmp_path):
    def read(text: str):
        path = tmp_path / "plan.toml"
        path.write_text(text)
        return read_grid(path)

    return read


def test_the_file_as_a_grid(read):
    grid = read(PLAN)
    assert (grid.title, grid.measures, grid.seeds) == ("Two losses", ("AP", "nDCG@10"), 2)
    assert (grid.baselines, grid.primary) == (("infonce", "untrained"), "ours")
    assert grid.encoders["long"] == {"model": "a/long", "document_max_length": 512, "learning_rate": 1e-4}
    assert grid.data["both"] == ("one.jsonl?sample=3", "two.jsonl")
    assert (grid.systems["bm25"].label, grid.systems["ours"].label) == ("BM25", "ours")
    assert (grid.experiments[0].title, grid.experiments[1].title) == ("Main", "heat")
    assert grid.experiments[0].systems == ("bm25", "untrained", "infonce", "ours", "real")
    # Whole numbers of a float field are floats: 1 and 1.0 are one run.
    assert repr(grid.settings.epochs) == "1.0" and repr(grid.experiments[1].values) == "(0.05, 1.0)"


def test_rows_of_the_tables_in_order(read):
    cells = read(PLAN).cells()
    shown = [(c.experiment, c.encoder, c.value, c.system, c.data, len(c.runs)) for c in cells]
    main = [("bm25", None, 1), ("untrained", None, 1), ("infonce", "both", 2), ("ours", "both", 2), ("real", "odd", 1)]
    assert shown[:10] == [("main", encoder, None, *row) for encoder in ("small", "long") for row in main]
    varied = [("untrained", None, 1), ("ours", "both", 2)]
    assert shown[10:14] == [("heat", "small", value, *row) for value in (0.05, 1.0) for row in varied]
    assert [(value, runs) for *_, value, _, _, runs in shown[14:]] == [("3,0", 1), ("3,0", 1), ("3", 1), ("3", 1)]
    assert cells[0].collections == ("Even", "All") and cells[10].collections == ("All",)


def test_a_run_that_two_experiments_need_is_one(read):
    grid = read(PLAN)
    runs = {(c.experiment, c.encoder, c.system, c.value): c.runs for c in grid.cells()}
    assert runs["main", "small", "bm25", None] == runs["main", "long", "bm25", None]
    assert runs["main", "small", "untrained", None] == runs["heat", "small", "untrained", 0.05]
    assert runs["main", "small", "untrained", None] != runs["main", "long", "untrained", None]
    assert runs["main", "small", "ours", None] == runs["heat", "small", "ours", 1.0]
    wanted = grid.wanted()
    # BM25; two untrained encoders; for each encoder infonce and ours with two seeds and real with one; heat's .05 with
    # two seeds; noise's two values.
    assert len(wanted) == len({run.key for run in wanted}) == 1 + 2 + 2 * (2 + 2 + 1) + 2 + 2
    assert wanted[runs["main", "small", "ours", None][0]] == ("sample?queries=even", "b.jsonl")
    assert wanted[runs["heat", "small", "ours", 0.05][0]] == ("b.jsonl",)
    assert runs["main", "small", "bm25", None][0].record() == {
        "ranker": "bm25",
        "encoder": {},
        "settings": {},
        "data": [],
        "seed": None,
    }
    assert runs["heat", "small", "untrained", 0.05][0].record()["encoder"] == {"model": "a/small"}
    # What suits an encoder is a setting of its trainings, not of the encoder as it is.
    long = {"model": "a/long", "document_max_length": 512}
    trained, untrained = (runs["main", "long", system, None][0].record() for system in ("ours", "untrained"))
    assert trained["encoder"] == untrained["encoder"] == long
    assert (trained["settings"]["learning_rate"], untrained["settings"]) == (1e-4, {})


def test_the_record_of_a_training(read):
    run = next(c for c in read(PLAN).cells() if c.encoder == "long" and c.system == "ours").runs[1]
    assert run.record() == {
        "ranker": "fit",
        "encoder": {"model": "a/long", "document_max_length": 512},
        "settings": {
            "epochs": 1.0,
            "exclude": ["b.jsonl", "own/exclude.jsonl", "sample?queries=even"],
            "learning_rate": 1e-4,
            "max_steps": 1,
            "temperature": 1.0,
        },
        "data": ["one.jsonl?sample=3", "two.jsonl"],
        "seed": 1,
    }
    assert json.loads(json.dumps(run.record())) == run.record()
    assert run.key == hash_record(run.record()) == Run("fit", replace(run.settings)).key
    assert run.key != Run("fit", replace(run.settings, temperature=0.05)).key


def test_every_training_excludes_all_collections(read):
    excludes = {run.settings.exclude for run in read(PLAN).wanted() if run.ranker == "fit"}
    assert excludes == {("b.jsonl", "own/exclude.jsonl", "sample?queries=even")}


def test_a_source_option_goes_on_every_source(read):
    cells = [c for c in read(PLAN).cells() if c.experiment == "noise" and c.system == "ours"]
    assert [c.runs[0].settings.data for c in cells] == [
        ("one.jsonl?sample=3&grades=3,0", "two.jsonl?grades=3,0"),
        ("one.jsonl?sample=3&grades=3", "two.jsonl?grades=3"),
    ]
    assert add_source_option("a.jsonl?queries=odd", "shuffle", 0.2) == "a.jsonl?queries=odd&shuffle=0.2"
    assert add_source_option("a.jsonl", "sample", 2) == "a.jsonl?sample=2"
    assert add_source_option("a.jsonl", "shuffle", 0) == "a.jsonl"  # the run of the list as it is


def test_a_grid_in_bfloat16_measures_so_what_is_untrained_too(read):
    text = PLAN.replace("max_steps = 1", 'max_steps = 1\nprecision = "bfloat16"')
    (untrained, *_) = [c for c in read(text).cells() if c.system == "untrained"]
    assert untrained.runs[0].record()["settings"] == {"precision": "bfloat16"}


def test_a_systems_settings_with_one_encoder(read):
    tuned = "[encoders.long.systems]\nours = { learning_rate = 3e-4, temperature = 0.2 }\n"
    grid = read(PLAN.replace("[data]", f"{tuned}[data]"))
    assert grid.tuned == {"long": {"ours": {"learning_rate": 3e-4, "temperature": 0.2}}}
    assert "systems" not in grid.encoders["long"]
    cells = {(c.encoder, c.system): c.runs[0].settings for c in grid.cells() if c.experiment == "main"}
    found = [(s.learning_rate, s.temperature) for s in (cells["long", "ours"], cells["long", "infonce"])]
    assert found == [(3e-4, 0.2), (1e-4, 0.05)]
    assert (cells["small", "ours"].learning_rate, cells["small", "ours"].temperature) == (5e-6, 1.0)
    # What an experiment varies comes last.
    grid = read(PLAN.replace("[data]", f"{tuned.replace('long', 'small')}[data]"))
    heat = [c.runs[0].settings for c in grid.cells() if c.experiment == "heat" and c.system == "ours"]
    assert [(s.learning_rate, s.temperature) for s in heat] == [(3e-4, 0.05), (3e-4, 1.0)]


def test_what_a_later_table_mends_is_no_mistake(read):
    text = PLAN.replace("[systems.ours]", "[systems.ours]\nlora_alpha = 8\n")
    with pytest.raises(GradretError, match=r"\[systems.ours\]: lora_alpha needs lora, the adapters' rank, above 0$"):
        read(text)
    # An experiment that varies lora gives it the rank; the other two experiments are cut out.
    heat = text.index('[[experiments]]\nname = "heat"'), text.index('[[experiments]]\nname = "noise"')
    text = text[: text.index("[[experiments]]")] + text[slice(*heat)].replace("temperature", "lora")
    text = text.replace("values = [0.05, 1]", "values = [4]")
    assert {c.runs[0].settings.lora for c in read(text).cells() if c.system == "ours"} == {4}


BAD = [
    (
        "[data]",
        "[encoders.long.systems.our]\n[data]",
        "[encoders.long.systems]: 'our' is not known; did you mean 'ours'?",
    ),
    (
        "[data]",
        "[encoders.long.systems.ours]\nheat = 1\n[data]",
        "[encoders.long.systems.ours]: 'heat' is not known; ...",
    ),
    (
        "[data]",
        "[encoders.long.systems.bm25]\norder = 1\n[data]",
        "[encoders.long.systems.bm25]: 'bm25' is not trained, so it has no settings",
    ),
    (
        "[data]",
        "[encoders.long.systems.ours]\ntemperature = 0\n[data]",
        "[encoders.long.systems.ours]: temperature must be above 0, got 0.0",
    ),
    ("seeds = 2", "seeds 2", "not valid TOML (Expected '=' after a key in a key/value pair (at line 4, column 7))"),
    ("seeds = 2", "seed = 2", "'seed' is not known; did you mean 'seeds'?"),
    ("seeds = 2", "seeds = 0", "seeds: expected a whole number above 0, got 0"),
    ("seeds = 2", "seeds = true", "seeds: expected a whole number, got True"),
    ('title = "Two losses"', "title = 2", "title: expected a string, got 2"),
    (
        '"AP"',
        '"nDGC@10"',
        "measure 'nDGC@10' is not known ...; use ir_measures' names, such as nDCG@10, R@100, RR@10, AP",
    ),
    ('["AP", "nDCG@10"]', "[]", "measures: names none"),
    (
        '["infonce", "untrained"]',
        '["infonse"]',
        "baselines: 'infonse' is not defined; there are bm25, untrained, infonce, ours, real",
    ),
    (
        '["infonce", "untrained"]',
        '["infonce", "infonce"]',
        "baselines: a name stands there twice in ['infonce', 'infonce']",
    ),
    (
        'primary = "ours"',
        'primary = "us"',
        "primary: 'us' is not defined; there are bm25, untrained, infonce, ours, real",
    ),
    ("max_steps = 1", "max_step = 1", "[settings]: 'max_step' is not known; did you mean 'max_steps'?"),
    ("max_steps = 1", "max_steps = 1.5", "[settings]: max_steps: expected a whole number, got 1.5"),
    ("max_steps = 1", 'chunk = "all"', "[settings]: chunk must be a number above 0 or 'auto', got 'all'"),
    ("max_steps = 1", "chunk = true", "[settings]: chunk: expected a whole number or a string, got True"),
    ("max_steps = 1", 'lora_targets = "q"', "[settings]: lora_targets: expected a list of strings, got 'q'"),
    ("max_steps = 1", "seed = 1", "[settings]: 'seed' can not be set here; runs take the seeds 0 to seeds - 1"),
    ("max_steps = 1", 'data = ["a"]', "[settings]: 'data' can not be set here; name it in [data]"),
    (
        "temperature = 1\n",
        'exclude = ["a"]\n',
        "[systems.ours]: 'exclude' can not be set here; it is one for all runs, under [settings]",
    ),
    (
        "document_max_length = 512",
        "layer = 2",
        "[encoders.long]: 'layer' is not known; did you mean 'layers'?",
    ),
    (
        "document_max_length = 512",
        'document_max_length = "a"',
        "[encoders.long]: document_max_length: expected a whole number, got 'a'",
    ),
    ("temperature = 1\n", "order = 3\n", "[systems.ours]: order must be one of 1, 2; got 3"),
    ("document_max_length = 512", "layers = 0", "[encoders.long]: layers must be 1 or above, got 0"),
    (
        "document_max_length = 512",
        "query_max_length = -3",
        "[encoders.long]: query_max_length must be 1 or above, got -3",
    ),
    (
        "document_max_length = 512",
        'pooling = "max"',
        "[encoders.long]: pooling must be one of 'mean', 'cls', 'last'; got 'max'",
    ),
    ("temperature = 1\n", 'temperature = "hot"\n', "[systems.ours]: temperature: expected a number, got 'hot'"),
    ("temperature = 1\n", 'data = "od"\n', "[systems.ours]: data: 'od' is not defined; there are odd, both"),
    ('ranker = "bm25"', 'ranker = "bm52"', "[systems.bm25]: ranker: expected one of fit, untrained, bm25, got 'bm52'"),
    ('ranker = "bm25"', 'ranker = "bm25"\nloss = "kl"', "[systems.bm25]: 'loss' is not known; use label, ranker"),
    ('odd = ["sample?queries=odd"]', "odd = []", "[data]: odd: names no source"),
    ('odd = ["sample?queries=odd"]', 'odd = "sample"', "[data]: odd: expected a list of strings, got 'sample'"),
    (
        'odd = ["sample?queries=odd"]',
        'odd = ["a?sample=0"]',
        "[data]: odd: a?sample=0: sample '0' is not a whole number above 0",
    ),
    (
        'All = "b.jsonl"',
        'mean = "b.jsonl"',
        "[collections]: 'mean' is the name of the collections' mean; choose another",
    ),
    ('All = "b.jsonl"', "All = 3", "[collections]: All: expected a string, got 3"),
    (
        'name = "main"',
        'name = "Main"',
        "[[experiments]] Main: name: expected letters a to z, digits and hyphens, got 'Main'",
    ),
    ('name = "main"', 'name = "heat"', "[[experiments]] heat: another experiment has this name"),
    ('title = "Main"', 'titel = "Main"', "[[experiments]] main: 'titel' is not known; did you mean 'title'?"),
    ('title = "Main"\ndata = "both"', "", "[[experiments]] main: names no data, which 'infonce' is trained on"),
    (
        'encoders = ["small"]',
        'encoders = ["tiny"]',
        "[[experiments]] heat: encoders: 'tiny' is not defined; there are small, long",
    ),
    (
        'encoders = ["small"]',
        "encoders = []",
        "[[experiments]] heat: encoders: names none; leave it out for all there are",
    ),
    ('vary = "temperature"\n', "", "[[experiments]] heat: vary and values belong together; give both or none"),
    (
        'vary = "temperature"',
        'vary = "heat"',
        "[[experiments]] heat: vary: 'heat' is neither a setting of fit nor one of "
        "shuffle, grades, sample, labels, options of a source",
    ),
    (
        'vary = "temperature"',
        'vary = "seed"',
        "[[experiments]] heat: vary: 'seed' is neither a setting of fit nor one of "
        "shuffle, grades, sample, labels, options of a source",
    ),
    (
        "values = [0.05, 1]",
        "values = []",
        "[[experiments]] heat: values: expected a list of values of temperature, got []",
    ),
    ("values = [0.05, 1]", "values = [1, 1.0]", "[[experiments]] heat: values: one stands there twice in [1, 1.0]"),
    ("values = [0.05, 1]", "values = [0]", "[[experiments]] heat: temperature must be above 0, got 0.0"),
    (
        'values = ["3,0", "3"]',
        'values = ["three"]',
        "[[experiments]] noise: grade map 'three': expected OLD:NEW or GRADE, separated by commas, got 'three'",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_a_bad_file_is_told_with_its_place(read, tmp_path, old, new, message):
    assert old in PLAN
    with pytest.raises(GradretError) as error:
        read(PLAN.replace(old, new, 1))
    start, dots, end = f"{tmp_path}/plan.toml: {message}".partition("...")  # dots stand for whatever it says there
    told = str(error.value)
    assert (told.startswith(start) and told.endswith(end)) if dots else told == start


def test_a_file_without_its_parts(read, tmp_path):
    for text, message in (
        ("", "[collections] names nothing to measure on"),
        ('collections = "a"', "[collections]: expected a table"),
        ('[collections]\na = "a"', "[systems.NAME]: none is there; name one at least"),
        ('[collections]\na = "a"\n[systems]\nours = 2', "[systems.ours]: expected a table, got 2"),
        ('[collections]\na = "a"\n[systems.ours]', "[[experiments]]: none is there; write one at least"),
        ('[collections]\na = "a"\n[systems.ours]\n[experiments.main]', "[experiments]: expected [[experiments]]"),
        ('[collections]\na = "a"\n[systems.ours]\n[[experiments]]', None),
    ):
        with pytest.raises(GradretError) as error:
            read(text)
        message = message or "[[experiments]] 1: name: expected letters a to z, digits and hyphens, got ''"
        assert str(error.value) == f"{tmp_path}/plan.toml: {message}"
    with pytest.raises(GradretError, match=r"^no\.toml: no such file$"):
        read_grid("no.toml")


def test_a_small_file_needs_little(read):
    grid = read('[data]\na = ["a"]\n[collections]\nc = "c"\n[systems.ours]\n[[experiments]]\nname = "x"\ndata = "a"')
    assert (grid.title, grid.measures, grid.seeds) == ("plan", ("nDCG@10", "R@100", "RR@10"), 3)
    assert grid.encoders == {"all-MiniLM-L6-v2": {"model": FitSettings().model}}
    assert (grid.baselines, grid.primary, len(grid.wanted())) == ((), None, 3)
