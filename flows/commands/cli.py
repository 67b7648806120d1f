"""The command line ``rlhf``. Exit codes: 0 done, 1 a stage failed, 2 bad input, 130 interrupted.

Nothing heavy is imported before it is needed: planning, and a run of which all is up to date, load neither torch nor
Prefect nor MLflow.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from flows.commands import cache, champion, compare, generate, report, sheet, summary
from flows.team import up
from rlhf.cache import Planner, Selection, StagePlan
from rlhf.config import PipelineConfig, dump, load, presets
from rlhf.errors import ConfigError, InputError, RlhfError
from rlhf.runs import headlines, read_runs
from rlhf.stages import STAGES
from rlhf.store import STORE_VARIABLE, Store, home_directory, named_if_full, open_store

if TYPE_CHECKING:
    from flows.team.server import Server

DEFAULT_SOURCE = "demo"
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class _Console(Console):
    """Rich's own ends the program with exit code 1 when the reader of its output has gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    console, errors = _Console(), Console(stderr=True)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the user's reward functions live there; last, so that nothing is hidden
    if getattr(options, "store", None) is not None:
        os.environ[STORE_VARIABLE] = options.store  # for this process's flows and for its children
    try:
        return int(options.command(options, console) or DONE)
    except InputError as error:
        errors.print(f"rlhf: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return BAD_INPUT
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (RlhfError, OSError, RuntimeError) as error:
        errors.print(
            f"rlhf: {type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        if os.environ.get("RLHF_TRACEBACK"):
            raise
        errors.print("RLHF_TRACEBACK=1 shows where.", style="dim")
        return FAILED
    except KeyboardInterrupt:
        errors.print("rlhf: interrupted; the next run goes on from the last checkpoint")
        return INTERRUPTED


def _run(options: argparse.Namespace, console: Console) -> int:
    config, store, selection = _config(options), _store(options), _selection(options)
    plans = Planner(config, store, selection).plan()
    if all(plan.action == "cached" and not plan.place for plan in plans):
        for plan in plans:
            store.touch(plan.stage, str(plan.key))
        store.send_unsent()
    else:
        if not options.json:
            summary.print_plan(plans, console)
        _execute(config, selection, store, Console(stderr=True) if options.json else console)
        console.print() if not options.json else None
        plans = Planner(config, store, Selection(until=selection.only or selection.until)).plan()
    if options.json:
        print(json.dumps({"stages": [_plan_row(plan) | {"metrics": _metrics(plan)} for plan in plans]}, indent=1))
    else:
        up_to_date = all(plan.action == "cached" for plan in plans)
        summary.print_result(config, plans, store, console, up_to_date=up_to_date, words=_words(options))
    return DONE


def _execute(config: PipelineConfig, selection: Selection, store: Store, console: Console) -> None:
    """Run the Prefect flow in this process."""
    from flows.display import make_display

    server = _server(store)
    from flows.pipeline import NONE, pipeline, watcher
    from flows.team.heartbeats import looked_after

    if server is not None:
        server.wait()
    display = make_display(console)
    token = watcher.set(display)
    try:
        with looked_after(), named_if_full(store.home):  # Prefect's own database is there, too
            pipeline(
                config,
                only=selection.only or NONE,
                from_stage=selection.start or NONE,
                until=selection.until or NONE,
                refresh=sorted(selection.refresh),
            )
    finally:
        display.close()
        watcher.reset(token)


def _server(store: Store) -> Server | None:
    """Set Prefect up, before it is imported; its server, if it has to be started."""
    from flows.team.server import configure, connect

    os.environ["RLHF_HOME"] = str(store.home)
    configure(store.home)
    return connect(store.home)


def _sweep(options: argparse.Namespace, console: Console) -> None:
    _config(options)
    if server := _server(_store(options)):
        server.wait()
    from flows.sweep import sweep
    from flows.team.heartbeats import looked_after

    where: Literal["ray", "processes"] = "ray" if options.ray else "processes"
    with looked_after():
        done = sweep(options.source, options.size or "", options.set or [], options.over, options.runs, where)
    if options.json:
        print(json.dumps(done, indent=1))
        return
    rows = []
    for name, run in done.items():
        computed = " ".join(stage for stage, row in run["stages"].items() if not row["cached"])
        rows.append((name, run["run_id"], "  ".join(run["settings"]), computed))
    summary.print_table(("pipeline", "run", "settings", "computed; the rest came from the cache"), rows, console)


def _plan(options: argparse.Namespace, console: Console) -> None:
    plans = Planner(_config(options), _store(options), _selection(options)).plan()
    if options.json:
        print(json.dumps([_plan_row(plan) for plan in plans], indent=1))
    else:
        summary.print_plan(plans, console)


def _presets(options: argparse.Namespace, console: Console) -> None:
    if options.json:
        print(json.dumps([preset._asdict() for preset in presets().values()], indent=1))
        return
    summary.print_presets(presets().values(), console)


def _show(options: argparse.Namespace, console: Console) -> None:
    config = _config(options)
    print(json.dumps(config.model_dump(mode="json"), indent=1) if options.json else dump(config), end="")


def _validate(options: argparse.Namespace, console: Console) -> None:
    config = _config(options)
    Planner(config, _store(options)).plan()  # the files and functions that it names are there
    from rlhf.prepare import check

    checked = check(config)  # every row is as it must be
    rows = ", ".join(f"{sized.kept} {kind}" for kind, sized in checked.kinds.items())
    console.print(f"{options.source}: valid; pipeline {config.name!r}, {rows}", highlight=False, markup=False)


def _deploy(options: argparse.Namespace, console: Console) -> None:
    config = _config(options)
    if "PREFECT_API_URL" not in os.environ:
        raise ConfigError(
            "deploy puts deployments on a Prefect server, but PREFECT_API_URL does not name one; `rlhf up` starts one "
            "and prints its address (add /api)"
        )
    import httpx

    from flows.team.deployments import apply, schedule, shipped

    configs = {one.name: one for one in [*(shipped() if options.shipped else []), config]}
    try:
        found = [schedule(config, options.cron, options.timezone, options.pool)] if options.cron else []
        found += apply(configs.values(), options.pool)
    except httpx.HTTPError as error:
        raise ConfigError(
            f"PREFECT_API_URL is {os.environ['PREFECT_API_URL']!r}, where deploying failed ({type(error).__name__}: "
            f"{error}); start the Prefect server (`rlhf up` does), or correct the address, which ends with /api"
        ) from None
    for made in found:
        console.print(f"{made.name}  {made.id}", highlight=False, markup=False, soft_wrap=True)


def _runs(options: argparse.Namespace, console: Console) -> None:
    records = read_runs(home_directory(options.home))
    if options.json:
        print(json.dumps([vars(record) for record in records], indent=1))
        return
    if not records:
        console.print("No run yet: rlhf run")
        return
    rows = []
    for record in records[-options.last :]:
        began = time.strftime("%d %b %H:%M", time.localtime(record.started))
        took = headlines.duration(record.ended - record.started) if record.ended else ""
        stages = " ".join(f"{name}{'' if row['cached'] else '*'}" for name, row in record.stages.items())
        rows.append((record.id, record.pipeline, record.status, began, took, stages))
    summary.print_table(("run", "pipeline", "status", "began", "took", "stages (* computed)"), rows, console)


def _count(text: str) -> int:
    """An option that counts something: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def _config(options: argparse.Namespace) -> PipelineConfig:
    return load(options.source, size=options.size, overrides=options.set or [])


def _words(options: argparse.Namespace) -> str:
    """What says on a command line which configuration this is, and where its artifacts are."""
    given = [] if options.source == DEFAULT_SOURCE else [options.source]
    for name in ("size", "store", "home"):
        given += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    return shlex.join([*given, *(word for text in options.set or [] for word in ("--set", text))])


def _store(options: argparse.Namespace) -> Store:
    return open_store(options.home)


def _selection(options: argparse.Namespace) -> Selection:
    return Selection(options.only, options.start, options.until, frozenset(options.refresh or ()))


def _plan_row(plan: StagePlan) -> dict[str, Any]:
    return {"stage": plan.stage, "action": plan.action, "reasons": list(plan.reasons), "key": plan.key}


def _metrics(plan: StagePlan) -> dict[str, float]:
    return plan.manifest.metrics if plan.manifest else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf", description="RLHF as a cached pipeline: prepare, sft, judge, reward, ppo, evaluate."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    home = argparse.ArgumentParser(add_help=False)
    home.add_argument("--home", help="folder of all state (default: $RLHF_HOME, else .rlhf)")
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument("--store", metavar="URL", help="store that machines share (default: $RLHF_STORE, else none)")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON, for a program to read")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "source", nargs="?", default=DEFAULT_SOURCE, metavar="PRESET|FILE", help="preset or YAML file (default: demo)"
    )
    source.add_argument("--size", help="a size that the preset offers, such as smoke")
    source.add_argument("--set", action="append", metavar="K=V", help="override one value: --set ppo.kl_coef=0.1")
    select = argparse.ArgumentParser(add_help=False)
    stages: dict[str, Any] = {"choices": tuple(STAGES), "metavar": "STAGE"}
    select.add_argument("--only", **stages, help="compute this stage anew and nothing else")
    select.add_argument("--from", dest="start", **stages, help="compute this stage and all after it anew")
    select.add_argument("--until", **stages, help="nothing after this stage")
    select.add_argument("--refresh", action="append", **stages, help="compute this stage anew, the others as needed")

    def add(name: str, function: Any, about: str, *parents: argparse.ArgumentParser, to: Any = commands) -> Any:
        command = to.add_parser(name, help=about, description=about, parents=[*parents, home])
        command.set_defaults(command=function)
        return command

    add("run", _run, "Run the pipeline; what is up to date comes from the cache.", source, select, store, as_json)
    add("plan", _plan, "Show which stages are cached, which would run, and why.", source, select, store, as_json)
    sweep = add("sweep", _sweep, "Run the pipeline for every combination of some values.", source, store, as_json)
    sweep.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="K=[V,...]",
        help="values to try: --over ppo.kl_coef=[0.02,0.1]",
    )
    sweep.add_argument("--runs", type=_count, default=2, help="most runs at once (default: 2)")
    sweep.add_argument("--ray", action="store_true", help="on a Ray cluster that sees the same home folder")
    add("presets", _presets, "List the presets.", as_json)
    add("show", _show, "Print the whole configuration of a preset or file.", source, as_json)
    add("validate", _validate, "Check a configuration and every row of the data that it names.", source, store)
    generate.add_arguments(add("generate", generate.generate, generate.ABOUT, store, as_json))
    runs = add("runs", _runs, "List the runs on this machine.", as_json)
    runs.add_argument("--last", type=_count, default=20, help="how many (default: 20)")
    compare.add_diff_arguments(add("diff", compare.diff, compare.ABOUT_DIFF, as_json))
    compare.add_compare_arguments(add("compare", compare.compare, compare.ABOUT_COMPARE, as_json))
    report.add_arguments(add("report", report.report, report.ABOUT, as_json))
    champion.add_arguments(add("champion", champion.command, champion.ABOUT, store, as_json))
    sheet.add_arguments(add("sheet", sheet.sheet, sheet.ABOUT, store, as_json))
    up.add_arguments(add("up", up.up, up.ABOUT, store))
    deploy = add("deploy", _deploy, "Put deployments on the Prefect server of PREFECT_API_URL.", source)
    deploy.add_argument("--cron", help="when to look for something new and retrain, such as '0 3 * * *'")
    deploy.add_argument("--timezone", default="UTC", help="time zone of --cron (default: UTC)")
    deploy.add_argument(
        "--shipped", action="store_true", help="and each preset whose data is on a hub or comes with this package"
    )
    deploy.add_argument("--pool", default="rlhf", help="work pool that runs them (default: rlhf)")
    group = commands.add_parser("cache", help="Look at the artifact store, check it, clean it.")
    verbs = group.add_subparsers(required=True, metavar="VERB")
    add("ls", cache.ls, "List the artifacts.", as_json, to=verbs)
    add("verify", cache.verify, "Hash every file of every artifact.", to=verbs)
    add("send", cache.send, "Send the shared store every artifact that it lacks.", store, to=verbs)
    gc = add(
        "gc", cache.gc, "Delete artifacts that neither the last runs of each pipeline nor its champion used.", to=verbs
    )
    gc.add_argument("--keep", type=_count, default=5, help="runs of each pipeline to keep (default: 5)")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    return parser


if __name__ == "__main__":
    sys.exit(main())
