"""The live view holds what the steps said, costs little, and updates one output in place."""

import base64
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import IPython
import IPython.display
import numpy as np
import pytest
import torch
from PIL import Image

from sude_lab.config import TuningConfig
from sude_lab.runs.folder import run_tuning
from sude_lab.tuning import Step
from sude_lab.view import live as live_module
from sude_lab.view.live import LiveView


def step(number: int, loss: float = 1.0, rho: float = 0.5) -> Step:
    """One step of a batch of two, as `tune` yields it."""
    two = torch.tensor([-0.25, 0.25])
    return Step(
        number=number,
        t=torch.tensor([10, 20]),
        loss_subject=loss + two,
        loss_sude=-2 * rho + two,
        tau=torch.tensor([-1.0, -1.0]),
        gate=rho + two < 1,
        rho=rho + two,
        loss_regularizer=0.0,
        loss_own=0.0,
        learning_rate=1e-3,
        method=None,  # type: ignore[arg-type]
        state_dict=dict,
    )


def keep_grid(folder: Path, number: int, name: str) -> None:
    """A validation grid of one colour, as a run keeps it."""
    (folder / "validation").mkdir(exist_ok=True)
    grid = Image.new("RGB", (30, 20), name)
    grid.save(folder / "validation" / f"step-{number:06d}.png")


def shown_in(page: dict[str, str]) -> bytes:
    """The picture in an output, as a page shows it."""
    found = re.search('src="data:image/png;base64,([^"]+)" alt="[^"]+"', page["text/html"])
    assert found
    return base64.b64decode(found[1])


def colour(png: bytes | Image.Image) -> set[tuple[int, int, int]]:
    """The colours of a picture."""
    picture = png if isinstance(png, Image.Image) else Image.open(BytesIO(png))
    return {rgb for _, rgb in picture.convert("RGB").getcolors(1 << 24)}  # type: ignore[union-attr, misc]


