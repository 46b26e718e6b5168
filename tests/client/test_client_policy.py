"""The data owner's limits: what is declined, in which words, and what a restart does not forget."""

from __future__ import annotations

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


def objection(tmp_path, *, trains=True, **limits):
    return Policy(Limits(**limits), tmp_path / "rounds.json").objection(JOB, trains=trains)


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


def test_rounds_are_counted_per_day_across_restarts_and_evaluation_is_free(tmp_path):
    limits, path = Limits(max_rounds_per_day=2), tmp_path / "state" / "rounds.json"
    for count in (1, 2):
        policy = Policy(limits, path)
        assert policy.objection(JOB, trains=True) is None
        policy.count_round()
        assert Policy(limits, path).rounds_today() == count
    assert "max_rounds_per_day 2" in str(Policy(limits, path).objection(JOB, trains=True))
    assert Policy(limits, path).objection(JOB, trains=False) is None
    path.write_text('{"1999-12-31": 5}')  # another day
    assert Policy(limits, path).objection(JOB, trains=True) is None
