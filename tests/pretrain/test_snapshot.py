"""Copies of a checkpoint's tensors in host memory: exact, and in which order a device is made to wait."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from pretrain.snapshot import HostCopies

CPU = torch.device("cpu")


def contents(value: float) -> dict[str, Any]:
    rows = torch.full((4, 6), value)
    return {
        "weights": [rows, rows.T, rows[:, 1], rows.bfloat16()],
        "expanded": torch.tensor([value]).expand(5),
        "step": torch.tensor(value),
        "plain": (3, {"text": "x"}),
    }


@pytest.mark.parametrize("reuse", [False, True])
def test_copies_are_exact_and_of_their_own(reuse):
    copies = HostCopies(CPU, reuse)
    places = []
    for value in (1.0, 2.0):
        source = contents(value)
        copies.begin()
        found = copies.deep(source)
        copies.end()
        copies.wait()
        for ours, theirs in zip(found["weights"], source["weights"], strict=True):
            assert torch.equal(ours, theirs)
            assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.to("cpu", copy=True).stride())
            assert ours.untyped_storage().nbytes() == ours.nbytes  # torch.save writes all of it
        source["weights"][0].zero_()
        assert found["weights"][0].eq(value).all()
        assert found["step"].item() == value
        assert found["expanded"].tolist() == [value] * 5
        assert found["plain"] == (3, {"text": "x"})
        places.append([tensor.data_ptr() for tensor in found["weights"]])
        kept = found
    assert (places[0] == places[1]) == reuse
    assert kept["weights"][0].eq(2).all()


def test_a_changed_shape_gets_other_memory():
    copies = HostCopies(CPU, reuse=True)
    for size in (3, 5, 5):
        copies.begin()
        assert copies.copy(torch.arange(float(size))).tolist() == list(range(size))


def test_training_waits_for_the_copies_on_the_device_only(monkeypatch):
    """On a recorded device: copies follow what was computed, and the next step follows the copies."""
    log: list[str] = []

    class Stream:
        name = "side"

        def wait_stream(self, other: Any) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Event:
        def record(self, stream: Any) -> None:
            log.append(f"event after {stream.name}")

        def wait(self, stream: Any) -> None:
            log.append(f"{stream.name} waits for event")

        def synchronize(self) -> None:
            log.append("host waits for event")

    api = SimpleNamespace(
        Stream=Stream, Event=Event, current_stream=lambda: SimpleNamespace(name="main"), stream=nullcontext
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: api)
    copies = HostCopies(CPU, reuse=True)
    copies.begin()
    on_device, host = Mock(), Mock()
    on_device.device.type = "cuda"
    host.copy_.side_effect = lambda source, non_blocking: log.append("copy")
    monkeypatch.setattr(copies, "_memory", lambda tensor, pinned: host)
    copies.copy(on_device)
    log.append("DeepSpeed makes another tensor")
    copies.copy(on_device)
    copies.end()
    copies.hold()
    one = ["side waits for main", "copy"]
    assert log == [
        *(*one, "DeepSpeed makes another tensor", *one),
        *("event after side", "main waits for event"),
    ]
    copies.wait()
    assert log[-1] == "host waits for event"
