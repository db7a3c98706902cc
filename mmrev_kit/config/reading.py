"""The configuration: YAML and overrides read strictly, and saved with every run.

OmegaConf does the typing: an unknown key or a value of the wrong type is a `ConfigError`.
"""

import shlex
from dataclasses import fields
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mmrev_kit.config.flags import ELSEWHERE
from mmrev_kit.config.project import hide_secrets, refuse_secrets, resolve
from mmrev_kit.config.sections import Config, ConfigError

NONE_WORDS = ("none", "null", "~")
_SECTIONS = {section.name for section in fields(Config)}
# Those that every configuration saved with a run of the first version has.
_FIRST_SECTIONS = set("experiment model quantization lora data retention training evaluation memory launch".split())


def _none_words(value):
    """`None`, `none` and `null` typed as text mean no value, in YAML files and overrides alike."""
    if isinstance(value, dict):
        return {key: _none_words(item) for key, item in value.items()}
    return None if isinstance(value, str) and value.strip().lower() in NONE_WORDS else value


def _check_plain(values: dict, where: str) -> None:
    """Sections hold keys, and a value is a value: OmegaConf's own `???` and `${...}` would get past the checks."""
    for section, content in values.items():
        if section in _SECTIONS and not isinstance(content, dict):
            raise ConfigError(f"{where}: {section} is a section: give its keys, not {content!r}.")
        for key, value in content.items() if isinstance(content, dict) else ():
            if "'???'" in repr(value) or "${" in repr(value):  # in lists and mappings, too
                raise ConfigError(f"{where}: {section}.{key} = {value!r}: references are not resolved here.")
            default = getattr(getattr(Config(), section, None), key, None)
            if isinstance(default, bool) and type(value) in (int, float) and value not in (0, 1):
                raise ConfigError(f"{where}: {section}.{key} = {value!r}: must be true or false.")


def _check_texts(values: dict, where: str) -> None:
    """YAML makes numbers and booleans of words: a text must have been read as one, or 010 would be called 8."""
    for section in fields(Config):
        content = values.get(section.name)
        for item in fields(section.type) if isinstance(content, dict) else ():
            given = content.get(item.name)
            items = given if isinstance(given, list) else [given]
            if item.type in (str, str | None, list[str]) and any(isinstance(one, int | float) for one in items):
                raise ConfigError(f"{where}: {section.name}.{item.name} is text: put it in quotes, not {given!r}.")


def _merge(config, values: dict, where: str):
    _check_plain(values, where)
    try:
        return OmegaConf.merge(config, _none_words(values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        reason = str(error).splitlines()[0]
        if isinstance(error, ConfigKeyError) and (own := ELSEWHERE.get(key.rsplit(".", 1)[-1])):
            reason = f"there is no such key; here it is {own}."
        raise ConfigError(f"{where}: {key}: {reason}") from None
    except TypeError as error:  # a list in the place of a mapping
        raise ConfigError(f"{where}: {error}") from None


def _nest(key: str, value) -> dict:
    """{"a": {"b": value}} for the key "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def split_paths(text: str | None, setting: str) -> list[str]:
    """The words of a setting that names paths, separated by spaces and quoted where they hold some.

    Raises:
        ConfigError: a quote that has no end.
    """
    try:
        return shlex.split(text or "")
    except ValueError as error:
        advice = "Quote a path that has spaces in it, once on each side."
        raise ConfigError(f"{setting} = {text!r}: {error}. {advice}") from None


def _read_overrides(text: str) -> list[tuple[str, str, object]]:
    """(word, key, value) of each `section.key=value` word; a value is text, or a list or mapping in YAML's brackets.

    Text stays text until the field's type reads it: YAML would make other numbers of a commit hash such as 0012345.
    """
    found = []
    try:
        for word in shlex.split(text):
            key, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(f"overrides: {word!r} is not of the form section.key=value.")
            bracketed = value.startswith(("[", "{"))
            found.append((word, key, OmegaConf.to_container(OmegaConf.create(value)) if bracketed else value))
    except ConfigError:
        raise
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"overrides: {text!r} cannot be read: {error}") from None
    return found


def read_yaml(path: str | Path, schema: type | None = None) -> dict:
    """A YAML file as a mapping; `path` is relative to the project root.

    Args:
        schema: a dataclass that says which keys there may be, and of which type.

    Raises:
        ConfigError: missing or unreadable file, no mapping, a token in it, or what the schema does not allow.
    """
    file = resolve(path)
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such configuration file.")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file)) or {}
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base; all mean "not readable YAML"
        raise ConfigError(hide_secrets(f"{file}: {error}")) from None
    refuse_secrets(str(loaded), str(file))
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: a configuration is a mapping of sections, not a {type(loaded).__name__}.")
    if schema is not None:
        loaded = OmegaConf.to_container(_merge(OmegaConf.structured(schema), loaded, str(file)))
    return loaded


def load_config(path: str | Path | None = None, overrides: str = "", values: dict | None = None) -> Config:
    """Read a configuration; later sources win: defaults, the YAML at `path`, `overrides`, `values`.

    Args:
        path: a YAML file, relative to the project root; None for the defaults alone.
        overrides: `section.key=value` words separated by spaces.
        values: {"section.key": value}, such as a notebook's parameters; a value of None leaves the key as it is.

    Raises:
        ConfigError: missing or unreadable file, unknown key (with the nearest known one), or a value of the wrong
            type or out of range.
    """
    config = OmegaConf.structured(Config)
    if path is not None:
        file, loaded = resolve(path), read_yaml(path)
        _check_texts(loaded, str(file))
        config = _merge(config, loaded, str(file))
        if loaded.keys() >= _FIRST_SECTIONS and "taught" not in loaded["experiment"]:
            config.experiment.taught = "generation"  # the whole configuration of a run of the first version
    refuse_secrets(overrides or "", "overrides")
    for word, key, value in _read_overrides(overrides or ""):
        config = _merge(config, _nest(key, value), f"overrides: {word}")
    for key, value in (values or {}).items():
        refuse_secrets(str(value), key.rsplit(".", 1)[-1])
        if value is not None and str(value).strip().lower() not in NONE_WORDS:
            config = _merge(config, _nest(key, value), f"{key.rsplit('.', 1)[-1]} = {value!r}")
    return OmegaConf.to_object(config)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load_config` reads it back to an equal `Config`."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    refuse_secrets(text, "the configuration")
    return text


def differences(a: Config, b: Config) -> dict[str, tuple]:
    """{"section.key": (value in a, value in b)} for every key that differs."""
    found = {}
    for section in fields(Config):
        left, right = vars(getattr(a, section.name)), vars(getattr(b, section.name))
        for name, old in left.items():
            if old != right[name]:
                found[f"{section.name}.{name}"] = old, right[name]
    return found
