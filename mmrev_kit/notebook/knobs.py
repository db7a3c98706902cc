"""What can be turned in a notebook: sliders, browsers, forms; one figure or line where nobody looks."""

import base64
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html import escape
from operator import itemgetter
from pathlib import Path

from mmrev_kit.config.errors import Told
from mmrev_kit.config.sections import Config, TrainingConfig
from mmrev_kit.data.prompts import Encoder, Sample
from mmrev_kit.data.tasks import IDENTITY, IMAGE_MARK
from mmrev_kit.evaluation.ask import Asker, pictures
from mmrev_kit.notebook import gallery, plots
from mmrev_kit.notebook.parameters import is_interactive
from mmrev_kit.training.scheduler import Schedule


def picture(figure) -> str:
    """A figure from `plots` as HTML, no wider than its place."""
    data, facts = figure._repr_mimebundle_()
    source, facts = base64.b64encode(data["image/png"]).decode(), facts["image/png"]
    wide = f"width:{facts['width']}px;max-width:100%;height:auto"
    return f'<img alt="{escape(facts["alt"])}" style="{wide}" src="data:image/png;base64,{source}">'


def panel(draw: Callable[..., str], knobs: dict):
    """An ipywidgets panel: the knobs, and beside them the HTML that `draw` makes of their values, by name.

    What is drawn is a widget's own state and no cell's output, so that no second figure appears at the cell's end. In a
    page without widgets it is what the panel leaves. A value that is refused is told in its place.
    """
    from ipywidgets import HTML, HBox, Layout, VBox

    class Panel(HBox):
        def _repr_mimebundle_(self, **kwargs):
            return super()._repr_mimebundle_(**kwargs) | {"text/html": page.value}

    def show(_=None) -> None:
        try:
            page.value = draw(**{name: knob.value for name, knob in knobs.items()})
        except Told as error:
            page.value = f"<pre>{escape(str(error))}</pre>"

    for name, knob in knobs.items():
        knob.description = knob.description or name
        knob.style, knob.layout.width = {"description_width": "165px"}, "360px"
        knob.observe(show, names="value")
    page = HTML(layout=Layout(flex="1 1 420px", min_width="0", margin="0 0 0 12px"))
    show()
    return Panel([VBox(list(knobs.values())), page], layout=Layout(flex_flow="row wrap", align_items="flex-start"))


def simulate(losses: list[float], training: TrainingConfig) -> list[dict]:
    """What the schedule would do for these validation losses, one record an epoch, up to its end.

    Returns:
        Records of epoch (from 1), loss, lr (the rate that epoch trained with, after warm-up), and the decision's
        improved, reduced, bad_epochs and stop.
    """
    schedule = Schedule.from_config(training, steps_per_epoch=1)
    records = []
    for epoch, loss in enumerate(losses, start=1):
        rate = schedule.lr
        decision = schedule.observe(loss)
        records.append({"epoch": epoch, "loss": loss, **asdict(decision), "lr": rate, "next_lr": decision.lr})
        if decision.stop:
            break
    return records


def schedule_simulator(config: Config):
    """What the schedule does with losses that fall towards a floor: sliders in JupyterLab, one figure elsewhere."""

    def draw(first=2.0, floor=0.3, half_life=1.0, **knobs):
        training = replace(config.training, **knobs)
        losses = [floor + (first - floor) * 0.5 ** (epoch / half_life) for epoch in range(training.num_epochs)]
        records = simulate(losses, training)
        return plots.schedule_figure(records, training.min_lr, training.min_val_loss)

    if not is_interactive():
        return draw()
    from ipywidgets import FloatLogSlider, FloatSlider, IntSlider

    training = config.training
    knobs = {
        "first": FloatSlider(value=2.0, min=0.5, max=6.0, step=0.1, description="first loss"),
        "floor": FloatSlider(value=0.3, min=0.0, max=1.0, step=0.02, description="lowest loss"),
        "half_life": FloatSlider(value=1.0, min=0.2, max=5.0, step=0.1, description="epochs to halve"),
        "learning_rate": FloatLogSlider(value=training.learning_rate, min=-6, max=-1, step=0.1),
        "min_lr": FloatLogSlider(value=training.min_lr, min=-7, max=-2, step=0.1),
        "lr_reduction_factor": FloatSlider(value=training.lr_reduction_factor, min=0.1, max=0.9, step=0.05),
        "lr_patience": IntSlider(value=training.lr_patience, min=1, max=5),
        "improvement_threshold": FloatSlider(value=training.improvement_threshold, min=0.0, max=0.5, step=0.01),
    }
    return panel(lambda **values: picture(draw(**values)), knobs)


