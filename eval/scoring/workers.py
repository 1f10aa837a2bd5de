"""Several processes that share the batches of one evaluation, each with a copy of the model.

What a batch holds does not depend on how many processes there are.
"""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.scoring.hf_folder import is_hf_folder, load_hf_engine
from eval.scoring.inference import Answer, Engine, Job
from model import load_pretrained
from model.export_files import CONFIG_NAME, TOKENIZER_NAME
from model.weight_files import unchanged, weights_path


class Workers:
    """Processes that compute batches, on one GPU each where there are several.

    The constructor and `run` raise ValueError with the one line of a process that failed, ChildProcessError
    if one died.
    """

    def __init__(self, checkpoint: Path, num_processes: int, trust_remote_code: bool = False) -> None:
        spawn = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // num_processes)
        self.processes, self.connections = [], list[Connection]()
        for number in range(num_processes):
            ours, theirs = spawn.Pipe()
            arguments = (theirs, checkpoint, number, threads, trust_remote_code)
            process = spawn.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        for number in range(num_processes):
            self._receive(number)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, list[Answer]]]:
        """(number of a job, its answers), in the order in which they are ready."""
        waiting = iter(enumerate(jobs))
        busy: dict[int, int] = {}  # number of the process -> of its job
        for process, (number, job) in zip(range(len(self.processes)), waiting, strict=False):
            self._send(process, job)
            busy[process] = number
        while busy:
            for connection in wait([self.connections[process] for process in busy]):
                process = self.connections.index(connection)  # type: ignore[arg-type]
                answers = self._receive(process)
                done = busy.pop(process)
                if (following := next(waiting, None)) is not None:
                    busy[process] = following[0]
                    self._send(process, following[1])
                yield done, answers

    def _send(self, number: int, job: Job) -> None:
        try:
            self.connections[number].send(job)
        except OSError:
            raise self._dead(number) from None

    def _receive(self, number: int) -> Any:
        """Waits for the process; at its death the pipe ends."""
        try:
            kind, value = self.connections[number].recv()
        except (EOFError, OSError):
            raise self._dead(number) from None
        if kind == "error":
            raise ValueError(value)
        return value

    def _dead(self, number: int) -> ChildProcessError:
        self.processes[number].join()
        code = self.processes[number].exitcode or 0
        ended = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        hint = ": if memory ran out, lower --num_processes or --batch_size" if code == -signal.SIGKILL else ""
        return ChildProcessError(
            f"evaluation process {number + 1} of {len(self.processes)} ended {ended}{hint}"
        )

    def close(self) -> None:
        """Ends the processes, which hold nothing that could be lost."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _work(
    connection: Connection, checkpoint: Path, number: int, threads: int, trust_remote_code: bool
) -> None:
    """The life of a process: loads the checkpoint, then computes what it is sent until the pipe ends."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that asks, and that this one
    try:
        engine = load_engine(checkpoint, number, trust_remote_code)
        connection.send(("ready", None))
        while True:
            connection.send(("answers", engine.run(connection.recv())))
    except (EOFError, BrokenPipeError):  # the process that asks has ended
        return
    except (ValueError, OSError) as error:
        connection.send(("error", str(error)))


def load_engine(checkpoint: Path, number: int = 0, trust_remote_code: bool = False) -> Engine:
    """An exported or a Hugging Face folder, ready to compute, on GPU `number` (counted round) if any."""
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
    if is_hf_folder(checkpoint):
        return load_hf_engine(checkpoint, device, trust_remote_code)
    files = weights_path(checkpoint), checkpoint / CONFIG_NAME, checkpoint / TOKENIZER_NAME
    with unchanged(*files):
        return Engine(load_pretrained(checkpoint).to(device), Tokenizer(checkpoint / TOKENIZER_NAME))
