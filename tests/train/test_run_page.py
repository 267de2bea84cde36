"""The page of a training run, and the pictures before the first step and after the last."""

import html.parser
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from launch import _run_page, train
from olmoearth_jax import config_files, images, outputs, overrides
from olmoearth_jax.evals import runner
from olmoearth_jax.train import metrics
from olmoearth_jax.train.loop import Summary
from olmoearth_jax.train.runfolder import RunFolder
from tests.browser import needs_browser, show
from tests.train import train_toy


def draw(params):
    return {"input/s2": np.zeros((4, 4, 3), np.uint8), "features": np.ones((4, 4, 3), np.uint8)}


def pictures(folder):
    return sorted(p.name for p in (folder / "visualizations" / "train").glob("*"))


def test_pictures_of_the_first_and_the_last_step(tmp_path):
    train_toy.run(tmp_path, 7, pictures=draw, tensorboard=True)
    names = ["features_step_0.png", "features_step_7.png"]
    assert pictures(tmp_path) == [*names, "input_s2_step_0.png", "input_s2_step_7.png"]
    assert (tmp_path / "visualizations" / "train" / names[0]).read_bytes() == images.png(
        np.ones((4, 4, 3), np.uint8)
    )


def test_a_resumed_run_keeps_the_first_picture(tmp_path):
    train_toy.run(tmp_path, 9, hard_stop=4, pictures=draw, tensorboard=True)
    assert "features_step_4.png" in pictures(tmp_path)
    train_toy.run(tmp_path, 9, pictures=draw, tensorboard=True)
    names = [n for n in pictures(tmp_path) if n.startswith("features")]
    assert names == ["features_step_0.png", "features_step_9.png"]
    without = tmp_path / "without"
    train_toy.run(without, 3, pictures=draw, tensorboard=False)
    assert pictures(without) == []


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    train_toy.run(tmp_path, 9, hard_stop=4, pictures=draw, tensorboard=True)
    before = pictures(tmp_path)

    def full(image):
        raise OSError(28, "No space left on device")

    writer = metrics.MetricWriter(RunFolder(tmp_path), start_step=4)
    monkeypatch.setattr(metrics, "png", full)
    writer._keep(draw(None), 5)
    writer.close()
    assert pictures(tmp_path) == before


