"""What a stage's code fingerprint sees, and what it does not."""

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.cache import fingerprint
from rlhf.cache.fingerprint import WITHOUT_NUMBERS, code_fingerprint, function_file, import_closure, shapes_numbers
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ConfigError
from rlhf.stages import STAGES, stage_modules

CODE = '''"""Module."""
def f(x):
    """Add."""
    # a comment
    return x + 1
'''


def of(tmp_path: Path, code: str) -> str:
    (tmp_path / "code.py").write_text(code)
    return code_fingerprint(tmp_path / "code.py")


@pytest.mark.parametrize(
    "same",
    [
        CODE.replace("# a comment", "# another comment"),
        CODE.replace('"""Add."""', '"""Add one."""'),
        CODE.replace('    """Add."""\n', ""),
        CODE.replace("return x + 1", "return (x+1)"),
        CODE.replace('"""Module."""\n', "\n\n"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(tmp_path: Path, same: str) -> None:
    assert of(tmp_path, CODE) == of(tmp_path, same)


@pytest.mark.parametrize("other", [CODE.replace("+ 1", "+ 2"), CODE.replace("x +", "x -"), CODE + "\ny = 1\n"])
def test_code_counts(tmp_path: Path, other: str) -> None:
    assert of(tmp_path, CODE) != of(tmp_path, other)


def test_a_function_of_only_a_docstring_has_a_fingerprint(tmp_path: Path) -> None:
    assert of(tmp_path, 'def f():\n    """Only this."""\n') == of(tmp_path, 'def f():\n    """Or this."""\n')


def test_broken_code_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"code.py, line 2: not valid Python"):
        of(tmp_path, "x = 1\nx = = 2\n")


def test_what_was_parsed_is_remembered_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, path = tmp_path / "code.json", tmp_path / "code.py"

    def in_a_new_process() -> str:
        monkeypatch.setattr(fingerprint, "_used", {})
        monkeypatch.setattr(fingerprint, "_recalled", {})
        fingerprint.recall(memory)
        found = code_fingerprint(path)
        fingerprint.remember(memory)
        return found

    path.write_text("from rlhf import sft\nx = 1\n")
    first = in_a_new_process()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_parse", lambda source: pytest.fail("parsed again"))
        assert in_a_new_process() == first
        assert fingerprint._parsed(path.read_bytes()).imports == ((0, "rlhf", ("sft",)),)
    path.write_text("from rlhf import sft\nx = 2\n")
    other = in_a_new_process()
    assert other != first
    for damaged in ("", "{", "[1]", '{"a": 1}', '{"a": ["b", [[0]]]}'):
        memory.write_text(damaged)
        assert in_a_new_process() == other
    monkeypatch.setattr(fingerprint, "_PARSER", b"another version of Python, or of this module")
    fingerprint.recall(memory)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_parse", lambda source: fingerprint.Parsed("anew", ()))
        assert code_fingerprint(path) == "anew"


def test_imports_in_functions_count_and_those_for_types_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rlhf" / "room"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "a.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from rlhf.room import typed\nelse:\n    import rlhf.room.untyped\n"
        "def f():\n    from . import late\n    import rlhf.room.sub.deep\n"
        "try:\n    pass\nexcept ValueError:\n    match f:\n        case 1:\n            from rlhf.room import matched\n"
    )
    for name in ("typed", "untyped", "late", "matched"):
        (package / f"{name}.py").touch()
    (package / "sub").mkdir()
    (package / "sub" / "__init__.py").touch()
    (package / "sub" / "deep.py").touch()
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    names = ("a", "late", "matched", "sub", "sub.deep", "untyped")
    assert list(import_closure("rlhf.room.a")) == ["rlhf.room", *(f"rlhf.room.{name}" for name in names)]


FACE = """
from typing import TYPE_CHECKING
from rlhf import lazily
if TYPE_CHECKING:
    from rlhf.metrics.one import first as first
    from rlhf.metrics.two import (
        second as second, third as third
    )
else:
    __getattr__ = lazily(__name__)
"""


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from rlhf.metrics import third", {"two"}),
        ("from rlhf.metrics import one", {"one"}),
        ("from rlhf import metrics", {"one", "two"}),
        ("import rlhf.metrics", {"one", "two"}),
        ("import rlhf.metrics.other", {"other"}),
        ("from rlhf.config import checks", {"one"}),  # which is left out itself, not what it imports
    ],
)
def test_names_that_a_package_hands_out_stand_for_their_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, found: set[str]
) -> None:
    for name, text in {
        "__init__": "",
        "metrics/__init__": FACE,
        "metrics/one": "",
        "metrics/two": "",
        "metrics/other": "",
        "config/__init__": "",
        "config/checks": "import rlhf.metrics.one",
        "sft/__init__": "",
        "sft/stage": line,
    }.items():
        (tmp_path / "rlhf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rlhf" / f"{name}.py").write_text(text)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    code = set(import_closure("rlhf.sft.stage")) - {"rlhf.sft", "rlhf.sft.stage", "rlhf.metrics"}
    assert code == {f"rlhf.metrics.{name}" for name in found}


