"""The command ``rlhf generate``: what base, SFT and PPO policies answer to prompts of the user."""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flows.commands import options as given
from flows.commands.summary import print_table
from rlhf.config import PipelineConfig, Resources, load
from rlhf.errors import ConfigError, DataError
from rlhf.runs import Place, Trained, policies
from rlhf.store import Store, open_store
from tasks.mlflow.server import tracking_uri

if TYPE_CHECKING:
    from rlhf.runs import Response, Sampling

ABOUT = (
    "Compare the base, SFT and PPO policies of a pipeline on your prompts, with a score where there is a reward. "
    "Prompts are taken as they are: without --template, data.prompt_template is not applied."
)
SCHEME = "models:/"
Answers = dict[str, list["Response"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "source", nargs="*", metavar="PRESET|FILE|MODEL",
        help="preset or YAML file (default: demo), or models, which are compared with each other: directories, or "
        "registered ones such as models:/demo@champion",
    )  # fmt: skip
    parser.add_argument("--run", metavar="RUN_ID", help="the policies of this run (rlhf runs lists them)")
    parser.add_argument("--size", help="a size that the preset offers, such as smoke")
    parser.add_argument("--set", action="append", metavar="K=V", help="override one value: --set ppo.kl_coef=0.1")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    prompts.add_argument(
        "--file", metavar="F", help="prompts: one a line, or .jsonl with `prompt` (default: lines of standard input)"
    )
    parser.add_argument("--template", action="store_true", help="put each prompt into data.prompt_template")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest response (default: evaluate's)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: evaluate's)")
    parser.add_argument("--seed", type=int, metavar="S", help="of sampling (default: the pipeline's)")
    given.add_store(parser)
    given.add_json(parser)
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    config, trained = _sources(options)
    prompts, columns = _prompts(options, config)
    from rlhf.runs import generate as library

    sampling = _sampling(options, config)
    resources = Resources() if config is None else config.resources
    answers = {name: library.respond(place, prompts, sampling, resources) for name, place in trained.policies.items()}
    if config is not None:
        by, notes = library.scorers(config, trained.reward_model, columns)
        trained.notes += notes + library.score(by, prompts, answers, columns, resources)
    if options.json:
        print(json.dumps(_as_json(trained, sampling, prompts, answers), indent=1, ensure_ascii=False))
    else:
        _show(prompts, answers, console)
        for note in trained.notes:
            Console(stderr=True).print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)


# --- what is compared, and on what


def _sources(options: argparse.Namespace) -> tuple[PipelineConfig | None, Trained]:
    """The configuration, unless directories of models are named; and the models."""
    store = open_store(options.home)
    named = [name for name in options.source if name.startswith(SCHEME) or (Path(name) / "config.json").is_file()]
    pipeline_options = options.run or options.size or options.set or options.template
    if named:
        if others := [name for name in options.source if name not in named]:
            raise ConfigError(
                f"{others[0]!r} is no directory with a config.json, but {named[0]!r} is a model; name models, or one "
                "preset or file"
            )
        if pipeline_options:
            raise ConfigError("--run, --size, --set and --template are for pipelines; leave them out, or the models")
        return None, Trained({name: _place(store, name) for name in named})
    if options.run:
        if options.source or options.size or options.set:
            raise ConfigError("--run says all; leave out the preset or file, --size and --set")
        return policies.of_run(options.run, store)
    if len(options.source) > 1:
        raise ConfigError(f"{' '.join(options.source)}: name one preset or file, or directories of models")
    config = load(*options.source, size=options.size, overrides=options.set or [])
    return config, policies.of_pipeline(config, store)


def _place(store: Store, name: str) -> Place:
    """Where a model is that is named by its directory, or as a registered one of MLflow."""
    if not name.startswith(SCHEME):
        return Place(name)
    from tasks.mlflow.registry import directory

    return Place(str(directory(store, name, tracking_uri(None, store.home))))


def _sampling(options: argparse.Namespace, config: PipelineConfig | None) -> Sampling:
    from rlhf.runs import Sampling

    sampling = Sampling()
    if config is not None:
        sampling = Sampling(config.evaluate.max_new_tokens, config.evaluate.temperature, config.seed)
    given = {name: getattr(options, name) for name in Sampling._fields}
    sampling = sampling._replace(**{name: value for name, value in given.items() if value is not None})
    if sampling.max_new_tokens < 1 or not 0.0 <= sampling.temperature < float("inf"):
        raise ConfigError(
            f"--max-new-tokens is {sampling.max_new_tokens}, --temperature {sampling.temperature}: the one must be at "
            "least 1, the other at least 0"
        )
    return sampling


def _prompts(options: argparse.Namespace, config: PipelineConfig | None) -> tuple[list[str], dict[str, list[Any]]]:
    """The prompts, and the other fields of a .jsonl file that all of its rows have."""
    if options.prompt:
        rows: list[dict[str, Any]] = [{"prompt": text} for text in options.prompt]
    elif options.file:
        rows = _read(Path(options.file))
    else:
        if sys.stdin.isatty():
            Console(stderr=True).print("Prompts, one a line; Ctrl-D ends.", style="dim")
        rows = _lines(sys.stdin)
    if not rows:
        raise DataError("there is no prompt; give --prompt TEXT, --file F, or lines on standard input")
    shared = set.intersection(*(set(row) for row in rows))
    columns = {name: [row[name] for row in rows] for name in sorted(shared)}
    prompts = columns.pop("prompt")
    if options.template and config is not None:
        prompts = [_filled(config.data.prompt_template, row) for row in rows]
    return prompts, columns


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        return _lines(text.splitlines())
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(f'{path}, line {number}: {line[:60]!r} is not an object with a text "prompt"')
        rows.append(row)
    return rows


def _lines(lines: Iterable[str]) -> list[dict[str, Any]]:
    return [{"prompt": line.rstrip("\n")} for line in lines if line.strip()]


def _filled(template: str, row: Mapping[str, Any]) -> str:
    try:
        return template.format(**row)
    except KeyError as error:
        raise DataError(f"data.prompt_template {template!r} needs {error}, which the prompt {row} lacks") from error


# --- what is shown


def _show(prompts: Sequence[str], answers: Answers, console: Console) -> None:
    for number, prompt in enumerate(prompts):
        console.print(f"\n[bold]prompt {number + 1} of {len(prompts)}", highlight=False)
        console.print(_printable(prompt), markup=False, highlight=False, soft_wrap=True)
        responses = {name: answer[number] for name, answer in answers.items()}
        scores = list(next(iter(responses.values())).scores)
        rows = [
            (
                name,
                *(f"{response.scores[score]:.3f}" for score in scores),
                f"{response.tokens}{'' if response.ended else '+'}",
                _printable(response.text) or "(empty)",
            )
            for name, response in responses.items()
        ]
        print_table(("policy", *scores, "tokens", "response"), rows, console)
    if not all(response.ended for answer in answers.values() for response in answer):
        console.print("+ cut at --max-new-tokens", style="dim", highlight=False)


def _printable(text: str) -> str:
    """A text without control characters but newline and tab: a model may write any, and a terminal obeys them."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _as_json(trained: Trained, sampling: Sampling, prompts: Sequence[str], answers: Answers) -> dict[str, Any]:
    return {
        "policies": {name: place.path for name, place in trained.policies.items()},
        "sampling": sampling._asdict(),
        "notes": trained.notes,
        "samples": [
            {"prompt": prompt, "responses": {name: asdict(answer[number]) for name, answer in answers.items()}}
            for number, prompt in enumerate(prompts)
        ],
    }
