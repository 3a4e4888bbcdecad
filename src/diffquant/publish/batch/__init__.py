"""A batch: a plan file of models, types and targets, made by processes or by Ray, and resumed.

plan.toml -> plan_file (settings: a row per key) -> items: one per output, no two in one place
-> planning: every model planned dry, every output compared with the journal (record)
-> jobs: the outputs of one model that are left, one pass over its source
-> pool (child: a process per job; slots: which one next)  or  ray_pool
-> report: the journal read again
"""

from diffquant.publish.batch.report import BatchReport
from diffquant.publish.batch.run import run_batch

__all__ = ["BatchReport", "run_batch"]