def by_file(samples: list[Sample]) -> dict[str, list[Sample]]:
    """{file with its folder: its rows, each once, in the order of its lines}."""
    files: dict[str, list[tuple[int, Sample]]] = {}
    for where, sample in {sample.row.where: sample for sample in samples}.items():
        path, line, made = re.fullmatch(r"(.*):(\d+)(.*)", where).groups()  # " as cw_image, Correct": made of that row
        files.setdefault("/".join(Path(path).parts[-2:]) + made.split(",")[0], []).append((int(line), sample))
    return {name: [sample for _, sample in sorted(rows, key=itemgetter(0))] for name, rows in files.items()}


def browse(samples: list[Sample], encoder: Encoder):
    """In JupyterLab a browser: choose a file and walk through its rows; elsewhere the first row of each task that an
    epoch draws a share of."""
    if not is_interactive():
        from IPython import display

        kinds = ("face_", "object_", IDENTITY.name)
        pools = [sample for sample in samples if sample.row.source.startswith(kinds)]
        return display.HTML(gallery.prompts_html(pools, encoder))
    from ipywidgets import HTML, Button, Dropdown, HBox, IntSlider, Layout, VBox

    files = by_file(samples)
    narrow = {"layout": Layout(width="44px")}
    file = Dropdown(options=list(files), description="file", layout=Layout(width="100%"))
    number = IntSlider(value=1, min=1, max=len(files[file.value]), description="row", layout=Layout(flex="1"))
    back = Button(description="\u25c0", tooltip="row before", **narrow)
    on = Button(description="\u25b6", tooltip="next row", **narrow)
    page = HTML()

    def show(_=None) -> None:
        rows = files[file.value]
        head = f"row {number.value} of {len(rows)}"
        page.value = f"<div>{head}</div>" + gallery.prompt_html(rows[number.value - 1], encoder)

    def choose(_) -> None:
        number.value, number.max = 1, len(files[file.value])
        show()

    def step(button) -> None:
        number.value += 1 if button is on else -1  # the slider keeps it within its ends

    file.observe(choose, names="value")
    number.observe(show, names="value")
    back.on_click(step)
    on.on_click(step)
    show()
    return VBox([file, HBox([number, back, on]), page], layout=Layout(max_width="960px"))


def ask_form(asker: Asker, image: str | None, text: str | None):
    """Fields and a button to ask the model in JupyterLab; elsewhere one question and its answer, printed.

    Args:
        image, text: as in `Asker.__call__`; None for the experiment's first picture, and a question about it.
    """
    offered = pictures(asker.config)
    image, text = str(image or next(iter(offered.values()))), text or f"{IMAGE_MARK} is"
    if not is_interactive():
        told = {str(path): label for label, path in offered.items()}.get(image, "a picture of your own")
        print(f"{image} ({told})\n{text}\n-> {asker(image, text)}")
        return None
    from ipywidgets import HTML, Button, Dropdown, HBox, Layout, Text, Textarea, VBox

    def field(kind, **settings):
        return kind(**settings, style={"description_width": "90px"}, layout=Layout(width="98%"))

    choices = [(label, str(path)) for label, path in offered.items()]
    known = image if image in dict(choices).values() else None
    chosen = field(Dropdown, options=[("a picture of your own", None), *choices], value=known, description="picture")
    path, words = field(Text, value=image, description="its path"), field(Textarea, value=text, description="text")
    button, shown, answer = Button(description="Ask", button_style="primary"), HTML(), HTML()
    note = f"<code>{IMAGE_MARK}</code> marks the picture's place in the text."

    def choose(_) -> None:
        path.value = chosen.value or ""

    def look(_=None) -> None:
        shown.value = gallery.path_html(path.value)
        answer.value = ""

    def ask(_) -> None:
        button.disabled, button.description, answer.value = True, "answering \u2026", ""
        try:
            answer.value = f"<b>{escape(asker(path.value, words.value))}</b>"
        except Told as error:
            answer.value = escape(str(error))
        finally:
            button.disabled, button.description = False, "Ask"

    chosen.observe(choose, names="value")
    path.observe(look, names="value")
    button.on_click(ask)
    look()
    fields = VBox([chosen, path, words, HTML(note), button, answer], layout=Layout(flex="1 1 420px"))
    return HBox([shown, fields], layout=Layout(flex_flow="row wrap", max_width="960px"))
