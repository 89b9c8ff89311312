"""The verbs. They parse and print; what they do is elsewhere, imported when a verb needs it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from burnish import __version__
from burnish.config.plan_options import PlanOptions
from burnish.errors import EXIT_CONFIG, EXIT_ENVIRONMENT, BurnishError, machine_limits
from burnish.jobs.options import JobOptions
from burnish.rendezvous import without_launcher_flags
from burnish.streams import reader_may_leave, settle_streams

if TYPE_CHECKING:
    from burnish.config.schema import Config

Flags = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
"""CONFIG and dotted flags, in any order of flags, the file first."""
AsJson = Annotated[bool, Parameter(name="--json", negative=())]
_USAGE = "Usage: burnish {} [OPTIONS] [{}] [--SECTION.KEY VALUE]..."

app = App(
    name="burnish",
    version=__version__,
    help="Supervised fine-tuning that can be trusted. Start with `burnish demo`, or "
    "`burnish init DATA --model MODEL`. `burnish VERB --help` tells more, `--help-all` every key.",
    help_flags=["--help", "-h"],
)
ckpt = App(name="ckpt", help="What a run can go on from: `ls`, `verify`, `prune`.")
app.command(ckpt)


@app.command
def demo(*, out: Path = Path("runs/demo")) -> None:
    """Make a tiny model and data, train, and answer held-out prompts before and after.

    On the CPU, without a network, in minutes.

    Parameters
    ----------
    out:
        Where everything goes.
    """
    _log_to_stderr()
    from burnish.demo.show import show

    show(out)


@app.command
def init(*data: str, model: str = "MODEL", out: Path = Path("sft.yaml"), force: bool = False) -> None:
    """Look at data and write a commented config that `train` takes as it is.

    Parameters
    ----------
    data:
        Files, folders, globs or hub names.
    model:
        Hub name or folder of the base model.
    out:
        The config file to write.
    force:
        Write over a file that is there.
    """
    from burnish.starter import write_config

    for line in write_config(data, model, out, force):
        _say(line)


@app.command(usage=_USAGE.format("check", "CONFIG"))
def check(*config: Flags, as_json: AsJson = False) -> None:
    """Check CONFIG, data, template and tokens; print the data report. Loads no weights.

    Parameters
    ----------
    as_json:
        Print the report as JSON.
    """
    _log_to_stderr()
    from burnish.preview import check_data

    report, text = check_data(_load(config, to_write=True))
    _say(json.dumps(report, indent=2) if as_json else text)


@app.command(usage=_USAGE.format("view", "CONFIG"))
def view(
    *config: Flags,
    num: Annotated[int | None, Parameter(name=["-n", "--num"])] = None,
    html: Path | None = None,
    as_json: AsJson = False,
    source: str | None = None,
    row: str | None = None,
) -> None:
    """Show examples of CONFIG as the model will see them, trained tokens in colour.

    Parameters
    ----------
    num:
        How many examples.
    html:
        Write a page there instead.
    as_json:
        One line of JSON per example: source, row, tokens, warnings.
    source:
        Only this source.
    row:
        Only this row: `train.jsonl:12`, or `12`.
    """
    _log_to_stderr()
    from rich.console import Console

    from burnish.view import view as show

    show(_load(config), Console(), num, html, as_json, source, row, aside=Console(stderr=True))
    if html is not None:
        print(f"Wrote {html}.", file=sys.stderr)  # noqa: T201


@app.command(usage=_USAGE.format("plan", "CONFIG"))
def plan(
    *config: Flags,
    options: Annotated[PlanOptions, Parameter(name="*")] = PlanOptions(),  # noqa: B008 - frozen
    as_json: AsJson = False,
) -> None:
    """Say what training with CONFIG will do: steps, micro-batches, memory, time, disk.

    Parameters
    ----------
    as_json:
        Print plan.json.
    """
    _log_to_stderr()
    from burnish.preview import plan_run

    planned = plan_run(_load(config), options)
    _say(json.dumps(planned.to_dict(), indent=2) if as_json else planned.describe())


@app.command(usage=_USAGE.format("train", "CONFIG"))
def train(*config: Flags) -> None:
    """Train as CONFIG says. Keys may be given as flags; flags win over the file.

    `burnish train sft.yaml --optim.lr 2e-5 --train.epochs 2`, or without a file
    `burnish train --model.path M --data.train d.jsonl --output_dir out`.

    What people set most (`--help-all` lists every key): `--model.path`, `--data.train`,
    `--data.eval_fraction`, `--data.max_tokens`, `--data.chat_template`, `--adapter.rank` (LoRA),
    `--adapter.quantize nf4` (QLoRA), `--batch.global_examples`, `--batch.micro_tokens`, `--optim.lr`,
    `--train.epochs`, `--engine.zero_stage`, `--launch.num_processes`, `--checkpoint.every_steps`,
    `--checkpoint.resume`, `--output_dir`.

    Starts one process per GPU, or one on a machine without; works under torchrun, deepspeed and srun.
    Run the same command again to go on from the newest whole checkpoint.
    """
    from burnish.config.packages import require_packages
    from burnish.launch import launch, num_workers
    from burnish.runtime import ranks_from_environment

    loaded = _load(config, to_write=True)
    count = num_workers(loaded.launch)
    require_packages(loaded, max(count, ranks_from_environment().world_size))
    if count > 1:
        sys.exit(launch(count, [sys.executable, "-m", "burnish", "train", *config]))
    _log_to_stderr()
    from burnish.report.run_report import write_report
    from burnish.run import train as run

    result = run(loaded)
    if ranks_from_environment().is_main:
        write_report(result.parent)
        _say(f"The result is in {result}. Talk to it: burnish chat {result}")


@app.command(usage=_USAGE.format("launch SCHEDULER", "CONFIG"))
def launch(
    scheduler: Literal["slurm", "k8s", "skypilot"],
    *config: Flags,
    out: Path | None = None,
    options: Annotated[JobOptions, Parameter(name="*")] = JobOptions(),  # noqa: B008 - frozen
) -> None:
    """Write the job file that trains with CONFIG on a cluster; submit nothing.

    Takes dotted flags like `train`; they go into the job.

    Parameters
    ----------
    scheduler:
        slurm (an sbatch script), k8s (a Kubeflow TrainJob) or skypilot (a task).
    out:
        The file to write; named after the job, in this folder, unless given.
    """
    from burnish.jobs.write import write_job

    for line in write_job(scheduler, config, options, out):
        _say(line)


@app.command(name="eval", usage=_USAGE.format("eval", "CONFIG|MODEL"))
def evaluate(*target: Flags, data: list[str] | None = None, as_json: AsJson = False) -> None:
    """Token-weighted loss and perplexity, per source, of CONFIG's result or of a MODEL folder.

    Takes dotted flags like `train`, for example `--data.chat_template`.

    Parameters
    ----------
    data:
        Files to evaluate on; unless given, what a CONFIG's training evaluates on.
    as_json:
        Print one line like metrics.jsonl's.
    """
    _log_to_stderr()
    from burnish.scoring import score

    _say(score(target, data or [], as_json))


@app.command
def chat(model: str, *, prompt: str | None = None, system: str | None = None, max_tokens: int = 512) -> None:
    """Talk to a model or adapter.

    Parameters
    ----------
    model:
        Folder or hub name, for example runs/first/final.
    prompt:
        Answer this one and end.
    system:
        A system turn to begin with.
    max_tokens:
        Longest answer.
    """
    _log_to_stderr()
    from burnish.talk import talk

    talk(model, prompt, system, max_tokens)


@app.command
def merge(adapter: Path, out: Path, *, dtype: Literal["bf16", "fp16", "fp32"] = "bf16") -> None:
    """Merge ADAPTER and its base to a full model in OUT, and show how far the two differ.

    Parameters
    ----------
    adapter:
        A run's final/ folder, or any peft folder.
    out:
        A folder that does not exist yet.
    dtype:
        What the merged weights are kept in.
    """
    _log_to_stderr()
    from burnish.export.merge import merge as do

    proof = do(adapter, out, dtype)
    _say(f"Wrote {out} ({dtype}). Against base and adapter in fp32, on {proof.num_tokens} probe tokens:")
    _say(f"  largest difference of a logit  {proof.max_abs_logit:.3g}")
    _say(f"  KL divergence, mean and max    {proof.mean_kl:.3g}, {proof.max_kl:.3g} nats")
    _say(f"  same likeliest next token      {proof.same_top_token:.1%}")


@app.command
def report(run: Path, *, out: Path | None = None) -> None:
    """Write RUN (an output_dir) as one self-contained HTML page.

    Parameters
    ----------
    run:
        The run's folder.
    out:
        The page; RUN/report.html unless given.
    """
    from burnish.report.run_report import write_report

    _say(f"Wrote {write_report(run, out)}.")


@ckpt.command(name="ls")
def ckpt_ls(run: Path) -> None:
    """List RUN's checkpoints, newest first."""
    from burnish.checkpoint.listing import checkpoint_table

    _say("\n".join(checkpoint_table(run, verify=False)[0]))


