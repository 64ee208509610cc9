"""report.html: what is read from a run's folder, what is said about it, and what a browser makes of it."""

import json
import logging
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.browser import CHROMIUM, Browser
from trainer.report import runs_in, write, write_comparison
from trainer.report.catalogue import CHARTS, Better, Chart
from trainer.report.charts import figures
from trainer.report.curves import WIDTH, Axes, axes_of, log_ticks, path, thinned, tick_labels, ticks
from trainer.report.html import Html, tag
from trainer.report.live import LiveReport
from trainer.report.readings import Trace, read_off
from trainer.report.recording import Series, read
from trainer.report.verdict import State, headline, verdict
from trainer.stopping import Stopped

FLOOR = 0.75


def run(folder: Path, lines: list[dict], *, config: dict | None = None, facts: dict | None = None, **tables) -> Path:
    """A run's folder; further keywords are its tables (``samples=[...]``)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"config": config or {}, "facts": facts or {}}))
    for name, rows in {"metrics": lines, **tables}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pretraining(folder: Path, *, steps: int = 200, shift: float = 0.0, **more) -> Path:
    """A run whose held-out loss ends at 0.78, 4% above its floor."""
    lines = [
        {"step": s, "loss": 0.78 + 5 * math.exp(-s / 10) + shift, "lr": 1e-3, "grad_norm": 0.5, "tokens": 100 * s,
         "tokens_per_second": 1000.0, "mfu": 0.3, "memory_gb": 1.5, "time/forward_backward": 0.08, "time/data": 0.02}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    lines += [{"step": s, "eval/loss": 0.78 + 5 * math.exp(-s / 10) + shift} for s in range(20, steps + 1, 20)]
    facts = {"floors": {"eval/loss": FLOOR}, "ranks": 1, "device": "CPU"}
    return run(folder, lines, config={"steps": steps, "optimizer": {"clip": 1.0}}, facts=facts, **more)


LOSS = Chart("loss", "learning", "Loss", {"loss": "training"}, Better.lower)


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_the_headline_says_how_far_the_loss_is_from_the_entropy_of_the_language(tmp_path):
    recording = read(pretraining(tmp_path / "r"))
    drawn = figures(recording)
    assert headline(drawn).startswith("Held-out loss 0.7800, 4.0% above the entropy of the language;")
    states = {line.text.split(":")[0].split(" ")[0]: line.state for line in verdict(recording, drawn)}
    assert states["Finished"] is State.good
    assert "0.7500" not in headline(drawn)
    assert ">entropy of the language 0.75</text>" in text_of(write(tmp_path / "r"))


def test_formats_of_the_export_are_a_table_with_the_original_first(tmp_path):
    folder = pretraining(tmp_path / "r")
    assert "Formats" not in text_of(write(folder))
    cost = {"kl": 0.25, "kl_error": 0.02, "perplexity": 4.5, "original_perplexity": 4.0, "tokens": 1200, "sequences": 9}
    records = {
        "int4": {"size": 5e6, "original_size": 16e6, **cost},
        "nf4": {"size": 6e6, "original_size": 16e6, **cost, "kl": 5e-4},
    }
    for name, values in {**records, "int4-step-00000002": cost, "aside": cost}.items():
        (folder / f"export-{name}").mkdir()
        record = {"format": name if name in records else "int4", "cost": values}
        (folder / f"export-{name}" / "onecurve.json").write_text(json.dumps(record))
    section = text_of(write(folder)).partition('<section id="formats"')[2].partition("</section>")[0]
    rows = [re.sub("<[^>]+>", " ", row).split() for row in re.findall("<tr>(.*?)</tr>", section)]
    assert rows[1:] == [
        ["original", "16.0", "–", "–", "4.000"], ["int4", "5.0", "0.2500", "0.0200", "4.500"],
        ["nf4", "6.0", "5.0e-04", "0.0200", "4.500"],
    ]  # fmt: skip
    assert "1,200 held-out tokens of 9 sequences" in section


def test_the_time_of_a_run_is_that_of_its_laps(tmp_path):
    waited = {"straggler/waiting": 2.0, "straggler/rank": 1.0, "straggler/slowness": 3.0}
    lines = [{"step": s, "loss": 1.0, "time/forward_backward": 0.2, "time/data": 0.1, **waited} for s in range(1, 101)]
    recording = read(run(tmp_path / "r", lines, config={"steps": 100}))
    assert "Finished: 100 steps, about 30 s of work." in [line.text for line in verdict(recording, figures(recording))]


def test_the_direction_of_a_curve_is_its_slope_over_its_last_part():
    steps = np.arange(0.0, 1000.0)
    falling = Trace("training", Series(steps, 2.0 - 0.001 * steps))
    # 0.1 less every 100 steps, of a value that ends at 1.001.
    assert read_off([falling], LOSS).line() == "Training 1.01; still falling by 10.0% per 100 steps"
    level = Trace("training", Series(steps, np.where(steps % 2 == 0, 1.0, 1.1)))
    assert read_off([level], LOSS).line() == "Training 1.05; level by now"


def test_evaluations_that_got_worse_are_said_and_marked(tmp_path):
    lines = [{"step": s, "loss": 1.0 - s / 1000} for s in range(1, 101)]
    lines += [{"step": 10 * n, "eval/loss": v} for n, v in enumerate([2.0, 1.5, 1.0, 1.2, 1.4], start=1)]
    recording = read(run(tmp_path / "r", lines))
    assert "best 1 at step 30, worse since then" in headline(figures(recording))
    assert [line.state for line in verdict(recording, figures(recording))].count(State.watch) == 1


def test_accuracy_is_read_against_all_and_is_worth_a_look_near_chance(tmp_path):
    for value, looked_at in ((0.98, 0), (0.8, 0), (0.51, 1)):
        recording = read(run(tmp_path / str(value), [{"step": s, "eval/accuracy": value} for s in (1, 2)]))
        assert headline(figures(recording)) == f"Held-out preference accuracy {value} of 1.0."
        assert [x.state for x in verdict(recording, figures(recording))].count(State.watch) == looked_at


def test_dpo_has_ln_2_and_reward_margins_drawn_in(tmp_path):
    lines = [{"step": s, "loss": 0.6, "rewards/accuracy": 0.7, "rewards/margin": 0.1} for s in range(1, 30)]
    sigmoid = read(run(tmp_path / "a", lines, facts={"initial_loss": math.log(2)}))
    levels = {f.chart.id: [v.value for v in f.levels] for f in figures(sigmoid)}
    assert levels["loss"] == pytest.approx([math.log(2)])
    simpo = read(run(tmp_path / "b", lines, facts={"initial_loss": None}))
    assert next(f for f in figures(simpo) if f.chart.id == "loss").levels == []


def test_ppo_is_read_by_its_gold_reward_and_not_by_its_loss(tmp_path):
    lines = [
        {"step": s, "loss": 0.1, "policy/loss": 0.1, "policy/clip_fraction": 0.5, "objective/score": s / 50,
         "objective/gold": 0.5 - abs(s - 50) / 100, "objective/kl": s / 10, "objective/reward": 0.1}
        for s in range(1, 101)
    ]  # fmt: skip
    recording = read(run(tmp_path / "r", lines, config={"pipeline": {"kl_target": 6.0}}))
    drawn = figures(recording)
    by_id = {figure.chart.id: figure for figure in drawn}
    assert headline(drawn).startswith("Gold reward 0.0")
    assert "worse since then" in headline(drawn)
    assert {"reward-against-kl", "gold-against-proxy"} <= by_id.keys()
    assert (by_id["loss"].chart.section, by_id["loss"].chart.weight) == ("policy", 0)
    assert [v.value for v in by_id["kl-from-the-reference"].levels] == [6.0]
    assert any(line.state is State.watch and "Clip fraction" in line.text for line in verdict(recording, drawn))


def test_an_unknown_metric_has_a_plot_of_its_own(tmp_path):
    recording = read(run(tmp_path / "r", [{"step": s, "mine/special": s} for s in (1, 2, 3)]))
    assert [figure.chart.title for figure in figures(recording)] == ["mine/special"]


def test_a_step_that_was_logged_twice_counts_as_it_was_logged_last(tmp_path):
    lines = [{"step": s, "loss": float(s)} for s in (1, 2, 3)] + [{"step": s, "loss": 10.0 * s} for s in (2, 3, 4)]
    series = read(run(tmp_path / "r", lines)).series["loss"]
    assert series.steps.tolist() == [1, 2, 3, 4]
    assert series.values.tolist() == [1, 20, 30, 40]


def test_a_line_that_was_cut_off_is_counted_and_the_rest_is_read(tmp_path):
    folder = run(tmp_path / "r", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    recording = read(folder)
    assert (recording.last, recording.unreadable) == (2, 1)
    assert "1 line of the logs cannot be read" in text_of(write(folder))


def test_values_that_are_not_finite_break_the_curve_and_are_said(tmp_path):
    values = [1.0, 2.0, math.nan, 4.0, math.inf]
    axes = Axes((0, 10), (0, 10), False)
    drawing = path(axes, Series(np.arange(5.0), np.array(values)))
    assert [drawing.count("M"), drawing.count("L")] == [2, 1]
    folder = run(tmp_path / "r", [{"step": s, "loss": v} for s, v in enumerate(values)])
    assert "Values that are not finite: loss (2)." in text_of(write(folder))


@pytest.mark.parametrize(
    "lines", [[], [{"step": 1, "loss": math.nan}], [{"step": 1, "loss": 0.0}], [{"step": 0, "eval/loss": 1}]]
)
def test_a_run_of_next_to_nothing_has_a_report(tmp_path, lines):
    assert "</html>" in text_of(write(run(tmp_path / "r", lines)))


def test_a_folder_of_nothing_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("{broken: [")
    assert "No step was logged yet" in text_of(write(tmp_path))


def test_text_from_data_is_shown_and_never_run(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    folder = pretraining(
        tmp_path / "r",
        samples=[{"step": 1, "prompt": evil, "completion": evil, evil: evil}],
        errors=[{"step": 1, "source": evil, "prompt": evil, "completion": evil, "rejected": evil}],
        histograms=[{"step": 1, "name": evil, "edges": [-1, 0, 1], "counts": [1, 3]}],
    )
    record = yaml.safe_load((folder / "config.yaml").read_text())
    record["facts"] |= {"statistics": [evil], "defaults": {"name": evil}, "command": evil}
    record["config"] |= {"name": evil + "!"}
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, evil: 1.0}) + "\n")
    (folder / "export").mkdir()
    (folder / "export" / "onecurve.json").write_text(json.dumps({"ancestry": [{evil: evil}]}))
    other = pretraining(tmp_path / "<!--<script>")
    for file in (write(folder), write_comparison(tmp_path / "c.html", [folder, other])):
        page = text_of(file)
        assert evil not in page
        assert "<!--" not in page
        assert "<img" not in page
        assert "alert(1)&lt;/script&gt;" in page
        tags = Tags()
        tags.feed(page)
        assert tags.scripts.count(None) == 1
        assert {*tags.scripts} <= {None, "application/json"}
        assert tags.handlers == []


class Tags(HTMLParser):
    """Ids, references, scripts and event handlers of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str | None] = []
        self.handlers: list[str] = []
        self.described: list[str] = []

    def handle_starttag(self, tag, attrs):
        held = dict(attrs)
        self.handlers += [key for key in held if key.startswith("on")]
        if "id" in held:
            self.ids.append(held["id"])
        for key in ("href", "src"):
            if key in held:
                self.links.append(held[key])
        if tag == "script":
            self.scripts.append(held.get("type"))
        if "aria-labelledby" in held:
            self.described += held["aria-labelledby"].split()


