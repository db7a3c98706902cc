"""What can be turned in a notebook: sliders, browsers, forms; one figure or line where nobody looks."""

from dataclasses import asdict, replace
from pathlib import Path

from mmrev_kit.config.sections import Config, TrainingConfig
from mmrev_kit.data.prompts import Encoder, Sample
from mmrev_kit.data.tasks import IMAGE_MARK
from mmrev_kit.evaluation.ask import Asker, example
from mmrev_kit.notebook import gallery, plots
from mmrev_kit.notebook.parameters import is_interactive
from mmrev_kit.training.scheduler import Schedule


def panel(draw, knobs: dict):
    """An ipywidgets panel: `draw` is called again with the widgets' values, by name, whenever one is turned."""
    from ipywidgets import interactive

    for name, knob in knobs.items():
        knob.description = knob.description or name
        knob.style, knob.layout.width = {"description_width": "160px"}, "480px"
    shown = interactive(draw, **knobs)
    shown.update()  # draw now: later cells may keep the kernel busy for hours
    return shown


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
    return panel(draw, knobs)


def browse(samples: list[Sample], encoder: Encoder):
    """In JupyterLab a browser: choose a file and walk through its rows; elsewhere the first pool row of each task."""
    if not is_interactive():
        from IPython import display

        pools = [sample for sample in samples if sample.row.source.startswith(("face_", "object_"))]
        return display.HTML(gallery.prompts_html(pools, encoder))
    from ipywidgets import HTML, Dropdown, IntSlider, VBox, interactive_output

    by_file: dict[str, list[Sample]] = {}
    for sample in samples:
        by_file.setdefault(Path(sample.row.where).name.split(":")[0], []).append(sample)
    file = Dropdown(options=list(by_file), description="file")
    number = IntSlider(value=0, min=0, max=len(by_file[file.value]) - 1, description="row")
    page = HTML()

    def limit(change) -> None:
        number.value, number.max = 0, len(by_file[file.value]) - 1

    def show(file: str, number: int) -> None:
        page.value = gallery.prompt_html(by_file[file][min(number, len(by_file[file]) - 1)], encoder)

    file.observe(limit, names="value")
    interactive_output(show, {"file": file, "number": number})
    show(file.value, number.value)
    return VBox([file, number, page])


def ask_form(asker: Asker, image: str | None, text: str | None):
    """Fields and a button to ask the model in JupyterLab; elsewhere one question and its answer, printed.

    Args:
        image, text: as in `Asker.__call__`; None for those of `ask.example`.
    """
    example_image, example_text = example(asker.config)
    image, text = image or example_image, text or example_text
    if not is_interactive():
        print(f"{image}\n{text}\n-> {asker(image, text)}")
        return None
    from ipywidgets import HTML, Button, Output, Text, Textarea, VBox

    wide = {"layout": {"width": "640px"}}
    path, words = Text(str(image), description="picture", **wide), Textarea(text, description="text", **wide)
    button, shown = Button(description="Ask", button_style="primary"), Output()

    def ask(_) -> None:
        with shown:
            shown.clear_output()
            try:
                print(asker(path.value, words.value))
            except ValueError as error:  # ConfigError, ImageError, PromptError: for the reader
                print(error)

    button.on_click(ask)
    note = HTML(f"The picture's path, and the text around it; <code>{IMAGE_MARK}</code> marks the picture's place.")
    return VBox([note, path, words, button, shown])