@ckpt.command(name="verify")
def ckpt_verify(run: Path) -> None:
    """Read every byte of RUN's checkpoints; exit code 4 where one is damaged."""
    from burnish.checkpoint.listing import checkpoint_table

    lines, is_damaged = checkpoint_table(run, verify=True)
    _say("\n".join(lines))
    sys.exit(EXIT_ENVIRONMENT if is_damaged else 0)


@ckpt.command(name="prune")
def ckpt_prune(run: Path, *, keep: int = 2) -> None:
    """Remove old checkpoints of RUN; the newest that verifies and the best stay.

    Parameters
    ----------
    keep:
        How many to keep.
    """
    from burnish.checkpoint.retention import prune_verified

    _say("\n".join(f"removed {path}" for path in prune_verified(run, keep)) or "Nothing to remove.")


@app.command
def doctor(*, folder: Path = Path(), ranks: int | None = None) -> None:
    """Look at devices, driver, compiler, packages and disk, and let ranks talk to each other.

    Parameters
    ----------
    folder:
        Where runs would be written.
    ranks:
        How many processes to try; one per GPU, or two on a CPU, unless given.
        Under srun, torchrun or deepspeed the ranks that it started are tried.
    """
    from burnish.doctor import examine, examine_ranks
    from burnish.runtime import ranks_from_environment

    me = ranks_from_environment()
    findings = [*examine(folder), examine_ranks(me, ranks)]
    for finding in findings:
        if me.is_main or finding.state == "bad":
            _say(str(finding) if me.is_main else f"[rank {me.rank}] {finding}")
    sys.exit(EXIT_ENVIRONMENT if any(finding.state == "bad" for finding in findings) else 0)