def test_a_page_refers_to_nothing_outside_and_its_names_are_whole(tmp_path):
    page = text_of(write(pretraining(tmp_path / "r")))
    tags = Tags()
    tags.feed(page)
    assert len(tags.ids) == len(set(tags.ids))
    assert [link for link in tags.links if not link.startswith(("#", "data:"))] == []
    assert {link[1:] for link in tags.links if link.startswith("#")} <= set(tags.ids)
    assert set(tags.described) <= set(tags.ids)
    assert re.findall(r"(?:url\(|@import|https?://)[^)\s\"]*", page.replace("http://www.w3.org/2000/svg", "")) == [
        match for match in re.findall(r"url\([^)\s\"]*", page) if match.startswith("url(#")
    ]


def test_a_long_run_stays_small_and_keeps_its_spikes(tmp_path):
    rows = []
    for s in range(1, 100_001):
        spike = 50.0 if s == 77_777 else 1.0
        rows.append(f'{{"step": {s}, "loss": {2 + s % 7 / 10}, "lr": {1 / s}, "grad_norm": {spike}, "tokens": {s}}}\n')
    folder = run(tmp_path / "r", [])
    (folder / "metrics.jsonl").write_text("".join(rows))
    file = write(folder)
    assert file.stat().st_size < 2_000_000
    ends, means = thinned(read(folder).series["grad_norm"])
    assert len(ends) == 600
    assert ends.values.max() == 50
    assert means.values.max() < 2
    assert "1 gradient spike," in text_of(file)