IMPORTS = """
import importlib, json, sys
found = {}
for module in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "rlhf"]:
        del sys.modules[name]
    importlib.import_module(module)
    found[module] = [name for name in sys.modules if name.split(".")[0] == "rlhf"]
print(json.dumps(found))
"""


def test_the_closure_is_what_each_stage_really_imports() -> None:
    """Every rlhf module that is loaded is fingerprinted, or lies in a folder that is left out.

    Each stage is imported anew, in a process where the libraries, which take long, stay.
    """
    modules = [spec.module for spec in STAGES.values()]
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS, *modules]
    loaded = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert list(loaded) == modules
    for module, names in loaded.items():
        files = {name: fingerprint.module_file(name) for name in names}
        assert module in files
        missing = {name for name, path in files.items() if path and shapes_numbers(path)} - set(import_closure(module))
        assert not missing, module


def test_ppo_code_concerns_ppo_and_what_comes_after() -> None:
    with_core = {stage for stage, spec in STAGES.items() if "rlhf.ppo.core" in import_closure(spec.module)}
    assert "ppo" in with_core
    assert with_core <= {"ppo", "evaluate"}


def test_the_judge_has_the_code_of_what_it_does() -> None:
    def code(**section: Any) -> set[str]:
        data = {"prompts": "x.jsonl", "preferences": "x.jsonl"}
        off = dict.fromkeys(("sft", "ppo", "evaluate"), "off")
        config = PipelineConfig.model_validate({**off, "data": data, "model": {"init": "random"}, "judge": section})
        return {name for module in stage_modules("judge", config) for name in import_closure(module)}

    plain, rules = code(), {"by": "rewards", "rewards": {"brevity": 1.0}}
    assert not plain & {"rlhf.ppo.core", "rlhf.reward.stage"}
    assert "rlhf.ppo.core" in code(**rules, samples=2)
    assert "rlhf.reward.stage" not in code(**rules, samples=2)
    assert "rlhf.reward.stage" in code(by="model")


def test_every_folder_without_numbers_exists() -> None:
    assert [name for name in WITHOUT_NUMBERS if not (fingerprint.ROOT / "rlhf" / name / "__init__.py").is_file()] == []


def test_function_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def brief(prompts, responses): ...")
    assert function_file("rewards:brief") == tmp_path / "rewards.py"
    assert function_file(f"{tmp_path}/rewards.py:brief") == tmp_path / "rewards.py"
    assert function_file("rlhf.demo:gold_score").name == "demo.py"


DEFINED = """
import math as m
from os.path import join, split as cut
brief = lambda prompts, responses: []
if m.pi > 3:
    async def later(): inner = 1
else:
    class Scorer: method = None
try:
    one, (two, *rest) = 1, (2, 3)
except ValueError: ...
def make():
    global made
    made = 1
"""


def test_the_names_of_a_file_are_looked_up_in_its_tree(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(DEFINED)
    for name in ("m", "join", "cut", "brief", "later", "Scorer", "one", "two", "rest", "make", "made"):
        assert function_file(f"{path}:{name}") == path
    for name in ("math", "split", "inner", "method", "prompts"):
        with pytest.raises(ConfigError, match=f"my.py has no '{name}'"):
            function_file(f"{path}:{name}")
    with pytest.raises(ConfigError, match=r"my\.py:brif': .*my\.py has no 'brif'.*; did you mean 'brief'\?"):
        function_file(f"{path}:brif")


@pytest.mark.parametrize(
    "source",
    [
        "from os import *",
        "globals()['f'] = 1",
        "def __getattr__(name): ...",
        "import sys\nsetattr(sys.modules[__name__], 'f', 1)",
    ],
)
def test_names_that_a_file_may_make_as_it_runs_are_not_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(source)
    assert function_file(f"{tmp_path}/my.py:f") == tmp_path / "my.py"


def test_a_function_in_a_file_that_is_not_python(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def f(:")
    with pytest.raises(ConfigError, match=r"my\.py, line 1: not valid Python"):
        function_file(f"{tmp_path}/my.py:f")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "names no function"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("missing.py:f", "there is no file"),
    ],
)
def test_a_function_that_is_not_there(reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        function_file(reference)


def test_a_tree_that_another_thread_has_disturbed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python 3.11 says it, now and then."""
    (tmp_path / "mine.py").write_text("def reward():\n    return 'of this test alone'\n")
    expected = hashlib.sha256(
        ast.dump(ast.parse("def reward():\n    return 'of this test alone'\n")).encode()
    ).hexdigest()
    parse, calls = ast.parse, []

    def disturbed(source: bytes) -> ast.Module:
        calls.append(source)
        if len(calls) < 4:
            raise SystemError("AST constructor recursion depth mismatch (before=54, after=93)")
        return parse(source)

    monkeypatch.setattr(ast, "parse", disturbed)
    assert code_fingerprint(tmp_path / "mine.py") == expected
    assert len(calls) == 4
