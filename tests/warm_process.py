"""Python processes that need not import torch and transformers first: forks of one that did.

To import both, with the Trainer, takes longer than most of what the tests do in such a process. Each fork is a process
of its own all the same: nothing it imports or changes is seen by the next one, and hf_efficient is new to it.
"""

import atexit
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


# For each line of its input, answers with the process id of a fork, and with its exit status when it has ended.
IMPORTS = """
import torch, transformers
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, Trainer
"""
_SERVER = """
import atexit, gc, json, os, runpy, sys, threading, traceback, types

def run_as_main(code, name, **attributes):
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    vars(main).update(attributes)
    exec(compile(code, name, "exec"), vars(main))

def work(request):
    os.chdir(request["cwd"])
    for descriptor, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["threads"] and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(request["threads"])
    sys.path[:0] = request["path"]
    exec(request["before"], {})
    kind, *words = request["words"]
    if kind == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[1:]]
        run_as_main(words[0], "<string>")
    else:
        sys.argv = [kind, *words]
        with open(kind, "rb") as file:
            code = file.read()
        run_as_main(code, kind, __file__=os.path.abspath(kind))

def status_of(request):
    try:
        work(request)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # ends as a program does; not in the loop below, which is the server's
        traceback.print_exc()
        return 1
    return 0

assert not [name for name in sys.modules if name.startswith("hf_efficient")]
gc.freeze()  # what is there stays there: collections in forks need not look at it
sys.path_importer_cache.clear()
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        status = status_of(json.loads(line))
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the interpreter's own end takes seconds: it touches all that was imported
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# What a fork can be told after torch and transformers were imported, and what is set in the middle of the tests: by
# pytest, by scikit-learn when it is imported, by Inductor when it compiles.
TOLD_LATER = (
    *("PYTHONPATH", "OMP_NUM_THREADS", "PYTEST_CURRENT_TEST"),
    *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"),
)


class Fork:
    """A running process; there is one at a time, and it has to be waited for."""

    def __init__(self, warm: "WarmProcess", folder: str, pid: int):
        self.warm, self.folder, self.pid = warm, folder, pid

    def is_running(self) -> bool:
        return not self.warm.has_answered(0)

    def wait(self, timeout: float) -> tuple[int, str, str]:
        """Exit status (minus the signal that ended it), output and standard error."""
        try:
            status = int(self.warm.answer(timeout))
            self.warm.fork = None
            streams = [Path(self.folder, name) for name in ("stdout", "stderr")]
            return status, *(path.read_text() if path.exists() else "" for path in streams)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


class WarmProcess:
    """Starts its server with the first request, in the environment of that moment.

    Args:
        imports: what the server imports.
        told_later: variables that a fork may have other values of, as nothing among the imports looks at them.
    """

    def __init__(self, imports: str = IMPORTS, told_later: tuple[str, ...] = TOLD_LATER):
        self.imports, self.told_later = imports, told_later
        self.server: subprocess.Popen | None = None
        self.fork: Fork | None = None
        self.environment: dict[str, str] = {}

    def fits(self, environment: dict[str, str]) -> bool:
        """Whether a process with these variables is a fork of the server: they are read when a library is imported.

        If they are those of this process now, and it is the server that has others, there will be a new server.
        """
        now = self._read_early(os.environ)
        if self.server is not None and self.environment != now == self._read_early(environment):
            self.stop()
        return self._read_early(environment) == (now if self.server is None else self.environment)

    def start(
        self, words: tuple[str, ...], cwd: str, environment: dict[str, str], before: str = "", isolated: bool = False
    ) -> Fork:
        """`python *words` in `cwd`; the first is `-c`, `-m` or the path of a script.

        Args:
            before: code that runs first.
            isolated: as `python -I`, without `PYTHONPATH` and the folder of the program on the path.
        """
        if self.fork is not None:  # nobody waited for it: a test failed meanwhile
            self.stop()
        if self.server is None:
            self._start()
        first = {"-c": "", "-m": cwd}.get(words[0], os.path.dirname(os.path.join(cwd, words[0])))
        path = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        folder = tempfile.mkdtemp()
        request = {
            "words": words,
            "cwd": cwd,
            "environment": environment,
            "threads": int(environment.get("OMP_NUM_THREADS", 0)),
            "path": [] if isolated else path,
            "before": before,
            **{name: os.path.join(folder, name) for name in ("stdout", "stderr")},
        }
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.fork = Fork(self, folder, int(self.answer(600)))
        return self.fork

    def _start(self) -> None:
        self.environment = self._read_early(os.environ)
        self.server = subprocess.Popen(
            [sys.executable, "-I", "-c", self.imports + _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # an answer that was read ahead would not be seen by select
            start_new_session=True,
        )
        atexit.register(self.stop)
        assert self.answer(600) == "ready"  # seconds, on a machine with much else to do

    def has_answered(self, timeout: float) -> bool:
        return bool(select.select([self.server.stdout], [], [], timeout)[0])

    def answer(self, timeout: float) -> str:
        if not self.has_answered(timeout):
            self.stop()
            raise subprocess.TimeoutExpired("a fork of the warm process", timeout)
        answer = self.server.stdout.readline().decode().strip()
        assert answer, f"the warm process ended with {self.server.poll()}"
        return answer

    def stop(self) -> None:
        """End the server and what it started; the next request starts another one."""
        if self.server is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self.server.pid, 9)
            self.server.wait()
            self.server = self.fork = None

    def _read_early(self, environment) -> dict[str, str]:
        return {name: value for name, value in environment.items() if name not in self.told_later}