def test_every_chart_has_an_id_of_its_own_and_known_words():
    assert len({chart.id for chart in CHARTS}) == len(CHARTS)
    with pytest.raises(TypeError, match="hinnt"):
        Chart.from_yaml("learning", {"id": "x", "title": "X", "metrics": {"x": "x"}, "hinnt": "y"})


def test_text_is_escaped_once_wherever_it_enters_markup():
    inner = tag("b", "<&>", title='"')
    assert inner == '<b title="&quot;">&lt;&amp;&gt;</b>'
    assert tag("p", inner, Html("<br>")) == f"<p>{inner}<br></p>"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.7613, 0.9002), (-3e-5, 2e-4), (1, 100_000), (-2e9, 4e9)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 11
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in found)
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 2.5, 5, 10)


def test_ticks_between_whole_numbers_keep_their_decimal(tmp_path):
    lines = [{"step": s, "objective/reward": float(s)} for s in range(11)]
    assert '">2.5</text>' in text_of(write(run(tmp_path / "r", lines)))


def test_ticks_of_decades_are_powers_of_ten():
    assert log_ticks(0.5e-3, 20) == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([2.98e-4, 2.99e-4, 3e-4], ["2.98e-4", "2.99e-4", "3.00e-4"]),
        ([0, 2.5, 5], ["0", "2.5", "5.0"]),
        ([10_000, 10_010], ["10.00k", "10.01k"]),
        ([-2e9, 0, 2e9], ["-2G", "0", "2G"]),
    ],
)
def test_ticks_that_differ_are_written_differently(values, labels):
    assert tick_labels(values) == labels


