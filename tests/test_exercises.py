"""Copies differ in one body, grades are earned, bugs are found; `selftest` does the rest."""

import json

import exercises as module
import pytest
from exercises import EXERCISES, cut, mutated, reference

LCS = next(e for e in EXERCISES if e.function == "longest_common_subsequence")  # quick to grade
each = pytest.mark.parametrize("e", EXERCISES, ids=lambda e: f"{e.number}-{e.function}")


def command(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["exercises.py", *map(str, words)])
    try:
        return module.main()
    except SystemExit as ended:
        return ended.code


def test_the_table():
    assert [e.number for e in EXERCISES] == list(range(1, len(EXERCISES) + 1))
    assert len({(e.file, e.function) for e in EXERCISES}) == len(EXERCISES) >= 15
    assert all(len(e.mutants) >= 3 and e.points > 0 and e.tests and e.hint for e in EXERCISES)
    assert {e.file for e in EXERCISES} == set(module.MODULES)


@each
def test_every_variant_is_python_and_differs_in_the_body_alone(e):
    text = reference(e)
    texts = {v.text for v in module.variants(e) if not v.how}
    assert len(texts) == 3 + len(e.mutants)
    for other in texts:
        pieces = zip(cut(other, e.function), cut(text, e.function), strict=True)
        assert [x == y for x, y in pieces] == [True, True, other == text, True]
    assert module.with_body(module.blank(text, e), e.function, cut(text, e.function)[2]) == text


def test_a_copy_has_all_but_the_answers(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "new" / "copy"
    assert command(monkeypatch, "start", LCS.number, copy) == 0
    assert "L(i, j)" in capsys.readouterr().out
    for path in module.ROOT.glob("*.py"):
        same = path.read_bytes() == (copy / path.name).read_bytes()
        assert same == (path.name != LCS.file)
    assert {"conftest.py", "test_eval.py"} <= {path.name for path in (copy / "tests").iterdir()}
    assert (copy / "toy" / "policy").is_dir() and not (copy / ".git").exists()
    assert not any("exercises" in path.name for path in copy.rglob("*"))
    before = (copy / LCS.file).read_bytes()
    assert command(monkeypatch, "start", LCS.number, copy) == 2
    assert command(monkeypatch, "bug", LCS.number, copy) == 2
    assert (copy / LCS.file).read_bytes() == before


def test_without_git_the_same_files_are_copied(monkeypatch):
    names = set(module.repository_files())
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError()))
    tracked = {name for name in names if not name.startswith(".")}
    assert tracked <= set(module.repository_files())
    assert not any("__pycache__" in name or ".git/" in name for name in names)


@pytest.mark.parametrize("body, passed", [
    (LCS.solution, True), ("return len(b)", False), ("import sys; sys.exit(0)", False),
    ("return len(b", None), ("while True: pass", None),
])  # fmt: skip
def test_a_grade(tmp_path, monkeypatch, capsys, body, passed):
    """One file is enough; `passed` None is where no test comes to its end."""
    if "while" in body:
        monkeypatch.setattr(module, "LIMIT", 1)
    text = module.with_body(reference(LCS), LCS.function, body)
    (tmp_path / LCS.file).write_text(text, encoding="utf-8")
    assert command(monkeypatch, "check", LCS.number, tmp_path, "--json") == 1 - bool(passed)
    results = json.loads(capsys.readouterr().out)
    first, *others = results["tests"]
    assert results["score"] == first["score"] == LCS.points * bool(passed)
    assert first["max_score"] == LCS.points and LCS.title in first["name"]
    assert (LCS.hint in first["output"]) == (not passed)
    if passed is not None:
        names = [test["name"] for test in others]
        assert len(set(names)) == len(names) == 3 and "test_equals_the_table" in names
        assert {test["status"] for test in others} >= {"passed" if passed else "failed"}
    elif "while" in body:
        assert "no end after 1 seconds" in first["output"]
    else:
        assert "SyntaxError" in json.dumps(results)


@each
def test_every_bug_has_its_line(e, tmp_path):
    above, head, body, _ = cut(reference(e), e.function)
    first = 1 + (above + head).count("\n")
    for mutant in e.mutants:
        (tmp_path / e.file).write_text(mutated(reference(e), e, mutant), encoding="utf-8")
        found, lines = module.bug_in(e, tmp_path)
        assert found == mutant and 1 <= len(lines) <= 4
        assert first <= min(lines) <= max(lines) <= first + body.count("\n") + 2


def test_find_the_bug(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    assert command(monkeypatch, "bug", LCS.number, copy, "--seed", 1) == 0
    mutant = LCS.mutants[1]
    said = capsys.readouterr().out
    assert mutant.symptom in said and mutant.name not in said
    wrong = (copy / LCS.file).read_text(encoding="utf-8").splitlines()
    line = next(n for n, text in enumerate(wrong, 1) if mutant.new in text)
    assert command(monkeypatch, "bug", LCS.number, copy, "--line", line + 1) == 1
    assert mutant.name not in capsys.readouterr().out
    assert command(monkeypatch, "bug", LCS.number, copy, "--line", line) == 0
    assert mutant.name in capsys.readouterr().out
    (copy / LCS.file).write_text("", encoding="utf-8")
    assert command(monkeypatch, "bug", LCS.number, copy, "--line", line) == 2


@pytest.mark.parametrize("words", [
    ["start", 99, "x"], ["check", 0, "x"], ["selftest", 99], ["start", 1], ["check", "one", "x"],
    [], ["grade"], ["check", 1, "{}"], ["bug", 1, "{}", "--line", 1], ["start", 1, "{}/file"],
])  # fmt: skip
def test_wrong_use_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "file").write_text("mine")
    words = [str(word).format(tmp_path) for word in words]
    assert command(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out


def test_list(monkeypatch, capsys):
    assert command(monkeypatch, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(EXERCISES) and "grpo_loss" in lines[23]
