"""What a run writes: every step once, JSON that is JSON, curves, a line a step."""

import json

from jaxllm.training.metrics import (
    JsonlWriter,
    Progress,
    TensorBoardWriter,
    draw_curve,
    read_lines,
)


def test_a_resumed_file_has_no_step_twice(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlWriter(path)
    for step in range(1, 6):
        first.write(step, {"train/loss": 1 / step})
    first.close()
    # A line that was torn by a kill.
    with path.open("a") as file:
        file.write('{"step": 6, "tr')
    second = JsonlWriter(path, step=3)
    second.write(4, {"train/loss": 0.5})
    second.close()
    assert [(x["step"], x["train/loss"]) for x in read_lines(path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 0.5),
    ]


def test_what_json_lacks_is_written_as_text(tmp_path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"a": float("nan"), "b": float("-inf"), "c": 1.5})
    writer.write_text(1, "sample/0", "é\n")
    writer.close()
    lines = [json.loads(x) for x in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "a": "nan", "b": "-inf", "c": 1.5}
    assert lines[1] == {"step": 1, "sample/0": "é\n"}


def test_tensorboard_files_are_written(tmp_path) -> None:
    writer = TensorBoardWriter(tmp_path / "events")
    writer.write(3, {"train/loss": 0.25})
    writer.write_text(3, "sample/0", "text")
    writer.close()
    [file] = (tmp_path / "events").iterdir()
    assert b"train/loss" in file.read_bytes()


def test_the_curve_is_a_picture_also_of_nothing(tmp_path) -> None:
    lines = [{"step": i, "train/loss": 1 / i, "eval/loss": 2 / i} for i in (1, 2, 3)]
    for content in (lines, [{"step": 1, "train/loss": "nan"}], []):
        draw_curve(content, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_progress_says_how_long_it_takes(capsys) -> None:
    progress = Progress(steps=10, done=0)
    progress.show(5, ["loss 1.0"])
    progress.close()
    said = capsys.readouterr().err
    assert said.startswith("step 5 of 10: loss 1.0, 0:0") and said.endswith(" left\n")
