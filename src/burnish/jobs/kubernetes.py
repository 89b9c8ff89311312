"""A TrainJob for Kubeflow Trainer 2.2 or later (`trainer.kubeflow.org/v1alpha1`).

The runtime `torch-distributed` that Kubeflow installs tells torchrun, by `PET_*` variables, how
many nodes there are, where the first one is, and how many processes to start (one per GPU asked
for). The config travels inside the file, so that the containers need not see it.
Source: kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go.
"""

from __future__ import annotations

from typing import Any

from burnish.jobs.documents import write_document
from burnish.jobs.options import Job

RUNTIME = "torch-distributed"
CONTAINER = "node"
"""How that runtime calls its replicated job and the container in it."""

_START = """\
printf '%s' "$BURNISH_CONFIG" > /tmp/burnish.yaml
exec torchrun --module burnish train /tmp/burnish.yaml
"""


def train_job(job: Job, file_name: str) -> str:
    """The TrainJob of a job, as YAML."""
    spec: dict[str, Any] = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": RUNTIME},
        "trainer": _trainer(job),
    }
    if job.options.volume is not None:
        spec["runtimePatches"] = [_volume_patch(job.options.volume)]
    document = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": job.name},
        "spec": spec,
    }
    return write_document(document, _comment(job, file_name))


def _comment(job: Job, file_name: str) -> str:
    lines = [
        f"Written by `burnish launch k8s`; submit it with: kubectl apply -f {file_name}",
        "Paths in the config are paths in the container: data, model and output_dir "
        f"({job.output_dir}) belong on a volume that outlives the pods (--volume CLAIM:/PATH).",
        "A pod that is asked to stop saves a checkpoint first, and a restarted job goes on from it: let the",
        f"runtime {RUNTIME} have terminationGracePeriodSeconds of {job.options.stop_seconds} or more",
        "and failurePolicy.maxRestarts above 0.",
    ]
    return "\n".join(lines)


def _trainer(job: Job) -> dict[str, Any]:
    options = job.options
    resources: dict[str, str | int] = {}
    if options.gpus_per_node:
        resources["nvidia.com/gpu"] = options.gpus_per_node
    if options.cpus_per_node is not None:
        resources["cpu"] = options.cpus_per_node
    if options.memory is not None:
        resources["memory"] = options.memory
    trainer: dict[str, Any] = {
        "image": options.image,
        "numNodes": options.num_nodes,
        "command": ["bash", "-c", _START],
        "env": [
            # Kubernetes would fill in $(NAME); $$( stands for itself.
            {"name": "BURNISH_CONFIG", "value": job.config_text.replace("$(", "$$(")},
            {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(options.stop_seconds)},
        ],
    }
    if resources:
        trainer["resourcesPerNode"] = {"requests": dict(resources), "limits": dict(resources)}
    return trainer


def _volume_patch(volume: str) -> dict[str, Any]:
    """Mount a volume claim into every pod. Kubeflow Trainer before 2.2 has `podTemplateOverrides`
    in the place of `runtimePatches`."""
    claim, path = volume.split(":", 1)
    pod = {
        "volumes": [{"name": "burnish", "persistentVolumeClaim": {"claimName": claim}}],
        "containers": [{"name": CONTAINER, "volumeMounts": [{"name": "burnish", "mountPath": path}]}],
    }
    replicated_job = {"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "manager": "burnish.launch/volume",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated_job]}}},
    }