def test_metrics_do_not_depend_on_pictures(tmp_path):
    train_toy.run(tmp_path / "with", 7, pictures=draw, tensorboard=True)
    train_toy.run(tmp_path / "without", 7)
    assert train_toy.lines_of(tmp_path / "with") == train_toy.lines_of(tmp_path / "without")


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "data", "action")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it."""
    changes = {"dataset.validation_fraction": 0.25, "common.run_name": "<mine>"}
    cfg = overrides.apply_values(config_files.load_file("nano:smoke"), changes)
    (tmp_path / "config.json").write_text(cfg.to_json())
    lines = [{"step": s, "train/loss": 5 - s / 100, "train/base": "nan"} for s in range(1, 1001)]
    lines += [{"step": s, "val/loss": 4 - s / 500} for s in (500, 1000)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 10')  # cut short
    folder = tmp_path / "visualizations" / "train"
    folder.mkdir(parents=True)
    for step in (0, 1000):
        (folder / f"features_step_{step}.png").write_bytes(images.png(draw(None)["features"]))
    score = {"primary": 0.5, "primary_key": "miou"}
    item = {"task": "mados", "mode": "linear_probe", "valid": score, "test": None,
            "checkpoint_step": 1000}  # fmt: skip
    runner.append_line(tmp_path / "evals", item)
    return tmp_path


def test_the_page_stands_alone_and_says_it_all(run):
    path = _run_page.write(run)
    text = path.read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "form", "a"} & set(page.tags)
    assert page.links and all(x.startswith("data:image/png;base64,") for x in page.links)
    assert "http" not in text and "url(" not in text and "<mine>" not in text
    parts = ["&lt;mine&gt;", "train/loss", "val/loss", "features step 1000", "mados", "0.5000"]
    parts += ["dataset.validation_fraction", "0.25", "25 %", "the official nano, v1", "1,000"]
    for part in parts:
        assert part in text, part
    assert page.tags.count("svg") == 2 and page.tags.count("img") == 2  # no curve of NaN
    assert "eval_interval" not in text and "m-eurosat, " in text  # a group that is absent: one row
    assert len(text) < 60_000  # long curves are thinned out
    assert text.index("features step 0") < text.index("features step 1000")


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_page_and_fetches_nothing(run):
    page = _run_page.write(run)
    (run / "shown").mkdir()
    got = show(page, run / "shown")
    assert got.asked == [] and got.pictures == [(4, 4), (4, 4)]
    assert got.screenshot.stat().st_size > 20_000


def test_a_page_of_somebody_else_is_not_replaced(run):
    assert outputs.is_ours(_run_page.write(run))
    _run_page.write(run)
    (run / "report.html").write_text("<html>mine</html>")
    with pytest.raises(ValueError, match="was not written by this program"):
        _run_page.write(run)
    assert outputs.is_ours(_run_page.write(run, overwrite=True))


def test_what_is_no_run(tmp_path, run):
    with pytest.raises(ValueError, match="there is no folder"):
        _run_page.page(tmp_path / "absent")
    (run / "job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a run of launch\.finetune"):
        _run_page.page(run)
    (run / "job.json").unlink()
    (run / "config.json").write_text('{"common": ')
    with pytest.raises(ValueError, match="config.json cannot be read"):
        _run_page.page(run)
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match="is no run folder"):
        _run_page.page(run)


def test_an_evaluation_that_was_taken_again_is_shown_once(run):
    score = {"primary": 0.75, "primary_key": "miou"}
    item = {"task": "mados", "mode": "linear_probe", "valid": score, "test": None,
            "checkpoint_step": 1000}  # fmt: skip
    runner.append_line(run / "evals", item)
    with (run / "evals" / runner.LINES).open("a") as file:
        file.write('3\n{"valid": {"primary": 0.25}}\n{"task": "cut')
    text = _run_page.page(run)
    assert text.count("mados</td>") == 1 and "0.7500" in text and "0.5000" not in text
    assert "0.2500" in text


@pytest.mark.parametrize("text", ["[]", "3", '"a"'])
def test_a_config_that_is_none_is_told(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json cannot be read"):
        _run_page.page(run)


LINES = '{"step": 1, "train/loss": 3.5}\n{"step": 2, "train/loss": 3.0}\n'
ODD = [
    *({"config.json": text} for text in (
        '{"common": []}', '{"dataset": 5}', '{"common": {"training_modalities": 5}}',
        '{"common": {"training_modalities": [5], "recipe": 5, "run_name": [1]}}',
        '{"dataset": {"validation_fraction": "x"}}', '{"dataset": {"validation_fraction": 1e999}}',
    )),
    *({"metrics.jsonl": LINES + text} for text in (
        f'{{"step": 3, "train/loss": {"9" * 400}}}', f'{{"step": {"9" * 400}, "train/loss": 1}}',
        "[" * 100_000, '{"step": true}', '{"step": -1}',
    )),
    *({f"evals/{runner.LINES}": text} for text in (
        '{"task": "a", "valid": 5}', '{"task": "a", "valid": {"primary": "x"}}',
        '{"task": ["a"], "mode": {}, "settings": 5}', f'{{"valid": {{"primary": {"9" * 400}}}}}',
    )),
]  # fmt: skip


@pytest.mark.parametrize("files", ODD, ids=lambda f: next(iter(f.values()))[-60:])
def test_a_page_of_odd_files_is_made(run, files):
    for name, text in files.items():
        (run / name).write_text(text)
    Page(_run_page.page(run))


@pytest.mark.parametrize("depth", [900, 100_000])
def test_a_config_nested_without_end_is_told(run, depth):
    (run / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(ValueError, match="config.json cannot be read"):
        _run_page.page(run)


def test_a_page_takes_in_nothing_but_pictures(run, tmp_path):
    folder = run / "visualizations" / "train"
    (tmp_path / "secret").write_text("my key")
    (folder / "a_step_1.png").symlink_to(tmp_path / "secret")
    (folder / "b_step_1.png").mkdir()
    os.mkfifo(folder / "c_step_1.png")
    assert Page(_run_page.page(run)).tags.count("img") == 2


def test_a_run_without_more(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.5}\n')
    page = Page(_run_page.page(tmp_path))
    assert "img" not in page.tags and "svg" not in page.tags


@pytest.mark.parametrize(
    ("status", "fault", "said"),
    [
        ("completed", None, "report: page"),
        ("already complete", None, "report: page"),
        ("ended", None, "report: page"),
        ("completed", ValueError("not ours"), "no report: not ours"),
        ("completed", KeyError("task"), "no report: KeyError('task')"),
        ("cancelled", KeyError("task"), ""),
    ],
)
def test_a_run_does_not_fail_for_the_want_of_its_page(monkeypatch, capsys, status, fault, said):
    def write(folder):
        if fault is not None:
            raise fault
        return "page"

    monkeypatch.setattr(_run_page, "write", write)
    monkeypatch.setattr(train, "run", lambda cfg: Summary(status, 0, 4, True, 1.0))
    monkeypatch.setattr(train, "_STOPPED", SimpleNamespace(value=75))
    cfg = config_files.load_file("nano:smoke")
    assert train.main(cfg) == (75 if status == "cancelled" else 0)
    assert capsys.readouterr().out.strip() == said


@pytest.mark.parametrize(
    ("setting", "code"),
    [("no_checkpoints", 0), ("callbacks.checkpointer.enabled", 0), ("no_evals", 1)],
)
def test_nothing_saved_is_a_failure_only_where_it_was_to_be(monkeypatch, setting, code):
    monkeypatch.setattr(_run_page, "write", lambda folder: "page")
    monkeypatch.setattr(train, "run", lambda cfg: Summary("completed", 0, 4, False, 1.0))
    monkeypatch.setattr(train, "_STOPPED", SimpleNamespace(value=75))
    value = not setting.endswith("enabled")
    cfg = overrides.apply_values(
        config_files.load_file("nano:smoke"), {f"trainer.{setting}": value}
    )
    assert train.main(cfg) == code
