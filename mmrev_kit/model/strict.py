"""Warnings of the libraries that mean wrong numbers are errors here; what is no news to the reader is left out."""

import logging
import re
import warnings
from contextlib import contextmanager

from mmrev_kit.config.sections import ConfigError

LIBRARIES = ("transformers", "peft", "accelerate", "bitsandbytes")
# The words of a warning that something given is not what is used; deprecations and notes on speed have none of them.
WRONG = re.compile(
    r"missing|absent|unexpected|mismatch|not match|ignor(ed|ing)|overwritten|unused|not (be )?used|no effect|not tie"
    r"|unrecogni[sz]ed|unknown|invalid|not (a )?valid|incorrect|corrupt|not initialized|newly initialized"
    r"|model of type|multiple adapters|second time|re-?initiali[sz]|no linear modules|undefined behaviou?r"
    r"|`rope_parameters`|key=rope_scaling|no rope parameters|right-padding|does not support setting|have requested `"
    r"|no (module|parameter) was matched"
    r"|falling back(?! to [\w ]*(implementation|version|triton|sdpa))",  # those are other code for the same numbers
    re.IGNORECASE,
)
# What a library says of itself: that something faster could be installed.
ADVERT = re.compile(r"(?is)fast path is not available|not installed.*(fall|default)|triton not found")


def _no_advert(record: logging.LogRecord) -> bool:
    return not ADVERT.search(record.getMessage())


def quiet() -> None:
    """For a process of the kit's own: no bars, no deprecations within the libraries, no notes on optional kernels."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for handler in [*logging.getLogger("transformers").handlers, *logging.getLogger().handlers]:
        handler.addFilter(_no_advert)


class _Notes(logging.Handler):
    """Collects the messages that `WRONG` finds."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def note(self, message: str) -> None:
        if WRONG.search(message):
            self.found.append(" ".join(message.split()))

    def emit(self, record: logging.LogRecord) -> None:
        self.note(record.getMessage())


@contextmanager
def strict():
    """Within it a library's warning that something given to it is missing or ignored is an error; bars are not shown.

    Raises:
        ConfigError: at the end, with the first such warning.
    """
    from transformers.utils import logging as library

    bars = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    library.warning_once.cache_clear()  # one that an earlier call met comes again
    notes, loggers = _Notes(), [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]

    def show(message, category, filename, *rest, **more) -> None:
        ours = any(f"/{name}/" in filename for name in LIBRARIES)
        if ours and issubclass(category, FutureWarning | DeprecationWarning):
            return  # between libraries, and no news to the reader
        if ours:
            notes.note(str(message))
        shown(message, category, filename, *rest, **more)

    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):  # also where a filter of the caller's would hide it
            warnings.filterwarnings("always", category=category)
        shown, warnings.showwarning = warnings.showwarning, show
        for logger in loggers:
            logger.addHandler(notes)
            logger.setLevel(min(logger.getEffectiveLevel(), logging.WARNING))
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(notes)
                logger.setLevel(level)
            if bars:
                library.enable_progress_bar()
    if notes.found:
        raise ConfigError(f"The model cannot be used as it is configured: {notes.found[0][:500]}")