def test_steps_are_counted_in_whole_numbers_and_the_axis_has_a_name(tmp_path):
    page = text_of(write(run(tmp_path / "r", [{"step": s, "loss": 1.0 / s} for s in (1, 2, 3)])))
    figure = page[page.index('id="loss"') :]
    labels = re.findall(r'class="tick"[^>]*y="238"[^>]*>([^<]+)<', figure[: figure.index("</svg>")])
    assert labels == ["1", "2", "3"]
    assert ">step</text>" in figure


def test_the_first_and_the_last_evaluation_are_inside_of_the_picture(tmp_path):
    lines = [
        {"step": s, "eval/bits_per_byte": v} for s, v in ((0, 9.0), (50, 2.0), (100, 1.6), (150, 1.5), (200, 1.49))
    ]
    [figure] = figures(read(run(tmp_path / "r", lines)))
    axes = axes_of(figure)
    assert axes.x[0] < 0
    assert axes.x[1] > 200
    assert axes.y[1] > 9


def test_a_beginning_that_leaves_the_picture_is_said(tmp_path):
    lines = [{"step": s, "loss": 1000.0 if s == 1 else 1.0 + 1 / s} for s in range(1, 101)]
    assert ">↑ up to 1,000</text>" in text_of(write(run(tmp_path / "r", lines)))


