"""Runs the tasks of a release on worker processes, of this machine or of a Slurm cluster, by submitit.

submitit was chosen over Ray: it is a small library without a service of its own, a task is a plain job in the cluster's
queue, and the same code starts processes here. Workers share the release's directory, in which all state is, so neither
a worker nor this process has anything to lose: a worker that is killed has its task started again, and a run whose
starter is killed goes on when it is started again.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bamba_quant.errors import BambaQuantError
from bamba_quant.inference.distributed import TOKEN, FailedElsewhereError, join_ranks
from bamba_quant.inference.threads import use_threads
from bamba_quant.releases.make import run_task
from bamba_quant.releases.preset import ReleaseError
from bamba_quant.releases.state import STATE, is_done
from bamba_quant.releases.tasks import Release, Task
from bamba_quant.writers.tasks import default_threads

_SECONDS_BETWEEN_LOOKS = 0.2
_MOST_STARTS = 4  # of a task whose workers are killed
_MINUTES = 60 * 24 * 3


@dataclass(frozen=True)
class Workers:
    """``count`` jobs at a time on ``cluster``, submitit's "local" or "slurm".

    An evaluation is split among ``processes``. ``parameters`` are submitit's, such as ``slurm_partition``,
    ``gpus_per_node`` and ``timeout_min``.
    """

    count: int = 2
    cluster: str = "local"
    processes: int = 1
    parameters: Mapping[str, Any] = field(default_factory=dict)


def run_on_workers(
    release: Release,
    workers: Workers,
    *,
    overwrite: bool = False,
    started: Callable[[Task, str], None] = lambda task, job: None,
    ended: Callable[[Task], None] = lambda task: None,
    note: Callable[[str], None] = lambda note: None,
) -> None:
    """Run all tasks, each as soon as what it needs is done; ``started`` gets the job's number.

    Raises ``ReleaseError`` for the first task that fails, with the worker's own words, and for one whose workers are
    killed each time; jobs that run then are cancelled.
    """
    import submitit

    folder = release.directory / STATE / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # submitit pickles what it starts, and a token is in it
    try:
        executor = submitit.AutoExecutor(folder, cluster=workers.cluster)
        executor.update_parameters(**{"timeout_min": _MINUTES, **workers.parameters})
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise ReleaseError("submitit refuses this", found=str(error), fix="correct --slurm") from error
    waiting = {task.name: task for task in release.tasks if not is_done(release, task, overwrite=overwrite)}
    running: dict[str, tuple[Task, Any]] = {}
    starts = dict.fromkeys(waiting, 0)
    try:
        while waiting or running:
            ready = [task for task in waiting.values() if not {*waiting, *running} & set(task.needs)][
                : workers.count - len(running)
            ]
            for task in ready:
                split = workers.processes if task.kind == "evaluate" else 1
                executor.update_parameters(tasks_per_node=split)
                job = executor.submit(_work, release, task, overwrite, workers.count, secrets.token_hex(32))
                running[task.name], starts[task.name] = (task, job), starts[task.name] + 1
                del waiting[task.name]
                started(task, str(job.job_id))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for name, (task, job) in list(running.items()):
                if not job.done():
                    continue
                del running[name]
                if _killed(job):
                    if starts[name] == _MOST_STARTS:
                        raise ReleaseError(
                            f"the workers of {name} were killed {_MOST_STARTS} times",
                            where=folder,
                            fix="find out what ended them, such as too little memory; then run again",
                        )
                    note(f"a worker of {name} was killed; the task is started again")
                    waiting[name] = task
                else:
                    ended(task)
    finally:
        for _, job in running.values():
            job.cancel()


def _killed(job: Any) -> bool:
    """Whether a worker of a finished job left no result. Raises ``ReleaseError`` with what a worker said."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        said = [text for text in job.results() if text]
    except FailedJobError as error:  # an error that no user can correct, with its traceback
        raise ReleaseError(
            "a worker failed", where=job.paths.stderr, found=str(error).strip()[-700:]
        ) from error
    except UncompletedJobError:
        return True
    if said:
        raise ReleaseError("a worker failed", where=job.paths.stderr, found=said[0])
    return False


def _work(release: Release, task: Task, overwrite: bool, count: int, token: str) -> str:
    """In a worker: run the task; what was wrong, or nothing."""
    import submitit

    job = submitit.JobEnvironment()
    local = max(1, job.num_tasks // job.num_nodes)
    if job.num_tasks > 1:
        os.environ |= {
            "RANK": str(job.global_rank),
            "WORLD_SIZE": str(job.num_tasks),
            "LOCAL_RANK": str(job.local_rank),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "127.0.0.1" if job.num_nodes == 1 else job.hostnames[0],
            "MASTER_PORT": str(20_000 + int(token, 16) % 40_000),  # the same in all, another in each job
            TOKEN: token,
        }
    here = local if task.kind == "evaluate" or job.name() != "local" else count
    threads = release.threads or max(1, default_threads() // here)
    release = replace(release, threads=threads)
    use_threads(threads)
    try:
        with join_ranks() as ranks:
            run_task(release, task, overwrite=overwrite, ranks=ranks)
    except FailedElsewhereError:
        return ""  # another one says why
    except BambaQuantError as error:
        return str(error)
    return ""
