"""Processes without hf_efficient that need not import torch and transformers first: forks of one that did.

To import both, with the Trainer, takes longer than most of what the tests do in such a process. Each fork is a process
of its own all the same: nothing it imports or changes is seen by the next one.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path


# Reads a request from each line of its input and answers with the exit status of the fork that carried it out.
_SERVER = """
import json, os, sys, types
import torch, transformers
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, Trainer

def work(request):
    os.chdir(request["cwd"])
    for descriptor, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
    sys.argv = ["-c", *request["arguments"]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(request["code"], "<string>", "exec"), main.__dict__)

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        work(json.loads(line))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# pytest's own name for the test that runs: not one that a process looks at.
_NOT_COMPARED = "PYTEST_CURRENT_TEST"


class WarmProcess:
    """Starts its server with the first request, in the environment of that moment.

    Args:
        before: what the server does before it imports anything.
    """

    def __init__(self, before: str):
        self.before = before
        self.server: subprocess.Popen | None = None
        self.environment: dict[str, str] = {}

    def fits(self, environment: dict[str, str]) -> bool:
        """Whether a process with these variables is a fork of the server: they are read when a library is imported."""
        return self.server is None or _compared(environment) == self.environment

    def run(self, code: str, arguments: tuple[str, ...], cwd: str, timeout: float) -> tuple[int, str, str]:
        """Exit status, output and standard error of `code`, run in `cwd` with its arguments in `sys.argv[1:]`."""
        if self.server is None:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            streams = {name: os.path.join(folder, name) for name in ("stdout", "stderr")}
            request = {"code": code, "arguments": arguments, "cwd": cwd} | streams
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            status = self._answer(timeout)
            printed = [Path(path).read_text() if os.path.exists(path) else "" for path in streams.values()]
        return int(status), *printed

    def _start(self) -> None:
        self.environment = _compared(os.environ)
        self.server = subprocess.Popen(
            [sys.executable, "-I", "-c", self.before + _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.stop)
        assert self._answer(120) == "ready"

    def _answer(self, timeout: float) -> str:
        if not select.select([self.server.stdout], [], [], timeout)[0]:
            self.stop()
            raise subprocess.TimeoutExpired("a fork of the warm process", timeout)
        answer = self.server.stdout.readline().strip()
        assert answer, f"the warm process ended with {self.server.poll()}"
        return answer

    def stop(self) -> None:
        """End the server and what it started; the next request starts another one."""
        if self.server is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self.server.pid, 9)
            self.server.wait()
            self.server = None


def _compared(environment) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != _NOT_COMPARED}
