"""An sbatch script: one task per GPU, saves before its time is up, and goes on where it stopped.

How it ends and goes on:

- `--signal=B:USR1@S` wakes the script, and it alone, S seconds before the time limit (and at
  preemption, where the cluster sets `send_user_signal`). It passes SIGTERM on to the tasks, which
  finish their step, save and exit with 143; then the job puts itself back into the queue. Not
  SIGTERM itself for the early signal: a second SIGTERM ends a task at once, and `scancel` sends one.
- Exit code 75 (a rank hung, a host fell away) also goes back into the queue.
- `scancel` sends SIGTERM to the tasks directly: they save too, and the job ends for good.
- When one task fails the others are not killed at once: each finds out by itself, saves its stacks
  and ends within `launch.hang_timeout_seconds`; `--wait` is the last resort.
"""

from __future__ import annotations

import shlex

from burnish.errors import EXIT_TRY_AGAIN
from burnish.jobs.options import Job

WAIT_SECONDS = 3600
"""At most between the end of the first task and that of the last: rank 0 may still be exporting."""
MAX_RESTARTS = 100
"""A run that hangs every time is not put back forever. Slurm counts every restart of a job."""

_SCRIPT = """\
#!/bin/bash
# Written by `burnish launch slurm`; submit it from this folder: sbatch {file_name}
{directives}

set -u
asked=0
woken=0
on_early_signal() {{
    asked=1
    woken=1
    # The tasks finish their step, save a checkpoint and exit with 143.
    kill -TERM "$tasks"
}}
trap on_early_signal USR1
trap woken=1 TERM  # scancel reaches the tasks by itself; stay to see them end
{environment}
srun --kill-on-bad-exit=0 --wait={wait_seconds}{cpus} \\
    {command} &
tasks=$!

# `wait` also returns when a signal arrives, and then with the signal's code, even if srun ended meanwhile.
# 127: there is nothing left to wait for, the code was told before.
code=127
while woken=0; wait "$tasks"; told=$?; do
    [ "$told" -eq 127 ] || code=$told
    [ "$woken" -eq 1 ] || break
done

# {try_again}: a rank hung or a host fell away. Anything else that was not asked for is for you to mend.
again=$asked
[ "$code" -eq {try_again} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ] && again=1
if [ "$code" -ne 0 ] && [ "$again" -eq 1 ]; then
    echo "Exit code $code: back into the queue, to go on from the last checkpoint."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def slurm_script(job: Job, file_name: str) -> str:
    """The sbatch script of a job."""
    cpus = _cpus_per_task(job)
    return _SCRIPT.format(
        file_name=shlex.quote(file_name),
        directives="\n".join(f"#SBATCH --{directive}" for directive in _directives(job)),
        environment="" if cpus is None else f"export OMP_NUM_THREADS={cpus}\n",
        wait_seconds=WAIT_SECONDS,
        # srun does not take this over from sbatch since Slurm 22.05.
        cpus="" if cpus is None else f" --cpus-per-task={cpus}",
        command=shlex.join(
            [job.options.python, "-m", "burnish", "train", str(job.config_path), *job.overrides]
        ),
        try_again=EXIT_TRY_AGAIN,
        max_restarts=MAX_RESTARTS,
    )


def _cpus_per_task(job: Job) -> int | None:
    cpus = job.options.cpus_per_node
    return None if cpus is None else cpus // job.tasks_per_node


def _directives(job: Job) -> list[str]:
    options = job.options
    given = {
        "partition": options.partition,
        "account": options.account,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": _cpus_per_task(job),
        "mem": options.memory,
    }
    return [
        f"job-name={job.name}",
        f"nodes={options.num_nodes}",
        f"ntasks-per-node={job.tasks_per_node}",
        *(f"{name}={value}" for name, value in given.items() if value is not None),
        f"time={options.time}",
        f"signal=B:USR1@{options.stop_seconds}",
        "requeue",
        "open-mode=append",
        "output=slurm-%x-%j.out",
    ]
