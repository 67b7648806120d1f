"""Everything that users get wrong in a configuration or in data, and what the message must then say.

Each case starts from a small project that is fine and breaks one thing (``projects``). Other tests import ``CASES``.
"""

from __future__ import annotations

import json

from tests.rlhf.projects import (
    DEMO,
    LINE_8,
    PAIRS,
    PROMPTS,
    ROW_8,
    Case,
    broken_model,
    broken_saved,
    configured,
    csv_9,
    duplicated_columns,
    edited,
    fake_parquet,
    good,
    line_8,
    no_model,
    only_one_pair,
    other_columns,
    other_types,
    overridden,
    parquet,
    preset,
    repeated_elsewhere,
    row_8,
    several_splits,
    truncated_parquet,
    written,
)

CASES: list[Case] = [
    Case(name, make, fragments if isinstance(fragments, tuple) else (fragments,))
    for name, make, fragments in (
        # --- the configuration: which one
        ("unknown preset", preset("dem"), ("there is no preset 'dem'", "did you mean 'demo'?")),
        (
            "preset named as a file",
            preset("demo.yaml"),
            ("there is no file demo.yaml", "did you mean the preset 'demo'?"),
        ),
        ("folder for a file", lambda folder: (folder, []), "is a folder, not a YAML file"),
        (
            "missing configuration",
            lambda folder: (good(folder).with_name("confg.yaml"), []),
            ("confg.yaml", "did you mean 'config.yaml'?"),
        ),
        # --- the configuration: YAML
        ("empty configuration", written("config.yaml", "# nothing\n"), ("config.yaml", "is empty", "preset: demo")),
        ("a list at the top", written("config.yaml", "- a\n- b\n"), ("config.yaml:1", "key: value")),
        ("YAML syntax", configured("name: tiny", "name: tiny: x"), ("config.yaml:1:11", "not valid YAML", "tiny: x")),
        ("tab in YAML", configured("  layers: 1", "\tlayers: 1"), ("config.yaml:10:1", "spaces, not tabs")),
        (
            "key given twice",
            configured("  width: 8", "  width: 8\n  width: 16"),
            ("config.yaml:12:3", "model.width is given twice", "line 11"),
        ),
        ("Latin-1 configuration", written("config.yaml", b"name: caf\xe9\n"), ("config.yaml:1", "0xe9", "UTF-8")),
        ("unquoted braces", configured("name: tiny", "name: {{prompt}}"), ("config.yaml:1", "quotes")),
        ("a Python object", configured("name: tiny", "name: !!python/object:os.system x"), ("config.yaml:1", "tag")),
        ("aliases of aliases", configured("name: tiny", "name: &a\n  b: *a"), ("config.yaml", "nested too deeply")),
        # --- the configuration: schema
        (
            "unknown key",
            configured("  episodes: 8", "  episodes: 8\n  kl_coeff: 0.1"),
            ("config.yaml:20", "ppo.kl_coeff", "unknown key", "did you mean 'kl_coef'?"),
        ),
        ("unknown section", configured("evaluate:", "evalute:"), ("config.yaml:20", "did you mean 'evaluate'?")),
        ("key in no section", configured("name: tiny", "kl_coef: 1"), ("config.yaml:1", "did you mean 'ppo.kl_coef'?")),
        (
            "wrong type",
            configured("  layers: 1", "  layers: two"),
            ("config.yaml:10", "model.layers", "'two'", "whole number", "Transformer blocks"),
        ),
        ("fraction of a count", configured("  layers: 1", "  layers: 1.5"), ("config.yaml:10", "1.5", "whole number")),
        ("out of range", configured("test_fraction: 0.3", "test_fraction: 1.3"), ("config.yaml:7", "1.3", "at most 1")),
        ("below the range", configured("  layers: 1", "  layers: 0"), ("config.yaml:10", "at least 1")),
        (
            "unknown choice",
            configured("init: random", "init: randm"),
            ("config.yaml:9", "'randm'", "'pretrained' or 'random'", "did you mean 'random'?"),
        ),
        (
            "number for text",
            configured("name: tiny", "name: 7"),
            ("config.yaml:1", "name", "7", "must be text", "quotes"),
        ),
        (
            "scalar for a section",
            configured("judge:\n  annotators: [anna, ben]", "judge: 3"),
            ("config.yaml:15", "section"),
        ),
        ("list for a mapping", configured("  episodes: 8", "  rewards: [a]"), ("config.yaml:19", "mapping")),
        (
            "missing section",
            written("config.yaml", "name: x\ndata: {demonstrations: a}\n"),
            ("config.yaml", "model: is missing"),
        ),
        (
            "two errors at once",
            configured("  layers: 1\n  width: 8", "  layers: 0\n  width: x"),
            ("2 errors", "config.yaml:10", "config.yaml:11"),
        ),
        # --- the configuration: what does not go together
        (
            "fractions of everything",
            configured("validation_fraction: 0.2", "validation_fraction: 0.8"),
            ("config.yaml:6", "sum"),
        ),
        ("pretrained without a path", configured("init: random", "init: pretrained"), ("config.yaml:9", "path")),
        (
            "batch that does not divide",
            configured("episodes: 8", "minibatches: 3"),
            ("config.yaml:19", "divide episodes 64"),
        ),
        ("width and heads", configured("heads: 2", "heads: 3"), ("config.yaml", "width 8", "heads 3")),
        ("no room for a prompt", overridden("ppo.max_new_tokens=64"), ("--set ppo.max_new_tokens", "model.context 64")),
        (
            "batch that processes cannot share",
            overridden("resources.processes=3"),
            ("sft.batch_size 32", "a multiple of resources.processes 3"),
        ),
        ("reward model without its stage", overridden("reward=off"), ("ppo.rewards", "reward stage is off")),
        # --- overrides
        (
            "a scorer with the name of a metric",
            overridden("evaluate.scorers.rougeL=similarity"),
            ("evaluate", "'rougeL' is a metric that every evaluation has", "choose another name"),
        ),
        ("override without a value", overridden("ppo.kl_coef"), ("--set 'ppo.kl_coef'", "KEY=VALUE")),
        ("override of an unknown key", overridden("ppo.kl_coeff=1"), ("--set ppo.kl_coeff", "did you mean 'kl_coef'?")),
        (
            "override of a wrong type",
            overridden("ppo.kl_coef=high"),
            ("--set ppo.kl_coef", "'high'", "must be a number"),
        ),
        ("override that is not YAML", overridden("ppo.rewards=[a"), ("--set ppo.rewards", "not valid YAML")),
        # --- files
        (
            "missing file",
            overridden("data.demonstrations=HERE/demonstration.jsonl"),
            ("data.demonstrations", "demonstration.jsonl", "did you mean 'demonstrations.jsonl'?"),
        ),
        ("pattern without a match", overridden("data.prompts=HERE/*.parquet"), ("data.prompts", "*.parquet")),
        ("malformed pattern", overridden("data.prompts=HERE/**.jsonl"), ("data.prompts", "**.jsonl", "malformed")),
        ("home of nobody", configured("prompts.json", "~nobody-here/x.json"), ("data.prompts", "~nobody-here", "user")),
        (
            "home of nobody for a reward",
            overridden("ppo.rewards.~50/my.py:brief=1"),
            ("ppo.rewards.~50/my.py:brief", "'~50'", "user"),
        ),
        ("encoding of bytes", overridden("data.encoding=base64"), ("data.encoding", "'base64' is not a text encoding")),
        (
            "part of a computed column that is none",
            edited(
                "config.yaml",
                ("  prompts:", "  computed: {x: word_count}\n  prompts:"),
                overrides=["data.computed.x.column=text"],
            ),
            ("--set data.computed.x.column", "'word_count'", "a section with the keys function, column"),
        ),
        ("missing demo file", overridden("data.prompts=demo:nothing.parquet"), ("data.prompts", "nothing.parquet")),
        (
            "file named twice",
            overridden("data.prompts=[HERE/prompts.json, HERE/prompts.json]"),
            ("prompts.json", "2 times"),
        ),
        ("folder for data", overridden("data.prompts=HERE"), ("data.prompts", "is a folder", "*.jsonl")),
        ("several splits", several_splits, ("holds several splits", "saved/train")),
        ("damaged dataset folder", broken_saved, ("saved", "is damaged")),
        ("unknown format", overridden("data.prompts=HERE/config.yaml"), ("config.yaml", "'.yaml'", ".jsonl, .json")),
        ("empty file", written(DEMO, ""), (DEMO, "is empty")),
        ("only blank lines", written(DEMO, "\n \n"), (DEMO, "has no rows")),
        ("only a header", written(PAIRS, "prompt,chosen,rejected,anna,ben\n"), (PAIRS, "has no rows")),
        ("empty array", written(PROMPTS, "[]"), (PROMPTS, "has no rows")),
        ("Latin-1 data", written(DEMO, b'{"prompt": "a"}\n{"prompt": "\xe9"}\n'), (f"{DEMO} line 2", "0xe9", "UTF-8")),
        ("UTF-16 data", written(PAIRS, "prompt,chosen".encode("utf-16")), (PAIRS, "UTF-16", "save it as UTF-8")),
        ("not Parquet", fake_parquet, ("fake.parquet", "not a Parquet file")),
        ("truncated Parquet", truncated_parquet, ("made.parquet", "damaged")),
        # --- JSON and JSON Lines
        (
            "malformed line",
            line_8('{"prompt": "a" "response": "b"}'),
            ("data.demonstrations: 1 row is bad", f"{DEMO} line 8", "column 16", "','"),
        ),
        ("line that is no object", line_8('["a", "b"]'), (f"{DEMO} line 8", "['a', 'b']", "not an object")),
        (
            "key twice in a line",
            line_8('{"prompt": "a", "prompt": "b"}'),
            (f"{DEMO} line 8", "'prompt' is given twice"),
        ),
        (
            "array named jsonl",
            written(DEMO, '[\n{"prompt": "a"}\n]\n'),
            (DEMO, "line 1", "JSON array", "demonstrations.json"),
        ),
        ("malformed JSON", row_8('{"prompt": "a", }'), (f"{PROMPTS} line 9", "not valid JSON", "column 17")),
        (
            "lines named json",
            written(PROMPTS, '{"prompt": "a"}\n{"prompt": "b"}\n'),
            (PROMPTS, "line 2", "prompts.jsonl"),
        ),
        ("object for an array", written(PROMPTS, '{"rows": []}'), (PROMPTS, "'rows'", "array of objects")),
        ("array item that is no object", row_8("7"), (f"{PROMPTS} row 8", "7 is not an object")),
        # --- CSV
        (
            "ragged row",
            csv_9("What is 7 minus 1?,It is 6.,It is 7, perhaps.,chosen,rejected"),
            (f"{PAIRS} line 9", "6 cells", "quotes"),
        ),
        ("stray quote", csv_9('"What" is 7 minus 1?,a,b,,'), (f"{PAIRS} line 9", "not valid CSV")),
        ("header twice", edited(PAIRS, ("anna,ben", "anna,anna")), (f"{PAIRS} line 1", "'anna'")),
        ("nameless column", edited(PAIRS, ("anna,ben", "anna,")), (f"{PAIRS} line 1", "column 5 has no name")),
        (
            "semicolons",
            written(PAIRS, "prompt;chosen;rejected\na;b;c\n"),
            (PAIRS, "no column 'prompt'", "';'", "commas"),
        ),
        # --- columns
        (
            "missing column",
            overridden("data.columns.response=respnse"),
            (DEMO, "no column 'respnse'", "'prompt', 'response'", "data.columns.response", "did you mean 'response'?"),
        ),
        (
            "template without its column",
            overridden("data.prompt_template={prompt} {title}"),
            (DEMO, "'title'", "data.prompt_template"),
        ),
        (
            "one column for two",
            overridden("data.columns.rejected=chosen"),
            ("data.columns.chosen", "data.columns.rejected", "two columns"),
        ),
        (
            "missing annotator",
            overridden("judge.annotators=[anne]"),
            (PAIRS, "'anne'", "judge.annotators", "did you mean 'anna'?"),
        ),
        (
            "missing reference",
            overridden("data.columns.reference=answer"),
            (PROMPTS, "'answer'", "data.columns.reference"),
        ),
        ("two columns in Parquet", duplicated_columns, ("made.parquet", "2 columns named 'response'")),
        ("files with different columns", other_columns, ("more.jsonl", "'mood'", DEMO, "same columns")),
        ("files with different types", other_types, ("two.jsonl line 1, column 'n'", "'two'", "one type")),
        # --- values
        ("null", line_8('{"prompt": "a", "response": null}'), (f"{DEMO} line 8, column 'response'", "null")),
        ("absent value", line_8('{"prompt": "a"}'), (f"{DEMO} line 8, column 'response'", "missing")),
        ("NaN", line_8('{"prompt": "a", "response": NaN}'), (f"{DEMO} line 8, column 'response'", "NaN")),
        (
            "number for a text",
            line_8('{"prompt": 12, "response": "b"}'),
            (f"{DEMO} line 8, column 'prompt'", "12 is not text"),
        ),
        ("blank text", line_8('{"prompt": "a", "response": " \\n"}'), (f"{DEMO} line 8, column 'response'", "blank")),
        ("half a character", line_8('{"prompt": "\\ud83d", "response": "b"}'), (f"{DEMO} line 8", "surrogate")),
        ("empty cell", csv_9("What is 7 minus 1?,,b,,"), (f"{PAIRS} line 9, column 'chosen'", "missing or null")),
        (
            "null in Parquet",
            parquet({"prompt": ["a", "b", None], "response": ["c", "d", "e"]}),
            ("made.parquet row 3, column 'prompt'", "null"),
        ),
        (
            "numbers in Parquet",
            parquet({"prompt": list(range(8)), "response": list("abcdefgh")}),
            ("8 rows are bad", "made.parquet row 1, column 'prompt': 0 is not text", "... and 3 more"),
        ),
        (
            "mixed types",
            row_8(ROW_8.replace('"n": 7', '"n": "seven"')),
            (f"{PROMPTS} row 8, column 'n'", "'seven'", "one type"),
        ),
        ("nothing to store", row_8(ROW_8.replace('"n": 7', '"n": 7, "o": {}')), (PROMPTS, "cannot be stored")),
        ("same sides", csv_9("What is 7 minus 1?,same,same,,"), (f"{PAIRS} line 9", "the same text 'same'")),
        (
            "unknown verdict",
            csv_9("a,b,c,choosen,"),
            (f"{PAIRS} line 9, column 'anna'", "'choosen'", "did you mean 'chosen'?"),
        ),
        (
            "null in the template",
            edited(
                PROMPTS,
                (ROW_8, ROW_8.replace('"n": 7', '"n": null')),
                overrides=[
                    "data.demonstrations=",
                    "sft=off",
                    "data.preferences=",
                    "judge=off",
                    "reward=off",
                    "ppo=off",
                    "data.prompt_template={prompt} {n}",
                ],
            ),
            (f"{PROMPTS} row 8, column 'n'", "null"),
        ),
        # --- the template
        ("unbalanced brace", overridden("data.prompt_template={prompt"), ("data.prompt_template", "malformed")),
        (
            "nameless field",
            overridden("data.prompt_template={} TL;DR:"),
            ("data.prompt_template", "{} is not the name"),
        ),
        (
            "attribute in a field",
            overridden("data.prompt_template={prompt.__class__}"),
            ("data.prompt_template", "prompt.__class__"),
        ),
        (
            "field in a format",
            overridden("data.prompt_template={prompt:{n}} {prompt}"),
            ("data.prompt_template", "the format '{n}' of {prompt}"),
        ),
        ("no field", overridden("data.prompt_template=TL;DR:"), ("data.prompt_template", "names no column")),
        (
            "format that does not fit",
            overridden("data.prompt_template={prompt:.2f}"),
            (f"{DEMO} line 1", "cannot be filled"),
        ),
        # --- rows
        (
            "duplicate rows",
            edited(DEMO, ('{"prompt": "What is 9 plus 9?", "response": "It is 18."}', LINE_8)),
            ("1 row is repeated", f"{DEMO} line 10", f"{DEMO} line 8", "data.duplicates: drop"),
        ),
        ("duplicate in another file", repeated_elsewhere, ("more.jsonl line 1", f"{DEMO} line 8")),
        (
            "duplicate prompt",
            row_8('{"prompt": "What is 3 times 2?", "reference": "x", "n": 1}'),
            (f"{PROMPTS} row 8", f"{PROMPTS} row 4"),
        ),
        (
            "long prompt",
            line_8(json.dumps({"prompt": "word " * 99, "response": "b"})),
            (f"{DEMO} line 8", "context is 64", "data.too_long: drop"),
        ),
        (
            "prompt over its limit",
            overridden("data.max_prompt_tokens=5"),
            (f"{DEMO} line", "data.max_prompt_tokens is 5", "40 rows are too long"),
        ),
        (
            "response over its limit",
            overridden("data.max_response_tokens=2"),
            (f"{DEMO} line", "data.max_response_tokens is 2"),
        ),
        (
            "no room for a response",
            overridden("ppo.max_new_tokens=60"),
            (f"{PROMPTS} row", "ppo.max_new_tokens 60", "data.max_prompt_tokens: 4"),
        ),
        ("empty split", only_one_pair, ("data.preferences", "split is empty", "none of 1 rows", "data.test_fraction")),
        (
            "no test split",
            overridden("data.test_fraction=0"),
            ("data.prompts", "test split is empty", "raise data.test_fraction"),
        ),
        (
            "no validation split for the evaluations of ppo",
            overridden("data.validation_fraction=0", "ppo.eval_every=1"),
            ("data.prompts", "validation split is empty", "ppo.eval_every: 0"),
        ),
        (
            "everything dropped",
            overridden("data.max_prompt_tokens=1", "data.too_long=drop"),
            ("train split is empty", "none of 0 rows", "rows read: 40, 40 too_long"),
        ),
        # --- models
        ("folder without a model", no_model, ("empty", "model.path")),
        ("broken model", broken_model, ("model", "cannot be loaded")),
        ("missing model", overridden("model.init=pretrained", "model.path=HERE/nothing"), ("nothing", "model.path")),
    )
]
