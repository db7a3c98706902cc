"""Jobs whose clean Python is a fork of this process, so that what a test has changed here holds in its workers, too."""

import os
import subprocess
import sys

import accelerate.launchers

from mmrev_kit.training import jobs


class Forked(subprocess.Popen):
    """A `Popen` that forks this process for `python -m mmrev_kit job`, in place of a new interpreter."""

    def _execute_child(self, *arguments) -> None:
        words = arguments[0]
        if words[1:4] != ["-m", "mmrev_kit", "job"]:
            return super()._execute_child(*arguments)
        sys.stdout.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid:
            return None
        os.setsid()
        os.dup2(arguments[13], 1)  # c2pwrite and errwrite: the log
        os.dup2(arguments[15], 2)
        return as_process(lambda: jobs.main(words[4:]))


def as_process(function) -> None:
    """Run a function as a program of its own, and end the process."""
    code = 0
    try:
        function()
    except BaseException as error:  # what an interpreter would do at its end
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 1
    os._exit(code)


def fork_jobs() -> None:
    """From now on jobs are forked from this process; libraries that it has imported are in nobody's way."""
    accelerate.launchers.are_libraries_initialized = lambda *names: []
    jobs.subprocess.Popen = Forked
