"""The data owner's limits: what is declined, in which words, and what a restart does not forget."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from fedpeft.job import parse_job
from fedpeft_client.config import Limits
from fedpeft_client.policy import Policy

JOB = parse_job("""
name = "ward-7"
[model]
base = "org/base-1b"
[data]
source = "x"
task = "causal-lm"
[adapter]
kind = "lora"
rank = 8
[aggregation]
rule = "mean"
""")


def objection(tmp_path, **limits):
    policy = Policy(Limits(**limits), tmp_path / "rounds.json")
    return policy.objection(JOB) or policy.round_objection("run round")


def test_without_limits_everything_that_fits_the_defaults_may_run(tmp_path):
    assert objection(tmp_path) is None


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"allowed_jobs": ["trial-*"]}, "job 'ward-7' is not among this client's allowed_jobs"),
        ({"allowed_jobs": []}, "job 'ward-7' is not among this client's allowed_jobs"),
        ({"allowed_jobs": ["WARD-*"]}, "job 'ward-7' is not among this client's allowed_jobs"),
        ({"allowed_bases": ["org/other"]}, "base model 'org/base-1b' is not among this client's allowed_bases"),
        ({"max_rank": 7}, "rank 8 is above this client's max_rank 7"),
        ({"max_rounds_per_day": 0}, "this client has trained its max_rounds_per_day 0 today"),
    ],
)
def test_a_decline_names_the_limit_and_the_value(tmp_path, limits, sentence):
    assert objection(tmp_path, **limits) == sentence


def test_limits_are_patterns_and_inclusive(tmp_path):
    fits = {"allowed_jobs": ["other", "ward-*"], "allowed_bases": ["org/*"], "max_rank": 8, "max_rounds_per_day": 1}
    assert objection(tmp_path, **fits) is None


@pytest.mark.parametrize(
    "base", ["/m", "~/m", "./m", "../m", "..", "m/../../x", "a/b/c", "file:x", "\\\\host\\x", "a b"]
)
def test_a_base_that_could_be_a_path_must_be_mapped(tmp_path, base):
    job = JOB.model_copy(update={"model": JOB.model.model_copy(update={"base": base})})
    policy = Policy(Limits(), tmp_path / "rounds.json")
    assert policy.objection(job) == "base model is a path; map it in [base_models]"
    assert Policy(Limits(), tmp_path / "rounds.json", {base: "/models/m"}).objection(job) is None


@pytest.mark.parametrize("base", ["builtin:tiny-code-lm", "gpt2", "org/base-1b", "Org_1/Base.v2"])
def test_built_in_models_and_hub_ids_are_no_paths(tmp_path, base):
    job = JOB.model_copy(update={"model": JOB.model.model_copy(update={"base": base})})
    assert Policy(Limits(), tmp_path / "rounds.json").objection(job) is None


def test_different_rounds_are_counted_per_day_across_restarts(tmp_path):
    limits, path = Limits(max_rounds_per_day=2), tmp_path / "state" / "rounds.json"
    for count, work in ((1, "a"), (1, "a"), (2, "b"), (2, "a")):
        policy = Policy(limits, path)
        assert policy.round_objection(work) is None
        policy.count_round(work)
        assert Policy(limits, path).rounds_today() == count
    assert "max_rounds_per_day 2" in str(Policy(limits, path).round_objection("c"))
    assert Policy(limits, path).round_objection("a") is None


def test_a_new_day_counts_anew_and_still_knows_the_round_that_was_begun_before_midnight(tmp_path):
    path, today = tmp_path / "rounds.json", datetime.now(UTC)
    yesterday, long_ago = (f"{today - timedelta(days=d):%Y-%m-%d}" for d in (1, 30))
    path.write_text(json.dumps({yesterday: ["a", "b"], long_ago: ["old"]}))
    policy = Policy(Limits(max_rounds_per_day=1), path)
    policy.count_round("a")
    assert policy.rounds_today() == 0
    policy.count_round("c")
    assert policy.rounds_today() == 1
    assert policy.round_objection("b") is None
    assert policy.round_objection("d") is not None
    assert set(json.loads(path.read_text())) == {yesterday, f"{today:%Y-%m-%d}"}


@pytest.mark.parametrize("content", ["", "[]", "5", '"x"', "garbage", '{"2026-01-01": 3}', '{"2026-01-01": [3]}'])
def test_a_file_that_holds_something_else_counts_as_empty_with_a_warning(tmp_path, caplog, content):
    path = tmp_path / "rounds.json"
    path.write_text(content)
    policy = Policy(Limits(max_rounds_per_day=1), path)
    assert policy.round_objection("a") is None
    assert "counting begins anew" in caplog.text
    policy.count_round("a")
    assert Policy(Limits(max_rounds_per_day=1), path).round_objection("b") is not None
