"""``rlhf cache``: looking at the artifact store, checking it, sending it, cleaning it."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from rich.console import Console

from flows.commands import options as given, summary
from rlhf import champions
from rlhf.errors import ArtifactError, ConfigError
from rlhf.runs import read_runs
from rlhf.store import STORE_VARIABLE, Manifest, SharingStore, Store, artifacts, disk, home_directory, open_store

ABOUT = "Look at the artifact store, check it, clean it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verbs of the command, and the options of each."""
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb, about, options in (
        (ls, "List the artifacts.", [given.add_json]),
        (verify, "Hash every file of every artifact.", []),
        (send, "Send the shared store every artifact that it lacks.", [given.add_store]),
        (gc, "Delete artifacts that neither the last runs of each pipeline nor its champion used.", [_add_keep]),
    ):
        one = verbs.add_parser(verb.__name__, help=about, description=about)
        one.set_defaults(verb=verb)
        for add in (*options, given.add_home):
            add(one)


def command(options: argparse.Namespace, console: Console) -> int | None:
    """Do what the verb says; the exit code."""
    code: int | None = options.verb(options, console)
    return code


def _add_keep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=given.count, default=5, help="runs of each pipeline to keep (default: 5)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def ls(options: argparse.Namespace, console: Console) -> None:
    """List the artifacts."""
    store = Store(home_directory(options.home))
    rows: list[dict[str, Any]] = []
    for path in store.artifacts():
        stage, key = path.parent.name, path.name
        try:
            manifest: Manifest | None = store.open(stage, key)
            state = "ok"
        except ArtifactError as error:
            manifest, state = store.remembered(stage, key), str(error)
        rows.append({
            "stage": stage, "key": key, "bytes": manifest.size if manifest else None, "state": state,
            "pipeline": manifest.pipeline if manifest else None, "last_used": store.last_used(stage, key),
        })  # fmt: skip
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    table = [
        (r["stage"], r["key"][:12], r["pipeline"] or "", disk.size(r["bytes"] or 0),
         time.strftime("%Y-%m-%d %H:%M", time.localtime(r["last_used"])), r["state"])
        for r in rows
    ]  # fmt: skip
    summary.print_table(("stage", "key", "pipeline", "size", "last used", "state"), table, console)
    console.print(
        f"{len(rows)} artifacts, {disk.size(sum(r['bytes'] or 0 for r in rows))} in {store.root}", soft_wrap=True
    )


def verify(options: argparse.Namespace, console: Console) -> int:
    """Hash every file of every artifact; the exit code."""
    store = Store(home_directory(options.home))
    damaged = 0
    paths = list(store.artifacts())
    for path in paths:
        try:
            artifacts.verify(path, thorough=True)
            store.open(path.parent.name, path.name)
        except ArtifactError as error:
            damaged += 1
            console.print(f"{path}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(paths) - damaged} of {len(paths)} artifacts are as they were written")
    return 1 if damaged else 0


def send(options: argparse.Namespace, console: Console) -> None:
    """Send the shared store what it lacks.

    Raises:
        ConfigError: there is none.
        StorageError: that failed.
    """
    store = open_store(options.home)
    if not isinstance(store, SharingStore):
        raise ConfigError(f"there is no shared store to send to; name one: --store URL, or {STORE_VARIABLE}")
    sent = store.send_all()
    console.print(f"{store.shared.url} has all {sent} artifacts of {store.root}", highlight=False, soft_wrap=True)


def gc(options: argparse.Namespace, console: Console) -> None:
    """Keep what the last runs of each pipeline used, and the champions."""
    store = Store(home_directory(options.home))
    by_pipeline: dict[str, list[Any]] = {}
    for record in read_runs(store.home):
        by_pipeline.setdefault(record.pipeline, []).append(record)
    keep = {
        (stage, str(row["key"]))
        for records in by_pipeline.values()
        for record in records[-options.keep :]
        for stage, row in record.stages.items()
    }
    deleted = store.collect_garbage(keep | champions.artifacts_in_use(store.home), dry_run=options.dry_run)
    for path, size in deleted:
        console.print(f"{path}  {disk.size(size)}", highlight=False, markup=False, soft_wrap=True)
    verb = "would free" if options.dry_run else "freed"
    console.print(f"{len(deleted)} deleted, {verb} {disk.size(sum(size for _, size in deleted))}")
