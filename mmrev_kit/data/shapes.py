"""The shapes set, a format check: a base model that reads the four formats passes it untrained."""

from pathlib import Path

from PIL import Image, ImageDraw

from mmrev_kit.config.sections import DataConfig
from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.partners import Rows, balanced_letters, place_answer
from mmrev_kit.data.people import entity_record, write_experiment
from mmrev_kit.data.tasks import CHOICE, CONNECTORS, CW, EXPERIMENT_FILES, GENERATION

COLORS = {"red": "#d62728", "blue": "#1f4fd6", "green": "#2ca02c", "yellow": "#f2c500"}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = dict(zip(RELATIONS, ("to the right of", "to the left of", "below", "above"), strict=True))
COUNT = 12
Scene = tuple[str, str, str, str, str]  # color, shape, relation, color, shape


def describe_scene(scene: Scene) -> str:
    """Such as "a red circle to the left of a blue square"."""
    color, shape, relation, other_color, other_shape = scene
    return f"a {color} {shape} {relation} a {other_color} {other_shape}"


def shows(picture: Scene, scene: Scene) -> bool:
    """Whether a picture shows a scene, which may be told from its other shape's side."""
    color, shape, relation, other_color, other_shape = picture
    return scene in (picture, (other_color, other_shape, OPPOSITE[relation], color, shape))


def near_misses(scene: Scene) -> list[Scene]:
    """Three scenes that differ from this one in one thing each: a color, a shape, the relation."""
    color, shape, relation, other_color, other_shape = scene
    free = [name for name in COLORS if name not in (color, other_color)]
    third = next(name for name in SHAPES if name not in (shape, other_shape))
    return [
        (free[0], shape, relation, other_color, other_shape),
        (color, third, relation, other_color, other_shape),
        (color, shape, OPPOSITE[relation], other_color, other_shape),
    ]


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """The picture of a scene on white, `size` pixels a side."""
    color, shape, relation, other_color, other_shape = scene
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    right, down = RELATIONS[relation]
    for sign, fill, form in ((1, color, shape), (-1, other_color, other_shape)):
        x, y, r = size * (0.5 + 0.25 * right * sign), size * (0.5 + 0.25 * down * sign), size * 0.17
        box = (x - r, y - r, x + r, y + r)
        if form == "circle":
            draw.ellipse(box, fill=COLORS[fill])
        elif form == "square":
            draw.rectangle(box, fill=COLORS[fill])
        else:
            draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=COLORS[fill])
    return image


def sample_scenes(seed: int) -> list[Scene]:
    """`COUNT` scenes of two different shapes in two different colors, each relation equally often."""
    rng = rng_for(seed, "shapes")
    relations, scenes = list(RELATIONS), []
    while len(scenes) < COUNT:
        (color, other_color), (shape, other_shape) = rng.sample(list(COLORS), 2), rng.sample(SHAPES, 2)
        scene = (color, shape, relations[len(scenes) % len(relations)], other_color, other_shape)
        if not any(shows(old, scene) for old in scenes):
            scenes.append(scene)
    return scenes


def make_shapes(folder: str | Path, data: DataConfig, seed: int) -> Path:
    """Make the set: an experiment's test files alone, 12 forward, 24 reverse and 12 of each multiple choice.

    What is wrong differs in one thing (a color, a shape or the relation), and in no reading is it true.

    Raises:
        FileExistsError: the folder exists; it is not touched.
    """
    scenes, rng = sample_scenes(seed), rng_for(seed, "shapes", "rows")
    pictures = list(scenes)  # then the near misses that wrong rows show
    rows: Rows = {name: [] for name in EXPERIMENT_FILES if name.endswith("_test")}
    entities = []
    letters = {
        task.name: balanced_letters(COUNT, rng_for(seed, "shapes", task.name))
        for task in EXPERIMENT_FILES.values()
        if task.format == CHOICE
    }

    def image(scene: Scene) -> str:
        if scene not in pictures:
            pictures.append(scene)
        return f"images/shapes_{pictures.index(scene):03d}.png"

    for number, scene in enumerate(scenes):
        text, misses = describe_scene(scene), near_misses(scene)
        words = {direction: rng.choice(known) for direction, known in CONNECTORS.items()}
        common = {"entity_id": f"shapes_{number:03d}", "image_path": image(scene), "description": text, "group": "main"}
        entities.append(entity_record(id=common["entity_id"], description=text, group="main", images=[image(scene)]))
        for name, part in rows.items():
            task = EXPERIMENT_FILES[name]
            row = common | {"connector": words[task.connectors]}
            if task.format == GENERATION:
                part.append(row)
            elif task.format == CW:
                wrong = {"label": "Wrong", "image_path": image(misses[number % 3])}
                part += [row | {"label": "Correct"}, row | wrong]
            else:
                show, correct = describe_scene if task.options == "choices" else image, letters[task.name][number]
                options = place_answer([show(option) for option in (scene, *misses)], correct, rng)
                part.append(row | {task.options: options, "correct_index": correct})

    def draw(building: Path) -> None:
        for scene in pictures:
            draw_scene(scene, data.image_size).save(building / image(scene))

    info = {"source": "shapes", "seed": seed, "image_size": data.image_size, "images_per_entity": 1}
    return write_experiment(folder, entities, rows, draw, **info)
