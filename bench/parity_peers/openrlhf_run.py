"""OpenRLHF's own SFT code on a CPU. Runs in the environment that `environment.py` makes, not in ours.

    python openrlhf_run.py train JOB.json        its train_sft.py: data, model, engine, loop, saving
    python openrlhf_run.py examples JOB.json     its SFTDataset alone, on rows

Its command line is parsed by its own parser, and its `train()` runs as it is. What cannot run here is
replaced, and `OVERRIDES` names all of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import runpy
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

OVERRIDES = {
    "flash_attn": "its padding helpers in plain torch; attention is sdpa, packed documents too",
    "torch.cuda": "current_device, set_device and synchronize answer for the CPU; the mesh is a CPU mesh",
    "deepspeed": "gloo; AdamW is torch's (torch_adam) instead of DeepSpeed's fused kernel, which needs CUDA",
    "fp32": "for fp32 curves only: its two dtypes, bf16 and fp16, get a third one",
    "adapter": "for LoRA only: the fresh adapter gets the weights that ours starts from",
}
"""What is not OpenRLHF's own, by part."""


def main() -> None:
    """Run one job and write its result to the path that the job names."""
    mode, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    _answer_for_cuda()
    result = train(job) if mode == "train" else examples(job)
    packages = ("openrlhf", "deepspeed", "transformers", "peft", "torch")
    result["versions"] = {name: importlib.metadata.version(name) for name in packages}
    Path(job["result"]).write_text(json.dumps(result), "utf-8")


def train(job: dict[str, Any]) -> dict[str, Any]:
    """`python -m openrlhf.cli.train_sft` with the job's flags; what it wrote to TensorBoard."""
    _alone()
    _adapt_strategy(job["dtype"])
    _attend_by_sdpa()
    if job["adapter"]:
        _start_adapter_from(Path(job["adapter"]))
    consumed = _watch_consumption()
    written = ["--logger.tensorboard_dir", job["logs"], "--logger.wandb.run_name", "run"]
    sys.argv = ["train_sft.py", *job["flags"], *written]
    runpy.run_module("openrlhf.cli.train_sft", run_name="__main__")
    return {"scalars": _scalars(Path(job["logs"]) / "run"), "consumed": consumed, "overrides": OVERRIDES}


def examples(job: dict[str, Any]) -> dict[str, Any]:
    """What its `SFTDataset` makes of rows: token ids, and which of them are targets."""
    from datasets import Dataset
    from openrlhf.datasets import SFTDataset
    from transformers import AutoTokenizer

    found = []
    for case in job["cases"]:
        tokenizer = AutoTokenizer.from_pretrained(case["tokenizer"])
        strategy = SimpleNamespace(args=SimpleNamespace(data=SimpleNamespace(**case["data_flags"])))
        rows = Dataset.from_list(case["rows"])
        options = {"num_processors": 1, **case["options"]}
        made = SFTDataset(rows, tokenizer, case["max_tokens"], strategy, **options)
        found.append([_targets(made[i], tokenizer) for i in range(len(made))])
    return {"cases": found}


def _targets(item: Any, tokenizer: Any) -> dict[str, Any]:
    """The mask stands where a token is predicted; `learned` is where it is, one further."""
    ids, _, mask = (tensor[0].tolist() for tensor in item)
    learned = [False, *(bool(value) for value in mask[:-1])]
    return {"ids": ids, "learned": learned, "texts": [tokenizer.decode([i]) for i in ids]}


# -- what stands in for CUDA and flash-attn ------------------------------------------------------------


def _answer_for_cuda() -> None:
    """Make its modules importable and let its strategy ask for the device."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "stubs"))
    import deepspeed
    import torch

    # Compiled on the first use, for minutes, and not needed by one process.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.set_device = lambda _: None
    cuda.synchronize = lambda: None


def _alone() -> None:
    """One rank of one, as a launcher would say it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update({**rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def _adapt_strategy(dtype: str) -> None:
    """A CPU mesh, torch's AdamW, and fp32 where it is asked for."""
    import openrlhf.utils.utils as helpers
    import torch

    module: Any = importlib.import_module("openrlhf.utils.deepspeed.deepspeed")
    make_mesh, make_config = module.init_device_mesh, module.get_train_ds_config
    to_dtype = helpers.convert_to_torch_dtype

    def config(**arguments: Any) -> dict[str, Any]:
        made = make_config(**{**arguments, "param_dtype": dtype})
        if "optimizer" in made:
            made["optimizer"]["params"]["torch_adam"] = True
        return made

    module.init_device_mesh = lambda _device, *args, **kwargs: make_mesh("cpu", *args, **kwargs)
    module.get_train_ds_config = config
    helpers.convert_to_torch_dtype = lambda name: torch.float32 if dtype == "fp32" else to_dtype(name)


def _attend_by_sdpa() -> None:
    """Its packing insists on flash_attention_2. With sdpa transformers masks by position ids."""
    from openrlhf.models import Actor

    build = Actor.__init__

    def build_with_sdpa(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **{**kwargs, "attn_implementation": "sdpa"})

    Actor.__init__ = build_with_sdpa


def _start_adapter_from(folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    actor: Any = importlib.import_module("openrlhf.models.actor")
    wrap = actor.get_peft_model

    def wrap_and_copy(model: Any, config: Any) -> Any:
        adapted = wrap(model, config)
        report = set_peft_model_state_dict(adapted, load_file(folder / "adapter_model.safetensors"))
        if report.unexpected_keys or any("lora_" in key for key in report.missing_keys):
            raise RuntimeError(f"the adapters have other weights: {report}")
        return adapted

    actor.get_peft_model = wrap_and_copy


def _watch_consumption() -> list[int]:
    """Note which example is read when: with no loader process that is the order of training."""
    from openrlhf.datasets import SFTDataset

    consumed: list[int] = []
    read = SFTDataset.__getitem__

    def read_and_note(self: Any, index: int) -> Any:
        consumed.append(int(index))
        return read(self, index)

    SFTDataset.__getitem__ = read_and_note
    return consumed


def _scalars(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


if __name__ == "__main__":
    main()