def test_a_histogram_is_read_by_the_examples_that_were_counted(tmp_path):
    lines = [
        {"step": 0, "name": "eval/margin", "edges": [-1.0, 1.0], "counts": [400], "positive": 0},
        {"step": 9, "name": "eval/margin", "edges": [-1.0, 1.0, 3.0], "counts": [40, 360], "positive": 397},
    ]
    page = text_of(write(run(tmp_path / "r", [], histograms=lines)))
    assert "397 of 400 above 0 at step 9; 0 of 400 above 0 at step 0" in page
    before = text_of(
        write(run(tmp_path / "old", [], histograms=[{k: v for k, v in lines[1].items() if k != "positive"}]))
    )
    assert "400 examples at step 9" in before


def test_a_run_that_was_stopped_has_not_failed(tmp_path):
    live = LiveReport(pretraining(tmp_path / "r", steps=20))
    live.close(Stopped(20, 1000, "SIGINT"))
    page = text_of(tmp_path / "r" / "report.html")
    assert "Stopped after step 20 of 20 (SIGINT) and saved; the same command continues." in page
    assert "failed" not in page.partition("<main")[0].partition("<header")[2]


def test_runs_of_different_length_have_no_best(tmp_path):
    short, long = pretraining(tmp_path / "short", steps=40), pretraining(tmp_path / "long", steps=200)
    page = text_of(write_comparison(tmp_path / "c.html", [short, long]))
    assert "Not of the same length, so none is called best: short 0.8716 at step 40, long 0.78 at step 200" in page
    assert "Best:" not in page
    assert "◂</span>" not in page


def test_a_target_is_shown_with_its_direction(tmp_path):
    results = [{"name": "gold", "value": 0.4664, "target": 0.7, "better": "lower", "met": True}]
    (tmp_path / "lifecycle.json").write_text(json.dumps({"results": results}))
    page = text_of(write(tmp_path))
    assert "gold: 0.4664, target at most 0.7" in page
    assert ">at most 0.7</td>" in page


def test_reward_over_kl_is_drawn_as_dots_without_a_line_through_them(tmp_path):
    lines = [{"step": s, "objective/kl": abs(s - 10), "objective/score": float(s)} for s in range(1, 21)]
    page = text_of(write(run(tmp_path / "r", lines)))
    plot = page[page.index('id="reward-against-kl"') :]
    curve = plot[plot.index('class="evals') - 30 : plot.index("</svg>")]
    assert curve.count("<circle") == 20
    assert "<path" not in curve.partition("</g>")[0]


