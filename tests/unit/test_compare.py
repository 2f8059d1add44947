"""`opd compare` on event files written here."""

import json
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from opd_lightning.cli import main
from opd_lightning.commands.compare import compare, line, matches, read
from opd_lightning.errors import UserError


def write_run(folder: Path, scores: list[float], losses: list[float]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for step, loss in enumerate(losses):
            writer.add_scalar("loss", loss, step)
            writer.add_scalar("time/step_seconds", 36.0, step)
        for step, score in enumerate(scores):
            writer.add_scalar("val/sums/score", score, 10 * step)
            writer.add_scalar("val/sums/score/add-2", score / 2, 10 * step)
            writer.add_scalar("val/sums/score_low", score - 0.1, 10 * step)
            writer.add_scalar("val/sums/score_high", score + 0.1, 10 * step)


def told(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, object]]:
    main(["compare", "--json", *args])
    rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return rows


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    write_run(Path(a), [0.25, 0.75, 0.5], [3.0, 1.0, 2.0])
    write_run(Path(b), [0.25, 0.375], [3.0, 2.5])
    rows = {(row["run"], row["tag"]): row for row in told(capsys, a, b)}
    assert set(rows) == {(r, t) for r in (a, b) for t in ("loss", "val/sums/score")}
    score = rows[a, "val/sums/score"]
    assert (score["last"], score["best"], score["best_step"]) == (0.5, 0.75, 10)
    assert [score["low"], score["high"]] == pytest.approx([0.4, 0.6])
    assert score["steps"] == 20
    assert score["hours"] == pytest.approx(0.2)  # 20 steps of 36 s, of which three are logged
    loss = rows[a, "loss"]
    assert (loss["last"], loss["best"], loss["best_step"]) == (2.0, 1.0, 1)


def test_seeds_count_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, score in enumerate([0.5, 0.75, 1.0]):
        write_run(tmp_path / f"opd-{seed}", [score], [1.0])
    folders = [str(tmp_path / f"opd-{seed}") for seed in range(3)]
    picture = tmp_path / "curves.png"
    options = ["--group", "--tags", "[val/*/score]", "--plot", str(picture)]
    (row,) = told(capsys, *folders, *options)
    assert (row["run"], row["runs"], row["last"]) == (str(tmp_path / "opd"), 3, 0.75)
    assert (row["low"], row["high"]) == (0.5, 1.0)  # one standard deviation
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_best_is_in_the_direction_that_is_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = {
        "response/truncated": [0.9, 0.05, 0.1],
        "val/web/perplexity": [30.0, 14.0, 12.0],
        "val/web/log_likelihood": [-3.4, -2.6, -2.5],
        "response/length": [100.0, 300.0, 200.0],
        "loss": [float("nan"), 1.0, 2.0],
    }
    with SummaryWriter(str(tmp_path)) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)
    rows = told(capsys, str(tmp_path), "--tags", f"[{','.join(curves)}]")
    best = {row["tag"]: (row["best"], row["best_step"]) for row in rows}
    assert best == {
        "response/truncated": (pytest.approx(0.05), 1),
        "val/web/perplexity": (12.0, 2),
        "val/web/log_likelihood": (-2.5, 2),
        "response/length": (None, None),
        "loss": (1.0, 1),
    }
    main(["compare", str(tmp_path)])
    assert "None" not in capsys.readouterr().out


def test_a_validation_at_the_end_is_no_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, [0.25, 0.5], [1.0] * 10)
    assert {row["steps"] for row in told(capsys, str(tmp_path))} == {10}
    write_run(tmp_path, [0.25, 0.5, 0.75], [1.0] * 10)  # logged every tenth step, ended at 20
    assert {row["steps"] for row in told(capsys, str(tmp_path))} == {20}


@pytest.mark.parametrize("name", ["nodir/x.png", "x.xyz", "x", "folder.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_runs_are_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "no run"), "--plot", str(tmp_path / name)])
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"opd: error: --plot: got {str(tmp_path / name)!r}, expected a file")


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", [0.25], [3.0])
    main(["compare", str(tmp_path / "a")])
    assert "val/sums/score" in capsys.readouterr().out


def test_of_a_step_that_was_made_again_the_later_counts(tmp_path: Path) -> None:
    write_run(tmp_path, [0.25], [3.0, 2.0])
    with SummaryWriter(str(tmp_path / "again")) as writer:
        writer.add_scalar("loss", 5.0, 1)
        writer.add_scalar("loss", 4.0, 2)
    (again,) = (tmp_path / "again").iterdir()
    again.rename(tmp_path / "events.out.tfevents.9999999999.later")  # names are read in order
    assert read(tmp_path)["loss"].values.tolist() == [3.0, 5.0, 4.0]
    assert line("run", "loss", [read(tmp_path)]).last == 4.0


def test_patterns_stay_within_a_part() -> None:
    assert matches("val/sums/score", ["val/*/score"])
    assert not matches("val/sums/score/add-2", ["val/*/score*"])
    assert matches("overlap/ratio", ["loss", "overlap/*"])


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([], "a run that logs with a TensorBoardLogger"),
        (["--tags", "[none]"], "no scalar matches ['none']"),
    ],
)
def test_mistakes_take_one_line(
    tags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if tags:
        write_run(tmp_path, [0.5], [1.0])
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path), *tags])
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_a_step_that_was_skipped_is_null_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, [0.5], [3.0, float("inf")])
    rows = {row["tag"]: row for row in told(capsys, str(tmp_path))}
    assert (rows["loss"]["last"], rows["loss"]["best"]) == (None, 3.0)


def test_a_home_that_no_user_has_is_a_name_like_any_other() -> None:
    with pytest.raises(UserError, match="~nobody-of-this-name/run"):
        compare(["~nobody-of-this-name/run"])
