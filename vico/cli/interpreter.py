"""What every command needs of its Python, settled before anything else is imported.

This file is also valid in old Pythons, to say in them that they are too old.
"""

import locale
import os
import sys
import warnings

OLDEST = (3, 10)

if tuple(sys.version_info) < OLDEST:
    sys.stderr.write(
        "vico: error: {} is Python {}.{}, and ViCo needs {}.{} or newer; "
        "run 'bash launch/environment.sh', or use another Python\n".format(
            sys.executable, *sys.version_info[:2], *OLDEST
        )
    )
    sys.exit(2)


def prepare() -> None:
    """For a whole process: UTF-8, and warnings that do not end it."""
    _use_utf8()
    _keep_warnings_harmless()


def _use_utf8() -> None:
    """Torch opens files of its own, which are UTF-8, in the locale's encoding.

    The locale may be C or POSIX: in cron, in containers, on nodes of a cluster.
    """
    if locale.getpreferredencoding(False).upper().replace("-", "") == "UTF8":
        return
    os.environ["PYTHONUTF8"] = "1"  # for child processes
    for name in ("C.UTF-8", "en_US.UTF-8"):
        try:
            locale.setlocale(locale.LC_CTYPE, name)
        except locale.Error:
            continue
        return


def _keep_warnings_harmless() -> None:
    """Under PYTHONWARNINGS=error a library's warning would end the run in its middle."""
    actions = [option.partition(":")[0] for option in sys.warnoptions]
    if any(action and "error".startswith(action) for action in actions):
        warnings.simplefilter("default")
        sys.warnoptions[:] = ["default"]  # for processes that multiprocessing starts
        os.environ["PYTHONWARNINGS"] = "default"