def test_points_of_a_sweep_are_named_and_plotted_by_their_settings(tmp_path):
    (tmp_path / "points").mkdir()
    for n, rate in enumerate((1e-3, 1e-4)):
        folder = pretraining(tmp_path / f"digest{n}", shift=n / 10)
        record = yaml.safe_load((folder / "config.yaml").read_text())
        record["config"] |= {"optimizer": {"lr": rate}, "run_dir": str(folder), "sweep": {"metric": "eval/loss"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(record))
    page = text_of(write_comparison(tmp_path / "report.html", list(runs_in(tmp_path))))
    assert "Best: lr=0.001 with 0.78; last: lr=0.0001 with 0.88" in page
    assert "eval/loss over optimizer.lr" in page
    assert "Best: 0.78 at optimizer.lr=0.001" in page
    assert "digest0" not in page.partition("<main")[2]


def test_evaluations_are_said_to_move_as_the_last_two_do():
    bent = Trace(
        "held out", Series(np.array([100.0, 200.0, 300.0, 400.0]), np.array([1.0, 0.3, 0.12, 0.1])), points=True
    )
    # 0.02 of 0.1 in the last hundred steps, though 0.18 in the hundred before.
    assert read_off([bent], LOSS).line() == "Held out 0.1; still falling by 20.0% per 100 steps"


def test_an_evaluation_is_drawn_once_where_two_metrics_share_its_name(tmp_path):
    lines = [{"step": s, "entropy": 1.0, "eval/entropy": 0.9} for s in (1, 2, 3)]
    entropy = next(f for f in figures(read(run(tmp_path / "r", lines))) if f.chart.id == "entropy")
    assert [t.label for t in entropy.traces] == ["training", "held out"]


def test_a_model_s_forebears_are_followed_to_the_first(tmp_path):
    base, tuned = tmp_path / "runs" / "base", tmp_path / "runs" / "tuned"
    run(base, [])
    run(tuned, [], config={"model": {"path": str(base / "export")}})
    last = run(tmp_path / "runs" / "last", [], config={"model": {"path": "runs/tuned/export"}})
    for folder, step in ((base, 7), (tuned, 9)):
        (folder / "export").mkdir()
        (folder / "export" / "onecurve.json").write_text(json.dumps({"step": step, "data": f"made-of-{step}"}))
    assert [a.facts["step"] for a in read(last).ancestors] == [9, 7]
    assert "made-of-7" in text_of(write(last))


def test_a_comparison_tells_runs_apart_without_colour_and_shows_what_differs(tmp_path):
    one = pretraining(tmp_path / "one", samples=[{"step": 9, "prompt": "Who?", "completion": "Ada."}])
    two = pretraining(tmp_path / "two", shift=0.1, samples=[{"step": 9, "prompt": "Who?", "completion": "Ben."}])
    record = yaml.safe_load((two / "config.yaml").read_text())
    record["config"]["optimizer"]["clip"] = 0.5
    (two / "config.yaml").write_text(yaml.safe_dump(record))
    page = text_of(write_comparison(tmp_path / "c.html", [one, two]))
    assert 'class="smooth s0 d0"' in page
    assert 'class="smooth s1 d1"' in page
    assert "<code>optimizer.clip</code></th><td>1</td><td>0.5</td>" in page.replace(' class=""', "")
    assert "Best: one with 0.78; last: two with 0.88" in page
    assert re.search(r"Who\?</th><td class=\"text\">Ada\.</td><td class=\"text\">Ben\.", page)
    assert list(runs_in(tmp_path)) == [one, two]


def test_a_lifecycle_shows_results_answers_by_stage_and_the_stages_own_plots(tmp_path):
    pretraining(tmp_path / "base")
    held = {
        "stages": [
            {"name": "pretrain", "run_dir": "base", "status": "done", "seconds": 125, "parents": []},
            {"name": "ppo", "run_dir": "not-there", "status": "waiting", "parents": ["pretrain"]},
        ],
        "results": [
            {"name": "loss", "value": 0.78, "target": 0.785, "optimum": FLOOR, "met": True},
            {"name": "gold", "value": 0.4, "target": 0.8, "optimum": 1.0, "met": False},
        ],
        "samples": [{"prompt": "Who?", "answers": {"base": "Ad", "ppo": "Ada."}}],
    }
    (tmp_path / "lifecycle.json").write_text(json.dumps(held))
    page = text_of(write(tmp_path))
    assert "1 of 2 targets met." in page
    assert page.count("✓ met") == 1
    assert page.count("✕ missed") == 1
    assert re.search(r"Who\?</th><td class=\"text\">Ad</td><td class=\"text\">Ada\.", page)
    assert 'id="pretrain-loss"' in page
    assert "Held-out loss 0.7800, 4.0% above" in page


def test_a_broken_lifecycle_has_a_report(tmp_path):
    (tmp_path / "lifecycle.json").write_text('{"stages": [')
    assert "</html>" in text_of(write(tmp_path))


def test_a_report_that_cannot_be_written_is_logged_and_the_run_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        LiveReport(tmp_path / "not-there").write()
    assert "report.html could not be written" in caplog.text


def test_a_dear_report_waits_for_its_turn_and_the_last_one_says_what_failed(tmp_path):
    live = LiveReport(pretraining(tmp_path / "r"))
    live.write()
    (tmp_path / "r" / "report.html").unlink()
    live.write()
    assert not (tmp_path / "r" / "report.html").exists()
    live.close(ValueError("it broke"))
    assert "Stopped after step 200 of 200: ValueError: it broke" in text_of(tmp_path / "r" / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [1200, 800, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_without_complaint_request_or_sideways_scrolling(browser, tmp_path, width, dark):
    file = write(pretraining(tmp_path / "r", samples=[{"step": 1, "prompt": "p" * 400, "completion": "c" * 400}]))
    browser.open(file, width=width, dark=dark)
    assert browser.said == []
    assert browser.asked == []
    assert browser.run("document.documentElement.scrollWidth") == width
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 300) == dark
    # Letters of a plot are at least 10 pixels high on the screen.
    scale = browser.run("document.querySelector('.plot svg').clientWidth") / WIDTH
    size = browser.run("getComputedStyle(document.querySelector('.plot .tick')).fontSize")
    assert float(size.removesuffix("px")) * scale >= 10


def test_ticks_of_a_small_window_are_whole_and_differ(browser, tmp_path):
    lines = [{"step": s, "lr": -2.98e-4 - s * 1e-6, "grad_norm": 1.0} for s in (1, 2, 3)]
    browser.open(write(run(tmp_path / "r", lines)), width=800)
    edge = "Math.min(...[...document.querySelectorAll('.plot .tick')].map(t => t.getBBox().x))"
    assert browser.run(edge) >= 0
    norms = "[...document.querySelectorAll('#gradient-norm .tick')].map(t => t.textContent)"
    assert browser.run(norms)[:3] == ["0.5", "1", "2"]


def test_answers_of_six_stages_fit_a_laptop(browser, tmp_path):
    answers = dict.fromkeys(("base", "sft", "reward", "dpo", "ppo", "grpo"), "A sentence of some words. " * 4)
    (tmp_path / "lifecycle.json").write_text(json.dumps({"samples": [{"prompt": "Who paints?", "answers": answers}]}))
    browser.open(write(tmp_path), width=1200, dark=False)
    assert (
        browser.run("(() => { const t = document.querySelector('.scroll'); return t.scrollWidth - t.clientWidth; })()")
        == 0
    )


def test_it_can_be_used_by_keyboard(browser, tmp_path):
    browser.open(write(pretraining(tmp_path / "r")))
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0
    seen = []
    for _ in range(20):
        browser.press("Tab", 9)
        seen.append(browser.run("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
        if seen[-1] == "Loss: values by step":
            break
    assert seen.index("smoothing") < seen.index("theme") < seen.index("Loss: values by step")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Home", 36)
    browser.press("ArrowRight", 39)
    text = browser.run("document.activeElement.getAttribute('aria-valuetext')")
    assert text.startswith("step 2: training ")
    assert browser.run("document.querySelector('#loss .values').textContent") == text


def test_the_switch_changes_the_theme_and_the_slider_the_curve(browser, tmp_path):
    browser.open(write(pretraining(tmp_path / "r")))
    before = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") != before
    browser.run("document.getElementById('theme').click()")
    curve = "document.querySelector('#loss .plot path.smooth').getAttribute('d')"
    smooth = browser.run(curve)
    move = "(() => { const s = document.getElementById('smoothing'); s.value = 0; s.dispatchEvent(new Event('input')); })()"
    browser.run(move)
    assert browser.run(curve) != smooth
    assert browser.run("document.getElementById('smoothed').textContent") == "0%"
    assert browser.said == []


def test_the_script_smooths_by_a_two_sided_exponential_average(browser, tmp_path):
    file = write(pretraining(tmp_path / "r"))
    recording = read(tmp_path / "r")
    figure = next(f for f in figures(recording) if f.chart.id == "loss")
    values = recording.series["loss"].values
    decay = math.exp(-1 / (0.02 * len(values)))  # the slider stands at 2% of the curve
    weights = decay ** np.abs(np.subtract.outer(np.arange(len(values)), np.arange(len(values))))
    expected = axes_of(figure).up(weights @ values / weights.sum(1))
    browser.open(file)
    drawn = browser.run("document.querySelector('#loss .plot path.smooth').getAttribute('d')")
    heights = np.array(re.findall(r"-?[\d.]+", drawn), dtype=float)[1::2]
    # Values reach the page with five digits, and coordinates are rounded to a tenth of a pixel.
    assert heights == pytest.approx(expected, abs=0.25)
