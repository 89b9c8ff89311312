"""A SkyPilot task: takes this folder along, and starts torchrun on every node.

torchrun turns every failure into exit code 1, so a managed job cannot tell a hang (75) from a
mistake in the config; it restarts a few times, and `burnish check` stands in front of the training.
Source: SkyPilot's YAML reference, `job_recovery` and the `SKYPILOT_*` variables.
"""

from __future__ import annotations

import shlex
from typing import Any

from burnish.jobs.documents import write_document
from burnish.jobs.options import Job

MAX_RESTARTS = 3
MASTER_PORT = 29_500


def sky_task(job: Job, file_name: str) -> str:
    """The SkyPilot task of a job, as YAML."""
    options = job.options
    resources: dict[str, Any] = {}
    if options.gpus_per_node:
        resources["accelerators"] = f"{options.gpu}:{options.gpus_per_node}"
    if options.cpus_per_node is not None:
        resources["cpus"] = f"{options.cpus_per_node}+"
    if options.memory is not None:
        resources["memory"] = options.memory
    if options.image is not None:
        resources["image_id"] = f"docker:{options.image}"
    resources["job_recovery"] = {"max_restarts_on_errors": MAX_RESTARTS}
    document = {
        "name": job.name,
        "workdir": ".",
        "num_nodes": options.num_nodes,
        "resources": resources,
        "envs": {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(options.stop_seconds)},
        "setup": 'python -m pip install "burnish[deepspeed]"\n',
        "run": _run(job),
    }
    return write_document(document, _comment(job, file_name))


def _comment(job: Job, file_name: str) -> str:
    lines = [
        "Written by `burnish launch skypilot`; start it from this folder:",
        f"  sky jobs launch {file_name}    (goes on by itself after a preemption)",
        f"  sky launch {file_name}         (once)",
        f"To go on after a preemption, output_dir ({job.output_dir}) must be on storage that outlives the",
        "machines and can rename folders: a SkyPilot volume or a network file system, not a mounted bucket.",
    ]
    return "\n".join(lines)


def _run(job: Job) -> str:
    arguments = shlex.join([str(job.config_path), *job.overrides])
    processes = "$SKYPILOT_NUM_GPUS_PER_NODE" if job.options.gpus_per_node else "1"
    return (
        "set -e\n"
        f'if [ "$SKYPILOT_NODE_RANK" -eq 0 ]; then python -m burnish check {arguments}; fi\n'
        "exec torchrun \\\n"
        "  --nnodes $SKYPILOT_NUM_NODES \\\n"
        f"  --nproc_per_node {processes} \\\n"
        "  --node_rank $SKYPILOT_NODE_RANK \\\n"
        '  --master_addr "$(echo "$SKYPILOT_NODE_IPS" | head -n1)" \\\n'
        f"  --master_port {MASTER_PORT} \\\n"
        f"  --module burnish train {arguments}\n"
    )
