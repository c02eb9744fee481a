"""Kinds of job, one file each; `docs/adding-an-evaluation.md` shows how to add one."""

from .base import Job as Job
from .base import keys as keys
from .base import setting as setting
from .registry import job_kinds as job_kinds
from .registry import register_job as register_job
