"""The job file: what is read, and the one line that every mistake gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedpeft.errors import JobError
from fedpeft.job import job_schema, load_job, parse_job
from fedpeft.job.loading import dump_job, job_digest

GOOD = """
name = "t"
[model]
base = "builtin:tiny-code-lm"
[data]
source = "builtin:stdlib"
task = "causal-lm"
[adapter]
kind = "ffa-lora"
"""
JOBS = sorted((Path(__file__).parents[3] / "simulations" / "jobs").glob("*.toml"))


def mistake(text: str, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        parse_job(text, overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.exit_code == 2
    return line


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_every_job_file_we_ship_is_valid(path):
    assert load_job(path).name == path.stem


def test_a_job_written_out_reads_back_to_itself():
    job = parse_job(GOOD, ["clients.sample_rate=0.5", "adapter.target_modules=['q_proj']"])
    assert parse_job(dump_job(job)) == job
    assert job_digest(parse_job(dump_job(job))) == job_digest(job)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("adapter.rnak=4", r"adapter\.rnak: unknown key; did you mean 'rank'\?"),
        ("train.learnin_rate=1", r"train\.learnin_rate: unknown key; did you mean 'learning_rate'\?"),
        ("zzz.a=1", r"zzz: unknown key; known: name, seed, model"),
        ("adapter.rank=0", r"adapter\.rank: .*greater than or equal to 1 \(got 0\)"),
        ("adapter.rank='8'", r"adapter\.rank: .*valid integer \(got '8'\)"),
        (
            "adapter.kind='ffa-lorra'",
            r"adapter\.kind: adapter kind 'ffa-lorra' is not available; did you mean 'ffa-lora'\?",
        ),
        ("aggregation.rule='maen'", r"aggregation\.rule: .*did you mean 'mean'\?"),
        ("privacy.mode='client-central'", r"privacy\.mode: .*not available in this version\) \(got 'client-central'\)"),
        ("audit.canaries=64", r"audit\.canaries: .*not available in this version"),
        ("clients.per_round=9", r"clients: per_round = 9 is more than count = 2"),
        ("train.learning_rate=-1", r"train\.learning_rate: .*greater than 0 \(got -1"),
        ("adapter.train_head=true", r"train_head is for classification"),
        ("name='A b'", r"name: .*pattern"),
        ("seed=-1", r"seed: .*\(got -1\)"),
        ("nonsense", r"--set: is not of the form"),
    ],
)
def test_a_mistake_is_one_line_that_names_field_value_and_way_out(override, line):
    assert re.search(line, mistake(GOOD + "[clients]\ncount = 2\n", override))


def test_a_rule_that_cannot_combine_the_kind_is_refused():
    assert "aggregation.rule 'ffa' combines adapter kinds ffa-lora, not 'lora'" in mistake(GOOD, "adapter.kind='lora'")


def test_a_missing_section_is_named():
    assert mistake('name = "t"\n[model]\nbase = "b"\n') in (
        "data: is required; add it to the job file (and 1 more problem)",
    )


def test_a_file_that_is_not_toml_says_where(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("name = = 1")
    with pytest.raises(JobError, match=r"job\.toml: is not valid TOML: .*line 1"):
        load_job(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="is not a text file"):
        load_job(path)
    with pytest.raises(JobError, match="no such job file"):
        load_job(tmp_path / "nowhere.toml")


def test_the_published_schema_knows_every_key_and_every_name():
    schema = job_schema()
    assert schema["$defs"]["AdapterSection"]["properties"]["kind"]["enum"] == ["ffa-lora", "lora"]
    assert "ffa" in schema["$defs"]["AggregationSection"]["properties"]["rule"]["enum"]
    assert all(section.get("additionalProperties") is False for section in schema["$defs"].values())