def test_the_curves_are_those_of_the_steps() -> None:
    live = LiveView(8)
    losses, rhos = [4.0, 2.0, 0.0, 2.0], [0.0, 0.5, 1.5, 0.5]
    for k in range(4):
        live(step(k + 1, losses[k], rhos[k]))
    live.draw()
    subject, category, member, _ = live.figure.axes
    dots, mean = subject.get_lines()
    assert list(dots.get_xdata()) == list(mean.get_xdata()) == [1, 2, 3, 4]
    assert list(dots.get_ydata()) == losses
    assert list(mean.get_ydata()) == [4.0, 3.0, 2.0, 2.0]  # running means
    loss, tau = category.get_lines()
    assert list(loss.get_ydata()) == pytest.approx([0.0, -0.5, -4 / 3, -1.25])
    assert list(tau.get_ydata()) == [-1.0] * 4
    assert list(member.get_lines()[0].get_ydata()) == pytest.approx([0.0, 0.25, 2 / 3, 0.625])
    gates = list(member.get_lines()[2].get_ydata())
    assert gates == pytest.approx([1.0, 1.0, 2 / 3, 0.75])
    names = [text.get_text() for text in member.get_legend().get_texts()]  # type: ignore[union-attr]
    assert names == [r"$\rho$", "share of open gates"]
    assert [style.get_linestyle() for style in member.get_legend().get_lines()] == ["-", ":"]  # type: ignore[union-attr]
    assert member.get_ylim()[0] <= 0
    assert [ax.get_xlim() for ax in live.figure.axes[:3]] == [(0.0, 8.0)] * 3
    assert live.metrics()["open_gates"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert "step 4 of 8" in live.figure.get_suptitle()


def test_steps_that_are_done_again_replace_the_first_ones() -> None:
    live = LiveView()
    for k in range(1, 6):
        live(step(k, loss=1.0))
    for k in range(4, 8):  # resumed from a checkpoint of step 3
        live(step(k, loss=2.0))
    assert live.metrics()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert live.metrics()["loss_subject"].tolist() == [1, 1, 1, 2, 2, 2, 2]


def test_the_newest_grid_is_shown_with_its_step_and_rows(tmp_path: Path) -> None:
    live = LiveView(folder=tmp_path, labels=["sitting", "running"])
    live(step(1))
    live.draw()
    assert live.figure.axes[3].get_title() == "no pictures yet"
    for number, name in ((9, "red"), (10, "blue")):
        keep_grid(tmp_path, number, name)
    live.draw()
    pictures = live.figure.axes[3]
    assert pictures.get_title() == "step 10"
    shown = np.asarray(pictures.get_images()[0].get_array())
    assert shown.shape == (20, 30, 3) and (shown == (0, 0, 255)).all()
    assert [label.get_text() for label in pictures.get_yticklabels()] == ["sitting", "running"]
    assert pictures.get_yticks().tolist() == [4.5, 14.5]


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live_module, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (0.5, 10.0),  # the share decides: 0.5 s of drawing every 10 s
        (0.01, 2.0),  # `every` decides
    ],
)
def test_drawing_takes_no_more_than_its_share_of_the_time(
    cost: float, expected: float, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []

    def redraw(self: LiveView) -> None:
        times.append(clock.now)
        clock.now += cost

    monkeypatch.setattr(LiveView, "_redraw", redraw)
    with LiveView(every=2.0) as live:
        for k in range(1, 2001):
            clock.now += 0.1
            live(step(k))
        during = times[2:]  # after the empty figure, and the first drawing that is measured
    gaps = np.diff(during)
    assert len(during) > 10
    assert gaps.min() >= expected - 1e-6
    assert gaps.max() <= expected + cost + 0.2  # and it does not wait longer than it must
    assert cost * len(during) <= 0.05 * 2000 * 0.1 + cost


def test_the_last_steps_are_drawn_after_an_interrupt(clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt), LiveView(9) as live:
        live(step(1))
        live(step(2))
        raise KeyboardInterrupt
    assert list(live.figure.axes[0].get_lines()[0].get_xdata()) == [1, 2]
    assert "step 2 of 9" in live.figure.get_suptitle()


def test_without_sude_the_subjects_loss_stands_alone() -> None:
    live = LiveView()
    live(step(1, rho=float("nan")))
    live.draw()
    subject, category, member, _ = live.figure.axes
    assert len(subject.get_lines()) == 2
    assert not category.get_lines() and not member.get_lines()
    assert "not watched" in category.get_title() and "not watched" in member.get_title()


# --- what a page sees ----------------------------------------------------------------------------


class Page:
    """What is displayed, and what it is updated to."""

    def __init__(self) -> None:
        self.displayed: list[bytes] = []
        self.updates: list[bytes] = []

    def display(self, page: dict[str, str], **how: Any) -> "Page":
        assert how == {"display_id": True, "raw": True}
        self.displayed.append(shown_in(page))
        return self

    def update(self, page: dict[str, str], **how: Any) -> None:
        assert how == {"raw": True}
        self.updates.append(shown_in(page))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    page = Page()
    monkeypatch.setattr(IPython.display, "display", page.display)
    yield page


def test_a_notebook_gets_one_output_that_is_updated(
    page: Page, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(IPython, "get_ipython", lambda: type("Shell", (), {"kernel": object()})())
    with LiveView(folder=tmp_path, every=0.0) as live:
        assert len(page.displayed) == 1 and not page.updates
        keep_grid(tmp_path, 1, "magenta")
        live(step(1))
    assert len(page.displayed) == 1
    assert (255, 0, 255) not in colour(page.displayed[0])
    assert (255, 0, 255) in colour(page.updates[-1])
    assert page.updates[-1] == live.picture()


@pytest.mark.parametrize("shell", [None, type("Terminal", (), {})()])
def test_elsewhere_nothing_is_shown_and_the_figure_is_there(
    shell: Any, page: Page, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    keep_grid(tmp_path, 1, "magenta")
    with LiveView(folder=tmp_path) as live:
        live(step(1))
    assert not page.displayed and not page.updates
    assert (255, 0, 255) in colour(live.picture())
    live.figure.savefig(tmp_path / "live.png")
    assert (255, 0, 255) in colour(Image.open(tmp_path / "live.png"))


CELL = """
from pathlib import Path
from types import SimpleNamespace
from PIL import Image
from sude_lab.view.live import LiveView

names = ("loss_subject", "loss_sude", "tau", "open_gates", "rho")
Path("validation").mkdir()
with LiveView(folder=".", every=0.0) as live:
    for number, name in enumerate(("red", "lime", "blue"), 1):
        Image.new("RGB", (20, 20), name).save(f"validation/step-{number:06d}.png")
        row = {"step": number} | dict.fromkeys(names, 0.5)
        live(SimpleNamespace(number=number, row=lambda: row))
"""


def test_a_stored_notebook_keeps_the_last_picture_alone(tmp_path: Path) -> None:
    """A real kernel: every update lands in the one output of the cell."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    (output,) = notebook.cells[0].outputs
    seen = colour(shown_in(output["data"]))
    assert (0, 0, 255) in seen
    assert not {(255, 0, 0), (0, 255, 0)} & seen


# --- beside a run --------------------------------------------------------------------------------


def test_watching_a_run_changes_no_bit_of_it(
    tmp_path: Path, tiny_folder: Path, subject_picture: Path
) -> None:
    config = TuningConfig(
        image=subject_picture, category="dog", backbone=str(tiny_folder), device="cpu"
    )
    settings: dict[str, Any] = {"report_to": "none", "progress": False, "num_samples": 1}
    alone = run_tuning(config, tmp_path / "alone", **settings)
    with LiveView(4, folder=tmp_path / "seen", every=0.0) as live:
        seen = run_tuning(config, tmp_path / "seen", on_step=live, validation_every=2, **settings)
    assert live.figure.axes[3].get_title() == "step 4"
    assert live.metrics()["loss_subject"].tolist() == pytest.approx(
        alone.metrics()["loss_subject"].tolist(), rel=1e-12
    )
    for file in alone.weights.iterdir():
        assert file.read_bytes() == (seen.weights / file.name).read_bytes()
