"""The job file: everything about a run, in one TOML file that simulation and daemon read alike."""

from fedpeft.job.loading import job_schema, load_job, parse_job
from fedpeft.job.schema import Job

__all__ = ["Job", "job_schema", "load_job", "parse_job"]
