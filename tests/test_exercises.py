"""Copies differ in one body, grades are earned, bugs are found; `selftest` does the rest."""

import ast
import json
from collections import Counter

import differentials
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
    assert all(len(e.mutants) >= 3 and e.points > 0 and e.hints[""] for e in EXERCISES)
    assert {e.file for e in EXERCISES} == set(module.MODULES)
    assert all(map(differentials.case_of, (e.function for e in EXERCISES)))
    chapters = ["retrieve.py", "eval.py", "prlm.py", "reward.py", "rl.py"]
    places = [(chapters.index(e.file), len(cut(reference(e), e.function)[0])) for e in EXERCISES]
    assert places == sorted(places)


@each
def test_every_grader_is_there_and_every_hint_has_its_case(e):
    files = [(module.ROOT / name.partition("::")[0]).read_text() for name in e.tests]
    for name, text in zip(e.tests, files):
        assert all(f" {part}" in text for part in name.split("::")[1:])
    assert any(map(ast.get_docstring, module.path_to(reference(e), e.function)))  # the task
    written = {*e.hints} - {"nan", "reasoning False"}  # what the cases' names are made of
    assert all(any(key in text for text in files) for key in written)


def test_the_course_tells_of_every_exercise():
    text = (module.ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    points = sum(e.points for e in EXERCISES)
    assert f"{len(EXERCISES)} functions, one exercise each, {points} points" in text
    for e in EXERCISES:
        worth = f"{e.points} point{'s' * (e.points > 1)}"
        assert f"**{e.number}. {e.title}** · `{e.function}` · {worth}\\\n" in text, e.number
    counts = Counter(v.kind for e in EXERCISES for v in module.variants(e))
    assert f"{counts['mutant']} mutants and {counts['cheat']} cheats" in text


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
    assert json.loads((copy / "exercise.json").read_text()) == {"exercise": LCS.number}
    before = (copy / LCS.file).read_bytes()
    assert command(monkeypatch, "start", LCS.number, copy) == 2
    assert command(monkeypatch, "bug", LCS.number, copy) == 2
    assert (copy / LCS.file).read_bytes() == before


@pytest.mark.parametrize("body, tests, said", [
    (LCS.solution, 2, ""), ("return len(b)", 2, ": expected 0, got 1"),
    ("import sys; sys.exit(0)", 2, "begin with test_"),
    ("return [][len(b)]", 2, "IndexError: list index out of range (eval.py:{})"),
    ("return len(b", 0, "eval.py:{}: SyntaxError: "), ("while True: pass", 0, "after 1 seconds"),
])  # fmt: skip
def test_a_grade(tmp_path, monkeypatch, capsys, body, tests, said):
    """One file is enough; an error is given with its line in that file."""
    if "while" in body:
        monkeypatch.setattr(module, "LIMIT", 1)
    text = module.with_body(reference(LCS), LCS.function, body)
    (tmp_path / LCS.file).write_text(text, encoding="utf-8-sig")  # as some editors do
    assert command(monkeypatch, "check", LCS.number, tmp_path, "--json") == (said != "")
    results = json.loads(capsys.readouterr().out)
    first, *others = results["tests"]
    assert results["score"] == first["score"] == (0 if said else LCS.points)
    assert first["max_score"] == LCS.points and LCS.title in first["name"]
    assert (LCS.hints[""] in first["output"]) == (said != "" and tests > 0)  # else none helps
    line = 1 + "".join(cut(reference(LCS), LCS.function)[:2]).count("\n")
    assert any(said.format(line) in test["output"] for test in results["tests"])
    names = {test["name"] for test in others}
    assert len(names) == len(others) == tests and ("test_equals_the_table" in names) == (tests > 0)
    assert not others or {t["status"] for t in others} >= {"failed" if said else "passed"}
    assert ("begin with test_" in first["output"]) == (said != "" and tests > 0)


def test_a_wrong_number_is_refused(tmp_path, monkeypatch, capsys):
    """In a copy, which says for which exercise it was made, and with the files alone."""
    copy, other = tmp_path / "copy", next(e for e in EXERCISES if e.file != LCS.file)
    same_file = next(e for e in EXERCISES if e.file == LCS.file and e != LCS)
    assert command(monkeypatch, "start", LCS.number, copy) == 0
    for said in (f"a copy for exercise {LCS.number}, not ", f"{LCS.file} differ elsewhere"):
        for e in (other, same_file):
            assert command(monkeypatch, "check", e.number, copy) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1 and said in error
        (copy / "exercise.json").unlink(missing_ok=True)


@each
def test_every_bug_has_its_line_and_does_not_show_as_a_gap(e):
    """What stands on it stands nowhere else in the file; nothing is only taken away."""
    for mutant in e.mutants:
        wrong, lines = mutated(reference(e), e, mutant), module.bug_lines(e, mutant)
        assert 1 <= len(lines) <= 4 and "pass" not in lines and "" not in lines
        assert all([n.startswith(s) for n in map(str.strip, wrong.split("\n"))].count(True) == 1
                   for s in lines)  # fmt: skip
        assert wrong.count("\n") >= reference(e).count("\n")


def test_find_the_bug(tmp_path, monkeypatch, capsys):
    copy, mutant = tmp_path / "copy", LCS.mutants[1]
    assert command(monkeypatch, "bug", LCS.number, copy, "--seed", 1) == 0
    said = capsys.readouterr().out
    assert mutant.symptom in said and mutant.name not in said
    wrong = (copy / LCS.file).read_text(encoding="utf-8").splitlines()
    line = next(n for n, text in enumerate(wrong, 1) if mutant.new in text)
    edited = [*wrong[: line - 1], "        print(row)", wrong[line - 1] + "  # ?", *wrong[line:]]
    for lines, right in ((wrong, line), (edited, line + 1)):
        (copy / LCS.file).write_text("\n".join(lines), encoding="utf-8")
        for n in (0, line - 1, line, line + 1, line + 2, 10**6):
            assert command(monkeypatch, "bug", LCS.number, copy, "--line", n) == (n != right)
            assert (mutant.name in capsys.readouterr().out) == (n == right)
    (copy / "exercise.json").unlink()
    assert command(monkeypatch, "bug", LCS.number, copy, "--line", line) == 2
    assert "was not made by" in capsys.readouterr().err


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
