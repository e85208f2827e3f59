"""The report: in a real browser, of runs that were restarted, under way, and not there at all."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from browser import Browser, chromium
from processes import ROOT, Started, run, train

ODD, SEEDS = "<i>'\"&`", "optim.lr 0.1, 2 seeds"
WITHOUT_BOKEH = (
    "-c",
    "import sys; sys.modules['bokeh'] = None; from distvgg.cli import main; sys.exit(main())",
)

# A shell starts what is in its background with SIGINT ignored.
HEARS_CTRL_C = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from distvgg.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds, and a run of another learning rate that was stopped and went on on two processes.

    Its name ends elements of HTML and strings of JavaScript, where it is not escaped.
    """
    folder = tmp_path_factory.mktemp("runs")
    seeds = [folder / "seed0", folder / "seed1"]
    for n, seed in enumerate(seeds):
        words = ("--seed", str(n), "--eval.every_epochs", "0.3", "--track.report", "true")
        train(seed, *words)
    other = folder / ODD
    words = ("--optim.lr", "0.2", "--eval.every_epochs", "0.3")
    with Started(other, *words) as started:
        started.until_step(4)
        started.process.send_signal(signal.SIGTERM)  # sooner seen than STOP: ten steps take 0.3 s
        started.end()
    assert (other / "REQUEUE").exists()
    train(other, *words, processes=2)
    return [*seeds, other]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "all.html"
    done = run(["report", *map(str, runs), "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report of 3 runs: {out}\n"
    return out


def pixels_of(browser: Browser, plot: str, colour: str) -> int:
    """How many pixels of a plot have a colour, as it is drawn on the page."""
    element = browser.driver.find_element("css selector", f"[data-plot={plot}]")
    browser.js("new Promise(requestAnimationFrame)")
    picture = Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return sum(n for n, found in picture.getcolors(1 << 24) if found == wanted)


def colour_of(browser: Browser, unit: str) -> str:
    rgb = browser.js(f"getComputedStyle({button(unit)}.querySelector('i')).backgroundColor")
    return "#{:02x}{:02x}{:02x}".format(*map(int, re.findall(r"\d+", rgb)))


def button(unit: str) -> str:
    """The button of the legend that has this name, as JavaScript."""
    return (
        "[...document.querySelectorAll('.unit')]"
        f".find(b => b.textContent === {json.dumps(unit)} && !b.hidden)"
    )


def x_range(browser: Browser) -> list[float]:
    """The shown range of each curve's axis; they are one."""
    spec = "JSON.parse(document.getElementById('spec').textContent)"
    found = browser.js(
        f"{spec}.curves.map(id => Bokeh.documents[0].get_model_by_id(id).x_range)"
        ".map(range => [range.start, range.end])"
    )
    assert all(pair == found[0] for pair in found)
    return found[0]


def test_the_report_shows_all_and_requests_nothing(browser: Browser, page: Path) -> None:
    browser.emulate("light", 1400)
    browser.open(page)
    assert browser.js("[...document.querySelectorAll('h2')].map(h => h.textContent)") == [
        *("Summary", "Curves", "Classes", "Calibration", "Time", "Network", "Config", "Provenance"),
    ]
    plots = browser.js("[...document.querySelectorAll('[data-plot]')].map(p => p.dataset.plot)")
    assert plots == [
        *("loss", "top1", "top5", "lr", "speed", "norm", "confusion", "calibration"),
    ]
    assert browser.js("[...deep(document, 'canvas')].length") >= len(plots)
    for plot in ("loss", "lr", "norm"):
        for unit in (SEEDS, ODD):
            assert pixels_of(browser, plot, colour_of(browser, unit)) > 50, (plot, unit)
    text = browser.js("document.body.innerText")
    assert "1 at step 0 → 2 at step" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "optim.lr" in browser.js("document.querySelector('#config table').innerText")
    network = browser.js("document.querySelector('#network').textContent")
    assert "VGG-11-BN for 32×32 pixels and 100 classes, 28,142 parameters" in network
    assert "features.0Conv2d3 × 32 × 3281" in network
    strips = browser.js("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
    assert strips
    assert all(strip == [5 * 32, 32] for strip in strips)
    assert browser.logged() == []
    assert browser.requests() == [page.absolute().as_uri()]


def test_the_legend_hides_a_run_and_shows_it_again(browser: Browser, page: Path) -> None:
    browser.emulate("light", 1400)
    browser.open(page)
    colour = colour_of(browser, ODD)
    shown = pixels_of(browser, "loss", colour)
    browser.js(f"{button(ODD)}.click()")
    assert browser.js(f"{button(ODD)}.ariaPressed") == "false"
    assert pixels_of(browser, "loss", colour) == 0
    browser.click("#all")
    assert pixels_of(browser, "loss", colour) == shown > 50


def test_seeds_are_a_mean_or_single_runs(browser: Browser, page: Path) -> None:
    browser.emulate("light", 1400)
    browser.open(page)
    names = "[...document.querySelectorAll('.unit')].filter(b => !b.hidden).map(b => b.textContent)"
    assert sorted(browser.js(names)) == [ODD, SEEDS]
    browser.click("input[value=each]")
    assert sorted(browser.js(names)) == [ODD, "seed0", "seed1"]
    for name in browser.js(names):
        assert pixels_of(browser, "loss", colour_of(browser, name)) > 50


def test_the_axis_is_step_epoch_or_a_time_and_a_box_zooms(browser: Browser, page: Path) -> None:
    from selenium.webdriver import ActionChains

    browser.emulate("light", 1400)
    browser.open(page)
    steps = x_range(browser)
    assert 9 < steps[1] < 12  # 600 images in batches of 64
    browser.click("input[value=epoch]")
    epochs = x_range(browser)
    assert 1.0 < epochs[1] < 1.2
    browser.click("input[value=time]")
    training = x_range(browser)
    assert training != epochs
    browser.click("input[value=wall]")
    assert x_range(browser)[1] > training[1]
    browser.click("input[value=step]")
    assert x_range(browser) == steps
    # The state of the page outlives its reload.
    browser.click("input[value=epoch]")
    browser.driver.refresh()
    browser.until("document.documentElement.dataset.ready")
    assert x_range(browser) == epochs
    browser.click("input[value=step]")
    plot = browser.driver.find_element("css selector", "[data-plot=loss]")
    browser.js("document.querySelector('[data-plot=loss]').scrollIntoView({block: 'center'})")
    drag = ActionChains(browser.driver).move_to_element_with_offset(plot, -80, -20)
    drag.click_and_hold().move_by_offset(160, 60).release().perform()
    start, end = x_range(browser)
    assert steps[0] < start < end < steps[1]
    # Somewhere in the middle column of the plot, the pointer is on a curve.
    browser.click("input[value=epoch]")
    browser.click("input[value=step]")
    for down in range(-90, 100, 6):
        ActionChains(browser.driver).move_to_element_with_offset(plot, 0, down).perform()
        tips = browser.js("[...deep(document, '.bk-Tooltip')].map(t => t.shadowRoot.textContent)")
        if tips:
            break
    assert any("train loss" in tip for tip in tips), tips


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_on_a_desk_and_a_phone(
    browser: Browser, page: Path, scheme: str, width: int
) -> None:
    browser.emulate(scheme, width, mobile=width < 500)
    browser.open(page)
    assert browser.js("document.documentElement.scrollWidth") <= width
    columns = browser.js("getComputedStyle(document.querySelector('.plots')).gridTemplateColumns")
    assert len(columns.split()) == (2 if width == 1400 else 1)
    element = browser.driver.find_element("css selector", "[data-plot=lr]")
    picture = Image.open(io.BytesIO(element.screenshot_as_png)).convert("L")
    background = max(picture.getcolors(256))[1]
    assert (background < 60) == (scheme == "dark")
    darkest, lightest = picture.getextrema()
    assert lightest - darkest > 100  # labels can be read
    assert browser.logged() == []


def test_a_training_leaves_a_report_and_says_where(browser: Browser, runs: list[Path]) -> None:
    report = runs[0] / "report.html"
    written = report.stat().st_mtime_ns  # by the training
    words = ["train", str(runs[0] / "config.yaml"), "--run-dir", str(runs[0])]
    assert f"  report: {report}" in run(words).stdout.splitlines()
    assert report.stat().st_mtime_ns == written
    assert report.stat().st_size < 3e6
    browser.emulate("light", 1400)
    browser.open(report)
    assert browser.js("document.title") == "seed0 · distvgg"
    assert browser.js("document.querySelectorAll('.unit').length") == 1
    assert browser.logged() == []


def test_without_bokeh_the_command_says_what_to_install_and_a_training_ends_well(
    runs: list[Path], tmp_path: Path
) -> None:
    missing = "the report needs Bokeh, which is not installed: pip install bokeh"
    out = tmp_path / "out.html"
    done = run(["report", str(runs[0]), "--out", str(out)], program=WITHOUT_BOKEH)
    assert (done.returncode, done.stderr) == (2, f"distvgg: error: {missing}\n")
    (runs[1] / "report.html").unlink(missing_ok=True)
    words = ["train", str(runs[1] / "config.yaml"), "--run-dir", str(runs[1])]
    done = run(words, program=WITHOUT_BOKEH)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"  report: not written ({missing})"


def test_a_report_that_cannot_be_written_is_no_failed_run(runs: list[Path]) -> None:
    report = runs[1] / "report.html"
    report.unlink(missing_ok=True)
    report.mkdir()
    words = ["train", str(runs[1] / "config.yaml"), "--run-dir", str(runs[1])]
    done = run(words)
    report.rmdir()
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith(f"  report: not written (cannot write {report}")


@pytest.mark.parametrize("case", ["unknown", "no run", "no rows", "datasets", "out", "of a run"])
def test_mistakes_are_one_line(runs: list[Path], tmp_path: Path, case: str) -> None:
    words, out = [str(runs[0])], tmp_path / "r.html"
    other = tmp_path / "other"
    if case == "unknown":
        words, expected = [str(other)], f"run folder {other} does not exist"
    elif case == "no run":
        other.mkdir()
        words, expected = [str(other)], f"{other}: no run here"
    elif case == "no rows":
        other.mkdir()
        shutil.copy(runs[0] / "config.yaml", other)
        words, expected = [str(other)], f"{other} has no rows in metrics.jsonl yet"
        done = run(["report", *map(str, (runs[0], other)), "--out", str(out)])
        assert (done.returncode, done.stderr.count("\n")) == (0, 1)
        assert done.stderr.startswith(f"note: left out: {expected}")
        out.unlink()
    elif case == "datasets":
        other.mkdir()
        text = (runs[0] / "config.yaml").read_text()
        (other / "config.yaml").write_text(text.replace("name: synthetic", "name: cifar100"))
        shutil.copy(runs[0] / "metrics.jsonl", other)
        words = [*words, str(other)]
        expected = "dataset of "  # and their names, as far as the folders differ
    elif case == "of a run":
        out = other / "checkpoints" / "step_00000004" / "model.safetensors"
        out.parent.mkdir(parents=True)
        (out.parent / "manifest.json").touch()
        expected = f"{out} belongs to a run: choose another place with --out"
    else:
        out = tmp_path / "no" / "r.html"
        expected = f"cannot write {out} (No such file or directory): choose another file with --out"
    done = run(["report", *words, "--out", str(out)])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"distvgg: error: {expected}")
    assert case != "datasets" or "cifar100 (expected synthetic of " in line
    assert not out.exists()


@pytest.mark.variant
def test_a_watch_follows_a_run_to_its_end(
    browser: Browser, runs: list[Path], tmp_path: Path
) -> None:
    """The run is given row by row, the last of them half written."""
    growing, out = tmp_path / "run", tmp_path / "report.html"
    growing.mkdir()
    shutil.copy(runs[0] / "config.yaml", growing)
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (growing / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    watch = subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, "report", str(growing), "--out", str(out), "--watch"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert watch.stdout is not None
        assert "Ctrl-C ends the watch" in watch.stdout.readline()
        before = out.read_text()
        assert '<meta http-equiv="refresh" content="5">' in before
        browser.emulate("light", 1400)
        browser.open(out)
        (growing / "metrics.jsonl").write_text("".join(lines[:8]))
        end = time.monotonic() + 20
        while out.read_text() == before:
            assert time.monotonic() < end
            time.sleep(0.1)
        steps = "document.querySelector('#time td + td')?.textContent"
        browser.until(f"{steps} === '{json.loads(lines[7])['step']}'")  # the page reloads itself
        watch.send_signal(signal.SIGINT)
        said, _ = watch.communicate(timeout=20)
    finally:
        watch.kill()
    assert watch.returncode == 0, said
    assert said.strip().endswith(f"the watch has ended: {out}")
    assert 'http-equiv="refresh"' not in out.read_text()