@app.command
def schema() -> None:
    """Print the config's JSON schema, for editors."""
    from burnish.config.names import config_schema

    _say(json.dumps(config_schema(), indent=2))


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; the only place where errors become messages and exit codes."""
    tokens = without_launcher_flags(sys.argv[1:] if argv is None else argv)
    settle_streams()
    try:
        with machine_limits(tokens[0] if tokens else ""), reader_may_leave():
            if "--help-all" in tokens:
                from burnish.config.help import all_keys_text

                return _say(all_keys_text())
            app(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(str(error).strip(), EXIT_CONFIG)
    except BurnishError as error:
        _fail(str(error), error.exit_code, error.heading, error.everywhere)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _load(tokens: Sequence[str], to_write: bool = False) -> Config:
    """The config of a command line: at most one file, first, then flags; `to_write` tries its output_dir."""
    from burnish.config.load import load_config
    from burnish.config.run_folder import require_output_dir
    from burnish.runtime import ranks_from_environment

    file = Path(tokens[0]) if tokens and not tokens[0].startswith("-") else None
    config = load_config(file, tokens[1:] if file else tokens)
    if to_write and ranks_from_environment().is_main:
        require_output_dir(config)
    return config


def _log_to_stderr() -> None:
    from burnish.runtime import ranks_from_environment, setup_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    setup_logging(ranks_from_environment())


def _say(text: str) -> None:
    print(text)  # noqa: T201


def _fail(message: str, exit_code: int, heading: str = "", everywhere: bool = False) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"[rank {rank}] "
    head = f"{heading}:\n" if heading else ""
    sys.stdout.flush()
    if rank == "0" or not everywhere:  # rank 0 tells for all what all of them have to tell
        print(f"{where}burnish: {head}{message}", file=sys.stderr)  # noqa: T201
    sys.exit(exit_code)
