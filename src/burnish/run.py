"""The whole run, in the order the data moves. The file to read first.

config ─► data: load ► format ► render+mask ► (prepared cache) ─► plan: windows, memory
                                                                    │
                       model: load ► adapt ──► engine ──► train loop ◄┘
                                                            │
                                  evaluate · checkpoint · metrics ─► export ─► report
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

from burnish.checkpoint.fingerprints import fingerprints, require_same, what_ranks_share
from burnish.checkpoint.lock import only_run
from burnish.checkpoint.resume import with_its_engine
from burnish.config.schema import Config
from burnish.data.count import count_windows
from burnish.data.prefixes import Prefixes
from burnish.data.prepare import prepare
from burnish.data.tokenizer import load_tokenizer, padding_id, serialised, vocabulary_of
from burnish.data.vocabulary import require_rows
from burnish.data.windows import eval_cuts, plan_windows
from burnish.engine.build import build_engine, model_init_context, parameter_dtype
from burnish.export import Exporter
from burnish.host_memory import FreedMemory, bound_kernel_caches
from burnish.metrics import MetricsWriter
from burnish.model.attention import asked, can_isolate
from burnish.model.build import build_model
from burnish.model.compiled import cannot_compile, compile_layers
from burnish.model.foresee import shape_of
from burnish.model.forward import SupervisedModel
from burnish.model.load import load_model_config, stored_dtype
from burnish.model.objective import Objective
from burnish.plan import explain_auto, make_plan, resolve_auto, resolve_compile, unshared
from burnish.report.run_files import write_run_files
from burnish.runtime import (
    device_memory_bytes,
    log,
    pick_device,
    quieten_libraries,
    ranks_from_environment,
    smallest_over_ranks,
    start_process_group,
)
from burnish.train import loop
from burnish.train.step import Feed


def train(config: Config) -> Path:
    """Train as the config says. Every rank calls this; it returns when the result is exported.

    Returns:
        The folder of the result.

    Raises:
        BurnishError: Whatever the user has to mend; its `exit_code` says of which kind it is.
    """
    ranks = ranks_from_environment()
    device = pick_device(ranks)
    bound_kernel_caches(device)
    quieten_libraries()
    run_dir, config = Path(config.output_dir), with_its_engine(config)

    # Data first: it needs no other rank, so nobody waits inside a collective while it is prepared.
    tokenizer, template = load_tokenizer(config.model, config.data)
    data = prepare(config, tokenizer, template)
    vocabulary = vocabulary_of(tokenizer, config.model, config.adapter)
    model_config = load_model_config(config.model)
    shape = shape_of(model_config).grown(vocabulary)
    require_rows(tokenizer, shape.vocab_size, (data.train, data.eval))

    start_process_group(ranks, device, config.launch.hang_timeout_seconds)
    with only_run(run_dir, ranks):
        made_from = fingerprints(config, serialised(tokenizer), template, data.fingerprint)
        require_same({**made_from, **what_ranks_share(config, data.eval)}, ranks)
        memory = smallest_over_ranks(device_memory_bytes(device, ranks), ranks)
        asked_for, world = config, (shape, ranks.world_size)
        config = resolve_auto(config, *world, memory, device.type)
        freed = FreedMemory(device)
        dtype = parameter_dtype(config, ranks, stored_dtype(config.model, model_config))
        context = partial(model_init_context, config, ranks, device, dtype)
        model = build_model(config, dtype, vocabulary, shape.new_tokens, context)
        capability = can_isolate(model, *asked(config))
        sharing = config.engine.sequence_parallel
        parts, layout = max(1, ranks.world_size // sharing), (capability.packed, shape.cost_model(), sharing)
        prefixes = Prefixes(data.train, unshared(config, device.type, capability.unshared))
        windows = plan_windows(data.train, config.data, config.batch, config.train, parts, *layout, prefixes)
        counts = count_windows(windows, data.train)
        able = cannot_compile(model, capability, device) is None
        config = resolve_compile(config, counts, shape, device.type, able)
        choices = explain_auto(asked_for, config, memory)
        plan = make_plan(config, counts, *world, None, device.type, choices, memory)
        log.info("%s\n%s", plan.describe(), capability.reason)

        freed.settle(plan.memory.device.kept > 0, plan.memory.over_process)
        compile_layers(model, capability, device, config.model.compile is True)
        supervised = SupervisedModel(model, capability, Objective.of(config.train))
        engine = build_engine(config, ranks, device, supervised)
        exporter = Exporter(config, engine, model, tokenizer, template, ranks)
        named = {"num_steps": windows.num_steps, "run_config": config.model_dump()}
        recorder = MetricsWriter(run_dir, config.log.trackers, ranks, **named)
        job = loop.TrainJob(
            config=config,
            engine=engine,
            ranks=ranks,
            windows=windows,
            feed=Feed(data.train, capability.packed, padding_id(tokenizer)),
            eval_store=data.eval,
            eval_cuts=eval_cuts(data.eval, config.batch, parts, *layout) if data.eval else None,
            recorder=recorder,
            freed=freed,
            fingerprints=made_from,
            export_best=lambda state: exporter.export(run_dir / "best", state),
            export_final=lambda state: exporter.export(run_dir / "final", state),
            on_start=lambda: write_run_files(run_dir, config, plan, data.report, ranks),
        )
        with closing(recorder):
            loop.train(job)
    return run_dir / "final"
