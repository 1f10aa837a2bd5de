"""Wrong inputs, generated and seeded: configs with one thing wrong, files with some bytes wrong."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

# One of every type, and the values that arithmetic does not expect.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**9, 2**63, 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "x", "5", "true", "nan", "\x00", "$HOME", "${x}", "../..", "é" * 300,
    [], [1], ["x"], [None], [[]], {}, {"x": 1}, {"x": {}},
)  # fmt: skip
Path = tuple[str | int, ...]


def paths(values: Any, here: Path = ()) -> Iterator[Path]:
    """Where every value lies, sections and lists included, but not the whole."""
    if here:
        yield here
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in items:
        yield from paths(value, (*here, key))


def config_mutations(values: dict[str, Any], count: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was done, the mutated copy) of a config, `count` times.

    A value becomes another one, a key is deleted, misspelt or added. The result may be valid by chance.
    """
    draw = random.Random(seed)
    places = list(paths(values))
    for _ in range(count):
        place = draw.choice(places)
        mutated = copy.deepcopy(values)
        holder: Any = mutated
        for key in place[:-1]:
            holder = holder[key]
        last, name = place[-1], ".".join(map(str, place))
        kind = draw.choice(("value", "value", "value", "value", "delete", "misspell", "add"))
        if kind == "value" or not isinstance(holder, dict):
            new = draw.choice(VALUES)
            holder[last] = new
            yield f"{name} = {new!r}", mutated
        elif kind == "delete":
            del holder[last]
            yield f"{name} deleted", mutated
        elif kind == "misspell":
            holder[f"{last}_"] = holder.pop(last)
            yield f"{name} misspelt", mutated
        else:
            holder["a_key_nobody_knows"] = draw.choice(VALUES)
            yield f"a key added beside {name}", mutated


def byte_mutations(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(what was done, the damaged copy) of a file, `count` times; every copy differs from `data`."""
    draw = random.Random(seed)
    while count:
        at = draw.randrange(len(data))
        to = min(len(data), at + draw.choice((1, 4, 512, 4096)))
        kind = draw.choice(("flip", "zero", "cut", "remove", "repeat", "insert"))
        if kind == "flip":
            bit = draw.randrange(8)
            damaged = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            what = f"bit {bit} of byte {at} flipped"
        elif kind == "cut":
            damaged, what = data[:at], f"cut to {at} bytes"
        else:
            middle = {
                "zero": bytes(to - at),
                "remove": b"",
                "repeat": data[at:to] * 2,
                "insert": draw.randbytes(to - at) + data[at:to],
            }[kind]
            damaged, what = data[:at] + middle + data[to:], f"{kind} at {at}, {to - at} bytes"
        if damaged != data:
            count -= 1
            yield what, damaged


def refusal(read: Callable[[], Any]) -> str | None:
    """The line that refuses an input; None: it is accepted. Any other error is the test's failure."""
    try:
        read()
    except (ValueError, OSError) as error:
        line = str(error)
    else:
        return None
    assert line
    assert "\n" not in line, line
    return line
