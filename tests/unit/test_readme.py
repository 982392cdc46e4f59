"""The README's answer is that of the committed results, and the writer replaces nothing else."""

import re

import pandas as pd
import pytest

from tuneformer.report import readme, records
from tuneformer.study import paths
from tuneformer.study.params import load_study


def test_the_readme_says_what_the_results_say():
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    assert text.split(readme.BEGIN)[1].split(readme.END)[0].strip() == readme.block()


def test_the_readme_links_to_figures_and_numbers_that_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme.block()):
        assert (paths.ROOT / target).is_file(), target


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, results):
    """A repository of which only README.md and results are there: those of demo, and of one study on train sets."""
    for name in ("ROOT", "RESULTS"):
        monkeypatch.setattr(paths, name, tmp_path / ("" if name == "ROOT" else "results"))
    rows = results[results["strategy"] == "full"].assign(study="demo_pseudobulk")
    made = rows.assign(train_set="pseudobulk_k5_sum", fingerprint="bulk" + rows["fingerprint"])
    paths.write_text(tmp_path / "results" / "demo" / "metrics.csv", results.to_csv(index=False))
    paths.write_text(
        tmp_path / "results" / "demo_pseudobulk" / "metrics.csv", pd.concat([rows, made]).to_csv(index=False)
    )
    ran = results[results["metric"] == "macro_f1"]
    cells = pd.DataFrame({"cell": list("abcdef"), "label": list("xyxyxy"), "predicted": list("xyxxyy")})
    keys = ["task", "train_set", "strategy", "seed", "fingerprint"]
    tables = [cells.assign(**dict(zip(keys, row, strict=True))) for row in ran[keys].itertuples(index=False)]
    pd.concat(tables).to_parquet(tmp_path / "results" / "demo" / "predictions.parquet")
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    return tmp_path


def test_a_study_on_train_sets_with_results_follows_the_answer(elsewhere):
    assert readme.main(["demo_pseudobulk"]) == 0
    text = (elsewhere / "README.md").read_text()
    question = load_study("demo_pseudobulk").question
    assert text.index("fig1_scores.png") < text.index(f"<summary><b>{question}</b></summary>") < text.index(readme.END)
    paragraph = text[text.index(question) :]
    assert "(simulated" in question
    assert "- `drugs`: Trained on pseudo-bulk (sum) instead of single cells, " in paragraph
    assert "[Figure](figures/demo_pseudobulk/fig4_drug_5class_against_k.png)" in paragraph
    for absent in ("demo_synthetic", "demo_mixture"):
        assert absent not in text
    before = (elsewhere / "README.md").read_bytes()
    readme.update()
    assert (elsewhere / "README.md").read_bytes() == before


def test_the_readme_keeps_to_the_main_findings(elsewhere, monkeypatch):
    findings = {"drugs": [f"Finding {number}." for number in range(5)]}
    monkeypatch.setattr(readme.trainset_effects, "sentences", lambda _: findings)
    readme.update()
    text = (elsewhere / "README.md").read_text()
    assert "- `drugs`: Finding 0. Finding 1. Finding 2.\n" in text
    assert "Finding 3" not in text


def test_a_study_that_is_not_in_the_readme_leaves_it_as_it_is(elsewhere):
    assert readme.main(["pbmc68k"]) == 0
    assert "old" in (elsewhere / "README.md").read_text()


def test_only_the_answer_is_replaced(elsewhere, results):
    (elsewhere / "results" / "demo_pseudobulk" / "metrics.csv").unlink()
    readme.update()
    text = (elsewhere / "README.md").read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "\nold\n" not in text
    assert "simulated" in text
    row = next(line for line in text.splitlines() if line.startswith("| `full`"))
    mean = results[(results["strategy"] == "full") & (results["task"] == "drugs") & (results["metric"] == "macro_f1")]
    assert f"{mean['value'].mean():.3f}" in row
    assert row.count(readme.MARK) >= 1  # every run predicts the same here, so nothing can be told apart
    assert readme.NOTE in text


def test_a_readme_without_marks_is_refused(tmp_path, monkeypatch, results):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(records, "read_metrics", lambda _: results)
    (tmp_path / "README.md").write_text("no marks\n")
    with pytest.raises(readme.ReadmeError, match="put the lines"):
        readme.update()
    assert (tmp_path / "README.md").read_text() == "no marks\n"
