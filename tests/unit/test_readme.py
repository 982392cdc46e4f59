"""The README's answer is that of the committed results, and the writer replaces nothing else."""

import pytest

from tuneformer.report import readme, records
from tuneformer.study import paths


def test_the_readme_says_what_the_results_say():
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    assert block == readme.answer(records.read_metrics(readme.STUDY))


def test_only_the_answer_is_replaced(tmp_path, monkeypatch, results):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(records, "read_metrics", lambda _: results)
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.update()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "old" not in text
    assert "simulated" in text
    row = next(line for line in text.splitlines() if line.startswith("| `full`"))
    mean = results[(results["strategy"] == "full") & (results["task"] == "drugs") & (results["metric"] == "macro_f1")]
    assert f"{mean['value'].mean():.3f}" in row


def test_a_readme_without_marks_is_refused(tmp_path, monkeypatch, results):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(records, "read_metrics", lambda _: results)
    (tmp_path / "README.md").write_text("no marks\n")
    with pytest.raises(readme.ReadmeError, match="put the lines"):
        readme.update()
    assert (tmp_path / "README.md").read_text() == "no marks\n"
